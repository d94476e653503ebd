"""Strict JSON, and paths that stay inside a checkpoint's directory. An error is one sentence that names the file."""

import json
import math
import os
import re
from itertools import chain
from pathlib import Path
from typing import Any

from llama_mini.checkpoint.io.file_kind import HEAD, FileKind, kind_of, open_file, size_of
from llama_mini.errors import CheckpointFormatError, CheckpointPathError
from llama_mini.validate import as_text, short_repr

CONFIG, PARAMS = "config.json", "params.json"  # of a Hugging Face and of a Meta directory
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # the weights; the index of weights in shards
ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin")  # of PEFT, mlx-lm, PEFT
PICKLES = (".bin", ".pth", ".pt", ".ckpt")  # how the names of pickled weights end
VOCABULARIES = ("tokenizer.json", "tekken.json", "tokenizer.model")  # the first that exists is read
TOKENIZER_FILES = (
    *(*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)
QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
TEMPLATES = "additional_chat_templates"  # the folder of the templates beside chat_template.jinja
MAX_JSON_BYTES = 256 * 2**20
_MAX_DEPTH = 127  # of nested objects and lists: the limit of Rust's serde_json, which other readers use
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CONTAINERS = {dict, list}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointPathError if unreadable, CheckpointFormatError if broken."""
    data = read_bytes(path)
    kind = kind_of(data[:HEAD], len(data))
    if kind not in (FileKind.JSON, FileKind.OTHER):
        raise CheckpointFormatError(f"{path} is not JSON but {kind.value}")
    if b"\0" in data[:4]:  # without a byte order mark
        raise CheckpointFormatError(f"{path} is UTF-16 or UTF-32 text: save it as UTF-8")
    text = as_text(data, path, CheckpointFormatError)
    try:
        value = decode_json(text)
    except ValueError as error:
        raise CheckpointFormatError(f"{path} {error}; restore the file") from None
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{path} holds a JSON {type(value).__name__}, not an object; restore the file")
    return value


def read_bytes(path: Path) -> bytes:
    """A whole file of up to MAX_JSON_BYTES. Raises CheckpointError if it is larger or cannot be read."""
    with open_file(path) as file:
        if (size := size_of(file)) > MAX_JSON_BYTES:
            raise CheckpointFormatError(f"{path} has {size} bytes, but {MAX_JSON_BYTES} are read at most; restore it")
        return file.read(size)


def decode_json(text: str) -> Any:
    """Strict JSON: json.loads accepts more than the standard. Raises ValueError, whose text follows a file's name."""
    try:
        value = json.loads(text, parse_int=_int, parse_float=_float, parse_constant=_constant)
        depth = _depth(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    except RecursionError:
        depth = _MAX_DEPTH + 1
    if depth > _MAX_DEPTH:
        raise ValueError(f"is nested too deeply; up to {_MAX_DEPTH} levels are read")
    if _SURROGATE.search(text):  # perhaps a whole pair, which is a character
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is not a character") from None
    return value


def read_weight_map(index: Path) -> dict[str, str]:
    """The map of tensor names to file names in an index, which may begin with `./`. Raises CheckpointError.

    The file names may be hostile paths.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        do = "restore it, or delete it if all shards are there"
        raise CheckpointFormatError(f"{index} has no weight_map of tensor names to file names; {do}")
    return {name: re.sub(r"^(\./)+", "", file) for name, file in weight_map.items()}


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def exists(path: Path) -> bool:
    """Whether a path exists. (pathlib raises for a name that is too long.)"""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def inside(directory: Path, name: str) -> Path:
    """The path of a file in a checkpoint's directory. The file itself may be absent.

    Raises CheckpointPathError if `name` is not a plain file name, or is a symbolic link out of the directory; the links
    that make up the Hugging Face hub's cache are allowed.
    """
    if not _is_plain(name):
        why = "so it may lead out of the directory; correct it"
        raise CheckpointPathError(f"{directory}: {short_repr(name)} is not a plain file name, {why}")
    path = directory / name
    try:
        if not path.is_symlink() or not path.exists():
            return path
        home, target = directory.resolve(), path.resolve()
        if target.is_relative_to(home) or _is_hub_link(home, path, target):
            return path
    except OSError as error:
        raise CheckpointPathError(f"cannot read {directory / short_repr(name)}: {error.strerror}") from None
    raise CheckpointPathError(f"{path} is a symbolic link out of its directory, to {target}; copy it if you trust it")


def _is_plain(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return name == Path(name).name and name not in ("", ".", "..") and "\0" not in name


def _is_hub_link(home: Path, path: Path, target: Path) -> bool:
    """Whether CACHE/models--ORG--NAME/snapshots/REVISION/FILE links to blobs/ETAG of the same model, which is a file
    or a link to CACHE/blobs/AB/ABCD..., where huggingface_hub 2 keeps what several models share."""
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    if snapshots is None or not snapshots.parent.name.startswith("models--"):
        return False
    model = snapshots.parent
    link = path.parent / path.readlink()
    blob = link.parent.resolve() / link.name
    if blob.parent != model / "blobs":
        return False
    shared = target.parent.parent == model.parent / "blobs" and target.parent.name == target.name[:2]
    return target == blob or (shared and re.fullmatch("[0-9a-f]{64}", target.name) is not None)


def _int(text: str) -> int:
    if len(text) > 300:  # Python is slow at thousands of digits, or refuses them with its own message
        _float(text)
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"holds a number of {len(text)} digits, which is too large")
    return value


def _constant(text: str) -> None:
    raise ValueError(f"holds {text}, which is not a number in JSON")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while not _CONTAINERS.isdisjoint(map(type, level)):
        depth += 1
        containers = [item.values() if type(item) is dict else item for item in level if type(item) in _CONTAINERS]
        level = list(chain.from_iterable(containers))
    return depth
