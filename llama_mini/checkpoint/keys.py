"""Tensor names in files <-> ours. `{}` stands for the layer's number.

One Hugging Face name can mean different norm slots in different families, so each family has its own table.
"""

import re
from collections.abc import Collection, Mapping

from llama_mini.errors import warn
from llama_mini.validate import join_names, short_repr

KeyTable = dict[str, str]
HEAD, EMBEDDING = "lm_head.weight", "tok_embeddings.weight"  # our names


def hugging_face_keys(modules: Mapping[str, str]) -> KeyTable:
    """A family's table: `modules` of a layer, theirs -> ours, beside the usual projections or in their place.

    `qkv_proj[q]` is the part of a tensor that holds several parameters, from the first row to the last: see rows.py.
    """
    usual = {theirs: ours for theirs, ours in _PROJECTIONS.items() if ours not in modules.values()}
    names = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": HEAD}
    for kind in ("weight", "bias"):
        names[f"model.norm.{kind}"] = f"norm.{kind}"
        for theirs, ours in {**usual, **modules}.items():
            module, bracket, part = theirs.partition("[")
            names[f"model.layers.{{}}.{module}.{kind}{bracket}{part}"] = f"layers.{{}}.{ours}.{kind}"
    return names


_PROJECTIONS = {f"self_attn.{part}_proj": f"attention.{part}_proj" for part in "qkvo"}
_PROJECTIONS |= {f"mlp.{part}_proj": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")}
PRE_NORMS = {
    "input_layernorm": "attention.pre_norm",
    "post_attention_layernorm": "feed_forward.pre_norm",  # despite its name
}
OUT_NORMS = {"post_attention_layernorm": "attention.out_norm", "post_feedforward_layernorm": "feed_forward.out_norm"}
QK_NORMS = {"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"}
QKV = {f"self_attn.qkv_proj[{part}]": f"attention.{part}_proj" for part in "qkv"}
GATE_UP = {f"mlp.gate_up_proj[{part}]": f"feed_forward.{part}_proj" for part in ("gate", "up")}
GEMMA_NORMS = {"input_layernorm": "attention.pre_norm", "pre_feedforward_layernorm": "feed_forward.pre_norm"}

META_KEYS: KeyTable = {
    "tok_embeddings.weight": "tok_embeddings.weight",
    "layers.{}.attention_norm.weight": "layers.{}.attention.pre_norm.weight",
    "layers.{}.attention.wq.weight": "layers.{}.attention.q_proj.weight",
    "layers.{}.attention.wk.weight": "layers.{}.attention.k_proj.weight",
    "layers.{}.attention.wv.weight": "layers.{}.attention.v_proj.weight",
    "layers.{}.attention.wo.weight": "layers.{}.attention.o_proj.weight",
    "layers.{}.ffn_norm.weight": "layers.{}.feed_forward.pre_norm.weight",
    "layers.{}.feed_forward.w1.weight": "layers.{}.feed_forward.gate_proj.weight",
    "layers.{}.feed_forward.w3.weight": "layers.{}.feed_forward.up_proj.weight",
    "layers.{}.feed_forward.w2.weight": "layers.{}.feed_forward.down_proj.weight",
    "norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}

# Rotary tables in old checkpoints, and those in a GGUF file, which gguf/rope.py reads as settings. Scales and zero
# points of a cache of eight bits, which the settings of a quantised checkpoint may ask for.
IGNORED_TENSORS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|rope\.freqs|(k|v|kv|q|prob)_(scale|zero_point))$|^rope_(freqs|factors_(long|short))\.weight$"
)

# The first of these that a file has, after whatever prefix, shows the prefix of all names.
_FIRST = ("model.embed_tokens.weight", "embed_tokens.weight", HEAD)
_WRAPPED = re.compile(r"(?:^|\.)layers\.\d+\.((?:_\w+\.)*)")  # a layer's number, then wrappers of PyTorch


def names_in_file(table: KeyTable, names: Collection[str], is_part: bool = False) -> KeyTable:
    """A Hugging Face family's table, with the names as a file spells them.

    A model saved without its head (transformers' LlamaModel) has names without `model.`. One saved from within another
    module has a prefix before every name: `_orig_mod.` (torch.compile), `module.` (DDP), `base_model.model.` (PEFT),
    `language_model.` (the text part of a multimodal model, whose head may lie outside). Wrapped layers also have one
    after their number, such as `_fsdp_wrapped_module.`. What every name has is left out, with a warning, unless
    `names` are part of a larger model's.
    """
    prefix = next((n.removesuffix(first) for first in _FIRST for n in names if f".{n}".endswith(f".{first}")), "")
    heads = [name for name in names if f".{name}".endswith(f".{HEAD}")]
    before_head = heads[0].removesuffix(HEAD) if len(heads) == 1 else prefix
    others = [name for name in names if name != before_head + HEAD]
    wrappers = {match[1] for name in others if (match := _WRAPPED.search(name))}
    inner = wrappers.pop() if len(wrappers) == 1 else ""
    if not table or not prefix.startswith(before_head) or not all(name.startswith(prefix) for name in others):
        return table
    begins = [f"every tensor's name begins with {short_repr(prefix)}"] if prefix else []
    begins += [f"every layer's names begin with {short_repr(inner)}"] if inner else []
    if begins and not is_part:
        warn(f"{' and '.join(begins)}, which is left out")
    is_bare = any(name.startswith((f"{prefix}embed_tokens.", f"{prefix}layers.")) for name in others)
    bare = {theirs.removeprefix("model.") if is_bare else theirs: ours for theirs, ours in table.items()}
    return {
        (before_head if ours == HEAD else prefix) + theirs.replace("{}.", "{}." + inner): ours
        for theirs, ours in bare.items()
    }


def whole_name(name: str) -> str:
    """The name of the tensor in the file: `NAME` of `NAME[PART]`, where PART is one of the parameters that it holds."""
    return name.partition("[")[0]


def text_tensors(names: Collection[str], whole: str) -> set[str]:
    """The names of the text part of a model of type `whole`: those with the embedding's prefix, and the head."""
    embedding = next((name for name in names if name.endswith("embed_tokens.weight")), "")
    prefix = embedding.removesuffix("embed_tokens.weight")
    if f".{prefix}".endswith(".model."):
        prefix = prefix.removesuffix("model.")
    text = {name for name in names if name.startswith(prefix) or f".{name}".endswith(f".{HEAD}")}
    others = {name.removeprefix("model.").partition(".")[0] for name in set(names) - text}
    warn(f"of this model of type {whole}, only the text part is read, not {join_names(sorted(others))}")
    return text


def to_file_name(name: str, table: KeyTable) -> str:
    """Our name of a parameter -> the name in the file."""
    layer = re.search(r"\.(\d+)\.", name)
    pattern = name.replace(layer[0], ".{}.", 1) if layer else name
    file_pattern = {ours: theirs for theirs, ours in table.items()}.get(pattern, pattern)
    return file_pattern.replace("{}", layer[1]) if layer else file_pattern
