"""What callers of the operators rely on: wrong calls are refused, schemas and shapes hold, threads do not disturb.

As a script it makes every wrong call and prints the names of those that end in an error and have written nothing:
one that ends the process, or never ends, is then a failed test.
"""

import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_mini.kv_cache import LayerCache
from llama_mini.model import Llama, causal_mask
from llama_mini.optimize import optimize
from llama_mini.optimize.build import load_kernels
from llama_mini.optimize.matrix import Matrix
from tests.optimize.twins import FORMATS, generator, random, random_gain, random_matrix, same_bits
from tests.tiny_models import random_tokens, tiny_model

Arguments = dict[str, Any]
op = torch.ops.llama_mini
ROOT = Path(__file__).parents[2]
DIM, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, BATCH, LAYERS = 24, 18, 6, 2, 20, 3, 2


def valid(name: str, format_: str = "float", dtype: torch.dtype = torch.float32) -> Arguments:
    """The arguments of a right call. A prompt is a call of layers."""
    rng = generator(1)
    if name in ("project", "product"):
        w = random_matrix(format_, [HIDDEN], DIM, dtype, rng)
        bias = random((HIDDEN,), dtype, rng)
        return {"x": random((BATCH, DIM), dtype, rng), "w": w.tensors, "bias": bias, "rows": HIDDEN}
    if name == "rows":
        w = random_matrix("int4" if format_ == "float" else format_, [40], DIM, dtype, rng)
        return {"w": w.tensors, "at": torch.tensor([3, 47, 3, 0]), "columns": DIM, "dtype": dtype}
    prompt = name == "prompt"
    angles = torch.rand(BATCH, HEAD_DIM // 2, generator=rng)
    rows = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    caches = [random((1 if prompt else BATCH, KV_HEADS, 11, HEAD_DIM), dtype, rng) for _ in range(2 * LAYERS)]
    heads = [random_gain(HEAD_DIM, dtype, rng) for _ in range(2)]
    shapes = [(rows, DIM), ([DIM], HEADS * HEAD_DIM), ([HIDDEN, HIDDEN], DIM), ([DIM], HIDDEN)]
    matrices = [random_matrix(format_, *shape, dtype, rng) for shape in shapes * LAYERS]
    return {
        "x": random((1, BATCH, DIM) if prompt else (BATCH, 1, DIM), dtype, rng),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.tensor([[5, 6, 7]] if prompt else [[3], [0], [10]]),
        "k_caches": caches[:LAYERS],
        "v_caches": caches[LAYERS:],
        "gains": [random_gain(DIM, dtype, rng), *heads, random_gain(DIM, dtype, rng)] * LAYERS,
        "eps": [1e-5, 1e-6, 1e-5, 1e-5] * LAYERS,
        "late": [0, 1, 0, 1] * LAYERS,
        "matrices": [tensor for matrix in matrices for tensor in matrix.tensors],
        "biases": [torch.empty(0, dtype=dtype)] * 4 * LAYERS,
        "windows": [0, 4],
        "heads": HEADS,
        "hidden": HIDDEN,
    }


def called(name: str) -> Any:
    return getattr(op, "layers" if name == "prompt" else name)


def wrong(name: str, **changes: Any) -> tuple[str, Callable[[Arguments], Arguments]]:
    """A call with some arguments changed: a function is given what was there."""
    return name, lambda a: {k: change(a[k]) if callable(change) else change for k, change in changes.items()}


def last(new: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [*values[:-1], new(values[-1])]


def longer(t: Tensor) -> Tensor:
    return torch.cat((t, t), -1)


def strided(t: Tensor) -> Tensor:
    return longer(t)[..., ::2]


def two_rows(t: Tensor) -> Tensor:
    return torch.cat((t, t))


def two_rows_each(values: list[Tensor]) -> list[Tensor]:
    return list(map(two_rows, values))


def as_long(t: Tensor) -> Tensor:
    return t.long()


def codes() -> Matrix:
    return random_matrix("int8", [HIDDEN], DIM, torch.float32, generator(0))


LISTS = ("k_caches", "v_caches", "gains", "eps", "late", "matrices", "biases", "windows")
WRONG = {
    "step: no layers": wrong("layers", **{each: [] for each in LISTS}),
    **{f"step: {each} too short": wrong("layers", **{each: lambda v: v[:-1]}) for each in LISTS},
    **{f"step: {each} shorter": wrong("layers", **{each: last(lambda t: t[..., :-1])}) for each in LISTS[:3]},
    **{f"step: {each} strided": wrong("layers", **{each: last(strided)}) for each in (*LISTS[:3], "matrices")},
    **{f"step: {each} of bfloat16": wrong("layers", **{each: last(Tensor.bfloat16)}) for each in LISTS[:3]},
    "step: last matrix longer": wrong("layers", matrices=last(longer)),
    "step: last matrix of bfloat16": wrong("layers", matrices=last(Tensor.bfloat16)),
    "step: last bias too long": wrong("layers", biases=last(lambda _: torch.ones(DIM + 1))),
    "step: x of float64": wrong("layers", x=Tensor.double),
    "step: x strided": wrong("layers", x=strided),
    "step: x wider": wrong("layers", x=longer),
    "step: x without width": wrong("layers", x=lambda x: x[..., :0]),
    "step: one row too few": wrong("layers", x=lambda x: x[:-1]),
    "step: cos too long": wrong("layers", cos=longer),
    "step: sin of float64": wrong("layers", sin=Tensor.double),
    "step: position past the end": wrong("layers", positions=torch.tensor([[3], [0], [11]])),
    "step: position before the start": wrong("layers", positions=torch.tensor([[-1], [0], [10]])),
    "step: positions of int32": wrong("layers", positions=Tensor.int),
    "step: no heads": wrong("layers", heads=0),
    "step: heads no multiple": wrong("layers", heads=7),
    "step: no KV heads": wrong("layers", **dict.fromkeys(LISTS[:2], lambda v: [t[:, :0] for t in v])),
    "step: fewer KV heads in one layer": wrong("layers", **dict.fromkeys(LISTS[:2], last(lambda t: t[:, :1].clone()))),
    "step: tokens of two rows": wrong("layers", x=lambda x: x[:2].repeat(1, 2, 1)),
    "step: hidden": wrong("layers", hidden=HIDDEN - 1),
    "step: hidden below zero": wrong("layers", hidden=-1),
    "prompt: nothing new": wrong(
        "prompt", x=lambda x: x[:, :0], positions=lambda t: t[:, :0], cos=lambda t: t[:0], sin=lambda t: t[:0]
    ),
    "prompt: positions apart": wrong("prompt", positions=lambda t: t.flip(1)),
    "prompt: a position twice": wrong("prompt", positions=torch.tensor([[5, 6, 6]])),
    "prompt: past the end": wrong("prompt", positions=lambda t: t + 4),
    "prompt: before the start": wrong("prompt", positions=lambda t: t - 6),
    "prompt: two rows": wrong(
        "prompt",
        **dict.fromkeys(("x", "cos", "sin", "positions"), two_rows),
        **dict.fromkeys(LISTS[:2], two_rows_each),
    ),
    "prompt: a cache of two rows": wrong(
        "prompt", **dict.fromkeys(LISTS[:2], lambda v: [t.repeat(2, 1, 1, 1) for t in v])
    ),
    "prompt: narrow": wrong("prompt", x=lambda t: t[..., :-1].contiguous()),
    "prompt: strided": wrong("prompt", x=strided),
    "prompt: no heads": wrong("prompt", heads=0),
    "prompt: heads below zero": wrong("prompt", heads=-2),
    "prompt: no KV heads": wrong("prompt", **dict.fromkeys(LISTS[:2], lambda v: [t[:, :0] for t in v])),
    "prompt: gain too short": wrong("prompt", gains=last(lambda t: t[:-1])),
    "prompt: last matrix longer": wrong("prompt", matrices=last(longer)),
    "prompt: last bias too long": wrong("prompt", biases=last(lambda _: torch.ones(DIM + 1))),
    "prompt: integers": wrong("prompt", x=as_long),
    "project: rows": wrong("project", rows=HIDDEN + 1),
    "project: rows below zero": wrong("project", rows=-1),
    "project: no tensor": wrong("project", w=[]),
    "project: bias too short": wrong("project", bias=lambda t: t[:-1]),
    "project: bias strided": wrong("project", bias=strided),
    "project: x wider": wrong("project", x=longer),
    "project: x without width": wrong("project", x=lambda x: x[:, :0], w=lambda w: [w[0][:, :0]]),
    "project: integers": wrong("project", x=as_long, w=lambda w: [as_long(w[0])], bias=as_long),
    "project: x of integers, codes": wrong("project", x=as_long, w=lambda _: codes().tensors, bias=as_long),
    "product: rows": wrong("product", rows=HIDDEN + 1),
    "product: rows below zero": wrong("product", rows=-1),
    "product: no tensor": wrong("product", w=[]),
    "product: rows of codes": wrong("product", rows=HIDDEN + 16, w=lambda _: codes().tensors, bias=torch.empty(0)),
    "product: bias too short": wrong("product", bias=lambda t: t[:-1]),
    "product: x wider": wrong("product", x=lambda x: torch.cat((x, x), -1)),
    "product: integers": wrong("product", x=as_long, w=lambda w: [as_long(w[0])], bias=as_long),
    "product: x of integers, codes": wrong("product", x=as_long, w=lambda _: codes().tensors, bias=as_long),
    "rows: past the end": wrong("rows", at=torch.tensor([0, 48])),
    "rows: before the start": wrong("rows", at=torch.tensor([-1])),
    "rows: far past the end": wrong("rows", at=torch.tensor([2**63 - 1])),
    "rows: numbers of int32": wrong("rows", at=Tensor.int),
    "rows: numbers in a table": wrong("rows", at=lambda t: t[None]),
    "rows: no columns": wrong("rows", columns=0),
    "rows: columns below zero": wrong("rows", columns=-1),
    "rows: too wide": wrong("rows", columns=DIM + 32),
    "rows: of floats": wrong("rows", w=[torch.ones(48, DIM)]),
    "rows: no tensor": wrong("rows", w=[]),
    "rows: scales of float32": wrong("rows", w=lambda w: [w[0], w[1].float(), w[2]]),
    "rows: codes cut": wrong("rows", w=lambda w: [w[0][:-1], *w[1:]]),
    "rows: codes strided": wrong("rows", w=lambda w: [strided(w[0]), *w[1:]]),
    "rows: least values cut": wrong("rows", w=lambda w: [*w[:2], w[2][:-1]]),
    "rows: as integers": wrong("rows", dtype=torch.long),
    "rows: as float16": wrong("rows", dtype=torch.float16),
}


def tensors(arguments: Arguments) -> Iterator[Tensor]:
    for value in arguments.values():
        yield from (
            [value]
            if isinstance(value, Tensor)
            else [t for t in value if isinstance(t, Tensor)]
            if isinstance(value, list)
            else []
        )


def refuses(name: str, change: Callable[[Arguments], Arguments]) -> bool:
    arguments = valid(name)
    arguments |= change(arguments)
    before = [t.clone() for t in tensors(arguments)]
    try:
        called(name)(**arguments)
    except (RuntimeError, IndexError):
        return all(torch.equal(t, old) for t, old in zip(tensors(arguments), before, strict=True))
    return False


@pytest.fixture(scope="module")
def refused() -> list[str]:
    with subprocess.Popen([sys.executable, "-m", __name__], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        killer = threading.Timer(60, child.kill)  # a call that never ends
        killer.start()
        names = child.stdout.read().splitlines()
        killer.cancel()
    return names


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_refused_and_writes_nothing(refused: list[str], name: str) -> None:
    assert name in refused


CALLS = [(name, format_) for name in ("layers", "prompt", "project", "product") for format_ in FORMATS]
CALLS += [("rows", "int8"), ("rows", "int4")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "format_"), CALLS)
def test_schema_and_fake_tensors_agree_with_what_happens(name: str, format_: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(called(name).default, (), valid(name, format_, dtype))


@pytest.mark.parametrize(("name", "format_"), CALLS)
def test_two_threads_at_once_get_the_same_bits(name: str, format_: str) -> None:
    def run() -> list[Tensor]:
        arguments = valid(name, format_)
        result = called(name)(**arguments)
        return [result, *tensors(arguments)]

    def check() -> None:
        start.wait()
        same.append(all(all(map(same_bits, run(), alone)) for _ in range(20)))

    torch.set_num_threads(2)
    alone, same, start = run(), list[bool](), threading.Barrier(2)
    threads = [threading.Thread(target=check) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True, True]


class Decode(nn.Module):
    """A step of decoding, tensors in and out: what can be exported."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        rows = torch.arange(tokens.shape[0])[:, None]
        kv = [LayerCache(k, v, rows, positions) for k, v in layers]
        return self.model.logits(self.model.trunk(tokens, positions, mask, kv))


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_step_of_decoding_exports(quantize: str | None) -> None:
    model = optimize(tiny_model(), quantize)
    cache = model.new_cache(2, 40)
    model(random_tokens(2, 9), cache)
    tokens, positions = random_tokens(2, 1, seed=8), cache.positions(1)
    layers = [(layer.k, layer.v) for layer in cache.layers(positions)]
    inputs = (tokens, positions, causal_mask(positions, cache.read_length(1)), layers)
    program = torch.export.export(Decode(model), copy.deepcopy(inputs))
    assert any("layers" in str(node.target) for node in program.graph.nodes)
    logits = program.module()(*copy.deepcopy(inputs))
    assert same_bits(logits, model(tokens, cache))


if __name__ == "__main__":
    load_kernels()
    torch.set_num_threads(2)
    for name, case in WRONG.items():
        if refuses(*case):
            print(name, flush=True)
