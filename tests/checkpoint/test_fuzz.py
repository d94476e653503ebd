"""Damaged checkpoints of every format: each gives equal tensors or a LlamaMiniError, in bounded time and memory.

LLAMA_MINI_FUZZ_CASES=50000 runs that many, from a random seed that is printed; LLAMA_MINI_FUZZ_SEED runs one again.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.checkpoint.fuzz.bases import Base, make_bases, words_of
from tests.checkpoint.fuzz.child import Child
from tests.checkpoint.fuzz.damage import Draw, blind, damaged_json, damaged_safetensors
from tests.checkpoint.fuzz.damage_gguf import damaged_gguf
from tests.checkpoint.fuzz.damage_tokenizer import damaged_pickle, damaged_protobuf, damaged_tiktoken

N_CASES = (250, 4000)  # the second with the slow tests
SECONDS, TEMPLATE_SECONDS = 5, 20  # a template has limits of its own
CPU_SECONDS = 1
LONGEST_MESSAGE = 2000  # characters
MOST_SHOWN = 50  # faults
CHAT_FILES = ("tokenizer_config.json", "chat_template.jinja")
NO_WEIGHTS = ("tokenizer", "chat_template", "generation_config", "model.safetensors.index")  # names begin so
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
WHOLE = (b"", b"<!doctype html><html>404</html>", LFS_POINTER, b"PK\3\4")
KNOWING = {
    ".json": damaged_json,
    ".safetensors": damaged_safetensors,
    ".gguf": damaged_gguf,
    ".pth": damaged_pickle,
    ".bin": damaged_pickle,
}


@dataclass
class Bench:
    """The child, the sound checkpoints, what their tensors are, and a copy of each that is damaged and mended."""

    child: Child
    bases: list[Base]
    folder: Path
    kept: Path
    seconds: float = SECONDS
    slowest: float = 0
    words: list[str] = field(init=False)
    sound: dict[str, dict[str, int]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.words = words_of(self.bases)
        for base in self.bases:
            shutil.copytree(base.folder, self.folder / base.name)
            answer = self._ask(base, "chat_template.jinja")
            assert answer["outcome"] == "ok", (base.name, answer)
            self.sound[base.name] = answer["tensors"]

    def run(self, base: Base, name: str, data: bytes, note: str) -> str | None:
        """The fault that a damaged file uncovers, if any."""
        file = self.folder / base.name / name
        file.write_bytes(data)
        answer = self._ask(base, name)
        file.write_bytes(base.files[name])
        self.outcomes[answer["outcome"]] += 1
        self.slowest = max(self.slowest, answer.get("seconds", 0))
        values_may_differ = base.settings_decide and name.endswith("config.json")
        fault = fault_of(answer, self.sound[base.name], "" if values_may_differ else name)
        if fault is not None:
            kept = self.kept / f"{len(self.faults)}-{base.name}"
            self.faults.append(f"{fault}\n    {note}\n    kept in {kept}")
            if len(self.faults) <= MOST_SHOWN:
                shutil.copytree(base.folder, kept)
                (kept / name).write_bytes(data)
        return fault

    def _ask(self, base: Base, name: str) -> dict[str, Any]:
        folder = self.folder / base.name
        case = {"path": str(folder if base.path.is_dir() else folder / base.path.name), "pickles": base.pickles}
        case |= {"tokenizer": base.tokenizer, "chat": name in CHAT_FILES}
        case["compare"] = not base.pickles and name.endswith((".gguf", ".safetensors", "params.json"))
        seconds = TEMPLATE_SECONDS if case["chat"] else self.seconds
        answer = self.child.ask(case, seconds)
        if answer["outcome"] == "hung":  # the machine may have been busy
            answer = self.child.ask(case, seconds)
        return answer


def fault_of(answer: dict[str, Any], sound: dict[str, int], name: str) -> str | None:
    """What is wrong with an answer: all but equal tensors and a LlamaMiniError of one short line."""
    if answer["outcome"] not in ("ok", "refused"):
        return f"{answer['outcome']}: {answer['what']}"
    if answer["seconds"] > CPU_SECONDS:
        return f"slow: {answer['seconds']:.1f} seconds of processor time"
    for message in answer["messages"]:
        if not message.isprintable():  # a line break, an escape code, half a surrogate pair
            return f"a message that is no line of text: {message!r:.900}"
        if len(message) > LONGEST_MESSAGE:
            return f"a message of {len(message)} characters or more: {message:.300}"
        if "changed while it was read" in message:
            return f"nothing wrote to it: {message}"
    if answer["outcome"] == "refused":
        return None
    tensors = answer["tensors"]
    if name.startswith(NO_WEIGHTS) and tensors != sound:
        return "other tensors"
    # A configuration decides which tensors there are. (Meta's says how rows of q and k are ordered, too.)
    if name == "config.json" and any(sound.get(key) != value for key, value in tensors.items()):
        return "tensors with other values"
    return None


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, write_gguf: Callable[..., Path]) -> list[Base]:
    return make_bases(tmp_path_factory.mktemp("bases"), write_gguf)


@pytest.fixture
def make_bench(tmp_path: Path, bases: list[Base]) -> Iterator[Callable[..., Bench]]:
    children = []

    def make(names: set[str] | None = None, before: str = "") -> Bench:
        children.append(Child(tmp_path / "errors.txt", before))
        for folder in ("work", "kept"):
            (tmp_path / folder).mkdir()
        chosen = [base for base in bases if names is None or base.name in names]
        return Bench(children[-1], chosen, tmp_path / "work", tmp_path / "kept")

    yield make
    for child in children:
        child.stop()


@st.composite
def cases(draw: Draw, bench: Bench) -> tuple[Base, str, bytes, str]:
    """A sound checkpoint, one of its files, what that holds now, and what was done to it."""
    base = draw(st.sampled_from(bench.bases))
    name = draw(st.sampled_from(list(base.files)))
    data = base.files[name]
    knowing = KNOWING.get(Path(name).suffix)
    if name == "tokenizer.model":
        knowing = damaged_protobuf if data.startswith(b"\n") else damaged_tiktoken
    kind = draw(st.integers(0, 29))
    if kind == 0:
        others = [content for other in bench.bases for content in other.files.values()]
        damaged, how = draw(st.sampled_from([*WHOLE, *others])), "another file's content"
    elif knowing is None or kind < 10:
        damaged, how = blind(draw, data)
    else:
        damaged, how = knowing(draw, data, bench.words)
    return base, name, damaged, f"{base.name}/{name}: {how}"


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of what failed: it would hide the fault
@pytest.mark.parametrize("n_cases", [N_CASES[0], pytest.param(N_CASES[1], marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_loads_equal_tensors_or_is_refused(make_bench: Callable[..., Bench], n_cases: int) -> None:
    wanted = int(os.environ.get("LLAMA_MINI_FUZZ_CASES", 0))
    start = int(os.environ.get("LLAMA_MINI_FUZZ_SEED", random.randrange(10**9) if wanted else n_cases))
    bench = make_bench()
    n_cases = wanted or n_cases

    @seed(start)
    @settings(
        max_examples=n_cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(bench))
    def run(case: tuple[Base, str, bytes, str]) -> None:
        bench.run(*case)

    run()
    print(f"seed {start}: {dict(bench.outcomes)}, {bench.child.starts} processes, slowest {bench.slowest:.2f} s")
    assert not bench.faults, f"{len(bench.faults)} faults of seed {start}:\n" + "\n".join(bench.faults[:MOST_SHOWN])
    assert bench.outcomes.total() >= n_cases
    assert min(bench.outcomes["ok"], bench.outcomes["refused"]) > n_cases // 20


PLANT = """
import os
import time
from llama_mini.checkpoint.hf import directory as hf_directory, safetensors_data
from llama_mini.errors import ConfigError

class PanicException(BaseException):
    pass

def unguarded(message):
    error = ConfigError("")
    error.args = (message,)
    return error

def read_config(directory, read=hf_directory.read_config):
    config, raw = read(directory)
    planted.append(raw.get("planted"))
    match planted[-1]:
        case "raise":
            raise ValueError("a fault")
        case "panic":
            raise PanicException("a panic")
        case "allocate":
            bytearray(2 << 30)
        case "loop":
            while True:
                pass
        case "work":
            end = time.process_time() + 1.1
            while time.process_time() < end:
                pass
        case "signal":
            os.kill(os.getpid(), 11)
        case "exit":
            os._exit(0)
        case "lines":
            raise unguarded("one line\\nand another")
        case "long":
            raise unguarded("a" * 2001)
    return config, raw

def read_rows(tensors, chunks, destination, read=safetensors_data.read_rows):
    rows = read(tensors, chunks, destination)
    return ((tensor, first, rows.neg_() if planted[-1] == "tensors" else rows) for tensor, first, rows in rows)

planted = []
hf_directory.read_config = read_config
safetensors_data.read_rows = read_rows
"""


@pytest.mark.slow
def test_every_kind_of_fault_is_seen(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench({"tiny"}, before=PLANT)
    (tiny,) = bench.bases

    def seen(planted: str | None, damaged: str = "config.json") -> str:
        config = json.dumps(json.loads(tiny.files["config.json"]) | {"planted": planted}).encode()
        (bench.folder / "tiny" / "config.json").write_bytes(config)
        return str(bench.run(tiny, damaged, config if damaged == "config.json" else tiny.files[damaged], "planted"))

    assert seen(None) == "None"
    assert seen("raise").startswith("raised: ValueError: a fault at <string>:")
    assert seen("panic").startswith("raised: PanicException: a panic")
    assert seen("allocate").startswith("raised: MemoryError")
    assert seen("signal").startswith("died: exit code -11")
    assert seen("exit").startswith("died: exit code 0")
    assert seen("lines") == "a message that is no line of text: 'one line\\nand another'"
    assert seen("long").startswith("a message of 2001 characters or more: aaa")
    assert seen("work").startswith("slow: 1.")
    assert seen("tensors") == "tensors with other values"
    assert seen("tensors", "tokenizer.json") == "other tensors"
    assert "is not what the format's own library reads" in seen("tensors", "model.safetensors")
    bench.seconds = 1
    assert seen("loop") == "hung: no answer after 1 seconds"
    assert seen(None) == "None"
    assert len(bench.faults) == 12
