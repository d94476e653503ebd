"""The loss, its gradients, the cost and the steps of healing, each against float64 written out with torch alone."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_mini.lab import distillation as module
from llama_mini.lab import edit, score
from llama_mini.lab.distillation import LR, Distillation, State
from llama_mini.lab.students import as_wide, student_of, trained
from llama_mini.model.llama import Llama
from tests.tiny_models import random_tokens, tiny_model

ROWS, HELD = random_tokens(12, 20), [*random_tokens(3, 24, seed=9)]
CASES = {  # the model, and the change
    "tied": ({"tie_word_embeddings": True}, {"layers.1.feed_forward.pre_norm": {"kind": "layer"}}),
    "capped": ({"logit_softcap": 3.0, "logit_scale": 0.7}, {"layers.2.attention.pre_norm": {"gain": "one"}}),
    "frozen": ({}, {"layers.1-2.*.pre_norm": {"freeze": "quadratic", "keep": ["massive", {"ids": [5]}]}}),
    "embedding": ({"norm_plan": "pre+embed"}, {"embed_norm": {"gain": "mean"}}),
    "final": ({}, {"norm": {"kind": "dyt"}}),
    "windows": ({"sliding_window": 5, "sliding_layers": (0, 2)}, {"layers.1.*.pre_norm": {"skip": True}}),
}


def prepared(case: str, dtype: torch.dtype = torch.float64) -> tuple[Llama, Llama, Distillation]:
    """The untouched model, the student, and what trains it."""
    settings, change = CASES[case]
    model = as_wide(tiny_model(1, dtype, **settings), {})
    student, first = student_of(model, change, ROWS[:4])
    return model, student, Distillation(model, first, ROWS, HELD, seed=3)


def kl(model: Llama, student: Llama, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        log_p = model(tokens).log_softmax(-1)
    return F.kl_div(student(tokens).log_softmax(-1), log_p, log_target=True, reduction="sum") / tokens.numel()


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_two_whole_models(case: str) -> None:
    model, student, run = prepared(case)
    found = run.gradients(student, ROWS[:2])
    gradients = {name: p.grad for name, p in trained(student).items()}
    student.zero_grad()
    expected = kl(model, student, ROWS[:2])
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-10)
    assert found > 1e-6
    for name, parameter in trained(student).items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-12)
    by_hand = model(ROWS[:2]).numpy(), student(ROWS[:2]).detach().numpy()
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in by_hand)
    assert found == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-8)


def test_only_what_is_above_the_change_is_trained() -> None:
    expected = {"tied": {"1", "2", "norm"}, "capped": {"2", "norm"}, "final": {"norm"}}
    for case, parts in expected.items():
        names = [name.split(".") for name in trained(prepared(case)[1])]
        assert {name[1] if name[0] == "layers" else name[0] for name in names} == parts
    names = set(trained(prepared("embedding")[1]))
    assert "embed_norm.weight" in names
    assert "layers.0.attention.q_proj.weight" in names
    assert not names & {"tok_embeddings.weight", "lm_head.weight"}


def test_bfloat16_autocast_is_close() -> None:
    _, student, run = prepared("windows", torch.float32)
    _, exact_student, exact = prepared("windows")
    assert run.gradients(student, ROWS[:2]) == pytest.approx(exact.gradients(exact_student, ROWS[:2]), rel=0.03)
    parameters = zip(trained(student).values(), trained(exact_student).values(), strict=True)
    errors = [float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in parameters]
    assert max(errors) < 0.1


@pytest.mark.parametrize("case", ["tied", "frozen", "embedding"])
@pytest.mark.parametrize("texts", [3, 9])  # from eight on, the standard error is over texts
def test_the_cost_is_that_of_score(case: str, texts: int) -> None:
    model, student, run = prepared(case, torch.float32)
    run.held_out = [*random_tokens(texts - 1, 24, seed=9), random_tokens(1, 7, seed=8)[0]]
    found = run.cost(student, State(0, False, step=3, seconds=1.5))
    base = score(model, run.held_out)
    with edit(model, CASES[case][1], ROWS[:4]) as changed:
        expected = score(changed, run.held_out, against=base)
    for name in ("dloss", "se", "kl", "top1"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6)
    assert (found.tokens, found.seconds, found.error) == (3 * 2 * 20, 1.5, None)


def test_steps_equal_a_training_written_out() -> None:
    model, student, run = prepared("windows")
    _, twin, _ = prepared("windows")
    state = run.train(student, State(9, False, curve=[{}]), [], lambda state: None, "heal")
    generator = torch.Generator().manual_seed(3)
    order = torch.cat([torch.randperm(12, generator=generator) for _ in range(2)])  # 18 rows of 12
    parameters = list(trained(twin).values())
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(9):
        kl(model, twin, ROWS[order[2 * step : 2 * step + 2]]).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
        rate = LR * min(1, (step + 1) / 5) * (1 - step / 9)
        for i, p in enumerate(parameters):
            g = p.grad / max(1, norm + 1e-6)
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g * g
            p.data -= rate * (m[i] / (1 - 0.9 ** (step + 1))) / ((v[i] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        twin.zero_grad()
    for ours, theirs in zip(trained(student).values(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert state.step == 9
    assert [point["tokens"] for point in state.curve[1:]] == [40 * step for step in (1, 3, 4, 5, 6, 8, 9)]


def test_steps_fit_the_time_that_the_middle_of_three_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, student, run = prepared("tied")
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    clock = iter([0.0, 9.0, 10.0, 10.5, 20.0, 20.25])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    assert run.steps_in(student, 2.0) == 240
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in student.named_parameters())


def test_what_is_not_finite_is_named() -> None:
    model = as_wide(tiny_model(1), {})
    student, first = student_of(model, {"layers.1.attention.pre_norm": {"gain": 1e38}}, ROWS)
    found = Distillation(model, first, ROWS, HELD, 0).cost(student, State(0, False))
    assert math.isnan(found.kl)
    assert "first at layers.1.attention" in found.error
