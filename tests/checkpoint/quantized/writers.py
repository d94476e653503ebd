"""Tiny models as each method's library writes them, beside their weights: packed and dequantised in NumPy, float64."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llama_mini.checkpoint.open import open_checkpoint
from tests.checkpoint.code_values import code_values
from tests.tiny_families import random_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the row that each four bits of a word hold, from the lowest
Stored = Mapping[str, Tensor | NDArray[Any]]
Quantize = Callable[[str, Tensor], tuple[Stored, NDArray[Any]] | None]  # a matrix -> its parts, and what they stand for


def write_model(
    directory: Path, settings: Mapping[str, Any], quantize: Quantize, model_type: str = "llama", **changes: Any
) -> PreTrainedModel:
    """Writes a random model whose matrices `quantize` replaces (None keeps one plain); returns it, dequantised."""
    model = random_model(model_type, 1, **SIZES | {"attention_bias": False, "mlp_bias": False} | changes)
    values = dict(model.named_parameters())
    for parameter in values.values():
        parameter.data.copy_(parameter.half())
    model.save_pretrained(directory)
    tensors = {name: tensor.half() for name, tensor in load_file(directory / "model.safetensors").items()}
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
        if (made := quantize(name, tensors[name])) is not None:
            del tensors[name]
            module = name.removesuffix("weight")
            tensors |= {module + end: torch.as_tensor(stored).contiguous() for end, stored in made[0].items()}
            values[name].data.copy_(torch.from_numpy(made[1]))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    edit_config(directory, settings)
    return model


def edit_config(directory: Path, settings: Mapping[str, Any]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(settings)))


def damage(directory: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Changes one tensor; None removes it."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed.contiguous()}, path)


def layers_only(name: str, weight: Tensor) -> bool:
    return "layers" in name


def pack(codes: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """(..., codes) -> (..., words): the bits of all codes in one row, the lowest first, cut into words."""
    of_code = codes[..., None].astype(np.uint64) >> np.arange(bits, dtype=np.uint64) & np.uint64(1)
    of_word = of_code.reshape(*codes.shape[:-1], -1, 32)
    return (of_word << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)


def gptq(
    rng: np.random.Generator,
    shape: tuple[int, int],
    bits: int,
    size: int,
    sym: bool,
    v1: bool,
    order: bool | NDArray[Any] | None,
) -> tuple[Stored, NDArray[Any]]:
    """order: whether columns are grouped in another order, or which group each is in; None: no g_idx is written."""
    rows, columns = shape
    size = columns if size == -1 else size
    n_groups = -(-columns // size)
    codes = rng.integers(2**bits, size=shape)
    zeros = np.full((n_groups, rows), 2 ** (bits - 1)) if sym else rng.integers(2**bits, size=(n_groups, rows))
    scales = (rng.uniform(0.2, 1, (n_groups, rows)) / 2**bits / np.sqrt(columns)).astype(np.float16)
    g_idx = np.arange(columns) // size
    if isinstance(order, np.ndarray):
        g_idx = order
    elif order:
        g_idx = rng.permutation(g_idx)
    qzeros = pack(zeros, bits)
    if v1 and 32 % bits == 0:  # as GPTQModel does it: one subtraction of whole words
        qzeros = (qzeros.view(np.uint32) - np.uint32(sum(1 << i for i in range(0, 32, bits)))).view(np.int32)
    elif v1:
        qzeros = pack((zeros - 1) % 2**bits, bits)
    parts = {"qweight": pack(codes, bits).T, "qzeros": qzeros, "scales": scales}
    if order is not None:
        parts["g_idx"] = g_idx.astype(np.int32)
    return parts, (codes - zeros.T[:, g_idx]) * scales.T.astype(np.float64)[:, g_idx]


def awq(rng: np.random.Generator, shape: tuple[int, int], size: int) -> tuple[Stored, NDArray[Any]]:
    rows, columns = shape
    size = columns if size == -1 else size
    codes = rng.integers(16, size=(columns, rows))
    zeros = rng.integers(16, size=(columns // size, rows))
    scales = (rng.uniform(0.2, 1, zeros.shape) / 16 / np.sqrt(columns)).astype(np.float16)
    values = (codes - zeros.repeat(size, 0)) * scales.astype(np.float64).repeat(size, 0)
    in_words = [
        pack(array.reshape(len(array), -1, 8)[..., AWQ_ORDER].reshape(array.shape), 4) for array in (codes, zeros)
    ]
    return {"qweight": in_words[0], "qzeros": in_words[1], "scales": scales}, values.T


def check_codes(directory: Path, model: PreTrainedModel, wide: bool = False) -> int:
    """Compares the codes that are kept with the weights: the minimum of a group is rounded to float16.

    wide: the scale is, too. Returns the number of matrices that keep their codes.
    """
    source, values = open_checkpoint(directory), dict(model.named_parameters())
    names = [name for name, stored in source.tensors.items() if stored.has_codes]
    for name, first, rows in source.read_quantized(names):
        kept, order = source.tensors[name].kept, source.tensors[name].order
        assert kept is not None
        product, least = code_values(rows.unpacked(), kept)
        expected = values[name][first : first + len(least)].detach().double()
        error = abs(product + least - (expected if order is None else expected[:, order]).numpy())
        assert (error <= (abs(least) + wide * abs(product)) * 2**-11 + 2**-21).all(), name
    return len(names)
