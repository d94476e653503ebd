"""compressed-tensors: what its compressors pack is read as what they unpack, on the CPU."""

import collections
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

from llama_mini.checkpoint.io.safetensors_header import read_header
from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.checkpoint.quantized.compressed_tensors import matrices
from llama_mini.checkpoint.quantized.weight import QuantizedMatrix, read_matrix
from llama_mini.errors import ConfigError, LlamaMiniError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser
from tests.checkpoint.code_values import code_values, joined
from tests.checkpoint.quantized.libraries import FP8_INPUTS, INT8_INPUTS, quantise, save_compressed, scheme
from tests.optimize.conftest import error
from tests.tiny_families import logits
from tests.tiny_models import random_tokens

TOKENS = random_tokens(2, 12)
GROUPS: dict[str, Any] = {"strategy": "group", "group_size": 32}
FLOATS = {"type": "float", "num_bits": 8}
SCHEMES: dict[str, tuple[QuantizationScheme, str, bool]] = {  # with the format kept, and whether codes are
    "2 bits": (scheme("Linear", num_bits=2, **GROUPS), "int2", True),
    "3 bits, asymmetric": (scheme("Linear", num_bits=3, symmetric=False, **GROUPS), "int3", True),
    "4 bits": (scheme("Linear", num_bits=4, **GROUPS), "int4", True),
    "4 bits, asymmetric": (scheme("Linear", num_bits=4, symmetric=False, **GROUPS), "int4", True),
    "4 bits, rows": (scheme("Linear", num_bits=4, strategy="channel", symmetric=False), "int4row", True),
    "4 bits, groups of 16": (scheme("Linear", num_bits=4, strategy="group", group_size=16), "int8", False),
    "5 bits": (scheme("Linear", num_bits=5, symmetric=False, **GROUPS), "int5", True),
    "6 bits": (scheme("Linear", num_bits=6, **GROUPS), "int6", True),
    "7 bits": (scheme("Linear", num_bits=7, **GROUPS), "int8", False),
    "8 bits": (scheme("Linear", num_bits=8, **GROUPS), "int8", True),
    "8 bits, asymmetric": (scheme("Linear", num_bits=8, symmetric=False, **GROUPS), "int8", False),
    "W8A8": (scheme("Linear", strategy="channel", inputs=INT8_INPUTS), "int8row", True),
    "W8A8, one scale": (scheme("Linear", strategy="tensor", inputs=INT8_INPUTS), "int8row", True),
    "W8A8, asymmetric": (scheme("Linear", strategy="channel", symmetric=False, inputs=INT8_INPUTS), "int8", False),
    "W4A8": (scheme("Linear", num_bits=4, inputs=INT8_INPUTS, **GROUPS), "int4", True),
    "FP8": (scheme("Linear", strategy="tensor", inputs=FP8_INPUTS, **FLOATS), "int8", True),
    "FP8, rows": (scheme("Linear", strategy="channel", inputs=FP8_INPUTS, **FLOATS), "int8", True),
    "FP8, groups": (scheme("Linear", inputs=FP8_INPUTS, **GROUPS, **FLOATS), "int8", True),
    "FP8, blocks": (
        scheme("Linear", strategy="block", block_structure=[16, 40], inputs=FP8_INPUTS, **FLOATS),
        "int8",
        False,
    ),
    "NVFP4": (scheme("Linear", num_bits=4, type="float", strategy="tensor_group", group_size=16), "nvfp4", True),
    "MXFP4": (scheme("Linear", num_bits=4, type="float", scale_dtype=torch.uint8, **GROUPS), "mxfp4", True),
    "MXFP8": (scheme("Linear", scale_dtype=torch.uint8, **GROUPS, **FLOATS), "int8", True),
}


def settings_of(*schemes: QuantizationScheme) -> dict[str, Any]:
    groups = {f"group_{i}": json.loads(how.model_dump_json()) for i, how in enumerate(schemes)}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}


def store(directory: Path, stored: dict[str, Tensor], *schemes: QuantizationScheme) -> list[QuantizedMatrix]:
    """The matrices of a file of one quantised module."""
    path = directory / "model.safetensors"
    save_file({f"layers.0.q_proj.{part}": values.contiguous() for part, values in stored.items()}, path)
    return list(matrices(settings_of(*schemes), read_header(path)))


def read_all(settings: dict[str, Any], path: Path) -> None:
    for matrix in matrices(settings, read_header(path)):
        collections.deque(read_matrix(matrix, matrix.floats, 16), 0)


def random_weight(seed: int, rows: int = 72, columns: int = 96) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return weight.to([torch.bfloat16, torch.float16, torch.float32][seed % 3])


@pytest.mark.filterwarnings("ignore:compressed-tensors also quantises")
@pytest.mark.parametrize("name", SCHEMES)
def test_a_matrix(tmp_path: Path, name: str) -> None:
    how, kept, has_codes = SCHEMES[name]
    stored, expected = quantise(random_weight(list(SCHEMES).index(name)), how)
    (matrix,) = store(tmp_path, stored, how)
    assert (matrix.name, matrix.shape) == ("layers.0.q_proj.weight", expected.shape)
    assert (matrix.kept, matrix.codes is not None) == (kept, has_codes)
    floats = torch.cat([rows for _, rows in read_matrix(matrix, matrix.floats, 16)])
    if expected.dtype == torch.float32:
        torch.testing.assert_close(floats, expected, rtol=2**-20, atol=2**-22)
    else:
        assert torch.equal(floats.to(expected.dtype), expected)
    if matrix.codes is not None:
        rows = joined([rows for _, rows in read_matrix(matrix, matrix.codes, 16)])
        product, least = code_values(rows, kept)
        rounding = 2**-11 * (abs(product) + abs(least)) + 2**-24  # of scale and minimum to float16
        if "FP8" in name:
            rounding += rows.scale.double().numpy().repeat(32, 1) / 2 * (1 + 2**-11)
        assert (abs(product + least - floats.double().numpy()) <= rounding * (name != "MXFP4")).all()


def test_a_scale_of_mxfp4_that_float16_cannot_hold_is_no_zero(tmp_path: Path) -> None:
    stored, _ = quantise(random_weight(0), SCHEMES["MXFP4"][0])
    stored["weight_scale"][:3, 0] = torch.tensor([90, 104, 90])  # 2^-37, 2^-23, and 2^-37 for zeros
    stored["weight_packed"][2, :16] = 0
    (matrix,) = store(tmp_path, stored, SCHEMES["MXFP4"][0])
    rows = joined([rows for _, rows in read_matrix(matrix, matrix.codes, 16)])
    assert rows.scale.isinf().nonzero().tolist() == [[0, 0]]


PRESETS: dict[str, dict[str, Any]] = {
    "W4A16": {"group": scheme("Linear", num_bits=4, **GROUPS)},
    "W8A8": {"group": scheme("Linear", strategy="channel", inputs=INT8_INPUTS)},
    "mixed": {
        "down": scheme(r"re:.*\.down_proj$", num_bits=4, symmetric=False, **GROUPS),
        "one": scheme("model.layers.1.self_attn.q_proj", num_bits=8, **GROUPS),
        "others": scheme("Linear", strategy="channel", inputs=FP8_INPUTS, **FLOATS),
        "embedding": scheme("Embedding", num_bits=4, type="float", scale_dtype=torch.uint8, **GROUPS),
    },
}


@pytest.mark.filterwarnings("ignore:compressed-tensors also quantises")
@pytest.mark.parametrize("name", PRESETS)
def test_a_model(tmp_path: Path, name: str) -> None:
    """`targets` are names, patterns and classes; what `ignore` names is plain."""
    model = save_compressed(tmp_path, PRESETS[name], tie_word_embeddings=False)
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)
    source = open_checkpoint(tmp_path)
    fast = load_model(Llama, source, "float32", "cpu", fuser("off"), "auto")
    assert error(fast(TOKENS), logits(model, TOKENS)) < (2e-2 if name == "mixed" else 1e-3)
    found = {
        key.rpartition("layers.")[2]: (tensor.number_format, tensor.kept) for key, tensor in source.tensors.items()
    }
    assert found["lm_head.weight"] == ("F32", None)
    if name == "W4A16":
        assert found["0.mlp.up_proj.weight"] == ("compressed-tensors 4 bits, groups of 32, symmetric", "int4")
    if name == "W8A8":
        assert found["0.mlp.up_proj.weight"] == (
            "compressed-tensors 8 bits, a scale for each row, symmetric",
            "int8row",
        )
    if name == "mixed":
        assert found["0.mlp.down_proj.weight"] == ("compressed-tensors 4 bits, groups of 32", "int4")
        assert found["1.self_attn.q_proj.weight"] == ("compressed-tensors 8 bits, groups of 32, symmetric", "int8")
        assert found["0.self_attn.q_proj.weight"] == ("compressed-tensors FP8, a scale for each row", "int8")
        assert found["model.embed_tokens.weight"] == ("compressed-tensors FP4, groups of 32", "mxfp4")


@pytest.mark.parametrize("order", [True, False])
def test_columns_ordered_by_activation(tmp_path: Path, order: bool) -> None:
    stored, _ = quantise(random_weight(0), SCHEMES["4 bits, asymmetric"][0])
    columns = torch.randperm(96, generator=torch.Generator().manual_seed(0)) if order else torch.arange(96)
    group = columns // 32
    stored["weight_g_idx"] = group.int()
    (matrix,) = store(tmp_path, stored, SCHEMES["4 bits, asymmetric"][0])
    assert (matrix.kept, matrix.order is not None) == ("int4", order)
    codes = (unpack_from_int32(stored["weight_packed"], 4, (72, 96)) + 8).double()
    zeros = unpack_from_int32(stored["weight_zero_point"], 4, (72, 3), packed_dim=0) + 8
    expected = (codes - zeros[:, group]) * stored["weight_scale"].double()[:, group]
    (_, floats), *others = read_matrix(matrix, matrix.floats, 72)
    torch.testing.assert_close(floats.double(), expected, rtol=0, atol=1e-6)
    assert not others
    assert matrix.codes is not None
    ((_, rows),) = read_matrix(matrix, matrix.codes, 72)
    product, least = code_values(rows, "int4")
    in_order = expected if matrix.order is None else expected[:, matrix.order]
    assert (abs(product + least - in_order.numpy()) <= 2**-11 * (abs(product) + abs(least))).all()


FAULTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {  # scheme, parts, weights' settings, message
    "no weight": (
        "4 bits",
        {"weight_packed": None},
        {},
        r"q_proj\.weight_scale' needs layers\.0\.q_proj\.weight_packed",
    ),
    "no shape": ("4 bits", {"weight_shape": None}, {}, r"needs layers\.0\.q_proj\.weight_shape, which no file holds"),
    "no scale": ("4 bits", {"weight_scale": None}, {}, r"needs layers\.0\.q_proj\.weight_scale, which no file"),
    "no zero points": ("4 bits", {}, {"symmetric": False}, r"needs layers\.0\.q_proj\.weight_zero_point"),
    "no second scale": ("NVFP4", {"weight_global_scale": None}, {}, r"needs layers\.0\.q_proj\.weight_global_scale"),
    "few scales": (
        "4 bits",
        {"weight_scale": torch.ones(72, 2)},
        {},
        r"weight_scale' is F32 of .*72 x 3 blocks of 1 x 32",
    ),
    "few zero points": (
        *("4 bits, asymmetric", {"weight_zero_point": torch.zeros(8, 3, dtype=torch.int32)}, {}),
        r"weight_zero_point' is I32 of shape \(8, 3\), not I32 of \(9, 3\)",
    ),
    "few words": ("4 bits", {"weight_packed": torch.zeros(72, 11, dtype=torch.int32)}, {}, r"not I32 of \(72, 12\)"),
    "another shape": (
        "4 bits",
        {"weight_shape": torch.tensor([71, 96])},
        {},
        r"weight_shape' holds \[71, 96\], but .* 72",
    ),
    "a negative shape": ("4 bits", {"weight_shape": torch.tensor([72, -96])}, {}, r"weight_shape' holds \[72, -96\]"),
    "groups": ("4 bits", {}, {"group_size": 36}, r"weight_packed' has 96 columns, which are no whole groups of 36"),
    "a group of 0": ("4 bits", {}, {"group_size": 0}, r"group_0\.weights\.group_size must be .* at least 1, not 0"),
    "other bits": ("4 bits", {}, {"num_bits": 3}, r"weight_packed' is I32 of shape \(72, 12\), not I32 of \(72, 9\)"),
    "nine bits": ("4 bits", {}, {"num_bits": 9}, r"group_0\.weights\.num_bits must be .* from 2 to 8, not 9"),
    "floats": ("W8A8", {}, {"type": "float"}, r"q_proj\.weight' is I8 of shape \(72, 96\), not F8_E4M3 or F8_E5M2"),
    "floats of 6 bits": ("FP8", {}, {"num_bits": 6}, r"num_bits must be 4 or 8 for floats, not 6"),
    "a strategy": ("4 bits", {}, {"strategy": "token"}, r"unknown group_0\.weights\.strategy 'token'; known: tensor,"),
    "beyond the bits": ("W8A8", {}, {"num_bits": 4}, r"q_proj\.weight' holds numbers beyond 4 bits"),
    "zero points beyond the bits": (
        *("W8A8, asymmetric", {"weight": torch.zeros(72, 96, dtype=torch.int8)}, {"num_bits": 4}),
        r"weight_zero_point' holds numbers beyond 4 bits",
    ),
    "NaN": ("4 bits", {"weight_scale": torch.full((72, 3), torch.nan)}, {}, r"weight_scale' holds NaN or infinity"),
    "NaN in FP8": (
        *("FP8, rows", {"weight": torch.full((72, 96), torch.nan).to(torch.float8_e4m3fn)}, {}),
        r"q_proj\.weight' holds NaN or infinity",
    ),
    "a second scale of 0": (
        *("NVFP4", {"weight_global_scale": torch.zeros(1)}, {}),
        r"weight_global_scale' gives NaN or infinite weights, with layers\.0\.q_proj\.weight_scale; download",
    ),
    "a list of groups": ("4 bits", {}, {"group_size": [36], "strategy": None}, r"group_size must be .*, not \[36\]"),
    "a group that is none": ("4 bits", {"weight_g_idx": torch.full((96,), 3)}, {}, r"g_idx' holds .* none of 3 groups"),
    "few columns": ("4 bits", {"weight_g_idx": torch.zeros(95).long()}, {}, r"g_idx' is I64 of shape \(95,\)"),
    "a vector": ("W8A8", {"weight": torch.zeros(72, dtype=torch.int8)}, {}, r"of shape \(72,\), but must be a matrix"),
}


@pytest.mark.filterwarnings("ignore:compressed-tensors also quantises")
@pytest.mark.parametrize("name", FAULTS)
def test_faults(tmp_path: Path, name: str) -> None:
    how, parts, changes, what = FAULTS[name]
    stored = quantise(random_weight(0), SCHEMES[how][0])[0] | parts
    path = tmp_path / "model.safetensors"
    save_file({f"layers.0.q_proj.{part}": v.contiguous() for part, v in stored.items() if v is not None}, path)
    settings = settings_of(SCHEMES[how][0])
    settings["config_groups"]["group_0"]["weights"] |= changes
    with pytest.raises(LlamaMiniError, match=what):
        read_all(settings, path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"format": "marlin-24"}, "unknown format 'marlin-24'; known: pack-quantized, int-quantized"),
        (
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config is .*sparse-24.*; only checkpoints without",
        ),
        ({"transform_config": {"config_groups": {}}}, "transform_config is .*; only checkpoints without it"),
        ({"config_groups": None}, r"q_proj' is quantised, but none of the targets of config_groups names it"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups must be an object of objects"),
        ({"config_groups": {"g": {"targets": "Linear"}}}, "g.targets must be a list of names, not 'Linear'"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": 4}}}, "g.weights must be an object, not 4"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    stored, _ = quantise(random_weight(0), SCHEMES["4 bits"][0])
    store(tmp_path, stored, SCHEMES["4 bits"][0])
    with pytest.raises(ConfigError, match=what):
        list(matrices(settings_of(SCHEMES["4 bits"][0]) | changes, read_header(tmp_path / "model.safetensors")))


@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (
            ["Embedding", "k_proj"],
            r"'layers\.0\.q_proj' is quantised, but none of the targets .*: 'Embedding', 'k_proj'",
        ),
        (["re:("], r"targets: '\(' is a broken pattern: missing \)"),
        (["re:(a+)+$"], "targets: .* repeats too much; give names"),
        (["re:" + ".*" * 9 + "x"], "targets: .* repeats too much; give names"),
    ],
)
def test_targets_that_name_no_matrix(tmp_path: Path, targets: list[str], what: str) -> None:
    stored, _ = quantise(random_weight(0), SCHEMES["4 bits"][0])
    with pytest.raises(ConfigError, match=what):
        store(tmp_path, stored, scheme(*targets, num_bits=4, **GROUPS))


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    stored, _ = quantise(random_weight(0), SCHEMES["W8A8"][0])
    stored |= {"input_scale": torch.ones(1), "input_zero_point": torch.zeros(1, dtype=torch.int8)}
    save_file({f"q_proj.{part}": values for part, values in stored.items()}, tmp_path / "model.safetensors")
    settings = settings_of(SCHEMES["W8A8"][0]) | {"new": 1, "kv_cache_scheme": {"num_bits": 8}, "sparsity_config": {}}
    with pytest.warns(LlamaMiniWarning) as told:
        list(matrices(settings, read_header(tmp_path / "model.safetensors")))
    assert [str(warning.message).partition(":")[0] for warning in told] == [
        "quantization_config",
        "compressed-tensors also quantises the activations of this model; here its weights alone are quantised",
        "kv_cache_scheme of quantization_config ignored",
    ]
