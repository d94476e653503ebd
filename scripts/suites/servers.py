"""Our server as a process: one for each set of options, kept until the suite ends."""

import atexit
import sys

from benchmark.servers import Server

_running: dict[tuple[str, ...], Server] = {}


def server_with(*options: str) -> str:
    """The address of our server with these options, started the first time."""
    if options not in _running:
        command = [sys.executable, "-m", "llama_mini.serve", "--port", "{port}", *options]
        _running[options] = Server(command)
        atexit.register(_running[options].close)
    return _running[options].url
