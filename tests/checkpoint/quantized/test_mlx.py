"""MLX: quantised by mlx itself, dequantised as mlx does it."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch import Tensor

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.errors import CheckpointFormatError, ConfigError
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser
from tests.checkpoint.quantized.writers import check_codes, damage, edit_config, write_model
from tests.tiny_families import logits
from tests.tiny_models import random_tokens

TOKENS = random_tokens(1, 9)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def quantized(weight: Tensor, bits: int, group: int, dtype: str) -> tuple[dict[str, Tensor], Any]:
    made = mx.quantize(mx.array(weight.float().numpy()).astype(getattr(mx, dtype)), group, bits)
    parts = dict(zip(("weight", "scales", "biases"), made, strict=True))
    wide = {name: np.array(part.astype(mx.float32)) for name, part in parts.items() if name != "weight"}
    stored = {name: torch.from_numpy(part).to(getattr(torch, dtype)) for name, part in wide.items()}
    values = mx.dequantize(made[0], *(mx.array(part) for part in wide.values()), group, bits)
    return {"weight": torch.from_numpy(np.array(made[0]))} | stored, np.array(values)


@pytest.mark.parametrize("seed", range(7))
def test_weights_and_logits(tmp_path: Path, seed: int) -> None:
    """Each layer has its own bits, groups or none; embedding and head are quantised too."""
    rng = np.random.default_rng(seed)
    settings: dict[str, Any] = {"group_size": 64, "bits": 4, "mode": "affine"}
    dtype = ["float16", "bfloat16", "float32"][seed % 3]

    def quantize(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Any] | None:
        module = name.removesuffix(".weight")
        if rng.integers(8) == 0:
            settings[module] = False
            return None
        bits, group = settings["bits"], settings["group_size"]
        if rng.integers(2):
            bits, group = int(rng.choice([2, 3, 4, 5, 6, 8])), int(rng.choice([32, 64, 128]))
            settings[module] = {"group_size": group, "bits": bits}
        return quantized(weight, bits, group, dtype)

    model = write_model(tmp_path, {}, quantize, **SIZES, tie_word_embeddings=bool(seed % 2))
    edit_config(tmp_path, {"quantization": settings, "quantization_config": settings})
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=3e-5)
    check_codes(tmp_path, model, wide=dtype == "float32")


@pytest.mark.parametrize(
    ("bits", "kept", "has_codes"),
    [
        (2, "int2g64", True),
        (3, "int3g64", True),
        (4, "int4g64", True),
        (5, "int5g64", True),
        (6, "int6g64", True),
        (8, "int8", False),
    ],
)
def test_what_is_kept(tmp_path: Path, bits: int, kept: str, has_codes: bool) -> None:
    write_model(
        tmp_path,
        {"quantization": {"group_size": 64, "bits": bits}},
        lambda _, w: quantized(w, bits, 64, "float16"),
        **SIZES,
    )
    stored = open_checkpoint(tmp_path).tensors["model.layers.0.mlp.down_proj.weight"]
    assert (stored.number_format, stored.kept, stored.has_codes) == (f"MLX {bits} bits, groups of 64", kept, has_codes)
    assert stored.n_bytes == 128 * 256 * bits // 8 + 2 * 2 * 128 * 4


def test_settings_that_mlx_does_not_write(tmp_path: Path) -> None:
    write_model(tmp_path, {}, lambda _, w: quantized(w, 4, 64, "float16"), **SIZES)
    for settings, message in (
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, r"quantization\.mode is 'mxfp4'; only 'affine'"),
        ({"group_size": 64, "bits": 4, "lm_head": {"mode": "nvfp4"}}, r"quantization\.mode is 'nvfp4'; only 'affine'"),
        ({"group_size": 48, "bits": 4}, r"quantization\.group_size is 48; MLX has 32, 64, 128"),
        ({"group_size": 64, "bits": True}, r"quantization\.bits is True; MLX has 2, 3, 4, 5, 6, 8"),
        ({"group_size": 64, "bits": 4, "lm_head": {"bits": 7}}, r"quantization\.bits is 7"),
        (
            {"group_size": 32, "bits": 4},
            r"tensor '.*\.weight' is U32 of shape \(.*\), not U32 of .* as the settings ask;",
        ),
    ):
        edit_config(tmp_path, {"quantization": settings})
        with pytest.raises((CheckpointFormatError, ConfigError), match=message):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("scales", lambda t: t[:-1], r"biases' is F16 of shape \(256, 2\), not .* of \(255, 2\)"),
        ("biases", lambda t: t[:, :-1], r"biases' is F16 of shape \(256, 1\), not .* of \(256, 2\)"),
        ("weight", lambda t: t[:, :-1], r"weight' is U32 of shape \(256, 15\), not U32 of \(256, 16\)"),
        ("weight", lambda t: t.view(torch.int32), r"weight' is I32 of shape"),
        ("biases", lambda t: None, r"needs .*up_proj\.biases, which no file holds"),
        ("weight", lambda t: None, r"needs .*up_proj\.weight, which no file holds"),
        ("biases", lambda t: t.fill_(float("nan")), r"up_proj\.biases' holds NaN or infinity"),
    ],
)
def test_damaged_parts_are_named(tmp_path: Path, end: str, change: Any, message: str) -> None:
    write_model(
        tmp_path,
        {"quantization": {"bits": 4}},
        lambda _, w: quantized(w, 4, 64, "float16"),
        **SIZES,
        num_hidden_layers=1,
    )
    damage(tmp_path, f"model.layers.0.mlp.up_proj.{end}", change)
    with pytest.raises(CheckpointFormatError, match=message):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_scales_that_float16_cannot_hold(tmp_path: Path, kernels: str) -> None:
    write_model(tmp_path, {"quantization": {"bits": 4}}, lambda _, w: quantized(w, 4, 64, "float32"), **SIZES)
    damage(tmp_path, "model.layers.1.mlp.up_proj.scales", lambda scales: scales * 1e8)
    with pytest.raises(CheckpointFormatError, match=r"up_proj.* int4g64 cannot; load it with --quantize none"):
        load_model(Llama, open_checkpoint(tmp_path), "float32", "cpu", fuser(kernels), "auto")
    assert Llama.from_pretrained(tmp_path, dtype="float32")
