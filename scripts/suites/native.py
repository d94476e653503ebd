"""llama.cpp's own requests as OpenAI's: its /completion and /slots, which most of its tests use whatever they test."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Body = dict[str, Any]
Ask = Callable[..., Any]  # make_request of their ServerProcess
COMPLETION = ("/completion", "/completions")
SAME = ("prompt", "seed", "temperature", "ignore_eos", "stream")  # names that both APIs have


def translated(make_request: Ask) -> Ask:
    """make_request for requests of either API, in which a process and its settings come first."""

    def request(process: Any, method: str, path: str, data: Body | None = None, **settings: Any) -> Any:
        if path == "/slots" and process.server_slots:
            reply = make_request(process, method, "/metrics", **settings)
            running = re.search(r"^llama_mini:num_requests_running (\d+)", reply.body, re.MULTILINE)
            assert running, reply.body
            reply.body = [{"is_processing": i < int(running[1])} for i in range(process.n_slots)]
            return reply
        if method != "POST" or path not in COMPLETION or data is None:
            return make_request(process, method, path, data, **settings)
        ours = to_openai(process, data, make_request)
        reply = make_request(process, method, "/v1/completions", ours, **settings)
        if reply.status_code == 200:
            reply.body = from_openai(reply.body, data)
        return reply

    return request


def translated_stream(make_stream_request: Ask, make_request: Ask) -> Ask:
    def request(process: Any, method: str, path: str, data: Body, **settings: Any) -> Iterator[Body]:
        if path not in COMPLETION:
            yield from make_stream_request(process, method, path, data, **settings)
            return
        ours = to_openai(process, data, make_request)
        for event in make_stream_request(process, method, "/v1/completions", ours, **settings):
            yield {**from_openai(event, data), "stop": event["choices"][0]["finish_reason"] is not None}

    return request


def to_openai(process: Any, data: Body, make_request: Ask) -> Body:
    """A body for /v1/completions. What the process was started with is the default, as there."""
    body = {"seed": process.seed, "temperature": process.temperature}
    body |= {name: value for name, value in data.items() if name in SAME}
    n_new = data.get("n_predict", process.n_predict)
    if n_new == -1:  # to the end of the context
        counted = make_request(process, "POST", "/tokenize", {"prompt": data["prompt"]}).body
        n_new = counted["max_model_len"] - counted["count"]
    biases = data.get("logit_bias", {})
    pairs = biases.items() if isinstance(biases, Mapping) else biases
    found: dict[str, float] = {}
    for what, bias in pairs:  # of a token, or of each token of a text
        is_text = isinstance(what, str) and not what.isdecimal()
        tokens = make_request(process, "POST", "/tokenize", {"content": what}).body["tokens"] if is_text else [what]
        found |= {str(token): bias for token in tokens}
    return body | {"max_tokens": n_new, "return_token_ids": True, **({"logit_bias": found} if found else {})}


def from_openai(body: Body, data: Body) -> Body:
    """A body of /completion, with those of its fields that say the same as OpenAI's."""
    choice, usage = body["choices"][0], body.get("usage")
    found = {
        "content": choice["text"],
        "tokens": choice["token_ids"] if data.get("return_tokens") or data.get("stream") else [],
        "has_new_line": "\n" in choice["text"],
        "truncated": False,
    }
    if usage:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        n_prompt = usage["prompt_tokens"] - cached
        found["timings"] = {"prompt_n": n_prompt, "cache_n": cached, "predicted_n": usage["completion_tokens"]}
    return found
