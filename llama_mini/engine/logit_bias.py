"""`logit_bias` of SamplingParams: checked once, then immutable."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from llama_mini.errors import RequestError
from llama_mini.validate import as_plain, is_finite, is_token, short_repr

MAX_BIAS = 1e30  # larger than any logit, and the sum of both is finite in float32


class LogitBias(Mapping[int, float]):
    """A checked, immutable copy of `logit_bias`; unlike MappingProxyType it can be hashed, copied and pickled."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        if not isinstance(biases, Mapping):
            raise RequestError(f"logit_bias must be a dict of token id to number, not {short_repr(biases)}")
        biases = {as_plain(token): as_plain(bias) for token, bias in biases.items()}
        for token, bias in biases.items():
            if not is_token(token):
                raise RequestError(f"logit_bias must have token ids, whole numbers from 0 up, not {short_repr(token)}")
            if not _is_bias(bias):
                raise RequestError(
                    f"logit_bias of token {short_repr(token)} must be a number from {-MAX_BIAS:.0e} to "
                    f"{MAX_BIAS:.0e}, or -inf to ban it, not {short_repr(bias)}"
                )
        self._biases = biases

    def __getitem__(self, token: int) -> float:
        return self._biases[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._biases)

    def __len__(self) -> int:
        return len(self._biases)

    def __hash__(self) -> int:
        return hash(frozenset(self._biases.items()))

    def __repr__(self) -> str:
        return repr(self._biases)


def _is_bias(value: Any) -> bool:
    return (is_finite(value) and abs(value) <= MAX_BIAS) or (isinstance(value, float) and value == -math.inf)
