"""Structured output: answers that match a JSON schema, a regular expression or a grammar, or are one of several texts.

llguidance compiles these to a grammar over the tokens of the vocabulary. At each step it says which of them can follow,
and all others get a probability of 0.
"""

import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_mini.errors import RequestError, errors_about
from llama_mini.tokenizer import Tokenizer
from llama_mini.validate import as_plain, check_choice, short_repr

STRUCTURES = ("json_schema", "regex", "grammar", "choice")  # settings, of which a request may have one
FORMATS = ("text", "json_object", "json_schema")  # OpenAI's
MAX_CHARS = 65_536  # of a schema or grammar: one step of a larger one may take 0.1 s
MAX_UNCHECKED = 2000  # characters of a grammar that is compiled at once: too few for rules that nest too deeply
SLOW = "multipleOf"  # in a schema: compiling takes as many steps as its value says
MAX_KEPT = 16  # compiled grammars
MAX_USES = 50  # of one of these: then it is compiled anew
SECONDS = 0.5  # of processor time that a check may take
WHITE_SPACE = r"[ ]|\n{1,2}[ \t]{0,20}"  # in JSON, as in llama.cpp: models might write white space without end
LIMITS: dict[str, Any] = {
    "verbose_errors": False,
    "max_lexer_states": 100_000,  # 25 MB
    "step_max_items": 20_000,  # at most 80 ms
}
# The library takes short steps, but its compiler has no limit on time, and rules that refer to each other to a depth of
# thousands end the process. So a long grammar is first compiled in another one, with half the stack of threads here.
_CHECK = f"""
import json, sys, threading
sys.path.append(sys.argv[1])
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
if sys.platform != "win32":
    import resource, signal
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    signal.setitimer(signal.ITIMER_PROF, {SECONDS})
grammar = json.load(sys.stdin.buffer)
def check():
    error = ""
    try:
        if "gbnf" in grammar:
            grammar["lark_grammar"] = gbnf_to_lark(grammar.pop("gbnf"))
        text, limits = json.dumps({{"grammars": [grammar]}}), LLParserLimits(**{LIMITS})
        error = LLMatcher.validate_grammar(text, limits=limits)
        LLMatcher(LLTokenizer("byte"), text, log_level=0, limits=limits).compute_bitmask()  # it may take long, too
    except Exception as failure:
        error = str(failure) or repr(failure)
    print(json.dumps([error, grammar]))
threading.stack_size(4 << 20)
threading.Thread(target=check).start()
"""


def checked_structure(name: str, value: Any) -> Any:
    """The value of a setting of STRUCTURES as it is kept: a text, for `choice` several. Raises RequestError."""
    value = as_plain(value)
    if name == "json_schema":
        value = _schema_text(value)
    texts = value if name == "choice" else [value]
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) and t for t in texts):
        expected = "a list of non-empty texts" if name == "choice" else "a non-empty text"
        raise RequestError(f"{name} must be {expected}, not {short_repr(value)}")
    if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
        raise RequestError(f"{name} holds half a surrogate pair: remove it")
    if (length := sum(map(len, texts))) > MAX_CHARS:
        raise RequestError(f"{name} has {length:,} characters, at most {MAX_CHARS:,} are read: make it shorter")
    return tuple(texts) if name == "choice" else value


def _schema_text(schema: Any) -> str:
    expected = f"json_schema must be a JSON schema, as a dict or as JSON, not {short_repr(schema)}"
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        parsed = json.loads(text)
        if isinstance(parsed, dict) or parsed is True:
            return "{}" if parsed is True else text
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{expected}: {error}") from None
    raise RequestError(expected)


def of_response_format(value: Any) -> Any:
    """The JSON schema of OpenAI's `response_format`; None for a text. Raises RequestError for an unknown one."""
    if not isinstance(value, Mapping):
        raise RequestError(f"response_format must be an object with a type, not {short_repr(value)}")
    check_choice("response_format type", kind := value.get("type"), FORMATS, RequestError)
    if kind == "text":
        return None
    if kind == "json_object":
        return value.get("schema") or {"type": "object"}  # llama.cpp has a schema beside it
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if schema is None:
        raise RequestError(f"response_format must have json_schema.schema, a JSON schema: {short_repr(value)}")
    return schema


class Structures:
    """Compiles the structures of requests for the vocabulary of a model. Any thread may use it.

    vocab_size: number of logits.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._kept: OrderedDict[tuple[str, Any], Constraint] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, setting: tuple[str, Any] | None) -> "Constraint | None":
        """The compiled form of a setting, (name, value); each answer takes a copy. None without a setting.

        Raises RequestError if it cannot be compiled, takes too long, or if no text matches it.
        """
        if setting is None:
            return None
        with self._lock:
            kept = self._kept.get(setting)
            if kept is not None and kept.is_usable():
                kept.n_uses += 1
                self._kept.move_to_end(setting)
                return kept
        compiled = self._compiled(*setting)  # without the lock: a long one delays no other
        with self._lock:
            self._kept[setting] = compiled
            self._kept.move_to_end(setting)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return compiled

    def read_vocabulary(self) -> None:
        """Does now what the first request would wait for: with 49,152 tokens, no other thread runs for 0.1 s."""
        _ = self._vocabulary

    def _compiled(self, name: str, value: Any) -> "Constraint":
        grammar = _as_grammar(name, value)
        if "gbnf" in grammar or SLOW in value or len(json.dumps(grammar)) > MAX_UNCHECKED:
            with errors_about(name):
                grammar = _checked(grammar)
        plain = self._with_start("@answer", grammar, name)
        if not self._tokenizer.strips_space:
            return plain
        # Decoding drops a space at the start of a text, which SentencePiece models write there. It is optional unless
        # the structure may begin with a space of its own.
        spaced = [token.startswith(b" ") for token in self._vocabulary.tokens]
        start = '" " @answer' if (plain.allowed() & spaced[:-1]).any() else '" "? @answer'
        return self._with_start(start, grammar, name)

    def _with_start(self, start: str, grammar: dict[str, Any], name: str) -> "Constraint":
        library = _library()
        # With no_forcing all tokens whose texts match are allowed, not only those that the tokenizer would choose.
        first = {"lark_grammar": f'%llguidance {{"no_forcing": true}}\nstart: {start}'}
        text = json.dumps({"grammars": [first, grammar | {"name": "answer"}]})
        limits = library.LLParserLimits(**LIMITS)
        matcher = library.LLMatcher(self._vocabulary.for_library, text, log_level=0, limits=limits)
        constraint = Constraint(matcher, name, self._vocab_size)
        constraint.allowed()  # raises if the grammar is wrong or matches nothing
        return constraint

    @cached_property
    def _vocabulary(self) -> "_Vocabulary":
        return _Vocabulary(self._tokenizer, self._vocab_size)


class Constraint:
    """The state of one answer in its grammar: which tokens may follow those that were accepted.

    name: the setting that asks for it.
    ends: the tokens that end the answer of its request.
    """

    def __init__(self, matcher: Any, name: str, vocab_size: int, ends: Collection[int] = ()) -> None:
        self.name, self._matcher, self._vocab_size = name, matcher, vocab_size
        self._ends = [token for token in ends if token < vocab_size]
        self.n_uses = 0

    def is_usable(self) -> bool:
        """Whether more requests may have copies. All copies share the states of a lexer, whose number is limited."""
        with suppress(RequestError):  # of a copy: the engine's thread may be copying this one
            return self.n_uses < MAX_USES and bool(self.copy().allowed().any())
        return False

    def copy(self, ends: Collection[int] | None = None) -> "Constraint":
        """The same state for another answer, or for guesses at this one. It takes 1 µs."""
        return Constraint(self._matcher.deep_copy(), self.name, self._vocab_size, self._ends if ends is None else ends)

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each token (V,) may follow. Raises RequestError if none may, or if it takes too long to know."""
        n = self._vocab_size + 1  # the last one stands for the end of the answer
        words = np.zeros((n + 31) // 32, dtype=np.uint32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            raise RequestError(f"{self.name}: {_message(self._matcher.get_error())}")
        allowed = np.unpackbits(words.view(np.uint8), count=n, bitorder="little").view(np.bool_)
        if allowed[-1]:
            allowed[self._ends] = True
        return allowed[:-1]

    def banned(self) -> Tensor:
        """Whether each token (V,) may not follow. Raises as `allowed` does."""
        return torch.from_numpy(~self.allowed())

    def accept(self, token: int) -> bool:
        """Takes the next token of the answer. Whether the answer is complete: nothing may follow."""
        return token in self._ends or (self._matcher.consume_token(token) and self._matcher.is_stopped())


class _Vocabulary:
    """The bytes of all tokens, in the form that llguidance takes.

    Control tokens have no text, so that only a grammar that names one allows it. One more token stands for the end of
    the answer: which tokens end it differs between requests.
    """

    is_tokenizer_wrapper, bos_token_id = True, None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        known = range(min(vocab_size, tokenizer.vocab_size))
        texts = [tokenizer.token_bytes(id) for id in known]
        names = {id: tokenizer.token_bytes(id, skip_special_tokens=False) for id in known if not texts[id]}
        self.special_token_ids = [*(id for id in names if names[id]), vocab_size]
        self.eos_token_id = vocab_size
        self.tokens = [names.get(id) or text for id, text in enumerate(texts)]
        self.tokens += [b""] * (vocab_size - len(known)) + [b"<|end of the answer|>"]
        self.for_library = _library().LLTokenizer(self)


def _library() -> Any:
    """llguidance, which is optional and takes a moment to load."""
    try:
        import llguidance
    except ImportError:
        do = "pip install 'llama-mini[serve]'"
        raise RequestError(f"structured output needs llguidance, which is not installed: {do}") from None
    return llguidance


def _as_grammar(name: str, value: Any) -> dict[str, Any]:
    """A structure in the form that llguidance takes."""
    if name == "json_schema":
        return {"json_schema": {"x-guidance": {"whitespace_pattern": WHITE_SPACE}} | json.loads(value)}
    if name == "choice":
        value = "|".join("".join(f"\\x{{{ord(char):x}}}" for char in text) for text in value)
    if name != "grammar":
        return {"lark_grammar": f"start: /{_library().regex_to_lark(value, 'd')}/"}
    return {"gbnf" if re.search(r"^\s*[\w-]+\s*::=", value, re.MULTILINE) else "lark_grammar": value}


def _checked(grammar: dict[str, Any]) -> dict[str, Any]:
    """The grammar, a GBNF one as Lark, after it was compiled in another process. Raises RequestError if that failed."""
    command = [sys.executable, "-I", "-c", _CHECK, str(Path(_library().__file__).parents[1])]
    try:
        done = subprocess.run(command, input=json.dumps(grammar).encode(), capture_output=True, timeout=20 * SECONDS)
        error, grammar = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        raise RequestError("it takes too much time, memory or stack to compile: make it simpler") from None
    if error:
        raise RequestError(_message(error))
    return grammar


def _message(error: str) -> str:
    """The line of the library's message that says what is wrong."""
    lines = [line for line in error.splitlines() if line] or ["it cannot be compiled"]
    if lines[0].startswith("NoExtension"):
        return "no text matches it that this model's vocabulary can write"
    stated = next((line for line in lines if line.startswith("error: ")), lines[0])
    return stated.removeprefix("error: ")[:300]
