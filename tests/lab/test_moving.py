"""move: the same formula with the norm elsewhere, the same parameters, and back again bit for bit."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llama_mini.errors import RequestError
from llama_mini.lab import move
from llama_mini.lab.paths import select
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import NormSpec
from tests import reference
from tests.oracles import same_bits
from tests.tiny_families import random_model
from tests.tiny_models import TINY, random_tokens, tiny_model

TOKENS = random_tokens(2, 17)
MOVES = {  # plan: pattern, to, what comes out
    "pre": ("layers.*.*.pre_norm", "out", "out"),
    "pre+qk": ("layers.*.*.pre_norm", "out", "out+qk"),
    "out+qk:full": ("layers.*.*.out_norm", "pre", "pre+qk:full"),
    "post": ("layers.*.*.post_norm", "pre", "pre-final"),
    "pre-final": ("layers.*.*.pre_norm", "post", "post"),
    "mix(.4)": ("layers.0.*.post_norm", "pre", "pre"),
    "mix(1)": ("layers.1-2.*.post_norm", "pre", "mix(.4)"),
    "mix(0)": ("layers.*.*.pre_norm", "post", "mix(1)"),
    "mix(.7)": ("layers.2.*.pre_norm", "post", "mix(1)"),
    "normformer": ("layers.*.feed_forward.pre_norm", "out", None),
    "lns": ("layers.*.*.pre_norm", "out", None),
    "peri": ("layers.*.attention.out_norm", "mid", None),
}


def numpy_logits(model: Llama, tokens: Tensor = TOKENS) -> np.ndarray:
    state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    return reference.logits(model.config, state, tokens.numpy())


def assert_formula(model: Llama) -> None:
    expected = numpy_logits(model)
    np.testing.assert_allclose(model(TOKENS).numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("plan", MOVES)
def test_a_moved_norm_computes_the_formula_of_its_new_plan(plan: str) -> None:
    pattern, to, result = MOVES[plan]
    model = tiny_model(1, norm_plan=plan)
    moved = move(model, pattern, to)
    if result is not None:
        assert moved.config.norm_plan == NormPlan.parse(result, TINY["n_layers"])
    assert_formula(moved)
    assert not torch.allclose(moved(TOKENS), model(TOKENS), atol=1e-2)
    for path in select(model, pattern):
        target = f"{path.rpartition('.')[0]}.{to}_norm.weight"
        assert moved.get_parameter(target) is model.get_parameter(f"{path}.weight")
        assert isinstance(moved.get_submodule(path), nn.Identity)


@pytest.mark.parametrize("plan", MOVES)
def test_moving_there_and_back_restores_config_and_every_bit(plan: str) -> None:
    pattern, to, _ = MOVES[plan]
    model = tiny_model(1, norm_plan=plan)
    config, before, keys = copy.deepcopy(model.config), model(TOKENS), list(model.state_dict())
    there = move(model, pattern, to)
    back = there
    for path in select(model, pattern):
        at, _, slot = path.rpartition(".")
        back = move(back, f"{at}.{to}_norm", slot.removesuffix("_norm"))
    assert same_bits(back(TOKENS), before)
    assert back.config == config
    assert same_bits(model(TOKENS), before)  # the original is as it was
    assert (model.config, list(model.state_dict())) == (config, keys)


@pytest.mark.parametrize("plan", MOVES)
def test_the_new_config_rebuilds_the_model_and_survives_the_disk(plan: str, tmp_path: Path) -> None:
    pattern, to, _ = MOVES[plan]
    moved = move(tiny_model(1, norm_plan=plan), pattern, to)
    assert list(Llama(moved.config).state_dict()) == list(moved.state_dict())
    moved.save_pretrained(tmp_path / "saved")
    again = Llama.from_pretrained(tmp_path / "saved")
    assert again.config == moved.config
    assert same_bits(again(TOKENS), moved(TOKENS))


def test_all_norms_moved_out_are_what_transformers_calls_olmo2(tmp_path: Path) -> None:
    """LLaMA's weights and norms in OLMo 2's places: a checkpoint that transformers builds from its own code."""
    theirs = random_model("olmo2", 0, attention_bias=False)
    theirs.save_pretrained(tmp_path / "olmo2")
    moved = move(Llama.from_pretrained(tmp_path / "olmo2"), "layers.*.*.out_norm", "pre")
    move(moved, "layers.*.*.pre_norm", "out").save_pretrained(tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, theirs(TOKENS).logits)
    assert (moved(TOKENS) - theirs(TOKENS).logits).abs().max() > 0.1


def test_some_layers_alone() -> None:
    model = tiny_model(1, n_layers=5)
    moved = move(model, "layers.1-2.feed_forward.pre_norm", "out")
    assert moved.config.norm_plan.to_dict()["overrides"] == [
        {"layers": "1-2", "feed_forward": {"out": {"kind": "rms"}}}
    ]
    assert_formula(moved)
    then = move(moved, "layers.1-3.attention.pre_norm", "post")
    assert [o["layers"] for o in then.config.norm_plan.to_dict()["overrides"]] == ["0-0", "1-2", "4-4"]
    assert_formula(then)


def test_trees_are_apart_and_parameters_are_shared() -> None:
    model = tiny_model(1)
    model.requires_grad_(True).train()
    moved = move(model, "layers.1.attention.pre_norm", "out")
    ours, theirs = dict(model.named_parameters()), dict(moved.named_parameters())
    assert set(map(id, ours.values())) == set(map(id, theirs.values()))
    assert all(parameter.requires_grad for parameter in theirs.values())
    assert moved.training
    assert not move(tiny_model(1), "layers.1.attention.pre_norm", "out").training
    assert not set(map(id, model.modules())) & set(map(id, moved.modules()))
    before = model(TOKENS)
    moved.layers[0].attention.pre_norm.eps = 1.0
    moved.norm.register_forward_hook(lambda *_: torch.zeros(1))
    assert same_bits(model(TOKENS), before)


def test_the_norm_keeps_kind_convention_eps_and_scale() -> None:
    spec = NormSpec(kind="dyt", eps=0.3, gain="1+w", cast="late", scale=0.6)
    plan = NormPlan.parse("pre", 3)
    layers = [plan.layer(0), (plan.attention, type(plan.attention)(pre=spec, alpha=0.5)), plan.layer(2)]
    model = tiny_model(2, norm_plan=plan.with_layers(layers))
    moved = move(model, "layers.1.feed_forward.pre_norm", "out")
    assert moved.config.norm_plan.layer(1)[1] == type(plan.attention)(out=spec, alpha=0.5)
    assert moved.get_parameter("layers.1.feed_forward.out_norm.alpha") is model.get_parameter(
        "layers.1.feed_forward.pre_norm.alpha"
    )
    assert_formula(moved)


REFUSALS: list[tuple[str, str, str, str]] = [
    ("peri", "layers.1.attention.pre_norm", "out", r"layers\.1\.attention\.out_norm is taken, .*pre_norm cannot move"),
    ("pre", "layers.2.attention.pre_norm", "pre", r"layers\.2\.attention\.pre_norm is already in the slot pre"),
    ("peri", "layers.*.*.*", "post", r"layers\.0\.attention\.post_norm is taken"),  # two norms into one slot
    ("pre", "layers.0.feed_forward.pre_norm", "mid", r"layers\.0\.feed_forward\.pre_norm is 48 wide .* mid .* 80"),
    (
        "pre+qk",
        "layers.1.attention.q_norm",
        "pre",
        r"layers\.1\.attention\.q_norm norms a projection and cannot be moved; leave q, k, v, gate, up",
    ),
    ("pre", "norm", "out", "norm is outside the layers"),
    ("pre+embed", "embed_norm", "out", "embed_norm is outside the layers"),
    ("pre", "layers.0.*.pre_norm", "q", "unknown slot to move to 'q'; known: pre, mid, out, post"),
    ("pre", "layers.0.*.pre_norm", "out_norm", "unknown slot to move to 'out_norm'; known: pre, mid, out, post"),
    ("pre", "layers.7.*.pre_norm", "out", "matches no norm"),
]


@pytest.mark.parametrize(("plan", "pattern", "to", "message"), REFUSALS)
def test_what_cannot_move_is_refused_by_its_path(plan: str, pattern: str, to: str, message: str) -> None:
    model = tiny_model(1, norm_plan=plan)
    before = model(TOKENS)
    with pytest.raises(RequestError, match=message) as refused:
        move(model, pattern, to)
    assert "\n" not in str(refused.value)
    assert same_bits(model(TOKENS), before)


def test_dtype_and_rotary_tables_stay() -> None:
    model = tiny_model(1, torch.bfloat16)
    model.rope.inv_freq = model.rope.inv_freq * 0.5
    moved = move(model, "layers.*.*.pre_norm", "out")
    assert {parameter.dtype for parameter in moved.parameters()} == {torch.bfloat16}
    assert same_bits(move(moved, "layers.*.*.out_norm", "pre")(TOKENS), model(TOKENS))


def test_the_default_checkpoint_there_and_back(smollm2_dir: Path) -> None:
    model = Llama.from_pretrained(smollm2_dir)
    tokens = random_tokens(1, 24, 49_152)
    before = model(tokens)
    there = move(model, "layers.*.feed_forward.pre_norm", "out")
    assert isinstance(there.config, LlamaConfig)
    assert not torch.equal(there(tokens), before)
    back = move(there, "layers.*.feed_forward.out_norm", "pre")
    assert back.config == model.config
    assert same_bits(back(tokens), before)


def test_norms_with_a_bias_move_and_those_of_parallel_branches_do_not() -> None:
    plan = NormPlan.parse("pre", 3).with_norms(kind="layer", cast="late", bias=True, gain="1+w")
    model = tiny_model(2, norm_plan=plan, gated_mlp=False, activation="relu2", embedding_scale=2.0)
    moved = move(model, "layers.*.*.pre_norm", "out")
    assert_formula(moved)
    assert moved.layers[0].attention.out_norm.bias is model.layers[0].attention.pre_norm.bias
    assert same_bits(move(moved, "layers.*.*.out_norm", "pre")(TOKENS), model(TOKENS))
    shared = tiny_model(2, norm_plan="parallel")
    with pytest.raises(RequestError, match=r"layers\.1\.attention\.pre_norm is read by both branches"):
        move(shared, "layers.1.attention.pre_norm", "out")
    gemma3 = NormPlan.parse("peri+qk", 3).with_norms(gain="1+w", cast="late")
    rotation = {"sliding_window": 5, "sliding_layers": (0, 2), "sliding_rope_theta": 100.0, "attention_softcap": 3.0}
    assert_formula(move(tiny_model(2, norm_plan=gemma3, **rotation), "layers.*.feed_forward.pre_norm", "post"))
