"""Two models side by side, against NumPy and against the lab's own results for each."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_mini import Llama, lab
from llama_mini.errors import RequestError
from llama_mini.optimize.fuse import optimize
from tests.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(2, 21)


@pytest.fixture(scope="module")
def models() -> tuple[Llama, Llama]:
    a, b = tiny_model(1), tiny_model(1)
    generator = torch.Generator().manual_seed(3)
    for parameter in b.parameters():
        parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return a, b


def stream(model: Llama, tokens: Tensor) -> list[np.ndarray]:
    recording = lab.capture(model, tokens).resid
    points = [recording.resid_pre[0]]
    for pair in zip(recording.resid_mid, recording.resid_post, strict=True):
        points += pair
    return [point.x.double().numpy() for point in points]


def rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x**2).mean(-1))


def test_losses_gains_and_costs_are_those_of_each_model(models: tuple[Llama, Llama]) -> None:
    a, b = models
    found = lab.compare(a, b, TOKENS)
    base = lab.score(a, TOKENS)
    change = lab.score(b, TOKENS, against=base)
    assert (found.a.loss, found.b.loss) == (base.loss, change.loss)
    assert (found.b.dloss, found.b.se, found.b.kl) == (change.dloss, change.se, change.kl)
    costs = [{row.path: row for row in lab.ablate(model, TOKENS)} for model in models]
    records = [lab.capture(model, TOKENS) for model in models]
    assert found.norms.column("path") == lab.norms(a).column("path")
    for row in found.norms:
        gains = [model.get_submodule(row.path).weight.double().numpy() for model in models]
        assert row.gain_change == pytest.approx(np.linalg.norm(gains[1] - gains[0]) / np.linalg.norm(gains[0]))
        for side, gain, cost, record in zip("ab", gains, costs, records, strict=True):
            assert getattr(row, f"gain_{side}") == pytest.approx(gain.mean())
            assert getattr(row, f"dloss_{side}") == cost[row.path].dloss
            assert getattr(row, f"se_{side}") == cost[row.path].se > 0
            sizes = rms(record[row.path].x.double().numpy())
            assert getattr(row, f"first_{side}") == pytest.approx(np.median(sizes[:, 0]), rel=1e-5)
            assert getattr(row, f"median_{side}") == pytest.approx(np.median(sizes[:, 1:]), rel=1e-5)
        assert row.error is None


def test_the_streams_and_the_distance_between_them(models: tuple[Llama, Llama]) -> None:
    found = lab.compare(*models, TOKENS, "norm").stream
    assert found.column("point")[:3] == ["layers.0.resid_pre", "layers.0.resid_mid", "layers.0.resid_post"]
    streams = [stream(model, TOKENS) for model in models]
    for row, x, y in zip(found, *streams, strict=True):
        change = np.linalg.norm(y - x, axis=-1) / np.linalg.norm(x, axis=-1)
        assert row.first_change == pytest.approx(np.median(change[:, 0]), rel=1e-5)
        assert row.median_change == pytest.approx(np.median(change[:, 1:]), rel=1e-5)
        assert (row.first_a, row.median_b) == pytest.approx((np.median(rms(x)[:, 0]), np.median(rms(y)[:, 1:])))


def test_a_model_and_itself_are_the_same(models: tuple[Llama, Llama]) -> None:
    found = lab.compare(models[0], models[0], [TOKENS[0], TOKENS[1, :9]], skip=True)
    assert found.b.dloss == found.b.kl == found.b.se == 0
    for row in found.norms:
        assert (row.gain_change, row.dloss_a, row.se_a) == (0, row.dloss_b, row.se_b)
        assert abs(row.dloss_a) > 1e-6
    assert set(found.stream.column("median_change")) == {0}


def test_norms_that_one_model_lacks_or_that_cannot_be_frozen() -> None:
    a = tiny_model(1)
    b = lab.move(a, "layers.*.attention.pre_norm", to="out")
    found = {row.path: row for row in lab.compare(a, b, TOKENS).norms}
    moved = found["layers.1.attention.out_norm"]
    assert (moved.gain_a, moved.median_a, moved.dloss_a, moved.gain_change) == (None,) * 4
    assert moved.gain_b == found["layers.1.attention.pre_norm"].gain_a
    assert moved.dloss_b is not None
    with lab.edit(a, {"layers.0.*.pre_norm": {"kind": "layer"}}):
        rows = {row.path: row for row in lab.compare(a, tiny_model(1), TOKENS).norms}
    row = rows["layers.0.attention.pre_norm"]
    assert (row.dloss_a, row.se_a) == (None, None)
    assert row.dloss_b is not None


def test_an_empty_slot_that_the_edit_fills_has_a_row(models: tuple[Llama, Llama]) -> None:
    rows = lab.compare(*models, TOKENS, "layers.0.*.out_norm", kind="rms").norms
    filled = [row for row in rows if row.path.endswith("out_norm")]
    assert [row.path for row in filled] == ["layers.0.attention.out_norm", "layers.0.feed_forward.out_norm"]
    assert all(row.gain_a is row.median_b is None and row.dloss_a and row.dloss_b for row in filled)


def test_norms_are_edited_one_by_one(models: tuple[Llama, Llama]) -> None:
    with pytest.raises(RequestError, match="compare edits norms one by one: leave joint out"):
        lab.compare(*models, TOKENS, joint=True)


def test_an_edit_that_ends_in_nan_is_named_with_its_model() -> None:
    a, b = tiny_model(2), tiny_model(2)
    b.layers[1].feed_forward.pre_norm.weight[0] = 1e10
    rows = lab.compare(a, b, TOKENS, "layers.1.feed_forward.pre_norm", gain=("scale", 1e10)).norms
    broken = [row for row in rows if row.error]
    assert [row.path for row in broken] == ["layers.1.feed_forward.pre_norm"]
    assert "b: NaN or infinity in the logits, first at layers.1" in broken[0].error


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_floats_and_codes(quantize: str) -> None:
    sizes: dict[str, Any] = {"dim": 96, "hidden_dim": 96}
    found = lab.compare(tiny_model(1, **sizes), optimize(tiny_model(1, **sizes), quantize), TOKENS, "norm")
    assert set(found.norms.column("gain_change")) == {0}
    assert 1e-6 < found.b.kl < 0.5
    assert 1e-4 < found.stream[-1].median_change < 0.5
    half = lab.compare(tiny_model(1), tiny_model(1, torch.bfloat16), TOKENS, "norm")
    assert 1e-4 < half.stream[-1].median_change < 0.05


def test_models_of_different_shapes_are_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"the two models differ in vocab_size \(97 and 98\), n_layers \(3 and 2\)"):
        lab.compare(tiny_model(), tiny_model(vocab_size=98, n_layers=2), TOKENS)
