"""The chat as a process at a terminal, with a model that only tells what it was given."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.processes import take_interrupts

pty = pytest.importorskip("pty", reason="needs a Unix terminal")
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")

# A model that answers how many messages it was given and the last of them, unless that asks for something else.
# Nothing here computes, and a process starts five times as fast without torch.
CODE = r"""
import signal
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

sys.modules["torch"] = MagicMock()
if "--no-editor" in sys.argv:
    sys.modules["prompt_toolkit"] = None

from llama_mini.errors import RequestError
from llama_mini.cli.chat import run
from llama_mini.cli.common import exit_code_of
from llama_mini.engine.sampling_params import SamplingParams

ANSWERS = {"escape": "\x1b]0;owned\x07\x1b[31mred\x9b1m\rback 日本 👩\u200d👧\tx", "blank": "", "lines": "one\ntwo\n"}
STATS = SimpleNamespace(
    ttft_seconds=0.25,
    prompt_tokens=5,
    prefill_tok_s=8.0,
    new_tokens=7,
    decode_tok_s=30.0,
    cached_tokens=4,
    proposed_tokens=0,
)

def chunk(text, completion=None):
    return SimpleNamespace(text=text, token_id=1, completion=completion)

def tell_of_ctrl_c():
    stop = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *args: (stop(*args), print("pressed", file=sys.stderr)))
    print("working", file=sys.stderr)

class Fake:
    config = SimpleNamespace(max_seq_len=100)
    tokenizer = SimpleNamespace(
        apply_chat_template=lambda messages, add_generation_prompt: messages, template_variables=frozenset()
    )

    def stream(self, messages, params):
        if messages[-1]["content"] == "too long":
            raise RequestError("90 prompt tokens and 20 new ones exceed the context of 100")
        return self._stream(messages, params)

    def _stream(self, messages, params):
        last = messages[-1]["content"]
        if last == "silent":
            tell_of_ctrl_c()
            while True:
                pass
        while last == "endless":
            yield chunk("word ")
        text = ANSWERS.get(last, f"[{len(messages)} {params.temperature} {params.seed} {messages[0]['role']} {last!r}]")
        yield from map(chunk, text)
        yield chunk("", SimpleNamespace(finish_reason="length" if last == "cut" else "stop", stats=STATS))

system = "Be brief." if "--system" in sys.argv else None
sys.exit(exit_code_of(lambda: run(Fake(), SamplingParams(), system)))
"""
SECONDS = 60
ENTER, CTRL_C, CTRL_D, CTRL_J, CTRL_L, ALT_ENTER, UP, TAB = "\r", "\x03", "\x04", "\n", "\x0c", "\x1b\r", "\x1b[A", "\t"


def own_terminal() -> None:
    """Ctrl-C in it is a signal to the process, which takes it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    take_interrupts()


class Terminal:
    """A process at a terminal of its own: types, and waits for what it shows."""

    def __init__(self, *args: str, stdout: Any = None, **env: str) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, 200))
        self.child = subprocess.Popen(
            [sys.executable, "-c", CODE, *args],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"} | env,
            start_new_session=True,
            preexec_fn=own_terminal,
        )
        os.close(slave)
        self.screen = ""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def press_ctrl_c(self) -> None:
        """Presses it once the process waits for input: input() misses a signal that comes just before."""
        state = Path(f"/proc/{self.child.pid}/stat")
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] == "R":
            os.sched_yield()
        self.type(CTRL_C)

    def until(self, text: str, seconds: float = SECONDS) -> str:
        """What was shown since the last time, up to and with `text`."""
        deadline = time.monotonic() + seconds
        while (found := self.screen.find(text, self._seen)) < 0:
            part = self._read(deadline)
            assert part, f"it ended without {text!r}: {self.screen[self._seen :]!r}"
            self.screen += part.decode("utf-8", "replace")
        start, self._seen = self._seen, found + len(text)
        return self.screen[start : self._seen]

    def say(self, text: str) -> str:
        """Types a line and waits for the next prompt, which comes after the blank line that ends an answer."""
        self.type(text + ENTER)
        return self.until("]") + self.until(">>>")

    def ended(self) -> int:
        deadline = time.monotonic() + SECONDS
        while self._read(deadline):
            pass
        return self.child.wait(SECONDS)

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self._master)

    def _read(self, deadline: float) -> bytes:
        left = max(deadline - time.monotonic(), 0)
        assert select.select([self._master], [], [], left)[0], f"nothing came: {self.screen[self._seen :]!r}"
        try:
            return os.read(self._master, 1 << 16)
        except OSError:  # what Linux says once nobody has the other side open
            return b""


def piped(text: str | bytes, *args: str) -> subprocess.CompletedProcess[str]:
    data = text.encode() if isinstance(text, str) else text
    done = subprocess.run([sys.executable, "-c", CODE, *args], input=data, capture_output=True, check=False)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@contextmanager
def terminals(folder: Path) -> Iterator[Callable[..., Terminal]]:
    """Opens chats that wait for a question, with their history in `folder`; ends them all."""
    opened: list[Terminal] = []

    def open_one(*args: str, **options: Any) -> Terminal:
        opened.append(Terminal(*args, **{"XDG_STATE_HOME": str(folder)} | options))
        opened[-1].until(">>>")
        return opened[-1]

    try:
        yield open_one
    finally:
        for one in opened:
            one.close()
