"""The gradients' dependence on depth at init, against what is published and against autograd by hand."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llama_mini import NormPlan
from llama_mini.errors import RequestError
from llama_mini.lab import sweep
from llama_mini.lab.measurement import random_llama
from llama_mini.lab.sweeps import Sweep
from llama_mini.model.norm_plan import Override


@pytest.fixture(scope="module")
def default() -> Sweep:
    return sweep(["pre", "post", "deep", "out", "out+qk", "out+qk:full"])


@pytest.mark.parametrize(("plan", "slope"), [("pre", -0.5), ("post", 0.0), ("deep", -0.25)])
def test_gradient_of_the_last_down_projection(default: Sweep, plan: str, slope: float) -> None:
    assert default.slopes()[plan].last_down == pytest.approx(slope, abs=0.08)


def test_out_without_q_and_k_norms_explodes(default: Sweep) -> None:
    slopes = default.slopes()
    assert slopes["out"].first_layer == pytest.approx(2.3, abs=0.3)
    assert slopes["out+qk"].first_layer == pytest.approx(0.24, abs=0.08)
    assert slopes["out+qk:full"].first_layer == pytest.approx(0.24, abs=0.08)


def test_norms_equal_a_backward_pass_by_hand() -> None:
    found = sweep("peri", depths=[1, 3], dim=16, seeds=2)
    assert found.last_down["peri"].shape == (2, 2)
    model = random_llama("peri", 3, 16, 256, seed=1)
    tokens = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(1))
    F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    last = model.layers[2].feed_forward.down_proj.weight.grad.norm()
    first = torch.cat([p.grad.flatten() for p in model.layers[0].parameters()]).norm()
    assert found.last_down["peri"][1, 1] == pytest.approx(float(last), rel=1e-5)
    assert found.first_layer["peri"][1, 1] == pytest.approx(float(first), rel=1e-5)


def test_slopes_of_exact_powers() -> None:
    depths = np.array([2, 5, 9])
    norms = np.array([[0.5, 0.1, 1.2], [1.5, 1.9, 0.8]])  # the mean over seeds is 1 at every depth
    slopes = Sweep(depths, {"pre": norms * depths**-0.5}, {"pre": norms * depths**2.0}).slopes()["pre"]
    assert (slopes.last_down, slopes.first_layer) == (pytest.approx(-0.5), pytest.approx(2.0))


def test_the_spread_is_of_the_slopes_of_the_seeds() -> None:
    depths, rng = np.array([2, 5, 9]), np.random.default_rng(0)
    last_down, first_layer = rng.uniform(0.5, 2, (2, 4, 3))
    slopes = Sweep(depths, {"pre": last_down}, {"pre": first_layer}).slopes()["pre"]
    for name, norms in (("last_down", last_down), ("first_layer", first_layer)):
        of_seeds = [np.polyfit(np.log(depths), np.log(row), 1)[0] for row in norms]
        assert getattr(slopes, f"{name}_spread") == pytest.approx(np.std(of_seeds, ddof=1))
    alone = Sweep(depths, {"pre": last_down[:1]}, {"pre": first_layer[:1]}).slopes()["pre"]
    assert (alone.last_down_spread, alone.first_layer_spread) == (None, None)


def test_what_is_not_finite_has_no_slope() -> None:
    exploding = sweep(["none", "pre"], depths=[2, 12], dim=16, seeds=1)
    assert not np.isfinite(exploding.first_layer["none"][0, 1])
    slopes = exploding.slopes()
    assert np.isnan(slopes["none"].first_layer)
    assert np.isfinite(slopes["pre"].first_layer)
    data = json.loads(exploding.to_json())
    assert data["depths"] == [2, 12]
    assert data["first_layer"]["none"][0][1] is None
    assert [row.plan for row in exploding.table()] == ["none", "pre"]
    assert "pre" in repr(exploding)


def test_a_plan_as_data_is_its_own_key() -> None:
    plan = NormPlan()
    found = sweep([plan], depths=[1, 2], dim=8, seeds=1)
    assert plan in found.slopes()
    assert json.loads(next(iter(json.loads(found.to_json())["last_down"]))) == plan.to_dict()


@pytest.mark.parametrize(
    ("plans", "depths", "message"),
    [
        ([], [1, 2], "the list of plans is empty"),
        (["pre"], [2], "at least two different"),
        (["pre"], [2, 2], "at least two different"),
        (["pre"], [], "at least two different"),
        (["pre"], [1, 0], "depth must be a whole number"),
        ([3], [1, 2], "a plan must be a NormPlan or the text of one"),
    ],
)
def test_nonsense_is_refused(plans: list, depths: list, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        sweep(plans, depths)


def test_a_plan_that_one_depth_lacks_is_refused_before_any_work() -> None:
    plan = NormPlan(overrides=(Override(first=0, last=3),))
    with pytest.raises(Exception, match="layers 0-3 in a model of 2"):
        sweep([plan], [1000, 2], dim=4096)
