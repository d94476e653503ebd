"""fold and center on what other families than LLaMA add: biases of norms, parallel layers, no gate, 1+w, soft caps."""

from typing import Any

import pytest
import torch

from llama_mini.errors import RequestError
from llama_mini.lab import center, fold
from llama_mini.lab.paths import select
from llama_mini.model.norm_plan import NormPlan
from tests.lab.test_folding import assert_same_function, effective, random_tiny

BIASED = NormPlan.parse("pre+qk", 3).with_norms(kind="layer", cast="late", bias=True)
OTHERS: dict[str, dict[str, Any]] = {  # what other families add
    "bias": {"norm_plan": BIASED, "qkv_bias": True},
    "bias of 1+w, no gate": {"norm_plan": BIASED.with_norms(gain="1+w"), "gated_mlp": False, "activation": "relu2"},
    "parallel": {"norm_plan": NormPlan.parse("parallel", 3).with_norms(kind="layer"), "gated_mlp": False},
    "parallel, gated": {"norm_plan": "parallel", "qkv_bias": True, "logit_softcap": 2.0, "attention_softcap": 1.0},
    "after rope": {"norm_plan": "pre+qk", "qk_norm_after_rope": True, "rotary_dim": 4},
    "gemma": {"norm_plan": NormPlan.parse("peri", 3).with_norms(gain="1+w", cast="late"), "embedding_scale": 7.0},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_other_families_add_folds(name: str) -> None:
    model = random_tiny(OTHERS[name]["norm_plan"], 8, **{k: v for k, v in OTHERS[name].items() if k != "norm_plan"})
    folded = fold(model)
    assert_same_function(folded, model)
    for path in select(folded, "layers.*.*.pre_norm"):
        new, old = folded.get_submodule(path), model.get_submodule(path)
        assert (effective(new) == 1).all()
        if new.bias is not None:
            torch.testing.assert_close(new.bias * effective(old), old.bias)
    assert folded.layers[0].feed_forward.up_proj.weight is not model.layers[0].feed_forward.up_proj.weight


def test_a_bias_over_a_gain_of_zero_and_a_norm_that_a_norm_reads_do_not_fold() -> None:
    model = random_tiny(BIASED)
    model.layers[1].attention.pre_norm.weight[3] = 0
    with pytest.raises(RequestError, match=r"layers\.1\.attention\.pre_norm has a bias and gains of zero"):
        fold(model)
    plan = {"attention": {"pre": {}}, "feed_forward": {"pre": {}}, "parallel": True}
    with pytest.raises(
        RequestError, match=r"layers\.0\.attention\.pre_norm .*: layers\.0\.feed_forward\.pre_norm reads"
    ):
        fold(random_tiny(plan))
    assert_same_function(fold(random_tiny(plan), "layers.*.feed_forward.pre_norm"), random_tiny(plan))


def test_centring_what_other_families_add() -> None:
    plan = NormPlan.parse("parallel", 3).with_norms(kind="layer", gain="1+w")
    model = random_tiny(plan, 5, embedding_scale=3.0, gated_mlp=False, activation="gelu", o_bias=True, mlp_bias=True)
    centred = center(model)
    assert centred.config.norm_plan == plan.with_norms(kind="rms")
    assert_same_function(centred, model)
    with pytest.raises(RequestError, match=r"cannot be centred: layers\.0\.attention\.pre_norm has a bias"):
        center(random_tiny(NormPlan.parse("pre", 3).with_norms(kind="layer", cast="late", bias=True)))
