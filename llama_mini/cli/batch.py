"""Answers a file of prompts, one JSON object per line. A killed run continues where it stopped."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from llama_mini.engine.llm import LLM
from llama_mini.engine.request import Completion
from llama_mini.engine.sampling_params import SamplingParams
from llama_mini.errors import LlamaMiniError, RequestError
from llama_mini.validate import short_repr

SETTINGS = {field.name for field in fields(SamplingParams)} - {"n", "logits_processors"}


@dataclass(frozen=True)
class Line:
    """A line of the prompts, counted from 0. Its digest, stored with its result, tells a later run if it changed."""

    index: int
    digest: str
    text: str


def run_batch(
    llm: LLM,
    lines: list[Line],
    results: Path,
    params: SamplingParams,
    tokens: Callable[[LLM, Any], list[int]],
    limit: Callable[[LLM, list[int], SamplingParams], SamplingParams],
) -> None:
    """Appends one line to `results` for each of the lines, as soon as its answer is complete.

    A line is `{"prompt": text or token ids}` or `{"messages": [...]}`, optionally with an `"id"` and the fields of
    SamplingParams. Its result has the `index` and `id` of the line and the fields of a Completion; `error` says why a
    line cannot be answered. Lines that already have a result are skipped. An incomplete last line of `results`, from a
    run that was killed, is removed first.

    tokens: turns a text or messages into token ids. limit: sets the default of max_tokens.

    Raises RequestError if `results` cannot be used, or has results of other lines.
    """
    done = _done(results, lines)
    progress = {"total": len(lines), "initial": len(done), "desc": "answering", "unit": "prompt"}
    with _open_to_append(results) as file, tqdm(**progress, disable=None) as bar:

        def write(line: Line, request_id: Any, completion: dict[str, Any]) -> None:
            head = {"index": line.index} | ({} if request_id is None else {"id": request_id}) | {"line": line.digest}
            # An id may hold half of a surrogate pair, which UTF-8 cannot encode: it becomes a JSON escape.
            file.write((json.dumps(head | completion, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
            file.flush()
            bar.update()

        asked: list[tuple[Line, Any]] = []
        prompts: list[list[int]] = []
        settings: list[SamplingParams] = []
        for line in lines:
            if line.index in done:
                continue
            request_id = None
            try:
                request = _request(line)
                request_id = request.pop("id", None)
                chat = "messages" in request
                prompt = request.pop("messages" if chat else "prompt")
                sampling = replace(params, **request)
                ids = prompt if isinstance(prompt, list) and not chat else tokens(llm, prompt)
            except LlamaMiniError as error:
                write(line, request_id, {"finish_reason": "error", "error": str(error)})
                continue
            asked.append((line, request_id))
            prompts.append(ids)
            settings.append(limit(llm, ids, sampling))
        for i, completion in llm.completions(prompts, settings):
            write(*asked[i], as_json(completion))


def as_json(completion: Completion) -> dict[str, Any]:
    """A completion for json.dumps, without the log-probabilities that were not asked for."""
    return {key: value for key, value in asdict(completion).items() if value is not None or key == "error"}


def read_lines(prompts: Path) -> list[Line]:
    """The lines of a file that are not blank. Raises RequestError."""
    try:
        texts = prompts.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{prompts} cannot be read as UTF-8 ({error}): give --batch a file of prompts") from None
    return [
        Line(index, hashlib.sha256(text.encode()).hexdigest()[:16], text)
        for index, text in enumerate(texts)
        if text.strip()
    ]


def _open_to_append(results: Path) -> BinaryIO:
    try:
        return results.open("ab")
    except OSError as error:
        raise RequestError(f"{results} cannot be written ({error.strerror}): give another --output") from None


def _done(results: Path, lines: list[Line]) -> set[int]:
    """The indices of the lines that have a result. Cuts off an incomplete last line."""
    if not results.exists():
        return set()
    try:
        data = results.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        done = {result["index"]: result["line"] for result in map(json.loads, complete.decode().split("\n")[:-1])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{results} is not a file of results ({error!r}): give another --output") from None
    digests = {line.index: line.digest for line in lines}
    if changed := [index for index, digest in done.items() if digests.get(index) != digest]:
        raise RequestError(
            f"{results} has a result for line {changed[0] + 1} of the prompts, which has changed: give another --output"
        )
    if len(complete) < len(data):
        with results.open("rb+") as file:
            file.truncate(len(complete))
    return set(done)


def _request(line: Line) -> dict[str, Any]:
    where = f"line {line.index + 1}"
    try:
        request = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from None
    if not isinstance(request, dict) or ("prompt" in request) == ("messages" in request):
        raise RequestError(f'{where} must be an object with either "prompt" or "messages", not {short_repr(request)}')
    if unknown := sorted(request.keys() - SETTINGS - {"prompt", "messages", "id"}):
        raise RequestError(f"{where}: unknown {short_repr(unknown[0])}; known: {', '.join(sorted(SETTINGS))}")
    biases = request.get("logit_bias")
    if isinstance(biases, dict):  # the keys of JSON are strings
        request["logit_bias"] = {
            int(key) if key.isdecimal() and len(key) < 20 else key: bias for key, bias in biases.items()
        }
    return request
