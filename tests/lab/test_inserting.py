"""insert: new norms with the gains of least squares, in a model that computes the formula of its new plan."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama_mini.errors import ConfigError, RequestError
from llama_mini.lab import capture, edit, insert, move, score
from llama_mini.lab.paths import select
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import NormSpec
from tests import reference
from tests.oracles import effective_gain, same_bits
from tests.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(2, 40)
OUT = "layers.*.*.out_norm"
CASES: dict[str, tuple[str, str, NormSpec, str | None]] = {  # plan, pattern, norm, the plan that comes out
    "peri": ("pre", OUT, NormSpec(), "peri"),
    "qk": ("pre", "layers.*.attention.[qk]_norm", NormSpec(), "pre+qk"),
    "qk:full": ("out", "layers.*.attention.[qk]_norm", NormSpec(view="full"), "out+qk:full"),
    "v": ("parallel", "layers.1.attention.v_norm,layers.0.feed_forward.pre_norm", NormSpec(eps=0.5), None),
    "outside": ("none-final", "embed_norm,norm", NormSpec(gain="1+w", cast="late"), None),
    "layer": ("pre", "layers.1.*.*_norm", NormSpec(kind="layer", bias=True, cast="late", scale=-2.0), None),
    "scale": ("post", "layers.*.*.mid_norm", NormSpec(kind="scale"), None),
    "dyt": ("peri", "layers.0.*.post_norm", NormSpec(kind="dyt"), None),
}


def empty(model: Llama, pattern: str) -> list[str]:
    paths = select(model, pattern, empty=True)
    return [path for path in paths if not isinstance(model.get_submodule(path), Norm)]


def inputs(model: Llama, paths: list[str], tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    """What each slot reads in the unchanged model."""
    seen: dict[str, Tensor] = {}
    for path in paths:
        hook = model.get_submodule(path).register_forward_hook(
            lambda _, args, __, path=path: seen.update({path: args[0]})
        )
        model(tokens)
        hook.remove()
    return seen


@pytest.mark.parametrize("case", CASES)
def test_the_gains_are_those_of_least_squares(case: str) -> None:
    plan, pattern, spec, result = CASES[case]
    model = tiny_model(1, norm_plan=plan)
    paths = empty(model, pattern)
    before, seen = model(TOKENS), inputs(model, paths)
    new = insert(model, paths, TOKENS, norm=spec)
    for path, x in seen.items():
        norm = new.get_submodule(path)
        rows = x.double().numpy().reshape(-1, norm.dim)
        alpha = np.array([0.5]) if spec.kind == "dyt" else None
        normed = spec.scale * reference.normalised(rows, spec.kind, norm.eps, alpha)
        columns = [(normed.ravel(), rows.ravel())] if spec.kind == "scale" else zip(normed.T, rows.T, strict=True)
        best = [np.linalg.lstsq(a[:, None], b, rcond=None)[0][0] for a, b in columns]
        np.testing.assert_allclose(effective_gain(norm.weight, norm.gain), best, rtol=1e-5, atol=1e-6)
    if result is not None:
        assert new.config.norm_plan == NormPlan.parse(result, model.config.n_layers)
    assert same_bits(model(TOKENS), before)  # the original is as it was
    shared = dict(model.named_parameters())
    assert all(new.get_parameter(name) is parameter for name, parameter in shared.items())
    expected = reference.logits(
        new.config, {n: t.double().numpy() for n, t in new.state_dict().items()}, TOKENS.numpy()
    )
    np.testing.assert_allclose(new(TOKENS).numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("pattern", [OUT, "layers.*.attention.[qk]_norm"])
def test_fitted_norms_stay_nearer_to_the_function(pattern: str) -> None:
    model = tiny_model(1)
    for name, weight in model.named_parameters():
        if "_proj" in name:  # outputs of other sizes than a norm of gain one has
            weight.mul_(0.5)
    base = score(model, TOKENS)
    fitted, one = (score(insert(model, pattern, TOKENS, gain), TOKENS, against=base) for gain in ("lstsq", "one"))
    assert fitted.kl is not None
    assert one.kl is not None
    assert 0 < fitted.kl < one.kl


def test_padding_does_not_count() -> None:
    model, texts = tiny_model(1), [TOKENS[0].tolist(), TOKENS[1, :7].tolist()]
    pattern = "layers.0.attention.out_norm"  # alone, in the first layer, it can be fitted text by text
    several = insert(model, pattern, texts).get_parameter(f"{pattern}.weight")
    x = torch.cat([inputs(model, [pattern], torch.tensor([text]))[pattern][0] for text in texts]).double()
    normed = torch.from_numpy(reference.normalised(x.numpy(), "rms", model.config.norm_eps))
    torch.testing.assert_close(several.double(), (x * normed).sum(0) / normed.square().sum(0), rtol=1e-5, atol=1e-6)


def test_an_element_that_is_always_zero_keeps_a_gain_of_one() -> None:
    model = tiny_model(1)
    model.layers[1].feed_forward.down_proj.weight[5] = 0
    norm = insert(model, "layers.1.feed_forward.out_norm", TOKENS).layers[1].feed_forward.out_norm
    assert norm.weight[5] == 1
    assert (norm.weight[:5] != 1).all()


def test_the_new_norms_have_the_models_dtype_and_can_be_trained() -> None:
    model = tiny_model(1, torch.bfloat16).requires_grad_(True)
    with torch.inference_mode():
        new = insert(model, OUT, TOKENS)
    weight = new.layers[0].attention.out_norm.weight
    assert (weight.dtype, weight.requires_grad, weight.is_inference()) == (torch.bfloat16, True, False)
    new(TOKENS).sum().backward()
    assert weight.grad is not None


def test_a_llama_with_q_and_k_norms_is_a_qwen3_that_transformers_opens(tmp_path: Path) -> None:
    new = insert(tiny_model(1, max_seq_len=64), "layers.*.attention.[qk]_norm", TOKENS)
    new.save_pretrained(tmp_path / "new")
    again = Llama.from_pretrained(tmp_path / "new")
    assert again.config == new.config
    assert same_bits(again(TOKENS), new(TOKENS))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new", attn_implementation="eager").eval()
    assert theirs.config.model_type == "qwen3"
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, new(TOKENS), rtol=0, atol=2e-5)


def test_what_is_inserted_can_be_moved_and_captured() -> None:
    model = tiny_model(1)
    new = insert(model, "layers.*.attention.out_norm", TOKENS)
    recorded = capture(new, TOKENS)["layers.2.attention.out_norm"]
    assert recorded.y is not None
    gap = (recorded.y - recorded.x).pow(2).mean() / recorded.x.pow(2).mean()  # type: ignore[operator,union-attr]
    assert gap < 0.3  # a norm of gain one has 1 at this model's sizes
    assert move(new, "layers.*.attention.out_norm", to="post").config.norm_plan.attention.post == NormSpec()


REFUSALS: list[tuple[str, str, dict[str, Any], str]] = [
    ("peri", OUT, {}, r"layers\.0\.attention\.out_norm holds a norm already; leave it out, or change it with"),
    ("pre", OUT, {"gain": "two"}, "unknown gain 'two'; known: lstsq, one"),
    ("pre", OUT, {"norm": NormSpec(gain="none")}, "a norm without a gain has none to fit: give gain='one'"),
    ("pre", OUT, {"norm": "rms"}, "norm must be a NormSpec, not 'rms'"),
    ("pre", "layers.9.*.out_norm", {}, "matches no norm"),
]


@pytest.mark.parametrize(("plan", "pattern", "settings", "message"), REFUSALS)
def test_refusals(plan: str, pattern: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        insert(tiny_model(1, norm_plan=plan), pattern, TOKENS, **settings)


def test_a_norm_that_the_slot_cannot_hold_and_an_edited_model() -> None:
    model = tiny_model(1)
    with pytest.raises(ConfigError, match="view='full' belongs to the slots q, k and v, not to out"):
        insert(model, OUT, TOKENS, norm=NormSpec(view="full"))
    with edit(model, {"norm": {"eps": 0.1}}), pytest.raises(RequestError, match="leave the edit"):
        insert(model, OUT, TOKENS)


@pytest.mark.slow
def test_norms_on_the_output_of_attention_cost_the_default_checkpoint_little(smollm2: Llama, alice: list[int]) -> None:
    """With unit gains 10.6 nats, with fitted ones 0.22: so `pre -> peri` starts near the function."""
    base = score(smollm2, alice)
    new = insert(smollm2, "layers.*.attention.out_norm", alice)
    assert score(new, alice, against=base).dloss == pytest.approx(0.2176, abs=2e-3)
