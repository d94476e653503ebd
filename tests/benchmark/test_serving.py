"""bench.py --serve: which requests go to which server, llama-server's settings, tables, and a run that is stopped."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmark import run, serving
from benchmark.load import Ask
from benchmark.measures import QUICK, Bench
from benchmark.rounds import Watch
from benchmark.servers import Server
from benchmark.serving_tables import Cell, Figures, serving_tables
from llama_mini.errors import LlamaMiniError

SPEEDS = {"-t 1 -kvu": 100.0, "-t 2 -kvu": 130.0, "-t 1 -no-kvu": 500.0, "-t 2 -no-kvu": 120.0}


class FakeServer:
    """Serves nothing; its command is its address."""

    def __init__(self, command: Sequence[str]) -> None:
        self.url, self.model = " ".join(command), "m"

    def cpu_seconds(self) -> None:
        return None

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, int]]:
    """What each server, or the engine, is asked: turn, number of requests, users."""
    seen: list[tuple[str, int, int, int]] = []

    async def closed_loop(
        url: str, model: str, requests: Sequence[Ask], users: int, turn: int, chat: bool = False
    ) -> Figures:
        seen.append((url + " chat" * chat, turn, len(requests), users))
        return {"speed": next((speed for name, speed in SPEEDS.items() if url.endswith(name)), 300.0)}

    async def beside(url: str, model: str, streams: Sequence[Ask], long: Ask, turn: int) -> Figures:
        seen.append((url, turn, 1 + len(streams), len(streams)))
        return {"longest_gap": 100.0, "first": 1000.0}

    class Engine(FakeServer):
        def __init__(self, *_: object) -> None:
            super().__init__(["engine"])

        def __call__(self, method: str, prompts: list[str], new: list[int], users: int) -> float:
            seen.append((self.url, int(prompts[0].split(":")[0]) // 1000, len(prompts), users))
            return 320.0

    monkeypatch.setattr(serving, "closed_loop", closed_loop)
    monkeypatch.setattr(serving, "beside_a_long_prompt", beside)
    monkeypatch.setattr(serving, "Server", FakeServer)
    monkeypatch.setattr(serving, "Child", Engine)
    monkeypatch.setattr(serving, "ours", lambda *_: ["ours"])
    monkeypatch.setattr(serving, "llama_server", lambda files, name, users, settings: ["llama-server", settings])
    monkeypatch.setattr(serving, "llama_server_version", lambda: "version 1")
    return seen


@pytest.fixture
def bench(tiny_dir: Path) -> Bench:
    files = SimpleNamespace(directory=tiny_dir, ours=lambda number_format: (number_format,))
    ids = {"prose": [65 + i % 26 for i in range(9000)]}
    return Bench(QUICK, 2, files, ids, Watch())  # type: ignore[arg-type]


def test_no_server_gets_a_turn_twice_and_all_get_the_same_turns(
    bench: Bench, loads: list[tuple[str, int, int, int]]
) -> None:
    serving.serving(bench, {"other": ["other"]})
    asked = [(server, turn) for server, turn, *_ in loads]
    assert len(set(asked)) == len(asked)
    for users in QUICK.users:
        timed = [load for load in loads if load[2:] == (4, users) and load[0] in ("other", "ours --speculation off")]
        turns = {name: {turn for server, turn, *_ in timed if server == name} for name, *_ in timed}
        assert turns["other"] & turns["ours --speculation off"]
    cells = [(cell.format, cell.users, cell.server) for cell in bench.cells]
    assert cells[:4] == [("bfloat16", 1, name) for name in ("llama_mini", "other", "llama-server", serving.GUESSING)]
    assert cells[6:10] == [
        ("bfloat16", 2, "llama-server"),
        ("bfloat16", 2, serving.CHAT),
        ("bfloat16", 2, serving.ENGINE),
        ("bfloat16", 4, "llama_mini beside a prompt of 200 tokens"),
    ]
    assert len(cells) == 20


def test_llama_server_gets_its_fastest_threads_and_then_its_fastest_cache(
    bench: Bench, loads: list[tuple[str, int, int, int]]
) -> None:
    serving.serving(bench, {})
    tried = [server for server, *_ in loads if server.startswith("llama-server") and "-no-kvu" in server]
    assert set(tried) == {"llama-server -t 2 -no-kvu"}
    assert bench.builds["llama-server, int4, 2 users"] == (
        "-t 2 -kvu, the fastest in tokens per second of -t 1 -kvu 100, -t 2 -kvu 130, -t 2 -no-kvu 120"
    )
    assert [cell.rounds for cell in bench.cells if cell.server == "llama-server"] == [[{"speed": 130.0}]] * 4


def test_without_llama_server_the_others_are_measured(
    bench: Bench,
    loads: list[tuple[str, int, int, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def absent(*_: object) -> list[str]:
        raise LlamaMiniError("llama-server is not on the path")

    monkeypatch.setattr(serving, "llama_server", absent)
    serving.serving(bench, {})
    assert len(bench.cells) == 12
    assert "llama-server is left out in int4: llama-server is not on the path\n" in capsys.readouterr().err


def figures(speed: float, first: float) -> Figures:
    return {"speed": speed, "first50": first, "first95": 2 * first, "gap50": 5.0, "gap95": 0.1 * first}


def test_tables_have_a_column_for_each_number_of_users_and_ratios_of_the_same_round() -> None:
    cells = [
        Cell("int8", 4, "llama_mini", [figures(400, 40), figures(500, 50)]),
        Cell("int8", 4, "llama-server", [figures(100, 200), figures(250, 200)]),
        Cell("int8", 16, "llama_mini", [figures(700, 80)] * 2),
        Cell("int8", 16, serving.CHAT, [figures(630, 90)] * 2),
        Cell("int8", 16, serving.ENGINE, [{"speed": 800.0}] * 2),
        Cell("int8", 4, "llama_mini beside a prompt of 9 tokens", [{"longest_gap": 90.0, "first": 1100.0}] * 2),
    ]
    lines = serving_tables(cells).splitlines()
    head = "| --- | --- | --- |"
    assert lines[1:6] == [
        head,
        "| int8, llama_mini | 450; 45 / 90; 5 / 4.5 | 700; 80 / 160; 5 / 8 |",
        "| int8, llama-server | 175; 200 / 400; 5 / 20 |  |",
        "| int8, llama_mini, chats |  | 630; 90 / 180; 5 / 9 |",
        "| int8, llama_mini without a server |  | 800 |",
    ]
    assert lines[7:14] == [
        "| ratio | C=4 | C=16 |",
        head,
        "| new tokens per second, int8, llama_mini / llama-server | 3 (2-4) |  |",
        "| new tokens per second, int8, llama_mini, chats / llama_mini |  | 0.9 (0.9-0.9) |",
        "| new tokens per second, int8, llama_mini / llama_mini without a server |  | 0.875 (0.875-0.875) |",
        "| median to the first text, int8, llama_mini / llama-server | 0.225 (0.2-0.25) |  |",
        "| 95th percentile between texts, int8, llama_mini / llama-server | 0.225 (0.2-0.25) |  |",
    ]
    assert lines[15] == (
        "int8, llama_mini beside a prompt of 9 tokens: longest gap 90 ms, first text of the prompt after 1100 ms"
    )


def test_a_run_that_is_stopped_prints_what_it_has_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cell = Cell("int8", 4, "llama_mini", [figures(400, 40)])

    def stopped(bench: Bench, others: object) -> None:
        bench.cells.append(cell)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_bench", lambda quick, sizes: bench)
    monkeypatch.setattr(serving, "serving", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.run((), False, tmp_path / "run.json", tmp_path, {})
    line = capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "run.json").read_text() == line + "\n"
    assert json.loads(line)["serving"] == [
        {"format": "int8", "users": 4, "server": "llama_mini", "rounds": [figures(400, 40)]}
    ]


def test_a_server_is_ended_with_the_processes_that_it_started(tmp_path: Path) -> None:
    (tmp_path / "health").touch()
    web = f"exec {sys.executable} -m http.server {{port}} --bind 127.0.0.1 --directory {tmp_path}"
    with Server(["bash", "-c", f"sleep 600 & echo $! > {tmp_path}/child; {web}"]):
        child = psutil.Process(int((tmp_path / "child").read_text()))
    child.wait(10)
