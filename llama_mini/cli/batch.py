"""Answers a file of prompts, one JSON object per line. A killed run continues where it stopped."""

import argparse
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from llama_mini.checkpoint.hf.hub import SMALL
from llama_mini.checkpoint.io.files import ADAPTERS, PARAMS, read_json
from llama_mini.checkpoint.source import Source
from llama_mini.cli.batch_lines import Asked, Line, asked, parse, read_lines
from llama_mini.cli.common import token_ids, with_limit
from llama_mini.cli.options import parser
from llama_mini.engine.llm import LLM
from llama_mini.engine.prompts import text_or_ids
from llama_mini.engine.request import Completion
from llama_mini.engine.sampling_params import SamplingParams, sampling_params
from llama_mini.errors import LlamaMiniError, RequestError
from llama_mini.machine import dtype_name
from llama_mini.validate import short_repr

# Options that change no answer, and two that are compared by what they lead to.
NOT_COMPARED = {"batch", "output", "device", "kernels", "threads", "model", "dtype"}
START = b'{"index": '  # of each result

Settings = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """An open file of prompts, and the file of their results; None is standard output."""

    name: str
    file: BinaryIO
    results: Path | None

    def answer(self, llm: LLM, params: SamplingParams, args: argparse.Namespace, settings: Settings) -> None:
        """Writes one result for each line, as soon as its answer is complete.

        A line is `{"prompt": text or token ids}` or `{"messages": [...]}`, optionally with an `id` and the fields of
        SamplingParams, or a request of OpenAI's batch files. Its result has the `index` and `id` of the line, the
        settings of the run and the fields of a Completion; `error` says why a line cannot be answered. Lines that
        already have a result in the file are skipped. An incomplete last line of it, from a run that was killed, is
        removed first.

        Args:
            params: for what a line leaves out.
            args: the options, which say how a prompt becomes token ids.
            settings: what the answers depend on besides the line. Results with other settings are refused.

        Raises RequestError if the results cannot be used, or are of other lines or settings.
        """
        with ExitStack() as stack:
            write = stack.enter_context(_writer(self.results))  # first: it keeps other runs from the results
            done = {} if self.results is None else _done(self.results, settings)
            total = None
            if self.file.seekable():  # a changed line is refused before anything is answered
                start = self.file.tell()
                total = len(done) + sum(1 for _ in self._pending(done))
                self.file.seek(start)
            hidden = True if self.results is None and sys.stdout.isatty() else None  # None: unless stderr is a file
            progress = {"total": total, "initial": len(done), "desc": "answering", "unit": "prompt", "disable": hidden}
            bar = stack.enter_context(tqdm(**progress))

            def write_result(line: Line, names: dict[str, Any], completion: dict[str, Any]) -> None:
                head = {"index": line.index} | names | {"line": line.digest, "settings": settings}
                write(json.dumps(head | completion, ensure_ascii=False) + "\n")
                bar.update()

            running: dict[int, tuple[Line, dict[str, Any]]] = {}

            def requests() -> Iterator[tuple[list[int], SamplingParams]]:
                """Token ids and parameters of each line, made when the model has room for it."""
                numbers = itertools.count()
                for line in self._pending(done):
                    names: dict[str, Any] = {}
                    try:
                        names, request = parse(line)
                        made = _request(llm, asked(request), params, args)
                    except LlamaMiniError as error:
                        write_result(line, names, {"finish_reason": "error", "error": str(error)})
                        continue
                    running[next(numbers)] = line, names
                    yield made

            prompts, sampling = itertools.tee(requests())
            for number, completion in llm.completions((ids for ids, _ in prompts), (each for _, each in sampling)):
                write_result(*running.pop(number), as_json(completion))

    def _pending(self, done: Mapping[int, str]) -> Iterator[Line]:
        """The lines without a result. Raises RequestError if a line that has one is no longer the same."""
        gone = set(done)
        for line in read_lines(self.file, self.name):
            if line.index not in done:
                yield line
            elif done[line.index] == line.digest:
                gone.remove(line.index)
        if gone:
            raise RequestError(
                f"{self.results} has a result for line {min(gone) + 1}, which has changed: give another --output"
            )


@contextmanager
def open_batch(prompts: str, output: str | None) -> Iterator[Batch]:
    """Opens the prompts, `-` is standard input, and finds the place of the results. Raises RequestError."""
    if output is None and os.path.isfile(prompts):
        output = f"{prompts}.results.jsonl"
    results = None if output in (None, "-") else Path(output)
    if results is not None and not results.parent.is_dir():
        raise RequestError(f"{results} cannot be written (there is no folder {results.parent}): give another --output")
    try:
        file: BinaryIO = sys.stdin.buffer if prompts == "-" else open(prompts, "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise RequestError(f"{prompts} cannot be read ({error.strerror}): give --batch a file of prompts") from None
    with nullcontext() if prompts == "-" else file:
        with suppress(io.UnsupportedOperation):  # no file, but bytes in memory
            if results is not None and results.is_file() and os.path.samestat(os.fstat(file.fileno()), results.stat()):
                raise RequestError(f"{results} is the file of the prompts: give another --output")
        yield Batch("standard input" if prompts == "-" else prompts, file, results)


def settings_of(args: argparse.Namespace, llm: LLM, source: Source) -> Settings:
    """What answers depend on besides their line: the model, the dtype, and the options that differ from the default."""
    defaults = parser()
    defaults.set_defaults(quantize="none")  # as it came out, like the dtype
    options = vars(args) | {"quantize": llm.quantize, "edit": args.edit and read_json(Path(args.edit))}
    given = {
        name: value
        for name, value in options.items()
        if name not in NOT_COMPARED and value != defaults.get_default(name)
    }
    return {"model": _fingerprint(source), "dtype": dtype_name(llm.model.dtype)} | given


def as_json(completion: Completion) -> dict[str, Any]:
    """A completion for json.dumps, without the log-probabilities that were not asked for."""
    return {key: value for key, value in asdict(completion).items() if value is not None or key == "error"}


def _request(
    llm: LLM, ask: Asked, params: SamplingParams, args: argparse.Namespace
) -> tuple[list[int], SamplingParams]:
    sampling = sampling_params(params, **ask.settings)
    if sampling.n != 1:
        raise RequestError("n must be 1: a line has one result; repeat the line with another seed")
    ids = token_ids(llm, args, ask.prompt if ask.is_chat else text_or_ids(ask.prompt), ask.is_chat, ask.variables)
    if len(ids) >= llm.config.max_seq_len:  # many of these would fill the memory until the model takes them
        raise RequestError(f"{len(ids)} prompt tokens and 1 new one exceed the context of {llm.config.max_seq_len}")
    return ids, with_limit(llm, ids, sampling)


@contextmanager
def _writer(results: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that appends a text to the results, which are on disk or with the reader when it returns.

    Raises RequestError if they cannot be written, or another run writes them.
    """
    if results is None:
        yield lambda text: print(text, end="", flush=True)
        return
    failure = f"{results} cannot be written ({{}}): "
    try:
        file = results.open("ab", buffering=0)
    except OSError as error:
        raise RequestError(f"{failure.format(error.strerror)}give another --output") from None
    with file:
        assert isinstance(file, io.FileIO)
        if results.is_file():  # not a device, which many may write
            _lock(file, results)

        def write(text: str) -> None:
            # An id may hold half of a surrogate pair, which UTF-8 cannot encode: it becomes a JSON escape.
            data = text.encode("utf-8", "backslashreplace")
            try:
                while data:
                    data = data[file.write(data) :]
            except BrokenPipeError:
                raise
            except OSError as error:
                again = "the results so far are kept, and the same command continues after them"
                raise LlamaMiniError(failure.format(error.strerror) + again) from None

        yield write


def _lock(file: io.FileIO, results: Path) -> None:
    """Keeps the file for this process until it is closed. Raises RequestError if another one has it."""
    with suppress(ImportError, OSError):  # Windows; a file system without locks
        from fcntl import LOCK_EX, LOCK_NB, flock

        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"another run writes {results}: wait until it ends, or give another --output") from None


def _done(results: Path, settings: Settings) -> dict[int, str]:
    """The indices and digests of the lines that have a result. Cuts off an incomplete last line."""
    done: dict[int, str] = {}
    if not results.is_file():  # absent, or a pipe or device, of which nothing is read
        return done
    complete = 0
    try:
        with results.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") and line.startswith(START[: len(line)]):
                    break
                result = json.loads(line)
                done[result["index"]] = result["line"]
                _check_settings(results, result["settings"], settings)
                complete += len(line)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(f"{results} is not a file of results ({error!r}): give another --output") from None
    if complete < results.stat().st_size:
        os.truncate(results, complete)
    return done


def _check_settings(results: Path, found: Settings, settings: Settings) -> None:
    if found == settings:
        return
    name = next(name for name in settings | found if settings.get(name) != found.get(name))
    before, now = (short_repr(each[name]) if name in each else "the default" for each in (found, settings))
    changed = "by another model" if name == "model" else f"with {name} = {before}, which is now {now}"
    raise RequestError(f"{results} has results made {changed}: give another --output")


def _fingerprint(source: Source) -> str:
    """Tells whether a model is the same: a digest of names, sizes, times and samples of its files, not of its path."""
    files = {tensor.file for tensor in source.tensors.values()}
    directories = [*source.adapters, *([source.directory] if source.gguf is None else [])]
    for directory in directories:  # configurations, tokenizers, chat templates and adapters
        named = {path for name in (*SMALL, PARAMS, *ADAPTERS) if (path := directory / name).is_file()}
        files |= named.union(directory.glob("additional_chat_templates/*.jinja"))
    digest = hashlib.sha256()
    for path in sorted(files):
        about = path.stat()
        digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
        with path.open("rb") as file:
            for start in range(0, about.st_size, max(about.st_size // 64, 4096)):
                file.seek(start)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]
