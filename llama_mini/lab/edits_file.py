"""Edits in a JSON file, {pattern: settings}, carried into generating and scoring: `--edit FILE`."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llama_mini.checkpoint.io.files import read_json
from llama_mini.engine.llm import LLM
from llama_mini.errors import RequestError
from llama_mini.lab.editing import edit
from llama_mini.lab.training import sample_text

_MEASURED_ON = 256  # tokens


@contextmanager
def edited_by(llm: LLM, file: str | Path | None) -> Iterator[None]:
    """The model has the edits of a file until the block ends; with None it stays as it is. Settings: see `lab.edit`.

    `freeze` is measured on the first 256 tokens of the lab's own text.

    Raises RequestError, naming the file, where `edit` does; CheckpointError for a file that is no JSON object.
    """
    with ExitStack() as stack:
        if file is not None:
            edits = read_json(Path(file))
            freezes = any("freeze" in settings for settings in edits.values() if isinstance(settings, Mapping))
            try:
                ids = llm.tokenizer.encode(sample_text())[:_MEASURED_ON] if freezes else None
                stack.enter_context(edit(llm.model, edits, ids))
            except RequestError as error:
                raise RequestError(f"{file}: {error}") from None
        yield
