"""AWQ, and AutoRound's files that are packed like it: the weights that the formula gives, in NumPy with float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.errors import ConfigError
from llama_mini.model.llama import Llama
from tests.checkpoint.quantized.writers import awq, check_codes, edit_config, layers_only, write_model
from tests.tiny_families import logits
from tests.tiny_models import random_tokens

TOKENS = random_tokens(1, 9)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def write(directory: Path, settings: dict[str, Any], size: int = 32) -> Any:
    rng = np.random.default_rng(0)
    return write_model(
        directory, settings, lambda name, w: awq(rng, tuple(w.shape), size) if layers_only(name, w) else None
    )


@pytest.mark.parametrize(("size", "n_kept"), [(32, 21), (16, 0), (-1, 21)])
def test_weights_and_logits(tmp_path: Path, size: int, n_kept: int) -> None:
    model = write(tmp_path, {"quantization_config": AWQ | {"group_size": size}}, size)
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)
    assert check_codes(tmp_path, model) == n_kept


def test_settings_in_a_file_beside_the_weights(tmp_path: Path) -> None:
    model = write(tmp_path, {})
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(settings))
    assert (
        open_checkpoint(tmp_path).tensors["model.layers.0.mlp.up_proj.weight"].number_format
        == "AWQ 4 bits, groups of 32"
    )
    assert check_codes(tmp_path, model) == 21


def test_auto_round(tmp_path: Path) -> None:
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_awq"}
    model = write(tmp_path, {"quantization_config": settings})
    assert check_codes(tmp_path, model) == 21


def test_settings_that_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, {})
    for changes, message in (
        ({"version": "gemv"}, "version is 'gemv'; only the layout 'gemm'"),
        ({"version": "gemv_fast"}, "version is 'gemv_fast'"),
        ({"version": "marlin"}, "version is 'marlin'"),
        ({"bits": 8}, "bits is 8; AWQ has 4"),
        ({"group_size": "32"}, "group_size must be a whole number"),
    ):
        edit_config(tmp_path, {"quantization_config": AWQ | changes})
        with pytest.raises(ConfigError, match=message):
            open_checkpoint(tmp_path)
