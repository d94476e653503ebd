"""A checkpoint from the Hugging Face hub: only the files that are needed, in the hub library's own cache.

The library downloads, resumes, caches, draws progress bars and honours HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and
HF_TOKEN. This file chooses the files, checks whether the cache has all of them, and turns each error into a sentence.
The library is slow to import, so it is imported late.
"""

import errno
import glob
import os
import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

from llama_mini.checkpoint.io.files import (
    ADAPTER_CONFIG,
    ADAPTERS,
    CONFIG,
    INDEX,
    PARAMS,
    PICKLES,
    QUANTIZATION_FILES,
    SINGLE,
    TEMPLATES,
    TOKENIZER_FILES,
    VOCABULARIES,
    exists,
    read_weight_map,
)
from llama_mini.checkpoint.not_models import told_by_name
from llama_mini.errors import CheckpointError, CheckpointFormatError, CheckpointIncompleteError, CheckpointPathError
from llama_mini.validate import join_names, short_repr

SMALL = [CONFIG, ADAPTER_CONFIG, *QUANTIZATION_FILES, *TOKENIZER_FILES]
COMMIT = re.compile(r"[0-9a-f]{40}")
# A branch or tag name that git allows, in ASCII only. No part of it begins with a dot.
REVISION = re.compile(r"(?![/-])(?!.*(//|/\.|\.\.|@\{))(?!\.)[^\x00-\x20~^:?*\[\\\x7f-\U0010ffff]{1,200}(?<![/.])")


def resolve(name: str | Path, tokenizer_only: bool = False) -> Path:
    """The path if it exists on disk, else the snapshot of a hub name in the standard cache. Raises CheckpointError."""
    if name == "":
        raise CheckpointPathError("the model's name is empty; give a directory, a file or a hub name, org/name")
    if isinstance(name, Path) or exists(Path(name)) or not is_hub_name(name):
        return Path(name)
    return fetch_from_hub(name, tokenizer_only)


def is_hub_name(text: str) -> bool:
    """Whether `text` is `org/name` or `org/name@revision` by the hub's rules. Uses neither network nor disk."""
    repo, at, revision = text.partition("@")
    if repo.count("/") != 1 or (at and not REVISION.fullmatch(revision)):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with suppress(HFValidationError):
        validate_repo_id(repo)
        return True
    return False


def fetch_from_hub(name: str, tokenizer_only: bool = False) -> Path:
    """Downloads what the cache lacks. Returns the snapshot's directory, or its file if the weights are one GGUF file.

    A complete cache needs no network. For a full commit hash that the cache has, the hub is not even asked.

    Raises:
        CheckpointPathError: not a hub name, no such repository or revision, no access, no network, no space.
        CheckpointIncompleteError: the repository lacks a file that it needs.
        CheckpointFormatError: its index is broken, or its weights are in a format that the engine does not read.
    """
    if not is_hub_name(name):
        raise CheckpointPathError(f"{short_repr(name)} is not a hub name; give org/name or org/name@revision")
    repo, _, revision = name.partition("@")
    revision = revision or "main"
    cached, cache_state = None, ""
    try:
        cached = _cached(repo, revision, tokenizer_only)
    except CheckpointError as error:
        cache_state = str(error)
    if cached is not None and COMMIT.fullmatch(revision):
        return cached
    try:
        return _download(repo, revision, tokenizer_only, cached)
    except CheckpointError:
        raise
    except Exception as error:  # the library's, its HTTP client's, the file system's: they share no class
        if cached is not None:
            return cached
        raise CheckpointPathError(_sentence(error, repo, revision, cache_state)) from None


def _cached(repo: str, revision: str, tokenizer_only: bool) -> Path:
    from huggingface_hub import constants, snapshot_download

    cache = f"the cache {constants.HF_HUB_CACHE}"
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=SMALL))
    except OSError as error:
        amount = "only a part" if hasattr(error, "snapshot_path") else "nothing"
        raise CheckpointIncompleteError(f"{cache} holds {amount} of it") from None
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return _collect(cache, names, tokenizer_only, lambda *_: folder)


def _download(repo: str, revision: str, tokenizer_only: bool, cached: Path | None) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    # The library's other calls wait forever for a silent server. This one comes first and has a timeout.
    info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if cached is not None and info.sha in cached.parts:
        return cached

    def download(names: Iterable[str], at: str = revision) -> Path:
        return Path(snapshot_download(repo, revision=at, allow_patterns=[glob.escape(name) for name in names]))

    return _collect(repo, {file.rfilename for file in info.siblings or ()}, tokenizer_only, download)


def _collect(where: str, names: Collection[str], tokenizer_only: bool, fetch: Callable[..., Path]) -> Path:
    """Fetches the needed files of `names`. Raises CheckpointError that says what `where` lacks."""
    needed = _needed(where, names, tokenizer_only)
    folder = fetch(needed)
    if INDEX in needed:
        shards = _shards(folder / INDEX)
        if absent := [name for name in shards if name not in names]:
            some = f"{len(absent)} of the {len(shards)} shards"
            raise CheckpointIncompleteError(f"{where} lacks {some} that its {INDEX} names: {_quoted(absent)}")
        fetch(shards, folder.name)  # of the same commit, even if the branch has moved
    gguf = needed[-1]
    return folder / gguf if gguf.endswith(".gguf") else folder


def _needed(where: str, names: Collection[str], tokenizer_only: bool) -> list[str]:
    """The files to fetch, without the shards of an index."""
    top = {name for name in names if "/" not in name}
    is_meta = CONFIG not in top and PARAMS in top
    small = [name for name in (*SMALL, *([PARAMS] if is_meta else [])) if name in top]
    adapter = [name for name in ADAPTERS if name in top][:1] if ADAPTER_CONFIG in top else []
    small += sorted(name for name in names if re.fullmatch(rf"{TEMPLATES}/[^/]+\.jinja", name))
    if tokenizer_only and top.intersection(VOCABULARIES):
        return small
    weights = [n for n in top if n.endswith(".safetensors") and told_by_name([n]) is None]
    weights = sorted(name for name in weights if name.startswith("consolidated") == is_meta)
    if not is_meta:  # one file wins over an index, as in hf/directory.py and in transformers
        weights = next(([name] for name in (SINGLE, INDEX) if name in top), weights)
    if weights and not tokenizer_only:
        if not top.intersection((CONFIG, PARAMS)):
            raise CheckpointIncompleteError(f"{where} holds weights but no {CONFIG}, so their sizes are unknown")
        return small + adapter + weights
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    ggufs = [name for name in ggufs if "mmproj" not in name] or ggufs  # a projector beside its model
    if len(ggufs) == 1:
        return small + adapter + ggufs
    if adapter and not tokenizer_only:
        return small + adapter
    if ggufs:
        do = f"download one with `hf download {where} FILE` and give the path that it prints"
        raise CheckpointPathError(f"{where} holds {len(ggufs)} GGUF files: {do}; they are {_quoted(ggufs)}")
    if tokenizer_only:
        raise CheckpointIncompleteError(f"{where} holds no tokenizer: neither {' nor '.join(VOCABULARIES)}")
    if pickles := sorted(name for name in names if name.endswith(PICKLES) and not told_by_name([Path(name).name])):
        do = f"so the engine reads none: run `hf download {where} --local-dir SRC`, then `llama-mini convert SRC DST`"
        raise CheckpointFormatError(f"{where} holds weights as pickles ({_quoted(pickles)}), which can run code, {do}")
    if (told := told_by_name(sorted(top))) is not None:
        raise CheckpointFormatError(f"{where} holds {told[0]}, {told[1]}")
    raise CheckpointIncompleteError(f"{where} holds no weights: neither {INDEX} nor {SINGLE} nor a GGUF file")


def _shards(index: Path) -> list[str]:
    """The files that an index names. An index may be hostile: only files of the same folder are allowed."""
    shards = sorted(set(read_weight_map(index).values()))
    if outside := [name for name in shards if "/" in name or "\\" in name or not name.endswith(".safetensors")]:
        raise CheckpointPathError(f"{index} names {_quoted(outside)}; only safetensors files of its folder are read")
    return shards


def _sentence(error: BaseException, repo: str, revision: str, cache_state: str) -> str:
    """What went wrong, and what to do about it. `cache_state` says what the cache lacks."""
    from huggingface_hub import constants, errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the library tried its cache after the download had failed with this
    cache, log_in = constants.HF_HUB_CACHE, "log in with `hf auth login`"
    what = short_repr(f"{type(error).__name__}: {error}".splitlines()[0])
    match error:
        case errors.GatedRepoError():
            return f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then {log_in} or set HF_TOKEN"
        case errors.RepositoryNotFoundError():
            hub = f"the hub has no repository {repo}, or it is private"
            return f"{hub}, and there is no such path here: check the name, or {log_in}"
        case errors.RevisionNotFoundError():
            return f"{repo} has no revision {revision!r}: name one of its branches, tags or commits after the @"
        case errors.OfflineModeIsEnabled():
            variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
            hub = f"there is no path {repo} here, it cannot be downloaded from the hub while {variable} is set"
            return f"{hub}, and {cache_state}: unset {variable}, or download the model first"
        case errors.HfHubHTTPError(response=response) if response.status_code in (401, 403):
            return f"the hub refuses {repo} (HTTP {response.status_code}): {log_in}, or correct HF_TOKEN"
        case errors.HfHubHTTPError(response=response):
            return f"the hub could not serve {repo} (HTTP {response.status_code}), and {cache_state}: try again later"
        case OSError(errno=errno.ENOSPC):
            return f"the disk is full and {repo} incomplete: free space for {cache}, or set HF_HOME to another disk"
        case OSError(strerror=str(reason)):
            return f"{repo} cannot be stored in {cache}: {reason}; set HF_HOME to another folder"
    hub = f"{repo} cannot be fetched from {constants.ENDPOINT} ({what})"
    return f"{hub}, and {cache_state}: check the network and HF_ENDPOINT"


def _quoted(names: Iterable[str]) -> str:
    return join_names(map(repr, names))  # a foreign name may hold line breaks
