"""openapi.yaml is served and true: made up requests get the replies that it promises, and it names every field."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from llama_mini import LLM
from llama_mini.server.app import create_app
from llama_mini.server.fields import CHAT_FIELDS, FIXED_CHAT, FIXED_TEXT, TEXT_FIELDS, Fixed
from llama_mini.server.page import FOLDER
from llama_mini.server.settings import Settings
from llama_mini.server.tokenization import DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from tests.server.live import serving
from tests.server.local import Client

TEXT = (FOLDER / "openapi.yaml").read_text(encoding="utf-8")
API: dict[str, Any] = yaml.safe_load(TEXT)
LEAST = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}
LEFT_OUT = ("tools", "tool_choice", "documents", "reasoning_effort", "chat_template_kwargs", "grammar", "n_predict")
# Why a request is refused although each field is as its schema says.
REASONS = (
    "needs|must be n|must be at most|part of a stream|one setting|second thing|grammar|regex|compile|no text|"
    "valid|logit_bias|outside the vocabulary|no token to start from|exceed the context|continue_final_message|matches"
)


def fields(path: str) -> dict[str, Any]:
    """The schema of each field of a request."""
    schema = API["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return resolved(schema)["properties"]


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    return API["components"]["schemas"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def never(only: Fixed) -> set[str]:
    """The fields that are known and refused, whatever they say."""
    return {name for name, (allowed, _) in only.items() if not allowed}


FIELDS = [(path, name) for path in LEAST for name in fields(path)]


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    limits = Settings()
    with serving(create_app(llm, limits), limits) as (_, port):
        yield f"http://127.0.0.1:{port}"


def test_it_is_served(client: Client) -> None:
    reply = client.http.get("/openapi.yaml")
    assert reply.text == TEXT
    assert reply.headers["content-type"].startswith("application/yaml")
    assert {route for route in API["paths"] if route.startswith("/v1")} == {
        route.path.replace("name:path", "model")
        for route in client.http.app.routes  # type: ignore[attr-defined]
        if route.path.startswith("/v1")
    }


def test_it_names_every_field_that_is_taken() -> None:
    assert fields("/v1/chat/completions").keys() == CHAT_FIELDS - never(FIXED_CHAT)
    assert fields("/v1/completions").keys() == TEXT_FIELDS - never(FIXED_TEXT)
    assert fields("/tokenize").keys() == TOKENIZE_FIELDS
    assert fields("/detokenize").keys() == DETOKENIZE_FIELDS


def test_null_is_not_given(client: Client) -> None:
    for path, least in LEAST.items():
        client.post(path, **dict.fromkeys(fields(path)) | least)


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_a_value_of_another_type_is_refused_and_the_field_named(path: str, name: str, client: Client) -> None:
    schema = fields(path)[name] | {"components": API["components"]}
    allows = jsonschema_rs.validator_for(schema).is_valid
    wrong = next((value for value in ("x", {"a": 1}, -7.5, [{}], True, 10**40) if not allows(value)), None)
    if wrong is None:
        assert schema.keys() - {"description", "components"} == set()  # anything goes
        return
    least = dict(LEAST[path])
    if path == "/tokenize" and name not in ("content", "add_special_tokens", "return_token_strs"):
        least = {} if name == "prompt" else {"messages": [{"role": "user", "content": "Hi"}]}
    error = client.refused(path, 404 if name == "model" else 400, **least | {name: wrong})
    assert name in error["message"] or name == error["param"]


def narrow(api: dict[str, Any]) -> dict[str, Any]:
    """The API for this one model, so that most requests are answered: its vocabulary and roles, few new tokens."""
    schemas = api["components"]["schemas"]
    schemas["Token"]["maximum"] = 259
    content, roles = {"type": "string", "minLength": 1, "maxLength": 40}, {"enum": ["system", "user"]}
    schemas["Message"] |= {"required": ["role", "content"], "additionalProperties": False}
    schemas["Message"]["properties"] = {"role": roles, "content": content}
    chat = schemas["ChatRequest"]["properties"]
    chat["model"].update(enum=["llama_mini", None])  # that of all requests, by an alias
    chat["json_schema"].update(enum=[{"type": "integer"}, {}, None])
    for name in ("ChatRequest", "TextRequest", "TokenizeRequest"):
        known = schemas[name]["properties"]
        for unknown in LEFT_OUT:
            known.pop(unknown, None)
    for name in ("ChatRequest", "TextRequest"):
        schemas[name]["properties"] |= {
            "max_tokens": {"enum": [1, 3, 8]},
            "n": {"enum": [1, 3]},
            "min_tokens": {"enum": [0, 1]},
        }
        schemas[name]["required"].append("max_tokens")
    schemas["TokenizeRequest"]["required"] = ["prompt"]
    for other in ("content", "messages", "continue_final_message"):
        schemas["TokenizeRequest"]["properties"].pop(other)
    return api


def whole(value: Any) -> Any:
    """1.0 is an integer to a schema, but here whole numbers are written without a point."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    return [whole(each) for each in value] if isinstance(value, list) else value


def fuzz(url: str, path: str, api: dict[str, Any], n: int) -> list[tuple[int, str]]:
    """The status and the text of each reply, all of which are as the API says."""
    (method,) = API["paths"][path]
    replies: list[tuple[int, str]] = []

    @seed(1)
    @settings(
        max_examples=n, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=schemathesis.openapi.from_dict(api)[path][method.upper()].as_strategy())
    def run(case: Any) -> None:
        case.body = whole(case.body)
        reply = case.call(base_url=url, timeout=30)
        case.validate_response(reply, excluded_checks=[positive_data_acceptance])
        replies.append((reply.status_code, reply.text))

    load_all_checks()
    run()
    return replies


@pytest.mark.parametrize("n", [10, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", LEAST)
def test_replies_conform(path: str, n: int, url: str) -> None:
    replies = fuzz(url, path, narrow(yaml.safe_load(TEXT)), n)
    refusals = [json.loads(text)["error"]["message"] for status, text in replies if status != 200]
    assert [text for text in refusals if not re.search(REASONS, text)] == []
    assert len(refusals) < 0.6 * len(replies)


@pytest.mark.slow
@pytest.mark.parametrize("path", API["paths"])
def test_nothing_makes_it_fail(path: str, url: str) -> None:
    assert {status for status, _ in fuzz(url, path, yaml.safe_load(TEXT), 200)} <= {200, 400, 404}
