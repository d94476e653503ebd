"""A model that is more than its config and parameters is neither saved nor rebuilt; any other is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llama_mini import Llama, lab
from llama_mini.errors import RequestError
from llama_mini.model.linear import Linear
from llama_mini.model.norm_slots import NormSpec
from llama_mini.model.rope_scaling import DynamicScaling, YarnScaling
from tests.tiny_models import random_tokens, tiny_model

TEXT = random_tokens(2, 9)


def eps(model: Llama) -> None:
    model.layers[1].attention.pre_norm.eps = 0.5


def alpha(model: Llama) -> None:
    model.layers[1].feed_forward.alpha = 0.5


def n_heads(model: Llama) -> None:
    model.layers[0].attention.n_kv_heads = 1


def swap_norm(model: Llama) -> None:
    model.norm = nn.Identity()


def add_norm(model: Llama) -> None:
    model.layers[0].feed_forward.out_norm = NormSpec().build(48, 1e-5)


def subclass(model: Llama) -> None:
    class Int8(Linear):
        pass

    model.layers[2].attention.k_proj.__class__ = Int8


def add_module(model: Llama) -> None:
    model.layers[2].attention.o_proj.lora = Linear(48, 48)


def add_bias(model: Llama) -> None:
    model.layers[2].attention.o_proj.bias = nn.Parameter(torch.ones(48))


def reshape(model: Llama) -> None:
    model.lm_head.weight = nn.Parameter(torch.ones(101, 48))


def hook(model: Llama) -> None:
    model.layers[1].register_forward_hook(lambda _m, _x, y: 2 * y)


def pre_hook(model: Llama) -> None:
    model.layers[1].register_forward_pre_hook(lambda _m, x: (2 * x[0], *x[1:]))


def hook_of_the_model(model: Llama) -> None:
    model.register_forward_hook(lambda _m, _x, y: 2 * y)


def own_forward(model: Llama) -> None:
    model.layers[0].attention.q_proj.forward = lambda x: torch.zeros_like(x)  # type: ignore[method-assign]


CHANGES: dict[Callable[[Llama], None], str] = {
    eps: r"layers\.1\.attention\.pre_norm .*\(eps: 0\.5, not 1e-05\)",
    alpha: r"layers\.1\.feed_forward .*\(alpha: 0\.5, not 1\.0\)",
    n_heads: r"layers\.0\.attention .*\(n_kv_heads: 1, not 2\)",
    swap_norm: r"norm .*\(class: Identity, not RMSNorm\)",
    add_norm: r"layers\.0\.feed_forward\.out_norm .*\(class: RMSNorm, not Identity\)",
    subclass: r"layers\.2\.attention\.k_proj .*\(class: Int8, not Linear\)",
    add_module: r"layers\.2\.attention\.o_proj\.lora .*\(class: Linear, not 'nothing'\)",
    add_bias: r"layers\.2\.attention\.o_proj .*\(parameters: .*'bias': \(48,\).*, not .*\)",
    reshape: r"lm_head .*\(parameters: \{'weight': \(101, 48\)\}, not \{'weight': \(97, 48\)\}\)",
    hook: r"layers\.1 .*\(hooked: True, not False\)",
    pre_hook: r"layers\.1 .*\(hooked: True, not False\)",
    hook_of_the_model: r"the model .*\(hooked: True, not False\)",
    own_forward: r"layers\.0\.attention\.q_proj .*\(hooked: True, not False\)",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_its_config_does_not_describe_is_refused(change: Callable[[Llama], None], tmp_path: Path) -> None:
    model = tiny_model()
    change(model)
    ways: list[Callable[[], Any]] = [
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: lab.move(model, "layers.0.attention.pre_norm", "out"),
        lambda: lab.fold(model),
        lambda: lab.center(model),
    ]
    for way in ways:
        with pytest.raises(RequestError, match=f"^{CHANGES[change]}: leave the edit, remove the hook") as refused:
            way()
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_what_a_checkpoint_can_hold_is_saved(tmp_path: Path) -> None:
    """Other weights, gradients and modes, names that a caller puts on the model, and plans of no family."""
    model = tiny_model(norm_plan="sub+qk", tie_word_embeddings=True).requires_grad_(True).train()
    model.name_or_path = "mine"
    model.layers[0].attention.pre_norm.note = 3
    with torch.no_grad():
        model.norm.weight.mul_(2)
    removed = model.layers[0].register_forward_hook(lambda _m, _x, y: 2 * y)
    removed.remove()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(Llama.from_pretrained(tmp_path / "saved")(TEXT), model(TEXT))


def test_parameters_of_several_dtypes_come_back_as_they_were(tmp_path: Path) -> None:
    model = tiny_model(1, torch.bfloat16)
    model.norm.weight.data, model.layers[0].attention.o_proj.weight.data = torch.rand(48), torch.rand(48, 48).half()
    model.save_pretrained(tmp_path / "saved")
    again = Llama.from_pretrained(tmp_path / "saved")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.float()), name


def half_the_frequencies(model: Llama) -> None:
    model.rope.inv_freq = model.rope.inv_freq / 2


def other_theta(model: Llama) -> None:
    model.config = replace(model.config, rope_theta=5.0)


def scaling_of_long_texts(model: Llama) -> None:
    model.config = replace(model.config, rope_scaling=DynamicScaling(factor=2.0))


def magnitude(model: Llama) -> None:
    scaling = YarnScaling(factor=2.0, original_max_seq_len=16)
    model.rope.config = replace(model.config, rope_scaling=scaling)


def nan(model: Llama) -> None:
    model.layers[1].attention.pre_norm.weight.data[3] = torch.nan


def meta(model: Llama) -> None:
    model.to("meta")


ROPE = "rope is not what the model's config describes .*: write the change as rope_theta or rope_scaling"
UNSAVEABLE: dict[Callable[[Llama], Any], str] = {
    **dict.fromkeys((half_the_frequencies, other_theta, scaling_of_long_texts, magnitude), ROPE),
    nan: r"layers\.1\.attention\.pre_norm\.weight holds NaN or infinity",
    meta: r"tok_embeddings\.weight is on the meta device and has no values",
}


@pytest.mark.parametrize("change", UNSAVEABLE)
def test_what_a_checkpoint_cannot_hold_is_not_saved(change: Callable[[Llama], Any], tmp_path: Path) -> None:
    model = tiny_model()
    change(model)
    with pytest.raises(RequestError, match=f"^{UNSAVEABLE[change]}"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def tie(model: Llama) -> None:
    model.lm_head.weight = model.tok_embeddings.weight


def share_a_matrix_and_a_norm(model: Llama) -> None:
    first, second = model.layers[0], model.layers[1]
    second.attention.q_proj.weight = first.attention.q_proj.weight
    second.attention.pre_norm.weight = first.feed_forward.pre_norm.weight


def share_a_layer(model: Llama) -> None:
    model.layers[1] = model.layers[0]


@pytest.mark.parametrize("share", [tie, share_a_matrix_and_a_norm, share_a_layer])
def test_shared_parameters_work_under_each_of_their_names(share: Callable[[Llama], None], tmp_path: Path) -> None:
    model = tiny_model()
    share(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(Llama.from_pretrained(tmp_path / "saved")(TEXT), model(TEXT))
    moved = lab.move(model, "layers.0.attention.pre_norm", "out")
    assert torch.equal(lab.move(moved, "layers.0.attention.out_norm", "pre")(TEXT), model(TEXT))
    torch.testing.assert_close(lab.fold(model)(TEXT), model(TEXT), rtol=1e-4, atol=1e-4)
