"""Measures that need more than the default checkpoint's short prompts: files of larger models, and long contexts."""

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmark.engines import OURS, installed
from benchmark.measures import Bench, decode_speed, prefill_speed, say
from benchmark.ours import BILLION
from benchmark.random_gguf import EIGHT_BILLION, write_random_gguf
from benchmark.rounds import Child
from llama_mini.machine import user_cache

LLAMA_CPP = "llama.cpp"
VERIFIED = 4  # tokens of one row in a step: a token and three guesses


def files(bench: Bench) -> None:
    """A Q4_K_M file of 1B parameters as it is stored: decode, prefill, peak memory; and decode of Q4_0 of 8B."""
    folder = user_cache() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    for size, kind, shape in (("1B", "Q4_K_M", BILLION), ("8B", "Q4_0", EIGHT_BILLION)):
        say(f"writing random weights of {size} in {kind}")
        with tempfile.TemporaryDirectory(dir=folder) as temporary, ExitStack() as stack:
            path = Path(temporary) / f"{size}.{kind}.gguf"
            write_random_gguf(path, kind, {**shape, **bench.sizes.shape})
            children = {OURS: stack.enter_context(Child(bench.watch, "ours.Weights", str(path), bench.threads))}
            if installed(LLAMA_CPP):
                children[LLAMA_CPP] = stack.enter_context(
                    Child(bench.watch, "peers.LlamaCpp", str(path), bench.threads)
                )
            measures = {"decode": decode_speed, "prefill": prefill_speed} if size == "1B" else {"decode": decode_speed}
            for measure, speed in measures.items():
                names = {name: f"files {size} {kind} {measure} {name}" for name in children}
                bench.take({names[name]: partial(speed, bench, child, measure) for name, child in children.items()})
                bench.pairs += [(names[OURS], names[name]) for name in children if name != OURS]
            if size == "1B":
                bench.series[f"peak over floor by size of the file, {size} {kind}"] = [children[OURS]("memory")]


def verify(bench: Bench) -> None:
    """Steps of several tokens of one row, as guesses are verified, beside steps of one."""
    ids = bench.prompt(0, bench.sizes.context + VERIFIED)
    with Child(bench.watch, "ours.Steps", *bench.files.ours("int8"), "auto", bench.threads, ids) as child:
        names = {n: f"verify int8 {n} token{'s' * (n > 1)} of one row" for n in (1, VERIFIED)}
        bench.take({name: partial(_seconds_of_step, bench, child, bench.sizes.context, n) for n, name in names.items()})
        bench.pairs.append((names[VERIFIED], names[1]))


def long(bench: Bench) -> None:
    """A long prompt in bfloat16, and decode after it in int4 with an int8 cache, against decode after a short one."""
    sizes, most = bench.sizes, bench.sizes.longest
    ids = (bench.ids["prose"] * (most // len(bench.ids["prose"]) + 1))[:most]
    with ExitStack() as stack:
        children = {
            OURS: stack.enter_context(Child(bench.watch, "ours.Ours", *bench.files.ours("bfloat16"), bench.threads))
        }
        if installed(LLAMA_CPP):
            worker = ("peers.LlamaCpp", bench.files.gguf("bfloat16"), bench.threads, most)
            children[LLAMA_CPP] = stack.enter_context(Child(bench.watch, *worker))
        names = {name: f"long bfloat16 prompt of {most} {name}" for name in children}
        bench.take(
            {names[name]: partial(_long_prompt, child, ids) for name, child in children.items()}, sizes.repeats_long
        )
        bench.pairs += [(names[OURS], names[name]) for name in children if name != OURS]
    with Child(bench.watch, "ours.Steps", *bench.files.ours("int4"), "int8", bench.threads, ids) as child:
        at = {n: f"long int4 decode at {n}, int8 cache" for n in (sizes.context, most - 1)}
        bench.take({name: partial(_step_speed, bench, child, n) for n, name in at.items()})
        bench.pairs.append((at[most - 1], at[sizes.context]))


def _long_prompt(child: Child, ids: list[int], number: int) -> float:
    return len(ids) / child("prefill", [number + 3, *ids[1:]])


def _seconds_of_step(bench: Bench, child: Child, context: int, tokens: int, _: int) -> float:
    return child("at", context, tokens, bench.sizes.new) / bench.sizes.new


def _step_speed(bench: Bench, child: Child, context: int, number: int) -> float:
    return 1 / _seconds_of_step(bench, child, context, 1, number)
