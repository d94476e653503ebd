"""A plan is known by the text that makes it; plans of papers and families."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from llama_mini.checkpoint.families import FAMILIES
from llama_mini.errors import ConfigError
from llama_mini.model.norm_plan import PRESETS, NormPlan, Override
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from tests.tiny_models import tiny_model

LAYERS = 6
TEXTS = [
    "".join(parts)
    for parts in product((*PRESETS, "mix(0.5)"), ("", "+qk", "+qk:full"), ("", "+embed"), ("", "-final"))
    if not (parts[0] in ("post", "deep", "keel") and parts[-1]) and not (parts[0] == "simple" and parts[1])
]


@pytest.mark.parametrize("cast", ["early", "late"])
def test_every_preset_and_suffix_is_known_by_its_text(cast: str) -> None:
    for text in TEXTS:
        found = NormPlan.parse(text, LAYERS).with_norms(cast=cast).name(LAYERS)
        assert found == text + (", each rounded last" if cast == "late" and text != "none-final" else "")


def test_the_presets_that_have_no_final_norm_cannot_lose_it() -> None:
    for text in ("post-final", "deep-final", "keel-final"):
        with pytest.raises(ConfigError, match="-final changes nothing here"):
            NormPlan.parse(text, LAYERS)


@pytest.mark.parametrize(
    ("text", "settings", "name"),
    [
        ("peri+qk", {"gain": "1+w", "cast": "late"}, "peri+qk, each with gain 1+w, rounded last"),  # Gemma 3
        ("pre", {"kind": "layer", "gain": "none"}, "pre, each of kind layer, without a gain"),  # OLMo 1
        (
            "pre",
            {"kind": "layer", "gain": "1+w", "bias": True, "cast": "late"},
            "pre, each of kind layer, with gain 1+w, with a bias, rounded last",  # Nemotron
        ),
        ("parallel", {"kind": "layer", "cast": "late"}, "parallel, each of kind layer, rounded last"),  # Cohere 2
    ],
    ids=["gemma3", "olmo", "nemotron", "cohere2"],
)
def test_what_all_norms_share_is_said_in_words(text: str, settings: dict[str, Any], name: str) -> None:
    plan = NormPlan.parse(text, LAYERS).with_norms(**settings)
    assert plan.name(LAYERS) == name
    layers = [(replace(a, beta=0.22), replace(f, beta=0.22)) for a, f in map(plan.layer, range(LAYERS))]
    scaled = plan.with_layers(layers).name(LAYERS)
    assert scaled == f"{text}, each branch times 0.22, " + name.removeprefix(f"{text}, ")
    one = replace(layers[0][0], beta=1.0)
    assert plan.with_layers([(one, layers[0][1]), *layers[1:]]).name(LAYERS).startswith("{'attention'")


def test_groups_and_powers_are_their_json() -> None:
    for settings in ({"kind": "group", "groups": 4}, {"kind": "power", "power": 0.5}):
        assert NormPlan.parse("pre", LAYERS).with_norms(**settings).name(LAYERS).startswith("{'attention'")


def test_a_bias_in_some_norms_alone_is_its_json() -> None:
    plan = NormPlan.parse("pre", LAYERS).with_norms(kind="layer", cast="late")
    mixed = replace(plan, final=NormSpec(kind="layer", cast="late", bias=True))
    assert NormPlan.from_dict(eval(mixed.name(LAYERS))) == mixed


def test_any_other_plan_is_its_json() -> None:
    pre, sub = (NormPlan.parse(text, LAYERS) for text in ("pre", "sub"))
    mixed = pre.with_layers([sub.layer(0), *(pre.layer(i) for i in range(1, LAYERS))])
    assert mixed.name(LAYERS) == str(mixed.to_dict())
    assert NormPlan.from_dict(eval(mixed.name(LAYERS))) == mixed


@pytest.mark.parametrize("text", ["pre", "lns", "mix(0.5)+qk", "peri+embed", "none"])
def test_a_cast_reaches_every_norm_and_comes_back(text: str) -> None:
    early = NormPlan.parse(text, LAYERS)
    late = early.with_norms(cast="late")
    specs = [spec for i in range(LAYERS) for branch in late.layer(i) for spec in vars(branch).values()]
    casts = [spec.cast for spec in (*specs, late.embed, late.final) if hasattr(spec, "cast")]
    assert casts == ["late"] * len(casts)
    assert late.with_norms(cast="early") == early


def test_the_presets_of_families_are_their_plans() -> None:
    for text, model_type in (("olmo3", "olmo3"), ("gemma3", "gemma3_text")):
        assert NormPlan.parse(text, LAYERS) == FAMILIES[model_type].norms
    late = NormPlan.parse("gemma3+embed", LAYERS)
    assert late.embed == NormSpec(gain="1+w", cast="late")
    with pytest.raises(ConfigError, match="'gemma3\\+qk': q and k already have a norm"):
        NormPlan.parse("gemma3+qk", LAYERS)


def test_simple_norms_the_output_of_every_matrix_and_nothing_else() -> None:
    """As in the authors' code: over whole projections, with the norm before the head. Without v it is no preset."""
    plan, rms, full = NormPlan.parse("simple", LAYERS), NormSpec(), NormSpec(view="full")
    attention, feed_forward = BranchPlan(q=full, k=full, v=full, out=rms), BranchPlan(gate=rms, up=rms, out=rms)
    assert plan == NormPlan(attention=attention, feed_forward=feed_forward, final=rms)
    other = replace(plan, attention=replace(attention, v=None))
    assert other.name(LAYERS) == str(other.to_dict())


def test_keel_is_post_behind_a_scaled_stream_but_in_the_first_layer() -> None:
    """x <- LN(αx + F(LN(x))), α the number of branches; the first attention and feed-forward are pre-norm."""
    plan, rms = NormPlan.parse("keel", LAYERS), NormSpec()
    keel = BranchPlan(pre=rms, post=rms, alpha=12.0)
    assert [plan.layer(i) for i in range(LAYERS)] == [(BranchPlan(pre=rms),) * 2, *[(keel, keel)] * 5]
    assert (plan.embed, plan.final) == (None, None)


def test_the_norm_of_a_gate_needs_a_gate() -> None:
    up = NormPlan(feed_forward=BranchPlan(up=NormSpec()))
    assert "layers.2.feed_forward.up_norm.weight" in tiny_model(norm_plan=up, gated_mlp=False).state_dict()
    gate = NormPlan(overrides=(Override(first=2, last=2, feed_forward=BranchPlan(gate=NormSpec())),))
    with pytest.raises(ConfigError, match="slot gate holds a norm, but gated_mlp is False: there is no gate to norm"):
        tiny_model(norm_plan=gate, gated_mlp=False)
    assert tiny_model(norm_plan=gate)


def test_a_plan_is_a_value() -> None:
    assert len({NormPlan.parse(text, 4) for text in ("mix(.25)", "mix(.26)", "mix(.5)", "pre")}) == 3
    with pytest.raises(AttributeError):
        NormPlan().final = None  # type: ignore[misc]
