"""Fast models beside plain ones of the very same weights."""

import copy
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_mini import KVCache, Llama
from llama_mini.model.linear import Linear
from llama_mini.optimize import fuse, optimize
from llama_mini.optimize.build import load_kernels
from llama_mini.optimize.fused_branches import FusedAttention, FusedFeedForward
from llama_mini.optimize.fused_layers import FusedEmbedding, FusedHead
from llama_mini.optimize.packed_linear import PackedLinear
from tests.optimize.fake_compiler import fake_compiler
from tests.tiny_models import random_tokens

FORMATS = (None, "int8", "int4")
KERNELS = ("auto", "off")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="session", autouse=True)
def built_operators() -> None:
    """Built before a test captures what is printed; a machine without a compiler fails here."""
    assert load_kernels()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def compiler(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script, named by CXX."""
    path = fake_compiler(tmp_path / "c++", log)
    monkeypatch.setenv("CXX", str(path))
    return path


def fast_of(plain: Llama, quantize: str | None = None, kernels: str = "auto") -> Llama:
    """A fast copy. `mixed`: each matrix in a format of its own, some of v too, as in files that are quantised so."""
    fast = copy.deepcopy(plain)
    if quantize != "mixed":
        return optimize(fast, quantize, kernels)
    tensors = {name: parameter.detach() for name, parameter in fast.named_parameters()}
    fused = {name: re.sub("[qkv]_proj|gate_proj|up_proj", "", name) for name, t in tensors.items() if t.ndim == 2}
    kinds = itertools.cycle(("int5", "int8", None, "int4", "int8"))
    kind_of = {matrix: next(kinds) for matrix in dict.fromkeys(fused.values())}
    formats = {name: kind for name, matrix in fused.items() if (kind := kind_of[matrix])}
    formats |= {name: "int4" for name in formats if name.endswith("0.attention.v_proj.weight")}
    for name, part in fuse(fast, fast.dtype, fast.device, formats, kernels).items():
        part.load(tensors[name])
    return fast


def plain_of(fast: Llama, plain: Llama) -> Llama:
    """`plain` with the dequantized weights of `fast`: the two differ in arithmetic, not in quantization."""
    twin = copy.deepcopy(plain)
    for ours, theirs in zip(fast.layers, twin.layers, strict=True):
        attention, feed_forward = ours.attention, ours.feed_forward
        assert isinstance(attention, FusedAttention)
        assert isinstance(feed_forward, FusedFeedForward)
        _widen(attention.qkv_proj, [theirs.attention.q_proj, theirs.attention.k_proj, theirs.attention.v_proj])
        _widen(attention.o_proj, [theirs.attention.o_proj])
        gate, up = theirs.feed_forward.gate_proj, theirs.feed_forward.up_proj
        _widen(feed_forward.gate_up_proj, [up] if gate is None else [gate, up])
        _widen(feed_forward.down_proj, [theirs.feed_forward.down_proj])
    if isinstance(fast.lm_head, FusedHead):
        _widen(fast.lm_head.linear, [twin.lm_head])
    if isinstance(fast.tok_embeddings, FusedEmbedding):
        _widen(fast.tok_embeddings.head.linear, [twin.tok_embeddings])
    return twin


def _widen(matrix: PackedLinear, linears: Sequence[Linear]) -> None:
    weights = [each.lookup(torch.arange(at, at + n)) for each in matrix.matrices for at, n in parts_of(each)]
    for weight, linear in zip(weights, linears, strict=True):
        linear.weight.copy_(weight)


def parts_of(matrix: PackedLinear) -> Iterable[tuple[int, int]]:
    """Where each part begins, and its rows."""
    return zip(matrix.offsets, matrix.parts, strict=True)


def prompts(model: Llama, cache: KVCache, lengths: Sequence[int], chunks: Sequence[int] = (10**6,)) -> list[Tensor]:
    """Fills row r with `lengths[r]` tokens of its own, in chunks; the logits of each row, (T, V)."""
    found = []
    for row, length in enumerate(lengths):
        tokens, sizes, left = random_tokens(1, length, seed=row), [], length
        for size in [*chunks, length]:
            sizes.append(min(size, left))
            left -= sizes[-1]
        view = cache.row(row)
        found.append(torch.cat([model(part, view)[0] for part in tokens.split([s for s in sizes if s], dim=1)]))
    return found


def steps(model: Llama, cache: KVCache, n: int) -> Tensor:
    """Logits of `n` steps of all rows, (B, n, V)."""
    tokens = random_tokens(cache.batch, n, seed=99)
    return torch.cat([model(tokens[:, i : i + 1], cache) for i in range(n)], dim=1)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a token's logits, ‖found − expected‖ / ‖expected‖."""
    found, expected = found.double(), expected.double()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


class Seen(TorchDispatchMode):
    """Counts the fast operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "llama_mini":
            self.names.append(name)
        return func(*args, **kwargs or {})
