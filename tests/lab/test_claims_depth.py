"""What papers say of depth in pre-norm models, and of post-norm: the default checkpoint, and small random models."""

import numpy as np
import pytest

from llama_mini import Llama, lab

pytestmark = pytest.mark.slow


def test_deep_layers_do_little_on_average_but_the_last_ones_do_much(smollm2: Llama, alice: list[int]) -> None:
    """Sun et al. 2025 (2502.05795): layers of the second half can be skipped at next to no cost.

    By thirds of the 30 layers, one at a time, on average: 1.46, 0.35 and 0.50 nats; layer 0 costs 8.2, layer 1 3.1,
    layer 29 2.1. The cheapest are those of the middle, and none is free: each costs more than two standard errors.
    """
    rows = lab.skip_layers(smollm2, alice)
    costs, errors = (np.array(rows.column(name)) for name in ("dloss", "se"))
    print("skipped", *(f"{c:.3f}±{e:.3f}" for c, e in zip(costs, errors, strict=True)))
    first, middle, last = costs.reshape(3, 10).mean(-1)
    medians = np.median(costs.reshape(3, 10), axis=-1)
    print("means", first, middle, last, "medians", medians)
    assert first > 2 * last > 0
    assert costs[0] > 3 * costs[-1]
    assert costs[:3].mean() > 2 * costs[-3:].mean()
    assert middle < last
    assert (costs > 2 * errors).all()


def test_runs_of_deep_layers_cost_more_than_runs_of_the_middle(smollm2: Llama, alice: list[int]) -> None:
    """Five layers at a time, and the branches of ten: the middle is the part that does least, not the end."""
    (middle,) = lab.skip_layers(smollm2, alice, "layers.14-18", run=5)
    (late,) = lab.skip_layers(smollm2, alice, "layers.22-26", run=5)
    (early,) = lab.skip_layers(smollm2, alice, "layers.1-5", run=5)
    for row in (early, middle, late):
        print(row.path, row.dloss, row.se, row.angle)
    assert middle.dloss + 2 * middle.se < late.dloss - 2 * late.se < early.dloss
    assert middle.angle < late.angle
    thirds = {
        third: lab.skip_layers(smollm2, alice, f"layers.{third}.*", run=10) for third in ("0-9", "10-19", "20-29")
    }
    for third, (attention, feed_forward) in thirds.items():
        print(third, attention.dloss, attention.se, feed_forward.dloss, feed_forward.se)
        assert feed_forward.dloss > attention.dloss > 2 * attention.se > 0


def r_squared(y: np.ndarray, x: np.ndarray) -> float:
    return float(1 - np.var(y - np.polyval(np.polyfit(x, y, 1), x)) / np.var(y))


def test_the_stream_of_a_trained_pre_norm_model_grows_exponentially(smollm2: Llama, alice: list[int]) -> None:
    """Kim et al. 2025 (2502.02732): exponentially after training, linearly at init; linearly in peri-norm.

    The second moment of the median token after layers 1 to 28 grows by 19 % a layer; a straight line through its
    logarithm explains 96 % of it, one through itself 57 %. At random init the line fits pre-norm, and peri is 1 + 2l. A
    trained peri-norm model is not at hand.
    """
    points = lab.capture(smollm2, alice, keep="stats").resid.resid_pre[1:]
    moments, layers = np.array([point.median for point in points]) ** 2, np.arange(1, 30)
    factor = np.exp(np.polyfit(layers, np.log(moments), 1)[0])
    fits = r_squared(np.log(moments), layers), r_squared(moments, layers)
    print("growth", factor, fits)
    assert factor == pytest.approx(1.19, abs=0.01)
    assert fits[0] > 0.95 > 0.65 > fits[1]
    at_init = lab.predict("pre", 30).second_moment[1:]
    assert r_squared(at_init, np.arange(30)) > 0.99 > r_squared(np.log(at_init), np.arange(30))
    np.testing.assert_allclose(lab.predict("peri", 30).second_moment, 1 + 2 * np.arange(31), rtol=1e-4)


@pytest.mark.parametrize("warmup", [0, 30])
def test_keel_trains_where_post_norm_does_not(warmup: int) -> None:
    """Chen & Wei 2026 (2601.19895): post-norm trains if the stream is scaled.

    12 layers of width 64, 100 steps: Keel has 2.22 nats, `pre` 2.25, both ± 0.03, and `post` stays at the unigram loss,
    3.05; with 30 steps of warm-up 2.29, 2.31 and 3.09. At a learning rate of 1e-2, without: 2.21, 2.30 and 3.10.
    """
    race = lab.race(["pre", "post", "keel"], steps=100, seeds=2, warmup_steps=warmup)
    print(race)
    final = {plan: row.final for plan, row in race.final.items()}
    assert final["post"] > race.unigram - 0.1
    assert final["keel"] == pytest.approx(final["pre"], abs=0.15)
    assert final["keel"] < race.unigram - 0.5
