"""Norm plans as data: what each preset builds, JSON both ways, overrides, and every refusal."""

import json
from typing import Any

import pytest

from llama_mini.errors import ConfigError
from llama_mini.model.norm import RMSNorm
from llama_mini.model.norm_plan import NormPlan, Override
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from tests.tiny_models import TINY, tiny_model

N_LAYERS = 4
LLAMA = ("pre", "pre", "norm")
PLACES = {  # preset: slots of attention, slots of feed-forward, norms outside the layers
    "pre": LLAMA,
    "post": ("post", "post", ""),
    "peri": ("pre out", "pre out", "norm"),
    "out": ("out", "out", "norm"),
    "none": ("", "", "norm"),
    "deep": ("post", "post", ""),
    "lns": LLAMA,
    "sub": ("pre mid", "pre mid", "norm"),
    "normformer": ("pre out", "pre mid", "norm"),
    "parallel": ("pre", "", "norm"),
    "simple": ("q k v out", "gate up out", "norm"),
    "pre+qk": ("pre q k", "pre", "norm"),
    "out+qk:full": ("out q k", "out", "norm"),
    "peri+qk+embed": ("pre out q k", "pre out", "norm embed_norm"),
    "post+embed": ("post", "post", "embed_norm"),
    "pre-final": ("pre", "pre", ""),
    "none-final": ("", "", ""),
    "sub+embed+qk:full-final": ("pre mid q k", "pre mid", "embed_norm"),
    " out ": ("out", "out", "norm"),
}
MIXES = {"mix(0)": 0, "mix(.25)": 1, "mix(0.6)": 2, "mix(1)": 4, "mix(1.)": 4, "mix( .5 )+qk": 2}  # layers with post
EVERY_PLAN = [*PLACES, *MIXES]


def norm_keys(plan: str) -> set[str]:
    model = tiny_model(n_layers=N_LAYERS, norm_plan=plan)
    return {name for name in model.state_dict() if "norm" in name}


def expected_keys(attention: str, feed_forward: str, layers: range) -> set[str]:
    branches = {"attention": attention.split(), "feed_forward": feed_forward.split()}
    return {f"layers.{i}.{b}.{slot}_norm.weight" for i in layers for b, slots in branches.items() for slot in slots}


@pytest.mark.parametrize("plan", PLACES)
def test_a_preset_has_norms_in_its_places_and_nowhere_else(plan: str) -> None:
    attention, feed_forward, outside = PLACES[plan]
    expected = expected_keys(attention, feed_forward, range(N_LAYERS)) | {f"{n}.weight" for n in outside.split()}
    assert norm_keys(plan) == expected


@pytest.mark.parametrize("plan", MIXES)
def test_a_mix_has_post_norms_in_its_first_layers(plan: str) -> None:
    n_post, qk = MIXES[plan], " q k" if "qk" in plan else ""
    expected = expected_keys("post" + qk, "post", range(n_post)) | {"norm.weight"}
    assert norm_keys(plan) == expected | expected_keys("pre" + qk, "pre", range(n_post, N_LAYERS))


@pytest.mark.parametrize(
    ("plan", "sizes"),
    [
        ("sub+qk", {"q": 8, "k": 8, "mid": 6 * 8, "pre": 48}),
        ("peri+qk:full", {"q": 6 * 8, "k": 2 * 8, "out": 48}),
        ("simple", {"q": 6 * 8, "k": 2 * 8, "v": 2 * 8, "out": 48}),
    ],
)
def test_a_norm_is_as_wide_as_what_it_sees(plan: str, sizes: dict[str, int]) -> None:
    state = tiny_model(norm_plan=plan).state_dict()
    assert {slot: len(state[f"layers.1.attention.{slot}_norm.weight"]) for slot in sizes} == sizes
    for slot in {"sub": ["mid"], "simple": ["gate", "up"]}.get(plan.partition("+")[0], []):
        assert len(state[f"layers.1.feed_forward.{slot}_norm.weight"]) == TINY["hidden_dim"]


@pytest.mark.parametrize("n_layers", [1, 12, 100])
def test_deep_scales_its_residual_by_the_fourth_root_of_twice_the_depth(n_layers: int) -> None:
    plan = NormPlan.parse("deep", n_layers)
    for branch in (b for i in range(n_layers) for b in plan.layer(i)):
        assert branch.alpha**4 == pytest.approx(2 * n_layers, rel=1e-14)
        assert branch.beta == 1


def test_lns_divides_by_the_root_of_the_layers_number_from_one() -> None:
    model = tiny_model(n_layers=N_LAYERS, norm_plan="lns")
    norms = {name: m.scale for name, m in model.named_modules() if isinstance(m, RMSNorm)}
    expected = {f"layers.{i}.{b}.pre_norm": (i + 1) ** -0.5 for i in range(4) for b in ("attention", "feed_forward")}
    assert norms == pytest.approx(expected | {"norm": 1.0}, rel=1e-15)


def test_presets_use_the_configs_eps_and_llamas_conventions() -> None:
    model = tiny_model(norm_plan="peri+qk+embed", norm_eps=3e-4)
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    assert {(m.eps, m.gain, m.cast, m.scale) for m in norms} == {(3e-4, "w", "early", 1.0)}
    own = NormPlan(attention=BranchPlan(pre=NormSpec(eps=0.0)), final=NormSpec())
    model = tiny_model(norm_plan=own, norm_eps=3e-4)
    assert {m.eps for m in model.layers.modules() if isinstance(m, RMSNorm)} == {0.0}  # zero is a value, not an absence


@pytest.mark.parametrize("plan", EVERY_PLAN)
def test_a_plan_survives_json(plan: str) -> None:
    made = NormPlan.parse(plan, N_LAYERS)
    assert NormPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_the_json_of_a_plan_says_only_what_is_there() -> None:
    rms = {"kind": "rms"}
    assert NormPlan.parse("out+qk:full", 2).to_dict() == {
        "attention": {"q": rms | {"view": "full"}, "k": rms | {"view": "full"}, "out": rms},
        "feed_forward": {"out": rms},
        "embed": None,
        "final": rms,
    }
    assert NormPlan.parse("mix(.5)", 4).to_dict()["overrides"] == [
        {"layers": "0-1", "attention": {"post": rms}, "feed_forward": {"post": rms}}
    ]


def test_a_plan_of_nothing_but_defaults_has_a_final_norm_alone() -> None:
    assert NormPlan.from_dict({}) == NormPlan.parse("none", 3) == NormPlan()


def test_every_setting_survives_json() -> None:
    spec = NormSpec(eps=1e-7, gain="1+w", cast="late", scale=-0.5)
    seen = NormSpec(gain="none", view="full", kind="layer", cast="late", bias=True)
    plan = NormPlan(
        attention=BranchPlan(pre=spec, q=seen, k=NormSpec(), v=seen, mid=spec, out=spec, post=spec, alpha=2, beta=0.1),
        feed_forward=BranchPlan(gate=spec, up=NormSpec(kind="layer"), mid=spec, alpha=0.0),
        embed=spec,
        final=None,
        parallel=True,
        overrides=(
            Override(first=0, last=2, attention=BranchPlan()),
            Override(first=1, last=1, feed_forward=BranchPlan()),
        ),
    )
    assert NormPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_of_two_overrides_the_later_one_holds() -> None:
    rms = NormSpec()
    pre, post, out = BranchPlan(pre=rms), BranchPlan(post=rms), BranchPlan(out=rms)
    plan = NormPlan.from_dict(
        {
            "attention": {"pre": {}},
            "feed_forward": {"pre": {}},
            "overrides": [
                {"layers": "1-3", "attention": {"post": {}}, "feed_forward": {"post": {}}},
                {"layers": "2", "attention": {"out": {}}},
            ],
        }
    )
    assert [plan.layer(i) for i in range(5)] == [(pre, pre), (post, post), (out, post), (post, post), (pre, pre)]
    keys = set(tiny_model(n_layers=5, norm_plan=plan).state_dict())
    assert {k for k in keys if k.startswith("layers.2.") and "norm" in k} == {
        "layers.2.attention.out_norm.weight",
        "layers.2.feed_forward.post_norm.weight",
    }


def test_layers_make_the_shortest_plan() -> None:
    pre, out = BranchPlan(pre=NormSpec()), BranchPlan(out=NormSpec())
    start = NormPlan.parse("post+embed", 6)
    pairs = [(pre, pre), (out, pre), (out, pre), (out, out), (pre, out), (pre, pre)]
    plan = start.with_layers(pairs)
    assert [plan.layer(i) for i in range(6)] == pairs
    assert (plan.attention, plan.feed_forward) == (pre, pre)  # of attention's three and three, the last one's
    assert (plan.embed, plan.final) == (start.embed, None)
    assert plan.overrides == (
        Override(first=1, last=2, attention=out),
        Override(first=3, last=3, attention=out, feed_forward=out),
        Override(first=4, last=4, feed_forward=out),
    )
    apart = start.with_layers([(pre, pre), (out, pre), (pre, pre), (out, pre), (pre, pre), (pre, pre)])
    assert [(o.first, o.last) for o in apart.overrides] == [(1, 1), (3, 3)]  # alike, but no neighbours
    assert start.with_layers([(out, pre)] * 6).overrides == ()
    assert start.with_layers([(out, out)] * 4 + [(pre, pre)] * 2).overrides == (
        Override(first=4, last=5, attention=pre, feed_forward=pre),
    )


@pytest.mark.parametrize("plan", EVERY_PLAN)
def test_the_same_layers_make_an_equal_plan(plan: str) -> None:
    made = NormPlan.parse(plan, N_LAYERS)
    layers = [made.layer(i) for i in range(N_LAYERS)]
    again = made.with_layers(layers)
    assert [again.layer(i) for i in range(N_LAYERS)] == layers
    start = NormPlan(embed=made.embed, final=made.final, parallel=made.parallel)
    assert start.with_layers(layers) == again == made


def test_a_mix_of_one_kind_is_that_kind() -> None:
    for n_layers in (1, 2, 7):
        assert NormPlan.parse("mix(0)", n_layers) == NormPlan.parse("pre", n_layers)
        assert NormPlan.parse("mix(1)-final", n_layers) == NormPlan.parse("post", n_layers)


NAN, INF = float("nan"), float("inf")
BAD_TEXTS = {
    "": "unknown preset ''.*known: pre, post",
    "Pre": "unknown preset 'Pre'",
    "prepost": "unknown preset 'prepost'.*known: pre, post",
    "mix": "unknown preset 'mix'",
    "mix(nan)": r"unknown preset 'mix\(nan\)'",
    "mix(1.01)": r"'mix\(1.01\)': the share of layers must lie between 0 and 1",
    "pre+kq": r"unknown suffix '\+kq'; known: \+qk, \+qk:full, \+embed, -final",
    "pre+": r"unknown suffix '\+'",
    "pre+final": r"unknown suffix '\+final'",
    "out+qk:half": r"unknown suffix '\+qk:half'",
    "pre+qk+qk:full": "q and k already have a norm",
    "simple+qk": "q and k already have a norm",
    "pre+embed+embed": r"\+embed changes nothing",
    "post-final": "-final changes nothing",
    "deep-final": "-final changes nothing",
}


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_a_text_that_is_no_plan_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=BAD_TEXTS[text]):
        NormPlan.parse(text, N_LAYERS)


BAD_PLANS: list[tuple[Any, str]] = [
    (None, "expected an object, found None"),
    ([], "expected an object"),
    ({"atention": {}}, "unknown atention; known: attention, embed"),
    ({"attention": None}, "attention: expected an object"),
    ({"attention": {"before": {}}}, "attention: unknown before; known: .*pre"),
    ({"attention": {"pre": True}}, "attention.pre: expected an object, found True"),
    ({"attention": {"pre": {"epsilon": 1}}}, "attention.pre: unknown epsilon; known: .*eps"),
    ({"feed_forward": {"q": {}}}, "slot q exists in attention only"),
    ({"feed_forward": {"v": {}}}, "slot v exists in attention only"),
    ({"attention": {"gate": {}}}, "slot gate exists in feed_forward only, not in attention"),
    ({"attention": {"up": {}}}, "slot up exists in feed_forward only"),
    ({"feed_forward": {"up": {"view": "full"}}}, "view='full' .* not to up"),
    ({"attention": {"out": {"view": "full"}}}, "view='full' belongs to the slots q, k and v, not to out"),
    ({"final": {"view": "full"}}, "view='full' .* not to final"),
    ({"embed": {"view": "full"}}, "view='full' .* not to embed"),
    ({"attention": {"q": {"view": "heads"}}}, "unknown norm plan view 'heads'; known: head, full"),
    ({"embed": {"kind": "batch"}}, "unknown kind 'batch'; known: rms, layer, scale, l2, prms, crms"),
    ({"embed": {"gain": "w+1"}}, r"unknown RMSNorm gain 'w\+1'; known: w, 1\+w, none"),
    ({"embed": {"cast": "never"}}, "unknown RMSNorm cast 'never'; known: early, late"),
    *(({"embed": {"eps": bad}}, "eps must be a finite number") for bad in (-1e-9, NAN, INF, "0", True)),
    *(({"embed": {"scale": bad}}, "scale must be a finite number") for bad in (NAN, -INF, "1", None, False)),
    *(({"attention": {"alpha": bad}}, "alpha must be a finite number") for bad in (NAN, INF, "1", None, True)),
    ({"feed_forward": {"beta": NAN}}, "beta must be a finite number"),
    ({"overrides": {}}, "overrides must be a list"),
    ({"overrides": [5]}, "an override needs layers such as"),
    ({"overrides": [{"attention": {}}]}, "an override needs layers such as '0-2' or '5'"),
    *(({"overrides": [{"layers": bad}]}, "layers such as") for bad in (3, "", "-1", "1-", "a", "0-2-4", "9" * 50)),
    ({"overrides": [{"layers": "3-1"}]}, "layers 3-1 is not a range"),
    ({"overrides": [{"layers": "1", "final": {}}]}, "layers 1: unknown final"),
    ({"overrides": [{"layers": "1", "first": 1}]}, "layers 1: unknown first"),
    ({"overrides": [{"layers": "1", "feed_forward": {"k": {}}}]}, "slot k exists in attention only"),
]


@pytest.mark.parametrize(("data", "message"), BAD_PLANS, ids=lambda value: str(value)[:60])
def test_data_that_is_no_plan_is_refused_by_name(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NormPlan.from_dict(data)


@pytest.mark.parametrize("name", ["eps", "scale", "alpha"])
def test_a_number_of_five_thousand_digits_is_refused_like_any_other(name: str) -> None:
    huge: Any = 10**5000  # too large for a float, and for Python to print
    data = {"alpha": huge} if name == "alpha" else {"pre": {name: huge}}
    with pytest.raises(ConfigError, match=f"{name} must be a finite number"):
        NormPlan.from_dict({"attention": data})


def test_an_override_of_a_layer_that_the_model_lacks_is_refused() -> None:
    plan = NormPlan.from_dict({"overrides": [{"layers": "1-3", "attention": {}}]})
    assert tiny_model(n_layers=4, norm_plan=plan)
    with pytest.raises(ConfigError, match="override of layers 1-3 in a model of 3 layers"):
        tiny_model(n_layers=3, norm_plan=plan)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        (BranchPlan, {"pre": "rms"}, "slot pre takes a NormSpec or None, not 'rms'"),
        (NormPlan, {"embed": "rms"}, "embed"),
        (NormPlan, {"attention": None}, "attention"),
        (NormPlan, {"overrides": ({"layers": "0"},)}, "override"),
        (Override, {"first": "0", "last": 1}, "override of layers"),
        (Override, {"first": 0, "last": 1.5}, "override of layers 0-1.5"),
        (Override, {"first": 0, "last": 0, "attention": "pre"}, "attention"),
    ],
)
def test_a_part_of_another_type_is_refused_by_name(part: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        part(**settings)
