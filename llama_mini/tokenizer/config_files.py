"""What the files beside a vocabulary say: named and added tokens, BOS, EOS and the chat template."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_mini.checkpoint.io import files
from llama_mini.checkpoint.io.file_kind import HEAD, FileKind, kind_of
from llama_mini.checkpoint.io.files import inside
from llama_mini.checkpoint.special_ids import read_special_ids
from llama_mini.errors import CheckpointError, ConfigError, TokenizerError, warn
from llama_mini.validate import as_text, is_whole, short_repr

NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token added to the model's own vocabulary, with the matching rules that `tokenizer.json` gives it."""

    content: str
    id: int | None = None
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


@dataclass(frozen=True, kw_only=True)
class ConfigFiles:
    """What the files of a checkpoint's directory say. Any of it may be absent."""

    hugging_face: bool = False  # it has a tokenizer_config.json; Meta's directories have none
    names: Mapping[str, str] = field(default_factory=dict)  # "eos_token" -> "</s>": the template's variables
    added_tokens: tuple[AddedToken, ...] = ()
    add_bos: bool | None = None
    add_eos: bool | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict)  # by name: "default", "tool_use"
    bos_id: int | None = None  # from generation_config.json or config.json
    eos_ids: tuple[int, ...] = ()  # from generation_config.json, or config.json if that names none
    model_vocab_size: int = 0  # from config.json; 0 if unknown


def read_config_files(directory: Path) -> ConfigFiles:
    """Raises TokenizerError for a broken tokenizer_config.json; broken model configurations only warn."""
    settings = _read_settings(directory)
    model = _read_model_facts(directory)
    return ConfigFiles(
        hugging_face=files.exists(inside(directory, "tokenizer_config.json")),
        names={key: content for key in NAMED if (content := _content(settings.get(key))) is not None},
        added_tokens=_added_tokens(directory, settings),
        add_bos=settings.get("add_bos_token"),
        add_eos=settings.get("add_eos_token"),
        chat_templates=_chat_templates(directory, settings),
        **model,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises TokenizerError if it is not one."""
    try:
        return files.read_json(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None


def read_bytes(path: Path) -> bytes:
    """A whole file of up to MAX_JSON_BYTES. Raises TokenizerError if it cannot be read."""
    try:
        return files.read_bytes(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises TokenizerError if it is not one."""
    data = read_bytes(path)
    kind = kind_of(data[:HEAD], len(data))
    if kind in (FileKind.LFS_POINTER, FileKind.HTML):
        raise TokenizerError(f"{path} is not a text file but {kind.value}")
    return as_text(data, path, TokenizerError)


def template_files(directory: Path) -> dict[str, Path]:
    """Chat templates in files of their own, by name."""
    folder, default = inside(directory, files.TEMPLATES), inside(directory, "chat_template.jinja")
    named = {path.stem: inside(folder, path.name) for path in sorted(folder.glob("*.jinja"))}
    return named | {"default": default} if files.exists(default) else named


def _read_settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json. The older special_tokens_map.json overrides it in the same cases as in transformers."""
    path, older = inside(directory, "tokenizer_config.json"), inside(directory, "special_tokens_map.json")
    settings = read_json(path) if files.exists(path) else {}
    if "added_tokens_decoder" not in settings and files.exists(older):
        settings.update(read_json(older))
    return settings


def _added_tokens(directory: Path, settings: dict[str, Any]) -> tuple[AddedToken, ...]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    if "added_tokens_decoder" in settings:
        try:
            return tuple(
                AddedToken(id=int(key), content=_text(token), **{flag: _flag(token, flag) for flag in flags})
                for key, token in settings["added_tokens_decoder"].items()
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            path = inside(directory, "tokenizer_config.json")
            raise TokenizerError(f"{path}: added_tokens_decoder is not a map from ids to tokens ({error!r})") from error
    path = inside(directory, "added_tokens.json")
    if not files.exists(path):
        return ()
    named = {_content(settings.get(key)) for key in NAMED}
    return tuple(AddedToken(id=id, content=text, special=text in named) for text, id in read_json(path).items())


def _flag(token: dict[str, Any], name: str) -> bool:
    value = token.get(name)
    if not isinstance(value, bool | None):
        raise TypeError(f"{name} is {value!r:.40}, not true or false")
    return bool(value)


def _chat_templates(directory: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Templates by name. Those in files of their own replace those of tokenizer_config.json, as in transformers.

    chat_template.json is the older file of processors, which also take images.
    """
    if paths := template_files(directory):
        return {name: read_text(path) for name, path in paths.items()}
    path = inside(directory, "tokenizer_config.json")
    found, older = settings.get("chat_template"), inside(directory, "chat_template.json")
    if found is None and files.exists(older):
        path, found = older, read_json(older).get("chat_template")
    if found is None or isinstance(found, str):
        return {} if found is None else {"default": found}
    with suppress(KeyError, TypeError):
        templates = {entry["name"]: entry["template"] for entry in found}
        if all(isinstance(text, str) for text in (*templates, *templates.values())):
            return templates
    raise TokenizerError(f"{path}: chat_template is {short_repr(found)}, expected a string or a list of named ones")


def _read_model_facts(directory: Path) -> dict[str, Any]:
    """BOS, EOS and vocabulary size. If both files state an id, generation_config.json wins, as in transformers."""
    config, generation = inside(directory, "config.json"), inside(directory, "generation_config.json")
    if files.exists(config) and not files.exists(generation):
        warn(f"{directory} has no {generation.name}: text ends at the EOS of config.json and tokenizer_config.json")
    facts: dict[str, Any] = {}
    for path in (config, generation):
        try:
            raw = read_json(path) if files.exists(path) else {}
            ids = read_special_ids(raw)
        except (ConfigError, TokenizerError) as error:
            warn(f"{path.name} ignored: {error}")
            continue
        facts |= {key: ids[key] for key in ("bos_id", "eos_ids") if ids[key] not in (None, ())}
        if is_whole(raw.get("vocab_size")):
            facts["model_vocab_size"] = max(raw["vocab_size"], 0)
    return facts


def _content(token: object) -> str | None:
    """The content of a named token, which is a string or an object."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) and content else None


def _text(token: Mapping[str, Any]) -> str:
    if not isinstance(token["content"], str):
        raise ValueError(f"content is a {type(token['content']).__name__}")
    return token["content"]
