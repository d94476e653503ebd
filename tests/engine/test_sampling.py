"""Drawing a token, against transformers' warpers, a full sort and NumPy, and the corners where others return NaN."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_mini import SamplingParams
from llama_mini.engine.sampling import candidates, in_top_p, sample, with_temperature

FILTERS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.3, "top_k": 5000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.5, "top_p": 0.1},
    {"temperature": 1.5, "top_p": 0.999},
    {"temperature": 2.0, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 40, "min_p": 0.3},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
]


def logits(seed: int, size: int = 1000) -> torch.Tensor:
    return 4 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def warped(x: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    x = TemperatureLogitsWarper(params.temperature)(None, x[None])
    if params.top_k:
        x = TopKLogitsWarper(params.top_k)(None, x)
    if params.top_p < 1:
        x = TopPLogitsWarper(params.top_p)(None, x)
    if params.min_p:
        x = MinPLogitsWarper(params.min_p)(None, x)
    return x[0]


def by_full_sort(x: torch.Tensor, p: float) -> torch.Tensor:
    """The slow twin of in_top_p."""
    weights = x.softmax(-1).double()
    order = x.argsort(stable=True)
    kept = weights[order].cumsum(-1) > 1 - p
    kept[-1] = True
    return order[kept].sort().values


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_equal_transformers(filters: dict[str, float]) -> None:
    params = SamplingParams(**filters)
    for seed in range(20):
        x = logits(seed)
        expected = warped(x, params)
        ids, kept = candidates(x, params)
        assert ids.tolist() == expected.isfinite().nonzero()[:, 0].tolist()
        torch.testing.assert_close(kept.softmax(-1), expected.softmax(-1)[ids], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("filters", [FILTERS[1], FILTERS[3], FILTERS[8]], ids=str)
def test_banned_tokens_never_come_back(filters: dict[str, float]) -> None:
    for seed in range(5):
        x = logits(seed)
        x[torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:995]] = -math.inf
        params = SamplingParams(seed=seed, **filters)
        generator = params.generator()
        assert {sample(x, params, generator) for _ in range(50)} <= set(x.isfinite().nonzero()[:, 0].tolist())
        ids, kept = candidates(x, params)
        weights = torch.zeros(1000).index_copy(0, ids.long(), kept.softmax(-1))
        torch.testing.assert_close(weights, warped(x, params).softmax(-1))


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.9, 0.99, 1 - 1e-12])
def test_top_p_equals_a_full_sort(p: float) -> None:
    for size, seed in itertools.product([1, 2, 1000, 49152], range(2)):
        x = with_temperature(logits(seed, size), 1.0)
        assert torch.equal(in_top_p(x, p), by_full_sort(x, p))
        coarse = x.round()  # many ties
        assert torch.equal(in_top_p(coarse, p), by_full_sort(coarse, p))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    values=st.lists(
        st.one_of(st.floats(-50, 50, width=32), st.sampled_from([0.0, 1.0, -math.inf, 1e38, -1e38, 3e38, -3e38])),
        min_size=1,
        max_size=30,
    ).filter(lambda values: max(values) > -math.inf),
    temperature=st.one_of(st.floats(0, 3), st.sampled_from([5e-324, 1e-10, 1e-4, 1e30, 1e39, 1e299])),
    top_k=st.sampled_from([0, 1, 2, 10, 10**9]),
    top_p=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-300, 0.5])),
    min_p=st.one_of(st.floats(0, 1), st.sampled_from([1.0, 5e-324])),
)
def test_whatever_the_settings_a_likely_token_stays(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    x = torch.tensor(values)
    before = x.clone()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=1)
    ids, kept = candidates(x, params)
    assert len(ids)
    assert kept.softmax(-1).isfinite().all()
    assert float(x[ids].max()) == float(x.max())
    assert ids.tolist() == sorted(set(ids.tolist()))
    token = sample(x, params, params.generator())
    assert x[token] > -math.inf
    assert temperature == 0 or token in ids
    if temperature <= 1e-300 or top_k == 1 or top_p == 0 or min_p == 1:
        shifted = with_temperature(x, temperature)
        assert shifted[token] == shifted.max()
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-4},
        {"temperature": 1e-10},
        {"temperature": 5e-324},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1e-10, "top_k": 3, "top_p": 0.0, "min_p": 1.0},
    ],
    ids=str,
)
def test_extremes_are_the_argmax(extreme: dict[str, float]) -> None:
    params = SamplingParams(seed=0, **extreme)
    for seed, scale in itertools.product(range(5), [1.0, 1e4, 1e30]):
        x = logits(seed) * scale
        assert sample(x, params, params.generator()) == int(x.argmax())


def test_of_equal_logits_the_first_is_taken() -> None:
    logits = torch.zeros(40_000).index_fill(0, torch.tensor([7, 9_000, 39_999]), 3)
    assert sample(logits, SamplingParams(temperature=0), torch.Generator()) == 7


def test_zero_temperature_is_greedy_whatever_the_rest() -> None:
    params = SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.5, seed=1)
    assert [sample(logits(s), params, params.generator()) for s in range(20)] == [
        int(logits(s).argmax()) for s in range(20)
    ]


@pytest.mark.parametrize("filters", [{}, {"top_k": 40}, {"top_p": 0.8}, {"min_p": 0.05}], ids=str)
def test_frequencies_follow_the_softmax(filters: dict[str, float]) -> None:
    x = torch.cat((logits(5, 200) / 3, torch.full((20,), -math.inf)))
    params = SamplingParams(temperature=0.7, seed=3, **filters)
    generator = params.generator()
    n = 2_500
    drawn = np.bincount([sample(x, params, generator) for _ in range(n)], minlength=len(x))
    expected = warped(x, params).double().softmax(-1).numpy() * n
    assert not drawn[expected == 0].any()
    common = expected > 5  # Pearson's test wants at least five of each kind
    chi2 = float(((drawn - expected)[common] ** 2 / expected[common]).sum())
    k = int(common.sum()) - 1
    assert chi2 < k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3  # Wilson and Hilferty's, p = 0.001


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_are_those_of_numpy(filters: dict[str, float]) -> None:
    """The largest sum of transformers' log-probability and a Gumbel number, one for each token of the vocabulary."""
    params = SamplingParams(seed=11, **filters)
    ours, same = params.generator(), params.generator()
    for seed in range(50):
        x = logits(seed)
        gumbel = -np.log(-np.log(torch.rand(1000, dtype=torch.float64, generator=same).numpy()))
        assert sample(x, params, ours) == int(np.argmax(warped(x, params).double().log_softmax(-1).numpy() + gumbel))


def test_a_token_that_a_filter_removes_changes_no_other_draw() -> None:
    everything, best = (SamplingParams(temperature=1.0, seed=2, top_k=k) for k in (0, 30))
    generators = everything.generator(), best.generator()
    for seed in range(50):
        x = logits(seed)
        token = sample(x, everything, generators[0])
        again = sample(x, best, generators[1])
        assert token == again or x[token] < x.topk(30).values[-1]


def test_a_rounding_of_the_logits_seldom_changes_a_token() -> None:
    """About as often as the distributions differ; with one number for a draw it was in half of them. ollama#4990"""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16384, generator=generator) * 3
    y = x + 0.05 * torch.randn(16384, generator=generator)
    distance = float((x.softmax(-1) - y.softmax(-1)).abs().sum() / 2)
    each = [SamplingParams(temperature=1.0, seed=seed) for seed in range(400)]
    changed = sum(sample(x, p, p.generator()) != sample(y, p, p.generator()) for p in each)
    assert 0 < changed / 400 < 4 * distance


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_numbers_give_a_possible_token(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), u, dtype=torch.float64))
    for seed, filters in itertools.product(range(10), FILTERS):
        x = logits(seed)
        x[torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:900]] = -math.inf
        params = SamplingParams(**filters, seed=0)
        assert x[sample(x, params, params.generator())] > -math.inf


def test_the_seed_decides_and_none_draws_a_new_one() -> None:
    def draw(seed: int | None) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed)
        generator = params.generator()
        return [sample(logits(0), params, generator) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)
