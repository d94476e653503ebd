"""Making a model fast: what is replaced, what stays the same object, and what becomes of a fast model that is moved."""

import copy
import pickle

import pytest
import torch

from llama_mini import Llama
from llama_mini.checkpoint.weight_formats import uniform_formats
from llama_mini.errors import RequestError
from llama_mini.optimize import fuse, is_fused, optimize
from llama_mini.optimize.fused_layers import FusedLayers
from llama_mini.optimize.packed_linear import PackedLinear
from llama_mini.optimize.quantized_linear import QuantizedLinear
from tests.optimize.conftest import DTYPES, FORMATS, KERNELS, Seen, error, fast_of, plain_of, prompts, steps
from tests.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(1, 24)


def run(model: Llama) -> torch.Tensor:
    """Logits of a prompt and of two steps, through a cache of the model's own."""
    cache = model.new_cache(1, 32)
    return torch.cat([*prompts(model, cache, (24,)), steps(model, cache, 2)[0]])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("tied", [False, True])
def test_norms_are_adopted_and_matrices_replaced(tied: bool, kernels: str) -> None:
    model = tiny_model(norm_plan="pre+qk+embed", tie_word_embeddings=tied)
    norms = {name: m for name, m in model.named_modules() if name.endswith("norm")}
    assert not is_fused(model)
    fast = optimize(model, "int4", kernels)
    assert fast is model
    assert is_fused(fast)
    assert all(fast.get_submodule(name) is norm for name, norm in norms.items())
    assert isinstance(fast.layers, FusedLayers) is (kernels == "auto")
    kinds = {m.name for m in fast.modules() if isinstance(m, PackedLinear)}
    assert kinds == {"int4", "int8"}
    assert not hasattr(fast.layers[0].attention, "v_proj")
    with pytest.raises(AttributeError, match=r"has q_proj within qkv_proj, o_proj; Llama\.from_pretrained gives the"):
        _ = fast.layers[0].attention.q_proj
    left = {name for name, p in fast.named_parameters() if "norm" not in name}
    assert left == (set() if tied else {"tok_embeddings.weight"})
    assert (fast.dtype, fast.device, fast.training) == (torch.float32, torch.device("cpu"), False)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_of_a_plain_model_has_one_place(tied: bool, quantize: str | None) -> None:
    model = tiny_model(qkv_bias=True, o_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    plain = {name for name, _ in model.named_parameters()}
    sinks = fuse(model, torch.float32, torch.device("cpu"), uniform_formats(model.config, quantize))
    left = {name for name, _ in model.named_parameters()}
    assert left | set(sinks) == plain
    assert not left & set(sinks)
    places = [(id(sink.linear), sink.part, sink.bias) for sink in sinks.values()]
    assert len(set(places)) == len(places)
    assert {sink.linear.name for name, sink in sinks.items() if name.startswith("layers")} == {quantize or "float"}


def test_a_model_is_made_fast_on_the_meta_device_without_its_numbers() -> None:
    with torch.device("meta"):
        model = Llama(tiny_model().config)
    fuse(model, torch.bfloat16, torch.device("cpu"), uniform_formats(model.config, "int8"))
    assert {m.tensors[0].device.type for m in model.modules() if isinstance(m, PackedLinear)} == {"cpu"}
    assert model.norm.weight.is_meta


def test_a_fast_model_is_not_made_fast_twice() -> None:
    with pytest.raises(RequestError, match="optimized already: load the plain model"):
        optimize(fast_of(tiny_model()), "int8")


@pytest.mark.parametrize("quantize", ["int3", "", 8, True])
def test_an_unknown_format_leaves_the_model_as_it_was(quantize: object) -> None:
    model = tiny_model()
    with pytest.raises(RequestError, match=r"^unknown quantize .*; known: int8, int4$"):
        optimize(model, quantize)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"^unknown kernels 'fast'; known: auto, off$"):
        optimize(model, None, "fast")
    assert not is_fused(model)


@pytest.mark.parametrize("kernels", KERNELS)
def test_operators_run_only_where_they_are_wanted(kernels: str) -> None:
    fast = fast_of(tiny_model(), "int8", kernels)
    with Seen() as seen:
        run(fast)
    assert bool(seen.names) is (kernels == "auto")


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_dtype_without_operators_runs_on_pytorchs(dtype: torch.dtype, quantize: str | None) -> None:
    plain = tiny_model(1, dtype)
    fast = fast_of(plain, quantize)
    with Seen() as seen:
        found = run(fast)
    assert seen.names == []
    assert error(found, run(plain_of(fast, plain))) < {torch.float16: 1e-2, torch.float64: 1e-12}[dtype]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fast_model_is_moved_to_another_dtype(
    dtype: torch.dtype, tied: bool, quantize: str | None, kernels: str
) -> None:
    original = fast_of(tiny_model(2, dtype, tie_word_embeddings=tied, qkv_bias=True), quantize, kernels)
    before = run(original)
    for to in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        fast = copy.deepcopy(original)
        assert fast.to(to) is fast
        assert fast.dtype == fast.new_cache(1, 1)._k.dtype == to
        found = run(fast)
        assert torch.equal(found, before) if dtype == to else error(found, before) < 0.1
        assert all(map(torch.equal, stored(fast), stored(original)))


def stored(model: Llama) -> list[torch.Tensor]:
    """Every tensor of quantized weights or scales."""
    return [tensor for m in model.modules() if isinstance(m, QuantizedLinear) for tensor in m.tensors]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("quantize", FORMATS)
def test_a_copy_is_a_model_of_its_own(quantize: str | None, kernels: str) -> None:
    fast = fast_of(tiny_model(3, norm_plan="pre+qk"), quantize, kernels)
    before = run(fast)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(run(twin), before)
        for i in range(3):
            twin.layers[i].attention.qkv_proj.tensors[-1].zero_()
            twin.layers[i].feed_forward.pre_norm.register_forward_hook(lambda *_: None)
        assert not torch.equal(run(twin), before)
        assert torch.equal(run(fast), before)
