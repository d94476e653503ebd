"""Penalties, bias, bans and custom processors, against transformers' processors and the formula of OpenAI."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from llama_mini import SamplingParams
from llama_mini.engine.sampling import candidates, processed, sample
from llama_mini.errors import RequestError

V = 300
EOS = (2, 7)
SEEDS = range(20)


def typical(token_ids: list[int], logits: Tensor, mass: float = 0.9) -> Tensor:
    """Keeps the tokens whose surprise is nearest to the expected one, until their probabilities reach the mass."""
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum()
    distance, order = (-logprobs - entropy).abs().sort()
    reached = logprobs[order].exp().cumsum(-1)
    last = min(int((reached < mass).sum()), len(logits) - 1)
    return logits.masked_fill((-logprobs - entropy).abs() > distance[last], -float("inf"))


def without_words(token_ids: list[int], logits: Tensor, words: list[list[int]]) -> Tensor:
    """Bans the last token of each word whose other tokens were just written."""
    logits = logits.clone()
    for *start, last in words:
        if token_ids[len(token_ids) - len(start) :] == start:
            logits[last] = -float("inf")
    return logits


def case(seed: int) -> tuple[Tensor, list[int], list[int]]:
    """Logits of both signs, a prompt, and new tokens that repeat it and themselves."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(V, generator=generator)
    prompt = torch.randint(V, (40,), generator=generator).tolist()
    new = torch.randint(30, (25,), generator=generator).tolist()
    return logits, prompt, [*new, *prompt[:5]]


def ours(seed: int, **asked: object) -> Tensor:
    logits, prompt, new = case(seed)
    before = logits.clone()
    with torch.inference_mode():
        result = processed(logits, SamplingParams(**asked), prompt, new, EOS)
    assert torch.equal(logits, before)
    return result


def theirs(seed: int, *processors: LogitsProcessor) -> Tensor:
    logits, prompt, new = case(seed)
    return LogitsProcessorList(processors)(torch.tensor([prompt + new]), logits[None])[0]


@pytest.mark.parametrize("penalty", [1.3, 0.7, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    for seed in SEEDS:
        expected = theirs(seed, RepetitionPenaltyLogitsProcessor(penalty))
        assert torch.equal(ours(seed, repetition_penalty=penalty), expected)


@pytest.mark.parametrize("penalty", [1e-300, 1e-9, 1e9, 1e299])
def test_extreme_repetition_penalties_stay_numbers(penalty: float) -> None:
    logits = torch.tensor([0.0, -0.0, 1e20, -1e20, 3e38, 1.0])
    x = processed(logits, SamplingParams(repetition_penalty=penalty), [0, 1, 2, 3, 4], [], EOS)
    assert not x.isnan().any()
    assert not x.isposinf().any()
    assert x[5] == 1


def test_logit_bias_equals_transformers() -> None:
    bias = {3: 2.5, 17: -1.25, V - 1: -math.inf, 0: 100.0}
    for seed in SEEDS:
        expected = theirs(seed, SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}))
        assert torch.equal(ours(seed, logit_bias=bias), expected)


@pytest.mark.parametrize("seed", range(5))
def test_presence_and_frequency_follow_the_formula(seed: int) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, with c counted in the new tokens alone."""
    logits, _, new = case(seed)
    presence, frequency = np.random.default_rng(seed).uniform(-2, 2, 2)
    counts = np.bincount(new, minlength=V)
    expected = logits.double().numpy() - counts * frequency - (counts > 0) * presence
    result = ours(seed, presence_penalty=float(presence), frequency_penalty=float(frequency))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6, atol=1e-6)
    alone = ours(seed, frequency_penalty=float(frequency))
    np.testing.assert_allclose(alone.numpy(), logits.double().numpy() - counts * frequency, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("min_tokens", [1, 29, 30, 31, 100])
def test_min_tokens_equals_transformers(min_tokens: int) -> None:
    seed = 1
    _, prompt, new = case(seed)
    result = ours(seed, min_tokens=min_tokens, stop_token_ids=[11])
    stops = [*EOS, 11]
    assert torch.equal(result, theirs(seed, MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, stops)))
    assert torch.equal(result, theirs(seed, MinLengthLogitsProcessor(len(prompt) + min_tokens, stops)))
    assert bool(result[11].isinf()) == (len(new) < min_tokens)


def test_an_end_token_outside_the_vocabulary_needs_no_ban() -> None:
    x = processed(torch.zeros(5), SamplingParams(min_tokens=1), [0], [], {3, 5, 10**9})
    assert x.tolist() == [0, 0, 0, -math.inf, 0]


class Counts(LogitsProcessor):
    """Presence and frequency penalties, which transformers has not."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(input_ids[0, 40:], minlength=V)
        return scores - 0.3 * counts - 0.9 * (counts > 0)


@pytest.mark.parametrize("seed", range(5))
def test_all_at_once_in_the_order_of_transformers(seed: int) -> None:
    words = [[5], [case(seed)[2][-1], 9]]
    params = SamplingParams(
        logit_bias={3: 2.5, 8: -3.0, 17: -math.inf},
        repetition_penalty=1.4,
        presence_penalty=0.9,
        frequency_penalty=0.3,
        min_tokens=50,
        logits_processors=[partial(without_words, words=words), partial(typical, mass=0.97)],
        temperature=1.7,
        top_k=60,
        top_p=0.9,
        min_p=0.01,
    )
    logits, prompt, new = case(seed)
    processors = [
        SequenceBiasLogitsProcessor({(3,): 2.5, (8,): -3.0, (17,): -math.inf}),
        RepetitionPenaltyLogitsProcessor(1.4),
        Counts(),
        MinNewTokensLengthLogitsProcessor(40, 50, list(EOS)),
        NoBadWordsLogitsProcessor(words),
        TypicalLogitsWarper(0.97),
        TemperatureLogitsWarper(1.7),
        TopKLogitsWarper(60),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.01),
    ]
    expected = theirs(seed, *processors)
    x = processed(logits, params, prompt, new, EOS)
    torch.testing.assert_close(x, theirs(seed, *processors[:6]))
    ids, kept = candidates(x, params)
    assert ids.tolist() == expected.isfinite().nonzero()[:, 0].tolist()
    torch.testing.assert_close(kept.softmax(-1), expected.softmax(-1)[ids])
    greedy = SamplingParams(logit_bias={3: 50.0})
    assert sample(processed(logits, greedy, prompt, new, EOS), greedy, greedy.generator()) == 3


def test_a_bias_is_penalised_and_not_the_other_way_round() -> None:
    x = processed(torch.tensor([1.0, -1.0]), SamplingParams(logit_bias={0: 3.0}, repetition_penalty=2.0), [0], [], EOS)
    assert x.tolist() == [2.0, -1.0]


@pytest.mark.parametrize("mass", [0.01, 0.2, 0.9, 0.999])
def test_the_typical_example_equals_transformers(mass: float) -> None:
    for seed in SEEDS:
        result = ours(seed, logits_processors=[partial(typical, mass=mass)])
        assert torch.equal(result, theirs(seed, TypicalLogitsWarper(mass)))


@pytest.mark.parametrize("seed", range(5))
def test_the_banned_words_example_equals_transformers(seed: int) -> None:
    _, prompt, new = case(seed)
    both = prompt + new
    words = [[4], [both[-1], 5], [*both[-3:], 6], [both[-2], 8], [*both, 10], [1, *both, 12], [both[-1], both[-1]]]
    result = ours(seed, logits_processors=[partial(without_words, words=words)])
    assert torch.equal(result, theirs(seed, NoBadWordsLogitsProcessor(words)))
    assert {4, 5, 6, 10} <= set(result.isinf().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9, stop_token_ids=[3])])
def test_asked_for_nothing_the_same_tensor_comes_back(params: SamplingParams) -> None:
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert processed(logits, params, [1], [2], EOS) is logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_processors_run_in_turn_on_copies(dtype: torch.dtype) -> None:
    seen: list[list[int]] = []

    def spoil(token_ids: list[int], logits: Tensor) -> Tensor:
        seen.append(list(token_ids))
        token_ids.clear()
        return logits.mul_(2)

    def add(token_ids: list[int], logits: Tensor) -> Tensor:
        seen.append(list(token_ids))
        return logits + 1

    logits, prompt, new = torch.tensor([1.0, 2.0], dtype=dtype), [0, 1], [1]
    x = processed(logits, SamplingParams(logits_processors=[spoil, add]), prompt, new, EOS)
    assert x.tolist() == [3.0, 5.0]
    assert x.dtype == torch.float32
    assert (logits.tolist(), prompt, new, seen) == ([1.0, 2.0], [0, 1], [1], [[0, 1, 1]] * 2)


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (None, "not a NoneType"),
        ([0.0] * V, "not a list"),
        (torch.zeros(V - 1), r"not torch.float32 of shape \(299,\)"),
        (torch.zeros(1, V), r"not torch.float32 of shape \(1, 300\)"),
        (torch.tensor(0.0), r"not torch.float32 of shape \(\)"),
        (torch.zeros(V, dtype=torch.int64), "not torch.int64"),
        (torch.zeros(V, dtype=torch.bool), "not torch.bool"),
        (torch.full((V,), math.nan), "not NaN"),
        (torch.zeros(V).index_fill(0, torch.tensor(7), math.nan), "not NaN"),
        (torch.zeros(V).index_fill(0, torch.tensor(7), math.inf), r"not \+inf"),
        (torch.full((V,), 1e300, dtype=torch.float64), r"not \+inf"),
        (torch.full((V,), -math.inf), "bans all 300 tokens"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_processor_that_gives_back_nonsense_is_named(result: object, found: str) -> None:
    def my_processor(token_ids: list[int], logits: Tensor) -> object:
        return result

    with pytest.raises(RequestError, match=f"logits processor my_processor .*{found}"):
        ours(0, logits_processors=[my_processor])


def test_a_processor_without_a_name_goes_by_its_class() -> None:
    class Silent:
        def __call__(self, token_ids: list[int], logits: Tensor) -> None:
            return None

    with pytest.raises(RequestError, match="logits processor Silent must"):
        ours(0, logits_processors=[Silent()])


def test_banning_every_token_is_one_clear_error() -> None:
    with pytest.raises(RequestError, match="logit_bias and min_tokens ban all 3 tokens"):
        processed(torch.zeros(3), SamplingParams(logit_bias=dict.fromkeys(range(3), -math.inf)), [0], [], EOS)
    with pytest.raises(RequestError, match="ban all 3 tokens"):
        processed(torch.zeros(3), SamplingParams(logit_bias={0: -math.inf}, min_tokens=1), [0], [], {1, 2})
