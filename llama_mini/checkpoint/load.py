"""An opened checkpoint as a model and a tokenizer, and a model as a checkpoint."""

import warnings
from pathlib import Path

import torch

from llama_mini.checkpoint.families import key_table
from llama_mini.checkpoint.files import SINGLE, new_directory, write_json
from llama_mini.checkpoint.hf_config import special_ids, to_hf
from llama_mini.checkpoint.keys import their_name
from llama_mini.checkpoint.safetensors_file import write_file
from llama_mini.checkpoint.source import EMBEDDING, Model, Source, empty_model, match, read_all, warn_of_other_head
from llama_mini.dtypes import as_dtype
from llama_mini.errors import LlamaMiniWarning, TokenizerError
from llama_mini.memory import check_fits
from llama_mini.model import Llama
from llama_mini.tokenizer import Tokenizer


def load_model(cls: type[Model], source: Source, dtype: torch.dtype | str | None, device: torch.device | str) -> Model:
    """An opened checkpoint as a model in eval mode without gradients; see `Llama.from_pretrained`."""
    wanted = source.dtype if dtype is None else as_dtype(dtype, device)
    model = empty_model(cls, source)
    names = match(model, source)
    check_fits(source.config, sum(p.numel() for p in model.parameters()), wanted, 1, torch.device(device))
    state = {ours: tensor.to(device) for ours, tensor in read_all(source, names, wanted, "loading")}
    warn_of_other_head(model, source, state[EMBEDDING])
    model.load_state_dict(state, assign=True, strict=True)
    return model.to(device).eval().requires_grad_(False)


def open_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer of an opened checkpoint. Raises TokenizerError, also where the model has no row for a word."""
    found = Tokenizer.from_pretrained(source.directory) if source.gguf is None else Tokenizer.from_gguf(source.gguf)
    rows = source.config.vocab_size
    if found.vocab_size > rows:
        problem = f"{source.path}: the tokenizer has {found.vocab_size} tokens, but the embedding has {rows} rows"
        special = found.control_ids
        if found.vocab_size - rows > len(special) or not special.issuperset(range(rows, found.vocab_size)):
            raise TokenizerError(f"{problem}; they belong to two checkpoints")
        warnings.warn(f"{problem}: the special tokens from {rows} on cannot be used", LlamaMiniWarning, stacklevel=3)
    return found


def save_model(model: Llama, path: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors; see `Llama.save_pretrained`."""
    dtype = model.tok_embeddings.weight.dtype
    raw = to_hf(model.config, str(dtype).removeprefix("torch."))
    table = key_table(raw["model_type"])
    parameters = {their_name(name, table): p.detach() for name, p in model.named_parameters()}
    with new_directory(path) as directory:
        write_json(directory / "config.json", raw)
        write_json(directory / "generation_config.json", special_ids(model.config))
        write_file(
            directory / SINGLE,
            ((name, p.dtype, tuple(p.shape)) for name, p in parameters.items()),
            (p.cpu().contiguous() for p in parameters.values()),
            {"format": "pt"},
        )
