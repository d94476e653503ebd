"""Tensor names of each family, in both directions: Hugging Face name <-> ours. `{}` is the number of the layer."""

import re

KeyTable = dict[str, str]

LLAMA_KEYS: KeyTable = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.attention.pre_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attention.q_proj.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attention.k_proj.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attention.v_proj.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attention.o_proj.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.feed_forward.pre_norm.weight",  # despite its name
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.feed_forward.gate_proj.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.feed_forward.up_proj.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.feed_forward.down_proj.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

KEYS: dict[str, KeyTable] = {
    "llama": LLAMA_KEYS,
    "llama_mini": {},  # a plan that no other family has is saved under our own names
}

HARMLESS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rope\.freqs)$")  # tables that old checkpoints stored


def hf_name(name: str, table: KeyTable) -> str:
    """Our name of a parameter -> the name in the file."""
    layer = re.search(r"\.(\d+)\.", name)
    pattern = name.replace(layer[0], ".{}.", 1) if layer else name
    theirs = {ours: hf for hf, ours in table.items()}.get(pattern, pattern)
    return theirs.replace("{}", layer[1]) if layer else theirs
