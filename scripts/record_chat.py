"""Chats with the default checkpoint in a real terminal and draws its screen, for the README; needs tmux and rich."""

import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "llama_mini" / "cli" / "chat.svg"
COMMAND = "llama-mini chat"
WIDTH, HEIGHT = 88, 32
SECONDS = 120
STOPPED_AFTER = 180  # characters of the answer that Ctrl-C ends


class Screen:
    """A shell in a tmux of its own."""

    def __init__(self, folder: str) -> None:
        self._tmux = ["tmux", "-S", f"{folder}/tmux", "-f", os.devnull]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        given = {"PATH": path, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": folder, "PS1": "$ ", "LC_ALL": "C.UTF-8"}
        self._env = os.environ | given
        self._run("new-session", "-d", "-x", str(WIDTH), "-y", str(HEIGHT), "bash", "--norc")
        self.until(lambda screen: screen.endswith("$"))

    def close(self) -> None:
        self._run("kill-server")

    def type(self, text: str, key: str = "Enter") -> None:
        if text:
            self._run("send-keys", "-l", text)
            self.until(lambda screen: screen.endswith(text))
        self._run("send-keys", key)

    def say(self, text: str) -> None:
        """Types a line and waits for the prompt that comes after the answer to it."""
        before = self.text().count(">>>")
        self.type(text)
        self.until(lambda screen: screen.count(">>>") > before and screen.endswith(">>>"))

    def until(self, ready: Callable[[str], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not ready(self.text()):
            if time.monotonic() > deadline:
                raise SystemExit(f"the screen is not as expected after {SECONDS} s:\n{self.text()}")
            time.sleep(0.05)

    def text(self, *options: str) -> str:
        return self._run("capture-pane", "-p", *options).rstrip()

    def _run(self, *args: str) -> str:
        command = [*self._tmux, *args]
        return subprocess.run(command, env=self._env, check=True, capture_output=True, encoding="utf-8").stdout


def chat(screen: Screen) -> None:
    screen.say(COMMAND)
    screen.say("What is the capital of France?")
    screen.say("And which river is in the middle of it?")
    screen.say("/stats")
    screen.say("/set temperature 0.7")
    screen.say("/set seed 4")
    story = "Tell me a story about a dog in that city."
    screen.type(story)
    screen.until(lambda text: len(text.rpartition(story)[2]) > STOPPED_AFTER)
    screen.type("", "C-c")
    screen.until(lambda text: text.endswith(">>>"))
    screen.type("/undo")
    screen.until(lambda text: text.endswith(f">>> {story}"))


def drawn(screen: str) -> str:
    """The screen as SVG. Without rich's links to fonts: a picture in a README is not to fetch anything."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    console.print(Text.from_ansi(screen), soft_wrap=True)
    svg = console.export_svg(title=COMMAND, theme=DIMMED_MONOKAI, unique_id="chat")
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        screen = Screen(folder)
        try:
            chat(screen)
            TARGET.write_text(drawn(screen.text("-e")), encoding="utf-8")
        finally:
            screen.close()


if __name__ == "__main__":
    main()
