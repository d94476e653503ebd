"""The measures of bench.py --serve: this project's server, others, and the engine without a server, in turn."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product

from benchmark.engines import OURS
from benchmark.load import Ask, asks, beside_a_long_prompt, closed_loop
from benchmark.measures import Bench, say
from benchmark.rounds import Child, Watch, in_rounds
from benchmark.servers import Server, llama_server, ours
from llama_mini.errors import LlamaMiniError
from llama_mini.tokenizer import Tokenizer

PEER = "llama-server"
ENGINE = "llama_mini without a server"
CHAT = "llama_mini, chats"
UNITS = {"speed": "serve", "first": "first text", "gap95": "gap 95%", "gap": "gap"}  # a figure -> its series
STREAMS = 4
Run = Callable[[int], dict[str, float]]


def serving(bench: Bench, others: Mapping[str, Sequence[str] | str]) -> None:
    """New tokens per second and latencies of all servers, format by format and for each number of users.

    others: names and commands, or addresses, of servers besides llama.cpp's, if that is installed.
    """
    sizes = bench.sizes
    tokenizer = Tokenizer.from_pretrained(bench.files.directory)
    requests = asks(tokenizer, [token for ids in bench.ids.values() for token in ids], sizes.requests)
    for number_format in [name for name in sizes.formats if name != "float32"]:
        with ExitStack() as stack:
            server = stack.enter_context(Server(ours(bench.files, number_format, bench.threads)))
            engine = stack.enter_context(
                Child(bench.watch, "ours.Ours", *bench.files.ours(number_format), bench.threads)
            )
            peers = {name: stack.enter_context(Server(command)) for name, command in others.items()}
            for users in sizes.users:
                with ExitStack() as once:
                    servers = {OURS: server, **peers}
                    if (peer := _best_llama_server(bench, once, number_format, users, requests)) is not None:
                        servers[PEER] = peer
                    runs = {name: _run(bench.watch, each, requests, users) for name, each in servers.items()}
                    runs[CHAT] = _run(bench.watch, server, requests, users, chat=True)
                    runs[ENGINE] = partial(_alone, engine, requests, users)
                    _take(bench, f"{number_format}, {users} users,", runs)
            _take(bench, f"{number_format}, a long prompt beside {STREAMS} streams,", _long(bench, tokenizer, server))


def _take(bench: Bench, what: str, runs: Mapping[str, Run]) -> None:
    """Measures, and asks for the ratios of this server to all others."""
    say(f"serving, {what} {', '.join(runs)}")
    found = in_rounds(bench.watch, runs, bench.sizes.repeats, bench.sizes.tries)
    for name, rounds in found.items():
        for figure, series in UNITS.items():
            if figure in rounds[0]:
                bench.series[f"{series} {what} {name}"] = [each[figure] for each in rounds]
                if name != OURS:
                    over, under = (CHAT, OURS) if name == CHAT else (OURS, name)
                    bench.pairs.append((f"{series} {what} {over}", f"{series} {what} {under}"))


def _run(watch: Watch, server: Server, requests: Sequence[Ask], users: int, chat: bool = False) -> Run:
    def run(turn: int) -> dict[str, float]:
        return _watched(watch, server, lambda: closed_loop(server.url, server.model, requests, users, turn, chat))

    return run


def _long(bench: Bench, tokenizer: Tokenizer, server: Server) -> dict[str, Run]:
    ids = [token for each in bench.ids.values() for token in each]
    new = bench.sizes.new_beside
    long = Ask(tokenizer.decode(ids[: bench.sizes.long - 8]), 1)  # a few tokens less: the number before it, and a BOS
    streams = [Ask(tokenizer.decode(ids[at : at + 64]), new) for at in range(0, 64 * STREAMS, 64)]

    def run(turn: int) -> dict[str, float]:
        return _watched(
            bench.watch, server, lambda: beside_a_long_prompt(server.url, server.model, streams, long, turn)
        )

    return {OURS: run}


def _watched(watch: Watch, server: Server, ask: Callable[[], object]) -> dict[str, float]:
    """What the requests found. Work of a server that was not started here cannot be told from a disturbance."""
    before = server.cpu_seconds()
    watch.begin()
    found: dict[str, float] = asyncio.run(ask())  # type: ignore[arg-type]
    if before is not None and (after := server.cpu_seconds()) is not None:
        watch.end(after - before)
    return found


def _alone(engine: Child, requests: Sequence[Ask], users: int, turn: int) -> dict[str, float]:
    prompts = [f"{1000 * turn + number}: {request.prompt}" for number, request in enumerate(requests)]
    return {"speed": engine("closed_loop", prompts, [request.new for request in requests], users)}


def _best_llama_server(
    bench: Bench, stack: ExitStack, number_format: str, users: int, requests: Sequence[Ask]
) -> Server | None:
    """llama.cpp's server with the settings that are the fastest on a part of the requests; None if it cannot run."""
    sample = requests[: max(8, 2 * users)]
    speeds: dict[tuple[bool, int], float] = {}
    try:
        for setting in product((True, False), sorted({1, bench.threads})):
            with Server(llama_server(bench.files, number_format, users, *setting)) as server:
                speeds[setting] = asyncio.run(closed_loop(server.url, server.model, sample, users, 0))["speed"]
    except LlamaMiniError as error:
        say(f"{PEER} is left out in {number_format}: {error}")
        return None
    unified, threads = best = max(speeds, key=speeds.__getitem__)
    bench.builds[f"{PEER}, {number_format}, {users} users"] = f"unified cache {unified}, {threads} threads"
    return stack.enter_context(Server(llama_server(bench.files, number_format, users, *best)))
