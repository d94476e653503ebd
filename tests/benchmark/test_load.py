"""The load on servers: its requests, and the figures of answers whose times are known."""

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web

from benchmark.load import Answer, Ask, asks, beside_a_long_prompt, closed_loop, latencies
from benchmark.servers import command_of
from llama_mini.errors import LlamaMiniError
from llama_mini.tokenizer import Tokenizer


class Server:
    """Sends `new` texts, an usage of twice as many tokens, and remembers what was asked, and how many at once."""

    def __init__(self, *first: bytes) -> None:
        self.first, self.asked, self.running, self.most = first, list[dict[str, object]](), 0, 0

    async def __call__(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.asked.append(body)
        self.running += 1
        self.most = max(self.most, self.running)
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(http)
        for part in self.first:
            await reply.write(part)
        chat = http.path.startswith("/v1/chat")
        for _ in range(body["max_tokens"]):
            choice = {"delta": {"content": "a"}} if chat else {"text": "a"}
            await reply.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            await asyncio.sleep(0)
        usage = {"completion_tokens": 2 * body["max_tokens"], "prompt_tokens": 5}
        await reply.write(
            b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\r\n\r\ndata: [DONE]\n\n"
        )
        self.running -= 1
        return reply


async def with_server(server: Server, ask: object) -> dict[str, float]:
    app = web.Application()
    app.router.add_post("/v1/{path:.*}", server)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        return await ask(f"http://127.0.0.1:{runner.addresses[0][1]}")  # type: ignore[operator]
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("chat", [False, True])
def test_a_closed_loop_asks_each_request_once_and_never_more_users_than_there_are(chat: bool) -> None:
    server, requests = Server(), [Ask(f"prompt {i}", i + 1) for i in range(7)]
    found = asyncio.run(with_server(server, lambda url: closed_loop(url, "m", requests, 3, 2, chat)))
    prompts = [body["messages"][0]["content"] if chat else body["prompt"] for body in server.asked]  # type: ignore[index]
    assert sorted(prompts) == [f"{2000 + i:06}: prompt {i}" for i in range(7)]
    assert server.most <= 3
    assert {body["ignore_eos"] for body in server.asked} == {True}
    assert found["speed"] > 0
    assert found["first50"] > 0


def test_a_server_that_refuses_or_ends_an_answer_is_an_error() -> None:
    failing = Server(b'data: {"error": {"message": "no room"}}\n\n')
    with pytest.raises(LlamaMiniError, match=r"ended an answer: .*no room"):
        asyncio.run(with_server(failing, lambda url: closed_loop(url, "m", [Ask("a", 2)], 1, 0)))
    with pytest.raises(LlamaMiniError, match="status 404"):
        asyncio.run(with_server(failing, lambda url: closed_loop(f"{url}/no", "m", [Ask("a", 2)], 1, 0)))


def test_latencies_are_those_of_the_texts() -> None:
    answers = [Answer(0.0, pieces=[0.5, 0.6, 0.7]), Answer(1.0, pieces=[1.1, 1.2, 2.2]), Answer(2.0, pieces=[2.3])]
    assert latencies(answers) == pytest.approx({"first50": 300, "first95": 500, "gap50": 100, "gap95": 1000})


def test_streams_must_outlast_the_long_prompt() -> None:
    streams = [Ask("a", 1)] * 2
    with pytest.raises(LlamaMiniError, match="must be longer"):
        asyncio.run(with_server(Server(), lambda url: beside_a_long_prompt(url, "m", streams, Ask("long", 1), 0)))


def test_the_load_has_lengths_like_those_of_conversations(tiny_dir: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_dir)
    ids = [65 + i % 26 for i in range(30_000)]
    load = asks(tokenizer, ids)
    assert load == asks(tokenizer, ids)
    lengths = [len(tokenizer.encode(each.prompt, add_special_tokens=False)) for each in load]
    assert len(load) == 64
    assert 30 <= min(lengths) <= max(lengths) <= 400
    assert 110 < sum(lengths) / 64 < 180
    assert 16 <= min(each.new for each in load) <= max(each.new for each in load) <= 200
    assert 60 < sum(each.new for each in load) / 64 < 110


def test_another_server_is_an_address_or_a_command() -> None:
    assert command_of("https://host:1/v1") == "https://host:1/v1"
    assert command_of("serve 'my model' --port {port}") == ["serve", "my model", "--port", "{port}"]
