"""Learned α and β of residual branches: parameters that start at the plan's values, train, and survive the disk."""

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

from llama_mini import LLM
from llama_mini.errors import ConfigError
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from llama_mini.optimize import optimize
from tests import reference
from tests.oracles import same_bits
from tests.tiny_models import TINY, random_tokens, tiny_model

TOKENS = random_tokens(2, 11)
LEARNED = BranchPlan(pre=NormSpec(), alpha=1, beta=0.0, learned=True)  # SkipInit: each branch begins at nothing
PLAN = NormPlan(attention=LEARNED, feed_forward=BranchPlan(pre=NormSpec(), out=NormSpec(), beta=0.5))


def test_they_are_parameters_that_start_at_the_plan() -> None:
    model = Llama(LlamaConfig(**TINY, norm_plan=PLAN))
    scales = {name: p.tolist() for name, p in model.named_parameters() if name.endswith(("alpha", "beta"))}
    assert scales == {
        f"layers.{i}.attention.{name}": value for i in range(3) for name, value in (("alpha", [1.0]), ("beta", [0.0]))
    }
    fixed = NormPlan(attention=BranchPlan(pre=NormSpec(), beta=0.0), feed_forward=PLAN.feed_forward)
    plain = Llama(LlamaConfig(**TINY, norm_plan=fixed))
    plain.load_state_dict(model.state_dict(), strict=False)
    assert same_bits(model(TOKENS).detach(), plain(TOKENS).detach())
    assert NormPlan.from_dict(PLAN.to_dict()) == PLAN
    assert PLAN.to_dict()["attention"]["learned"] is True


def test_values_of_any_size_follow_the_formula(tmp_path: Path) -> None:
    model = tiny_model(3, norm_plan=PLAN)
    state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    expected = reference.logits(model.config, state, TOKENS.numpy())
    np.testing.assert_allclose(model(TOKENS).numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    model.save_pretrained(tmp_path / "saved")
    again = Llama.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    assert same_bits(again(TOKENS), model(TOKENS))


def test_both_train_even_from_one_and_zero() -> None:
    model = Llama(LlamaConfig(**TINY, norm_plan=PLAN))
    model(TOKENS).square().mean().backward()
    for layer in model.layers:
        for name in ("alpha", "beta"):
            gradient = layer.attention.get_parameter(name).grad
            assert gradient is not None
            assert gradient.abs() > 0


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_the_fast_model_computes_them(kernels: str) -> None:
    plain = tiny_model(3, norm_plan=PLAN)
    expected = plain(TOKENS)
    fast = optimize(tiny_model(3, norm_plan=PLAN), kernels=kernels)
    torch.testing.assert_close(fast(TOKENS), expected, rtol=0, atol=2e-5)
    cache = fast.new_cache(2, 11)
    steps = torch.cat([fast(TOKENS[:, i : i + 1], cache) for i in range(11)], dim=1)
    torch.testing.assert_close(steps, expected, rtol=0, atol=2e-5)
    for name in ("alpha", "beta"):
        fast.layers[0].attention.get_parameter(name).fill_(1.0)  # the operator that knows no scales must not step in
        plain.layers[0].attention.get_parameter(name).fill_(1.0)
    torch.testing.assert_close(fast(TOKENS), plain(TOKENS), rtol=0, atol=2e-5)


def test_a_checkpoint_with_them_generates(tiny_dir: Path, tmp_path: Path) -> None:
    source = Llama.from_pretrained(tiny_dir, "float32")
    plan = NormPlan(attention=BranchPlan(pre=NormSpec(), learned=True), feed_forward=BranchPlan(pre=NormSpec()))
    model = Llama(replace(source.config, norm_plan=plan)).requires_grad_(False)
    model.load_state_dict(source.state_dict(), strict=False)
    model.save_pretrained(tmp_path / "learned")
    copytree(tiny_dir, tmp_path / "learned", dirs_exist_ok=True, ignore=lambda *_: ["config.json", "model.safetensors"])
    ours, theirs = (
        LLM(path, dtype="float32").generate("Alice", max_tokens=8)[0] for path in (tmp_path / "learned", tiny_dir)
    )
    assert ours.token_ids == theirs.token_ids


def test_what_is_no_flag() -> None:
    with pytest.raises(ConfigError, match="norm plan: learned must be true or false, not 1"):
        BranchPlan(learned=1)  # type: ignore[arg-type]
