"""Rotary embedding: tables against transformers and float64, and what turning a head does and does not change."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig as HFConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llama_mini.model.config import LlamaConfig
from llama_mini.model.rope import RotaryEmbedding, apply_rope
from llama_mini.model.rope_scaling import Llama3Scaling
from tests import reference
from tests.tiny_models import TINY, tiny_model

FURTHEST = 131_071
POSITIONS = torch.tensor([[0, 1, 2, 100, 4095, 8192, 15_962, 65_537, FURTHEST]])


def settings(head_dim: int, theta: float, factor: float | None) -> tuple[HFConfig, LlamaConfig]:
    """The same rotary settings for transformers and for us; a factor means LLaMA 3.1's scaling."""
    sizes: dict[str, Any] = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": 131_072}
    ours = LlamaConfig(**TINY | {"head_dim": head_dim, "rope_theta": theta})
    if factor is None:
        return HFConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": theta}), ours
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs: dict[str, Any] = {"rope_type": "llama3", "rope_theta": theta, "original_max_position_embeddings": 8192}
    ours = LlamaConfig(
        **TINY | {"head_dim": head_dim, "rope_theta": theta},
        rope_scaling=Llama3Scaling(**scaling, original_max_seq_len=8192),
    )
    return HFConfig(**sizes, rope_parameters=theirs | scaling), ours


KINDS = pytest.mark.parametrize(
    ("head_dim", "theta", "factor"),
    [
        (64, 10_000.0, None),  # LLaMA 2's base
        (64, 100_000.0, None),  # SmolLM2
        (6, 10_000.0, None),
        (128, 500_000.0, None),  # LLaMA 3
        (128, 500_000.0, 8.0),  # LLaMA 3.1
        (64, 500_000.0, 32.0),  # LLaMA 3.2
        (64, 10_000.0, 8.0),
    ],
)


@KINDS
def test_tables_are_those_of_transformers_to_the_bit(head_dim: int, theta: float, factor: float | None) -> None:
    theirs, ours = settings(head_dim, theta, factor)
    expected = LlamaRotaryEmbedding(theirs)(torch.empty(0), POSITIONS)
    for table, full in zip(RotaryEmbedding(ours)(POSITIONS), expected, strict=True):
        assert table.shape == (1, POSITIONS.shape[1], 1, head_dim // 2)
        assert torch.equal(table[:, :, 0], full[..., : head_dim // 2])  # theirs holds each angle twice


@KINDS
def test_tables_are_right_to_float32s_rounding_of_the_angle(head_dim: int, theta: float, factor: float | None) -> None:
    config = settings(head_dim, theta, factor)[1]
    angles = np.multiply.outer(POSITIONS[0].numpy(), reference.frequencies(config))
    slack = np.abs(angles) * 8 * 2.0**-24 + 2.0**-23  # base, power, quotient and product are each rounded
    for table, exact in zip(RotaryEmbedding(config)(POSITIONS), (np.cos(angles), np.sin(angles)), strict=True):
        assert np.all(np.abs(table[0, :, 0].double().numpy() - exact) <= slack)


def test_scaling_stretches_slow_pairs_leaves_fast_ones_and_moves_nothing_up() -> None:
    plain, scaled = (RotaryEmbedding(settings(128, 500_000.0, factor)[1]).inv_freq for factor in (None, 8.0))
    ratio = plain / scaled
    assert ratio[0] == 1
    assert ratio[-1] == 8
    assert torch.all(ratio.diff() >= -1e-5)
    assert torch.any((ratio > 1.1) & (ratio < 7.9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tables_stay_float32_whatever_becomes_of_the_model(dtype: torch.dtype) -> None:
    model = tiny_model()
    before = model.rope(POSITIONS)
    after = model.to(dtype).rope(POSITIONS)
    assert all(table.dtype == torch.float32 for table in after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # 15,962 is no bfloat16 number
    assert "rope.inv_freq" not in model.state_dict()


def test_tables_survive_the_meta_device() -> None:
    with torch.device("meta"):
        rope = RotaryEmbedding(LlamaConfig(**TINY))
    expected = RotaryEmbedding(LlamaConfig(**TINY)).inv_freq
    assert torch.equal(rope.inv_freq, expected)
    assert torch.equal(rope.to("meta").to_empty(device="cpu").inv_freq, expected)


def heads(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def rope_at(positions: Tensor, head_dim: int = 64) -> tuple[Tensor, Tensor]:
    return RotaryEmbedding(LlamaConfig(**TINY | {"head_dim": head_dim}))(positions)


def test_turning_is_that_of_transformers_to_the_bit() -> None:
    q, k = heads(2, 9, 6, 64), heads(2, 9, 3, 64, seed=4)
    cos, sin = (table[:, :, 0].repeat(1, 1, 2) for table in rope_at(POSITIONS))
    theirs = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for x, expected in zip((q, k), theirs, strict=True):
        assert torch.equal(apply_rope(x, rope_at(POSITIONS)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_head_is_turned_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x = heads(1, 9, 2, 64, dtype=dtype)
    turned = apply_rope(x, rope_at(POSITIONS))
    assert turned.dtype == dtype
    assert torch.equal(turned, apply_rope(x.float(), rope_at(POSITIONS)).to(dtype))


def test_rows_of_a_batch_turn_by_their_own_positions() -> None:
    x, positions = heads(2, 4, 3, 16), torch.tensor([[0, 1, 2, 3], [50, 51, 52, 53]])
    together = apply_rope(x, rope_at(positions, 16))
    for row in range(2):
        assert torch.equal(together[row : row + 1], apply_rope(x[row : row + 1], rope_at(positions[row : row + 1], 16)))
    exact = np.stack([reference.rotate(x[i].double().numpy(), positions[i].numpy(), BASE_16) for i in range(2)])
    np.testing.assert_allclose(together.numpy(), exact, rtol=0, atol=2e-5)


BASE_16 = reference.frequencies(LlamaConfig(**TINY | {"head_dim": 16}))


def test_position_zero_and_the_length_of_a_vector_are_left_alone() -> None:
    x = heads(1, 9, 2, 64, dtype=torch.float64)
    turned = apply_rope(x, rope_at(POSITIONS))
    assert torch.equal(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def test_a_score_depends_on_the_distance_alone() -> None:
    q, k = heads(1, 1, 1, 64), heads(1, 1, 1, 64, seed=4)

    def score(query: int, key: int) -> float:
        turned = [apply_rope(x, rope_at(torch.tensor([[at]]))).double() for x, at in ((q, query), (k, key))]
        return float((turned[0] * turned[1]).sum())

    expected = score(7, 0)
    for shift in (1, 10, 500, 2000):
        assert score(7 + shift, shift) == pytest.approx(expected, abs=2e-3)
    assert abs(score(8, 0) - expected) > 0.1
    assert abs(score(0, 7) - expected) > 0.1  # and on its sign
