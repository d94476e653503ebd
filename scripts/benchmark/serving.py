"""The measures of bench.py --serve: this project's server, others, and the engine without a server, in turn."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count

from benchmark import SERVED
from benchmark.engines import OURS
from benchmark.load import Ask, asks, beside_a_long_prompt, closed_loop
from benchmark.measures import Bench, say
from benchmark.rounds import Child, in_rounds
from benchmark.servers import PEER, Server, llama_server, llama_server_version, ours
from benchmark.serving_tables import CHAT, ENGINE, GUESSING, Cell, Figures, figures_text
from llama_mini.errors import LlamaMiniError
from llama_mini.tokenizer import Tokenizer

STREAMS = 4
WARM_TOKENS = 8  # of each answer before anything is timed
MOST_TO_CHOOSE = 24  # requests for each setting of llama-server
Run = Callable[[int], Figures]


def serving(bench: Bench, others: Mapping[str, Sequence[str] | str]) -> None:
    """New tokens per second and latencies of all servers, format by format and for each number of users.

    others: names and commands, or addresses, of servers besides llama.cpp's, if that is installed.
    """
    for number_format in [name for name in bench.sizes.formats if name in SERVED]:
        with ExitStack() as stack:
            _Load(bench, number_format, stack, others).measure()


class _Load:
    """The load on all servers of one format. None but llama.cpp's and this project's second one guesses tokens."""

    _turns = count(1)  # of all loads: a number that a server has not read yet

    def __init__(
        self, bench: Bench, number_format: str, stack: ExitStack, others: Mapping[str, Sequence[str] | str]
    ) -> None:
        self._bench, self._format = bench, number_format
        self._tokenizer = Tokenizer.from_pretrained(bench.files.directory)
        self._ids = [token for ids in bench.ids.values() for token in ids]
        self._requests = asks(self._tokenizer, self._ids, bench.sizes.requests)
        say(f"serving, {number_format}: starting servers")
        command = ours(bench.files, number_format, bench.threads)
        self._server = stack.enter_context(Server([*command, "--speculation", "off"]))
        self._guessing = stack.enter_context(Server(command))
        worker = ("ours.Ours", *bench.files.ours(number_format), bench.threads)
        self._engine = stack.enter_context(Child(bench.watch, *worker))
        self._others = {name: stack.enter_context(Server(command)) for name, command in others.items()}

    def measure(self) -> None:
        sizes = self._bench.sizes
        for users in sizes.users:
            with ExitStack() as stack:
                servers = {OURS: self._server, **self._others}
                if (command := self._best_llama_server(users)) is not None:
                    servers[PEER] = stack.enter_context(Server(command))
                runs = {name: self._run(server, users) for name, server in servers.items()}
                if users in sizes.users_guessing:
                    runs[GUESSING] = self._run(self._guessing, users)
                if users in sizes.users_overhead:
                    runs[CHAT] = self._run(self._server, users, chat=True)
                    runs[ENGINE] = self._run_engine(users)
                self._take(users, runs)
        self._take(STREAMS, {f"{OURS} beside a prompt of {sizes.long:,} tokens": self._run_beside_a_long_prompt()})

    def _take(self, users: int, runs: Mapping[str, Run]) -> None:
        def told(name: str, run: Run, turn: int) -> Figures:
            figures = run(turn)
            say(f"serving, {self._format}, {users} users, {name}: {figures_text([figures])}")
            return figures

        bench = self._bench
        told_runs = {name: partial(told, name, run) for name, run in runs.items()}
        found = in_rounds(bench.watch, told_runs, bench.sizes.rounds_serving, 1, self._turns)
        bench.cells += [Cell(self._format, users, name, rounds) for name, rounds in found.items()]

    def _run(self, server: Server, users: int, chat: bool = False) -> Run:
        """All requests. As many users as there will be have asked something before."""

        def run(turn: int, requests: Sequence[Ask] = self._requests) -> Figures:
            return self._watched(server, lambda: closed_loop(server.url, server.model, requests, users, turn, chat))

        run(next(self._turns), self._warm_up(users))
        return run

    def _run_engine(self, users: int) -> Run:
        def run(turn: int, requests: Sequence[Ask] = self._requests) -> Figures:
            prompts = [request.numbered(number) for number, request in enumerate(requests, 1000 * turn)]
            return {"speed": self._engine("closed_loop", prompts, [request.new for request in requests], users)}

        run(next(self._turns), self._warm_up(users))
        return run

    def _warm_up(self, users: int) -> list[Ask]:
        return [replace(request, new=WARM_TOKENS) for request in self._requests[: max(4, users)]]

    def _run_beside_a_long_prompt(self) -> Run:
        sizes, decode = self._bench.sizes, self._tokenizer.decode
        long = Ask(decode(self._ids[: sizes.long - 8]), 1)  # a few tokens less: the number before it, and a BOS
        streams = [Ask(decode(self._ids[at : at + 64]), sizes.new_beside) for at in range(0, 64 * STREAMS, 64)]
        server = self._server
        return lambda turn: self._watched(
            server, lambda: beside_a_long_prompt(server.url, server.model, streams, long, turn)
        )

    def _watched(self, server: Server, ask: Callable[[], Awaitable[Figures]]) -> Figures:
        """What the requests found. Work of a server that was not started here cannot be told from a disturbance."""
        before = server.cpu_seconds()
        self._bench.watch.begin()
        found: Figures = asyncio.run(ask())  # type: ignore[arg-type]
        if before is not None and (after := server.cpu_seconds()) is not None:
            self._bench.watch.end(after - before)
        return found

    def _best_llama_server(self, users: int) -> list[str] | None:
        """The command with the settings that are the fastest on a part of the requests; None if it cannot run.

        First the number of threads is chosen, then whether all requests share one cache; for one user that is the same.
        """
        bench, speeds = self._bench, dict[str, float]()
        sample = self._requests[: min(max(4, 2 * users), MOST_TO_CHOOSE)]

        def speed(settings: str) -> float:
            with Server(llama_server(bench.files, self._format, users, settings)) as server:
                load = closed_loop(server.url, server.model, sample, users, next(self._turns))
                return asyncio.run(load)["speed"]

        try:
            for threads in sorted({1, bench.threads}):
                speeds[f"-t {threads} -kvu"] = speed(f"-t {threads} -kvu")
            if users > 1:
                apart = max(speeds, key=speeds.__getitem__).replace("-kvu", "-no-kvu")
                speeds[apart] = speed(apart)
        except LlamaMiniError as error:
            say(f"{PEER} is left out in {self._format}: {error}")
            return None
        bench.builds[PEER] = llama_server_version()
        best = max(speeds, key=speeds.__getitem__)
        tried = ", ".join(f"{settings} {found:.0f}" for settings, found in speeds.items())
        cell = f"{PEER}, {self._format}, {users} users"
        bench.builds[cell] = f"{best}, the fastest in tokens per second of {tried}"
        say(f"{cell}: {bench.builds[cell]}")
        return llama_server(bench.files, self._format, users, best)
