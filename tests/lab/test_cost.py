"""Loss, KL and agreement, against transformers and float64 NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_mini import Llama
from llama_mini.errors import RequestError
from llama_mini.lab.cost import as_tokens, score
from tests.tiny_models import hf_llama, random_tokens, tiny_model

TEXT = random_tokens(2, 300)  # longer than one piece of the log-softmax


def log_softmax(logits: Tensor) -> np.ndarray:
    x = logits.double().numpy()
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_loss_is_that_of_transformers(tmp_path) -> None:
    theirs = hf_llama(max_position_embeddings=300)
    theirs.save_pretrained(tmp_path)
    ours = score(Llama.from_pretrained(tmp_path), TEXT)
    with torch.no_grad():
        expected = theirs(TEXT, labels=TEXT)
    assert ours.loss == pytest.approx(float(expected.loss), rel=1e-5)
    assert ours.perplexity == pytest.approx(float(expected.loss.exp()), rel=1e-4)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=0, atol=1e-4)
    assert (ours.dloss, ours.kl, ours.top1) == (None, None, None)


def test_change_against_float64() -> None:
    base, other = score(tiny_model(0), TEXT), tiny_model(1)
    changed = score(other, TEXT, against=base)
    log_p, log_q = log_softmax(base.logits), log_softmax(changed.logits)
    losses = [-np.take_along_axis(x[:, :-1], TEXT.numpy()[:, 1:, None], -1).mean() for x in (log_p, log_q)]
    assert base.loss == pytest.approx(losses[0], rel=1e-6)
    assert changed.dloss == pytest.approx(losses[1] - losses[0], rel=1e-5)
    assert changed.kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-9)
    assert changed.top1 == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean(), abs=1e-12)
    assert 0 < changed.top1 < 1
    assert repr(changed).startswith(f"Score(loss={changed.loss:.4f}, perplexity=")
    assert f"dloss={changed.dloss:+.4f}" in repr(changed)


def test_the_same_model_costs_nothing() -> None:
    model = tiny_model()
    base = score(model, TEXT)
    again = score(model, TEXT, against=base)
    assert (again.dloss, again.kl, again.top1) == (0, 0, 1)


def test_ids_in_every_form() -> None:
    model = tiny_model()
    row = TEXT[0]
    forms: list[Any] = [row, row[None], row.tolist(), [row.tolist()], row.numpy(), row.int(), row.to(torch.uint8)]
    assert len({score(model, form).loss for form in forms}) == 1
    assert as_tokens(model, [3], at_least=1).tolist() == [[3]]
    assert as_tokens(model, row.int()).dtype == torch.int64


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5], r"T at least 2, not \(1, 1\)"),
        ([], "whole numbers|T at least 2"),
        (torch.zeros(0, 5, dtype=torch.int64), r"T at least 2, not \(0, 5\)"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), r"not \(2, 2, 2\)"),
        (torch.tensor(3), r"not \(\)"),
        ([1.0, 2.0], "whole numbers, not torch.float32"),
        ([True, False], "whole numbers, not torch.bool"),
        ([1j, 2], "whole numbers, not torch.complex64"),
        ([[1, 2], [3]], "whole numbers"),
        ("The capital", "whole numbers"),
        (None, "whole numbers"),
        ([10**30, 1], "whole numbers"),
        ([0, 97], "outside the vocabulary of 97"),
        ([-1, 5], "outside the vocabulary of 97"),
    ],
)
def test_other_ids_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        score(tiny_model(), ids)
    assert "\n" not in str(error.value)


def test_a_base_of_another_text_or_vocabulary_is_refused() -> None:
    model = tiny_model()
    base = score(model, TEXT)
    with pytest.raises(RequestError, match="another text, 2 × 300, than this score, 2 × 300"):
        score(model, (TEXT + 1) % 97, against=base)
    with pytest.raises(RequestError, match="another text, 2 × 300, than this score, 2 × 299"):
        score(model, TEXT[:, 1:], against=base)
    with pytest.raises(RequestError, match="vocabulary of 97, this model 101"):
        score(tiny_model(vocab_size=101), TEXT, against=base)


def test_nan_is_told_and_does_not_pass_for_no_change() -> None:
    model = tiny_model()
    base = score(model, TEXT)
    model.norm.weight[0] = torch.nan
    broken = score(model, TEXT, against=base)
    assert np.isnan([broken.loss, broken.dloss, broken.kl]).all()
