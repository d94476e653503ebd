"""NaN and infinity in any part of a quantised matrix: one line that names the tensor, as codes and as floats."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.errors import CheckpointFormatError
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser
from tests.checkpoint.fuzz.quantized import NAMES, write
from tests.checkpoint.quantized.libraries import save_compressed, scheme

MODULE = "model.layers.0."
MORE = {  # groups of compressed-tensors that the fuzzer's checkpoints do not have
    "compressed-int8": scheme("Linear", num_bits=8, strategy="channel"),
    "mxfp4": scheme("Linear", num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8),
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=[*NAMES, *MORE])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in MORE:
        save_compressed(folder, {"group": MORE[request.param]})
        return folder
    return write(folder, request.param)


def damaged(values: Tensor, bad: float) -> Tensor:
    """With one such number in it."""
    values = values.clone()
    if values.dtype.itemsize == 1:  # FP8; a power of two that is NaN
        values.view(torch.uint8).view(-1)[-1] = 255 if values.dtype == torch.uint8 else 127
    else:
        values.view(-1)[-1] = bad
    return values


def test_it_is_named(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    of_module = {name: t for name, t in tensors.items() if name.startswith(MODULE) and "norm" not in name}
    floats = [n for n, t in of_module.items() if t.is_floating_point() or (t.dtype == torch.uint8 and "scale" in n)]
    ends = {(name.rpartition("_proj.")[2], tensors[name].dtype): name for name in floats}
    assert ends
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ends.values():
        for bad in (torch.nan, torch.inf):
            save_file(tensors | {name: damaged(tensors[name], bad)}, tmp_path / "model.safetensors", {"format": "pt"})
            for quantize in ("auto", "none"):
                with pytest.raises(CheckpointFormatError, match=rf"tensor '{name}' holds NaN or infinity; download"):
                    load_model(Llama, open_checkpoint(tmp_path), torch.float32, "cpu", fuser("off"), quantize)
