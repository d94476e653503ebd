"""Many prompts from a JSON-lines file, and their results in another as they come; a run that was killed goes on."""

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
    """One line of the prompts: its place, what it must still be when a run goes on, and what it asks for."""

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
    """Answers each of some lines with one line of `results`, in the order in which they end.

    A line is `{"prompt": text or token ids}` or `{"messages": [...]}`, with an `"id"` and any setting of SamplingParams
    if wanted. Its result has the `index` of the line from 0, the `id`, and what a Completion has. What is wrong with a
    line is the `error` of its result. Lines that `results` has already are left out; half a line at its end, of a run
    that was killed, is dropped.

    tokens: a text or messages as token ids. limit: the same parameters with a default for max_tokens.

    Raises RequestError where the file of results cannot be used, or belongs to other lines.
    """
    done = _done(results, lines)
    left = [line for line in lines if line.index not in done]
    with _appending(results) as file, _bar(len(lines), len(done)) as bar:

        def write(line: Line, ident: Any, completion: dict[str, Any]) -> None:
            own = {"index": line.index} | ({} if ident is None else {"id": ident}) | {"line": line.digest}
            # Half a surrogate pair, which an id may hold, becomes the escape that JSON has for it.
            file.write((json.dumps(own | completion, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
            file.flush()
            bar.update()

        asked, idents, ids, settings = [], [], [], []
        for line in left:
            ident = None
            try:
                request = _request(line)
                ident = request.pop("id", None)
                chat = "messages" in request
                prompt = request.pop("messages" if chat else "prompt")
                own = replace(params, **request)
                encoded = prompt if isinstance(prompt, list) and not chat else tokens(llm, prompt)
            except LlamaMiniError as error:
                write(line, ident, {"finish_reason": "error", "error": str(error)})
                continue
            asked.append(line)
            idents.append(ident)
            ids.append(encoded)
            settings.append(limit(llm, encoded, own))
        for place, completion in llm.completions(ids, settings):
            write(asked[place], idents[place], as_json(completion))


def as_json(completion: Completion) -> dict[str, Any]:
    """A completion for json.dumps, without the log-probabilities that nobody asked for."""
    return {key: value for key, value in asdict(completion).items() if value is not None or key == "error"}


def read_lines(prompts: Path) -> list[Line]:
    """The lines of a file that are not blank. Raises RequestError."""
    try:
        texts = prompts.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{prompts} cannot be read as UTF-8 lines ({error}): give --batch a file of them") from None
    return [
        Line(index, hashlib.sha256(text.encode()).hexdigest()[:16], text)
        for index, text in enumerate(texts)
        if text.strip()
    ]


def _appending(results: Path) -> BinaryIO:
    try:
        return results.open("ab")
    except OSError as error:
        raise RequestError(f"{results} cannot be written ({error.strerror}): give another --output") from None


def _done(results: Path, lines: list[Line]) -> set[int]:
    """The places of the lines that have a result. Cuts off what a killed run left half written."""
    if not results.exists():
        return set()
    try:
        data = results.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        found = [json.loads(line) for line in whole.decode().split("\n")[:-1]]
        done = {result["index"]: result["line"] for result in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{results} holds something else than results ({error!r}): give another --output") from None
    digests = {line.index: line.digest for line in lines}
    if other := [index for index, digest in done.items() if digests.get(index) != digest]:
        raise RequestError(
            f"{results} has a result for another line {other[0] + 1} than the prompts have now: give another --output"
        )
    if len(whole) < len(data):
        with results.open("rb+") as file:
            file.truncate(len(whole))
    return set(done)


def _request(line: Line) -> dict[str, Any]:
    where = f"line {line.index + 1}"
    try:
        request = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from None
    if not isinstance(request, dict) or ("prompt" in request) == ("messages" in request):
        raise RequestError(f'{where} must be an object with "prompt" or "messages", not {short_repr(request)}')
    if unknown := sorted(request.keys() - SETTINGS - {"prompt", "messages", "id"}):
        raise RequestError(f"{where}: {unknown[0]} is not known; known are {', '.join(sorted(SETTINGS))}")
    biases = request.get("logit_bias")
    if isinstance(biases, dict):  # JSON has no keys but strings
        request["logit_bias"] = {
            int(key) if key.isdecimal() and len(key) < 20 else key: bias for key, bias in biases.items()
        }
    return request


def _bar(total: int, done: int) -> "tqdm[Any]":
    return tqdm(total=total, initial=done, desc="answering", unit="prompt", disable=None)
