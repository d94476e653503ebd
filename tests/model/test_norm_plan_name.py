"""A plan is known by the text that makes it."""

from itertools import product

import pytest

from llama_mini.errors import ConfigError
from llama_mini.model.norm_plan import PRESETS, NormPlan

LAYERS = 6
TEXTS = [
    "".join(parts)
    for parts in product((*PRESETS, "mix(0.5)"), ("", "+qk", "+qk:full"), ("", "+embed"), ("", "-final"))
    if not (parts[0] in ("post", "deep") and parts[-1])
]


@pytest.mark.parametrize("cast", ["early", "late"])
def test_every_preset_and_suffix_is_known_by_its_text(cast: str) -> None:
    for text in TEXTS:
        found = NormPlan.parse(text, LAYERS).with_norms(cast=cast).name(LAYERS)
        assert found == text + (", each rounded last" if cast == "late" and text != "none-final" else "")


def test_the_presets_that_have_no_final_norm_cannot_lose_it() -> None:
    for text in ("post-final", "deep-final"):
        with pytest.raises(ConfigError, match="-final changes nothing here"):
            NormPlan.parse(text, LAYERS)


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
