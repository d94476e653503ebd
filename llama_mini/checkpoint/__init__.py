"""Reading and writing checkpoints. Hugging Face's words stop here."""

from pathlib import Path
from typing import TypeVar

import torch

from llama_mini.checkpoint.files import new_directory, write_json
from llama_mini.checkpoint.hf_config import read_config, special_ids, to_hf
from llama_mini.checkpoint.keys import KEYS, hf_name
from llama_mini.checkpoint.weights import SINGLE, check_depth, common_dtype, find_tensors, load_tensors, save_tensors
from llama_mini.dtypes import as_dtype
from llama_mini.errors import CheckpointPathError, ConfigError
from llama_mini.model import Llama

Model = TypeVar("Model", bound=Llama)


def load_model(cls: type[Model], path: Path, dtype: torch.dtype | str | None, device: torch.device | str) -> Model:
    """A checkpoint directory as a model in eval mode without gradients; see `Llama.from_pretrained`."""
    if not path.is_dir():
        found = "is not a directory" if path.exists() else "does not exist"
        raise CheckpointPathError(f"{path} {found}; a checkpoint is a directory with config.json and model.safetensors")
    config, raw = read_config(path)
    tensors = find_tensors(path)
    check_depth(path, tensors, config.n_layers)
    stated = raw.get("dtype") or raw.get("torch_dtype")
    wanted = common_dtype(tensors, stated) if dtype is None else as_dtype(dtype, device)
    try:
        with torch.device("meta"):
            model = cls(config)
    except RuntimeError as error:  # a product of sizes that no address reaches
        raise ConfigError(f"{path / 'config.json'}: no model of these sizes can be made: {error}") from None
    load_tensors(model, path, tensors, KEYS[raw["model_type"]], wanted, str(device))
    return model.to(device).eval().requires_grad_(False)


def save_model(model: Llama, path: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors; see `Llama.save_pretrained`."""
    dtype = str(model.tok_embeddings.weight.dtype).removeprefix("torch.")
    raw = to_hf(model.config, dtype)
    tensors = {hf_name(n, KEYS[raw["model_type"]]): p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    with new_directory(path) as directory:
        write_json(directory / "config.json", raw)
        write_json(directory / "generation_config.json", special_ids(model.config))
        save_tensors(tensors, directory / SINGLE)
