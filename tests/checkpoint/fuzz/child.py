"""The process in which damaged checkpoints are opened, and the parent's end of it: JSON lines over pipes."""

import json
import os
import resource
import selectors
import subprocess
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.match import match
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.checkpoint.source import Source
from llama_mini.cli.convert import tokenizer_files
from llama_mini.errors import LlamaMiniError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser
from llama_mini.tokenizer.tokenizer import open_tokenizer

ROOT = Path(__file__).parents[3]
MEMORY = 1 << 29  # bytes that a case may ask for beyond what the process has
START_SECONDS = 120
MOST_CHARACTERS = 4000
TEXT = "The 12 apples, naïve?\n  def f(x): 苹果 🍎 <|im_end|>"
MESSAGES = [{"role": "user", "content": "How many <|im_end|> apples?"}]


class Child:
    """A process that answers one case after another; `ask` starts a new one where the last has died.

    `before` is Python code that runs in it first: a test plants faults with it.
    """

    def __init__(self, errors: Path, before: str = "") -> None:
        self.starts = 0
        self._errors = errors
        self._before = before
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, case: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What became of a case: `outcome` is "ok", "refused", "raised", "died" or "hung"."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died since its last answer
            self._process.stdin.write(json.dumps(case).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._read_line(seconds)
        if answer.endswith(b"\n"):
            return json.loads(answer)
        hung = not self._is_closed
        code = self.stop()
        if hung:
            return {"outcome": "hung", "what": f"no answer after {seconds} seconds"}
        return {"outcome": "died", "what": f"exit code {code}; {self._errors.read_text(errors='replace')[-1500:]}"}

    def stop(self) -> int | None:
        """Its exit code, if there is a process that was killed or had died by itself."""
        process, self._process = self._process, None
        if process is None:
            return None
        if not self._is_closed:
            process.kill()
        with suppress(BrokenPipeError), process:
            pass
        return process.wait()

    def _start(self) -> None:
        code = f"{self._before}\nfrom tests.checkpoint.fuzz.child import main\nmain()"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        self.starts += 1
        self._is_closed = False
        started = self._read_line(START_SECONDS)
        assert started == b"ready\n", self._errors.read_text()

    def _read_line(self, seconds: float) -> bytes:
        """Up to the end of the line, of the output, or of the time."""
        assert self._process is not None
        assert self._process.stdout is not None
        line, deadline = b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n") and selector.select(max(deadline - time.monotonic(), 0)):
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    self._is_closed = True
                    break
                line += part
        return line


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    torch.set_num_threads(1)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        started = time.process_time()
        answer = _answer(json.loads(line))
        answers.write(json.dumps(answer | {"seconds": time.process_time() - started}) + "\n")
        answers.flush()


def _answer(case: dict[str, Any]) -> dict[str, Any]:
    """Messages are those that a user would see, of the error and of warnings, each cut where it is much too long."""
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, resource.RLIM_INFINITY))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        answer = _outcome(case)
    messages = [str(warning.message) for warning in warned if issubclass(warning.category, LlamaMiniWarning)]
    return answer | {"messages": [message[:MOST_CHARACTERS] for message in [*answer.get("messages", []), *messages]]}


def _outcome(case: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"outcome": "ok", "tensors": _open(case)}
    except LlamaMiniError as error:
        return {"outcome": "refused", "messages": [str(error)]}
    except BaseException as error:  # a panic of Rust is no Exception
        frames = traceback.extract_tb(error.__traceback__)[:-7:-1]
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
        message = " ".join(str(error).split())[:500]
        return {"outcome": "raised", "what": f"{type(error).__name__}: {message} at {places}"}


def _open(case: dict[str, Any]) -> dict[str, int]:
    """All that is done with a checkpoint but to run it: a digest of each tensor, by its name."""
    source = open_checkpoint(Path(case["path"]), pickles=Llama if case["pickles"] else None)
    model = load_model(Llama, source, torch.float32, "cpu")
    if any(stored.kept for stored in source.tensors.values()):
        load_model(Llama, source, torch.float32, "cpu", fuser("off"), "auto")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if case["compare"] and not source.adapters:  # whose values depend on all of their bytes
        names = match(model, source)
        for theirs, tensor in _as_their_library_reads_it(source):
            if theirs in names and not torch.equal(_bits(parameters[names[theirs]]), _bits(tensor)):
                raise AssertionError(f"{theirs} is not what the format's own library reads")
    if case["tokenizer"]:
        tokenizer = open_tokenizer(source)
        ids = tokenizer.encode(TEXT)
        assert all(0 <= id < tokenizer.vocab_size for id in ids), "an id is outside the vocabulary"
        tokenizer.decode(ids)
        if case["chat"] and tokenizer.has_chat_template:
            tokenizer.apply_chat_template(MESSAGES)
        tokenizer_files(source)
    return {name: zlib.crc32(_bits(parameter).numpy().data) for name, parameter in parameters.items()}


def _as_their_library_reads_it(source: Source) -> Iterator[tuple[str, Tensor]]:
    """In float32, without the matrices whose rows we put into another order."""
    if source.gguf is not None:
        from gguf import GGUFReader, quants

        for found in GGUFReader(source.path).tensors:
            if ".attn_q." not in found.name and ".attn_k." not in found.name:
                values = torch.from_numpy(quants.dequantize(found.data, found.tensor_type).copy()).float()
                adds_one = found.name.endswith("norm.weight") and source.model_type == "gemma2"
                yield found.name, values - 1 if adds_one else values
    else:
        from safetensors.torch import load_file

        for file in {stored.file for stored in source.tensors.values()}:
            for name, tensor in load_file(file).items():
                stored = source.tensors.get(name)
                if stored is not None and (stored.file != file or stored.kept):
                    continue  # the index names the one in another shard; or it is a part of a quantised matrix
                if not name.endswith(("attention.wq.weight", "attention.wk.weight")):
                    yield name, tensor.float()


def _bits(tensor: Tensor) -> Tensor:
    # NaN equals itself, and a signalling one of float16 the quiet one that torch, but not NumPy, makes of it.
    return torch.where(tensor.isnan(), torch.nan, tensor).contiguous().view(torch.int32)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
