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

from llama_mini.model.attention import causal_mask
from llama_mini.model.kv_cache import LayerCache
from llama_mini.model.llama import Llama
from llama_mini.optimize import optimize
from llama_mini.optimize.build import load_kernels
from tests.optimize.operator_calls import Arguments, called, valid
from tests.optimize.random_layers import LAYER_FORMATS
from tests.optimize.twins import CODED, FORMATS, same_bits
from tests.optimize.wrong_calls import WRONG
from tests.processes import child
from tests.tiny_models import random_tokens, tiny_model

ROOT = Path(__file__).parents[2]


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


def test_a_wrong_call_is_refused_and_writes_nothing() -> None:
    with child(sys.executable, "-m", __name__, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(60, process.kill)  # a call that never ends
        killer.start()
        refused = process.stdout.read().splitlines()
        killer.cancel()
    assert [name for name in WRONG if name not in refused] == []


CALLS: list[Any] = [
    pytest.param(name, format_, marks=pytest.mark.slow if format_ in ("int8", "int4") else ())  # mixed layers hold both
    for name in ("layers", "prompt", "step")
    for format_ in LAYER_FORMATS
]
CALLS += [(name, format_) for name in ("gemv", "gemm") for format_ in FORMATS]
CALLS += [*(("dequantize_rows", format_) for format_ in CODED), ("rms_norm", "float"), ("attend", "float")]
# A format is data to an operator, whose schema and shapes are the same for all: one of each kind is enough for quick.
LONG = [call for call in CALLS if call[0] in ("gemv", "gemm", "dequantize_rows")]
LONG = [call for call in LONG if call[1] not in ("float", "int4", "nf4")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "format_"), [pytest.param(*call, marks=pytest.mark.slow) if call in LONG else call for call in CALLS]
)
def test_schema_and_fake_tensors_agree_with_what_happens(name: str, format_: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(called(name).default, (), valid(name, format_, dtype))


@pytest.mark.parametrize(
    ("name", "format_"),
    [("pack", format_) for format_ in CODED]
    + [(name, format_) for name in ("quantize", "repack") for format_ in ("int8", "int4")],
)
def test_schema_says_what_is_written(name: str, format_: str) -> None:
    torch.library.opcheck(called(name).default, (), valid(name, format_), test_utils="test_schema")


@pytest.mark.parametrize(("name", "format_"), CALLS)
def test_two_threads_at_once_get_the_same_bits(name: str, format_: str) -> None:
    def run() -> list[Tensor]:
        arguments = valid(name, format_)
        result = called(name)(**arguments)
        return [*([result] if isinstance(result, Tensor) else result), *tensors(arguments)]

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
