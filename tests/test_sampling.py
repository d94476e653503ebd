"""Sampling against transformers' logits processors, and the corners where others return NaN."""

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_mini import SamplingParams
from llama_mini.errors import RequestError
from llama_mini.sampling import filtered, sample


def logits(seed: int, size: int = 1000) -> torch.Tensor:
    return 4 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.3, "top_k": 5000},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.5, "top_p": 0.1},
        {"temperature": 2.0, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    ],
    ids=str,
)
def test_filters_equal_transformers(settings: dict[str, float], seed: int) -> None:
    x = logits(seed)
    params = SamplingParams(**settings)
    expected = TemperatureLogitsWarper(params.temperature)(None, x[None])
    if params.top_k:
        expected = TopKLogitsWarper(params.top_k)(None, expected)
    if params.top_p < 1:
        expected = TopPLogitsWarper(params.top_p)(None, expected)
    if params.min_p:
        expected = MinPLogitsWarper(params.min_p)(None, expected)
    ours = filtered(x, params)
    assert torch.equal(ours.isinf(), expected[0].isinf())
    torch.testing.assert_close(ours.softmax(-1), expected[0].softmax(-1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-4},
        {"temperature": 1e-10},
        {"temperature": 5e-324},
        {"temperature": 1e30},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "top_k": 10**9},
        {"temperature": 1e-10, "top_k": 3, "top_p": 0.0, "min_p": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_extremes_keep_a_token_and_never_give_nan(settings: dict[str, float], scale: float) -> None:
    params = SamplingParams(seed=0, **settings)
    x = logits(1) * scale
    weights = filtered(x, params).softmax(-1)
    assert torch.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1)
    if settings["temperature"] <= 1e-4 or params.top_p == 0 or params.min_p == 1:
        assert sample(x, params, params.generator()) == int(x.argmax())


def test_zero_temperature_is_greedy_whatever_the_rest() -> None:
    params = SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.5, seed=1)
    assert [sample(logits(s), params, params.generator()) for s in range(20)] == [
        int(logits(s).argmax()) for s in range(20)
    ]


def test_frequencies_follow_the_softmax() -> None:
    x = torch.tensor([1.0, 0.0, -1.0, 2.0])
    params = SamplingParams(temperature=1.0, seed=3)
    generator = params.generator()
    counts = torch.bincount(torch.tensor([sample(x, params, generator) for _ in range(20_000)]), minlength=4)
    expected = x.softmax(-1) * 20_000
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi squared, 3 degrees of freedom, p = 0.001


def test_the_seed_decides_and_none_draws_a_new_one() -> None:
    def draw(seed: int | None) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed)
        generator = params.generator()
        return [sample(logits(0), params, generator) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("min_p", 2),
        ("top_k", -1),
        ("top_k", 1.5),
        ("seed", -1),
        ("seed", True),
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("stop", ""),
        ("stop", ["a", 3]),
        ("stop", 5),
        ("ignore_eos", 1),
    ],
)
def test_a_bad_value_is_named(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
