"""Gradients along the stream, against torch.autograd through the whole model, and float64 NumPy at the norms."""

from typing import Any
from weakref import finalize

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_mini import Llama, NormPlan, lab
from llama_mini.errors import NumericalError
from llama_mini.lab.paths import slots
from llama_mini.model.norm import NORMS, Norm
from llama_mini.optimize.fuse import optimize
from tests.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(2, 19)
PLANS = ("pre+qk", "peri", "out+qk:full+embed", "post", "sub", "deep", "parallel", "none-final")


def by_autograd(model: Llama, tokens: Tensor, real: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean loss at every norm's input, output and gain, and along the stream, by one backward."""
    points: dict[str, Tensor] = {}

    def at(module: torch.nn.Module, name: str, output: bool) -> None:
        def see(_: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
            points[name] = y if output else args[0]

        module.register_forward_hook(see)

    norms = {path: module for path, module in slots(model).items() if isinstance(module, Norm)}
    for path, norm in norms.items():
        at(norm, f"{path}.output", True)
    for i, layer in enumerate(model.layers):
        at(layer, f"layers.{i}.resid_pre", False)
        at(layer.attention, f"layers.{i}.resid_mid", True)
        at(layer, f"layers.{i}.resid_post", True)
    gains = {f"{path}.gain": norm.weight for path, norm in norms.items() if norm.weight is not None}
    model.requires_grad_()
    logits = model(tokens)[:, :-1]
    loss = F.cross_entropy(logits[real[:, 1:]], tokens[:, 1:][real[:, 1:]])
    wanted = points | gains
    found = torch.autograd.grad(loss, list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


def rms(x: Tensor, keep: int = 0) -> np.ndarray:
    return np.sqrt((x.detach().double().numpy() ** 2).mean(tuple(range(keep, x.ndim))))


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_as_one_backward_pass_through_the_whole_model(plan: str) -> None:
    settings: dict[str, Any] = {
        "norm_plan": plan,
        "attention_softcap": 2.0,
        "sliding_window": 7,
        "sliding_layers": (1,),
    }
    found = lab.gradients(tiny_model(2, torch.float64, **settings), TOKENS)
    exact = by_autograd(tiny_model(2, torch.float64, **settings), TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    rows = {row.point: row for row in found}
    assert {point for point in rows if not point.endswith(".input")} == set(exact)
    for point, gradient in exact.items():
        row = rows[point]
        assert row.rms == pytest.approx(rms(gradient), rel=1e-5), point
        if not point.endswith("gain"):
            tokens = rms(gradient, 2)
            np.testing.assert_allclose(found.by_token[point], tokens, rtol=1e-5, err_msg=point)
            assert row.first == pytest.approx(np.median(tokens[:, 0]), rel=1e-5)
            assert row.median == pytest.approx(np.median(tokens[:, 1:]), rel=1e-5)


def test_the_norms_jacobian_in_float64() -> None:
    """What arrives at the input is (I - x̂x̂ᵀ/d) diag(g)/r times what reaches the output. A token's part of the gain's
    gradient is what reaches the output times x̂."""
    model = tiny_model(4, torch.float64, norm_eps=1e-2)
    path = "layers.1.feed_forward.pre_norm"
    found = lab.gradients(model, TOKENS)
    twin = tiny_model(4, torch.float64, norm_eps=1e-2)
    at_output = by_autograd(twin, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))[f"{path}.output"].numpy()
    x, gain = lab.capture(model, TOKENS)[path].x.numpy(), model.get_submodule(path).weight.numpy()
    r = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2)
    normed = x / r
    jacobian = gain[:, None] / r[..., None] * (np.eye(48) - normed[..., :, None] * normed[..., None, :] / 48)
    at_input = np.einsum("btij,bti->btj", jacobian, at_output)
    np.testing.assert_allclose(found.by_token[f"{path}.input"], rms(torch.tensor(at_input), 2), rtol=1e-5)
    parts = torch.tensor(at_output * normed)
    np.testing.assert_allclose(found.by_token[f"{path}.gain"], rms(parts, 2), rtol=1e-5)
    rows = {row.point: row for row in found}
    assert rows[f"{path}.gain"].rms == pytest.approx(rms(parts.sum((0, 1))), rel=1e-5)
    assert rows[f"{path}.gain"].first == pytest.approx(np.median(rms(parts, 2)[:, 0]), rel=1e-5)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("gain", ["w", "1+w"])
def test_the_gain_of_every_kind(kind: str, gain: str) -> None:
    # A scale of 1 would let the values of a kind without a statistic explode.
    spec = {"kind": kind, "gain": gain, "scale": 0.2, "cast": "late"} | ({"bias": True} if kind == "layer" else {})
    heads = {"kind": kind, "gain": gain, "cast": "late"}
    branch = {"pre": spec, "q": heads, "k": heads}
    plan = NormPlan.from_dict({"attention": branch, "feed_forward": {"pre": spec}, "final": spec})
    exact = by_autograd(tiny_model(2, torch.float64, norm_plan=plan), TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    for row in lab.gradients(tiny_model(2, torch.float64, norm_plan=plan), TOKENS):
        if not row.point.endswith("input"):
            assert row.rms == pytest.approx(rms(exact[row.point]), rel=1e-5), row.point


def test_texts_of_different_lengths_and_their_padding() -> None:
    texts = [TOKENS[0, :8], TOKENS[1]]
    found = lab.gradients(tiny_model(3), texts)
    real = torch.tensor([[True] * 8 + [False] * 11, [True] * 19])
    exact = by_autograd(tiny_model(3), TOKENS * real, real)
    for row in found:
        assert torch.equal(found.by_token[row.point].isnan(), ~real)
        if row.point in exact and not row.point.endswith("gain"):
            tokens = rms(exact[row.point], 2)
            np.testing.assert_allclose(found.by_token[row.point][real], tokens[real.numpy()], rtol=1e-3)
            assert row.median == pytest.approx(np.median(tokens[:, 1:][real.numpy()[:, 1:]]), rel=1e-3)


def test_the_model_is_as_before_wherever_it_is_called() -> None:
    model = tiny_model(norm_plan="pre+qk")
    with torch.inference_mode():
        inside = lab.gradients(model, TOKENS)
    assert inside.to_json() == lab.gradients(model, TOKENS).to_json()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_edit_is_differentiated() -> None:
    model, path = tiny_model(), "layers.1.attention.pre_norm"
    with lab.edit(model, {path: {"freeze": "token"}}, TOKENS):  # the same outputs, but no gradient through the root
        frozen = {row.point: row for row in lab.gradients(model, TOKENS)}
    plain = {row.point: row for row in lab.gradients(model, TOKENS)}
    assert frozen[f"{path}.output"].rms == pytest.approx(plain[f"{path}.output"].rms, rel=1e-4)
    assert frozen[f"{path}.input"].rms > 1.001 * plain[f"{path}.input"].rms


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_an_optimized_model_is_differentiated_too(quantize: str | None) -> None:
    fast = optimize(tiny_model(dim=96, hidden_dim=96), quantize)
    plain = tiny_model(dim=96, hidden_dim=96)
    for layer, twin in zip(fast.layers, plain.layers, strict=True):
        attention, feed_forward = layer.attention, layer.feed_forward
        packed = [
            (attention.qkv_proj, ("q_proj", "k_proj", "v_proj"), twin.attention),
            (attention.o_proj, ("o_proj",), twin.attention),
        ]
        packed += [(feed_forward.gate_up_proj, ("gate_proj", "up_proj"), twin.feed_forward)]
        packed += [(feed_forward.down_proj, ("down_proj",), twin.feed_forward)]
        for linear, names, branch in packed:
            for name, weight in zip(names, linear.split(linear.lookup(torch.arange(linear.rows)).T), strict=True):
                getattr(branch, name).weight.copy_(weight.T)
    head = fast.lm_head.linear
    plain.lm_head.weight.copy_(head.lookup(torch.arange(97)))
    for row, exact in zip(lab.gradients(fast, TOKENS), lab.gradients(plain, TOKENS), strict=True):
        assert (row.point, row.rms, row.first) == (
            exact.point,
            pytest.approx(exact.rms, rel=2e-3),
            pytest.approx(exact.first, rel=2e-3),
        )


def test_a_loss_that_is_not_finite_names_the_module() -> None:
    model = tiny_model()
    model.layers[1].feed_forward.down_proj.weight[3, 4] = torch.nan
    with pytest.raises(NumericalError, match=r"the loss is nan.* first at layers\.1\.feed_forward\.down_proj, token 0"):
        lab.gradients(model, TOKENS)


def test_memory_does_not_grow_with_the_number_of_layers() -> None:
    """Bytes that autograd holds at once: those of the graph of one layer."""

    def most(n_layers: int) -> int:
        held = peak = 0

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal held, peak
                self.tensor = tensor
                held += tensor.nbytes
                peak = max(peak, held)
                finalize(self, free, tensor.nbytes)

        def free(n: int) -> None:
            nonlocal held
            held -= n

        model = tiny_model(n_layers=n_layers)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            lab.gradients(model, TOKENS)
        return peak

    assert most(9) == most(2) > 0


@pytest.mark.slow
def test_the_sink_is_one_of_gradients_too_and_the_norm_damps_it(smollm2: Llama, alice: list[int]) -> None:
    """From layer 12 on a gradient at the first token's normed row is 10 times that of others, since later tokens attend
    to it. The norm divides it by the massive row's root mean square: it is a fraction of the others' at the stream."""
    rows = {row.point: row for row in lab.gradients(smollm2, alice[:96])}
    for i in range(12, 30):
        output, inside = (rows[f"layers.{i}.attention.pre_norm.{part}"] for part in ("output", "input"))
        assert output.first > 8 * output.median
        assert inside.first < output.first / output.median * inside.median / 8
