"""A path or hub name -> an opened checkpoint. The content of a file tells its format, never its name."""

from pathlib import Path

from torch import nn

from llama_mini.checkpoint.gguf.model import open_gguf
from llama_mini.checkpoint.hf.directory import open_hf_directory
from llama_mini.checkpoint.io.file_kind import FileKind, describe, file_kind
from llama_mini.checkpoint.io.files import CONFIG, PARAMS, exists, inside
from llama_mini.checkpoint.match import with_settled_head
from llama_mini.checkpoint.meta.directory import open_meta_directory
from llama_mini.checkpoint.source import Source
from llama_mini.errors import CheckpointFormatError, CheckpointPathError
from llama_mini.validate import join_names


def resolve(name: str | Path) -> Path:
    """The path if it exists on disk, else the snapshot of a hub name in the standard cache. Raises CheckpointError."""
    path = Path(name)
    if name == "":
        raise CheckpointPathError("the model's name is empty; give a directory, a file or a hub name, org/name")
    if exists(path) or isinstance(name, Path):
        return path
    from llama_mini.checkpoint.hf.hub import fetch_from_hub, is_hub_name

    return fetch_from_hub(name) if is_hub_name(name) else path


def open_checkpoint(path: Path, pickles: type[nn.Module] | None = None) -> Source:
    """Opens a path that `resolve` returned. Reads the headers; of the data, only a head that should be tied.

    Pickles are opened only for conversion: `pickles` is then the model's class, whose shapes tell how to join Meta's
    shards. A directory that also has safetensors is read from these.

    Raises CheckpointError, ConfigError: one sentence, whatever is wrong.
    """
    if not exists(path):
        raise CheckpointPathError(
            f"{path!s:.200} does not exist; give a directory, a GGUF or safetensors file, or a hub name, org/name"
        )
    return with_settled_head(_open_directory(path, pickles) if path.is_dir() else _open_file(path))


def _open_directory(path: Path, pickles: type[nn.Module] | None) -> Source:
    is_hf = inside(path, CONFIG).exists()
    if is_hf or inside(path, PARAMS).exists():
        if pickles is not None and not any(path.glob("*.safetensors")):
            from llama_mini.checkpoint.meta.pickles import open_hf_pickles, open_meta_pickles  # for conversion only

            return open_hf_pickles(path) if is_hf else open_meta_pickles(path, pickles)
        return open_hf_directory(path) if is_hf else open_meta_directory(path)
    ggufs = sorted(file for file in path.iterdir() if file.is_file() and file_kind(file) is FileKind.GGUF)
    if len(ggufs) == 1:
        return open_gguf(inside(path, ggufs[0].name))
    if ggufs:
        raise CheckpointPathError(
            f"{path} holds {len(ggufs)} GGUF files; give one of them: {join_names(file.name for file in ggufs)}"
        )
    raise CheckpointFormatError(f"{path} is not a checkpoint: it has no {CONFIG}, no {PARAMS} and no GGUF file")


def _open_file(path: Path) -> Source:
    kind = file_kind(path)
    if kind is FileKind.GGUF:
        return open_gguf(path)
    if kind is FileKind.SAFETENSORS:
        if not inside(path.parent, CONFIG).is_file():
            raise CheckpointFormatError(f"{path} holds only weights; put the {CONFIG} that describes them beside it")
        return open_hf_directory(path.parent, path)
    raise CheckpointFormatError(f"{path} is not a checkpoint: it is {describe(kind)}")
