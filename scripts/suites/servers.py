"""Our server as a process, with the default checkpoint: one for each set of options, kept until the suite ends."""

import atexit
import json
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

from benchmark.servers import Server
from llama_mini.cli.default_model import ensure_default_checkpoint


@cache
def server_with(checkpoint: Path, *options: str) -> str:
    """The address of our server with these options, started the first time."""
    command = [sys.executable, "-m", "llama_mini.serve", "--model", str(checkpoint), "--port", "{port}"]
    server = Server([*command, *options])
    atexit.register(server.close)
    return server.url


@cache
def checkpoint_with(context: int | None = None, template: str | None = None) -> Path:
    """The default checkpoint, or a copy of it with another context or chat template."""
    checkpoint = ensure_default_checkpoint()
    if context is None and template is None:
        return checkpoint
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    copy = Path(shutil.copytree(checkpoint, folder / checkpoint.name))
    if context is not None:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    if template is not None:
        (copy / "chat_template.jinja").write_text(template)
    return copy
