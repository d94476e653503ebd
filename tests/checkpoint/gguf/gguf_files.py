"""GGUF files of tiny models of any family, written with the gguf library as llama.cpp's converter writes them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import MODEL_ARCH as A
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from transformers import PreTrainedModel

from tests.checkpoint.gguf.random_blocks import random_blocks


class Format(NamedTuple):
    """What the converter does with a model_type.

    interleaves: it puts rotary pairs side by side; GLM, ERNIE 4.5 and Cohere have them so already.
    adds_one: it writes the gains of norms plus one.
    period: it writes no pattern of windows, since llama.cpp leaves out every such layer; other patterns are written.
    keys: metadata -> the name in config.json, if that is set.
    """

    architecture: A
    interleaves: bool = False
    adds_one: bool = False
    period: int = 0
    keys: dict[str, str] = {}  # noqa: RUF012


_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
FORMATS = {
    "llama": Format(A.LLAMA, interleaves=True),
    "mistral": Format(A.LLAMA, interleaves=True),
    "ministral3": Format(A.MISTRAL3, interleaves=True),
    "qwen2": Format(A.QWEN2),
    "qwen3": Format(A.QWEN3),
    "olmo2": Format(A.OLMO2),
    "olmo3": Format(A.OLMO2, keys=_WINDOW),
    "olmo": Format(A.OLMO, interleaves=True),
    "seed_oss": Format(A.SEED_OSS),
    "smollm3": Format(A.SMOLLM3, interleaves=True),
    "arcee": Format(A.ARCEE, interleaves=True),
    "ernie4_5": Format(A.ERNIE4_5),
    "granite": Format(A.GRANITE, interleaves=True, keys=_GRANITE),
    "phi3": Format(A.PHI3, keys=_WINDOW),
    "hunyuan_v1_dense": Format(A.HUNYUAN_DENSE),
    "gemma": Format(A.GEMMA, adds_one=True),
    "gemma2": Format(A.GEMMA2, adds_one=True, period=2, keys=_WINDOW | _CAPS),
    "gemma3_text": Format(A.GEMMA3, adds_one=True, period=6, keys=_WINDOW | _CAPS),
    "glm": Format(A.CHATGLM),
    "glm4": Format(A.GLM4),
    "exaone4": Format(A.EXAONE4, keys=_WINDOW),
    "jais2": Format(A.JAIS2),
    "nemotron": Format(A.NEMOTRON, adds_one=True),
    "starcoder2": Format(A.STARCODER2),
    "stablelm": Format(A.STABLELM, keys={"use_parallel_residual": "use_parallel_residual"}),
    "cohere": Format(A.COMMAND_R, keys={"logit_scale": "logit_scale"}),
    "cohere2": Format(A.COHERE2, period=4, keys=_WINDOW | {"logit_scale": "logit_scale"}),
}


def write_family(
    path: Path,
    model: PreTrainedModel,
    kind: Kind = Kind.F32,
    fuse_qkv: bool = False,
    types: Mapping[str, str] = {},
    **more: Any,
) -> Path:
    """`model` as GGUF, its matrices as `kind`; `more` are metadata, `__` for a dot, or arrays: further tensors.

    fuse_qkv: with one tensor for q, k and v of a layer, as by the converter's option --fuse-qkv.
    types: a pattern of names -> the type whose random blocks take the place of a matrix; the first pattern counts.
    """
    config, form = model.config, FORMATS[model.config.model_type]
    architecture = gguf.MODEL_ARCH_NAMES[form.architecture]
    writer = gguf.GGUFWriter(path, architecture)
    metadata = _metadata(config, form) | {key.replace("__", "."): value for key, value in more.items()}
    for key, value in metadata.items():
        name = key if key.startswith("tokenizer.") else f"{architecture}.{key}"
        if isinstance(value, np.ndarray):
            writer.add_tensor(key, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif value is not None:
            writer.add_float32(name, value)
    names, tensors = gguf.get_tensor_name_map(form.architecture, config.num_hidden_layers), dict[str, np.ndarray]()
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if form.interleaves and ("q_proj" in name or "k_proj" in name):
            values = interleaved(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if form.adds_one and name.endswith("norm.weight"):
            values = values + 1
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        tensors[theirs] = values
    for name in [name for name in tensors if fuse_qkv and ".attn_q." in name]:
        parts = [tensors.pop(name.replace("attn_q", f"attn_{part}")) for part in "qkv"]
        tensors[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    for name, values in tensors.items():
        found = next((Kind[found] for pattern, found in types.items() if re.search(pattern, name)), Kind.F32)
        if values.ndim == 2 and found != Kind.F32:
            scale = 2e-4 if gguf.GGML_QUANT_SIZES[found][0] == 256 else 0.01  # values of about 0.1
            writer.add_tensor(name, random_blocks(values.shape, found, len(name), scale), raw_dtype=found)
            continue
        used = kind if values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Kind.F32
        writer.add_tensor(name, quants.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(config: Any, form: Format) -> dict[str, Any]:
    given = lambda *names: next((v for name in names if (v := getattr(config, name, None)) is not None), None)  # noqa: E731
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    head_dim = given("head_dim") or config.hidden_size // config.num_attention_heads
    eps = given("layer_norm_eps", "norm_eps", "norm_epsilon") or (1e-5 if config.model_type == "olmo" else None)
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": given("rms_norm_eps"),
        "attention.layer_norm_epsilon": eps,
        "rope.freq_base": rope["rope_theta"],
        "rope.freq_base_swa": config.rope_parameters.get("sliding_attention", {}).get("rope_theta"),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }
    if "sliding_window" in form.keys.values() and given("sliding_window") and given("layer_types"):
        pattern = [kind == "sliding_attention" for kind in config.layer_types]
        if not form.period or pattern != [i % form.period != form.period - 1 for i in range(len(pattern))]:
            metadata["attention.sliding_window_pattern"] = pattern
    metadata["attention.temperature_scale"] = rope.get("llama_4_scaling_beta")
    return metadata | _scaling(rope, config.max_position_embeddings) | {k: given(name) for k, name in form.keys.items()}


def _scaling(rope: dict[str, Any], context: int) -> dict[str, Any]:
    kind, original = rope["rope_type"], rope.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        names = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        names |= {
            "yarn_log_multiplier": "mscale_all_dim",
            "factor": "factor",
            "original_context_length": "original_max_position_embeddings",
        }
        return {"rope.scaling.type": kind} | {f"rope.scaling.{key}": rope.get(name) for key, name in names.items()}
    if kind == "longrope":
        factor = np.sqrt(1 + np.log(context / original) / np.log(original)) if context > original else 1.0
        lists = {f"rope_factors_{name}.weight": np.float32(rope[f"{name}_factor"]) for name in ("long", "short")}
        return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": float(factor)} | lists
    return {}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Split halves -> rotary pairs side by side, head by head: first of the one half, first of the other, ..."""
    return np.concatenate([np.stack(np.split(head, 2), axis=1).reshape(head.shape) for head in np.split(rows, heads)])
