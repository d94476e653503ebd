"""Addresses of norms, and the patterns that pick them."""

import pytest
from torch import nn

from llama_mini.errors import RequestError
from llama_mini.lab.paths import select, slots
from llama_mini.model.norm import Norm
from tests.tiny_models import random_tokens, tiny_model

MODEL = tiny_model(n_layers=12)
PRE = [f"layers.{i}.{branch}.pre_norm" for i in range(12) for branch in ("attention", "feed_forward")]


@pytest.mark.parametrize("plan", ["pre", "peri+qk+embed", "sub", "post", "none-final"])
def test_slots_are_all_norms_and_identities_of_the_tree(plan: str) -> None:
    model = tiny_model(norm_plan=plan)
    tree = {n: m for n, m in model.named_modules() if isinstance(m, Norm | nn.Identity)}
    found = slots(model)
    assert found.keys() == tree.keys()
    assert all(found[path] is tree[path] for path in tree)


def test_slots_stand_in_the_order_of_the_forward_pass() -> None:
    model = tiny_model(norm_plan="peri+qk+embed")
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, path=path: ran.append(path)) for path, module in slots(model).items()
    ]
    model(random_tokens(1, 3))
    for hook in hooks:
        hook.remove()
    assert ran == list(slots(model))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (None, [*PRE, "norm"]),
        ("norm", ["norm"]),
        ("*", ["norm"]),  # within its segment
        ("layers.*.*.pre_norm", PRE),
        ("layers.2-10.attention.pre_norm", [f"layers.{i}.attention.pre_norm" for i in range(2, 11)]),  # by number
        ("layers.1?.feed_forward.*", ["layers.10.feed_forward.pre_norm", "layers.11.feed_forward.pre_norm"]),
        ("layers.[35].att*.pre_*", ["layers.3.attention.pre_norm", "layers.5.attention.pre_norm"]),
        (["norm", "layers.0.*.*", "layers.0.attention.pre_norm"], [*PRE[:2], "norm"]),  # sorted, once each
        ("norm, layers.0.*.*,layers.0.attention.pre_norm", [*PRE[:2], "norm"]),
        (["norm,layers.[0,1].attention.*", "layers.1-1.*.*"], [PRE[0], PRE[2], PRE[3], "norm"]),
    ],
)
def test_patterns(pattern: str | list[str] | None, expected: list[str]) -> None:
    assert select(MODEL, pattern) == expected


def test_empty_slots_only_if_asked_for() -> None:
    assert select(MODEL, "layers.0.feed_forward.*") == ["layers.0.feed_forward.pre_norm"]
    names = [f"{slot}_norm" for slot in ("pre", "gate", "up", "mid", "out", "post")]
    assert select(MODEL, "layers.0.feed_forward.*", empty=True) == [f"layers.0.feed_forward.{name}" for name in names]
    assert len(select(MODEL, None, empty=True)) == 12 * 13 + 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.3-1.*.pre_norm", r"'layers.3-1.\*.pre_norm' matches no norm; the norms are layers.0.attention"),
        ("layers.0-99.*.pre_norm", r"'layers.99.\*.pre_norm' matches no norm"),  # a part of the range is there
        ("layers.*", "matches no norm; .* more; . stands for one part between dots$"),
        ("layers.9", r"matches no norm; .* more$"),
        (
            "layers.*.attention.q_norm",
            "only empty slots, such as layers.0.attention.q_norm, which insert .* fill; the norms are layers.0",
        ),
        (["norm", "norn"], "'norn' matches no norm"),
        ("norm,norn,layers.0.*.*", "^'norn' matches no norm; the norms are layers.0.attention.pre_norm, "),
        ("norm,", "'' matches no norm"),
        ("", "'' matches no norm"),
        (7, "a pattern must be text or a list of texts, not 7"),
        ([7], "a pattern must be text"),
    ],
)
def test_what_matches_nothing_is_refused(pattern: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        select(MODEL, pattern)


def test_a_message_is_short_and_of_one_line() -> None:
    with pytest.raises(RequestError) as error:
        select(MODEL, "layers\n" * 10_000)
    assert len(str(error.value)) < 1500
    assert "\n" not in str(error.value)
