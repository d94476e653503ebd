"""Which tokens keep their own statistic when a norm is frozen: `keep` of edit, ablate and all that freezes norms.

    "none"                   no token
    "first"                  token 0 of each text, which is often massive
    "massive"                tokens whose input to the norm has an RMS above 2.5 times the median; {"massive": 4.0}
    [0, 5], {"ids": [1, 2]}  the tokens at these positions; the tokens with these ids, such as BOS
    ["first", {"ids": [1]}]  several of these

Massive tokens of the texts that are measured are those of the unedited model. In other texts they are found by the same
threshold while the edited model reads.

On the command line: none, first, massive, massive:4, 0,5, ids:1,2, and several as first+ids:1,2.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llama_mini.errors import RequestError
from llama_mini.model.llama import Llama
from llama_mini.validate import as_plain, check_number, check_whole, is_whole, short_repr

TIMES_MEDIAN = 2.5
_KNOWN = "none, first, massive, a list of positions, {'ids': [...]}, {'massive': times the median} or a list of these"


@dataclass(frozen=True)
class Keep:
    """Tokens at these positions, with these ids, or whose RMS is above so many times the median."""

    positions: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    times_median: float | None = None

    def mask(self, rms: Tensor, median: float, tokens: Tensor | None, positions: Tensor) -> Tensor:
        """Which tokens are kept, (B, T) bool, by the RMS (B, T) of their inputs, their ids (B, T) and positions."""
        kept = rms > (math.inf if self.times_median is None else self.times_median * median)
        for values, wanted in ((positions, self.positions), (tokens, self.ids)):
            if wanted and values is not None:
                kept |= torch.isin(values, torch.tensor(wanted, device=rms.device))
        return kept


class Reading:
    """What the model reads at the moment: tokens (B, T), and positions, (1, T) or (B, T).

    is_measured: whether these are the texts that the statistics were measured on.
    """

    tokens: Tensor | None = None
    positions: Tensor
    is_measured = False

    def __init__(self, measured: Tensor) -> None:
        self._measured = measured

    @contextmanager
    def follows(self, model: Llama, tokens: bool) -> Iterator[None]:
        """Follows what the model reads until the block ends; tokens only on demand."""
        with ExitStack() as hooks:
            hooks.enter_context(model.rope.register_forward_pre_hook(self._see_positions))
            if tokens:
                hooks.enter_context(model.tok_embeddings.register_forward_pre_hook(self._see_tokens))
            yield

    def _see_tokens(self, _: nn.Module, args: tuple[Tensor]) -> None:
        (self.tokens,) = args
        self.is_measured = torch.equal(self.tokens, self._measured)

    def _see_positions(self, _: nn.Module, args: tuple[Tensor]) -> None:
        self.positions = args[0]


def as_keep(keep: Any) -> Keep:
    """Parses `keep`. Raises RequestError for a word or value that is unknown."""
    if keep == "none":
        return Keep()
    keep = as_plain(keep)
    parts = [as_plain(part) for part in keep] if isinstance(keep, list | tuple) else [keep]
    positions: list[int] = []
    ids: list[int] = []
    times: list[float] = []
    for part in parts:
        match part:
            case "first":
                positions.append(0)
            case "massive":
                times.append(TIMES_MEDIAN)
            case {"massive": k, **rest} if not rest:
                check_number("massive in keep", k, RequestError, above=0)
                times.append(k)
            case {"ids": several, **rest} if not rest and isinstance(as_plain(several), list | tuple):
                ids += as_plain(several)
            case _ if is_whole(part):
                positions.append(part)
            case _:
                raise RequestError(f"unknown keep {short_repr(part)}; known: {_KNOWN}")
    if not parts or len(times) > 1:
        raise RequestError(f"keep is {short_repr(keep)}: give one of {_KNOWN}, and massive once")
    for name, numbers in (("a position", positions), ("an id", ids)):
        for number in numbers:
            check_whole(f"{name} in keep", number, RequestError, 0)
    return Keep(tuple(positions), tuple(ids), *times)


def keep_words(text: str) -> Any:
    """`keep` as the command line writes it, such as first+ids:1,2. Words that mean nothing stay as they are."""
    parts: list[Any] = []
    for word in text.split("+"):
        name, _, value = word.partition(":")
        if name == "ids":
            parts.append({"ids": [number_or_text(one) for one in value.split(",")]})
        elif name == "massive" and value:
            parts.append({"massive": number_or_text(value)})
        else:
            parts += [number_or_text(one) for one in word.split(",")]
    return parts if len(parts) > 1 or is_whole(parts[0]) else parts[0]


def number_or_text(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
