"""The decode path pays nothing for the lab: neither an import, nor an operator, nor anything left behind, nor time."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from llama_mini import KVCache, Llama, lab
from llama_mini.errors import RequestError
from tests.oracles import same_bits
from tests.tiny_models import random_tokens, tiny_model

TEXT = random_tokens(1, 21)
PLAN = "peri+qk+embed"
DECODE = """
import sys
import torch
from llama_mini import LLM, SamplingParams

llm = LLM(sys.argv[1], dtype="float32")
llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
cache = llm.model.new_cache(1, 16)
for ids in ([1, 2, 3], [4]):
    llm.model(torch.tensor([ids]), cache)
"""
LAB_MODULES = """
print(*(name for name in sys.modules if name.startswith("llama_mini.lab")))
"""


def test_decoding_does_not_import_the_lab(tiny_dir: Path) -> None:
    script = DECODE + LAB_MODULES + "from llama_mini.lab import capture" + LAB_MODULES
    command = [sys.executable, "-c", script, str(tiny_dir)]
    before, after = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert before == ""
    assert "llama_mini.lab.recording" in after.split()


class Operators(TorchDispatchMode):
    """Every operator that runs, with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.seen.append((str(func), *(tuple(x.shape) for x in args if isinstance(x, Tensor))))
        return func(*args, **kwargs or {})


def prefilled(model: Llama) -> KVCache:
    cache = model.new_cache(1, 64)
    model(TEXT, cache)
    return cache


def decode(model: Llama) -> tuple[list[Any], Tensor]:
    """The operators of one cached step, and its logits."""
    cache = prefilled(model)
    with Operators() as operators:
        logits = model(TEXT[:, -1:], cache)
    return operators.seen, logits


def tree(model: Llama) -> list[Any]:
    """All that decides what a step runs: modules in their places, their settings, tensors and hooks."""
    rows: list[Any] = []
    for name, module in model.named_modules():
        held = vars(module)
        hooks = {key: list(value.items()) for key, value in held.items() if "hooks" in key}
        settings = {key: value for key, value in held.items() if not isinstance(value, dict)}
        tensors = {key: (id(value), value.requires_grad) for key, value in module.named_parameters(recurse=False)}
        tensors |= {key: (id(value), value.requires_grad) for key, value in module.named_buffers(recurse=False)}
        rows.append((name, type(module), module, list(held), hooks, settings, tensors))
    return rows


def edit(model: Llama) -> None:
    settings = {
        "layers.0.*.pre_norm": {"kind": "layer", "gain": 2.0},
        "norm": {"skip": True},
        "*.*.*.q_norm": {"eps": 1.0},
    }
    with lab.edit(model, settings):
        assert decode(model)[0] != decode(tiny_model(norm_plan=PLAN))[0]


def edit_that_raises(model: Llama) -> None:
    with pytest.raises(ZeroDivisionError), lab.edit(model, {"*.*.*.out_norm": {"gain": "mean"}}):
        _ = 1 / 0


def edit_whose_step_raises(model: Llama) -> None:
    frozen = {"layers.*.*.pre_norm": {"freeze": "token"}}
    with pytest.raises(RequestError, match="frozen by token was measured"), lab.edit(model, frozen, TEXT):
        decode(model)


def capture_that_raises(model: Any) -> None:
    narrow = model.layers[1].attention.pre_norm
    narrow.dim = 5
    with pytest.raises(ValueError, match="over 5 elements"):
        lab.capture(model, TEXT)
    narrow.dim = 48


USES: dict[str, Callable[[Llama], Any]] = {
    "capture": lambda model: lab.capture(model, TEXT),
    "capture that raises": capture_that_raises,
    "edit": edit,
    "edit that raises": edit_that_raises,
    "edit whose step raises": edit_whose_step_raises,
    "ablate": lambda model: lab.ablate(model, TEXT),
    "ablate into empty slots": lambda model: lab.ablate(model, TEXT, kind="layer"),
    "skip_layers": lambda model: lab.skip_layers(model, TEXT),
    "score": lambda model: lab.score(model, TEXT),
}


def all_uses(model: Llama) -> None:
    for use in USES.values():
        use(model)


@pytest.mark.parametrize("use", [*USES.values(), all_uses], ids=[*USES, "all in a row"])
def test_a_step_runs_the_same_operators_in_the_same_modules_after_the_lab(use: Callable[[Llama], Any]) -> None:
    model = tiny_model(norm_plan=PLAN)
    (operators, logits), before = decode(model), tree(model)
    assert len(operators) > 100
    use(model)
    assert tree(model) == before
    after, again = decode(model)
    assert after == operators
    assert same_bits(again, logits)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not any(value for key, value in vars(module).items() if "hooks" in key and key.startswith("_"))


def hook(model: Any) -> None:
    model.layers[1].feed_forward.pre_norm.register_forward_hook(lambda *_: None)


def module_of_the_same_kind(model: Any) -> None:
    model.layers[2].attention.out_norm = tiny_model(norm_plan=PLAN).get_submodule("layers.2.attention.out_norm")


def method(model: Any) -> None:
    model.norm.forward = model.norm.forward


def setting(model: Any) -> None:
    model.norm.eps *= 2


def parameter(model: Any) -> None:
    model.norm.weight = Parameter(model.norm.weight.clone(), requires_grad=False)


@pytest.mark.parametrize("change", [hook, module_of_the_same_kind, method, setting, parameter])
def test_the_tree_shows_what_is_left_behind(change: Callable[[Llama], None]) -> None:
    model = tiny_model(norm_plan=PLAN)
    before = tree(model)
    assert tree(model) == before
    change(model)
    assert tree(model) != before


def test_the_operators_show_what_is_left_behind() -> None:
    model = tiny_model(norm_plan=PLAN)
    operators, _ = decode(model)
    model.norm.register_forward_hook(lambda _, __, y: y * 1)
    assert len(decode(model)[0]) == len(operators) + 1


@pytest.mark.clock
def test_a_step_takes_no_longer_after_the_lab() -> None:
    models = tiny_model(norm_plan=PLAN), tiny_model(norm_plan=PLAN)
    all_uses(models[1])
    caches = [prefilled(model) for model in models]
    times: tuple[list[float], list[float]] = [], []
    turns = [*zip(models, caches, times, strict=True)]
    for i in range(400):
        for model, cache, taken in turns if i % 2 else reversed(turns):  # so that a busy moment strikes both
            start = time.perf_counter()
            model(TEXT[:, -1:], cache)
            taken.append(time.perf_counter() - start)
            cache.truncate(0, TEXT.shape[1])
    fresh, used = (statistics.quantiles(taken, n=10)[0] for taken in times)  # of steps that nothing else disturbed
    assert used < 1.15 * fresh
