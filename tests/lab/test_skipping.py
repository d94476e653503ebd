"""What layers, their branches and runs of them are worth, against transformers without the same ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from llama_mini import Llama, lab
from llama_mini.errors import RequestError
from tests.tiny_models import hf_llama, random_tokens, tiny_model

TEXT = random_tokens(2, 40)
BRANCHES = ("attention", "feed_forward")


@pytest.fixture
def theirs() -> LlamaForCausalLM:
    return hf_llama(num_hidden_layers=4)


@pytest.fixture
def ours(theirs: LlamaForCausalLM, tmp_path: Path) -> Llama:
    theirs.save_pretrained(tmp_path)
    return Llama.from_pretrained(tmp_path)


def log_probabilities(theirs: PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        x = theirs(TEXT, use_cache=False).logits.double().numpy()
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def cost(p: np.ndarray, q: np.ndarray) -> tuple[float, float, float, float]:
    """dloss, its standard error over tokens, KL and agreement, in float64 NumPy."""
    losses = [-np.take_along_axis(x[:, :-1], TEXT.numpy()[:, 1:, None], -1) for x in (p, q)]
    change = (losses[1] - losses[0]).ravel()
    error = change.std(ddof=1) / np.sqrt(change.size)
    return change.mean(), error, (np.exp(p) * (p - q)).sum(-1).mean(), (p.argmax(-1) == q.argmax(-1)).mean()


def without(theirs: LlamaForCausalLM, path: str) -> LlamaForCausalLM:
    """The same model whose skipped branches add nothing."""
    _, layers, *branch = path.split(".")
    first, _, last = layers.partition("-")
    for layer in theirs.model.layers[int(first) : int(last or first) + 1]:
        if branch != ["feed_forward"]:
            layer.self_attn.o_proj.weight.data.zero_()
        if branch != ["attention"]:
            layer.mlp.down_proj.weight.data.zero_()
    return theirs


def stream(theirs: LlamaForCausalLM, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Before and after what is skipped, in the whole model. Inside a layer, the second norm reads the stream."""
    _, layers, *branch = path.split(".")
    first, _, last = layers.partition("-")
    own, seen = theirs.model.layers, dict[str, Tensor]()
    begin = own[int(first)].post_attention_layernorm if branch == ["feed_forward"] else own[int(first)].input_layernorm
    end = own[int(last or first)]
    begin.register_forward_hook(lambda _, args, __: seen.update(before=args[0]))
    if branch == ["attention"]:
        end.post_attention_layernorm.register_forward_hook(lambda _, args, __: seen.update(after=args[0]))
    else:
        end.register_forward_hook(lambda _, __, y: seen.update(after=y[0] if isinstance(y, tuple) else y))
    log_probabilities(theirs)
    return seen["before"].double().numpy(), seen["after"].double().numpy()


def angle(x: np.ndarray, y: np.ndarray) -> float:
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    return float(np.arccos(cosine).mean() / np.pi)


LAYERS = [f"layers.{i}" for i in range(4)]
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "each layer": ({}, LAYERS),
    "each branch": ({"pattern": "layers.*.*"}, [f"{layer}.{branch}" for layer in LAYERS for branch in BRANCHES]),
    "runs of two": ({"run": 2}, ["layers.0-1", "layers.1-2", "layers.2-3"]),
    "a run of all": ({"run": 4}, ["layers.0-3"]),
    "runs of branches": (
        {"pattern": "layers.1-3.attention", "run": 2},
        ["layers.1-2.attention", "layers.2-3.attention"],
    ),
    "both": ({"pattern": ["layers.2", "layers.0.*"]}, ["layers.0.attention", "layers.0.feed_forward", "layers.2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_skips_against_transformers(case: str, ours: Llama, theirs: LlamaForCausalLM) -> None:
    settings, paths = CASES[case]
    before = dict(ours.named_modules())
    table = lab.skip_layers(ours, TEXT, **settings)
    assert {name: module for name, module in ours.named_modules() if module is not before[name]} == {}
    assert table.column("path") == paths
    base, weights = log_probabilities(theirs), {k: v.clone() for k, v in theirs.state_dict().items()}
    for row in table:
        assert row.angle == pytest.approx(angle(*stream(theirs, row.path)), rel=1e-4)
        dloss, se, kl, top1 = cost(base, log_probabilities(without(theirs, row.path)))
        theirs.load_state_dict(weights)
        assert row.dloss == pytest.approx(dloss, abs=2e-5)
        assert (row.se, row.kl) == (pytest.approx(se, rel=1e-3), pytest.approx(kl, rel=1e-4))
        assert row.top1 == pytest.approx(top1, abs=1 / TEXT.numel())


def test_a_skip_that_ends_in_nan_is_a_row_that_says_where(ours: Llama) -> None:
    """TEXT[1, 7] is embedded as zeros: what layer 0 adds to it is its stream. With eps 0, 0/0 is NaN."""
    assert (TEXT[1, 7] == TEXT).sum() == 1
    ours.tok_embeddings.weight[TEXT[1, 7]] = 0
    ours.layers[1].attention.pre_norm.eps = 0.0
    table = lab.skip_layers(ours, TEXT)
    where = "NaN or infinity in the logits, first at layers.1.attention.pre_norm, token 7 of row 1"
    assert [row.error for row in table] == [where, None, None, None]
    assert np.isfinite(table.column("angle")).all()
    assert list(np.isfinite(table.column("dloss"))) == [False, True, True, True]


def test_a_layer_that_does_nothing_costs_nothing_and_turns_nothing() -> None:
    model = tiny_model()
    model.layers[1].attention.o_proj.weight.zero_()
    model.layers[1].feed_forward.down_proj.weight.zero_()
    table = lab.skip_layers(model, TEXT)
    assert (table[1].dloss, table[1].kl, table[1].top1, table[1].angle) == (0, 0, 1, 0)
    assert table[0].kl > 0
    model.layers[1].feed_forward.down_proj.weight.copy_(1e-7 * model.layers[0].feed_forward.down_proj.weight)
    assert 1e-10 < lab.skip_layers(model, TEXT)[1].angle < 1e-6  # no floor of arccos near one


@pytest.mark.parametrize("plan", ["post", "peri+qk", "parallel"])
def test_a_skipped_branch_takes_its_norms_along(plan: str) -> None:
    """Both branches of every layer skipped leave the embedding, as all layers skipped do; the last norm still reads it.

    In a parallel layer attention's pre norm stays, since the other branch reads it.
    """
    model, found = tiny_model(norm_plan=plan), dict[str, Tensor]()
    for pattern in ("layers.*", "layers.*.*"):
        with torch.no_grad():
            found[pattern] = torch.tensor(lab.skip_layers(model, TEXT, pattern).column("dloss"))
    assert found["layers.*.*"].isfinite().all()
    assert found["layers.*.*"].abs().min() > 1e-6
    nothing = [lab.skip_layers(model, TEXT, pattern, run=3) for pattern in ("layers.*", "layers.*.attention")]
    embedded = model.logits(model.norm(model.embed_norm(model.embed(TEXT))))
    losses = nn.functional.cross_entropy(embedded[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten())
    assert nothing[0][0].dloss == pytest.approx(float(losses) - lab.score(model, TEXT).loss, abs=1e-5)
    assert nothing[0][0].dloss != nothing[1][0].dloss


@pytest.mark.parametrize("branch", ["attention.o_proj", "feed_forward.down_proj"])
def test_the_other_branch_of_a_parallel_layer_stays(branch: str) -> None:
    """Skipped is what a branch adds: the other one reads the same norm as before."""
    (row,) = lab.skip_layers(tiny_model(norm_plan="parallel"), TEXT, f"layers.1.{branch.split('.')[0]}")
    zeroed = tiny_model(norm_plan="parallel")
    base = lab.score(zeroed, TEXT)
    zeroed.get_submodule(f"layers.1.{branch}").weight.zero_()
    expected = lab.score(zeroed, TEXT, against=base)
    assert (row.dloss, row.kl) == pytest.approx((expected.dloss, expected.kl), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"run": 0}, "run must be a whole number of at least 1"),
        ({"run": 5}, "no 5 neighbours match"),
        (
            {"pattern": "layers.[02]", "run": 2},
            r"no 2 neighbours match 'layers.\[02\]': give a smaller run, or a wider",
        ),
        ({"pattern": "layers.4"}, "'layers.4' matches no layer and no branch; they are layers.0, layers.0.attention, "),
        ({"pattern": "layers.2-9"}, "'layers.9' matches no layer"),
        ({"pattern": "layers.0.attention.pre_norm"}, "matches no layer and no branch"),
        ({"pattern": 3}, "a pattern must be text or a list of texts, not 3"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], message: str, ours: Llama) -> None:
    with pytest.raises(RequestError, match=message):
        lab.skip_layers(ours, TEXT, **settings)
