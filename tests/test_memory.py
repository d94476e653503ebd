"""How much memory a model needs, and what fits. Only the test that measures allocates anything large."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from llama_mini import Llama, LlamaConfig
from llama_mini.errors import CapacityError
from llama_mini.machine import gc_paused
from llama_mini.memory import (
    PREFILL_CHUNK,
    WeightBytes,
    cache_bytes,
    check_fits,
    work_bytes,
)
from llama_mini.model.kv_cache import KVCache

CPU = torch.device("cpu")
MiB, GiB = 2**20, 2**30
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

LLAMA_8B = LlamaConfig(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336, vocab_size=128_256, max_seq_len=131_072
)
LLAMA_70B = LlamaConfig(
    dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28672, vocab_size=128_256, max_seq_len=131_072
)
N_8B, N_70B = 8_030_261_248, 70_553_706_496


def tiny(plan: str = "pre", **changes: Any) -> LlamaConfig:
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 160, "vocab_size": 320} | changes
    return LlamaConfig(max_seq_len=8192, norm_plan=plan, **sizes)


def weights(n_parameters: int, stored_bits: float | None = None) -> WeightBytes:
    """Of a model whose weights are all in matrices. `stored_bits`: of a weight in a quantised file; None: floats."""
    bits = {"int8": 8.5, "int4": 5.0, "auto": stored_bits, "none": None}
    return lambda dtype, quantize: int(n_parameters * (bits[quantize] or 8 * dtype.itemsize) / 8)


def need(config: LlamaConfig, n_parameters: int, dtype: torch.dtype, positions: int) -> int:
    cache, work = cache_bytes(config, positions, dtype), work_bytes(config, positions, dtype)
    return weights(n_parameters)(dtype, "none") + cache + work


# --- the need ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_is_what_a_cache_allocates(dtype: torch.dtype) -> None:
    config = tiny(head_dim=24)
    for positions in (1, 16, 17, 100, 4096):
        cache = KVCache(config, 1, positions, dtype, device="meta")
        allocated = [part.nbytes for part in vars(cache).values() if isinstance(part, torch.Tensor) and part.ndim == 5]
        assert len(allocated) == 2
        assert cache_bytes(config, positions, dtype) == sum(allocated)


def test_the_cache_of_the_published_models() -> None:
    assert cache_bytes(LLAMA_8B, 131_072, torch.bfloat16) == 16 * GiB
    assert cache_bytes(LLAMA_70B, 8192, torch.bfloat16) == 2.5 * GiB


def peak(run: Callable[[], object]) -> int:
    """Bytes alive at once, beyond those before, as PyTorch's allocator counts them."""
    with gc_paused(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record, torch.inference_mode():
        run()
    changes = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        alive += change.nbytes()
        most = max(most, alive)
    return most


SHAPES = {
    "tiny": tiny(),
    "smollm2": tiny(dim=576, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=49_152),
    "wide": tiny(dim=768, n_heads=12, n_kv_heads=4, hidden_dim=2688),
    "many heads": tiny(dim=256, n_heads=16, n_kv_heads=16, head_dim=128, hidden_dim=256),
    "peri": tiny("peri+qk", dim=512, n_heads=8, n_kv_heads=8, hidden_dim=1376),
    "mid": tiny("sub", dim=256, n_heads=4, n_kv_heads=4, hidden_dim=2048),
    "gate and up": tiny("simple", dim=256, n_heads=4, n_kv_heads=4, hidden_dim=2048),
    "softcap": tiny(dim=512, n_heads=8, n_kv_heads=4, hidden_dim=512, attention_softcap=50.0, logit_softcap=30.0),
    "parallel": tiny("parallel", dim=512, hidden_dim=1024, activation="relu2", gated_mlp=False),
}


@pytest.mark.parametrize(
    "shape",
    [pytest.param(name, marks=pytest.mark.slow if name in ("wide", "mid", "gate and up") else ()) for name in SHAPES],
)
def test_the_work_is_bounded_and_not_by_far(shape: str) -> None:
    torch.manual_seed(0)
    config = SHAPES[shape]
    model = Llama(config).eval()
    for dtype, positions in itertools.product([torch.float32, torch.bfloat16], [20, 512, 4096]):
        model.to(dtype)
        cache = model.new_cache(1, positions)
        chunk = min(PREFILL_CHUNK, positions)
        cache.advance(positions - chunk)  # the last chunk of the prompt sees the whole cache
        tokens = torch.randint(config.vocab_size, (1, chunk))
        measured = peak(lambda: model.logits(model.hidden(tokens, cache)[0, -1]))  # noqa: B023  called at once
        layer = cache_bytes(config, positions, dtype) // config.n_layers  # the operators allocate a copy themselves
        assert measured <= work_bytes(config, positions, dtype) <= 3 * (measured + layer) + MiB


# --- what fits ---


@pytest.mark.parametrize(
    ("config", "n_parameters", "dtype", "positions", "available", "says"),
    [
        (
            LLAMA_8B,
            N_8B,
            torch.float32,
            8192,
            24 * GiB,
            r"the model needs 32\.\d GiB in float32 \(29\.9 GiB of weights, 2\.0 GiB of cache for 8192 positions, "
            r"\d+\.\d MiB of work memory\), but cpu has 24\.0 GiB available; --dtype bfloat16 would fit",
        ),
        (
            LLAMA_8B,
            N_8B,
            torch.bfloat16,
            131_072,
            24 * GiB,
            r"24\.0 GiB available; a context of \d+ positions would fit",
        ),
        (
            LLAMA_8B,
            N_8B,
            torch.float32,
            131_072,
            36 * GiB,
            r"; --dtype bfloat16 or a context of \d+ positions would fit",
        ),
        (LLAMA_8B, N_8B, torch.float32, 131_072, 20 * GiB, r"; --dtype bfloat16 with a context of \d+ positions would"),
        (
            LLAMA_70B,
            N_70B,
            torch.float32,
            8192,
            32 * GiB,
            r"; no dtype, format or context fits: the least, int4 with a context of 16, needs 41\.\d GiB",
        ),
        (LLAMA_70B, N_70B, torch.float32, 8192, 64 * GiB, r"has 64\.0 GiB available; --quantize int4 would fit$"),
        (LLAMA_70B, N_70B, torch.float32, 8192, 96 * GiB, r"has 96\.0 GiB available; --quantize int8 would fit$"),
        (LLAMA_70B, N_70B, torch.float16, 8192, 0, r"has 0\.0 MiB available; .* the least, int4 with a context of 16"),
        (
            LLAMA_70B,
            N_70B,
            torch.float32,
            131_072,
            64 * GiB,
            r"; --quantize int4 with a context of \d+ positions would",
        ),
    ],
)
def test_what_does_not_fit_says_what_would(
    config: LlamaConfig, n_parameters: int, dtype: torch.dtype, positions: int, available: int, says: str
) -> None:
    with pytest.raises(CapacityError, match=says) as caught:
        check_fits(config, weights(n_parameters), dtype, positions, CPU, available)
    assert "\n" not in str(caught.value)


def test_a_file_of_two_bits_needs_the_least_as_it_is() -> None:
    with pytest.raises(CapacityError, match=r"the least, the bits of the file with a context of 16, needs 24\.\d GiB$"):
        check_fits(LLAMA_70B, lambda _, name: N_70B // 8 * (3 if name == "auto" else 5), torch.half, 99, CPU, GiB)


@given(
    st.integers(1, 10_000_000),
    st.sampled_from(DTYPES),
    st.integers(1, 20_000),
    st.integers(0, 200 * MiB),
)
@settings(max_examples=300, deadline=None)
def test_what_is_said_to_fit_fits_and_no_more_does(n: int, dtype: torch.dtype, positions: int, available: int) -> None:
    config = SHAPES["smollm2"]
    try:
        check_fits(config, weights(n), dtype, positions, CPU, available)
    except CapacityError as error:
        message = str(error)
    else:
        assert need(config, n, dtype, positions) <= available
        return
    assert need(config, n, dtype, positions) > available
    narrow = torch.bfloat16 if dtype.itemsize > 2 else dtype
    told = re.search(r"context of (\d+) positions", message)
    for name in re.findall(r"--quantize (\w+)", message):
        longest = int(told[1]) if told else positions
        check_fits(config, weights(n), narrow, longest, CPU, available, name)
        if told:
            with pytest.raises(CapacityError):
                check_fits(config, weights(n), narrow, min(longest + 16, positions), CPU, available, name)
        return
    if told:
        longest, with_dtype = int(told[1]), narrow if " with a context" in message else dtype
        assert longest < positions
        check_fits(config, weights(n), with_dtype, longest, CPU, available)
        with pytest.raises(CapacityError):
            check_fits(config, weights(n), with_dtype, min(longest + 16, positions), CPU, available)
    if "--dtype bfloat16" in message:
        longest = longest if " with a context" in message else positions
        check_fits(config, weights(n), torch.bfloat16, longest, CPU, available)
    if not told and "--dtype" not in message:
        for quantize in ("none", "int4"):
            with pytest.raises(CapacityError):
                check_fits(config, weights(n), narrow, min(positions, 16), CPU, available, quantize)


@pytest.mark.parametrize(
    ("quantize", "available", "says"),
    [
        (
            "auto",
            4 * GiB,
            r"needs 5\.\d GiB as it is stored \(4\.\d GiB of weights.*; no dtype, format or context fits",
        ),
        ("auto", 9 * GiB // 2, r"; a context of \d+ positions would fit$"),
        ("none", 6 * GiB, r"; --dtype auto --quantize auto would fit$"),
    ],
)
def test_a_quantised_file_is_advised_by_its_own_bits(quantize: str, available: int, says: str) -> None:
    with pytest.raises(CapacityError, match=says):
        check_fits(LLAMA_8B, weights(N_8B, 4.5), torch.bfloat16, 8192, CPU, available, quantize)


@given(st.integers(1, 10**11), st.integers(1, 200_000), st.integers(1, 10**9), st.integers(1, 1000))
@settings(deadline=None)
def test_the_need_grows_with_everything(n: int, positions: int, more: int, longer: int) -> None:
    base = need(LLAMA_8B, n, torch.bfloat16, positions)
    assert need(LLAMA_8B, n + more, torch.bfloat16, positions) > base
    assert need(LLAMA_8B, n, torch.bfloat16, positions + longer) >= base
    assert need(LLAMA_8B, n, torch.float32, positions) > base
    assert need(LLAMA_70B, n, torch.bfloat16, positions) > base


def test_what_fits_exactly_fits() -> None:
    exactly = need(LLAMA_8B, N_8B, torch.bfloat16, 8192)
    check_fits(LLAMA_8B, weights(N_8B), torch.bfloat16, 8192, CPU, exactly)
    with pytest.raises(CapacityError, match=r"a context of 8176 positions would fit"):
        check_fits(LLAMA_8B, weights(N_8B), torch.bfloat16, 8192, CPU, exactly - 1)


def test_the_machine_is_asked_where_nothing_is_given() -> None:
    check_fits(tiny(), weights(1000), torch.float32, 100, CPU)
    with pytest.raises(CapacityError, match=r"no dtype, format or context fits"):
        check_fits(LLAMA_8B, weights(10**15), torch.bfloat16, 100, CPU)


def test_where_nobody_says_everything_fits() -> None:
    check_fits(LLAMA_8B, weights(10**15), torch.float64, 100, torch.device("meta"))
