"""A whole step in one operator: the same bits as module by module, and none where a module must run."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llama_mini.engine.next_tokens import likeliest_tokens
from llama_mini.model.kv_cache import KVCache
from llama_mini.model.llama import Layers, Llama
from llama_mini.model.norm import LayerNorm
from llama_mini.optimize import optimize
from llama_mini.optimize.fused_step import TABLE_STEP, FusedStep
from tests.optimize.twins import same_bits
from tests.tiny_models import random_tokens, tiny_model

LENGTHS = (7, 1, 20)


def fast(quantize: str | None = "int8", dtype: torch.dtype = torch.bfloat16, **changes: object) -> Llama:
    return copy.deepcopy(_fast(quantize, dtype, tuple(changes.items())))


@functools.cache
def _fast(quantize: str | None, dtype: torch.dtype, changes: tuple[tuple[str, object], ...]) -> Llama:
    return optimize(tiny_model(dtype=dtype, **dict(changes)), quantize)


def filled(model: Llama) -> KVCache:
    cache = model.new_cache(len(LENGTHS), 32)
    for row, length in enumerate(LENGTHS):
        model.hidden(random_tokens(1, length, seed=row), cache.row(row))
    return cache


@torch.inference_mode()
def both(model: Llama, step: FusedStep, steps: int = 2) -> tuple[bool, bool]:
    """Whether the operator computed steps, and whether their logits, choices and caches are those of the modules."""
    one, other, tokens = filled(model), filled(model), random_tokens(len(LENGTHS), 1, seed=8)
    for _ in range(steps):
        found, logits = step(tokens, one), model(tokens, other)[:, -1]
        if found is None:
            return False, same_bits(one._k, filled(model)._k)
        best = likeliest_tokens(logits)
        equal = same_bits(found[0], logits) and found[1].tolist() == best and one.lengths == other.lengths
        if not (equal and same_bits(one._k, other._k) and same_bits(one._v, other._v)):
            return True, False
        tokens = torch.tensor(best)[:, None]
    return True, True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_it_has_the_bits_of_the_modules(quantize: str | None, dtype: torch.dtype, tied: bool) -> None:
    model = fast(quantize, dtype, tie_word_embeddings=tied)
    assert both(model, FusedStep(model)) == (True, True)


SETTINGS = [
    {"unrotated_layers": (1,)},
    {"rotary_dim": 4},
    {"sliding_window": 5, "sliding_layers": (1,), "sliding_rope_theta": 9.0},
    {"attention_scale": 0.3, "attention_softcap": 2.0, "activation": "gelu_tanh"},
    {"embedding_scale": 9.3},
    {"logit_scale": 0.3},
    {"logit_softcap": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_that_the_operators_have(settings: dict[str, object]) -> None:
    model = fast(**settings)
    assert both(model, FusedStep(model)) == (True, True)


@pytest.mark.parametrize("plan", ["pre", "pre+qk", "none", "peri", "out+qk:full"])
def test_plans_whose_norms_operators_compute(plan: str) -> None:
    model = fast(norm_plan=plan)
    assert both(model, FusedStep(model)) == (True, True)
    model.norm = nn.Identity()  # the operator ends with a norm
    assert both(model, FusedStep(model)) == (False, True)


def test_the_lowest_of_equally_likely_tokens_is_chosen() -> None:
    model = fast(None, tie_word_embeddings=False)
    step, cache = FusedStep(model), filled(model)
    model.lm_head.linear.weight.zero_()
    model.lm_head.linear.weight[[41, 5, 90]] = model.norm.weight  # three rows alike
    found = step(random_tokens(3, 1), cache)
    assert found is not None
    assert all(token in (0, 5) for token in found[1].tolist())
    assert found[1].tolist() == found[0].argmax(1).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 95, 96])
def test_a_row_that_is_not_finite_has_no_token_and_the_others_keep_theirs(value: float, at: int) -> None:
    model = fast(None, torch.float32, tie_word_embeddings=False)
    tokens = torch.tensor([[3], [4], [5]])
    whole, spoiled = FusedStep(model)(tokens, filled(model)), copy.deepcopy(model)
    spoiled.lm_head.linear.weight[at] = value
    assert whole is not None
    found = FusedStep(spoiled)(tokens, filled(spoiled))
    assert found is not None
    assert found[1].tolist() == [-1, -1, -1]
    spoiled = copy.deepcopy(model)
    spoiled.tok_embeddings.weight[4] = value
    found = FusedStep(spoiled)(tokens, filled(spoiled))
    assert found is not None
    assert found[1].tolist() == [whole[1][0].item(), -1, whole[1][2].item()]
    assert same_bits(found[0][::2], whole[0][::2])


HOOKED = ["norm", "tok_embeddings", "lm_head", "rope", "embed_norm", "layers.1.attention.q_norm", "layers.2"]


@pytest.mark.parametrize("path", HOOKED)
def test_it_steps_aside_while_a_module_is_hooked(path: str) -> None:
    model, seen = fast(tie_word_embeddings=False), list[nn.Module]()
    step = FusedStep(model)
    hook = model.get_submodule(path).register_forward_hook(lambda module, *_: seen.append(module))
    assert both(model, step) == (False, True)
    hook.remove()
    assert both(model, step) == (True, True)


def swap_norm(model: Llama) -> None:
    model.norm = LayerNorm(model.config.dim).to(torch.bfloat16)


def swap_block_norm(model: Llama) -> None:
    model.layers[1].feed_forward.pre_norm = nn.Identity()


def swap_head(model: Llama) -> None:
    model.lm_head = nn.Linear(model.config.dim, model.config.vocab_size, bias=False).to(torch.bfloat16)


def swap_layers(model: Llama) -> None:
    model.layers = Layers(model.layers)


def train_norm(model: Llama) -> None:
    model.norm.weight.requires_grad_()


@pytest.mark.parametrize("change", [swap_norm, swap_head, swap_layers])
def test_it_steps_aside_for_a_module_that_was_swapped(change: Callable[[Llama], None]) -> None:
    model = fast(tie_word_embeddings=False)
    step, before = FusedStep(model), dict(model._modules)
    change(model)
    assert step(random_tokens(3, 1), filled(model)) is None
    model._modules.update(before)
    assert both(model, step) == (True, True)


def test_it_steps_aside_for_a_norm_that_was_swapped_in_a_layer() -> None:
    model = fast()
    swap_block_norm(model)
    assert both(model, FusedStep(model)) == (False, True)


def test_it_steps_aside_where_a_gradient_is_needed() -> None:
    model = fast()
    step, cache = FusedStep(model), filled(model)
    train_norm(model)
    assert step(random_tokens(3, 1), cache) is None
    with torch.no_grad():
        assert step(random_tokens(3, 1), cache) is not None


def test_edits_count_at_the_next_step() -> None:
    model = fast(None, torch.float32)
    step = FusedStep(model)
    assert both(model, step) == (True, True)
    model.norm.weight.mul_(1.5)
    assert both(model, step) == (True, True)
    model.norm.eps = 0.5
    assert both(model, step) == (True, True)
    model.rope.inv_freq.mul_(0.5)
    assert both(model, step) == (True, True)
    model.to(torch.bfloat16)
    assert both(model, step) == (True, True)


def test_the_table_of_the_rotation_grows() -> None:
    model = fast(None, torch.float32, max_seq_len=2 * TABLE_STEP + 50)
    step, cache = FusedStep(model), model.new_cache(1, 2 * TABLE_STEP + 16)
    with torch.inference_mode():
        for length in (TABLE_STEP - 1, TABLE_STEP, 2 * TABLE_STEP):
            cache.truncate(0, 0)
            cache.advance(length)
            tokens, other = random_tokens(1, 1), copy.deepcopy(cache)
            found = step(tokens, cache)
            assert found is not None
            assert same_bits(found[0], model(tokens, other)[:, -1])


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_the_plain_model_and_one_without_operators_have_no_such_step(kernels: str) -> None:
    model: Tensor | Llama = tiny_model()
    assert isinstance(model, Llama)
    if kernels == "off":
        model = optimize(model, kernels="off")
    assert FusedStep(model)(random_tokens(3, 1), filled(model)) is None
