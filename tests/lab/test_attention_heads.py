"""What each head attends to, against the probabilities that transformers returns with eager attention."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama_mini import Llama, lab
from llama_mini.checkpoint.families import FAMILIES
from llama_mini.errors import RequestError
from llama_mini.lab import attention_heads
from llama_mini.optimize.fuse import optimize
from tests.tiny_families import random_model
from tests.tiny_models import random_tokens, tiny_model

BY_DEFAULT = ("qwen3", "olmo2", "gemma2", "gemma3_text", "hunyuan_v1_dense")  # q/k norms, windows, soft caps, scales
TOKENS = random_tokens(2, 33)
pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer")


def theirs(model: Any, tokens: Tensor) -> list[np.ndarray]:
    """The probabilities of each layer, (B, H, T, T), in float64."""
    with torch.no_grad():
        return [layer.double().numpy() for layer in model(tokens, output_attentions=True).attentions]


def mass_and_entropy(p: np.ndarray, start: int = 1) -> tuple[np.ndarray, np.ndarray]:
    p = p[:, :, start:]
    bits = np.where(p > 0, -p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    return p[..., 0].mean((0, 2)), bits.mean((0, 2))


def column(rows: Any, name: str, layer: int) -> list[float]:
    return [getattr(row, name) for row in rows if row.layer == layer]


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_attends_as_in_transformers(model_type: str, tmp_path: Path) -> None:
    for seed in (1, 2):
        model = random_model(model_type, seed)
        model.save_pretrained(tmp_path / str(seed))
        rows = lab.attention(Llama.from_pretrained(tmp_path / str(seed)), TOKENS)
        heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
        assert [(row.layer, row.head) for row in rows] == [(i, head) for i in range(layers) for head in range(heads)]
        for i, p in enumerate(theirs(model, TOKENS)):
            mass, entropy = mass_and_entropy(p)
            np.testing.assert_allclose(column(rows, "first_mass", i), mass, atol=1e-5)
            np.testing.assert_allclose(column(rows, "entropy", i), entropy, atol=1e-5)


def test_the_numbers_of_a_plain_model_by_hand() -> None:
    """q and k from the weights in float64: rotated by complex numbers, the mask a loop."""
    model = tiny_model(3, n_layers=1, attention_scale=0.3, rope_theta=100.0)
    attention = model.layers[0].attention
    x = model.tok_embeddings.weight[TOKENS[0]].double().numpy()
    h = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * attention.pre_norm.weight.double().numpy()
    turn = np.exp(1j * np.arange(33)[:, None, None] / 100.0 ** (np.arange(4) / 4))
    q, k = (
        (h @ weight.double().numpy().T).reshape(33, -1, 8)
        for weight in (attention.q_proj.weight, attention.k_proj.weight)
    )
    q, k = ((z[..., :4] + 1j * z[..., 4:]) * turn for z in (q, k))
    for row in lab.attention(model, TOKENS[0]):
        logits = [0.3 * (q[t, row.head] * k[: t + 1, row.head // 3].conj()).real.sum(-1) for t in range(1, 33)]
        p = [np.exp(each) / np.exp(each).sum() for each in logits]
        assert row.first_mass == pytest.approx(np.mean([each[0] for each in p]), abs=1e-5)
        assert row.entropy == pytest.approx(np.mean([-(each * np.log(each)).sum() for each in p]), abs=1e-5)
        assert row.largest_logit == pytest.approx(max(each.max() for each in logits), abs=1e-5)
        assert row.first_rms == pytest.approx(np.sqrt((x[0] ** 2).mean()), rel=1e-6)
        assert row.median_rms == pytest.approx(np.median(np.sqrt((x[1:] ** 2).mean(-1))), rel=1e-6)


def test_texts_of_different_lengths_count_each_query_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(norm_plan="pre+qk", sliding_window=9, sliding_layers=(1,))
    short, long = TOKENS[0, :12], TOKENS[1]
    both = lab.attention(model, [short, long])
    for row, a, b in zip(both, lab.attention(model, short), lab.attention(model, long), strict=True):
        assert row.first_mass == pytest.approx((11 * a.first_mass + 32 * b.first_mass) / 43, abs=1e-6)
        assert row.entropy == pytest.approx((11 * a.entropy + 32 * b.entropy) / 43, abs=1e-6)
        assert row.largest_logit == pytest.approx(max(a.largest_logit, b.largest_logit), abs=1e-6)
    monkeypatch.setattr(attention_heads, "_SCORES_AT_ONCE", 5 * 6 * 33 * 2)  # five queries at a time
    for row, whole in zip(lab.attention(model, [short, long]), both, strict=True):
        assert vars(row) == pytest.approx(vars(whole), abs=1e-6)


def test_a_cap_bounds_the_largest_logit_and_edits_are_seen() -> None:
    model = tiny_model(norm_plan="pre+qk", attention_softcap=0.25)
    assert 0.2 < max(lab.attention(model, TOKENS).column("largest_logit")) <= 0.25
    model = tiny_model(norm_plan="pre+qk")
    model.layers[1].attention.q_proj.weight *= 50
    before = lab.attention(model, TOKENS)
    with lab.edit(model, {"layers.*.attention.q_norm": {"skip": True}}):
        without = lab.attention(model, TOKENS)
    assert max(column(before, "largest_logit", 1)) < 20 < max(column(without, "largest_logit", 1))
    assert lab.attention(model, TOKENS).to_json() == before.to_json()


def test_the_model_is_as_before_and_its_logits_too() -> None:
    model = tiny_model()
    logits, own = model(TOKENS), [dict(vars(layer.attention)) for layer in model.layers]
    seen: list[Tensor] = []
    with model.register_forward_hook(lambda _, __, y: seen.append(y)):  # type: ignore[attr-defined]
        lab.attention(model, TOKENS)
    assert torch.equal(seen[0], logits)
    assert [dict(vars(layer.attention)) for layer in model.layers] == own
    model.layers[1].attention.k_norm = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        lab.attention(model, TOKENS)
    assert not any("attend" in vars(layer.attention) for layer in model.layers)


def test_a_single_token_attends_to_nothing_else() -> None:
    with pytest.raises(RequestError, match="at least 2"):
        lab.attention(tiny_model(), [5])


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_an_optimized_model_is_read_too(quantize: str | None) -> None:
    rows = lab.attention(optimize(tiny_model(dim=96, hidden_dim=96), quantize), TOKENS)
    plain = lab.attention(tiny_model(dim=96, hidden_dim=96), TOKENS)
    far = np.abs(np.subtract(rows.column("first_mass"), plain.column("first_mass"))).max()
    assert far < 1e-5 if quantize is None else 1e-5 < far < 0.1


@pytest.fixture(scope="module")
def default(smollm2: Llama, alice: list[int]) -> tuple[list[int], Any]:
    """The first 256 tokens of Alice in Wonderland, and the heads of the default checkpoint on them."""
    return alice, lab.attention(smollm2, alice)


def test_the_sink_follows_the_massive_activation(default: tuple[list[int], Any]) -> None:
    """The first token is massive in layers 1 to 8, erased in 9 and 10, and born again in 11; so is its attention."""
    _, rows = default
    by_layer = [np.mean(column(rows, "first_mass", i)) for i in range(30)]
    assert all(0.11 < mass < 0.16 for mass in by_layer[3:10])
    assert max(by_layer[10:12]) < 0.011
    assert all(0.31 < mass < 0.71 for mass in by_layer[12:])
    times = [column(rows, "first_rms", i)[0] / column(rows, "median_rms", i)[0] for i in range(30)]
    assert min(times[3:10]) > 5
    assert max(times[10:12]) < 1.3
    assert min(times[12:]) > 10


@pytest.mark.slow
def test_the_default_checkpoint_attends_as_in_transformers(default: tuple[list[int], Any], smollm2_dir: Path) -> None:
    """Without the first 16 queries, which have few tokens to choose from, the masses are somewhat lower."""
    ids, rows = default
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32, attn_implementation="eager")
    probabilities = theirs(model, torch.tensor([ids]))
    for i, p in enumerate(probabilities):
        mass, entropy = mass_and_entropy(p)
        np.testing.assert_allclose(column(rows, "first_mass", i), mass, atol=1e-5)
        np.testing.assert_allclose(column(rows, "entropy", i), entropy, atol=5e-5)
    late = [mass_and_entropy(p, 16)[0].mean() for p in probabilities]
    assert [round(float(late[i]), 3) for i in (10, 11)] == [0.005, 0.001]
    assert all(0.09 < mass < 0.14 for mass in late[3:10])
    assert all(0.29 < mass < 0.69 for mass in late[12:])
