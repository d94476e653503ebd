"""A path or hub name -> an opened checkpoint. The content of a file tells its format, never its name."""

from pathlib import Path

from torch import nn

from llama_mini.checkpoint.gguf.header import read_header
from llama_mini.checkpoint.gguf.model import open_gguf
from llama_mini.checkpoint.hf.directory import open_hf_directory
from llama_mini.checkpoint.io.file_kind import FileKind, file_kind
from llama_mini.checkpoint.io.files import CONFIG, PARAMS, PICKLES, exists, inside
from llama_mini.checkpoint.match import with_settled_head
from llama_mini.checkpoint.meta.directory import open_meta_directory
from llama_mini.checkpoint.not_models import describe_adapter, describe_directory, describe_gguf, told_by_name
from llama_mini.checkpoint.source import Source
from llama_mini.errors import CheckpointFormatError, CheckpointPathError, warn
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
    has_config, has_params = inside(path, CONFIG).exists(), inside(path, PARAMS).exists()
    names = [file.name for file in path.iterdir() if file.name.endswith((".safetensors", *PICKLES))]
    weights = [name for name in names if told_by_name([name]) is None]
    if (not weights or not (has_config or has_params)) and (gguf := _gguf_in(path)) is not None:
        return open_gguf(gguf)  # a config.json may lie beside it
    # Some releases of Mistral have both formats, whose weights are told apart by their names.
    of_meta = bool(weights) and all(name.startswith("consolidated") for name in weights)
    is_meta = has_params and (of_meta or not has_config)
    if not is_meta and not has_config:
        what = None if weights else describe_directory(path)
        absent = f"is not a checkpoint: it has no {CONFIG}, no {PARAMS} and no GGUF file"
        raise CheckpointFormatError(f"{path} {what or absent}")
    if pickles is not None and not any(path.glob("*.safetensors")):
        from llama_mini.checkpoint.meta.pickles import open_hf_pickles, open_meta_pickles  # for conversion only

        return open_meta_pickles(path, pickles) if is_meta else open_hf_pickles(path)
    return open_meta_directory(path) if is_meta else open_hf_directory(path)


def _gguf_in(directory: Path) -> Path | None:
    """The GGUF file that holds the model, if there is one. Raises CheckpointPathError if there are several."""
    ggufs = sorted(file for file in directory.iterdir() if file.is_file() and file_kind(file) is FileKind.GGUF)
    models = ggufs if len(ggufs) < 2 else [file for file in ggufs if describe_gguf(read_header(file)) is None]
    if len(models) > 1:
        raise CheckpointPathError(
            f"{directory} holds {len(models)} GGUF files; give one of them: {join_names(file.name for file in models)}"
        )
    if models and (others := [file.name for file in ggufs if file not in models]):
        warn(f"{directory}: {join_names(others)} not read, since it holds no language model")
    chosen = (models or ggufs)[:1]  # one of several that are no model: opening it says what it is
    return inside(directory, chosen[0].name) if chosen else None


def _open_file(path: Path) -> Source:
    kind = file_kind(path)
    if kind is FileKind.GGUF:
        return open_gguf(path)
    if kind is FileKind.SAFETENSORS:
        if not inside(path.parent, CONFIG).is_file():
            if (adapter := describe_adapter(path.parent)) is not None:
                raise CheckpointFormatError(f"{path.parent} {adapter}")
            raise CheckpointFormatError(f"{path} holds only weights; put the {CONFIG} that describes them beside it")
        return open_hf_directory(path.parent, path)
    told = told_by_name([path.name]) if kind in (FileKind.PICKLE, FileKind.ARCHIVE, FileKind.OTHER) else None
    raise CheckpointFormatError(f"{path} is not a checkpoint: it is {kind.value if told is None else told[1]}")
