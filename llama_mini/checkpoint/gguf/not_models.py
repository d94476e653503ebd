"""GGUF files that hold no whole model: what they are, by their metadata, and what to do about it."""

from llama_mini.checkpoint.gguf.header import GGUFHeader
from llama_mini.validate import is_whole, short_repr

_PROJECTOR = "it turns images or sound into a model's input: give the file of the model itself"
_TYPES = {  # general.type -> what that is
    "mmproj": _PROJECTOR,
    "imatrix": "it is an importance matrix, which llama.cpp quantizes with: give the file of the model itself",
    "adapter": "it is an adapter: merge it into its model with llama.cpp's llama-export-lora, and give the result",
}


def describe_gguf(header: GGUFHeader) -> str | None:
    """The key or tensor that tells that the file is no whole model, and what it is. None if it may be a model."""
    values = header.metadata
    kind, architecture, split = (values.get(key) for key in ("general.type", "general.architecture", "split.count"))
    if isinstance(architecture, str) and architecture == "clip":
        return f"general.architecture is 'clip': {_PROJECTOR}"
    if kind is not None and not (isinstance(kind, str) and kind == "model"):
        base = values.get("general.base_model.0.name")
        known = isinstance(kind, str) and kind in _TYPES
        what = _TYPES[kind] if known else "only files of type 'model' are read: give the file of the model itself"
        return f"general.type is {short_repr(kind)}: {what}" + (f"; its model is {short_repr(base)}" if base else "")
    if split is not None and not (is_whole(split) and split in (0, 1)):
        merge = "llama.cpp's `llama-gguf-split --merge FIRST_PART WHOLE_FILE`, and give the result"
        return f"split.count is {short_repr(split)}: it is a part of a split model; merge the parts with {merge}"
    if not header.tensors:
        return "it holds no tensors, only a vocabulary or settings: give the file of the model itself"
    return None
