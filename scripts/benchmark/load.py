"""A load on an OpenAI-compatible server, as many users make it: requests of unequal lengths, streamed, a few at a time.

The requests are those that are often used to compare servers: lengths of prompts and answers are log-normal, as those
of ShareGPT's conversations are. Only the lengths are like those; the texts are pieces of the bench's own.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from llama_mini.errors import LlamaMiniError
from llama_mini.tokenizer import Tokenizer

SECONDS = 1800  # that one request may take


@dataclass(frozen=True)
class Ask:
    """One request: a prompt, and how many tokens to generate, whatever their text."""

    prompt: str
    new: int

    def numbered(self, number: int) -> str:
        """The prompt after a number, which keeps caches of prefixes out; all numbers have as many tokens."""
        return f"{number:06}: {self.prompt}"


@dataclass
class Answer:
    """When the pieces of an answer came, in seconds from any fixed moment."""

    asked: float
    n_new: int = 0
    n_prompt: int = 0
    pieces: list[float] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]


def asks(tokenizer: Tokenizer, ids: Sequence[int], n: int = 64, seed: int = 7) -> list[Ask]:
    """n requests with prompts of 30 to 400 tokens and answers of 16 to 200, fixed by the seed."""
    draw = random.Random(seed)

    def length(mean: float, spread: float, least: int, most: int) -> int:
        while not least <= (value := int(draw.lognormvariate(mean, spread))) <= most:
            pass
        return value

    lengths = [(length(4.9, 0.75, 30, 400), length(4.4, 0.7, 16, 200)) for _ in range(n)]
    starts = range(0, len(ids) - 400, (len(ids) - 400) // n)
    return [
        Ask(tokenizer.decode(list(ids[at : at + prompt])), new)
        for at, (prompt, new) in zip(starts, lengths, strict=False)
    ]


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    request: Ask,
    number: int,
    chat: bool = False,
    begun: asyncio.Event | None = None,
) -> Answer:
    """One streamed answer. Raises LlamaMiniError.

    number: one that the server has not read. begun: set when the first part of the answer comes.
    """
    prompt = request.numbered(number)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    body |= {"model": model, "max_tokens": request.new, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer, rest, usage = Answer(time.perf_counter()), b"", None
    events: list[tuple[float, bytes]] = []
    async with session.post(f"{url}/v1/{'chat/' if chat else ''}completions", json=body) as reply:
        if reply.status != 200:
            raise LlamaMiniError(f"{url} answered with status {reply.status}: {(await reply.text())[:300]}")
        async for data in reply.content.iter_any():
            now = time.perf_counter()
            if begun is not None:
                begun.set()
            *whole, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
            events += [(now, event[5:].strip()) for event in whole if event.startswith(b"data:")]
    for moment, event in events:  # after the answer: reading JSON meanwhile would take time from the server
        if event == b"[DONE]":
            continue
        found = json.loads(event)
        if "error" in found:
            raise LlamaMiniError(f"{url} ended an answer: {found['error']!s:.300}")
        usage = found.get("usage") or usage
        for choice in found.get("choices") or []:
            if choice.get("text") or choice.get("delta", {}).get("content"):
                answer.pieces.append(moment)
    if usage is None or not answer.pieces:
        raise LlamaMiniError(f"{url} sent {'no text' if usage else 'no usage'} for {request.new} tokens")
    answer.n_new, answer.n_prompt = usage["completion_tokens"], usage["prompt_tokens"]
    return answer


def session() -> aiohttp.ClientSession:
    """Without limits of its own on connections and time."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=SECONDS))


async def closed_loop(
    url: str, model: str, requests: Sequence[Ask], users: int, turn: int, chat: bool = False
) -> dict[str, float]:
    """All requests by `users` that each wait for an answer before they ask again.

    Returns new tokens per second, and latencies in milliseconds. turn: a number that no other run has.
    """
    waiting = list(enumerate(requests, 1000 * turn))[::-1]
    answers: list[Answer] = []
    async with session() as client:

        async def user() -> None:
            while waiting:
                number, request = waiting.pop()
                answers.append(await ask(client, url, model, request, number, chat))

        started = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(users)))
        seconds = time.perf_counter() - started
    return {"speed": sum(answer.n_new for answer in answers) / seconds, **latencies(answers)}


async def beside_a_long_prompt(url: str, model: str, streams: Sequence[Ask], long: Ask, turn: int) -> dict[str, float]:
    """The longest gap in running streams while a long prompt is read, and the time to its first text, in ms."""
    async with session() as client:
        begun = [asyncio.Event() for _ in streams]
        running = [
            asyncio.create_task(ask(client, url, model, request, 1000 * turn + number, begun=event))
            for number, (request, event) in enumerate(zip(streams, begun, strict=True))
        ]
        for event, task in zip(begun, running, strict=True):
            await asyncio.wait([task, asyncio.create_task(event.wait())], return_when=asyncio.FIRST_COMPLETED)
        first = await ask(client, url, model, long, 1000 * turn + 999)
        answers = await asyncio.gather(*running)
    if any(answer.pieces[-1] < first.pieces[0] for answer in answers):
        raise LlamaMiniError("a stream ended before the long prompt was read: the streams must be longer")
    ends = first.pieces[0]
    gaps = [gap for answer in answers for gap in _gaps_between(answer.pieces, first.asked, ends)]
    return {"longest_gap": 1e3 * max(gaps), "first": 1e3 * (ends - first.asked)}


def latencies(answers: Sequence[Answer]) -> dict[str, float]:
    """In milliseconds: the time to the first text and those between texts of one answer, median and 95th percentile."""
    firsts = [answer.pieces[0] - answer.asked for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps] or [0.0]
    return {
        f"{name}{percent}": 1e3 * sorted(values)[len(values) * percent // 100]
        for name, values in {"first": firsts, "gap": gaps}.items()
        for percent in (50, 95)
    }


def _gaps_between(pieces: Sequence[float], start: float, end: float) -> list[float]:
    """Of the gaps that lie in an interval, or reach into it, their length."""
    pairs = itertools.pairwise(pieces)
    return [after - before for before, after in pairs if after > start and before < end]
