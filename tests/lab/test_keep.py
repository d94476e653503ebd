"""Tokens kept apart from a frozen norm: which they are, against NumPy, and the words for them."""

from typing import Any

import numpy as np
import pytest
import torch

from llama_mini import lab
from llama_mini.errors import RequestError
from llama_mini.lab.command_io import read_settings
from llama_mini.lab.keep import as_keep
from tests.tiny_models import random_tokens, tiny_model

TEXT = random_tokens(2, 23)
IDS = TEXT[0, [4, 9]].tolist()
PATHS = ["layers.1.feed_forward.pre_norm", "layers.1.attention.q_norm"]
HAS_ID = np.isin(TEXT.numpy(), IDS)
AT = np.arange(23)[None] + np.zeros((2, 1))


def rms(x: np.ndarray) -> np.ndarray:
    """Of each token, (B, T); of q and k norms over the heads."""
    return np.sqrt((x.reshape(*x.shape[:2], -1) ** 2).mean(-1))


KEPT: dict[str, tuple[Any, Any]] = {
    "none": ("none", lambda x: AT < 0),
    "first": ("first", lambda x: AT == 0),
    "massive": ("massive", lambda x: rms(x) > 2.5 * np.median(rms(x))),
    "massive:1.2": ({"massive": 1.2}, lambda x: rms(x) > 1.2 * np.median(rms(x))),
    "0,5": ([0, 5], lambda x: (AT == 0) | (AT == 5)),
    f"ids:{IDS[0]},{IDS[1]}": ({"ids": IDS}, lambda x: HAS_ID),
    f"first+ids:{IDS[0]},{IDS[1]}": (["first", {"ids": IDS}], lambda x: (AT == 0) | HAS_ID),
    f"7+massive:1.2+ids:{IDS[0]},{IDS[1]}": (
        [7, {"massive": 1.2}, {"ids": IDS}],
        lambda x: (AT == 7) | HAS_ID | (rms(x) > 1.2 * np.median(rms(x))),
    ),
}
ROOTS = {
    "quadratic": lambda r: np.sqrt((r**2).mean()),
    "arithmetic": np.mean,
    "median": np.median,
}


@pytest.mark.parametrize("words", KEPT)
@pytest.mark.parametrize("path", PATHS)
def test_kept_tokens_have_their_own_statistic_and_the_others_the_constant(path: str, words: str) -> None:
    keep, kept_of = KEPT[words]
    model = tiny_model(norm_plan="pre+qk")
    model.tok_embeddings.weight[TEXT[1, 3]] *= 8  # a massive token
    x = lab.capture(model, TEXT)[path].x.double().numpy()  # type: ignore[union-attr]
    kept = kept_of(x)
    own = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    gain = model.get_submodule(path).weight.double().numpy()
    for freeze, root in ROOTS.items():
        expected = np.where(kept.reshape(*kept.shape, *[1] * (x.ndim - 2)), x / own, x / root(own[~kept]))
        with lab.edit(model, {path: {"freeze": freeze, "keep": keep}}, TEXT):
            y = lab.capture(model, TEXT)[path].y.double().numpy()  # type: ignore[union-attr]
        np.testing.assert_allclose(y, gain * expected, rtol=1e-4, atol=1e-5, err_msg=freeze)


@pytest.mark.parametrize("words", KEPT)
def test_the_command_line_says_the_same(words: str) -> None:
    assert as_keep(read_settings([f"keep={words}"])["keep"]) == as_keep(KEPT[words][0])


def test_massive_tokens_are_those_of_the_text_that_is_read() -> None:
    """The constant and the median come from one text, the tokens from another."""
    model = tiny_model(norm_plan="pre")
    loud = int(TEXT[1, 3])
    other = torch.where(loud == TEXT, (loud + 1) % 97, TEXT)
    path = "layers.0.attention.pre_norm"
    model.tok_embeddings.weight[loud] *= 8
    plain = lab.capture(model, TEXT)[path].y
    with lab.edit(model, {path: {"freeze": "median", "keep": "massive"}}, other):
        y = lab.capture(model, TEXT)[path].y
    assert plain is not None
    assert y is not None
    same = (y - plain).abs().amax(-1) < 1e-6
    assert bool(same[1, 3])
    assert same.sum() == (loud == TEXT).sum()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (None, "unknown keep None; known: none, first, massive, a list of positions"),
        ("last", "unknown keep 'last'"),
        (3, None),
        ([], r"keep is \[\]: give one of none"),
        (["first", "none"], "unknown keep 'none'"),
        ([-1], "a position in keep must be a whole number of at least 0, not -1"),
        ([1.5], "unknown keep 1.5"),
        ({"ids": 3}, "unknown keep"),
        ({"ids": [-3]}, "an id in keep must be a whole number of at least 0, not -3"),
        ({"ids": [1], "first": True}, "unknown keep"),
        ({"massive": 0}, "massive in keep must be a finite number above 0, not 0"),
        ({"massive": "2"}, "massive in keep must be"),
        (["massive", {"massive": 3}], "and massive once"),
        ([23], "there is no position 23 in a text of 23 tokens, which begin at 0"),
        ({"ids": [97]}, "token id 97 is outside the vocabulary of 97"),
        ([*range(23)], "keep leaves no token to measure the statistic on"),
    ],
)
def test_what_means_nothing_is_refused(keep: Any, message: str | None) -> None:
    model = tiny_model()
    edit = lab.edit(model, {PATHS[0]: {"freeze": "quadratic", "keep": keep}}, TEXT)
    if message is None:
        with edit:
            return
    with pytest.raises(RequestError, match=message) as error, edit:
        pass
    assert "\n" not in str(error.value)
