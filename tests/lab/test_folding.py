"""fold and center: other weights, the same logits, in our model, in NumPy and in transformers."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama_mini.errors import RequestError
from llama_mini.lab import center, fold
from llama_mini.lab.paths import select
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.model.norm_plan import NormPlan
from tests import reference
from tests.oracles import same_bits
from tests.tiny_families import random_model
from tests.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(2, 17)
CLOSE = 5e-6  # of the largest logit, in float32
LAYER: dict[str, Any] = {
    "attention": {"pre": {"kind": "layer"}},
    "feed_forward": {"pre": {"kind": "layer", "gain": "1+w"}},
    "final": {"kind": "layer", "eps": 0.01},
}
UNUSUAL: dict[str, Any] = {  # kinds, conventions, scales, and norms that cannot be folded beside those that can
    "attention": {
        "pre": {"kind": "layer", "gain": "1+w", "scale": 0.5},
        "q": {"view": "full"},
        "v": {},
        "mid": {"kind": "dyt"},
        "out": {},
        "alpha": 0.7,
    },
    "feed_forward": {"pre": {"kind": "scale", "cast": "late"}, "mid": {"kind": "prms", "gain": "1+w"}, "post": {}},
    "embed": {},
    "final": {"kind": "l2", "scale": 3.0},
    "overrides": [{"layers": "1", "feed_forward": {"pre": {"gain": "none"}}}],
}
PLANS: list[Any] = ["pre", "pre+qk", "sub", "lns", "peri+embed", "normformer", "mix(.4)", UNUSUAL]


def random_tiny(plan: Any = "pre", seed: int = 3, dtype: torch.dtype = torch.float32, **changes: Any) -> Llama:
    return tiny_model(seed, dtype, norm_plan=NormPlan.from_dict(plan) if isinstance(plan, dict) else plan, **changes)


def gap(one: Tensor, other: Tensor) -> float:
    """The largest difference, over the largest logit."""
    return float((one - other).abs().max() / other.abs().max())


def numpy_logits(model: Llama) -> np.ndarray:
    state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    return reference.logits(model.config, state, TOKENS.numpy())


def assert_same_function(new: Llama, old: Llama) -> None:
    """In float32 by our own model, and by NumPy on the float32 weights that they hold."""
    assert gap(new(TOKENS), old(TOKENS)) < CLOSE
    expected = numpy_logits(old)
    assert np.abs(numpy_logits(new) - expected).max() < CLOSE * np.abs(expected).max()


def effective(norm: Norm) -> Tensor:
    if norm.weight is None:
        return torch.ones(norm.dim)
    return 1 + norm.weight if norm.gain == "1+w" else norm.weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan if isinstance(plan, str) else "unusual")
def test_folding_keeps_the_logits(plan: Any, tied: bool) -> None:
    model = random_tiny(plan, tie_word_embeddings=tied)
    state, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config)
    folded = fold(model)
    assert_same_function(folded, model)
    is_of_a_family = plan in ("pre", "pre+qk")  # of transformers, which all have gains
    if is_of_a_family:
        assert folded.config.norm_plan == config.norm_plan
    for path in select(folded, "layers.*.*.*") + select(folded, "norm"):
        old, new = model.get_submodule(path), folded.get_submodule(path)
        if path.endswith((".pre_norm", ".mid_norm")) or path == "norm":
            assert (effective(new) == 1).all(), path
            assert (new.weight is None) == (old.weight is None or not (is_of_a_family or old.kind == "layer")), path
            assert old.weight is None or (effective(old) != 1).any(), path
        else:
            assert new.weight is old.weight, path
    assert model.config == config  # the original is as it was
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_gains_of_a_model_in_our_own_format_leave_plan_and_file(tmp_path: Path) -> None:
    model = random_tiny("sub", tie_word_embeddings=True)
    folded = fold(model, ["layers.0-1.*.*_norm", "norm"])
    plan = folded.config.norm_plan.to_dict()
    bare = {"kind": "rms", "gain": "none"}
    assert plan["final"] == plan["attention"]["pre"] == plan["feed_forward"]["mid"] == bare
    assert plan["overrides"][0]["attention"]["mid"] == {"kind": "rms"}
    folded.save_pretrained(tmp_path / "folded")
    again = Llama.from_pretrained(tmp_path / "folded")
    assert again.config == folded.config
    assert "norm.weight" not in again.state_dict()
    assert same_bits(again(TOKENS), folded(TOKENS))
    with pytest.raises(RequestError, match=r"layers\.0\.attention\.pre_norm has no gain to fold"):
        fold(folded, "layers.0.attention.pre_norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan if isinstance(plan, str) else "unusual")
def test_powers_of_two_fold_bit_for_bit(plan: Any, dtype: torch.dtype) -> None:
    model = random_tiny(plan, dtype=dtype, tie_word_embeddings=True)
    for weight in model.parameters():  # some processors' products of float16 take subnormal numbers for zero
        weight[weight.abs() < 2**-11] = 0
    rng = np.random.default_rng(4)
    for norm in (m for m in model.modules() if isinstance(m, Norm) and m.weight is not None):
        powers = torch.from_numpy(2.0 ** rng.integers(-2, 3, norm.weight.shape))
        norm.weight.copy_(powers - 1 if norm.gain == "1+w" else powers)
    folded = fold(model)
    assert not torch.equal(folded.lm_head.weight, model.tok_embeddings.weight)
    assert same_bits(folded(TOKENS), model(TOKENS))


def test_what_is_not_folded_is_shared() -> None:
    model = random_tiny("pre")
    folded = fold(model, "layers.1.attention.pre_norm")
    changed = {name for name, p in folded.named_parameters() if p is not model.get_parameter(name)}
    assert changed == {f"layers.1.attention.{name}.weight" for name in ("pre_norm", "q_proj", "k_proj", "v_proj")}
    assert_same_function(folded, model)


def test_the_final_norm_folds_into_a_head_of_its_own() -> None:
    model = random_tiny(tie_word_embeddings=True)
    folded = fold(model, "norm")
    assert not folded.config.tie_word_embeddings
    assert folded.tok_embeddings.weight is model.tok_embeddings.weight
    product = model.tok_embeddings.weight.double() * model.norm.weight.double()
    torch.testing.assert_close(folded.lm_head.weight.double(), product, rtol=2**-24, atol=0)
    assert fold(random_tiny(tie_word_embeddings=True), "layers.*.*.pre_norm").config.tie_word_embeddings


def test_biases_need_no_change() -> None:
    model = random_tiny(qkv_bias=True, o_bias=True, mlp_bias=True)
    folded = fold(model)
    assert_same_function(folded, model)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert folded.get_parameter(name) is parameter


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_opens_what_was_folded(model_type: str, tmp_path: Path) -> None:
    theirs = random_model(model_type, 3, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "theirs")
    fold(Llama.from_pretrained(tmp_path / "theirs")).save_pretrained(tmp_path / "folded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", attn_implementation="eager").eval()
    assert again.config.model_type in (model_type, "llama")  # a Mistral without a window is a LLaMA
    assert (again.model.norm.weight == 1).all()
    assert (again.model.layers[1].input_layernorm.weight == 1).all()
    with torch.no_grad():
        assert gap(again(TOKENS).logits, theirs(TOKENS).logits) < CLOSE


def test_bfloat16_is_rounded_once() -> None:
    model = random_tiny(dtype=torch.bfloat16)
    folded = fold(model, "layers.0.attention.pre_norm")
    gain = model.layers[0].attention.pre_norm.weight
    exact = model.layers[0].attention.q_proj.weight.double() * gain.double()
    assert torch.equal(folded.layers[0].attention.q_proj.weight, exact.to(torch.bfloat16))
    assert 1e-4 < gap(fold(model)(TOKENS), model(TOKENS)) < 0.05  # not exact, and no other model


def test_gradients_are_asked_for_as_before() -> None:
    model = random_tiny().requires_grad_(True).train()
    folded = fold(model)
    assert folded.training
    assert all(p.requires_grad and p.is_leaf for p in folded.parameters())
    assert not any(p.requires_grad for p in fold(random_tiny()).parameters())


@pytest.mark.parametrize(
    ("plan", "pattern", "message"),
    [
        ("out", "layers.1.attention.out_norm", r"layers\.1\.attention\.out_norm cannot be folded: it writes the resid"),
        ("post", "layers.*.*.*", r"layers\.0\.attention\.post_norm cannot be folded: it writes the residual stream"),
        ("pre+embed", "embed_norm", "embed_norm cannot be folded: it writes the residual stream"),
        ("pre+qk", "layers.0.attention.q_norm", r"layers\.0\.attention\.q_norm cannot be folded: attention reads it"),
        ("pre+qk", "layers.2.*.k_norm", r"layers\.2\.attention\.k_norm cannot be folded: attention reads it"),
        (UNUSUAL, "layers.2.*.v_norm", r"layers\.2\.attention\.v_norm cannot be folded: attention reads it"),
        (UNUSUAL, "layers.1.feed_forward.pre_norm", r"layers\.1\.feed_forward\.pre_norm has no gain"),
        ("post+qk", None, "no norm of the model has a gain that can be folded"),
        ("pre", "layers.9.*.*", "matches no norm"),
    ],
)
def test_gains_that_cannot_be_folded_are_refused_by_name(plan: Any, pattern: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fold(random_tiny(plan), pattern)


def test_the_default_checkpoint_folds(smollm2_dir: Path) -> None:
    model = Llama.from_pretrained(smollm2_dir, dtype="float32")
    tokens = random_tokens(1, 24, 49_152)
    folded = fold(model)
    assert len(select(folded, "layers.*.*.pre_norm")) == 60
    assert gap(folded(tokens), model(tokens)) < CLOSE


def with_a_mean(model: Llama) -> Llama:
    """Weights whose outputs have a mean of the size of their spread, as trained ones may."""
    rng = np.random.default_rng(8)
    for name, parameter in model.named_parameters():
        if "tok_embeddings" in name or "o_proj" in name or "down_proj" in name:
            shape = (len(parameter), 1) if "tok" in name else parameter.shape[1:] or (1,)
            parameter.add_(torch.from_numpy(rng.standard_normal(shape)).to(parameter.dtype) * parameter.std())
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
        {"plan": LAYER | {"attention": {"pre": {"kind": "layer"}, "q": {}, "mid": {}, "alpha": 0.6, "beta": 1.4}}},
        {"plan": LAYER | {"overrides": [{"layers": "1", "attention": {"pre": {"kind": "layer", "gain": "none"}}}]}},
    ],
    ids=["plain", "tied", "biases", "inner norms and scales", "overrides"],
)
def test_centring_turns_layernorm_into_rmsnorm(changes: dict[str, Any]) -> None:
    model = with_a_mean(random_tiny(**{"plan": LAYER} | changes))
    state, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config)
    centred = center(model)
    assert_same_function(centred, model)
    kinds = {path: centred.get_submodule(path).kind for path in select(centred, "layers.*.*.pre_norm")}
    assert {*kinds.values(), centred.norm.kind} == {"rms"}
    assert list(Llama(centred.config).state_dict()) == list(centred.state_dict())
    plain = copy.deepcopy(model)  # the kind alone, without centred weights, is another model
    for path in kinds:
        norm = plain.get_submodule(path)
        norm.__class__ = type(centred.norm)
    assert gap(plain(TOKENS), model(TOKENS)) > 0.1
    assert model.config == config
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_stream_of_a_centred_model_has_no_mean() -> None:
    model = with_a_mean(random_tiny(LAYER, o_bias=True, qkv_bias=True, mlp_bias=True))
    model.layers[1].attention.o_proj.weight = model.layers[0].attention.o_proj.weight  # shared ones too
    means: dict[str, list[float]] = {"before": [], "after": []}
    for when, watched in (("before", model), ("after", center(model))):
        for layer in watched.layers:
            layer.register_forward_hook(
                lambda _m, _i, y, when=when: means[when].append(float((y.mean(-1) / y.std(-1)).abs().max()))
            )
        watched(TOKENS)
    assert min(means["before"]) > 0.5
    assert max(means["after"]) < 1e-5


def test_a_centred_llama_is_a_plain_llama(tmp_path: Path) -> None:
    plan = {name: {"pre": {"kind": "layer"}} for name in ("attention", "feed_forward")} | {"final": {"kind": "layer"}}
    model = with_a_mean(random_tiny(plan, tie_word_embeddings=True))
    centred = center(model)
    assert centred.config.norm_plan == NormPlan.parse("pre", 3)
    assert centred.lm_head.weight is model.tok_embeddings.weight
    centred.save_pretrained(tmp_path / "centred")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "centred", attn_implementation="eager").eval()
    with torch.no_grad():
        assert gap(theirs(TOKENS).logits, model(TOKENS)) < CLOSE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final": {}}, "norm is of kind rms"),
        ({"final": None}, "norm is empty; pre and final norms must all be of kind layer"),
        ({"attention": {}}, r"layers\.0\.attention\.pre_norm is empty"),
        ({"feed_forward": {"pre": {"kind": "dyt"}}}, r"layers\.0\.feed_forward\.pre_norm is of kind dyt"),
        ({"overrides": [{"layers": "2", "attention": {"pre": {}}}]}, r"layers\.2\.attention\.pre_norm is of kind rms"),
        ({"embed": {"kind": "layer"}}, "embed_norm writes the residual stream"),
        (
            {"attention": {"pre": {"kind": "layer"}, "out": {"kind": "layer"}}},
            r"layers\.0\.attention\.out_norm writes the residual stream",
        ),
        (
            {"overrides": [{"layers": "1", "feed_forward": {"pre": {"kind": "layer"}, "post": {"kind": "layer"}}}]},
            r"layers\.1\.feed_forward\.post_norm writes the residual stream",
        ),
    ],
)
def test_plans_that_cannot_be_centred_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        center(random_tiny(LAYER | changes))
