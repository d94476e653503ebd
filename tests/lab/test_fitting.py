"""move_fitted: what the norm did on average stays, and the new gains are those of least squares."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_mini import Tokenizer
from llama_mini.errors import RequestError
from llama_mini.lab import capture, insert, move, move_fitted, score
from llama_mini.lab.moving import spec_at
from llama_mini.lab.paths import select
from llama_mini.lab.training import sample_text
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import NormPlan
from tests.oracles import effective_gain, same_bits
from tests.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(3, 24)
LNS = NormPlan.parse("lns", 3).with_norms(gain="1+w", cast="late")
UNGATED = {"gated_mlp": False, "activation": "relu2", "mlp_bias": True}
CASES: dict[str, tuple[NormPlan | str, str, str, dict[str, Any]]] = {
    "pre": ("pre", "layers.1-2.*.pre_norm", "out", {}),
    "out": ("out", "layers.1.*.out_norm", "post", {"o_bias": True, "mlp_bias": True}),
    "mid": ("sub", "layers.2.attention.mid_norm", "out", {}),
    "1+w, scaled, ungated": (LNS, "layers.2.feed_forward.pre_norm", "out", UNGATED),
}


class Diagonal(nn.Module):
    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("case", CASES)
def test_the_old_norm_divides_by_a_constant_and_the_new_one_is_fitted(case: str) -> None:
    plan, pattern, to, settings = CASES[case]
    model = tiny_model(1, torch.float64, norm_plan=plan, **settings)
    before, fitted, seen = model(TOKENS), move_fitted(model, pattern, to, TOKENS), capture(model, TOKENS)
    assert fitted.config == move(model, pattern, to).config
    paths = select(model, pattern)
    targets = [f"{path.rpartition('.')[0]}.{to}_norm" for path in paths]
    expected = insert(model, targets, TOKENS, norm=spec_at(fitted.config, targets[0]))
    for path in paths:
        norm = model.get_submodule(path)
        c = (seen[path].x[:, 1:].square().mean() + norm.eps).sqrt()
        expected.set_submodule(
            path, Diagonal(torch.from_numpy(effective_gain(norm.weight, norm.gain)) * norm.scale / c)
        )
    torch.testing.assert_close(fitted(TOKENS), expected(TOKENS), rtol=1e-9, atol=1e-9)
    assert same_bits(model(TOKENS), before)


def test_what_no_matrix_can_take_over_is_refused() -> None:
    for plan, pattern, to, message in (
        ("post", "layers.1.attention.post_norm", "pre", r"layers\.1\.attention\.post_norm writes the residual stream"),
        ("pre", "layers.1.attention.pre_norm", "pre", "is already in the slot pre"),
        (
            NormPlan.parse("pre", 3).with_norms(kind="layer"),
            "layers.1.*.pre_norm",
            "out",
            "freeze is for rms and scale",
        ),
    ):
        with pytest.raises(RequestError, match=message):
            move_fitted(tiny_model(1, norm_plan=plan), pattern, to, TOKENS)


@pytest.mark.slow
def test_on_the_default_checkpoint_it_costs_a_tenth_of_a_plain_move(
    smollm2: Llama, smollm2_tokenizer: Tokenizer
) -> None:
    model, ids = smollm2, smollm2_tokenizer.encode(sample_text())
    pattern, base = "layers.20-29.feed_forward.pre_norm", score(model, ids[:256])
    plain = score(move(model, pattern, "out"), ids[:256], against=base)
    fitted = score(move_fitted(model, pattern, "out", ids[1024:2048]), ids[:256], against=base)
    assert plain.dloss > 8
    assert fitted.dloss < 0.9
