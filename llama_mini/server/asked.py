"""What a request asks for: its fields, checked, as prompts and SamplingParams.

Each field of OpenAI's API is honoured or refused by name, and so are vLLM's further ones where the engine has what they
ask for.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from llama_mini.engine.sampling_params import SamplingParams
from llama_mini.errors import RequestError
from llama_mini.tokenizer import Tokenizer
from llama_mini.validate import check_flag, check_whole, is_token, is_whole, short_repr

MAX_LOGPROBS = 20  # likeliest tokens for each token
MAX_ANSWERS = 128  # OpenAI's limit of `n`
MAX_STOPS = 32

Only = dict[str, tuple[tuple[Any, ...], str]]
_SAMPLING = (  # fields of SamplingParams under their own names
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("n", "seed", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "cache_salt"),
)
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "request_id")  # they change no answer
_ONLY: Only = {  # field -> what it may say, and why nothing else
    "store": ((False,), "nothing is stored here"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "prompt_cache_retention": (("in_memory",), "prompts are kept in memory alone"),
    "priority": ((0,), "requests run in the order in which they come"),
    "use_beam_search": ((False,), "there is no beam search"),
    "length_penalty": ((1,), "there is no beam search"),
    "early_stopping": ((False,), "there is no beam search"),
    "include_stop_str_in_output": ((False,), "a stop string is not part of the text"),
    "skip_special_tokens": ((True,), "special tokens are not part of the text"),
    "spaces_between_special_tokens": ((True,), "special tokens are not part of the text"),
}
_ONLY_CHAT: Only = {
    "modalities": ((["text"],), "this model writes text alone"),
    "audio": ((), "this model writes text alone"),
    "prediction": ((), "it is guessed without it"),
    "web_search_options": ((), "nothing is fetched"),
    "functions": ((), "give tools"),
    "function_call": ((), "give tool_choice"),
    "verbosity": (("medium",), "say it in the messages"),
}
_ONLY_TEXT: Only = {"suffix": (("",), "an answer follows its prompt")}
_BOTH = {"model", "stream", "stream_options", "max_tokens", "logprobs", "logit_bias", "truncate_prompt_tokens"}
_TEMPLATE = {"documents", "chat_template_kwargs", "reasoning_effort", "add_generation_prompt", "continue_final_message"}
CHAT_FIELDS = frozenset(
    {*_BOTH, *_SAMPLING, *_LABELS, *_ONLY, *_ONLY_CHAT, *_TEMPLATE, "messages", "max_completion_tokens", "top_logprobs"}
)
TEXT_FIELDS = frozenset(
    {*_BOTH, *_SAMPLING, *_LABELS, *_ONLY, *_ONLY_TEXT, "prompt", "echo", "best_of", "add_special_tokens"}
)


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        prompts: token ids of each prompt.
        echo: the texts of the prompts, if they stand before the answers.
        no_answer: the one token that runs is not sent: the client asked for none.
        usage: whether a stream ends with the numbers of tokens.
        usage_so_far: whether all its chunks have them.
    """

    prompts: list[list[int]]
    params: SamplingParams
    stream: bool
    logprobs: bool
    usage: bool = False
    usage_so_far: bool = False
    echo: list[str] | None = None
    no_answer: bool = False


def chat_request(body: dict[str, Any], tokenizer: Tokenizer) -> Asked:
    """A body of /v1/chat/completions. Raises RequestError, TokenizerError."""
    _check_fields(body, CHAT_FIELDS, _ONLY | _ONLY_CHAT)
    logprobs = body.get("logprobs", False)
    check_flag("logprobs", logprobs, RequestError)
    if "top_logprobs" in body and not logprobs:
        raise RequestError("top_logprobs needs logprobs: true")
    settings = _settings(body) | {"top_logprobs": _n_logprobs("top_logprobs", body.get("top_logprobs", 0))}
    for name in ("max_tokens", "max_completion_tokens"):  # the new name wins
        if name in body:
            check_whole(name, body[name], RequestError)
            settings["max_tokens"] = body[name]
    template = {name: body[name] for name in _TEMPLATE if name in body}
    ids = tokenizer.apply_chat_template(body.get("messages"), **template)  # type: ignore[arg-type]
    params = SamplingParams(token_logprobs=logprobs, **settings)
    return Asked([_truncated(ids, body)], params, logprobs=logprobs, **_stream(body))


def text_request(body: dict[str, Any], tokenizer: Tokenizer) -> Asked:
    """A body of /v1/completions. Raises RequestError."""
    _check_fields(body, TEXT_FIELDS, _ONLY | _ONLY_TEXT)
    echo, special = body.get("echo", False), body.get("add_special_tokens", True)
    check_flag("echo", echo, RequestError)
    check_flag("add_special_tokens", special, RequestError)
    settings, logprobs = _settings(body), "logprobs" in body
    if logprobs:
        settings["top_logprobs"] = _n_logprobs("logprobs", body["logprobs"])
    n_new = body.get("max_tokens", 16)
    check_whole("max_tokens", n_new, RequestError, 0)
    settings["max_tokens"] = max(n_new, 1)
    if body.get("best_of", n := settings.get("n", 1)) != n:
        raise RequestError(f"best_of must be n, {n}, not {short_repr(body['best_of'])}: all answers are returned")
    prompts = _prompts(body.get("prompt"))
    ids = [tokenizer.encode(prompt, special) if isinstance(prompt, str) else prompt for prompt in prompts]
    ids = [_truncated(each, body) for each in ids]
    params = SamplingParams(prompt_logprobs=echo and logprobs, token_logprobs=logprobs, **settings)
    texts = [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts] if echo else None
    return Asked(ids, params, logprobs=logprobs, echo=texts, no_answer=n_new == 0, **_stream(body))


def _check_fields(body: dict[str, Any], known: frozenset[str], only: Only) -> None:
    for name, value in body.items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise RequestError(f"unknown field {short_repr(name)}" + (f"; did you mean {near[0]}?" if near else ""))
        if name in only:
            allowed, why = only[name]
            if not any(type(value) is type(each) and value == each for each in allowed):
                must = " or ".join(map(repr, allowed))
                must = f"must be {must}, not" if must else "cannot be"
                raise RequestError(f"{name} {must} {short_repr(value)}: {why}")


def _settings(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams. OpenAI's default temperature is 1."""
    settings = {"temperature": 1.0} | {name: body[name] for name in _SAMPLING if name in body}
    if "n" in settings:
        check_whole("n", settings["n"], RequestError, 1, MAX_ANSWERS)
    if isinstance(stops := settings.get("stop"), list) and len(stops) > MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} texts, more than {MAX_STOPS}")
    seed: Any = settings.get("seed")
    if is_whole(seed) and -(2**63) <= seed < -1:  # it is signed in OpenAI's API
        settings["seed"] = seed + 2**64
    if "logit_bias" in body:
        settings["logit_bias"] = _biases(body["logit_bias"])
    return settings


def _biases(given: Any) -> dict[int, float]:
    if not isinstance(given, dict):
        raise RequestError(f"logit_bias must be an object of token id to number, not {short_repr(given)}")
    biases = {}
    for token, bias in given.items():
        if not token.isascii() or not token.isdecimal() or len(token) > 9:
            raise RequestError(f"logit_bias must have token ids as names, not {short_repr(token)}")
        biases[int(token)] = bias
    return biases


def _n_logprobs(name: str, value: Any) -> int:
    check_whole(name, value, RequestError, 0, MAX_LOGPROBS)
    return int(value)


def _stream(body: dict[str, Any]) -> dict[str, Any]:
    stream = body.get("stream", False)
    check_flag("stream", stream, RequestError)
    options = body.get("stream_options", {})
    if "stream_options" in body and not stream:
        raise RequestError("stream_options needs stream: true")
    if not isinstance(options, dict):
        raise RequestError(f"stream_options must be an object, not {short_repr(options)}")
    options = {name: value for name, value in options.items() if value is not None}
    _check_fields(
        options,
        frozenset({"include_usage", "continuous_usage_stats", "include_obfuscation"}),
        {"include_obfuscation": ((False,), "no text is added to the events")},
    )
    flags = [options.get(name, False) for name in ("include_usage", "continuous_usage_stats")]
    for name, value in zip(("include_usage", "continuous_usage_stats"), flags, strict=True):
        check_flag(f"stream_options.{name}", value, RequestError)
    return {"stream": stream, "usage": flags[0], "usage_so_far": flags[0] and flags[1]}


def _prompts(given: Any) -> list[str | list[int]]:
    """The prompts: one text or list of ids, or a list of these."""
    one = isinstance(given, str) or (isinstance(given, list) and bool(given) and all(map(is_token, given)))
    prompts = [given] if one else given
    if not isinstance(prompts, list) or not prompts:
        raise RequestError(f"prompt must be a text, a list of token ids or a list of these, not {short_repr(given)}")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and all(map(is_token, prompt))):
            raise RequestError(f"prompt[{i}] must be a text or a list of token ids, not {short_repr(prompt)}")
    return prompts


def _truncated(ids: list[int], body: dict[str, Any]) -> list[int]:
    """The last `truncate_prompt_tokens` ids."""
    if "truncate_prompt_tokens" in body:
        check_whole("truncate_prompt_tokens", body["truncate_prompt_tokens"], RequestError)
        ids = ids[-body["truncate_prompt_tokens"] :]
    return ids
