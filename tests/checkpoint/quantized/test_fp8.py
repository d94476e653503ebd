"""FP8 as DeepSeek, vLLM, FBGEMM and ModelOpt write it, and ModelOpt's NVFP4, against transformers and float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from llama_mini.checkpoint.io.safetensors_header import read_header
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.checkpoint.quantized import fp8
from llama_mini.checkpoint.quantized.weight import QuantizedMatrix, read_matrix
from llama_mini.errors import CheckpointFormatError, ConfigError, LlamaMiniError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from tests.checkpoint.quantized.libraries import quantise, scheme
from tests.checkpoint.quantized.writers import write_model
from tests.tiny_families import logits
from tests.tiny_models import random_tokens

TOKENS = random_tokens(2, 12)
ALSO = "also quantises the activations of this model; here its weights alone are quantised"
pytestmark = pytest.mark.filterwarnings(f"ignore:(FP8|ModelOpt) {ALSO}")
ROWS, COLUMNS = 96, 64
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def random_fp8(seed: int, shape: tuple[int, int] = (ROWS, COLUMNS), dtype: torch.dtype = E4M3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(50).to(dtype)


def random_scales(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) / 400 + 1e-4


def store(directory: Path, stored: dict[str, Tensor], settings: dict[str, Any], read: Any = fp8.matrices) -> list[Any]:
    path = directory / "model.safetensors"
    save_file({f"layers.0.q_proj.{part}": values.contiguous() for part, values in stored.items()}, path)
    return list(read(settings, read_header(path)))


def floats(matrix: QuantizedMatrix) -> Tensor:
    return torch.cat([rows for _, rows in read_matrix(matrix, matrix.floats, 16)])


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("part", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("grid", [(), (1,), (ROWS,), (ROWS, 1), (3, 4), (1, 1)])
def test_scales_of_the_matrix_rows_and_blocks(
    tmp_path: Path, grid: tuple[int, ...], part: str, dtype: torch.dtype
) -> None:
    weight, scales = random_fp8(1, dtype=dtype), random_scales(2, *grid)
    block = [32, 16] if grid == (3, 4) else [ROWS, 128] if grid == (1, 1) else None
    stored = {"weight": weight, part: scales, "input_scale": torch.ones(())}
    (matrix,) = store(tmp_path, stored, {"quant_method": "fp8", "weight_block_size": block})
    flat = scales.view(-1, 1) if len(grid) < 2 else scales
    expected = Fp8Dequantize(None)._dequantize_one(weight, flat, torch.float32)
    assert torch.equal(floats(matrix), expected)
    assert (matrix.kept, matrix.codes is None) == ("int8", block == [32, 16])
    if matrix.codes is None:
        return
    ((_, (codes, scale, none, _)),) = read_matrix(matrix, matrix.codes, ROWS)
    assert none is None
    groups = expected.unflatten(1, (-1, 32))
    errors = ((codes.float() - 128).unflatten(1, (-1, 32)) * scale.float()[..., None] - groups).abs()
    limit = 2**-11 * groups.abs()  # of the scale's rounding to float16
    is_small = groups.abs() < groups.abs().amax(-1, keepdim=True) / 8
    assert (errors <= limit + is_small * scale.float()[..., None] / 2).all()
    assert is_small.float().mean() < 0.4


@pytest.mark.parametrize("block", [(128, 128), (40, 24), (7, 64), (96, 5)])
def test_blocks_that_the_sizes_are_no_multiples_of(tmp_path: Path, block: tuple[int, int]) -> None:
    weight, scales = random_fp8(3), random_scales(4, -(-ROWS // block[0]), -(-COLUMNS // block[1]))
    stored = {"weight": weight, "weight_scale_inv": scales}
    (matrix,) = store(tmp_path, stored, {"weight_block_size": list(block)})
    spread = scales.double().numpy().repeat(block[0], 0)[:ROWS].repeat(block[1], 1)[:, :COLUMNS]
    np.testing.assert_allclose(floats(matrix), weight.double().numpy() * spread, rtol=2**-23)


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    weight, powers = random_fp8(5), torch.randint(100, 130, (3, 2), generator=torch.Generator().manual_seed(0))
    stored = {"weight": weight, "weight_scale_inv": powers.to(torch.uint8)}
    (matrix,) = store(tmp_path, stored, {"weight_block_size": [32, 32], "scale_fmt": "ue8m0"})
    assert torch.equal(
        floats(matrix), Fp8Dequantize(None)._dequantize_one(weight, powers.to(torch.uint8), torch.float32)
    )


def test_modelopt(tmp_path: Path) -> None:
    weight, scale = random_fp8(6), random_scales(7)
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    stored = {"weight": weight, "weight_scale": scale, "input_scale": torch.ones(())}
    (matrix,) = store(tmp_path, stored, settings, fp8.modelopt)
    assert torch.equal(floats(matrix), weight.float() * scale)


def test_modelopt_nvfp4(tmp_path: Path) -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(8)).bfloat16()
    stored, expected = quantise(
        weight, scheme("Linear", num_bits=4, type="float", strategy="tensor_group", group_size=16)
    )
    named = {"weight": stored["weight_packed"], "weight_scale": stored["weight_scale"]}
    named["weight_scale_2"] = 1 / stored["weight_global_scale"]
    (matrix,) = store(tmp_path, named, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, fp8.modelopt)
    torch.testing.assert_close(floats(matrix), expected.float(), rtol=2**-8, atol=0)  # the library rounds to bfloat16


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8"])
def test_a_model(tmp_path: Path, method: str) -> None:
    """The matrices of the layers in FP8, but for those of `modules_to_not_convert`."""
    settings: dict[str, Any] = {"quant_method": method, "modules_to_not_convert": ["lm_head", "o_proj"]}
    settings |= {"activation_scale_ub": 1200.0} if method == "fbgemm_fp8" else {"weight_block_size": [32, 64]}

    def quantize(name: str, weight: Tensor) -> Any:
        if "layers" not in name or "o_proj" in name:
            return None
        grid = (len(weight), 1) if method == "fbgemm_fp8" else (-(-len(weight) // 32), -(-weight.shape[1] // 64))
        stored, scales = random_fp8(len(name), tuple(weight.shape)), random_scales(len(name), *grid) / 50
        block = (1, weight.shape[1]) if method == "fbgemm_fp8" else (32, 64)
        spread = scales.double().numpy().repeat(block[0], 0)[: len(weight)].repeat(block[1], 1)[:, : weight.shape[1]]
        part = "weight_scale" if method == "fbgemm_fp8" else "weight_scale_inv"
        return {"weight": stored, part: scales}, stored.double().numpy() * spread

    model = write_model(tmp_path, {"quantization_config": settings}, quantize)
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)
    stored = open_checkpoint(tmp_path).tensors
    assert stored["model.layers.0.self_attn.q_proj.weight"].kept == "int8"
    assert stored["model.layers.0.self_attn.o_proj.weight"].kept is None


WHOLE = {"weight": random_fp8(1), "weight_scale_inv": random_scales(2, 3, 2)}


@pytest.mark.parametrize(
    ("changes", "settings", "what"),
    [
        ({"weight_scale_inv": None, "input_scale": torch.ones(())}, {}, r"q_proj\.weight' needs one .* but has 0"),
        ({"weight_scale": random_scales(1)}, {}, r"weight_scale_inv and weight_scale, but has 2"),
        ({"weight_scale_inv": random_scales(2, 2, 2)}, {}, r"weight_scale_inv' is F32 of shape \(2, 2\), not .* 3 x 2"),
        ({"weight_scale_inv": random_scales(2, 3, 2).int()}, {}, r"weight_scale_inv' is I32 of shape"),
        ({}, {"weight_block_size": [64, 32]}, "for 2 x 2 blocks of 64 x 32"),
        ({}, {"weight_block_size": None}, "for 1 x 1 blocks of 96 x 64"),
        ({}, {"weight_block_size": [0, 32]}, "weight_block_size must be a whole number of at least 1, not 0"),
        ({}, {"weight_block_size": "128"}, r"weight_block_size must be \[rows, columns\], not '128'"),
        ({"weight": random_fp8(1).to(torch.int8)}, {}, r"q_proj\.weight' is I8 of shape .* not F8_E4M3 or F8_E5M2"),
        ({"weight": random_fp8(1)[0]}, {}, r"q_proj\.weight' is of shape \(64,\), but must be a matrix"),
        ({"weight": torch.full((ROWS, COLUMNS), torch.nan).to(E4M3)}, {}, r"q_proj\.weight' holds NaN or infinity"),
        ({"weight": torch.full((ROWS, COLUMNS), torch.inf).to(E5M2)}, {}, r"q_proj\.weight' holds NaN or infinity"),
        ({"weight_scale_inv": torch.full((3, 2), torch.nan)}, {}, r"weight_scale_inv' holds NaN or infinity"),
        ({"weight_scale_inv": torch.full((3, 2), 255, dtype=torch.uint8)}, {}, r"_scale_inv' holds NaN or inf"),
    ],
)
def test_faults(tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], what: str) -> None:
    stored = {part: values for part, values in (WHOLE | changes).items() if values is not None}
    with pytest.raises(LlamaMiniError, match=what):
        list(map(floats, store(tmp_path, stored, {"weight_block_size": [32, 32]} | settings)))


def test_nan_is_no_code(tmp_path: Path) -> None:
    weight = random_fp8(1)
    weight.view(torch.uint8)[90, 3] = 0x7F
    (matrix,) = store(tmp_path, WHOLE | {"weight": weight}, {"weight_block_size": [32, 32]})
    assert matrix.codes is not None
    with pytest.raises(CheckpointFormatError, match=r"q_proj\.weight' holds NaN or infinity"):
        list(read_matrix(matrix, matrix.codes, 16))


def test_methods_of_modelopt_that_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown quant_algo 'W4A8_AWQ'; known: FP8, NVFP4"):
        store(tmp_path, WHOLE, {"quantization": {"quant_algo": "W4A8_AWQ"}}, fp8.modelopt)


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    with pytest.warns(LlamaMiniWarning) as told:
        store(tmp_path, WHOLE, {"weight_block_size": [32, 32], "new_key": 1, "kv_cache_scheme": "static"})
    assert [str(warning.message).partition(" of ")[0] for warning in told] == [
        "quantization_config: unknown new_key ignored",
        "FP8 also quantises the activations",
        "kv_cache_scheme",
    ]


def test_the_file_of_modelopt(tmp_path: Path) -> None:
    def quantize(name: str, weight: Tensor) -> Any:
        stored, scale = random_fp8(9, tuple(weight.shape)), random_scales(9) / 50
        parts = {"weight": stored, "weight_scale": scale, "input_scale": torch.ones(())}
        return (parts, stored.double().numpy() * float(scale)) if "q_proj" in name else None

    model = write_model(tmp_path, {}, quantize)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)
