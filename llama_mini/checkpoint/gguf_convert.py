"""A GGUF file of the llama architecture -> a Hugging Face directory in bfloat16, which transformers loads as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llama_mini.checkpoint.files import new_directory, write_json
from llama_mini.checkpoint.gguf_file import GGUFHeader, TensorInfo, read_header
from llama_mini.checkpoint.gguf_llama import llama_config, llama_tensors, read_llama_tensor
from llama_mini.checkpoint.gguf_tokenizer import chat_template, tokenizer_config, tokenizer_json
from llama_mini.checkpoint.hf_config import special_ids, to_hf
from llama_mini.checkpoint.weights import SINGLE, save_tensors
from llama_mini.config import LlamaConfig
from llama_mini.errors import TokenizerError


def convert_gguf(path: Path, target: Path) -> None:
    """Writes `target`, whole or not at all. Raises CheckpointError, ConfigError or TokenizerError."""
    header = read_header(path)
    config = llama_config(header)
    tensors = llama_tensors(header, config)
    hf_config = to_hf(config, "bfloat16")
    tokenizer = tokenizer_json(header)
    if len(tokenizer["model"]["vocab"]) > config.vocab_size:
        raise TokenizerError(
            f"{path}: {len(tokenizer['model']['vocab'])} tokens, but the embedding has {config.vocab_size} rows"
        )
    files: dict[str, dict[str, Any]] = {
        "config.json": hf_config,
        "generation_config.json": special_ids(config),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config(header),
    }
    template = chat_template(header)
    with new_directory(target) as folder:
        _write_tensors(header, tensors, config, folder / SINGLE)
        for name, content in files.items():
            write_json(folder / name, content)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def _write_tensors(header: GGUFHeader, tensors: dict[str, TensorInfo], config: LlamaConfig, target: Path) -> None:
    state = {}
    with header.path.open("rb") as file, tqdm(tensors.items(), "converting", unit="tensor", disable=None) as bar:
        for name, info in bar:
            values = np.require(read_llama_tensor(file, info, config), requirements=["C", "W"])
            state[name] = torch.from_numpy(values).to(torch.bfloat16)
    save_tensors(state, target)
