"""A checkpoint from the Hugging Face hub: only the files that are needed, in the hub library's own cache.

The library honours HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN, and draws the progress bars. It is
imported late: it is slow, and most runs never need it.
"""

import errno
import glob
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from llama_mini.checkpoint.io.files import INDEX, SINGLE, read_weight_map
from llama_mini.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointIncompleteError,
    CheckpointPathError,
)
from llama_mini.validate import short_repr

VOCABULARIES = ("tokenizer.json", "tokenizer.model")
CONFIGS = ("config.json", "params.json")  # Hugging Face's and Meta's: the second only where the first is not there
SMALL = (
    "config.json",
    "generation_config.json",
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
COMMIT = re.compile(r"[0-9a-f]{40}")
# What git allows as a name of a branch or tag, as far as it is ASCII; no part of it begins with a dot.
REVISION = re.compile(r"(?![/-])(?!.*(//|/\.|\.\.|@\{))(?!\.)[^\x00-\x20~^:?*\[\\\x7f-\U0010ffff]{1,200}(?<![/.])")


def is_hub_name(text: str) -> bool:
    """Whether `text` is `org/name` or `org/name@revision` by the hub's rules; nothing is asked or opened."""
    repo, at, revision = text.partition("@")
    if repo.count("/") != 1 or (at and not REVISION.fullmatch(revision)):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return True


def fetch_from_hub(name: str, tokenizer_only: bool = False) -> Path:
    """The snapshot's directory in the cache, or its file where a repository holds its weights as one GGUF file.

    What the cache lacks is downloaded. Without a network the cache is enough if it is whole; a full commit hash that
    is in the cache is never asked for.

    Raises:
        CheckpointPathError: not a hub's name, no such repository or revision, no access, no network, no space.
        CheckpointIncompleteError: the repository lacks a file that it needs.
        CheckpointFormatError: its index is broken, or its weights are in a format that the engine does not read.
    """
    if not is_hub_name(name):
        raise CheckpointPathError(f"{short_repr(name)} is no name on the hub; those are org/name or org/name@revision")
    repo, _, revision = name.partition("@")
    revision = revision or "main"
    cached, lacks = None, ""
    try:
        cached = _whole(_cached(repo, revision), tokenizer_only)
    except CheckpointError as error:
        lacks = str(error)
    if cached is not None and COMMIT.fullmatch(revision):
        return cached
    try:
        return _fetch(repo, revision, tokenizer_only, cached)
    except CheckpointError:
        raise
    except Exception as error:  # the library's, its HTTP client's, the file system's: they share no class
        if cached is not None:
            return cached
        raise CheckpointPathError(_sentence(error, repo, revision, lacks)) from None


def _fetch(repo: str, revision: str, tokenizer_only: bool, cached: Path | None) -> Path:
    from huggingface_hub import HfApi, constants

    # The library's own calls wait for a silent server for ever; this one goes first and does not.
    info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if cached is not None and info.sha in cached.parts:
        return cached
    names = {file.rfilename for file in info.siblings or ()}
    wanted = _wanted(repo, names, tokenizer_only)
    folder = _download(repo, revision, wanted)
    if INDEX in wanted:
        shards = _shards(folder / INDEX)
        if absent := sorted(set(shards) - names):
            raise CheckpointIncompleteError(
                f"{repo} lacks {len(absent)} of the {len(shards)} shards that its {INDEX} names: {_some(absent)}"
            )
        _download(repo, folder.name, shards)
    return _whole(folder, tokenizer_only)


def _wanted(repo: str, names: Collection[str], tokenizer_only: bool) -> list[str]:
    """Of a repository's files those to download; shards follow when the index is there."""
    top = {name for name in names if "/" not in name}
    small = [name for name in SMALL if name in top]
    if CONFIGS[0] not in top and CONFIGS[1] in top:
        small.append(CONFIGS[1])
    if tokenizer_only and top.intersection(VOCABULARIES):
        return small
    if not tokenizer_only and (weights := _weights(top)):
        if not top.intersection(CONFIGS):
            raise CheckpointIncompleteError(f"{repo} holds weights but no {CONFIGS[0]}, so their sizes are unknown")
        return small + weights
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if len(ggufs) == 1:
        return small + ggufs
    if ggufs:
        raise CheckpointPathError(
            f"{repo} holds {len(ggufs)} GGUF files: download one with `hf download {repo} FILE` and give the path that "
            f"it prints; they are {_some(ggufs)}"
        )
    if tokenizer_only:
        raise CheckpointIncompleteError(f"{repo} holds no tokenizer: neither {' nor '.join(VOCABULARIES)}")
    if pickles := sorted(name for name in names if name.endswith(PICKLES)):
        raise CheckpointFormatError(
            f"{repo} holds its weights as pickles ({_some(pickles)}), which can run code, so the engine reads none: "
            f"run `hf download {repo} --local-dir SRC`, then `python scripts/convert.py SRC DST`"
        )
    raise CheckpointIncompleteError(f"{repo} holds no weights: neither {INDEX} nor {SINGLE} nor a GGUF file")


def _weights(top: Collection[str]) -> list[str]:
    """The index or the safetensors files themselves; `consolidated` ones are in the layout of params.json."""
    meta = CONFIGS[0] not in top and CONFIGS[1] in top
    for name in (SINGLE, INDEX):  # as the reader has it, and transformers
        if name in top and not meta:
            return [name]
    return sorted(name for name in top if name.endswith(".safetensors") and name.startswith("consolidated") == meta)


def _shards(index: Path) -> list[str]:
    """The files that an index names: it is as untrusted as the repository."""
    shards = sorted(set(read_weight_map(index).values()))
    if outside := [name for name in shards if "/" in name or "\\" in name or not name.endswith(".safetensors")]:
        raise CheckpointPathError(
            f"{index} names {_some(outside)}; only safetensors files of the same folder are taken, so nothing was read"
        )
    return shards


def _download(repo: str, revision: str, names: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=revision, allow_patterns=[glob.escape(name) for name in names]))


def _cached(repo: str, revision: str) -> Path:
    """The snapshot in the cache, with every small file that its listing has, if there is a listing."""
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=list(SMALL)))
    except OSError as error:
        held = "only a part" if hasattr(error, "snapshot_path") else "nothing"
        raise CheckpointIncompleteError(f"the cache {constants.HF_HUB_CACHE} holds {held} of it") from None


def _whole(folder: Path, tokenizer_only: bool) -> Path:
    """The folder, or its GGUF file, if it holds all that is needed. Raises CheckpointError that says what it lacks."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    needed: list[str] = []
    if tokenizer_only and names.intersection(VOCABULARIES):
        return folder
    if not tokenizer_only and (weights := _weights(names)):
        needed = [] if names.intersection(CONFIGS) else [CONFIGS[0]]
        needed += _shards(folder / INDEX) if INDEX in names else weights
    else:
        ggufs = sorted(folder.rglob("*.gguf"))
        if len(ggufs) == 1 and ggufs[0].is_file():
            return ggufs[0]
        needed = [" or ".join(VOCABULARIES) if tokenizer_only else SINGLE]
    if absent := [name for name in needed if name not in names]:
        raise CheckpointIncompleteError(f"{folder} lacks {_some(absent)}")
    return folder


def _sentence(error: BaseException, repo: str, revision: str, lacks: str) -> str:
    """What went wrong, and what to do about it."""
    from huggingface_hub import constants, errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the library looked into its cache after this had gone wrong
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo}"
        return f"{repo} is gated: accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the hub has no repository {repo}, or a private one, and no such path is here: check the name, or log in "
            "with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}: name one of its branches, tags or commits after the @"
    if isinstance(error, errors.OfflineModeIsEnabled):
        variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        return (
            f"there is no path {repo} here, it cannot be downloaded from the hub while {variable} is set, and {lacks}: "
            "unset that, or fetch it beforehand"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the hub refuses {repo} (HTTP {status}): log in with `hf auth login`, or correct HF_TOKEN"
        return f"the hub could not serve {repo} (HTTP {status}), and {lacks}: try again later"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        cache = constants.HF_HUB_CACHE
        return f"the disk is full before {repo} is whole: free space for {cache}, or let HF_HOME name another disk"
    if isinstance(error, OSError) and error.strerror:
        return f"{repo} cannot be stored in {constants.HF_HUB_CACHE}: {error.strerror}; let HF_HOME name another folder"
    what = short_repr(f"{type(error).__name__}: {error}".splitlines()[0])
    return (
        f"{repo} cannot be fetched from {constants.ENDPOINT} ({what}), and {lacks}: check the network and HF_ENDPOINT"
    )


def _some(names: Collection[str]) -> str:
    """The first few names, for a message."""
    few = ", ".join(short_repr(name) for name in list(names)[:4])
    return few if len(names) <= 4 else f"{few} and {len(names) - 4} more"
