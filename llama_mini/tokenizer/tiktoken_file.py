"""LLaMA 3's tokenizer.model, encoded by tiktoken. Each line has a token in base64 and its rank.

The split pattern, the 256 special tokens and the length guards are those of Meta's llama-models (llama3/tokenizer.py).
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import tiktoken

from llama_mini.tokenizer.backend import AddedTokens, Piece, encode_each, native_failures_as
from llama_mini.tokenizer.config_files import AddedToken

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_CHARS = 400_000  # tiktoken panics on much more at once
MAX_RUN = 25_000  # characters in a row, all white space or none: tiktoken's merging is quadratic within a word
N_SPECIAL = 256
LLAMA_3_SPECIAL = (  # LLaMA 3.1's names; in 3.0, the fifth, sixth, ninth and last two have reserved names
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
)
# The dialogue of Meta's llama3/chat_format.py, contents not stripped. That code encodes a content separately from the
# line breaks before it: if the content begins with another, the ids here differ, but the text is the same.
LLAMA_3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})\s*\Z")


class RankedTokens:
    """Tokens that are bytes, each with a rank, which tiktoken encodes; and control tokens. A text begins with BOS."""

    strips_space = False

    def __init__(
        self,
        pattern: str,
        ranks: dict[bytes, int],
        first_id: int,
        control_ids: Mapping[str, int],
        names: Mapping[str, str],
    ) -> None:
        """first_id: the id of rank 0; names: the bos_token and eos_token. Raises ValueError if tiktoken does."""
        self.control_ids = control_ids
        self.special_ids = frozenset(control_ids.values())
        self.added = AddedTokens(AddedToken(content=content, special=True) for content in control_ids)
        self.vocab_size = len(ranks) + len(control_ids)
        self.names = names
        self.eos_ids = frozenset({control_ids[names["eos_token"]]})
        self.frame: tuple[list[int], list[int]] = ([control_ids[names["bos_token"]]], [])
        self._first_id = first_id
        self._bytes = {first_id + rank: token for token, rank in ranks.items()}
        self._bytes |= {id: content.encode() for content, id in control_ids.items()}
        with native_failures_as(ValueError, "tiktoken"):
            self._encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        return encode_each(pieces, self._encode_text)

    def _encode_text(self, text: str) -> list[int]:
        ranks = chain.from_iterable(map(self._encoding.encode_ordinary, bounded_parts(text)))
        return [self._first_id + rank for rank in ranks]

    def token_id(self, content: str) -> int | None:
        return self.control_ids.get(content)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]


class TiktokenFile(RankedTokens):
    """A LLaMA 3 vocabulary. Its ranks are the ids; the special tokens follow."""

    def __init__(self, data: bytes) -> None:
        """Raises ValueError if `data` is not such a file."""
        ranks = _read_ranks(data)
        reserved = (f"<|reserved_special_token_{2 + i}|>" for i in range(N_SPECIAL - len(LLAMA_3_SPECIAL)))
        special = {content: len(ranks) + i for i, content in enumerate([*LLAMA_3_SPECIAL, *reserved])}
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        super().__init__(LLAMA_3_WORDS, ranks, 0, special, names)
        self.eos_ids = frozenset(special[f"<|{name}|>"] for name in ("end_of_text", "eom_id", "eot_id"))


def bounded_parts(text: str) -> Iterator[str]:
    """Cuts a text where Meta's tokenizer does, so the ids are the same: only in very long texts and runs."""
    # Match only at the start of a run: tried at each character, runs just under the limit take quadratic time.
    long_run = re.compile(rf"(?<!\s)\s{{{MAX_RUN + 1},}}|(?<!\S)\S{{{MAX_RUN + 1},}}")
    for start in range(0, len(text), MAX_CHARS):
        chunk = text[start : start + MAX_CHARS]
        cuts = [cut for run in long_run.finditer(chunk) for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN)]
        for begin, end in zip([0, *cuts], [*cuts, len(chunk)], strict=True):
            yield chunk[begin:end]


def _read_ranks(data: bytes) -> dict[bytes, int]:
    """Token bytes -> rank, in the order of the ranks."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        match = _LINE.match(line)
        if match is None:
            raise ValueError(f"line {number} is not a base64 token and its rank")
        if int(match[2]) != len(ranks):
            raise ValueError(f"line {number} has rank {int(match[2])}, expected {len(ranks)}")
        token = base64.b64decode(match[1], validate=True)
        if token in ranks:
            raise ValueError(f"line {number} repeats the token of rank {ranks[token]}")
        ranks[token] = len(ranks)
    check_bytes(ranks)
    return ranks


def check_bytes(ranks: Mapping[bytes, int]) -> None:
    """Raises ValueError if a text could hold a byte that is not a token."""
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{len(missing)} of the 256 single bytes are not tokens")
