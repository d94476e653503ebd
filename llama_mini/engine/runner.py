"""Runs requests on a model: each prompt is prefilled alone, then all sequences of a group decode together."""

import math
import operator
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llama_mini.engine.logprobs import hidden_states, split_logits
from llama_mini.engine.prefix_cache import MIN_PREFIX, Prefix, common_prefix_length, reuse_prefix
from llama_mini.engine.request import Request
from llama_mini.engine.sampling import processed, sample
from llama_mini.errors import CapacityError, LlamaMiniError, NumericalError, RequestError
from llama_mini.machine import one_thread
from llama_mini.memory import check_cache_fits
from llama_mini.model.kv_cache import KVCache
from llama_mini.model.llama import Llama

DECODE_BATCH = 16  # sequences that decode together: the fast operators give each the bits it has alone up to this


class Runner:
    """Runs one list of requests at a time, and keeps the part of the cache that the next list may reuse."""

    def __init__(self, model: Llama, eos_ids: frozenset[int]) -> None:
        self.model = model
        self.eos_ids = eos_ids
        self.last_prefix: Prefix | None = None
        self._state = _state(model)  # when it was computed

    def run(self, requests: list[Request]) -> Generator[Request, None, None]:
        """Runs the requests in groups of similar length, the longest first; yields each one at every new chunk."""
        ordered = sorted(requests, key=lambda request: -request.positions)
        groups = [ordered[start : start + DECODE_BATCH] for start in range(0, len(ordered), DECODE_BATCH)]
        for group in groups:
            longest = max(len(request.prompt) for request in group)
            self.check_fits(len(group), max(request.positions for request in group), longest)
        # The first and the last in alphabetical order differ no later than any other two.
        prompts = [request.prompt for request in requests]
        n_common = common_prefix_length(min(prompts), max(prompts)) if len(requests) > 1 else 0
        last, self.last_prefix = self.last_prefix, None  # after an exception nothing half-written is reused
        before, self._state = self._state, _state(self.model)
        if not _same(before, self._state):
            last = None  # the model has been edited since
        for group in groups:
            last = yield from self._run_group(group, last, n_common, single=len(requests) == 1)
        self.last_prefix = last

    def _run_group(
        self, group: list[Request], last: Prefix | None, n_common: int, single: bool
    ) -> Generator[Request, None, Prefix | None]:
        """Prefills each prompt alone, then decodes all sequences together; one that ends leaves the batch.

        n_common: number of tokens with which all prompts of the call begin.
        Returns the prefix for later prompts: the whole sequence of a single request, or what all prompts share.
        """
        cache = self.model.new_cache(len(group), max(request.positions for request in group))
        active, prefixes = list(group), [] if last is None else [last]
        try:
            for row, request in enumerate(group):
                request.start()
                self._sample(request, self._prefill(request, cache.row(row), prefixes))
                prefixes.append(Prefix(request.prompt, cache.row(row)))
                if row == 0 and n_common >= MIN_PREFIX and request.failure is None:
                    last = Prefix(request.prompt[:n_common], cache.row(row).copy(n_common))
                yield request
            while any(request.finish_reason is None for request in active):
                _remove_finished(active, cache)
                logits = self._decode(active, cache)
                for row, request in enumerate(active):
                    self._sample(request, logits[row])
                    yield request
        except GeneratorExit:  # the caller stops between two steps, where the cache is complete
            self.last_prefix = _whole_sequence(group[0], cache) if single else last
            raise
        return _whole_sequence(group[0], cache) if single else last

    def _prefill(self, request: Request, cache: KVCache, prefixes: Sequence[Prefix]) -> Tensor:
        """Runs a prompt through an empty cache of one row; returns the logits (V,) after its last token."""
        score = request.params.prompt_logprobs  # which need the logits of every token, so no prefix is reused
        request.cached_tokens = 0 if score else reuse_prefix(request.prompt, prefixes, cache)
        for x in hidden_states(self.model, request.prompt[request.cached_tokens :], cache):
            for logits in split_logits(self.model, x) if score else ():
                request.score_prompt(logits)
        with torch.inference_mode():
            return self.model.logits(x[-1])

    def _decode(self, active: list[Request], cache: KVCache) -> Tensor:
        """One step of every sequence: the logits (B, V) after the newest token of each."""
        filled = max(cache.lengths)
        if filled == cache.length:
            cache.grow(min(2 * filled, self.model.config.max_seq_len))
        tokens = torch.tensor([[request.token_ids[-1]] for request in active], device=self.model.device)
        with torch.inference_mode():
            return self.model(tokens, cache)[:, -1]

    @one_thread()
    def _sample(self, request: Request, logits: Tensor) -> None:
        """Appends the next token of a sequence, sampled from logits (V,), or ends it with an error."""
        if not _all_finite(logits):  # sampling would silently return some token
            return request.fail(NumericalError(non_finite_message(self.model, request.prompt + request.token_ids)))
        try:
            final = processed(logits, request.params, request.prompt, request.token_ids, self.eos_ids)
            token = sample(final, request.params, request.generator)
        except LlamaMiniError as error:
            return request.fail(error)
        except Exception as error:  # a logits processor is the user's code and may raise anything
            return request.fail(RequestError(f"a logits processor raised {error!r}"))
        return request.append_token(token, logits)

    def check_fits(self, rows: int, positions: int, longest: int) -> None:
        """Raises CapacityError if a cache does not fit even after the last prefix is freed.

        longest: tokens of the longest prompt.
        """
        model = self.model
        try:
            check_cache_fits(model.config, rows, model.dtype, positions, longest, model.device)
        except CapacityError:
            if self.last_prefix is None:
                raise
            self.last_prefix = None
            self.check_fits(rows, positions, longest)


def _state(model: Llama) -> tuple[list[object], list[int]]:
    """What computes the outputs: modules, their hooks and tensors, and PyTorch's counts of the tensors' changes."""
    modules: list[nn.Module] = [model]
    hooks: list[object] = []
    tensors: list[Tensor | None] = []
    for module in modules:  # which grows meanwhile: three times faster than `modules()` and `parameters()`
        modules += [child for child in module._modules.values() if child is not None]
        hooks += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        tensors += [*module._parameters.values(), *module._buffers.values()]
    versions = [0 if x is None or x.is_inference() else x._version for x in tensors]
    return [*modules, *hooks, *tensors], versions


def _same(a: tuple[list[object], list[int]], b: tuple[list[object], list[int]]) -> bool:
    return a[1] == b[1] and len(a[0]) == len(b[0]) and all(map(operator.is_, a[0], b[0]))


def first_nonfinite(model: Llama, outputs: Iterable[Tensor]) -> str | None:
    """Where NaN or infinity begins: the innermost module that returns it, and the first token; None if none does.

    outputs: runs the model when it is iterated, on the next tokens each time: (..., T, C).
    """
    found: list[str] = []
    n_before = 0

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(_module: nn.Module, _args: Any, y: Any) -> None:
            if not found and isinstance(y, Tensor) and len(bad := (~y.isfinite()).flatten(2).any(-1).nonzero()):
                row, token = bad[0].tolist()
                of_row = f" of row {row}" if len(y) > 1 else ""
                found.append(f"{path or 'the logits'}, token {n_before + token}{of_row}")

        return see

    # An empty slot is left out: the module before it in the forward pass says more.
    modules = [(path, module) for path, module in model.named_modules() if not isinstance(module, nn.Identity)]
    hooks = [module.register_forward_hook(watch(path)) for path, module in modules]
    try:
        for y in outputs:
            if found:
                return found[0]
            n_before += y.shape[-2]
    finally:
        for hook in hooks:
            hook.remove()
    return None


def non_finite_message(model: Llama, ids: list[int]) -> str:
    """What is wrong with the logits after these tokens."""
    first = first_nonfinite(model, hidden_states(model, ids, model.new_cache(1, len(ids))))
    where = "the output of every layer is finite" if first is None else f"it is first at {first}"
    return f"the logits after position {len(ids) - 1} hold NaN or infinity; {where}"


def _all_finite(x: Tensor) -> bool:
    """Checks the sum first, which is many times faster. Each element is checked only if the sum is not finite."""
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


def _remove_finished(active: list[Request], cache: KVCache) -> None:
    for row in reversed(range(len(active))):
        if active[row].finish_reason is not None:
            cache.swap_remove(row)
            active[row] = active[-1]
            active.pop()


def _whole_sequence(request: Request, cache: KVCache) -> Prefix | None:
    """Prompt and answer of a single request; None if it failed, since a NaN would spread to whoever reuses it."""
    if request.failure is not None:
        return None
    return Prefix([*request.prompt, *request.token_ids][: cache.lengths[0]], cache)
