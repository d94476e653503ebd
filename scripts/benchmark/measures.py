"""The measures. Each adds series of one value a round, whose names begin with the name of the measure."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

from benchmark.engines import OURS, Checkpoint, installed, start_engines
from benchmark.rounds import Child, Watch, first_byte, in_rounds
from benchmark.serving_tables import Cell

STREAM = "llama_mini, LLM.stream"
PROMPT = "The history of mathematics begins"
_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")
new = model.generate(**ids, max_new_tokens=1, do_sample=False)[0, ids["input_ids"].shape[1]:]
print(tokenizer.decode(new), flush=True)
"""


@dataclass(frozen=True)
class Sizes:
    """How large a run is: rounds, and lengths in tokens."""

    repeats: int = 5
    tries: int = 3  # for a round that other programs disturb
    formats: Sequence[str] = ("float32", "bfloat16", "int8", "int4")
    context: int = 64
    new: int = 64
    prompt: int = 512
    sequences: Sequence[int] = (16, 64)
    contexts: Sequence[int] = (64, 1024, 4096)
    new_in_context: int = 16
    shape: Mapping[str, int] = field(default_factory=dict)  # sizes that replace those of LLaMA-3.2-1B
    text: int = 2048
    requests: int = 64  # of the load on servers, by so many users at once
    users: Sequence[int] = (1, 4, 16, 32)
    users_guessing: Sequence[int] = (1, 4)  # with whom this project's server guesses tokens in a row of its own
    users_overhead: Sequence[int] = (4, 16)  # with whom chats and the engine without a server are measured
    rounds_serving: int = 2  # each of which takes minutes
    long: int = 4096  # a prompt beside streams of so many tokens
    longest: int = 8100  # a prompt alone
    repeats_long: int = 3  # each of which takes a minute
    new_beside: int = 600


QUICK = Sizes(
    repeats=1,
    tries=1,
    formats=("bfloat16", "int4"),
    new=8,
    prompt=96,
    sequences=(2, 4),
    contexts=(64, 96),
    new_in_context=4,
    shape={"dim": 256, "hidden_dim": 512, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 50000},
    text=64,
    requests=4,
    users=(1, 2),
    users_guessing=(1,),
    users_overhead=(2,),
    rounds_serving=1,
    long=200,
    longest=300,
    repeats_long=1,
    new_beside=100,
)


@dataclass
class Bench:
    """One run: what it uses, and what it has measured so far."""

    sizes: Sizes
    threads: int
    files: Checkpoint
    ids: Mapping[str, list[int]]  # the texts, as tokens
    watch: Watch
    series: dict[str, list[float]] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)  # names of series whose ratio is printed
    cells: list[Cell] = field(default_factory=list)  # of servers under load
    builds: dict[str, str] = field(default_factory=dict)  # how a peer was compiled or set: its version does not say

    def take(self, runs: Mapping[str, Callable[[int], float]], repeats: int | None = None) -> dict[str, list[float]]:
        say(f"measuring {', '.join(runs)}")
        taken = in_rounds(self.watch, runs, repeats or self.sizes.repeats, self.sizes.tries)
        self.series |= taken
        return taken

    def prompt(self, number: int, length: int) -> list[int]:
        """A different piece of the prose in each round, so that no engine can reuse what it has read."""
        ids = self.ids["prose"]
        start = 97 * number % (len(ids) - length)
        return ids[start : start + length]


def against_peers(bench: Bench, measures: Sequence[str]) -> None:
    """decode, prefill: tokens per second of every engine, format by format."""
    sizes = bench.sizes
    for number_format in sizes.formats:
        with ExitStack() as stack:
            children = start_engines(stack, bench.watch, bench.files, number_format, bench.threads, say)
            if "llama.cpp" in children:
                bench.builds["llama.cpp"] = children["llama.cpp"]("build")
            ways = [(name, child, "") for name, child in children.items()]
            ways.insert(1, (STREAM, children[OURS], "stream_"))
            for measure in measures:
                speed = prefill_speed if measure == "prefill" else decode_speed
                prefix = f"{measure} {number_format} "
                bench.take({prefix + name: partial(speed, bench, child, way + measure) for name, child, way in ways})
                peers = [name for name in children if name != OURS]
                bench.pairs += [(prefix + ours, prefix + peer) for peer in peers for ours in (OURS, STREAM)]
                bench.pairs.append((prefix + STREAM, prefix + OURS))


def prefill_speed(bench: Bench, child: Child, method: str, number: int) -> float:
    n = bench.sizes.prompt
    return n / child(method, bench.prompt(number, n))


def decode_speed(bench: Bench, child: Child, method: str, number: int) -> float:
    new = bench.sizes.new
    return new / child(method, bench.prompt(number, bench.sizes.context), new)


def batch(bench: Bench) -> None:
    """Tokens per second of some sequences together, of more, and of one alone; after a long prompt without the most."""
    sizes = bench.sizes
    some, most = sizes.sequences
    for number_format in ("bfloat16", "int8"):
        with Child(bench.watch, "ours.Ours", *bench.files.ours(number_format), bench.threads) as child:
            for context, counts in {sizes.context: (1, some, most), sizes.prompt: (1, some)}.items():
                names = [f"batch {number_format} {n} sequence{'s' * (n > 1)} at {context}" for n in counts]
                runs = [partial(_batch_speed, bench, child, context, n) for n in counts]
                bench.take(dict(zip(names, runs, strict=True)))
                bench.pairs += [(more, fewer) for fewer, more in pairwise(names)]


def _batch_speed(bench: Bench, child: Child, context: int, sequences: int, number: int) -> float:
    new = bench.sizes.new
    return sequences * new / child("decode", bench.prompt(number, context), new, sequences)


def context(bench: Bench) -> None:
    """Decode of a large shape at several contexts; at the shortest, the share of the memory bandwidth it reaches."""
    sizes = bench.sizes
    longest = max(sizes.contexts) + sizes.new_in_context
    n_bytes: dict[str, int] = {}
    with ExitStack() as stack:
        reader = stack.enter_context(Child(bench.watch, "ours.Reader", bench.threads))
        runs: dict[str, Callable[[int], float]] = {}
        for name, quantize in {"bfloat16": None, "int8": "int8", "int4": "int4"}.items():
            say(f"making random weights in {name}")
            arguments = ("ours.Billion", quantize, longest, bench.threads, dict(sizes.shape))
            child = stack.enter_context(Child(bench.watch, *arguments))
            n_bytes[name] = child("step_bytes")
            runs[f"read {name} bytes"] = partial(_read_speed, reader, n_bytes[name])
            for length in sizes.contexts:
                runs[f"context {name} at {length}"] = partial(_context_speed, child, length, sizes.new_in_context)
        taken = bench.take(runs)
    for name, size in n_bytes.items():
        steps, reads = taken[f"context {name} at {sizes.contexts[0]}"], taken[f"read {name} bytes"]
        bench.series[f"bandwidth {name}"] = [a * size / 1e9 / b for a, b in zip(steps, reads, strict=True)]
        first, *longer = (f"context {name} at {length}" for length in sizes.contexts)
        bench.pairs += [(series, first) for series in longer]


def _read_speed(reader: Child, n_bytes: int, _: int) -> float:
    return n_bytes / 1e9 / reader("memory", n_bytes)


def _context_speed(child: Child, length: int, new: int, _: int) -> float:
    return new / child("decode", length, new)


def busy(bench: Bench) -> None:
    """Decode in int8 by all threads and by one, on quiet cores, and beside a busy process for each core."""
    unwatched, counts = Watch(), sorted({1, bench.threads})  # a busy process would pass for a disturbance
    with ExitStack() as stack:
        worker = ("ours.Ours", *bench.files.ours("int8"))
        children = {n: stack.enter_context(Child(unwatched, *worker, n)) for n in counts}
        for where in ("on quiet cores", "beside busy processes"):
            names = {n: f"busy int8 {n} thread{'s' * (n > 1)} {where}" for n in counts}
            bench.take({names[n]: partial(decode_speed, bench, children[n], "decode") for n in counts})
            bench.pairs += [(names[n], names[1]) for n in counts[1:]]
            for _ in range(bench.threads if where == "on quiet cores" else 0):
                process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                stack.callback(process.kill)


def start(bench: Bench) -> None:
    """Whole processes, from their start to the first byte of the first token, in bfloat16."""
    directory, threads = str(bench.files.directory), str(bench.threads)
    settings = ["--model", directory, "--dtype", "bfloat16", "--threads", threads, "--raw", "--max-tokens", "1"]
    commands = {OURS: [sys.executable, "-m", "llama_mini.generate", *settings, PROMPT]}
    if installed("transformers"):
        commands["transformers"] = [sys.executable, "-c", _TRANSFORMERS, directory, PROMPT, threads]
    bench.take({f"start {name}": partial(_start, bench.watch, command) for name, command in commands.items()})
    bench.pairs += [(f"start {OURS}", f"start {name}") for name in commands if name != OURS]


def _start(watch: Watch, command: Sequence[str], _: int) -> float:
    return first_byte(watch, command)


def loading(bench: Bench, measures: Sequence[str]) -> None:
    """load: seconds to load after the imports, beside one plain read of the file.

    memory: the peak of a load and an answer, less the floor (the process before it), against the bytes of the weights.
    """
    say("measuring loads, each in a process of its own")
    with Child(bench.watch, "ours.Reader", bench.threads) as reader:
        runs: dict[str, Callable[[int], dict[str, float]]] = {}
        for name in bench.sizes.formats:
            path = Path(bench.files.ours(name)[0])
            file = path if path.is_file() else path / "model.safetensors"
            runs[f"{name} file read"] = partial(_file_read, reader, str(file))
            runs[f"{name} {OURS}"] = partial(_load, bench, name)
        found = in_rounds(bench.watch, runs, bench.sizes.repeats, bench.sizes.tries)
    if "load" in measures:
        bench.series |= {f"load {name}": [each["seconds"] for each in rounds] for name, rounds in found.items()}
        bench.pairs += [(f"load {name} {OURS}", f"load {name} file read") for name in bench.sizes.formats]
    for name in bench.sizes.formats if "memory" in measures else ():
        rounds = found[f"{name} {OURS}"]
        for what in ("floor", "peak", "weights"):
            bench.series[f"memory {name} {what}"] = [each[what] / 2**20 for each in rounds]
        over = [(each["peak"] - each["floor"]) / each["weights"] for each in rounds]
        bench.series[f"peak over floor by weights {name}"] = over


def _file_read(reader: Child, file: str, _: int) -> dict[str, float]:
    return {"seconds": reader("file", file)}


def _load(bench: Bench, number_format: str, number: int) -> dict[str, float]:
    sizes = bench.sizes
    with Child(bench.watch, "ours.Loading", bench.threads) as child:
        ids = bench.prompt(number, sizes.prompt)
        return child("load", *bench.files.ours(number_format), ids, sizes.new)


def quality(bench: Bench) -> None:
    """Nats a token over bfloat16 on each text: quantized at load from bfloat16, and as the 4-bit file has it."""
    directory = str(bench.files.directory)
    ways = {
        "bfloat16": (directory, "bfloat16", None),
        "int8": (directory, "bfloat16", "int8"),
        "int4": (directory, "bfloat16", "int4"),
        "int4 of the file": (str(bench.files.four_bit), "bfloat16", "int4"),
    }
    losses = {}
    for name, settings in ways.items():
        say(f"scoring texts in {name}")
        with Child(bench.watch, "ours.Ours", *settings, bench.threads) as child:
            losses[name] = {text: child("nll", ids[: bench.sizes.text]) for text, ids in bench.ids.items()}
    plain = losses.pop("bfloat16")
    for text, loss in plain.items():
        bench.series[f"quality bfloat16 {text}"] = [loss]
    for name, by_text in losses.items():
        over = {text: loss - plain[text] for text, loss in by_text.items()}
        for text, difference in over.items():
            bench.series[f"quality {name} over bfloat16, {text}"] = [difference]
        bench.series[f"quality {name} over bfloat16, mean"] = [sum(over.values()) / len(over)]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
