"""Keeps a server under load, and checks that every answer is what it is alone and that its memory stays.

    python scripts/soak.py [--seconds 600] [--model M] [--quantize int8]

Starts the server, asks each question once alone, and then many at a time: streams and whole replies, clients that
leave, wrong requests, and every ten seconds 300 connections at once. Prints counts and the server's memory; exit code 1
if an answer differs, a request is treated wrongly, or memory grows.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil

from llama_mini.cli.common import exit_code_of
from llama_mini.errors import LlamaMiniError

PATH = "/v1/completions"
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
CLIENTS = 24  # at a time, beside the bursts
BURST, BURST_SECONDS = 300, 10.0
WRONG: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b"[]", 400),
    (b'{"prompt": "x", "model": "nobody"}', 404),
    (b'{"prompt": "x", "max_tokens": 99999999}', 400),
    (b'{"prompt": "x", "temperature": "hot"}', 400),
]
TERMINATED = 143
GROWTH = 1.03  # of the median memory from the second third to the last one, beyond 8 MiB


class Failure(LlamaMiniError):
    """The server did not do what it must."""


def questions(rng: random.Random) -> list[dict[str, Any]]:
    """Bodies that begin alike and differ in length, some greedy and some with a seed."""
    text = "the sea was calm and the old man looked at his boat for a long time before he said"
    words = text.split()
    made: list[dict[str, Any]] = []
    for i in range(40):
        prompt = " ".join(["Once upon a time,", *(words[: i % 3 * 6]), *rng.choices(words, k=rng.randint(1, 40))])
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.randint(1, 48), "ignore_eos": True}
        made.append(body | ({"temperature": 0} if i % 2 else {"temperature": 1, "seed": i, "top_p": 0.9}))
    return made


class Soak:
    def __init__(self, port: int, process: psutil.Process, seed: int) -> None:
        self._port, self._process, self._rng = port, process, random.Random(seed)
        self._questions = questions(self._rng)
        self._alone: list[str] = []
        self.counts: Counter[str] = Counter()
        self.memory: list[int] = []

    async def run(self, seconds: float) -> None:
        self._alone = [await self._text(body) for body in self._questions]
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(end))
            group.create_task(self._bursts(end))
            while time.monotonic() < end:
                self.memory.append(self._process.memory_info().rss)
                await asyncio.sleep(0.2)

    async def _client(self, end: float) -> None:
        while time.monotonic() < end:
            await self._rng.choices([self._check, self._leave, self._err], [6, 2, 1])[0]()

    async def _check(self, busy: bool = False) -> None:
        """Asks a question and compares the answer. `busy`: the server may refuse it, if it says when to ask again."""
        i = self._rng.randrange(len(self._questions))
        stream = self._rng.random() < 0.5
        try:
            text = await self._text(self._questions[i] | {"stream": stream})
        except ConnectionRefusedError:
            self.counts["refused"] += 1
            if not busy:
                raise
            return
        self.counts["answered"] += 1
        if text != self._alone[i]:
            raise Failure(f"{self._questions[i]} is {text!r} among others, and alone {self._alone[i]!r}")

    async def _leave(self) -> None:
        """Reads a part of a stream, or nothing of a whole reply, and goes."""
        body = self._rng.choice(self._questions) | {"stream": self._rng.random() < 0.5, "max_tokens": 200}
        async with self._connection(post(json.dumps(body).encode())) as reader:
            if body["stream"]:
                await reader.read(self._rng.randint(1, 4000))
        self.counts["left"] += 1

    async def _err(self) -> None:
        body, expected = self._rng.choice(WRONG)
        status, _, reply = await self._reply(body)
        if status != expected or "error" not in json.loads(reply):
            raise Failure(f"{body!r} must be refused with {expected}, and got {status}: {reply[:200]!r}")
        self.counts["wrong"] += 1

    async def _bursts(self, end: float) -> None:
        while time.monotonic() < end:
            burst = asyncio.gather(*(self._check(busy=True) for _ in range(BURST)))
            started = time.monotonic()
            async with self._connection(HEALTH) as reader:
                if not (await reader.read()).startswith(b"HTTP/1.1 200 "):
                    raise Failure("/health does not answer while 300 clients ask")
            self.counts["slowest /health, ms"] = max(
                self.counts["slowest /health, ms"], round(1000 * (time.monotonic() - started))
            )
            await burst
            await asyncio.sleep(max(0.0, min(started + BURST_SECONDS, end) - time.monotonic()))

    async def _text(self, body: dict[str, Any]) -> str:
        status, head, reply = await self._reply(json.dumps(body).encode())
        if status in (429, 503) and b"\r\nretry-after: " in head.lower():
            raise ConnectionRefusedError
        if status != 200:
            raise Failure(f"{body} got {status}: {reply[:200]!r}")
        if not body.get("stream"):
            return json.loads(reply)["choices"][0]["text"]
        *events, done, _ = [line for line in reply.decode().split("\n\n") if line != ": keepalive"]
        if done != "data: [DONE]":
            raise Failure(f"the stream of {body} ends with {done!r}")
        return "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)

    async def _reply(self, body: bytes) -> tuple[int, bytes, bytes]:
        async with self._connection(post(body)) as reader:
            got = await reader.read()
        head, _, rest = got.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            whole = b""
            while (size := int(rest.partition(b"\r\n")[0], 16)) > 0:
                start = rest.index(b"\r\n") + 2
                whole, rest = whole + rest[start : start + size], rest[start + size + 2 :]
            rest = whole
        return int(head.split(b" ", 2)[1]), head, rest

    @asynccontextmanager
    async def _connection(self, request: bytes) -> AsyncIterator[asyncio.StreamReader]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(request)
            yield reader
        finally:
            writer.transport.abort()


def post(body: bytes) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def run(args: argparse.Namespace, others: list[str]) -> None:
    """Raises Failure."""
    command = [sys.executable, "-m", "llama_mini.serve", "--port", "0", *others]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            first = server.stderr.readline()
            if " is served at http://" not in first:
                raise Failure(f"the server does not start: {first.strip()}")
            port = int(first.split("http://")[1].split(",")[0].split(":")[1])
            threading.Thread(target=deque, args=(server.stderr, 0), daemon=True).start()  # takes the log
            soak = Soak(port, psutil.Process(server.pid), args.seed)
            try:
                asyncio.run(soak.run(args.seconds))
            except* Failure as failures:
                raise failures.exceptions[0] from None
        finally:
            server.terminate()
            code = server.wait()
    third = len(soak.memory) // 3
    before, after = (statistics.median(part) / 2**20 for part in (soak.memory[third : 2 * third], soak.memory[-third:]))
    counts = ", ".join(f"{name}: {count:,}" for name, count in sorted(soak.counts.items()))
    print(f"{args.seconds:g} s; {counts}; memory {before:.0f} MiB, then {after:.0f} MiB; exit code {code}")
    if after > before * GROWTH + 8:
        raise Failure(f"the server's memory grew from {before:.0f} to {after:.0f} MiB")
    if code:
        raise Failure(f"the server ended with exit code {code}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="All other options are those of the server.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="how long; default 600")
    parser.add_argument("--seed", type=int, default=0, help="of what the clients do; default 0")
    args, others = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # which ends the server too
    return exit_code_of(lambda: run(args, others))


if __name__ == "__main__":
    sys.exit(main())
