"""What is wrong with a request: one error in OpenAI's shape, which names the field; the server lives."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llama_mini import LLM
from llama_mini.server.fields import CHAT_FIELDS, TEXT_FIELDS
from tests.server.local import Client

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
WRONG_SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b"null", "must be a JSON object, not NoneType"),
        (b'"text"', "must be a JSON object, not str"),
        (b'{"prompt": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"prompt": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"prompt": "\xff"}', "is not UTF-8 text"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is given twice"),
        (b'{"prompt": "a", "logit_bias": {"1": 2, "1": 3}}', "'1' is given twice"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": "a", "max_tokens": 1e400}', "max_tokens must be a whole number"),
    ],
)
def test_broken_bodies(client: Client, data: bytes, message: str) -> None:
    reply = client.http.post(TEXT, content=data, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert re.search(message, reply.json()["error"]["message"])
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_other_types_of_bodies(client: Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    reply = client.http.post(TEXT, content=b'{"prompt": "a"}', headers=headers)
    assert reply.status_code == 415
    assert "application/json" in reply.json()["error"]["message"]
    kind = "Application/JSON; charset=utf-8"
    reply = client.http.post(TEXT, content=b'{"prompt": "a", "max_tokens": 1}', headers={"content-type": kind})
    assert reply.status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_null_is_absent_in_every_field(client: Client, path: str) -> None:
    needed = {"messages": MESSAGES} if path == CHAT else {"prompt": "Hi"}
    fields = CHAT_FIELDS if path == CHAT else TEXT_FIELDS
    settings = needed | {"temperature": 0, "max_tokens": 3}
    nulls: dict[str, Any] = dict.fromkeys(fields - settings.keys())
    assert client.post(path, **nulls | settings)["choices"] == client.post(path, **settings)["choices"]
    for name in needed:
        assert name in client.refused(path, **nulls | {name: None})["message"]


@pytest.mark.slow
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_any_json_in_any_field_is_answered_or_refused(client: Client, path: str) -> None:
    """Never a failure of the server."""
    needed = {"messages": MESSAGES} if path == CHAT else {"prompt": "Hi"}
    values = [True, False, 0, -1, 1.5, 2**70, "", "x", [], [None], [[]], ["x", 1], {}, {"a": {"b": [1]}}, {"type": 3}]
    for name in sorted(CHAT_FIELDS if path == CHAT else TEXT_FIELDS):
        for value in values:
            body = needed | {"max_tokens": 1, name: value}
            reply = client.http.post(path, json=body)
            assert reply.status_code in (200, 400, 404), (name, value, reply.text)
            if reply.status_code != 200:
                error = reply.json()["error"]
                assert error["message"]
                # Of a prompt that is too long with max_tokens, OpenAI's API names the prompt.
                named = next(iter(needed)) if error["code"] == "context_length_exceeded" else name
                assert error["param"] == named, (name, value, error)


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        (CHAT, {"top_p": 2}, "top_p must be a finite number from 0 to 1, not 2", "top_p"),
        (CHAT, {"max_tokens": 0}, "max_tokens must be a whole number of at least 1, not 0", "max_tokens"),
        (CHAT, {"max_completion_tokens": -1}, "max_completion_tokens must be", "max_completion_tokens"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs needs logprobs: true", "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "from 0 to 20, not 21", "top_logprobs"),
        (CHAT, {"logprobs": 3}, "logprobs must be true or false, not 3", "logprobs"),
        (TEXT, {"logprobs": 21}, "logprobs must be a whole number from 0 to 20, not 21", "logprobs"),
        (TEXT, {"n": 129}, "n must be a whole number from 1 to 128, not 129", "n"),
        (TEXT, {"n": 2, "best_of": 3}, "best_of must be n, 2, not 3", "best_of"),
        (TEXT, {"suffix": "x"}, "suffix must be '', not 'x'", "suffix"),
        (TEXT, {"prompt": []}, "prompt must be a text, a list of token ids or a list of these, not []", "prompt"),
        (TEXT, {"prompt": ["a", 5]}, r"prompt\[1\] must be a text or a list of token ids, not 5", "prompt"),
        (TEXT, {"prompt": [0, 260]}, "token id 260 is outside the vocabulary of 260", "prompt"),
        (TEXT, {"stop": ["a"] * 33}, "stop has 33 texts, more than 32", "stop"),
        (TEXT, {"stop": [""]}, "stop must be non-empty strings", "stop"),
        (TEXT, {"logit_bias": {"260": 1}}, "logit_bias: token id 260 is outside the vocabulary of 260", "logit_bias"),
        (TEXT, {"logit_bias": {"a": 1, "b": 1}}, "not 'a', 'b'", "logit_bias"),
        (TEXT, {"logit_bias": {"1": "x"}}, "logit_bias of token 1 must be a number", "logit_bias"),
        (TEXT, {"stream_options": {"include_usage": True}}, "stream_options needs stream: true", "stream_options"),
        (TEXT, {"stream_options": {"include_usage": None}}, "stream_options needs stream: true", "stream_options"),
        (
            TEXT,
            {"stream": True, "stream_options": {"usage": 1}},
            "unknown field 'stream_options.usage'",
            "stream_options",
        ),
        (TEXT, {"a-b": 1}, "unknown field 'a-b'", None),
        (TEXT, {"temprature": 1}, "unknown field 'temprature'; did you mean temperature?", "temprature"),
        (TEXT, {"use_beam_search": True}, "must be False, not True: there is no beam search", "use_beam_search"),
        (CHAT, {"store": True}, "store must be False, not True: nothing is stored here", "store"),
        (CHAT, {"audio": {}}, "audio cannot be {}: this model writes text alone", "audio"),
        (CHAT, {"chat_template": "{{ 1 }}"}, "the server uses the template of its model", "chat_template"),
        (CHAT, {"messages": []}, "messages is list .*, expected a list of at least one", "messages"),
        (CHAT, {"messages": [{"role": 3, "content": "x"}]}, r"messages\[0\]\['role'\]", "messages"),
        (CHAT, {"reasoning_effort": "high"}, "the chat template does not read 'reasoning_effort'", "reasoning_effort"),
        (CHAT, {"response_format": {"type": "sound"}}, "unknown .* 'sound'; known: text", "response_format"),
        (CHAT, {"response_format": WRONG_SCHEMA}, "json_schema", "response_format"),
        (TEXT, {"json_schema": {"type": 3}}, "json_schema", "json_schema"),
        (TEXT, {"structured_outputs": {"regex": "["}}, "regex", "structured_outputs"),
        (TEXT, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "the second thing", "structured_outputs"),
        (TEXT, {"structured_outputs": {"grammar": "a"}, "grammar": "b"}, "the second thing", "grammar"),
        (TEXT, {"structured_outputs": {"grammer": "a"}}, "did you mean grammar", "structured_outputs"),
        (CHAT, {"messages": None}, "messages is missing, expected a list", "messages"),
        (TEXT, {"prompt": None}, "prompt must be a text", "prompt"),
        (TEXT, {"prompt": "", "add_special_tokens": False}, "no token to start from", "prompt"),
        (CHAT, {"chat_template_kwargs": {"n": 1}}, "does not read 'n'", "chat_template_kwargs"),
        (CHAT, {"tools": [{"type": "function"}]}, r"tools\[0\] must be", "tools"),
    ],
)
def test_wrong_fields(client: Client, path: str, body: dict[str, Any], message: str, param: str | None) -> None:
    error = client.refused(path, **({"messages": MESSAGES} if path == CHAT else {"prompt": "a"}) | body)
    assert re.search(message.replace("[]", r"\[\]").replace("{}", r"\{\}"), error["message"]), error
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context(client: Client, stream: bool) -> None:
    """Before a stream begins, with both numbers."""
    error = client.refused(TEXT, prompt="x" * 500, max_tokens=20, stream=stream)
    assert error["message"] == "501 prompt tokens and 20 new ones exceed the context of 512"
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    error = client.refused(CHAT, messages=[{"role": "user", "content": "x" * 600}], stream=stream)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert client.refused(TEXT, prompt="x" * 600, stream=stream)["code"] == "context_length_exceeded"
    assert client.post(TEXT, prompt="x" * 500, max_tokens=11, ignore_eos=True)["usage"]["total_tokens"] == 512


def test_the_name_of_the_model(client: Client) -> None:
    for path, more in ((CHAT, {"messages": MESSAGES}), (TEXT, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        error = client.refused(path, 404, model="gpt-4", **more)
        assert error["message"] == "model 'gpt-4' does not exist: the models here are tiny, other"
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert client.post(TEXT, model="other", prompt="a", max_tokens=1)["model"] == "other"
    assert client.post(TEXT, prompt="a", max_tokens=1)["model"] == "tiny"
    assert [model["id"] for model in client.http.get("/v1/models").json()["data"]] == ["tiny", "other"]
    assert client.http.get("/v1/models/other").json()["max_model_len"] == 512
    assert client.http.get("/v1/models/org/x").status_code == 404
    assert client.http.get("/v1/models/org/x").json()["error"]["code"] == "model_not_found"


def test_other_addresses_and_methods(client: Client) -> None:
    wrong = ("GET", "/v2", 404), ("GET", TEXT, 405), ("POST", "/v1/models", 405), ("POST", TEXT + "/", 404)
    for method, path, status in wrong:
        reply = client.http.request(method, path, follow_redirects=False)
        assert reply.status_code == status
        assert f"there is no {method} {path} here" in reply.json()["error"]["message"]


def test_a_template_that_refuses(tiny_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dir, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    with_template = copy / "tokenizer_config.json"
    config = json.loads(with_template.read_text())
    with_template.write_text(
        json.dumps(config | {"chat_template": "{{ raise_exception('No system role for a model!') }}"})
    )
    with Client(LLM(copy, dtype="float32", kernels="off", threads=1)) as client:
        error = client.refused(CHAT, messages=MESSAGES, model="tiny")
        assert "No system role for a model!" in error["message"]
        assert error["param"] == "messages"
    with_template.write_text(json.dumps(config))
    with Client(LLM(copy, dtype="float32", kernels="off", threads=1)) as client:
        error = client.refused(CHAT, messages=MESSAGES)
        assert "has no chat template" in error["message"]
        assert error["param"] == "messages"


def test_tokens_and_text(client: Client) -> None:
    reply = client.post("/tokenize", prompt="ab", return_token_strs=True)
    assert reply == {
        "count": 3,
        "max_model_len": 512,
        "tokens": reply["tokens"],
        "token_strs": ["<|begin_of_text|>", "a", "b"],
    }
    assert client.post("/tokenize", content="ab")["tokens"] == reply["tokens"]
    assert client.post("/tokenize", prompt="ab", add_special_tokens=False)["tokens"] == reply["tokens"][1:]
    assert client.post("/detokenize", tokens=reply["tokens"]) == {"prompt": "<|begin_of_text|>ab"}
    assert client.post("/detokenize", tokens=[]) == {"prompt": ""}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": "a", "x": 1}, "x"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ):
        assert client.refused(path, **body)["param"] == param
