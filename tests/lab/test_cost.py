"""Loss, KL and agreement, against transformers and float64 NumPy."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_mini import Llama
from llama_mini.errors import NumericalError, RequestError
from llama_mini.lab.cost import score
from llama_mini.lab.texts import as_texts
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
    assert f"dloss={changed.dloss:+.4f} ± {changed.se:.2g}, kl=" in repr(changed)
    assert repr(base) == f"Score(loss={base.loss:.4f}, perplexity={base.perplexity:.4g})"


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
    assert as_texts(model, [3], at_least=1).tokens.tolist() == [[3]]
    assert as_texts(model, row.int()).tokens.dtype == torch.int64


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5], r"T at least 2, not \(1,\)"),
        ([], "whole numbers|T at least 2"),
        (torch.zeros(0, 5, dtype=torch.int64), "there is no text"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), r"not \(2, 2, 2\)"),
        (torch.tensor(3), r"not \(\)"),
        ([1.0, 2.0], "whole numbers, not torch.float32"),
        ([True, False], "whole numbers, not torch.bool"),
        ([1j, 2], "whole numbers, not torch.complex64"),
        ([[1, 2], [3]], r"T at least 2, not \(1,\)"),
        ([[1, 2], []], r"T at least 2, not \(0,\)|whole numbers"),
        ([[1, 2], 3], r"T at least 2, not \(\)"),
        ([[[1, 2]], [[3, 4]]], r"not \(1, 2\)"),
        (["The capital"], "whole numbers"),
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


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(RequestError, match="on the meta device, where it has no weights"):
        score(tiny_model().to("meta"), TEXT)


def test_a_base_of_another_text_or_vocabulary_is_refused() -> None:
    model = tiny_model()
    base = score(model, TEXT)
    with pytest.raises(RequestError, match="another text, 2 × 300, than this score, 2 × 300"):
        score(model, (TEXT + 1) % 97, against=base)
    with pytest.raises(RequestError, match="another text, 2 × 300, than this score, 2 × 299"):
        score(model, TEXT[:, 1:], against=base)
    with pytest.raises(RequestError, match="vocabulary of 97, this model 101"):
        score(tiny_model(vocab_size=101), TEXT, against=base)


def weight(path: str) -> Callable[[Llama], None]:
    """Breaks one weight: NaN if it is a gain, else infinity."""

    def change(model: Llama) -> None:
        parameter = model.get_parameter(f"{path}.weight")
        parameter.view(-1)[3] = torch.nan if parameter.ndim == 1 else torch.inf

    return change


def one_token(model: Llama) -> None:
    """The embedding of the token that is first found at 1, 4."""
    model.tok_embeddings.weight[SHORT[1, 4]] = torch.nan


def overflow(model: Llama) -> None:
    """The sum of the stream and a branch, where no module is."""
    model.half()
    model.tok_embeddings.weight.fill_(60_000)
    model.layers[1].attention.beta = 1e5


SHORT = torch.tensor([[1, 2, 3, 4, 5, 6], [4, 3, 2, 1, 7, 7]])
BROKEN: list[tuple[Callable[[Llama], None], str]] = [
    (weight("norm"), "norm, token 0 of row 0"),
    (weight("layers.1.feed_forward.pre_norm"), "layers.1.feed_forward.pre_norm, token 0 of row 0"),
    (weight("layers.2.attention.k_norm"), "layers.2.attention.k_norm, token 0 of row 0"),
    (weight("layers.2.attention.o_proj"), "layers.2.attention.o_proj, token 0 of row 0"),
    (weight("lm_head"), "lm_head, token 0 of row 0"),
    (one_token, "tok_embeddings, token 4 of row 1"),
    (overflow, "layers.1.attention, token 0 of row 0"),
]


@pytest.mark.parametrize(("change", "where"), BROKEN, ids=[where for _, where in BROKEN])
def test_nan_and_infinity_are_an_error_that_says_where_they_begin(change: Callable[[Llama], None], where: str) -> None:
    model = tiny_model(norm_plan="pre+qk")
    base = score(model, SHORT)
    change(model)
    for against in (None, base):
        with pytest.raises(NumericalError, match=f"^NaN or infinity in the logits, first at {re.escape(where)}$"):
            score(model, SHORT, against=against)
    row = SHORT[1:] if "row 1" in where else SHORT[:1]
    with pytest.raises(NumericalError, match=f"first at {re.escape(where.split(' of')[0])}$"):
        score(model, row)
    assert not any(module._forward_hooks for module in model.modules())
