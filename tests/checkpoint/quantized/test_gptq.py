"""GPTQ and AutoRound: every layout gives the weights that the formula gives, in NumPy with float64.

(GPTQModel's own code needs CUDA or Triton; the layouts are those of its packers and of AutoRound's.)
"""

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.checkpoint.weight_formats import column_orders, weight_formats
from llama_mini.errors import CheckpointFormatError, ConfigError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser
from tests.checkpoint.quantized.writers import check_codes, damage, edit_config, gptq, layers_only, write_model
from tests.optimize.conftest import error
from tests.tiny_families import logits
from tests.tiny_models import random_tokens

PROJECTION = "model.layers.0.self_attn.q_proj"
TOKENS = random_tokens(1, 9)


def random_layout(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "bits": int(rng.choice([2, 3, 4, 4, 8])),
        "size": int(rng.choice([32, 64, 16, -1])),
        "sym": bool(rng.integers(2)),
        "v1": bool(rng.integers(2)),
        "order": [None, False, True][rng.integers(3)],
    }


@pytest.mark.parametrize("seed", range(8))
def test_weights_and_logits(tmp_path: Path, seed: int) -> None:
    layout, rng = random_layout(seed), np.random.default_rng(seed)
    settings = {
        "quant_method": "gptq",
        "bits": layout["bits"],
        "group_size": layout["size"],
        "sym": layout["sym"],
        "desc_act": layout["order"] is True,
        "checkpoint_format": "gptq" if layout["v1"] else "gptq_v2",
    }
    model = write_model(
        tmp_path,
        {"quantization_config": settings},
        lambda name, weight: gptq(rng, tuple(weight.shape), **layout) if layers_only(name, weight) else None,
    )
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)
    keeps = layout["size"] != 16 and (layout["bits"] != 8 or layout["sym"])
    assert check_codes(tmp_path, model) == (21 if keeps else 0)


def write(directory: Path, changes: dict[str, Any] = {}, **layout: Any) -> PreTrainedModel:  # noqa: B006
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    layout = {"bits": 4, "size": 32, "sym": True, "v1": True, "order": False} | layout
    rng = np.random.default_rng(0)
    return write_model(
        directory,
        {"quantization_config": settings | changes},
        lambda name, weight: gptq(rng, tuple(weight.shape), **layout) if layers_only(name, weight) else None,
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gptq")
    write(directory)
    return directory


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("packing", "v1"),
    [(None, True), ("auto_round:auto_gptq", True), ("auto_round", False), ("auto_round:gptqmodel", False)],
)
def test_auto_round(tmp_path: Path, packing: str | None, v1: bool) -> None:
    changes = {"quant_method": "auto-round", "packing_format": packing, "sym": False}
    model = write(tmp_path, changes, sym=False, v1=v1, order=None)
    assert check_codes(tmp_path, model) == 21


@pytest.mark.parametrize("key", ["dynamic", "extra_config"])
def test_layers_of_other_bits_and_groups(tmp_path: Path, key: str) -> None:
    """A pattern that takes forever to match is harmless: shapes tell which layers are meant."""
    rng = np.random.default_rng(0)
    own = {"model.layers.0.": (8, 16), "model.layers.1.": (4, 64)}

    def quantize(name: str, weight: Tensor) -> Any:
        bits, size = next((layout for layer, layout in own.items() if layer in name), (4, 32))
        layout = {"bits": bits, "size": size, "sym": True, "v1": True, "order": False}
        return gptq(rng, tuple(weight.shape), **layout) if layers_only(name, weight) else None

    layers = {
        r"+:(a|aa)+\.0": {"bits": 8, "group_size": 16},
        r"layers\.1": {"group_size": 64},
        "-:lm_head": {"bits": 16},
    }
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, key: layers}
    model = write_model(tmp_path, {"quantization_config": settings}, quantize)
    stored = open_checkpoint(tmp_path).tensors
    formats = [stored[f"model.layers.{i}.mlp.up_proj.weight"].number_format for i in range(3)]
    what = [(8, 16), (4, 64), (4, 32)]
    assert formats == [f"GPTQ {bits} bits, groups of {size}, symmetric" for bits, size in what]
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)


def test_columns_that_a_group_does_not_divide(tmp_path: Path) -> None:
    model = write(tmp_path, {"group_size": 64}, size=64)  # down_proj has 96
    assert check_codes(tmp_path, model) == 21


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("bits", [4, 8])
def test_columns_in_the_order_of_their_groups(tmp_path: Path, bits: int, kernels: str) -> None:
    """Matrices that read one input have one order, and keep their codes; in layer 1, v has another than q and k."""
    rng, orders = np.random.default_rng(0), dict[str, Any]()

    def quantize(name: str, weight: Tensor) -> Any:
        reads = re.sub("(q|k|v)_proj", "qkv", re.sub("gate|up", "gate_up", name))
        order = orders.setdefault(reads, rng.permutation(np.arange(weight.shape[1]) // 32))
        if "1.self_attn.v_proj" in name:
            order = order[::-1]
        layout: dict[str, Any] = {"bits": bits, "size": 32, "sym": True, "v1": True, "order": order}
        return gptq(rng, (weight.shape[0], weight.shape[1]), **layout) if layers_only(name, weight) else None

    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": True}
    model = write_model(tmp_path, {"quantization_config": settings}, quantize)
    source = open_checkpoint(tmp_path)
    fast = load_model(Llama, source, "float32", "cpu", fuser(kernels), "auto")
    names = [linear.name for layer in fast.layers for branch in layer.children() for linear in branch.linears]
    assert names == [f"int{bits}"] * 4 + ["int8"] + [f"int{bits}"] * 7
    assert len(column_orders(source, weight_formats(source, "auto"))) == 21 - 3
    expected = logits(model, TOKENS)
    assert error(fast(TOKENS), expected) < 3e-3
    cache = fast.new_cache(1, 16)
    steps = [fast(TOKENS[:, i : i + 1], cache) for i in range(TOKENS.shape[1])]
    assert error(torch.cat(steps, 1), expected) < 3e-3
    twin = pickle.loads(pickle.dumps(fast))
    assert torch.equal(twin(TOKENS), fast(TOKENS))


def test_group_index_of_zeros(tmp_path: Path) -> None:
    """Files of GPTQ-for-LLaMa without act-order."""
    model = write(tmp_path)
    damage(tmp_path, f"{PROJECTION}.g_idx", torch.zeros_like)
    assert check_codes(tmp_path, model) == 21


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("scales", lambda t: t[:-1], r"scales' is F16 of shape \(1, 64\), not .* of \(2, 64\)"),
        ("scales", lambda t: t[0], r"scales' is of shape \(64,\), but must be a matrix"),
        ("scales", lambda t: t.int(), r"scales' is I32 of shape"),
        ("qzeros", lambda t: t[:, :-1], r"qzeros' is I32 of shape \(2, 7\), not I32 or U32 of \(2, 8\)"),
        ("qweight", lambda t: t[:-1], r"g_idx' is I32 of shape \(64,\), not I32 or I64 of \(56,\)"),
        ("qweight", lambda t: t[:, :-1], r"qweight' is I32 of shape \(8, 63\), not I32 or U32 of \(8, 64\)"),
        ("qweight", lambda t: t.half(), r"qweight' is F16"),
        ("qweight", lambda t: None, r"needs .*q_proj\.qweight, which no file holds"),
        ("qzeros", lambda t: None, r"needs .*q_proj\.qzeros, which no file holds"),
        ("scales", lambda t: None, r"needs .*q_proj\.scales, which no file holds"),
        ("g_idx", lambda t: t[:-1], r"g_idx' is I32 of shape \(63,\), not I32 or I64 of \(64,\)"),
        ("g_idx", lambda t: t + 1, r"g_idx' does not put 64 columns into groups of 32"),
        ("g_idx", lambda t: t - 1, r"g_idx' does not put"),
        ("g_idx", lambda t: torch.ones_like(t), r"g_idx' does not put"),
        ("g_idx", lambda t: t.float(), r"g_idx' is F32"),
    ],
)
def test_damaged_parts_are_named(copy: Path, end: str, change: Any, message: str) -> None:
    damage(copy, f"{PROJECTION}.{end}", change)
    with pytest.raises(CheckpointFormatError, match=message):
        open_checkpoint(copy)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(copy: Path, bad: float) -> None:
    damage(copy, f"{PROJECTION}.scales", lambda scales: scales.index_fill(1, torch.tensor([5]), bad))
    with pytest.raises(CheckpointFormatError, match=rf"{PROJECTION}\.scales' holds NaN or infinity"):
        Llama.from_pretrained(copy)


def test_eight_bits_that_are_not_symmetric(tmp_path: Path) -> None:
    write(tmp_path, {"bits": 8}, bits=8)
    damage(tmp_path, f"{PROJECTION}.qzeros", lambda zeros: zeros + 1)
    with pytest.raises(CheckpointFormatError, match="is of a symmetric matrix, but its zero points are not all 128"):
        load_model(Llama, open_checkpoint(tmp_path), "float32", "cpu", fuser("off"), "auto")


def test_the_order_of_columns_is_needed(tmp_path: Path) -> None:
    write(tmp_path, {"desc_act": True}, order=None)
    with pytest.raises(CheckpointFormatError, match=r"qweight' needs .*g_idx, since desc_act is true"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits is 5; those that are read are 2, 3, 4, 8"),
        ({"bits": "4"}, "bits is '4'; those"),
        ({"group_size": 32.0}, "group_size must be a whole number"),
        ({"group_size": -2}, "group_size must be a whole number"),
        ({"checkpoint_format": "marlin"}, "unknown checkpoint_format 'marlin'; known: gptq, gptq_v2"),
        ({"is_marlin_format": True}, "is_marlin_format is true"),
        ({"sym": "yes"}, "sym must be true or false"),
        ({"quant_method": "auto-round", "packing_format": "x"}, "unknown packing_format 'x'"),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, "data_type is 'mx_fp'"),
    ],
)
def test_settings_that_are_not_read(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(copy, {"quantization_config": {"quant_method": "gptq"} | changes})
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(copy)


def test_unknown_settings_and_activations_are_told(copy: Path) -> None:
    common = {"quant_method": "gptq", "bits": 4, "group_size": 32, "damp_percent": 0.1, "model_name_or_path": None}
    edit_config(copy, {"quantization_config": common})
    open_checkpoint(copy)  # without a warning
    edit_config(copy, {"quantization_config": common | {"unheard_of": 1, "nothing": None}})
    with pytest.warns(LlamaMiniWarning, match="quantization_config: unknown unheard_of ignored"):
        open_checkpoint(copy)
    edit_config(copy, {"quantization_config": common | {"quant_method": "auto-round", "act_bits": 8}})
    with pytest.warns(LlamaMiniWarning, match="AutoRound also quantises the activations of this model; here its"):
        open_checkpoint(copy)
    edit_config(copy, {"quantization_config": common | {"rotation": "hadamard"}})
    with pytest.raises(ConfigError, match="rotation is 'hadamard'; only checkpoints without it"):
        open_checkpoint(copy)
