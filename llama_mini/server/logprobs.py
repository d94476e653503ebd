"""Log-probabilities of tokens in the shapes of OpenAI's two APIs."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_mini.engine.request import Alternatives
from llama_mini.tokenizer import Tokenizer

LEAST = -9999.0  # stands for minus infinity, which JSON does not have; vLLM's value


@dataclass
class Entry:
    """One token: the text that it completes, its bytes, and where the text begins."""

    id: int
    text: str
    bytes: bytes
    start: int
    logprob: float | None
    alternatives: Alternatives | None


class TokenLogprobs:
    """The tokens of one text as they come. Joined, the texts of all entries are the text, whole characters only.

    Entries wait until their text is sent: it may be the beginning of a stop string. Of that, and of an end-of-text
    token, they have no text. Positions count from `start`.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0, skip_special: bool = True) -> None:
        self._tokenizer, self._start, self._end, self._skip_special = tokenizer, start, start, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.strips_space
        self._held: list[Entry] = []

    def push(self, id: int, logprob: float | None, alternatives: Alternatives | None) -> None:
        data = self._tokenizer.token_bytes(id, self._skip_special)
        text = self._utf8.decode(data)
        if text and self._strip_space:
            self._strip_space, text, data = False, text.removeprefix(" "), data.removeprefix(b" ")
        self._held.append(Entry(id, text, data, self._end, logprob, alternatives))
        self._end += len(text)

    def sent(self, end: int) -> list[Entry]:
        """The next entries, when the first `end` characters of the text are sent."""
        n, end = 0, self._start + end
        for entry in self._held:
            if entry.start == end or entry.start + len(entry.text) > end:
                break
            n += 1
        taken, self._held = self._held[:n], self._held[n:]
        return taken

    def rest(self, text: str) -> list[Entry]:
        """The last entries, when the text is complete. Of a stop string, which is not in it, they have no text."""
        end = self._start + len(text)
        for entry in self._held:
            if entry.start + len(entry.text) > end:  # it ends in a stop string
                entry.text = text[entry.start - self._start :]
                entry.bytes = entry.text.encode()
        if self._held and self._end < end:  # the text ends within a character
            self._held[-1].text += text[self._end - self._start :]
        return self._held


class TokenNames:
    """What tokens are called: by their text, or by their id, `token_id:7`, if the client asks for that."""

    def __init__(self, tokenizer: Tokenizer, by_id: bool) -> None:
        self._tokenizer, self._by_id = tokenizer, by_id

    def of(self, id: int, text: str) -> str:
        return f"token_id:{id}" if self._by_id else text

    def bytes(self, id: int) -> bytes:
        """The bytes of a token by itself; of a special one, those of its name."""
        return self._tokenizer.token_bytes(id, skip_special_tokens=False)

    def unique(self, id: int) -> str:
        """A name also for a part of a character, in OpenAI's form: `bytes:\\xe2\\x82`."""
        data = self.bytes(id)
        try:
            return self.of(id, data.decode())
        except UnicodeDecodeError:
            return self.of(id, "bytes:" + "".join(f"\\x{byte:02x}" for byte in data))


def chat_logprobs(names: TokenNames, entries: Sequence[Entry]) -> dict[str, Any]:
    """`logprobs` of a choice of a chat."""

    def token(id: int, text: str, data: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": names.of(id, text), "logprob": _number(logprob), "bytes": list(data)}

    content = []
    for entry in entries:
        top = [(id, names.bytes(id), logprob) for id, logprob in entry.alternatives or ()]
        likeliest = [token(id, data.decode(errors="replace"), data, logprob) for id, data, logprob in top]
        content.append(token(entry.id, entry.text, entry.bytes, entry.logprob) | {"top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def text_logprobs(names: TokenNames, entries: Sequence[Entry]) -> dict[str, Any]:
    """`logprobs` of a choice of a completion."""
    return {
        "tokens": [names.of(entry.id, entry.text) for entry in entries],
        "token_logprobs": [_number(entry.logprob) for entry in entries],
        "top_logprobs": [_by_name(names, entry) for entry in entries],
        "text_offset": [entry.start for entry in entries],
    }


def prompt_logprob(
    names: TokenNames, id: int, logprob: float | None, top: Alternatives | None, n: int
) -> dict[str, Any] | None:
    """One token of a prompt, after the first, and the `n` likeliest ones in its place, in vLLM's shape."""
    if logprob is None or top is None:
        return None
    ranks = {other: rank for rank, (other, _) in enumerate(top, 1)}
    shown = {id: logprob} | dict(top[:n])
    return {
        str(each): {
            "logprob": _number(value),
            "rank": ranks.get(each),  # not known of a token that is not among the likeliest
            "decoded_token": names.bytes(each).decode(errors="replace"),
        }
        for each, value in shown.items()
    }


def _by_name(names: TokenNames, entry: Entry) -> dict[str, float | None] | None:
    """The token itself and the likeliest ones, as in OpenAI's API. Of two tokens with one name, the first one."""
    if entry.alternatives is None or entry.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for id, logprob in ((entry.id, entry.logprob), *entry.alternatives):
        found.setdefault(names.unique(id), _number(logprob))
    return found


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
