"""What capture records, against transformers' own forward hooks and float64 NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llama_mini import Llama, Tokenizer, lab
from llama_mini.errors import RequestError
from llama_mini.lab.recording import Record
from tests.tiny_families import random_model
from tests.tiny_models import random_tokens, tiny_model

PRE = {"input_layernorm": "attention.pre_norm", "post_attention_layernorm": "feed_forward.pre_norm"}
QK = {"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"}
OUT = {"post_attention_layernorm": "attention.out_norm", "post_feedforward_layernorm": "feed_forward.out_norm"}
KEYS = {"llama": PRE, "qwen3": PRE | QK, "olmo2": OUT | QK}
TEXT = random_tokens(2, 21)
ALICE = Path(__file__).parents[1] / "golden" / "alice.txt"


@pytest.fixture(scope="module")
def default(smollm2_dir: Path) -> tuple[Llama, Any, Tokenizer]:
    """The default checkpoint as we and as transformers read it, and its tokenizer."""
    return *both(smollm2_dir), Tokenizer.from_pretrained(smollm2_dir)


def both(path: Path) -> tuple[Llama, Any]:
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    return Llama.from_pretrained(path, dtype="float32"), theirs


def what_transformers_sees(model: Any, family: str, tokens: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Input and output of every norm, under our paths, and of every layer, by number."""
    norms: dict[str, Any] = {}
    layers: dict[str, Any] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        _, number, key = [*names[module].split(".", 2), "", ""][:3]
        y = output[0] if isinstance(output, tuple) else output
        if not number:
            norms["norm"] = args[0], y
        elif not key:
            layers[number] = args[0], y
        else:
            norms[f"layers.{number}.{KEYS[family][key]}"] = args[0], y

    wanted = [*model.model.layers, model.model.norm]
    wanted += [m for n, m in model.model.layers.named_modules() if n.endswith("norm")]
    names = {module: name for name, module in model.model.named_modules()}
    hooks = [module.register_forward_hook(record) for module in wanted]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return norms, layers


def assert_same_as_transformers(model: Llama, theirs: Any, family: str, tokens: Tensor) -> None:
    rec = lab.capture(model, tokens)
    norms, layers = what_transformers_sees(theirs, family, tokens)
    assert sorted(rec) == sorted(norms)
    for name, (x, y) in norms.items():
        assert torch.equal(rec[name].x, x), name
        assert torch.equal(rec[name].y, y), name
    assert len(layers) == len(rec.resid.resid_pre) == len(rec.resid.resid_mid) == len(rec.resid.resid_post)
    for number, (x, y) in layers.items():
        assert torch.equal(rec.resid.resid_pre[int(number)].x, x), number
        assert torch.equal(rec.resid.resid_post[int(number)].x, y), number
        np.testing.assert_allclose(rec.resid.resid_post[int(number)].rms.numpy(), rms(y), rtol=1e-6)
        if family != "olmo2":  # there the middle of the stream goes straight into the matrices
            middle = norms[f"layers.{number}.feed_forward.pre_norm"][0]
            assert torch.equal(rec.resid.resid_mid[int(number)].x, middle), number


def rms(x: Tensor) -> np.ndarray:
    return np.sqrt((x.double().numpy() ** 2).mean(-1))


@pytest.mark.parametrize("family", KEYS)
def test_bit_for_bit_what_transformers_records(family: str, tmp_path: Path) -> None:
    random_model(family, seed=0).save_pretrained(tmp_path)
    assert_same_as_transformers(*both(tmp_path), family, TEXT)


@pytest.mark.slow  # the norms of this checkpoint are compared with recorded ones in tests/model/test_norm_layers.py
def test_bit_for_bit_on_the_default_checkpoint(default: tuple[Llama, Any, Tokenizer]) -> None:
    model, theirs, tokenizer = default
    ids = tokenizer.encode(ALICE.read_text(encoding="utf-8"))[:96]
    assert_same_as_transformers(model, theirs, "llama", torch.tensor([ids]))


def assert_statistics(record: Record, x: Tensor) -> None:
    """The statistics of x, written from their definitions in float64."""
    rows = x.double().numpy()
    np.testing.assert_allclose(record.rms.numpy(), rms(x), rtol=1e-6)
    assert record.rms.dtype == torch.float32
    assert record.mean_energy == pytest.approx((rows.mean(-1) ** 2 / (rows**2).mean(-1)).mean(), rel=1e-4)
    size = np.abs(rows)
    median = np.partition(size.ravel(), (size.size - 1) // 2)[(size.size - 1) // 2]
    assert record.max_over_median == pytest.approx(size.max() / median, rel=1e-6)
    flat = rows.reshape(*rows.shape[:2], -1)
    row, token, dim, value = record.peak
    assert (row, token, dim) == np.unravel_index(np.abs(flat).argmax(), flat.shape)
    assert value == pytest.approx(flat[row, token, dim], rel=1e-7)
    assert record.first == pytest.approx(np.median(rms(x)[:, 0]), rel=1e-6)
    assert record.median == pytest.approx(np.median(rms(x)[:, 1:]), rel=1e-6)


@pytest.mark.parametrize("plan", ["pre", "peri+qk+embed", "out+qk:full", "post"])
def test_statistics(plan: str) -> None:
    model = tiny_model(norm_plan=plan)
    rec = lab.capture(model, TEXT)
    assert list(rec) == lab.norms(model).column("path")
    for record in rec.values():
        assert_statistics(record, record.x)
    stream = rec.resid
    for layer in range(3):
        assert_statistics(stream.resid_mid[layer], stream.resid_mid[layer].x)
        assert stream.resid_mid[layer].y is None
    assert all(stream.resid_pre[i + 1] is stream.resid_post[i] for i in range(2))
    # The stream ends in the final norm, where there is one.
    assert "norm" not in rec or torch.equal(rec["norm"].x, stream.resid_post[2].x)


def test_shapes_of_the_head_norms() -> None:
    per_head = lab.capture(tiny_model(norm_plan="pre+qk"), TEXT)
    assert per_head["layers.1.attention.q_norm"].x.shape == (2, 21, 6, 8)
    assert per_head["layers.1.attention.k_norm"].rms.shape == (2, 21, 2)
    whole = lab.capture(tiny_model(norm_plan="pre+qk:full"), TEXT)
    assert whole["layers.1.attention.q_norm"].x.shape == (2, 21, 48)
    assert whole["layers.1.attention.k_norm"].rms.shape == (2, 21)


def test_half_precision_is_kept_and_measured_wide() -> None:
    model = tiny_model(dtype=torch.float16)
    model.tok_embeddings.weight *= 600  # whose square is beyond float16
    record = lab.capture(model, TEXT)["layers.0.attention.pre_norm"]
    assert record.x.dtype == record.y.dtype == torch.float16
    assert_statistics(record, record.x)


def test_a_row_of_zeros_has_no_mean_energy_and_nan_stays() -> None:
    model = tiny_model()
    model.tok_embeddings.weight[TEXT[0, 0]] = 0
    path = "layers.0.attention.pre_norm"
    record = lab.capture(model, TEXT)[path]
    assert record.rms[0, 0] == 0
    assert 0 < record.mean_energy < 1
    model.tok_embeddings.weight[TEXT[1, 4], 9] = torch.nan
    record = lab.capture(model, TEXT)[path]
    assert np.isnan(record.mean_energy)
    assert record.peak[:3] == (1, 4, 9)


def test_at_limits_what_is_kept() -> None:
    model = tiny_model()
    rec = lab.capture(model, TEXT, at=["norm", "layers.1-2.*.pre_norm"])
    assert list(rec) == [*(f"layers.{i}.{b}.pre_norm" for i in (1, 2) for b in ("attention", "feed_forward")), "norm"]
    assert rec["norm"].x is not None
    whole = lab.capture(model, TEXT)
    for ours, all_of_it in zip(rec.resid.resid_mid, whole.resid.resid_mid, strict=True):
        assert ours.x is None
        assert torch.equal(ours.rms, all_of_it.rms)
    with pytest.raises(RequestError, match="'norn' matches no norm"):
        lab.capture(model, TEXT, at="norn")


def test_statistics_alone() -> None:
    model = tiny_model(norm_plan="peri+qk")
    stats, whole = lab.capture(model, TEXT, keep="stats"), lab.capture(model, TEXT)
    assert list(stats) == list(whole)
    for path, record in stats.items():
        assert record.x is record.y is None
        assert torch.equal(record.rms, whole[path].rms)
        assert record.peak == whole[path].peak
    assert all(record.x is None for record in stats.resid.resid_post)
    with pytest.raises(RequestError, match="unknown keep 'all'; known: tensors, stats"):
        lab.capture(model, TEXT, keep="all")  # type: ignore[arg-type]


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_the_model_is_as_before() -> None:
    model = tiny_model(norm_plan="peri+qk")
    before, logits = dict(model.named_modules()), model(TEXT)
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: seen.append(output))
    rec = lab.capture(model, TEXT)
    assert n_hooks(model) == 1  # the caller's own
    hook.remove()
    assert torch.equal(seen[0], logits)  # nor does a capture change what runs under it
    assert dict(model.named_modules()) == before
    assert not rec["norm"].x.is_inference()  # may take part in autograd


def test_hooks_are_gone_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.layers[1].attention.pre_norm.dim = 5
    with pytest.raises(ValueError, match="over 5 elements"):
        lab.capture(model, TEXT)
    assert n_hooks(model) == 0


def test_one_token_and_inference_mode() -> None:
    with torch.inference_mode():
        assert lab.capture(tiny_model(), [3])["norm"].rms.shape == (1, 1)
