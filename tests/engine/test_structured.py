"""Which tokens a structure allows, against a search of the whole vocabulary; and what is refused, in time."""

import base64
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex

from llama_mini import SamplingParams, Tokenizer
from llama_mini.engine import structured
from llama_mini.engine.sampling_params import is_setting, sampling_params
from llama_mini.engine.structured import MAX_KEPT, MAX_USES, Structures
from llama_mini.errors import RequestError
from llama_mini.validate import short_repr
from tests.tiny_gguf import tiny_llama, write_gguf  # noqa: F401
from tests.tokenizer.conftest import byte_level_spec, corpus, train_sentencepiece, write_directory  # noqa: F401

W = r"(?: |\n{1,2}[ \t]{0,20})?"  # white space between the parts of JSON
SCHEMA = {
    "type": "object",
    "properties": {
        "the": {"type": "boolean"},
        "k": {"enum": ["é", 'the "x"', None, 15]},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["the", "n"],
    "additionalProperties": False,
}
STRUCTURES: list[tuple[dict[str, Any], str]] = [  # a structure, and the texts it stands for as a regular expression
    ({"regex": r"(?:[a-c]+|(?:the|The) [0-9]{2,3}(é|ü)?/)"}, r"(?:[a-c]+|(?:the|The) [0-9]{2,3}(?:é|ü)?/)"),
    ({"regex": r"\d \d"}, "[0-9] [0-9]"),
    ({"regex": " *the"}, " *the"),
    ({"choice": ["the cat", "then", "the \n/\\\"'\x7f", "🎉\x01"]}, "the cat|then|the \n/\\\\\"'\x7f|🎉\x01"),
    ({"choice": [" the", "a"]}, " the|a"),
    ({"grammar": 'start: "(" start ")" | "the" | /[é-ü]/'}, r"\((?R)\)|the|(?:\xc3[\xa9-\xbc])"),
    ({"grammar": 'root ::= "(" root ")" | [a-c]+ " the"?'}, r"\((?R)\)|[a-c]+(?: the)?"),
    (
        {"json_schema": SCHEMA},
        rf"""\{{{W}"the"{W}:{W}(?:true|false)(?:{W},{W}"k"{W}:{W}(?:"é"|"the \\"x\\""|null|15))?"""
        rf"""{W},{W}"n"{W}:{W}(?:0|[1-9][0-9]?){W}\}}""",
    ),
]


@pytest.fixture(scope="module")
def tiktoken_ranks() -> bytes:
    tokens = [bytes([i]) for i in range(256)] + [
        b"th",
        b"the",
        b" t",
        b" the",
        b'{"',
        b'":',
        b"tr",
        b"\xc3\xa9",
        b"((",
        b"99",
    ]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture(params=["byte-level", "SentencePiece", "tiktoken", "GGUF"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, write_directory: Callable[..., Path]) -> Tokenizer:  # noqa: F811
    """One for each way to keep a vocabulary."""
    made = request.getfixturevalue
    match request.param:
        case "byte-level":
            files = {"tokenizer.json": made("byte_level_spec")()}
        case "SentencePiece":
            files = {"tokenizer.model": made("train_sentencepiece")()}
        case "tiktoken":
            files = {"tokenizer.model": made("tiktoken_ranks")}
        case _:
            return Tokenizer.from_pretrained(made("write_gguf")(tmp_path / "tiny.gguf"))
    return Tokenizer.from_pretrained(write_directory(files))


def found_by_search(tokenizer: Tokenizer, pattern: str, before: bytes) -> tuple[np.ndarray, bool]:
    """Whether each token can follow, tried one by one, and whether the text is whole."""
    compiled = regex.compile(pattern.encode().decode("latin-1").replace("Ã©-Ã¼", "é-ü"))
    must_have_space = tokenizer.strips_space and compiled.fullmatch(" ", partial=True) is not None

    def begins(text: bytes, partial: bool = True) -> bool:
        if must_have_space and not text.startswith(b" "):
            return text == b"" and partial
        text = text[1:] if tokenizer.strips_space and text.startswith(b" ") else text
        return compiled.fullmatch(text.decode("latin-1"), partial=partial) is not None

    texts = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    return np.array([text != b"" and begins(before + text) for text in texts]), begins(before, partial=False)


@pytest.mark.parametrize(("settings", "pattern"), STRUCTURES, ids=lambda value: str(value)[:30])
def test_the_same_tokens_as_found_by_search(tokenizer: Tokenizer, settings: dict[str, Any], pattern: str) -> None:
    rng, n, end = np.random.default_rng(0), tokenizer.vocab_size + 3, tokenizer.vocab_size + 1  # padded, as models are
    structure = Structures(tokenizer, n).constraint(SamplingParams(**settings).structure)
    assert structure is not None
    for _ in range(2):
        answer, text, complete = structure.copy({end, 10**9}), b"", False
        for _ in range(12):
            expected, whole = found_by_search(tokenizer, pattern, text)
            allowed = answer.allowed()
            assert allowed[:-3].tolist() == expected.tolist(), text
            assert allowed[-3:].tolist() == [False, whole, False]
            assert complete == (whole and not expected.any())
            if not expected.any():
                break
            token = int(rng.choice(np.flatnonzero(expected)))
            text += tokenizer.token_bytes(token)
            complete = answer.accept(token)


def test_control_tokens_follow_only_where_a_grammar_names_them(tiny_dir: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_dir)
    name, id = next(iter(tokenizer.special_tokens.items()))
    structures = Structures(tokenizer, tokenizer.vocab_size)
    anything = structures.constraint(("regex", r"(.|\n)*"))
    named = structures.constraint(("grammar", f'start: {name} "x"'))
    special = [i for i in range(tokenizer.vocab_size) if not tokenizer.token_bytes(i)]
    assert anything is not None
    assert named is not None
    assert id in special
    assert not anything.allowed()[special].any()
    assert np.flatnonzero(named.allowed()).tolist() == [id]


REFUSED = [
    ({"regex": "("}, "regex: unclosed group"),
    ({"regex": r"(?=a)b"}, "regex: look-around, .* is not supported"),
    ({"regex": r"(a)\1"}, "regex: backreferences are not supported"),
    ({"regex": r"[^\s\S]"}, "regex: no text matches it"),
    ({"regex": "(" * 30_000 + "a" + ")" * 30_000}, "regex: .*nest"),
    ({"regex": "(a|" * 5000 + "a" + ")" * 5000}, "regex: "),
    ({"json_schema": False}, "json_schema must be a JSON schema, as a dict or as JSON, not False"),
    ({"json_schema": "{"}, r"json_schema must be a JSON schema.*not '\{': Expecting property name"),
    ({"json_schema": {"type": "strin"}}, "json_schema: Invalid type: strin"),
    ({"json_schema": {"not": {"type": "string"}}}, r'json_schema: Unimplemented keys: \["not"\]'),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, r'json_schema: Unimplemented keys: \["uniqueItems"\]'),
    ({"json_schema": {"type": "string", "format": "x"}}, "json_schema: .*format"),
    ({"json_schema": {"$ref": "http://127.0.0.1:9/x"}}, "json_schema: "),
    ({"json_schema": {"$ref": "#"}}, "json_schema: no text matches it"),
    ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 4}}, "json_schema: Unsatisfiable schema"),
    ({"json_schema": '{"items":' * 900 + "{}" + "}" * 900}, "json_schema: recursion limit exceeded"),
    ({"json_schema": '{"items":' * 9000 + "{}" + "}" * 9000}, "json_schema"),
    ({"grammar": "start: ("}, r"grammar: .*Expected token '\)'"),
    ({"grammar": "stat: /a/"}, "grammar: no start rule found"),
    ({"grammar": "start: start"}, "grammar: no text matches it"),
    ({"grammar": "%import /etc/passwd.X\nstart: X"}, "grammar: .*Expected name"),
    ({"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000}, "grammar: .*too deeply nested"),
    ({"grammar": "root ::= x"}, "grammar: Rule 'x' not found"),
    ({"grammar": "root ::= " + "(" * 30_000}, "grammar: "),
]
LINKS = {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(1800)} | {"1800": {}}}
SLOW = [  # rules that refer to each other thousands deep, and a number that takes the library long
    {"grammar": "start: r0\n" + "".join(f"r{i}:r{i + 1}\n" for i in range(5000)) + 'r5000: "x"'},
    {"grammar": "start: R0\n" + "".join(f"R{i}:R{i + 1}\n" for i in range(5000)) + 'R5000: "x"'},
    {"grammar": "root::=r0\n" + "".join(f"r{i}::=r{i + 1}\n" for i in range(3500)) + 'r3500::="x"'},
    {"json_schema": LINKS},
    {"json_schema": {"type": "integer", "multipleOf": 1234567}},
]


@pytest.fixture(scope="module")
def structures(tiny_dir: Path) -> Structures:
    tokenizer = Tokenizer.from_pretrained(tiny_dir)
    made = Structures(tokenizer, tokenizer.vocab_size)
    made.constraint(("regex", "a"))  # the vocabulary is read the first time
    return made


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_structure_that_cannot_be_compiled_is_refused_by_name(
    structures: Structures, settings: dict[str, Any], message: str
) -> None:
    started = cpu_seconds()
    with pytest.raises(RequestError, match=message) as raised:
        structures.constraint(SamplingParams(**settings).structure)
    assert cpu_seconds() - started < 1
    assert len(str(raised.value)) < 400
    assert "state>" not in str(raised.value)


@pytest.mark.parametrize("settings", SLOW, ids=lambda value: str(value)[:30])
def test_one_that_would_end_the_process_is_refused(structures: Structures, settings: dict[str, Any]) -> None:
    started = cpu_seconds()
    with pytest.raises(RequestError, match="takes too much time, memory or stack to compile: make it simpler"):
        structures.constraint(SamplingParams(**settings).structure)
    assert cpu_seconds() - started < 1


def test_the_last_structures_are_kept(structures: Structures) -> None:
    first = structures.constraint(("regex", "kept"))
    assert structures.constraint(("regex", "kept")) is first
    for i in range(MAX_KEPT):
        structures.constraint(("choice", (str(i),)))
    assert structures.constraint(("regex", "kept")) is not first


def test_answers_use_up_a_structure_and_it_is_compiled_anew(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All copies share the states of a lexer: once there are too many, each new answer would fail."""
    tokenizer = Tokenizer.from_pretrained(tiny_dir)
    setting = ("regex", "(a|b)*a(a|b){9}c")
    monkeypatch.setitem(structured.LIMITS, "max_lexer_states", 300)
    structures, rng = Structures(tokenizer, tokenizer.vocab_size), np.random.default_rng(0)
    used = structures.constraint(setting)
    for _ in range(100):
        answer = structures.constraint(setting).copy(())
        with suppress(RequestError):
            for token in rng.choice(tokenizer.encode("ab", add_special_tokens=False), 20):
                answer.accept(int(token))
                answer.allowed()
        assert structures.constraint(setting).copy(()).allowed().any()
    assert structures.constraint(setting) is not used
    monkeypatch.undo()
    structures = Structures(tokenizer, tokenizer.vocab_size)
    first = structures.constraint(("regex", "a"))
    for _ in range(MAX_USES):
        assert structures.constraint(("regex", "a")) is first
    assert structures.constraint(("regex", "a")) is not first


def test_nothing_asked_for_is_no_structure(structures: Structures) -> None:
    assert structures.constraint(None) is None


def test_the_ways_to_write_one_structure() -> None:
    params = SamplingParams(json_schema=SCHEMA)
    assert params == SamplingParams(json_schema=json.dumps(SCHEMA))
    assert json.loads(params.json_schema or "") == SCHEMA
    assert SamplingParams(json_schema=True) == SamplingParams(json_schema={})
    assert SamplingParams(choice=["a", "b"]).choice == ("a", "b")
    assert (
        SamplingParams(json_schema=None, regex=None, grammar=None, choice=None, response_format=None)
        == SamplingParams()
    )
    assert len({SamplingParams(json_schema=SCHEMA), params, SamplingParams(choice=["a"])}) == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "text"}, {}),
        ({"type": "json_object"}, {"json_schema": {"type": "object"}}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}},
            {"json_schema": SCHEMA},
        ),
    ],
    ids=str,
)
def test_openais_response_format(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert SamplingParams(response_format=given) == SamplingParams(**expected)
    assert sampling_params(SamplingParams(top_p=0.5), response_format=given) == SamplingParams(top_p=0.5, **expected)
    assert is_setting("response_format")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regex": "a", "choice": ["a"]}, "regex and choice both say what the answer may be: give one of them"),
        ({"json_schema": True, "grammar": "a"}, "json_schema and grammar both say"),
        (
            {"json_schema": True, "response_format": {"type": "json_object"}},
            "json_schema and response_format are one setting",
        ),
        ({"regex": "a\ud800"}, "regex holds half a surrogate pair"),
        ({"choice": ["b", "a\udc00"]}, "choice holds half a surrogate pair"),
        ({"regex": "a" * 65_537}, "regex has 65,537 characters, at most 65,536 are read"),
        ({"choice": ["a" * 300] * 300}, "choice has 90,000 characters"),
        ({"json_schema": {"const": "a" * 70_000}}, "json_schema has 70,013 characters"),
        ({"json_schema": {"minimum": 10**5000}}, "json_schema must be a JSON schema"),
        ({"json_schema": {"enum": [{1, 2}]}}, "json_schema must be a JSON schema.*set is not JSON serializable"),
        ({"response_format": "json"}, "response_format must be an object with a type, not 'json'"),
        ({"response_format": {}}, "unknown response_format type None; known: text, json_object, json_schema"),
        ({"response_format": {"type": "grammar"}}, "unknown response_format type 'grammar'"),
        ({"response_format": {"type": "json_schema"}}, "response_format must have json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
            "json_schema must be a JSON schema",
        ),
        ({"responseformat": {}}, "unknown setting 'responseformat'; did you mean response_format"),
    ],
    ids=lambda value: short_repr(value)[:30],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**settings)
