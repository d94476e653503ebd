"""What cache fits beside a loaded model, and what the engine says of one that does not."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mini import LLM, Llama, LlamaConfig, SamplingParams
from llama_mini.errors import CapacityError
from llama_mini.memory import (
    PREFILL_CHUNK,
    cache_bytes,
    check_cache_fits,
    check_fits,
    fitting_positions,
    sequence_bytes,
    window_positions,
    work_bytes,
)
from tests.test_memory import CPU, LLAMA_8B, GiB, MiB

MISTRAL = replace(LLAMA_8B, max_seq_len=32_768, sliding_window=4096, sliding_layers=None)
GEMMA = replace(MISTRAL, sliding_layers=tuple(range(0, 32, 2)))


@given(st.integers(1, 64), st.integers(1, 50_000), st.integers(1, 10**12))
@settings(max_examples=300, deadline=None)
def test_a_cache_that_is_said_to_fit_fits_and_no_longer_one_does(rows: int, positions: int, available: int) -> None:
    def fits(n: int) -> bool:
        work = work_bytes(LLAMA_8B, n, torch.bfloat16, n_new=5)
        return rows * cache_bytes(LLAMA_8B, n, torch.bfloat16) + work <= available

    if fits(positions):
        check_cache_fits(LLAMA_8B, rows, torch.bfloat16, positions, 5, CPU, available)
        return
    with pytest.raises(CapacityError) as caught:
        check_cache_fits(LLAMA_8B, rows, torch.bfloat16, positions, 5, CPU, available)
    said = re.search(r"; (\d+) positions would fit$", str(caught.value))
    if said is None:
        assert str(caught.value).endswith("no prompt at all fits beside the model")
        assert not fits(16)
    else:
        assert fits(int(said[1]))
        assert not fits(int(said[1]) + 16)


def test_the_engine_refuses_before_it_runs(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_dir, dtype="float32")
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    monkeypatch.setattr("llama_mini.memory.available_memory", lambda device: MiB // 2)
    monkeypatch.setattr(llm.model, "hidden", None)
    with pytest.raises(CapacityError, match=r"has 40\d positions and needs 0\.1 MiB .* only 0 positions fit"):
        llm.generate(["one", "two", "three"], params)


def test_the_engine_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole blocks, beside the work memory, and no more than is asked for."""
    for available in (10**6, 10**8, 10**9, 3 * 10**9, 10**11):
        monkeypatch.setattr("llama_mini.memory.available_memory", lambda device, n=available: n)
        found = fitting_positions(LLAMA_8B, 50_000, torch.bfloat16, CPU)

        def need(n: int) -> int:
            work = work_bytes(LLAMA_8B, min(n, LLAMA_8B.max_seq_len), torch.bfloat16, PREFILL_CHUNK)
            return cache_bytes(LLAMA_8B, n, torch.bfloat16) + work

        assert found % 16 == 0
        assert not found or need(found) <= 0.9 * available
        assert found == 50_000 or need(found + 16) > 0.9 * available


def test_a_sequence_needs_the_window_of_layers_with_one() -> None:
    """Whole pages for the window and a part of a prompt: 4,608 positions and one page more."""
    assert window_positions(MISTRAL) == 19 * 256
    assert sequence_bytes(MISTRAL, 32_768, torch.bfloat16) == 608 * MiB
    assert sequence_bytes(GEMMA, 32_768, torch.bfloat16) == 2 * GiB + 304 * MiB
    for config in (MISTRAL, GEMMA):
        assert sequence_bytes(config, 4000, torch.bfloat16) == cache_bytes(config, 4000, torch.bfloat16)
    assert sequence_bytes(LLAMA_8B, 32_768, torch.bfloat16) == cache_bytes(LLAMA_8B, 32_768, torch.bfloat16) == 4 * GiB
    work = work_bytes(MISTRAL, 32_768, torch.bfloat16)
    check_fits(MISTRAL, lambda *_: GiB, torch.bfloat16, 32_768, CPU, GiB + 608 * MiB + work)
    with pytest.raises(CapacityError, match=r"608\.0 MiB of cache for 32768 positions"):
        check_fits(MISTRAL, lambda *_: GiB, torch.bfloat16, 32_768, CPU, GiB + 607 * MiB + work)


@pytest.mark.parametrize("config", [MISTRAL, GEMMA])
def test_of_two_kinds_of_pages_as_many_fit(config: LlamaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    windowed, most = 2 * window_positions(config), 50_000
    for available in (10**8, 10**9, 3 * 10**9, 10**10, 10**11):
        monkeypatch.setattr("llama_mini.memory.available_memory", lambda device, n=available: n)
        found = fitting_positions(config, most, torch.bfloat16, CPU, None, windowed)

        def need(n: int) -> int:
            work = work_bytes(config, min(n, config.max_seq_len), torch.bfloat16, PREFILL_CHUNK)
            return cache_bytes(config, n, torch.bfloat16, windowed) + work

        assert not found or need(found) <= 0.9 * available
        assert found == most or need(found + 16) > 0.9 * available


def test_a_model_is_refused_before_it_is_read(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_mini.memory.available_memory", lambda device: 1000)
    monkeypatch.setattr("llama_mini.checkpoint.load.read_all", None)
    with pytest.raises(CapacityError, match=r"the model needs .* in float32 .* but cpu has 0\.0 MiB available"):
        Llama.from_pretrained(tiny_dir)
