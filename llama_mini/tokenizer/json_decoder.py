"""How the tokens of a tokenizer.json become text.

The library's decoders see all tokens of a text at once. Here, each token has bytes of its own, since text is streamed.
So a decoder is read for what it means, together with the normalizer and the pre-tokenizer: some files have the decoder
of another kind of vocabulary, or none, with which the library prints `Ġ`, `▁` or `<0x0A>`.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from llama_mini.errors import TokenizerError
from llama_mini.tokenizer.tokenizer_json import BYTE_LETTERS

Step = dict[str, Any]
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_BYTES = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_SPACE_MARKS = {("▁", " "), ("Ġ", " ")}  # replacing these in a byte-level vocabulary changes nothing
_KNOWN = "ByteLevel, ByteFallback, Fuse, Metaspace, a Replace of a string, and a Strip of one space at the start"


def respelled(part: Any) -> Any:
    """A pre-tokenizer or decoder whose Metaspace steps are spelled as the library reads them: older files have only
    `add_prefix_space`."""
    if isinstance(part, list):
        return list(map(respelled, part))
    if not isinstance(part, dict):
        return part
    part = {key: respelled(value) for key, value in part.items()}
    older = part.get("type") == "Metaspace" and part.get("prepend_scheme") is None
    return part | {"prepend_scheme": "never" if part.get("add_prefix_space") is False else "always"} if older else part


def token_reader(spec: dict[str, Any]) -> tuple[Callable[[str], bytes], bool]:
    """The function from a token's content to its bytes, and whether decoding drops a space at the start of a text.

    Raises TokenizerError for a decoder that cannot be applied token by token.
    """
    decoder = _steps(spec.get("decoder"))
    before = [*_steps(spec.get("normalizer")), *_steps(spec.get("pre_tokenizer"))]
    kinds, pairs = {step["type"] for step in (*before, *decoder)}, _replacements(decoder)
    marks = [mark for step in before if (mark := _mark(step))]
    added_space = any(map(_adds_space, before))
    if "ByteLevel" in kinds:
        if unknown := set(pairs) - _SPACE_MARKS:
            raise _unknown({"type": "Replace", "pattern": {"String": unknown.pop()[0]}})
        return _byte_level_bytes, _STRIP in decoder and added_space
    if spec.get("decoder") is None and not marks:
        raise TokenizerError("it has no decoder, and no ByteLevel or Metaspace pre-tokenizer that tells how to decode")
    strips = added_space if spec.get("decoder") is None else any(map(_drops_space, decoder))
    pairs += [(mark, " ") for mark in marks if (mark, " ") not in pairs]
    fallback = spec["model"].get("byte_fallback") or "ByteFallback" in kinds

    def token_bytes(content: str) -> bytes:
        if fallback and BYTE_TOKEN.fullmatch(content):
            return bytes.fromhex(content[3:5])
        for old, new in pairs:
            content = content.replace(old, new)
        return content.encode()

    return token_bytes, strips


def _steps(part: Any) -> list[Step]:
    """The steps of a normalizer, pre-tokenizer or decoder, those of sequences in sequences too."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = next(part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part)
    return [step for one in inner for step in _steps(one)]


def _replacements(decoder: list[Step]) -> list[tuple[str, str]]:
    """What each token's content has replaced, in order. Raises TokenizerError for a step that is not known."""
    pairs, fused = [], False
    for step in decoder:
        kind = step["type"]
        old = step["pattern"].get("String") if kind == "Replace" else None
        if kind == "Metaspace":
            pairs.append((step["replacement"], " "))
        elif old and (len(old) == 1 or not fused):  # after Fuse, two tokens might hold a longer string between them
            pairs.append((old, step["content"]))
        elif kind not in ("ByteLevel", "ByteFallback", "Fuse") and step != _STRIP:
            raise _unknown(step)
        fused = fused or kind == "Fuse"
    return pairs


def _mark(step: Step) -> str | None:
    """The character that a normalizer or pre-tokenizer writes for a space."""
    if step["type"] == "Metaspace":
        return step["replacement"]
    return step["content"] if step["type"] == "Replace" and step["pattern"] == {"String": " "} else None


def _adds_space(step: Step) -> bool:
    """Whether a normalizer or pre-tokenizer puts a space before a text."""
    prefix = step["type"] == "ByteLevel" and step.get("add_prefix_space")  # the normalizer of this name has none
    return bool(prefix) or step["type"] == "Prepend" or _drops_space(step)


def _drops_space(step: Step) -> bool:
    """Whether a step of a decoder drops a space at the start of a text."""
    return step == _STRIP or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")


def _unknown(step: Step) -> TokenizerError:
    shown = json.dumps(step, ensure_ascii=False)[:150]
    return TokenizerError(f"its decoder has the step {shown}, which cannot be applied token by token; known: {_KNOWN}")


def _byte_level_bytes(content: str) -> bytes:
    if all(letter in _BYTES for letter in content):
        return bytes(_BYTES[letter] for letter in content)
    return content.encode()
