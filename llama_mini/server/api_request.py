"""What a request asks for: its fields, checked, as prompts and SamplingParams."""

from dataclasses import dataclass
from typing import Any

from llama_mini.engine.sampling_params import SamplingParams
from llama_mini.errors import RequestError
from llama_mini.server.fields import (
    CHAT_FIELDS,
    FIXED_CHAT,
    FIXED_TEXT,
    TEMPLATE,
    TEXT_FIELDS,
    check_fields,
    flag,
    new_tokens,
    response_settings,
    sampling_settings,
)
from llama_mini.server.tools import Tools, tools_of
from llama_mini.tokenizer import Tokenizer
from llama_mini.validate import check_choice, check_whole, is_token, short_repr


@dataclass(frozen=True)
class ApiRequest:
    """What a request asks for.

    Attributes:
        prompts: token ids of each prompt.
        echo: what stands before the answers to each prompt: the prompts, or the message that is continued.
        no_answer: whether no new token is asked for. One is generated, and not sent.
        usage: whether a stream ends with the numbers of tokens.
        usage_so_far: whether all its chunks have them.
        n_top: likeliest tokens beside each token of an answer.
        n_prompt_top: the same in `prompt_logprobs`; None without these.
        ids_as_tokens: whether log-probabilities name tokens by their ids.
        return_ids: whether the ids of all tokens are sent, too.
        tools: the functions that the model may call.
    """

    prompts: list[list[int]]
    params: SamplingParams
    stream: bool
    logprobs: bool
    usage: bool = False
    usage_so_far: bool = False
    echo: list[str] | None = None
    no_answer: bool = False
    n_top: int = 0
    n_prompt_top: int | None = None
    ids_as_tokens: bool = False
    return_ids: bool = False
    tools: Tools | None = None


def chat_request(body: dict[str, Any], tokenizer: Tokenizer) -> ApiRequest:
    """A body of /v1/chat/completions. Raises RequestError, TokenizerError."""
    check_fields(body, CHAT_FIELDS, FIXED_CHAT)
    logprobs = flag(body, "logprobs")
    if "top_logprobs" in body and not logprobs:
        raise RequestError("top_logprobs needs logprobs: true")
    settings, response = sampling_settings(body), response_settings(body, "top_logprobs")
    settings["token_logprobs"] = logprobs
    settings["max_tokens"] = new_tokens(body, ("n_predict", "max_tokens", "max_completion_tokens"))
    tools, variables = tools_of(body, tokenizer), {name: body[name] for name in TEMPLATE if name in body}
    if tools is not None:
        variables["tools"] = body["tools"]
        if any(name in body for name in ("response_format", "structured_outputs")):
            raise RequestError("tools do not go with a format of the answer: give tool_choice 'none', or no format")
        settings |= {} if tools.schema is None else {"json_schema": tools.schema}
    if variables.get("continue_final_message") is True and variables.get("add_generation_prompt") is True:
        raise RequestError("continue_final_message and add_generation_prompt cannot both be true: give one of them")
    messages: Any = body.get("messages")
    ids = tokenizer.apply_chat_template(messages, **variables)
    last = messages[-1]
    echo = flag(body, "echo") and isinstance(last.get("content"), str) and last.get("role") == "assistant"
    return ApiRequest(
        [_truncated(ids, body)],
        _params(settings, response, False),
        logprobs=logprobs,
        echo=[last["content"]] if echo else None,
        tools=tools,
        **response,
    )


def text_request(body: dict[str, Any], tokenizer: Tokenizer) -> ApiRequest:
    """A body of /v1/completions. Raises RequestError."""
    check_fields(body, TEXT_FIELDS, FIXED_TEXT)
    echo, special, logprobs = flag(body, "echo"), flag(body, "add_special_tokens", True), "logprobs" in body
    settings, response = sampling_settings(body), response_settings(body, "logprobs")
    n_new = new_tokens(body, ("n_predict", "max_tokens"), 0)
    n_new = 16 if n_new is None else n_new  # OpenAI's default
    if body.get("best_of", n := settings.get("n", 1)) != n:
        raise RequestError(f"best_of must be n, {n}, not {short_repr(body['best_of'])}: all answers are returned")
    prompts = _prompts(body.get("prompt"))
    all_ids = [tokenizer.encode(prompt, special) if isinstance(prompt, str) else prompt for prompt in prompts]
    ids = [_truncated(each, body) for each in all_ids]
    pairs = zip(prompts, ids, all_ids, strict=True) if echo else ()
    texts = [p if isinstance(p, str) and len(a) == len(b) else tokenizer.decode(a, False) for p, a, b in pairs]
    return ApiRequest(
        ids,
        _params(settings | {"max_tokens": n_new or 1, "token_logprobs": logprobs}, response, echo and logprobs),
        logprobs=logprobs,
        echo=texts if echo else None,
        no_answer=n_new == 0,
        **response,
    )


def _params(settings: dict[str, Any], response: dict[str, Any], echo: bool) -> SamplingParams:
    """With `echo`, prompts have log-probabilities as answers have."""
    n_prompt = response["n_prompt_top"]
    top = max(response["n_top"], n_prompt or 0)
    return SamplingParams(**settings, top_logprobs=top, prompt_logprobs=echo or n_prompt is not None)


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
    """The last `truncate_prompt_tokens` ids; with `truncation_side` "right", the first ones."""
    side = body.get("truncation_side", "left")
    check_choice("truncation_side", side, ("left", "right"), RequestError)
    if (n := body.get("truncate_prompt_tokens", -1)) == -1:
        return ids
    check_whole("truncate_prompt_tokens", n, RequestError)
    return ids[:n] if side == "right" else ids[-n:]
