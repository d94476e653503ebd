"""The life of massive activations, against NumPy and the hidden states of transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama_mini import Llama, Tokenizer, lab
from llama_mini.lab.massive_activations import lives
from llama_mini.lab.training import sample_text
from tests.tiny_models import random_tokens, tiny_model

TEXT = random_tokens(2, 21)


@pytest.fixture(scope="module")
def default(smollm2_dir: Path) -> tuple[Llama, Tokenizer]:
    return Llama.from_pretrained(smollm2_dir, "float32"), Tokenizer.from_pretrained(smollm2_dir)


def massive_in_numpy(layers: list[Tensor]) -> list[tuple[int, int, int, int]]:
    """(layer, row, token, dim) of every |x| of at least 100 times the median, written from the definition."""
    sizes = [x.abs().double().numpy() for x in layers]
    return [(i, *map(int, at)) for i, x in enumerate(sizes) for at in np.argwhere(x >= 100 * np.median(x))]


def test_a_planted_massive_activation_is_born_erased_and_born_again() -> None:
    model = tiny_model(n_layers=5)
    assert len(lab.capture(model, TEXT).massive()) == 0
    wanted = model.layers[1].feed_forward.down_proj.weight
    wanted[17] *= 3000
    erasing = model.layers[2].feed_forward.down_proj
    grown: list[Tensor] = []
    handles = [
        model.layers[1].feed_forward.register_forward_hook(lambda _, __, y: grown.append(y.clone())),
        erasing.register_forward_hook(lambda _, __, y: y.index_copy(-1, torch.tensor([17]), -grown[-1][..., 17:18])),
    ]
    model.layers[3].feed_forward.down_proj.weight[17] *= 3000
    whole = lab.capture(model, TEXT)
    found = lab.capture(model, TEXT, at="norm", keep="stats").massive()
    for handle in handles:
        handle.remove()
    assert [(e.layer, e.row, e.token, e.dim) for e in found] == massive_in_numpy([r.x for r in whole.resid.resid_post])
    assert {e.layer for e in found} == {1, 3, 4}
    for element in found:
        x = whole.resid.resid_post[element.layer].x
        assert element.value == float(x[element.row, element.token, element.dim])
        assert element.times_median == pytest.approx(abs(element.value) / float(x.abs().median()), rel=1e-6)
    life = lives(found, TEXT)[0]
    assert (life.layers, life.dims, life.dim) == ("1, 3–4", 1, 17)
    largest = max(found, key=lambda e: e.times_median)
    assert (life.row, life.token, life.largest_in) == (largest.row, largest.token, largest.layer)
    assert life.times_median == largest.times_median


def test_padding_is_neither_massive_nor_counted() -> None:
    model = tiny_model()
    model.layers[1].feed_forward.down_proj.weight[17] *= 3000
    both = lab.capture(model, [TEXT[0], TEXT[1, :4]])
    alone = lab.capture(model, TEXT[1, :4])
    of_texts = [torch.cat([r.x[0], r.x[1, :4]]).abs().double().numpy() for r in both.resid.resid_post]
    for element in both.massive():
        median = np.partition(of_texts[element.layer].ravel(), 25 * 48 // 2 - 1)[25 * 48 // 2 - 1]  # the lower one
        assert element.times_median == pytest.approx(abs(element.value) / median, rel=1e-6)
    sizes = both["norm"].rms
    others = torch.cat([sizes[0, 1:], sizes[1, 1:4]]).double().numpy()
    assert both["norm"].median == pytest.approx(np.median(others), rel=1e-6)
    assert both["norm"].first == pytest.approx(np.median(sizes[:, 0].double()), rel=1e-6)
    assert {(e.row, e.token) for e in both.massive() if e.row == 1} <= {(1, token) for token in range(4)}
    assert [e.value for e in alone.massive()] == pytest.approx(
        [e.value for e in both.massive() if e.row == 1], rel=1e-4
    )


SECOND = pytest.param("def f(x):\n    return x + 1\n", marks=pytest.mark.slow)


@pytest.mark.parametrize("text", ["Fourscore and seven years ago our fathers", SECOND])
def test_the_massive_activation_of_the_default_checkpoint(
    default: tuple[Llama, Tokenizer], text: str, smollm2_dir: Path
) -> None:
    """Dimension 507 of token 0, born again in layer 11 for any text, against the hidden states of transformers."""
    model, tokenizer = default
    theirs: Any = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    ids = tokenizer.encode(text)
    found = lab.capture(model, ids, keep="stats").massive()
    with torch.no_grad():
        states = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states[
            1:-1
        ]  # the last is normed already
    assert [(e.layer, e.row, e.token, e.dim) for e in found if e.layer < 29] == massive_in_numpy(list(states))
    first = {e.layer: e for e in found if (e.token, e.dim) == (0, 507)}
    assert {*range(11, 30)} <= set(first)
    assert 10 not in first
    assert first[11].value == pytest.approx(float(states[11][0, 0, 507]), rel=1e-4)
    assert first[11].times_median == pytest.approx(float(states[11].abs().max() / states[11].abs().median()), rel=1e-3)
    assert first[11].times_median > 5_000


def test_the_whole_life_of_the_massive_activation(default: tuple[Llama, Tokenizer]) -> None:
    """On the lab's text: 324 times the median after layer 1, 834 after layer 2, 78 after layer 10, and 13,983 after 11.

    In layers 1 to 9 five more tokens have it: ' was' and four ' the'.
    """
    model, tokenizer = default
    ids = tokenizer.encode(sample_text())[:256]
    recording = lab.capture(model, ids, keep="stats")
    of_first = {e.layer: round(e.times_median) for e in recording.massive() if (e.token, e.dim) == (0, 507)}
    assert [of_first[layer] for layer in (1, 2, 11)] == [324, 834, 13983]
    assert sorted(of_first) == [*range(1, 9), *range(11, 30)]
    assert round(recording.resid.resid_post[10].max_over_median) == 78
    table = lives(recording.massive(), recording.texts.tokens, tokenizer)
    assert (table[0].token, table[0].text, table[0].layers) == (0, "'Alice'", "1–8, 11–29")
    assert sorted(table.column("text")[1:]) == ["' the'"] * 4 + ["' was'"]
    assert {row.dim for row in table} == {507}
    assert all(row.layers in ("1–8", "1–9", "2–9", "3–9") for row in table[1:])
