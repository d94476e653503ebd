"""Finds the calls of tools in what a model writes, while it writes."""

import json
import re

from llama_mini.server.tools import Tools
from llama_mini.tokenizer import Tokenizer

MARKS = {"hermes": ("<tool_call>", "</tool_call>"), "mistral": ("[TOOL_CALLS]", ""), "json": ("<|python_tag|>", "")}
_HEAD = re.compile(  # of a call whose arguments can be sent while they come
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAME = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")  # Mistral's newer form: name[ARGS]{...}
_MAYBE_NAME = re.compile(r"\s*[\w.-]+(\[[\w\]]*)*\s*")
_BETWEEN = re.compile(r"[\s,;\[\]]*")  # what stands between two calls
Part = tuple[str, str]  # ("text", ...), ("name", of a call that begins) or ("arguments", ...)


class ToolCalls:
    """The calls in one answer, as parts. What is no call is text, so that nothing is lost.

    `n_calls` is their number, and `incomplete` what there is of one whose end is missing.
    """

    def __init__(self, tools: Tools, tokenizer: Tokenizer) -> None:
        self._tools = tools
        self._begin, self._end = MARKS.get(tools.style, ("", ""))
        marks, special = (self._begin, self._end, "[ARGS]", "[CALL_ID]"), tokenizer.special_tokens
        self._special = {special[mark]: mark for mark in marks if mark in special}
        self._in_calls = tools.style in ("list", "json", "arguments")  # these begin without a mark
        self._before = ""  # the mark of calls, and what else stands before the first one
        self._held = ""  # what is not read yet
        self._arguments: _JsonObject | None = None  # of the call that is being read, once its name is known
        self._object: _JsonObject | None = None  # the call itself
        self.n_calls = 0

    def push(self, text: str, token_id: int | None = None) -> list[Part]:
        """The parts that more text makes certain. A special token has no text, but may be the mark of a call."""
        self._held += text + self._special.get(-1 if token_id is None else token_id, "")
        parts, n_held = list[Part](), -1
        while len(self._held) != n_held:
            n_held = len(self._held)
            parts += self._calls() if self._in_calls else self._text()
        return parts

    def finish(self) -> list[Part]:
        """What is left at the end."""
        if self._object is not None:
            raw = "" if self._arguments is not None else self._before + self._object.text
        else:
            raw = self._before + self._held
            if self.n_calls and (not raw.strip() or (self._in_calls and self._ends(raw))):
                raw = ""
        return [("text", raw)] if raw else []

    def _ends(self, raw: str) -> bool:
        return _BETWEEN.fullmatch(raw) is not None or self._end.startswith(raw.strip())

    @property
    def incomplete(self) -> str:
        return "" if self._object is None or self._arguments is None else self._object.text

    def _text(self) -> list[Part]:
        """Text up to the mark of a call, or to what may be its beginning. White space waits for what follows."""
        if not self._begin:  # it had to be a call, and was none
            text, self._held = self._held, ""
            return [("text", text)] if text else []
        text, mark, rest = self._held.partition(self._begin)
        if mark:
            self._in_calls, self._before, self._held = True, mark, rest
        else:
            n = next((n for n in range(len(self._begin) - 1, 0, -1) if text.endswith(self._begin[:n])), 0)
            text = text[: len(text) - n].rstrip()
            self._held = self._held[len(text) :]
        return [("text", text.rstrip())] if text.strip() else []

    def _calls(self) -> list[Part]:
        """Reads what follows the mark of a call, or stands between two calls."""
        if self._object is not None:
            return self._read()
        held = self._held.lstrip()
        for mark in filter(None, (self._begin, self._end)):
            if held.startswith(mark):
                self._in_calls, self._held = mark == self._begin, held[len(mark) :]
                return []
            if mark.startswith(held):
                return []
        between = _BETWEEN.match(self._held)
        held = self._held[between.end() :] if between else ""
        named = _NAME.match(held) if self._tools.style == "mistral" else None
        if held.startswith("{") or named:
            self._before += self._held[: len(self._held) - len(held)]
            self._held, self._object = held[named.end() :] if named else held, _JsonObject()
            name = named[1] if named else self._tools.only
            return [*(self._begin_call(name) if name else ()), *self._read()]
        waits = not held or (self._tools.style == "mistral" and _MAYBE_NAME.fullmatch(held))
        return [] if waits else self._no_call("")

    def _read(self) -> list[Part]:
        """Reads on in a call."""
        assert self._object is not None
        new = self._object.read(self._held)
        self._held = self._held[len(new) :]
        parts = list[Part]()
        if self._arguments is not None:
            parts = self._more(new)
        elif (head := _HEAD.match(self._object.text)) and (name := self._known(json.loads(head[1]))):
            parts = [*self._begin_call(name), *self._more(self._object.text[head.end() :])]
        if self._object.complete:
            text, self._object = self._object.text, None
            if self._arguments is None:
                parts = self._whole_call(text)
            self._arguments = None
        return parts

    def _whole_call(self, text: str) -> list[Part]:
        """A call whose name comes after its arguments, or whose arguments are a text."""
        try:
            call = json.loads(text)
        except ValueError:
            return self._no_call(text)
        name, arguments = self._known(call.get("name")), call.get("arguments", call.get("parameters", {}))
        if not name:
            return self._no_call(text)
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [*self._begin_call(name), *self._sent("arguments", arguments)]

    def _no_call(self, text: str) -> list[Part]:
        """What was taken for calls is text."""
        text, self._before, self._in_calls = self._before + text, "", False
        return [("text", text)] if text else []

    def _known(self, name: object) -> str | None:
        """A name, if it may be one. Without marks it has to be the name of a tool: JSON may be a plain answer."""
        return name if isinstance(name, str) and (self._tools.style != "json" or name in self._tools.names) else None

    def _begin_call(self, name: str) -> list[Part]:
        self._arguments, self._before = _JsonObject(), ""
        self.n_calls += 1
        return self._sent("name", name)

    def _more(self, text: str) -> list[Part]:
        assert self._arguments is not None
        return self._sent("arguments", self._arguments.read(text))

    def _sent(self, kind: str, text: str) -> list[Part]:
        return [(kind, text)] if text and (self.n_calls == 1 or self._tools.parallel) else []


class _JsonObject:
    """A JSON object that arrives in parts: its `text` so far, and whether it is `complete`."""

    def __init__(self) -> None:
        self.text = ""
        self.complete = False
        self._depth = 0
        self._in_string = self._escaped = False

    def read(self, text: str) -> str:
        """Takes the beginning of a text, up to the end of the object; returns what it took."""
        if self.complete:
            return ""
        for i, char in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.complete, text = True, text[: i + 1]
                    break
        self.text += text
        return text
