"""Log-probabilities against float64 NumPy."""

import numpy as np
import torch

from llama_mini.scoring import token_logprobs


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
