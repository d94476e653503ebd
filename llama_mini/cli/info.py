"""The command `info`: what a checkpoint is, without loading its weights."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from llama_mini.checkpoint.code_formats import code_format
from llama_mini.checkpoint.io.files import VOCABULARIES, exists
from llama_mini.checkpoint.match import empty_model, match
from llama_mini.checkpoint.open import Adapters, open_checkpoint, resolve
from llama_mini.checkpoint.source import Source
from llama_mini.checkpoint.weight_formats import column_orders, keeps_codes, quantize_for, weight_bytes, weight_formats
from llama_mini.cli.common import table
from llama_mini.machine import as_device, as_dtype, available_memory, dtype_name, format_bytes
from llama_mini.memory import sequence_bytes, work_bytes
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.model.rope_scaling import RopeScaling
from llama_mini.optimize.build import expects_kernels
from llama_mini.tokenizer.tokenizer import Tokenizer, open_tokenizer

_NUMBERS = {  # settings of LlamaConfig, as `beyond_llama` names them
    "attention_scale": "attention scale",
    "attention_softcap": "scores capped at",
    "embedding_scale": "embedding times",
    "logit_scale": "logits times",
    "logit_softcap": "logits capped at",
}


def describe(
    name: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu", adapter: Adapters | None = None
) -> str:
    """A table of facts, one per line. Reads and checks headers but no weights; raises the errors of loading.

    A checkpoint may have no tokenizer.
    """
    torch_device = as_device(device)
    source = open_checkpoint(resolve(name), adapter=adapter)
    model = empty_model(Llama, source)
    names = match(model, source)
    missing = _missing_tokenizer(source)
    tokenizer = None if missing else open_tokenizer(source)
    config, quantize = source.config, quantize_for(source, "auto", dtype, torch_device)
    torch_dtype = as_dtype(dtype, torch_device, expects_kernels())
    n_parameters = sum(p.numel() for p in model.parameters())
    formats = weight_formats(source, quantize)
    rows = {
        "path": str(source.path),
        "format": source.format,
        **({"adapters": "; ".join(source.adapters.values())} if source.adapters else {}),
        "family": source.model_type,
        "parameters": f"{n_parameters:,} in {len(names)} tensors, stored as {_stored_as(source, names)}"
        + _held_as(source, names, formats),
        "shape": f"{config.n_layers} layers, dim {config.dim}, hidden {config.hidden_dim}, {config.n_heads} heads of "
        f"{config.head_dim}, {config.n_kv_heads} KV heads, {'tied' if config.tie_word_embeddings else 'untied'} head",
        "norms": _norms(config, model),
        "context": f"{config.max_seq_len:,} tokens, {_rope(config.rope_theta, config.rope_scaling)}{_window(config)}",
        **({"beyond LLaMA": further} if (further := beyond_llama(config)) else {}),
        "tokenizer": _vocabulary(tokenizer) if tokenizer else f"none ({missing})",
        "chat template": "yes" if tokenizer and tokenizer.has_chat_template else "no",
        "memory": _memory(source, quantize, torch_dtype, torch_device, _sorted(formats.values())),
    }
    return table(rows)


def _vocabulary(tokenizer: Tokenizer) -> str:
    bos = "none" if tokenizer.bos_id is None else tokenizer.bos_id
    eos = ", ".join(map(str, sorted(tokenizer.eos_ids))) or "none"
    return f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens, BOS {bos}, EOS {eos}"


def _missing_tokenizer(source: Source) -> str | None:
    """Why the checkpoint has no tokenizer; None if it has one, perhaps a broken one."""
    if source.tokenizer:
        return None
    if source.gguf:  # llama.cpp's tools write these two names
        absent = source.gguf.metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab")
        return "the file has no tokenizer.ggml.model" if absent else None
    absent = not any(exists(source.directory / name) for name in VOCABULARIES)
    return f"the directory has none of {', '.join(VOCABULARIES)}" if absent else None


def _norms(config: LlamaConfig, model: Llama) -> str:
    norms = [module for module in model.modules() if isinstance(module, Norm)]
    eps = ", ".join(f"{value:g}" for value in sorted({norm.eps for norm in norms}))
    return f"{config.norm_plan.name(config.n_layers)}: {len(norms)} norms, eps {eps or 'none'}"


def _rope(theta: float, scaling: RopeScaling | None) -> str:
    factor = getattr(scaling, "factor", None)
    kind = "" if scaling is None else f", {scaling.rope_type}" + (f" × {factor:g}" if factor else "")
    return f"rope base {theta:,g}{kind}"


def _window(config: LlamaConfig) -> str:
    if config.sliding_window is None:
        return ""
    theta, scaling = config.sliding_rope_theta, config.sliding_rope_scaling
    return f", window of {config.sliding_window:,} in {len(config.sliding_layers)} of {config.n_layers} layers" + (
        f" with {_rope(theta, scaling)}" if theta else ""
    )


def beyond_llama(config: LlamaConfig) -> str:
    """What the model computes that LLaMA does not, beside norms and windows; empty for LLaMA."""
    has_bias = {"q, k, v": config.qkv_bias, "o": config.o_bias, "MLP": config.mlp_bias}
    biases = ", ".join(part for part, has in has_bias.items() if has)
    settings: dict[str, Any] = {  # what is said where the value is true
        "attention and MLP in parallel": config.norm_plan.parallel,
        f"activation {config.activation}": config.activation != "silu",
        "no gate": not config.gated_mlp,
        f"biases of {biases}": biases,
        f"{config.rotary_dim} of {config.head_dim} elements of a head rotated": config.rotary_dim < config.head_dim,
        f"no rotary embedding in {len(config.unrotated_layers)} of {config.n_layers} layers": config.unrotated_layers,
        "q and k norms after rotary embedding": config.qk_norm_after_rope,
        "queries scaled by position": getattr(config.rope_scaling, "q_growth", 0),
    }
    values = {name: getattr(config, name) for name in _NUMBERS}
    numbers = [f"{_NUMBERS[name]} {n:g}" for name, n in values.items() if n != getattr(LlamaConfig, name)]
    return "; ".join([*(text for text, holds in settings.items() if holds), *numbers])


def _stored_as(source: Source, names: dict[str, str]) -> str:
    sizes = Counter[str]()
    for stored in map(source.tensors.__getitem__, names):
        sizes[stored.number_format] += stored.n_bytes
    return ", ".join(f"{kind} ({format_bytes(size)})" for kind, size in sizes.most_common())


def _held_as(source: Source, names: Mapping[str, str], formats: Mapping[str, str]) -> str:
    """Which matrices run as the codes that the file has, and which are quantised again; empty for floats."""
    orders, found = column_orders(source, formats), dict[bool, set[str]]()
    for name, ours in names.items():
        if (kind := formats.get(ours)) is not None:
            found.setdefault(keeps_codes(source.tensors[name], kind, ours in orders), set()).add(kind)
    ways = {True: "kept as", False: "others quantised again to" if True in found else "quantised again to"}
    texts = (
        f"; {way} " + ", ".join(f"{code_format(kind).bits}-bit codes ({kind})" for kind in _sorted(found[kept]))
        for kept, way in ways.items()
        if kept in found
    )
    return "".join(texts)


def _sorted(formats: Iterable[str]) -> list[str]:
    """Each format once, those of few bits first."""
    return sorted(set(formats), key=lambda name: (code_format(name).bits, name))


def _memory(source: Source, quantize: str, dtype: torch.dtype, device: torch.device, formats: list[str]) -> str:
    config, free = source.config, available_memory(device)
    form = f"{', '.join(formats)} and {dtype_name(dtype)}" if formats else dtype_name(dtype)
    return (
        f"weights {format_bytes(weight_bytes(source, dtype, quantize))} in {form}, "
        f"cache {format_bytes(sequence_bytes(config, 1024, dtype))} for 1,024 tokens and "
        f"{format_bytes(sequence_bytes(config, config.max_seq_len, dtype))} for all, "
        f"work {format_bytes(work_bytes(config, config.max_seq_len, dtype))}"
        + (f"; {format_bytes(free)} are free" if free is not None else "")
    )
