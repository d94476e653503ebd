"""Our server as a process, with the default checkpoint: one for each set of options, the last few of which are kept."""

import json
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from benchmark.servers import Server
from llama_mini.cli.default_model import ensure_default_checkpoint
from llama_mini.errors import LlamaMiniError

MOST = 3  # servers at a time, of 0.5 GB each; tests of one file come one after the other

_running: dict[tuple[str, ...], Server] = {}


def server_with(checkpoint: Path, *options: str) -> str:
    """The address of our server with these options, started unless it runs. It ends with the suite's process group."""
    key = (str(checkpoint), *options)
    if key not in _running:
        if len(_running) == MOST:
            _running.pop(next(iter(_running))).close()
        command = [sys.executable, "-m", "llama_mini.serve", "--model", key[0], "--port", "{port}"]
        try:
            _running[key] = Server([*command, *options])
        except LlamaMiniError as error:  # else its tests would be among those that fail for another reason
            pytest.exit(str(error), returncode=3)
    return _running[key].url


@cache
def checkpoint_with(context: int | None = None, template: str | None = None) -> Path:
    """The default checkpoint, or a copy with another context or chat template in the suite's temporary folder."""
    checkpoint = ensure_default_checkpoint()
    config, changed = json.loads((checkpoint / "config.json").read_text()), dict[str, str]()
    if context not in (None, config["max_position_embeddings"]):
        changed["config.json"] = json.dumps(config | {"max_position_embeddings": context})
    if template is not None:
        changed["chat_template.jinja"] = template
    if not changed:
        return checkpoint
    copy = Path(shutil.copytree(checkpoint, Path(tempfile.mkdtemp(), checkpoint.name), copy_function=_link))
    for name, text in changed.items():
        (copy / name).unlink(missing_ok=True)
        (copy / name).write_text(text)
    return copy


def _link(file: str, other: str) -> None:
    """A second name of a file, or a copy on another disk: a checkpoint with symbolic links out of it is refused."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)
