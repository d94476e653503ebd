"""Requests through a model: prefill by row, decode by batch. Knows token ids; knows no text but what requests make."""

import math
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from llama_mini.engine.fault import blame
from llama_mini.engine.logprobs import hidden_states, split_logits
from llama_mini.engine.prefix_cache import FEWEST, Prefix, shared, take_over
from llama_mini.engine.request import Request
from llama_mini.engine.sampling import processed, sample
from llama_mini.errors import CapacityError, LlamaMiniError, NumericalError, RequestError
from llama_mini.memory import check_cache_fits
from llama_mini.model.kv_cache import KVCache
from llama_mini.model.llama import Llama

DECODE_BATCH = 16  # rows that decode together


class Runner:
    """Runs one list of requests at a time; what the last one left in the cache serves a prompt that begins alike."""

    def __init__(self, model: Llama, eos_ids: frozenset[int]) -> None:
        self.model = model
        self.eos_ids = eos_ids
        self.kept: Prefix | None = None

    def run(self, requests: list[Request]) -> Generator[Request, None, None]:
        """Runs requests in groups of like length, the longest first; gives each one whenever it has a new chunk."""
        ordered = sorted(requests, key=lambda request: -request.needed)
        groups = [ordered[start : start + DECODE_BATCH] for start in range(0, len(ordered), DECODE_BATCH)]
        for group in groups:
            self._check_fits(group)
        last, self.kept = self.kept, None  # a call that breaks off leaves nothing half written
        for group in groups:
            last = yield from self._run_group(group, requests, last)
        self.kept = last

    def _run_group(
        self, group: list[Request], requests: list[Request], last: Prefix | None
    ) -> Generator[Request, None, Prefix | None]:
        """Prefills each row alone, then steps all rows together; a row that ends leaves the batch.

        Returns what a prompt that begins alike can take over: of one request its row, of many what all of them share.
        """
        single = len(requests) == 1
        cache = self.model.new_cache(len(group), _positions(group))
        active, prefixes = list(group), [] if last is None else [last]
        try:
            for row, request in enumerate(group):
                request.start()
                self._take(request, self._prefill(request, cache.row(row), prefixes))
                prefixes.append(Prefix(request.prompt, cache.row(row)))
                if row == 0 and not single:
                    common = min(shared(request.prompt, other.prompt) for other in requests)
                    last = prefixes[-1].begun(common) if common >= FEWEST and request.failure is None else last
                yield request
            while any(request.finish_reason is None for request in active):
                _drop_finished(active, cache)
                logits = self._decode(active, cache)
                for row, request in enumerate(active):
                    self._take(request, logits[row])
                    yield request
        except GeneratorExit:  # between two steps, where a row is whole
            self.kept = _whole_row(group[0], cache) if single else last
            raise
        return _whole_row(group[0], cache) if single else last

    def _prefill(self, request: Request, cache: KVCache, prefixes: Sequence[Prefix]) -> Tensor:
        """Runs a prompt through an empty row, in chunks; the logits (V,) after its last token."""
        score = request.params.prompt_logprobs  # of every token, so that none comes from the cache
        request.cached_tokens = 0 if score else take_over(request.prompt, prefixes, cache)
        for x in hidden_states(self.model, request.prompt[request.cached_tokens :], cache):
            for logits in split_logits(self.model, x) if score else ():
                request.score_prompt(logits)
        with torch.inference_mode():
            return self.model.logits(x[-1])

    def _decode(self, active: list[Request], cache: KVCache) -> Tensor:
        """One step of every row: the logits (B, V) after each one's newest token."""
        filled = max(cache.lengths)
        if filled == cache.length:
            cache.grow(min(2 * filled, self.model.config.max_seq_len))
        tokens = torch.tensor([[request.token_ids[-1]] for request in active], device=self.model.device)
        with torch.inference_mode():
            return self.model(tokens, cache)[:, -1]

    def _take(self, request: Request, logits: Tensor) -> None:
        """Samples the next token of a row and books it."""
        if not _all_finite(logits):  # argmax and searchsorted would silently answer with some token
            return request.fail(NumericalError(blame(self.model, request.prompt + request.token_ids)))
        try:
            left = processed(logits, request.params, request.prompt, request.token_ids, self.eos_ids)
            token = sample(left, request.params, request.generator)
        except LlamaMiniError as error:
            return request.fail(error)
        except Exception as error:  # of a logits processor, which is anybody's code
            return request.fail(RequestError(f"a logits processor raised {error!r}"))
        return request.accept(token, logits)

    def _check_fits(self, group: list[Request]) -> None:
        """Raises CapacityError, but not before what the last call left has made room."""
        longest, model = max(len(request.prompt) for request in group), self.model
        try:
            check_cache_fits(model.config, len(group), model.dtype, _positions(group), longest, model.device)
        except CapacityError:
            if self.kept is None:
                raise
            self.kept = None
            self._check_fits(group)


def _all_finite(x: Tensor) -> bool:
    """A sum is many times faster than a look at each; only where it is not finite must one look."""
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


def _positions(group: list[Request]) -> int:
    return max(request.needed for request in group)


def _drop_finished(active: list[Request], cache: KVCache) -> None:
    for row in reversed(range(len(active))):
        if active[row].finish_reason is not None:
            cache.drop(row)
            active[row] = active[-1]
            active.pop()


def _whole_row(request: Request, cache: KVCache) -> Prefix | None:
    """All that a single row holds; nothing of one that failed, where a NaN would poison who takes it over."""
    if request.failure is not None:
        return None
    return Prefix([*request.prompt, *request.token_ids][: cache.lengths[0]], cache)
