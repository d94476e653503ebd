"""A chat as it goes on: its turns, its settings, one more answer. It knows no terminal."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from llama_mini.engine.sampling import SamplingParams
from llama_mini.errors import RequestError
from llama_mini.validate import join_names, short_repr

if TYPE_CHECKING:
    from llama_mini.engine.llm import LLM
    from llama_mini.engine.request import FinishReason, Stats

Show = Callable[[str], None]
Stopped = Callable[[], bool]


@dataclass(frozen=True)
class Turn:
    """A question and its answer, which is exactly the text that was shown.

    n_tokens: how many were sampled for it.
    finish_reason: `stop`, `length`, or `abort` if it was stopped on the way; then there are no `stats`.
    draw: how often the question was answered anew.
    """

    question: str
    answer: str
    n_tokens: int
    finish_reason: "FinishReason"
    stats: "Stats | None"
    draw: int = 0


class Conversation:
    """Questions and answers with one model. Every answer sees the whole history, through the chat template.

    Args:
        llm: the model, which keeps what it has read, so that only what is new in the history costs time.
        params: how the next answers are sampled.
        system: the system message, or None.

    Raises:
        TokenizerError: the checkpoint has no chat template, or it fails.
    """

    def __init__(self, llm: "LLM", params: SamplingParams, system: str | None = None) -> None:
        self._llm = llm
        self.params = params
        self.system = system
        self.turns: list[Turn] = []
        self._ids(self._messages([], "?"))  # a checkpoint that cannot chat says so before the first question

    def ask(self, question: str, show: Show, stopped: Stopped) -> Turn | None:
        """Answers a question; `show` gets the text as it comes, `stopped` is asked between two tokens.

        What came until a stop is kept as the answer. None if nothing had come: then nothing is kept, as after an error.
        A KeyboardInterrupt counts as a stop once `stopped` says so.
        """
        turn = self._answer(self.turns, question, 0, show, stopped)
        if turn is not None:
            self.turns.append(turn)
        return turn

    def retry(self, show: Show, stopped: Stopped) -> Turn | None:
        """Answers the last question anew, with another draw; the answer there was stays until the new one is there."""
        if not self.turns:
            raise RequestError("there is no answer to draw anew: ask something first")
        last = self.turns[-1]
        turn = self._answer(self.turns[:-1], last.question, last.draw + 1, show, stopped)
        if turn is not None:
            self.turns[-1] = turn
        return turn

    def undo(self) -> str:
        """Drops the last question and its answer; returns the question."""
        if not self.turns:
            raise RequestError("there is no question to take back: ask something first")
        return self.turns.pop().question

    def clear(self) -> None:
        """Drops all questions and answers; the system message and the settings stay."""
        self.turns.clear()

    def set(self, name: str, text: str) -> None:
        """Changes a setting of the next answers to what was typed: a number, `true`, `false`, or `none` for None."""
        kinds = scalar_settings()
        if name not in kinds:
            raise RequestError(f"there is no setting {short_repr(name)} here; known are {join_names(kinds)}")
        self.params = replace(self.params, **{name: _typed(text, kinds[name])})

    def settings(self) -> dict[str, str]:
        """Every setting as one would type it."""
        return {name: str(getattr(self.params, name)).lower() for name in scalar_settings()}

    @property
    def max_context(self) -> int:
        return self._llm.config.max_seq_len

    @property
    def context_tokens(self) -> int:
        """Positions that the history takes, before the next question."""
        messages = self._messages(self.turns)
        return len(self._ids(messages, False)) if messages else 0

    def _answer(self, turns: list[Turn], question: str, draw: int, show: Show, stopped: Stopped) -> Turn | None:
        params = self.params
        if params.seed is not None:
            params = replace(params, seed=(params.seed + draw) % 2**64)
        texts: list[str] = []
        n_tokens = 0
        chunks = self._llm.stream(self._ids(self._messages(turns, question)), params)
        assert isinstance(chunks, Generator)  # one left half-way has to be closed: it holds the model's lock
        try:
            for chunk in chunks:
                n_tokens += chunk.token_id is not None
                if chunk.text:
                    texts.append(chunk.text)
                    show(chunk.text)
                if done := chunk.completion:
                    return Turn(question, "".join(texts), n_tokens, done.finish_reason, done.stats, draw)
                if stopped():
                    break
        except KeyboardInterrupt:
            if not stopped():
                raise
        finally:
            chunks.close()
        return Turn(question, "".join(texts), n_tokens, "abort", None, draw) if texts else None

    def _messages(self, turns: list[Turn], question: str | None = None) -> list[dict[str, str]]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages if question is None else [*messages, {"role": "user", "content": question}]

    def _ids(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        return self._llm.tokenizer.apply_chat_template(messages, add_generation_prompt)


def scalar_settings() -> dict[str, tuple[Any, ...]]:
    """The fields of SamplingParams that one typed word can hold, each with the types it may have."""
    hints = get_type_hints(SamplingParams)
    kinds = {name: get_args(hint) if isinstance(hint, UnionType) else (hint,) for name, hint in hints.items()}
    return {name: types for name, types in kinds.items() if set(types) <= _READERS.keys()}


def _typed(text: str, kinds: tuple[Any, ...]) -> Any:
    """The value that a text stands for, or the text itself: the field's own check then says what is wrong with it."""
    for kind in kinds:
        try:
            return _READERS[kind](text)
        except (KeyError, ValueError):
            continue
    return text


_READERS: dict[Any, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    NoneType: lambda text: {"none": None}[text.lower()],
    int: int,
    float: float,
}
