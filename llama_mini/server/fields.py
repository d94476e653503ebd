"""The fields of requests: which there are, and those that both endpoints share.

Each field of OpenAI's API is honoured or refused by name, and so are vLLM's further ones.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from llama_mini.engine.structured import STRUCTURES, of_response_format
from llama_mini.errors import RequestError, TokenizerError
from llama_mini.validate import as_dict, check_flag, check_whole, join_names, short_repr

MAX_LOGPROBS = 20  # likeliest tokens for each token
MAX_ANSWERS = 128  # OpenAI's limit of `n`
MAX_STOPS = 32
PROMPTS = ("messages", "prompt", "content", "tokens")  # what a request is about has one of these names

Fixed = dict[str, tuple[tuple[Any, ...], str]]
_SAMPLING = (  # fields of SamplingParams under their own names
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("n", "seed", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "cache_salt"),
)
_STRUCTURED = {"json": "json_schema", "regex": "regex", "grammar": "grammar", "choice": "choice"}  # vLLM's name -> ours
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "request_id", "id_slot")  # change no answer
_FIXED: Fixed = {  # field -> the values that it may have, and why no others
    "store": ((False,), "nothing is stored here"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "cache_prompt": ((True,), "prompts are kept; give cache_salt to share none"),
    "prompt_cache_retention": (("in_memory",), "prompts are kept in memory alone"),
    "priority": ((0,), "requests run in the order in which they come"),
    "use_beam_search": ((False,), "there is no beam search"),
    "length_penalty": ((1,), "there is no beam search"),
    "early_stopping": ((False,), "there is no beam search"),
    "include_stop_str_in_output": ((False,), "a stop string is not part of the text"),
    "skip_special_tokens": ((True,), "special tokens are not part of the text"),
    "spaces_between_special_tokens": ((True,), "special tokens are not part of the text"),
}
FIXED_CHAT: Fixed = _FIXED | {
    "modalities": ((["text"],), "this model writes text alone"),
    "audio": ((), "this model writes text alone"),
    "prediction": ((), "answers are predicted without it"),
    "web_search_options": ((), "nothing is fetched"),
    "functions": ((), "give tools"),
    "function_call": ((), "give tool_choice"),
    "verbosity": (("medium",), "ask for it in the messages"),
    "chat_template": ((), "the server uses the template of its model"),
}
FIXED_TEXT: Fixed = _FIXED | {"suffix": (("",), "an answer follows its prompt")}
TEMPLATE = ("documents", "chat_template_kwargs", "reasoning_effort", "add_generation_prompt", "continue_final_message")
_BOTH = (
    *("model", "stream", "stream_options", "max_tokens", "logprobs", "logit_bias", "truncate_prompt_tokens", "echo"),
    *("response_format", "structured_outputs", "json_schema", "grammar", "n_predict", "truncation_side"),
    *("prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids"),
    *(*_SAMPLING, *_LABELS),
)
_CHAT = ("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls")
CHAT_FIELDS = frozenset((*_BOTH, *_CHAT, *TEMPLATE, *FIXED_CHAT))
TEXT_FIELDS = frozenset((*_BOTH, *FIXED_TEXT, "prompt", "best_of", "add_special_tokens"))


def given(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null, which means "not given"."""
    return {name: value for name, value in fields.items() if value is not None}


def check_fields(body: dict[str, Any], known: frozenset[str], fixed: Fixed, where: str = "") -> None:
    """Raises RequestError for an unknown field, and for a value that a field of `fixed` may not have."""
    for name, value in body.items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RequestError(f"unknown field {short_repr(where + name)}{hint}")
        if name in fixed:
            allowed, why = fixed[name]
            if not any(value == each and type(value) in (type(each), float) for each in allowed):
                must = " or ".join(map(repr, allowed))
                must = f"must be {must}, not" if must else "cannot be"
                raise RequestError(f"{where}{name} {must} {short_repr(value)}: {why}")


def field_of(error: Exception, body: Mapping[str, Any]) -> str | None:
    """The field of a body that an error is about: the first one that its message names, else the prompt."""
    prompt = next((name for name in PROMPTS if name in body), None)
    if isinstance(error, TokenizerError):  # has the words of a chat template
        return prompt
    names = {key: name for name, value in body.items() if isinstance(value, dict) for key in value}
    names |= {name: name for name in body}
    for word in re.findall(r"[A-Za-z_]\w*", str(error)):
        if word in names:
            return names[word]
        if word in PROMPTS:
            return prompt or word
        if word in STRUCTURES:  # these have other names in OpenAI's API and in vLLM's
            return next((name for name in ("response_format", "structured_outputs", "tools") if name in body), None)
    return None if str(error).startswith("unknown field") else prompt


def flag(body: dict[str, Any], name: str, default: bool = False) -> bool:
    """A field that is true or false. Raises RequestError for another value."""
    value = body.get(name, default)
    check_flag(name, value, RequestError)
    return bool(value)


def sampling_settings(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams. OpenAI's default temperature is 1."""
    settings = {"temperature": 1.0} | {name: body[name] for name in _SAMPLING if name in body}
    if "n" in settings:
        check_whole("n", settings["n"], RequestError, 1, MAX_ANSWERS)
    if isinstance(stops := settings.get("stop"), list) and len(stops) > MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} texts, more than {MAX_STOPS}")
    if "logit_bias" in body:
        settings["logit_bias"] = token_biases(body["logit_bias"])
    return settings | _structure(body)


def _structure(body: dict[str, Any]) -> dict[str, Any]:
    """What the text has to match, as a field of SamplingParams."""
    settings: dict[str, Any] = {}
    if "response_format" in body and (schema := of_response_format(body["response_format"])) is not None:
        settings["json_schema"] = schema
    outputs = body.get("structured_outputs", {})
    if not isinstance(outputs, dict):
        raise RequestError(f"structured_outputs must be an object, not {short_repr(outputs)}")
    outputs, prefix = given(outputs), "structured_outputs."
    check_fields(outputs, frozenset((*_STRUCTURED, "json_object")), {}, prefix)
    found = [(prefix + name, ours, outputs[name]) for name, ours in _STRUCTURED.items() if name in outputs]
    if flag(outputs, "json_object"):
        found.append((prefix + "json_object", "json_schema", {"type": "object"}))
    found += [(name, name, body[name]) for name in ("json_schema", "grammar") if name in body]  # llama.cpp's fields
    for where, name, value in found:
        if settings:
            raise RequestError(f"{where} is the second thing that the answer has to match: give one")
        settings[name] = value
    return settings


def token_biases(biases: Any) -> dict[int, float]:
    """`logit_bias`, of which the names are token ids, as JSON has it. Raises RequestError for anything else."""
    if not isinstance(biases, dict):
        raise RequestError(f"logit_bias must be an object of token id to number, not {short_repr(biases)}")
    if wrong := [token for token in biases if not (token.isascii() and token.isdecimal() and len(token) < 10)]:
        raise RequestError(f"logit_bias must have token ids as names, not {join_names(map(repr, wrong))}")
    return as_dict("logit_bias", ((int(token), bias) for token, bias in given(biases).items()), RequestError)


def response_settings(body: dict[str, Any], logprobs: str) -> dict[str, Any]:
    """The fields of ApiRequest that say what a response holds; `logprobs` names the number of likeliest tokens."""
    stream, options = flag(body, "stream"), body.get("stream_options", {})
    if not isinstance(options, dict):
        raise RequestError(f"stream_options must be an object, not {short_repr(options)}")
    if "stream_options" in body and not stream:
        raise RequestError("stream_options needs stream: true")
    options = given(options)
    if stream and "prompt_logprobs" in body:
        raise RequestError("prompt_logprobs are not part of a stream: give stream: false")
    known = frozenset(("include_usage", "continuous_usage_stats", "include_obfuscation"))
    fixed: Fixed = {"include_obfuscation": ((False,), "no text is added to the events")}
    check_fields(options, known, fixed, "stream_options.")
    usage, so_far = flag(options, "include_usage"), flag(options, "continuous_usage_stats")
    for name in (logprobs, "prompt_logprobs"):
        check_whole(name, body.get(name, 0), RequestError, 0, MAX_LOGPROBS)
    return {
        "stream": stream,
        "usage": usage,
        "usage_so_far": usage and so_far,
        "n_top": body.get(logprobs, 0),
        "n_prompt_top": body.get("prompt_logprobs"),
        "ids_as_tokens": flag(body, "return_tokens_as_token_ids"),
        "return_ids": flag(body, "return_token_ids"),
    }


def new_tokens(body: dict[str, Any], names: tuple[str, ...], least: int = 1) -> int | None:
    """The number of new tokens. The last one of several names is the newest and wins."""
    found = [name for name in names if name in body]
    for name in found:
        check_whole(name, body[name], RequestError, least)
    return body[found[-1]] if found else None
