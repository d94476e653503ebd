"""OpenAI's own client against the server on a socket: its types take every reply."""

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest

from llama_mini import LLM
from llama_mini.server.app import create_app
from llama_mini.server.settings import Settings
from tests.server.live import serving

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def address(llm: LLM) -> Iterator[str]:
    settings = Settings(model_names=("tiny",), api_keys=("sk-1",))
    with serving(create_app(llm, settings), settings) as (_, port):
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key="sk-1", max_retries=0) as client:
        yield client


def test_a_chat(client: openai.OpenAI) -> None:
    settings = {"model": "tiny", "messages": MESSAGES, "seed": 1, "max_tokens": 20, "logprobs": True, "top_logprobs": 2}
    reply = client.chat.completions.create(**settings)
    (choice,) = reply.choices
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 20
    stream = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == 20


def test_a_completion_and_further_fields(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=5, n=2, logprobs=1, echo=True, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text[0] for choice in reply.choices] == ["a", "a", "b", "b"]
    assert reply.usage.completion_tokens == 20


def test_json_by_a_schema(client: openai.OpenAI) -> None:
    properties = {"a": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form, seed=1)
    assert json.loads(reply.choices[0].message.content)["a"] in (True, False)


def test_errors_have_the_clients_classes(client: openai.OpenAI, address: str) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p must be") as raised:
        client.completions.create(model="tiny", prompt="a", top_p=3)
    assert raised.value.param == "top_p"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="x", prompt="a")
    with (
        openai.OpenAI(base_url=address, api_key="sk-2", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_stream_that_is_closed_frees_its_request(address: str) -> None:
    """Many at a time, and one that is left in its midst."""

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=address, api_key="sk-1", max_retries=0) as client:
            settings = {"model": "tiny", "prompt": "a", "temperature": 0, "extra_body": {"ignore_eos": True}}
            left = await client.completions.create(**settings, max_tokens=400, stream=True)
            await anext(aiter(left))
            await left.close()
            calls = [client.completions.create(**settings, max_tokens=8) for _ in range(8)]
            return [reply.choices[0].text for reply in await asyncio.gather(*calls)]

    assert len(set(asyncio.run(run()))) == 1
