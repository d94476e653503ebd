"""The state of a chat: its turns and settings, and how the next answer is made. No input or output happens here."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from llama_mini.cli.options import json_or_text
from llama_mini.engine.sampling_params import SamplingParams
from llama_mini.errors import LlamaMiniError, RequestError
from llama_mini.tokenizer.config_files import NAMED
from llama_mini.validate import check_choice

if TYPE_CHECKING:
    from llama_mini.engine.llm import LLM
    from llama_mini.engine.request import FinishReason, Stats

_TEMPLATE = "template."  # begins the names of settings that are variables of the chat template
_NOT_IN_A_CHAT = ("n", "logit_bias", "logits_processors", "top_logprobs", "prompt_logprobs")  # no text, or no effect
Show = Callable[[str], None]
Stopped = Callable[[], bool]


@dataclass(frozen=True)
class Turn:
    """A question and its answer, which is exactly the text that was shown.

    Attributes:
        n_tokens: how many tokens were sampled.
        finish_reason: `stop`, `length`, or `abort` if the user stopped the answer; `stats` is then None.
        draw: 0 for the first answer to the question, one more for each retry.
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
        llm: the model. It keeps the history in its cache, so that a turn prefills only what is new.
        params: how the next answers are sampled.
        system: the system message, or None.
        variables: further variables of the chat template, such as `enable_thinking`.

    Raises:
        TokenizerError: the checkpoint has no chat template, or the template fails.
    """

    def __init__(
        self, llm: "LLM", params: SamplingParams, system: str | None = None, variables: dict[str, Any] | None = None
    ) -> None:
        self._llm = llm
        self.params = params
        self.system = system
        self.variables = variables or {}
        self.turns: list[Turn] = []
        self._ids(self._messages([], "?"))  # a checkpoint that cannot chat is refused now

    def ask(self, question: str, show: Show, stopped: Stopped) -> Turn | None:
        """Answers a question: `show` gets the text as it is made, `stopped` is asked after each token.

        If the user stops it, the answer is the text so far. Without any text, nothing is kept and the result is None.
        After an error nothing is kept either. A KeyboardInterrupt counts as a stop if `stopped()` is true.
        """
        turn = self._answer(self.turns, question, 0, show, stopped)
        if turn is not None:
            self.turns.append(turn)
        return turn

    def retry(self, show: Show, stopped: Stopped) -> Turn | None:
        """Answers the last question again, with another seed. The old answer stays until a new one can replace it."""
        if not self.turns:
            raise RequestError("there is no answer to replace: ask something first")
        last = self.turns[-1]
        turn = self._answer(self.turns[:-1], last.question, last.draw + 1, show, stopped)
        if turn is not None:
            self.turns[-1] = turn
        return turn

    def undo(self) -> str:
        """Removes the last question and its answer, and returns the question."""
        if not self.turns:
            raise RequestError("there is no question to take back: ask something first")
        return self.turns.pop().question

    def clear(self) -> None:
        """Removes all questions and answers; the system message and the settings stay."""
        self.turns.clear()

    def set(self, name: str, text: str) -> None:
        """Changes a setting of the next answers; `none` clears it. `template.NAME` is a variable of the template."""
        check_choice("setting", name, self.settings(), RequestError)
        value = json_or_text(text)
        if not name.startswith(_TEMPLATE):
            self.params = replace(self.params, **{name: value})
            return
        before = self.variables
        self.variables = before | {name.removeprefix(_TEMPLATE): value}
        try:
            self._ids(self._messages([], "?"))
        except LlamaMiniError:
            self.variables = before
            raise

    def settings(self) -> dict[str, str]:
        """Every setting, as text that `set` accepts."""
        names = [field.name for field in fields(SamplingParams) if field.name not in _NOT_IN_A_CHAT]
        values = {name: getattr(self.params, name) for name in names}
        for name in sorted(self._llm.tokenizer.template_variables.difference(NAMED)):
            values[_TEMPLATE + name] = self.variables.get(name)
        return {k: "none" if v is None else json.dumps(v, ensure_ascii=False) for k, v in values.items()}

    @property
    def max_context(self) -> int:
        return self._llm.config.max_seq_len

    @property
    def context_tokens(self) -> int:
        """Tokens of the history, with the chat template."""
        messages = self._messages(self.turns)
        return len(self._ids(messages, False)) if messages else 0

    def _answer(self, turns: list[Turn], question: str, draw: int, show: Show, stopped: Stopped) -> Turn | None:
        params = self.params
        if params.seed is not None:
            params = replace(params, seed=(params.seed + draw) % 2**64)
        texts: list[str] = []
        n_tokens = 0
        # Until it ends or is closed, the stream holds the model's lock.
        chunks = self._llm.stream(self._ids(self._messages(turns, question)), params)
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
        return self._llm.tokenizer.apply_chat_template(messages, add_generation_prompt, **self.variables)
