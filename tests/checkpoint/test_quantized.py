"""Quantised Hugging Face checkpoints are refused in one sentence that names the method and the bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_mini.checkpoint.hf.config import from_hf
from llama_mini.checkpoint.meta.params import from_params
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.cli.convert import convert
from llama_mini.errors import CheckpointError, CheckpointFormatError, ConfigError
from tests.tiny_families import random_model
from tests.tiny_models import HF_TINY

PROJECTION = "model.layers.0.self_attn.q_proj"
ONLY = "of quantised checkpoints, only GGUF files are read: give the original, in bfloat16 or float16, or a GGUF file"
INT4_GROUP = {"group_0": {"weights": {"num_bits": 4, "type": "int"}, "targets": ["Linear"]}}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "by gptq to 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}, "by awq to 4 bits"),
        ({"quantization_config": {"quant_method": "exl3", "bits": 3}}, "by exl3 to 3 bits"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "by bitsandbytes to 4 bits"),
        ({"quantization_config": {"load_in_8bit": True, "load_in_4bit": False}}, " to 8 bits"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "by fp8"),
        ({"quantization_config": MODELOPT}, "by NVFP4"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": INT4_GROUP}},
            "by compressed-tensors to 4 bits",
        ),
        ({"compression_config": {"config_groups": INT4_GROUP}}, "by compressed-tensors to 4 bits"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "by MLX to 4 bits"),
        ({"quantization_config": "int4"}, ""),
        ({"quantization_config": {"quant_method": ["a"], "bits": "4"}}, ""),
    ],
)
def test_settings_of_config_json(settings: dict[str, Any], how: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_hf({"model_type": "llama"} | HF_TINY | settings)
    assert str(caught.value).startswith(f"{next(iter(settings))} is ")
    assert f"the checkpoint is quantised{how and f' {how.strip()}'}; {ONLY}" in str(caught.value)


@pytest.mark.parametrize("nothing", [None, {}, False])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_settings_that_say_nothing(key: str, nothing: object) -> None:
    assert from_hf({"model_type": "llama"} | HF_TINY | {key: nothing})


CODES = torch.zeros(8, 8, dtype=torch.int32)
ONES = torch.ones(8)
STORED = {  # what each method stores in place of the projection's weight
    "GPTQ": {"qweight": CODES, "qzeros": CODES, "scales": ONES.half(), "g_idx": torch.zeros(8, dtype=torch.int32)},
    "AWQ": {"qweight": CODES, "qzeros": CODES, "scales": ONES.half()},
    "bitsandbytes": {"weight": CODES.to(torch.int8), "SCB": ONES},
    "compressed-tensors": {"weight_packed": CODES, "weight_scale": ONES, "weight_shape": torch.tensor([8, 64])},
    "FP8": {"weight": ONES.to(torch.float8_e4m3fn), "weight_scale_inv": ONES},
    "ModelOpt": {"weight": CODES.to(torch.uint8), "weight_scale": ONES, "weight_scale_2": ONES},
    "MLX": {"weight": CODES.to(torch.uint32), "scales": ONES.half(), "biases": ONES.half()},
}
STORED["bitsandbytes of 4 bits"] = {"weight": CODES.to(torch.uint8), "weight.absmax": CODES.to(torch.uint8)}


def write(directory: Path, stored: dict[str, torch.Tensor], pickled: bool = False) -> None:
    random_model("llama", 0).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    del tensors[f"{PROJECTION}.weight"]
    tensors |= {f"{PROJECTION}.{end}": values.clone() for end, values in stored.items()}
    if pickled:
        (directory / "model.safetensors").unlink()
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("method", STORED)
def test_names_of_tensors(tmp_path: Path, method: str) -> None:
    write(tmp_path, STORED[method])
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == f"{tmp_path}: the checkpoint is quantised by {method.partition(' ')[0]}; {ONLY}"


@pytest.mark.parametrize("method", ["GPTQ", "bitsandbytes"])
def test_pickles_that_a_conversion_reads(tmp_path: Path, method: str) -> None:
    write(tmp_path / "pickled", STORED[method], pickled=True)
    with pytest.raises(CheckpointFormatError, match=f"the checkpoint is quantised by {method}; of"):
        convert(tmp_path / "pickled", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("name", "content", "stored", "how"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128}, STORED["GPTQ"], " by GPTQ to 4 bits"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, STORED["AWQ"], " by AWQ to 4 bits"),
        ("hf_quant_config.json", MODELOPT, STORED["ModelOpt"], " by NVFP4"),
        ("hf_quant_config.json", MODELOPT, {"weight": ONES.to(torch.float8_e4m3fn)}, " by NVFP4"),
        ("quantize_config.json", "no JSON", {"weight": CODES}, " by GPTQ"),
    ],
)
def test_files_beside_the_weights(tmp_path: Path, name: str, content: Any, stored: Any, how: str) -> None:
    write(tmp_path, stored)
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(tmp_path)
    assert f": the checkpoint is quantised{how}; " in str(caught.value)


def test_such_a_file_beside_plain_weights_changes_nothing(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    assert open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_without_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path, {"weight": ONES.to(dtype)})
    with pytest.raises(CheckpointError, match=rf"'{PROJECTION}\.weight' is quantised to 8 bits \(F8_.*; give a check"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["quantization_args", "quantization"])
def test_metas_own(key: str) -> None:
    raw = {"dim": 64, "n_layers": 2, "n_heads": 4, key: {"scheme": "int4_weight_int8_dynamic_activation"}}
    with pytest.raises(ConfigError, match=rf"{key} is .*: the checkpoint is quantised; of"):
        from_params(raw, {})
