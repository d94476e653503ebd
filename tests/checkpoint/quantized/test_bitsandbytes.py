"""bitsandbytes: what transformers saves with it is read as what it dequantises, on the CPU."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import save_file
from torch import Tensor

from llama_mini.checkpoint.io.safetensors_header import read_header
from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.checkpoint.quantized.bitsandbytes import matrices
from llama_mini.checkpoint.quantized.weight import QuantizedMatrix, cut_matrix, read_matrix
from llama_mini.errors import CheckpointFormatError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser
from tests.checkpoint.code_values import code_values, joined
from tests.checkpoint.quantized.libraries import save_bitsandbytes
from tests.optimize.conftest import error
from tests.tiny_families import logits
from tests.tiny_models import random_tokens

TOKENS = random_tokens(2, 12)
SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": ["lm_head", "o_proj"]},
    "in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}
ALSO = "bitsandbytes in 8 bits also quantises the activations of this model; here its weights alone are quantised"
Q = "layers.0.q_proj."


@pytest.mark.filterwarnings(f"ignore:{ALSO}", "ignore:MatMul8bitLt")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_model(tmp_path: Path, name: str) -> None:
    model = save_bitsandbytes(tmp_path, **SETTINGS[name])
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    # bitsandbytes rounds what it dequantises to bfloat16.
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5 if name == "int8" else 0.03)
    for weight, expected in dict(model.named_parameters()).items():
        if "_proj" in weight and name != "int8":
            ours = mine.get_parameter(to_ours(weight))
            assert torch.equal(ours.bfloat16(), expected.bfloat16())
    source = open_checkpoint(tmp_path)
    fast = load_model(Llama, source, "float32", "cpu", fuser("off"), "auto")
    assert error(fast(TOKENS), logits(model, TOKENS)) < (1e-3 if name == "int8" else 2e-2)
    found = {
        key.rpartition("layers.")[2]: (tensor.number_format, tensor.kept) for key, tensor in source.tensors.items()
    }
    assert found["0.mlp.up_proj.weight"] == (
        {
            "nf4": "bitsandbytes NF4, blocks of 64, nested",
            "fp4": "bitsandbytes FP4, blocks of 64",
            "in bfloat16": "bitsandbytes NF4, blocks of 64",
            "int8": "bitsandbytes int8, a scale for each row",
        }[name],
        {"in bfloat16": "nf4", "int8": "int8row"}.get(name, name),
    )
    assert (found["0.self_attn.o_proj.weight"][1] is None) == (name == "fp4")


def to_ours(name: str) -> str:
    return name.removeprefix("model.").replace("self_attn", "attention").replace("mlp", "feed_forward")


def four_bits(
    kind: str, block: int, nested: bool, rows: int = 40, columns: int = 96
) -> tuple[dict[str, Tensor], Tensor]:
    """A random matrix as bitsandbytes stores it, and the values that it dequantises."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(block + columns))
    packed, state = functional.quantize_4bit(weight, None, None, block, nested, kind)
    parts = {f"weight.{part}": values for part, values in state.as_dict(packed=True).items()}
    largest = state.absmax
    if state.nested:
        largest = functional.dequantize_blockwise(largest, state.state2) + state.offset
    # The CPU's own kernel is wrong where a row is not of whole blocks, and compiling this one takes a minute.
    dequantise = _dequantize_4bit_compute.__wrapped__
    return {"weight": packed, **parts}, dequantise(
        packed.flatten(), largest, state.code, block, weight.shape, torch.float32
    )


def store(directory: Path, stored: dict[str, Tensor]) -> list[QuantizedMatrix]:
    path = directory / "model.safetensors"
    save_file({Q + part: values.contiguous() for part, values in stored.items()}, path)
    return list(matrices({}, read_header(path)))


def floats(matrix: QuantizedMatrix, at_once: int = 16) -> Tensor:
    return torch.cat([rows for _, rows in read_matrix(matrix, matrix.floats, at_once)])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("block", "nested", "columns"), [(64, True, 96), (32, False, 64), (4096, False, 96)])
def test_four_bits(tmp_path: Path, kind: str, block: int, nested: bool, columns: int) -> None:
    """Blocks go on from row to row. Scales are rounded to float16, and the table's values to whole steps."""
    stored, expected = four_bits(kind, block, nested, columns=columns)
    (matrix,) = store(tmp_path, stored)
    assert (matrix.name, matrix.shape, matrix.kept) == (f"{Q}weight", (40, columns), kind)
    torch.testing.assert_close(floats(matrix), expected, rtol=2**-22, atol=0)
    part = cut_matrix(matrix, "part", 16, 9)
    torch.testing.assert_close(floats(part, 4), expected[16:25], rtol=2**-22, atol=0)
    assert matrix.codes is not None
    rows = joined([rows for _, rows in read_matrix(matrix, matrix.codes, 16)])
    largest = rows.scale.double().numpy().repeat(32, 1) * {"nf4": 112, "fp4": 120}[kind]
    found, numbers = code_values(rows, kind)[0] / largest, expected.double().numpy() / largest
    errors = abs(found - numbers)
    assert errors.max() < (0.0045 if kind == "nf4" else 0.0053)  # half a step of 1/112; 1/192 is 0 or 1/120
    if kind == "fp4":
        assert (errors <= 2**-11 * abs(numbers))[abs(numbers) > 0.01].all()


def test_smallest_number_of_fp4(tmp_path: Path) -> None:
    """1/192 of the largest magnitude is between 0 and the 1/120 of the table: on average it is right."""
    weight = torch.tensor([1 / 192, -1 / 192]).repeat_interleave(32).repeat(40, 1)
    weight[:, 63] = 1
    packed, state = functional.quantize_4bit(weight, None, None, 64, False, "fp4")
    parts = {f"weight.{part}": values for part, values in state.as_dict(packed=True).items()}
    (matrix,) = store(tmp_path, {"weight": packed, **parts})
    assert matrix.codes is not None
    rows = joined([rows for _, rows in read_matrix(matrix, matrix.codes, 16)])
    found = code_values(rows, "fp4")[0]
    np.testing.assert_allclose(found[:, :32].mean(1), 1 / 192, rtol=2**-10)
    np.testing.assert_allclose(found[:, 32:56].mean(1), -1 / 192, rtol=2**-10)
    np.testing.assert_allclose(found[:, 63], 1, rtol=2**-11)


def test_odd_sizes(tmp_path: Path) -> None:
    """An odd number of columns: every second row begins in the middle of a byte."""
    stored, expected = four_bits("nf4", 64, False, rows=5, columns=13)
    (matrix,) = store(tmp_path, stored)
    assert matrix.codes is None
    for at_once in (1, 2, 5):
        torch.testing.assert_close(floats(matrix, at_once), expected, rtol=2**-22, atol=0)


def test_int8(tmp_path: Path) -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)).half()
    values, scales, _ = functional.int8_vectorwise_quant(weight)
    with pytest.warns(LlamaMiniWarning, match=ALSO):
        (matrix,) = store(tmp_path, {"weight": values, "SCB": scales, "weight_format": torch.tensor(0).to(torch.uint8)})
    expected = functional.int8_vectorwise_dequant(values, scales)
    torch.testing.assert_close(floats(matrix), expected, rtol=2**-21, atol=1e-6)
    assert matrix.codes is not None
    ((_, (codes, scale, none, _)),) = read_matrix(matrix, matrix.codes, 40)
    assert none is None
    assert np.array_equal(codes.int().numpy() - 128, values.int().numpy())
    torch.testing.assert_close(scale.float(), (scales / 127)[:, None], rtol=2**-11, atol=0)


def test_unknown_settings_are_said(tmp_path: Path) -> None:
    store(tmp_path, {"weight": torch.ones(2, 2)})
    with pytest.warns(LlamaMiniWarning, match="unknown new ignored"):
        list(matrices({"load_in_4bit": True, "bnb_4bit_new": 1, "new": 1}, read_header(tmp_path / "model.safetensors")))


STATE = "weight.quant_state.bitsandbytes__nf4"


def state(**changes: Any) -> Tensor:
    values = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [40, 96], "nested_blocksize": 256}
    return as_bytes(json.dumps(values | {"nested_dtype": "float32", "nested_offset": 0.5} | changes))


def as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"weight.absmax": None}, rf"needs {Q}weight\.absmax, which no file holds"),
        ({"weight.quant_map": None}, rf"needs {Q}weight\.quant_map"),
        ({"weight.nested_absmax": None}, rf"needs {Q}weight\.nested_absmax, which no file holds"),
        ({STATE: None}, rf"{Q}weight' needs {Q}weight\.quant_state\.bitsandbytes__nf4 or .*fp4, which no file holds"),
        ({"weight": torch.zeros(1900, 1, dtype=torch.uint8)}, r"weight' is U8 of shape \(1900,\), not U8 of \(1920,\)"),
        ({"weight.absmax": torch.zeros(59, dtype=torch.uint8)}, r"absmax' is U8 of shape \(59,\), not U8 of \(60,\)"),
        ({"weight.absmax": torch.zeros(60)}, r"absmax' is F32 of shape \(60,\), not U8 of \(60,\)"),
        ({"weight.nested_absmax": torch.zeros(2)}, r"nested_absmax' is F32 of shape \(2,\), not F32 of \(1,\)"),
        ({"weight.nested_absmax": torch.full((1,), torch.nan)}, r"nested_absmax' holds NaN or infinity"),
        (
            {"weight.nested_absmax": torch.full((1,), 3e38), STATE: state(nested_offset=3e38)},
            "absmax' gives NaN or inf",
        ),
        ({"weight.nested_quant_map": torch.zeros(255)}, r"nested_quant_map' is F32 of shape \(255,\)"),
        ({"weight.quant_map": torch.zeros(15)}, r"quant_map' is F32 of shape \(15,\), not F32 of \(16,\)"),
        ({STATE: as_bytes("{")}, r"bitsandbytes__nf4' is not JSON"),
        ({STATE: torch.full((9,), 255, dtype=torch.uint8)}, r"bitsandbytes__nf4' is not JSON"),
        ({STATE: torch.zeros(5000, dtype=torch.uint8)}, r"has 5000 bytes, not JSON of up to 4096"),
        ({STATE: torch.zeros(9)}, r"bitsandbytes__nf4' is F32 of shape"),
        ({STATE: as_bytes("[1]")}, r"must be a JSON object whose quant_type is nf4, not \[1\]"),
        ({STATE: state(quant_type="fp4")}, r"must be a JSON object whose quant_type is nf4, not .*fp4"),
        ({STATE: state(shape=[40])}, r"must hold a shape of two numbers, not \[40\]"),
        ({STATE: state(shape=[40, -96])}, r"holds -96 where a size must be"),
        ({STATE: state(shape=[10**400, 1])}, r"holds a number of 401 digits, which is too large"),
        ({STATE: state(shape=[40, 95])}, r"weight' is U8 of shape \(1920,\), not U8 of \(1900,\)"),
        ({STATE: state(blocksize=0)}, r"holds 0 where a size must be"),
        ({STATE: state(blocksize=128)}, r"absmax' is U8 of shape \(60,\), not U8 of \(30,\)"),
        ({STATE: state(nested_blocksize="256")}, r"holds '256' where a size must be"),
        ({STATE: state(nested_offset=None)}, r"must hold a finite nested_offset, not None"),
    ],
)
def test_faults_of_four_bits(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    stored = {part: values for part, values in (four_bits("nf4", 64, True)[0] | changes).items() if values is not None}
    with pytest.raises(CheckpointFormatError, match=what):
        list(map(floats, store(tmp_path, stored)))


@pytest.mark.filterwarnings(f"ignore:{ALSO}")
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"SCB": torch.ones(39)}, r"SCB' is F32 of shape \(39,\), not F64 or F32"),
        ({"SCB": torch.full((40,), torch.inf)}, "SCB' holds NaN or infinity"),
        ({"weight": torch.ones(40, 96)}, r"weight' is F32 of shape \(40, 96\), not I8"),
        ({"weight_format": torch.tensor(2).to(torch.uint8)}, "weight_format' is not 0, rows one after another"),
    ],
)
def test_faults_of_eight_bits(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    stored = {"weight": torch.zeros(40, 96, dtype=torch.int8), "SCB": torch.ones(40)}
    with pytest.raises(CheckpointFormatError, match=what):
        list(map(floats, store(tmp_path, stored | changes)))
