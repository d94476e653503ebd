"""What papers say of what norms compute and of taking them away, on the default checkpoint, without any training.

That a model recovers after training is in test_healing.py.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_mini import Llama, lab

pytestmark = pytest.mark.slow


def explained(x: Tensor, y: Tensor) -> dict[str, tuple[float, float]]:
    """Of y's energy the share that s·x, s·tanh(αx) and s·erf(αx) explain with the best s and α, and that α."""

    def best(shape: Tensor) -> float:
        return float((shape @ y) ** 2 / (shape @ shape) / (y @ y))

    found = {"line": (best(x), 0.0)}
    for name, shape in {"tanh": torch.tanh, "erf": torch.erf}.items():
        found[name] = max(
            (best(shape(alpha * x)), alpha) for alpha in np.geomspace(1e-4, 1, 33) / float(x.abs().median())
        )
    return found


NORMS = [f"layers.{i}.attention.pre_norm" for i in (2, 6, 10, 14, 20, 28)] + ["norm"]
SPIKED = (NORMS[1], *NORMS[3:6])


def test_the_s_shape_of_a_norm_is_that_of_its_massive_tokens(smollm2: Llama, alice: list[int]) -> None:
    """Zhu et al. 2025 (2503.10622), Chen et al. 2025 (2512.10938): a norm maps input to output in the shape of an S.

    Over all tokens it does where a token is massive: in layer 14 s·tanh(αx) explains 79 % of the output's energy and a
    line 2 %. Without the massive tokens a line explains 97 to 99.6 %, and tanh no more than 0.9 % beyond it. The best α
    falls as the stream grows. erf and tanh fit equally well.
    """
    recording, alphas = lab.capture(smollm2, alice, at=NORMS), []
    for path in NORMS:
        x = recording[path].x[0].double()
        y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        rms = x.square().mean(-1).sqrt()
        apart = rms < 2.5 * rms.median()
        every, ordinary = (explained(x[rows].flatten(), y[rows].flatten()) for rows in (rms > 0, apart))
        print(path, int((~apart).sum()), every, ordinary)
        assert ordinary["line"][0] > 0.97
        assert ordinary["tanh"][0] - ordinary["line"][0] < 0.01
        if path in SPIKED:
            assert every["tanh"][0] - every["line"][0] > 0.3
            alphas.append(every["tanh"][1])
        assert every["erf"][0] == pytest.approx(every["tanh"][0], abs=0.002)
    assert alphas[1:] == sorted(alphas[1:], reverse=True)


def test_the_final_norm_fixes_the_scale_of_the_logits(smollm2: Llama, alice: list[int]) -> None:
    """TaperNorm (2602.10408): without the final norm the loss depends on the stream's scale, and pulls at it.

    With it, twice the last layer's output gives the same loss. With its statistic frozen, the loss falls or rises with
    the scale: training could change the logits by size alone.
    """
    edits = {"as it is": {}, "frozen": {"norm": {"freeze": "quadratic", "keep": "none"}}}
    found = {}
    for name, edit in edits.items():
        for factor in (0.8, 1.0, 1.25):
            last = smollm2.get_submodule("layers.29")
            with lab.edit(smollm2, edit, alice), last.register_forward_hook(lambda _, __, y, c=factor: c * y):
                found[name, factor] = lab.score(smollm2, alice).loss
    print(found)
    assert found["as it is", 0.8] == pytest.approx(found["as it is", 1.25], abs=1e-5)
    assert found["frozen", 1.0] == pytest.approx(found["as it is", 1.0], abs=0.3)
    assert max(abs(found["frozen", c] - found["frozen", 1.0]) for c in (0.8, 1.25)) > 0.05


def test_groups_of_norms_frozen_at_once(smollm2: Llama, alice: list[int]) -> None:
    """Heimersheim 2024 (2409.13710), Baroni et al. 2025 (2507.02559): feed-forward norms go first, then those of
    attention, the final norm, and last the first token's and the end of text's; with training in between.

    Without training the order is another: with massive tokens apart and the arithmetic mean the final norm costs +0.03
    nats, attention +1.4, and the feed-forward norms end in NaN. With no token apart attention costs +15.
    """
    costs = {}
    for name in ("feed_forward.pre_norm", "attention.pre_norm", "norm"):
        pattern = name if name == "norm" else f"layers.*.{name}"
        (costs[name],) = lab.ablate(smollm2, alice, pattern, joint=True, freeze="arithmetic", keep="massive")
        print(name, costs[name])
    assert "first at layers." in (costs["feed_forward.pre_norm"].error or "")
    assert costs["attention.pre_norm"].dloss == pytest.approx(1.39, abs=0.2)
    assert costs["norm"].dloss == pytest.approx(0.032, abs=0.005)
