"""Log-probabilities against float64 NumPy."""

import numpy as np
import pytest
import torch

from llama_mini.engine.logprobs import (
    hidden_states,
    kl_divergence,
    predictions,
    split_logits,
    token_logprobs,
    top_logprobs,
)
from tests.tiny_models import random_tokens, tiny_model


def test_against_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(3, 5, 400, generator=generator)
    tokens = torch.randint(0, 400, (3, 5), generator=generator)
    x = logits.double().numpy()
    expected = np.take_along_axis(x, tokens.numpy()[..., None], -1)[..., 0] - np.log(np.exp(x).sum(-1))
    np.testing.assert_allclose(token_logprobs(logits, tokens).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert token_logprobs(logits.bfloat16(), tokens).dtype == torch.float32


def test_certainty_is_zero_and_never_above() -> None:
    logits = torch.full((1000, 3), -1e4)
    logits[:, 1] = torch.linspace(-1e3, 1e3, 1000)
    scores = token_logprobs(logits, torch.ones(1000, dtype=torch.int64))
    assert (scores == 0).all()
    noise = torch.randn(1000, 7, generator=torch.Generator().manual_seed(1)) * 20
    assert (token_logprobs(noise, noise.argmax(-1)) <= 0).all()


@pytest.mark.parametrize("k", [1, 2, 7, 40, 50])
def test_the_likeliest_are_numpys_with_ties_by_id(k: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(-6, 6, (3, 4, 40), generator=generator).float()  # many are equal
    ids, values = top_logprobs(logits, k)
    x = logits.double().numpy()
    logprobs = x - np.log(np.exp(x).sum(-1, keepdims=True))
    expected = np.argsort(-x, axis=-1, kind="stable")[..., : min(k, 40)]
    np.testing.assert_array_equal(ids.numpy(), expected)
    np.testing.assert_allclose(values.numpy(), np.take_along_axis(logprobs, expected, -1), rtol=1e-6, atol=1e-6)
    assert torch.equal(values, token_logprobs(logits[..., None, :].expand(3, 4, min(k, 40), 40), ids))


def test_the_likeliest_of_one_row_and_of_narrow_and_wide_logits() -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3))
    ids, values = top_logprobs(logits, 5)
    assert ids.tolist() == logits.topk(5).indices.tolist()
    assert values.shape == (5,)
    assert top_logprobs(logits.bfloat16(), 5)[1].dtype == torch.float32
    assert top_logprobs(logits.double(), 5)[1].dtype == torch.float64


def test_no_row_has_no_likeliest() -> None:
    ids, values = top_logprobs(torch.empty(0, 9), 3)
    assert ids.shape == values.shape == (0, 3)


def test_the_divergence_is_numpys_and_never_below_zero() -> None:
    p, q = 5 * torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(4))
    log_p, log_q = (x.double().numpy() - np.log(np.exp(x.double().numpy()).sum(-1, keepdims=True)) for x in (p, q))
    np.testing.assert_allclose(kl_divergence(p, q).numpy(), (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-9)
    assert (kl_divergence(p, p.double()) == 0).all()
    assert (kl_divergence(p, p + 1e-7) >= 0).all()
    assert kl_divergence(p, q * torch.nan).isnan().all()


@pytest.mark.parametrize(("n", "first"), [(60, 1), (60, 25), (60, 59), (2, 1), (1, 1)])
def test_every_token_meets_the_logits_that_predict_it(monkeypatch: pytest.MonkeyPatch, n: int, first: int) -> None:
    """In whatever chunks, also behind what the cache holds."""
    monkeypatch.setattr("llama_mini.engine.logprobs.PREFILL_CHUNK", 20)
    monkeypatch.setattr("llama_mini.engine.logprobs.LOGITS_AT_ONCE", 7)
    model, ids = tiny_model(dtype=torch.float64), random_tokens(1, n + 9)[0].tolist()
    cache = model.new_cache(1, n + 9)
    for x in hidden_states(model, ids[:9], cache):
        assert sum(map(len, split_logits(model, x))) == 9
    pairs = list(predictions(model, ids[9:], first, cache))
    assert [token for _, tokens in pairs for token in tokens.tolist()] == ids[9 + first :]
    assert all(len(logits) == len(tokens) <= 7 for logits, tokens in pairs)
    if pairs:
        expected = model(torch.tensor([ids]))[0, 8 + first : -1]
        torch.testing.assert_close(torch.cat([logits for logits, _ in pairs]), expected, rtol=0, atol=1e-12)
