"""Which method a checkpoint is quantised by: from its settings, the files beside them, and the tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load_file, save_file

from llama_mini.checkpoint.meta.params import from_params
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.cli.convert import convert
from llama_mini.errors import CheckpointError, CheckpointFormatError, ConfigError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from tests.checkpoint.quantized.libraries import save_compressed, scheme
from tests.checkpoint.quantized.writers import edit_config, gptq, layers_only, write_model
from tests.tiny_families import logits, random_model
from tests.tiny_models import random_tokens

PROJECTION = "model.layers.0.self_attn.q_proj"
KNOWN = "of quantised checkpoints, those of GPTQ, AWQ, AutoRound, MLX"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
CODES = torch.zeros(8, 8, dtype=torch.int32)
ONES = torch.ones(8)
TOKENS = random_tokens(1, 9)


def write_gptq(directory: Path, settings: dict[str, Any]) -> Any:
    rng = np.random.default_rng(0)
    layout = {"bits": 4, "size": 32, "sym": True, "v1": True, "order": False}
    return write_model(
        directory,
        settings,
        lambda name, weight: gptq(rng, tuple(weight.shape), **layout) if layers_only(name, weight) else None,
    )


def add(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path) | tensors, path)


@pytest.mark.filterwarnings("ignore:config.json. unknown text_config")
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quantization_config": {"quant_method": "exl3", "bits": 3}}, "exl3"),
        ({"quantization_config": {"quant_method": "hqq", "quant_config": {}}}, "hqq"),
        ({"text_config": {"quantization_config": {"quant_method": "aqlm"}}}, "aqlm"),
        ({"quantization_config": {"quant_method": ["a"], "bits": "4"}}, r"\['a'\]"),
        ({"quantization_config": {"bits": 4}}, None),
    ],
)
def test_other_methods_are_named_beside_those_that_are_read(
    tmp_path: Path, settings: dict[str, Any], name: str | None
) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    edit_config(tmp_path, settings)
    what = rf"is of .{name}." if name else "names no quant_method"
    with pytest.raises(ConfigError, match=rf"config\.json: quantization_config {what}: {KNOWN}.* GGUF.*: give"):
        open_checkpoint(tmp_path)


def test_settings_that_are_no_object(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    edit_config(tmp_path, {"quantization_config": "int4"})
    with pytest.raises(ConfigError, match="quantization_config must be an object, not 'int4'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("nothing", [None, {}, False])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_settings_that_say_nothing(tmp_path: Path, key: str, nothing: object) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    edit_config(tmp_path, {key: nothing})
    assert open_checkpoint(tmp_path)


def test_settings_over_plain_weights_are_ignored(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    edit_config(tmp_path, {"quantization_config": GPTQ})
    with pytest.warns(LlamaMiniWarning, match="quantization_config names GPTQ, but no tensor is quantised: ignored"):
        open_checkpoint(tmp_path)


def test_two_methods_in_config_json(tmp_path: Path) -> None:
    write_gptq(tmp_path, {"quantization_config": GPTQ, "quantization": {"group_size": 64, "bits": 4}})
    with pytest.raises(ConfigError, match=r"quantization_config is of GPTQ, but quantization of MLX; remove one"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("end", "method"), [("SCB", "bitsandbytes"), ("weight_packed", "compressed-tensors"), ("weight_scale_inv", "FP8")]
)
def test_tensors_of_two_methods(tmp_path: Path, end: str, method: str) -> None:
    write_gptq(tmp_path, {"quantization_config": GPTQ})
    add(tmp_path, {f"lm_head.{end}": ONES})
    with pytest.raises(CheckpointFormatError, match=rf"'lm_head\.{end}' is of {method}, but .* names GPTQ; give"):
        open_checkpoint(tmp_path)


def test_a_matrix_that_is_also_plain(tmp_path: Path) -> None:
    write_gptq(tmp_path, {"quantization_config": GPTQ})
    add(tmp_path, {f"{PROJECTION}.weight": torch.ones(64, 64)})
    with pytest.raises(CheckpointFormatError, match=rf"holds {PROJECTION}\.weight both quantised and plain; remove"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("end", "method"),
    [
        ("g_idx", "GPTQ"),
        ("qzeros", "AWQ"),
        ("biases", "MLX"),
        ("absmax", "bitsandbytes"),
        ("weight_scale_2", "ModelOpt"),
    ],
)
def test_tensors_without_settings(tmp_path: Path, end: str, method: str) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    add(tmp_path, {f"{PROJECTION}.{end}": CODES})
    with pytest.raises(
        CheckpointFormatError, match=rf"'{PROJECTION}\.{end}' is quantised by {method}, but config\.json"
    ):
        open_checkpoint(tmp_path)


def test_settings_in_a_file_beside_the_weights(tmp_path: Path) -> None:
    model = write_gptq(tmp_path, {})
    (tmp_path / "quantize_config.json").write_text(json.dumps(GPTQ))
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*no tensor is quantised")
def test_a_quantised_cache_alone(tmp_path: Path) -> None:
    """compressed-tensors may state no group of matrices; the cache has scales and zero points."""
    model = random_model("llama", 0)
    model.save_pretrained(tmp_path)
    settings = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}, "config_groups": None}
    edit_config(tmp_path, {"quantization_config": settings | {"kv_cache_scheme": {"num_bits": 8}}})
    add(tmp_path, {f"{PROJECTION[:-6]}{end}": ONES.clone() for end in ("k_scale", "k_zero_point", "v_zero_point")})
    with pytest.warns(
        LlamaMiniWarning, match="kv_cache_scheme of .* ignored: kv_dtype=int8 keeps keys and values in 8 bits"
    ):
        mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)


def test_sizes_of_blocks_as_text(tmp_path: Path) -> None:
    """As old versions of compressed-tensors wrote them, and as it still reads them."""
    how = scheme("Linear", num_bits=8, type="float", strategy="block", block_structure=[16, 32])
    model, path = save_compressed(tmp_path, {"group": how}), tmp_path / "config.json"
    config = json.loads(path.read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights["block_structure"] = "16x32"
    assert QuantizationArgs(**weights).block_structure == [16, 32]
    path.write_text(json.dumps(config))
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)
    path.write_text(json.dumps(config).replace("16x32", "16x"))
    with pytest.raises(ConfigError, match=r"block_structure must be \[rows, columns\], not '16x'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["no JSON", json.dumps(GPTQ | {"bits": 5})])
def test_a_bad_file_beside_the_weights(tmp_path: Path, content: str) -> None:
    write_gptq(tmp_path, {})
    (tmp_path / "quantize_config.json").write_text(content)
    with pytest.raises((CheckpointError, ConfigError), match=r"quantize_config\.json"):
        open_checkpoint(tmp_path)


def test_such_a_file_beside_plain_weights_changes_nothing(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    assert open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_without_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    add(tmp_path, {f"{PROJECTION}.weight": ONES.to(dtype)})
    with pytest.raises(CheckpointError, match=rf"'{PROJECTION}\.weight' is quantised to 8 bits \(F8_.*; give a check"):
        open_checkpoint(tmp_path)


def test_pickles_that_a_conversion_reads(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {f"{PROJECTION}.g_idx": CODES}
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointFormatError, match="is quantised by GPTQ, which is read from Hugging"):
        convert(tmp_path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("key", ["quantization_args", "quantization"])
def test_metas_own(key: str) -> None:
    raw = {"dim": 64, "n_layers": 2, "n_heads": 4, key: {"scheme": "int4_weight_int8_dynamic_activation"}}
    with pytest.raises(ConfigError, match=rf"{key} is .*; give the checkpoint that is not quantised"):
        from_params(raw, {})
