"""A path or hub name -> an opened checkpoint. The content of a file tells its format, never its name."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from llama_mini.checkpoint.adapters.adapter import Adapter, open_adapter
from llama_mini.checkpoint.adapters.config import LARGEST
from llama_mini.checkpoint.adapters.merge import merged
from llama_mini.checkpoint.gguf.header import read_header
from llama_mini.checkpoint.gguf.model import open_gguf
from llama_mini.checkpoint.hf.directory import open_hf_directory
from llama_mini.checkpoint.hf.hub import resolve
from llama_mini.checkpoint.io.file_kind import FileKind, file_kind
from llama_mini.checkpoint.io.files import ADAPTER_CONFIG, ADAPTERS, CONFIG, PARAMS, PICKLES, exists, inside
from llama_mini.checkpoint.match import with_settled_head
from llama_mini.checkpoint.meta.directory import open_meta_directory
from llama_mini.checkpoint.not_models import describe_directory, describe_gguf, told_by_name
from llama_mini.checkpoint.source import Source
from llama_mini.errors import CheckpointError, CheckpointFormatError, CheckpointPathError, RequestError, warn
from llama_mini.validate import as_dict, check_number, join_names, short_repr

# One or several adapters: directories or hub names; a mapping gives each a weight, else it is 1.
Adapters = str | Path | Iterable[str | Path] | Mapping[str | Path, float]


def open_checkpoint(path: Path, pickles: type[nn.Module] | None = None, adapter: Adapters | None = None) -> Source:
    """Opens a path that `resolve` returned. Reads the headers; of the data, only a head that should be tied.

    The result is the model with the adapters in it. A directory that holds an adapter alone stands for the model that
    the adapter names, with the adapter.

    Pickles are opened only for conversion: `pickles` is then the model's class, whose shapes tell how to join Meta's
    shards. A directory that also has safetensors is read from these.

    Raises CheckpointError, ConfigError: one sentence, whatever is wrong.
    """
    if not exists(path):
        do = "give a directory, a GGUF or safetensors file, or a hub name, org/name"
        raise CheckpointPathError(f"{path!s:.200} does not exist; {do}")
    adapters = [open_adapter(resolve(name), weight, pickles is not None) for name, weight in _weights(adapter)]
    if _is_adapter(path):
        adapters = [open_adapter(path, 1.0, pickles is not None), *adapters]
        path = _model_of(adapters[0])
    source = with_settled_head(_open_directory(path, pickles) if path.is_dir() else _open_file(path))
    as_dict("adapter", ((str(adapter.path), adapter) for adapter in adapters), RequestError)  # none twice
    return with_settled_head(merged(source, adapters)) if adapters else source


def model_of_adapter(name: str | Path) -> Path:
    """The path of the model that an adapter names. Raises CheckpointError, ConfigError."""
    return _model_of(open_adapter(resolve(name), 1.0, pickles=True))


def _weights(adapter: Adapters | None) -> Iterable[tuple[str | Path, float]]:
    if adapter is None:
        return ()
    names = adapter if isinstance(adapter, Iterable) and not isinstance(adapter, str) else [adapter]
    pairs = names.items() if isinstance(names, Mapping) else [(name, 1.0) for name in names]
    for name, weight in pairs:
        if not isinstance(name, str | Path):
            raise RequestError(f"adapter must be a directory or a hub name, or several, not {short_repr(name)}")
        check_number(f"the weight of the adapter {name}", weight, RequestError, -LARGEST, LARGEST)
    return as_dict("adapter", pairs, RequestError).items()


def _is_adapter(path: Path) -> bool:
    """Whether a path is an adapter without its model."""
    if path.is_file():
        return path.name in ADAPTERS and exists(inside(path.parent, ADAPTER_CONFIG))
    return exists(inside(path, ADAPTER_CONFIG)) and not _weights_in(path) and _gguf_in(path) is None


def _model_of(adapter: Adapter) -> Path:
    """Its model: at the path that it names, beside it under that name, or on the hub."""
    base, home = adapter.config.base, adapter.path
    do = "give the model, and the adapter with --adapter (in Python: adapter=)"
    if base is None:
        raise CheckpointPathError(f"{home} holds an adapter that does not name its model; {do}")
    beside = home.resolve().parent / (Path(base).name or home.name)
    places = [Path(base), home / base, beside]
    found = next((place for place in places if exists(place) and place.resolve() != home.resolve()), None)
    try:
        found = found or resolve(f"{base}@{adapter.config.revision}" if adapter.config.revision else base)
    except CheckpointError as error:
        raise CheckpointPathError(f"the model of {home} is not found: {error}; {do}") from None
    if not exists(found):
        raise CheckpointPathError(f"{home} is an adapter for {base:.200}, found at none of {join_names(places)}; {do}")
    if _is_adapter(found):
        raise CheckpointFormatError(f"{home} holds an adapter for {found}, which is an adapter too; {do}")
    return found


def _weights_in(directory: Path) -> list[str]:
    names = [file.name for file in directory.iterdir() if file.name.endswith((".safetensors", *PICKLES))]
    return [name for name in names if told_by_name([name]) is None]


def _open_directory(path: Path, pickles: type[nn.Module] | None) -> Source:
    has_config, has_params = inside(path, CONFIG).exists(), inside(path, PARAMS).exists()
    weights = _weights_in(path)
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
        names = join_names(file.name for file in models)
        raise CheckpointPathError(f"{directory} holds {len(models)} GGUF files; give one of them: {names}")
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
            raise CheckpointFormatError(f"{path} holds only weights; put the {CONFIG} that describes them beside it")
        return open_hf_directory(path.parent, path)
    told = told_by_name([path.name]) if kind in (FileKind.PICKLE, FileKind.ARCHIVE, FileKind.OTHER) else None
    raise CheckpointFormatError(f"{path} is not a checkpoint: it is {kind.value if told is None else told[1]}")
