"""Many prompts from a JSON-lines file, and their results in another as they come; a run that was killed goes on."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama_mini.checks import shown
from llama_mini.engine import LLM
from llama_mini.errors import LlamaMiniError, RequestError
from llama_mini.request import Completion
from llama_mini.sampling_params import SamplingParams

SETTINGS = {field.name for field in fields(SamplingParams)} - {"n", "logits_processors"}


@dataclass(frozen=True)
class Line:
    """One line of the prompts: its place, what it must still be when a run goes on, and what it asks for."""

    index: int
    digest: str
    text: str


def run_batch(
    llm: LLM,
    prompts: Path,
    results: Path,
    params: SamplingParams,
    tokens: Callable[[LLM, Any], list[int]],
    limit: Callable[[LLM, list[int], SamplingParams], SamplingParams],
) -> None:
    """Answers each line of `prompts` with one line of `results`, in the order in which they end.

    A line is `{"prompt": text or token ids}` or `{"messages": [...]}`, with an `"id"` and any setting of SamplingParams
    if wanted. Its result has the `index` of the line from 0, the `id`, and what a Completion has. What is wrong with a
    line is the `error` of its result. Lines that `results` has already are left out; half a line at its end, of a run
    that was killed, is dropped.

    tokens: a text or messages as token ids. limit: the same parameters with a default for max_tokens.

    Raises RequestError where a file cannot be used, or where `results` belongs to other prompts.
    """
    lines = _lines(prompts)
    done = _done(results, lines)
    left = [line for line in lines if line.index not in done]
    with results.open("a", encoding="utf-8") as file, _bar(len(lines), len(done)) as bar:

        def write(line: Line, ident: Any, completion: dict[str, Any]) -> None:
            own = {"index": line.index} | ({} if ident is None else {"id": ident}) | {"line": line.digest}
            file.write(json.dumps(own | completion, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        asked, idents, ids, settings = [], [], [], []
        for line in left:
            ident = None
            try:
                request = _request(line, prompts)
                ident = request.pop("id", None)
                prompt = request.pop("messages", None) or request.pop("prompt")
                own = replace(params, **request)
                encoded = prompt if _is_ids(prompt) else tokens(llm, prompt)
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


def _lines(prompts: Path) -> list[Line]:
    try:
        text = prompts.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{prompts} cannot be read as UTF-8 lines ({error}): give --batch a file of them") from None
    digests = (hashlib.sha256(line.encode()).hexdigest()[:16] for line in text.split("\n"))
    pairs = enumerate(zip(digests, text.split("\n"), strict=True))
    return [Line(index, digest, line) for index, (digest, line) in pairs if line.strip()]


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


def _request(line: Line, prompts: Path) -> dict[str, Any]:
    where = f"{prompts}, line {line.index + 1}"
    try:
        request = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from None
    if not isinstance(request, dict) or ("prompt" in request) == ("messages" in request):
        raise RequestError(f'{where} must be an object with "prompt" or "messages", not {shown(request)}')
    if unknown := sorted(request.keys() - SETTINGS - {"prompt", "messages", "id"}):
        raise RequestError(f"{where}: {unknown[0]} is not known; known are {', '.join(sorted(SETTINGS))}")
    biases = request.get("logit_bias")
    if isinstance(biases, dict):  # JSON has no keys but strings
        request["logit_bias"] = {int(key) if key.isdecimal() else key: bias for key, bias in biases.items()}
    return request


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and not any(isinstance(item, dict) for item in prompt)


def _bar(total: int, done: int) -> "tqdm[Any]":
    return tqdm(total=total, initial=done, desc="answering", unit="prompt", disable=None)
