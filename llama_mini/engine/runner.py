"""Continuous batching: prefill of prompts in parts, steps of all running requests, and their pages of the cache."""

import time
from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llama_mini.engine.logprobs import split_logits
from llama_mini.engine.next_tokens import append_tokens, likeliest_tokens, step
from llama_mini.engine.pages import PAGE, PagedCache, PagedTokens, pages_of
from llama_mini.engine.prefix_cache import PrefixCache
from llama_mini.engine.request import Request
from llama_mini.engine.speculative import Proposer
from llama_mini.errors import NumericalError
from llama_mini.memory import PREFILL_CHUNK, cache_bytes, fitting_positions, window_positions
from llama_mini.model.llama import Llama
from llama_mini.optimize.fused_step import FusedStep

MAX_ROWS = 32  # requests that run at a time; beyond 16, more of them gain little speed
PREFILL_SECONDS = 0.1  # that running requests wait for the prompts of others, between two of their tokens
LEAST_PREFILL = 32  # tokens; fewer are hardly faster
REPLAYED = 16  # tokens that a request which was preempted runs in one step


class Runner:
    """The requests that wait and run, and the cache. It knows nothing of threads: one thread at a time uses it."""

    def __init__(
        self,
        model: Llama,
        eos_ids: frozenset[int],
        keeps_prefixes: bool,
        new_proposer: Callable[[], Proposer] | None,
        kv_dtype: torch.dtype,
    ) -> None:
        self.waiting: deque[Request] = deque()
        self.generated_tokens = 0
        self._model, self._eos_ids = model, eos_ids
        self._prefilling: Request | None = None
        self._running: list[Request] = []  # the newest last
        self._token_seconds = PREFILL_SECONDS / LEAST_PREFILL  # of prefill, as measured
        self._proposer = None if new_proposer is None else new_proposer()
        self._fused_step = FusedStep(model)
        config, context = model.config, pages_of(model.config.max_seq_len)
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        kept = max(MAX_ROWS, context, weights // cache_bytes(config, PAGE, kv_dtype)) if keeps_prefixes else 0
        most, windowed = MAX_ROWS * context * PAGE, MAX_ROWS * window_positions(config) + kept * PAGE
        positions = fitting_positions(config, most, model.dtype, model.device, kv_dtype, windowed)
        self.cache = PagedCache(model, positions, windowed, kv_dtype)
        self._prefixes = PrefixCache(self.cache.kinds, kept) if keeps_prefixes else None

    @property
    def most_positions(self) -> int:
        """Positions that one request can have."""
        return min(kind.most_positions for kind in self.cache.kinds)

    @property
    def active(self) -> list[Request]:
        """The requests in the batch: the one whose prompt is prefilled, and those that have tokens."""
        return [request for request in (self._prefilling, *self._running) if request is not None]

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.active)

    def forget(self) -> None:
        """Frees the pages that no request uses."""
        self._end_cancelled()
        if self._prefixes is not None:
            self._prefixes.clear()

    def turn(self) -> bool:
        """Runs a part of the prompts, and a step; False if there is nothing to do."""
        self._end_cancelled()
        if self.idle:
            return False
        try:
            self._prefill()
            if self._running:
                self._step()
        except BaseException as error:  # of a hook, or of PyTorch: those that run get it, and the thread goes on
            for request in self.active:
                request.end(error)
                self._release(request)
        return True

    def _end_cancelled(self) -> None:
        for request in [request for request in self.active if request.cancelled]:
            request.end()
            self._release(request)
        for request in [request for request in self.waiting if request.cancelled]:
            self.waiting.remove(request)
            request.end()

    # --- prompts

    def _prefill(self) -> None:
        n, budget = 0, self._budget()
        while n < budget - 1 and (self._prefilling or self._admit()):
            n += self._prefill_part(budget - n)
            budget = min(budget, self._budget())

    def _budget(self) -> int:
        """How many tokens of prompts may run before the next step."""
        if not self._running:
            return PREFILL_CHUNK
        return min(max(int(PREFILL_SECONDS / self._token_seconds), LEAST_PREFILL), PREFILL_CHUNK)

    def _admit(self) -> bool:
        """Begins the next prompt; False if none waits or there is no room for it."""
        if not self.waiting or len(self._running) == MAX_ROWS:
            return False
        request, prefixes = self.waiting[0], self._prefixes
        length = len(request.prompt) + len(request.token_ids)
        for i, kind in enumerate(self.cache.kinds):
            n_unused = 0 if prefixes is None else prefixes.n_unused(i)
            if self._running and kind.needed(length + 1) > len(kind.free) + n_unused:
                return False
        self._prefilling = self.waiting.popleft()
        request.pages = self.cache.sequence()
        request.start()
        if prefixes is None:
            return True
        prefixes.check(self._model)
        if request.params.prompt_logprobs and not request.token_ids:  # they need the logits of every token
            return True
        request.filled = prefixes.take_over(request.prompt, request.params.cache_salt, request.pages)
        if not request.token_ids:
            request.cached_tokens = request.filled
        return True

    def _prefill_part(self, most: int) -> int:
        """Runs the next tokens of the prompt that is prefilled; returns their number.

        Never one token by itself: it would be rounded as decoding rounds.
        """
        request = self._prefilling
        assert request is not None
        left = len(request.prompt) - request.filled
        n = left if left <= most + 1 else most
        if not self._make_room(request, request.filled + n):
            return n
        started, at = time.monotonic(), request.filled
        tokens = torch.tensor([request.prompt[at : at + n]], device=self._model.device)
        with torch.inference_mode():
            x = self._model.hidden(tokens, PagedTokens(self.cache, [request.pages], [range(at, at + n)]))[0]
        request.filled += n
        if request.params.prompt_logprobs and not request.token_ids:
            for logits in split_logits(self._model, x):
                request.score_prompt(logits)
        if n == left:
            self._prefilling = None
            self._begin_decoding(request, x[-1])
        if n >= LEAST_PREFILL:
            self._token_seconds += 0.25 * ((time.monotonic() - started) / n - self._token_seconds)
        return n

    def _begin_decoding(self, request: Request, x: Tensor) -> None:
        """Samples the first token of a request whose prompt is prefilled, and of the others with the same prompt.

        x: the hidden state (C,) of the prompt's last token.
        """
        self._running.append(request)
        if request.token_ids:
            return  # it was preempted
        requests = [request, *self._join_same_prompt(request)]
        with torch.inference_mode():
            logits = self._model.logits(x)
        if self._prefixes is not None and logits.isfinite().all():
            self._prefixes.insert(request.prompt, request.pages, request.params.cache_salt)
        self._sample(requests, logits.expand(len(requests), -1), likeliest_tokens(logits[None]) * len(requests))

    def _join_same_prompt(self, request: Request) -> list[Request]:
        """The next requests that wait, as far as they are other answers to the same prompt, and there is room."""
        joined: list[Request] = []
        waiting, kinds, length = self.waiting, self.cache.kinds, len(request.prompt)
        while waiting and waiting[0].prompt is request.prompt and not waiting[0].params.prompt_logprobs:
            if waiting[0].token_ids or len(self._running) == MAX_ROWS or any(len(kind.free) < 2 for kind in kinds):
                break
            other = waiting.popleft()
            other.start()
            other.pages = [pages.fork(length) for pages in request.pages]
            other.filled = other.cached_tokens = length
            self._running.append(other)
            joined.append(other)
        return joined

    # --- steps

    def _step(self) -> None:
        """Runs the next input of each running request, and samples its next token."""
        inputs: dict[Request, list[int]] = {}
        for request in list(self._running):  # of which some may be preempted meanwhile, the newest first
            each = request.new_inputs[:REPLAYED]
            if request in self._running and self._make_room(request, request.filled + len(each)):
                inputs[request] = each
        if not inputs:
            return
        guesses = self._add_guesses(inputs)
        tokens = [[token] for each in inputs.values() for token in each]
        positions = [[r.filled + i] for r, each in inputs.items() for i in range(len(each))]
        rows = [r.pages for r, each in inputs.items() for _ in each]
        started = time.monotonic()
        cache = PagedTokens(self.cache, rows, positions)
        logits, likeliest = step(self._model, self._fused_step, tokens, cache)
        wanted, sampled, at = list[int](), list[Request](), 0
        for request, each in inputs.items():
            n = len(each) - len(guesses.get(request, ()))
            request.filled += n
            if not request.new_inputs:
                wanted += range(at + n - 1, at + len(each))
                sampled.append(request)
            at += len(each)
        if not sampled:
            return
        if self._proposer is not None:
            self._proposer.times.add(len(tokens), time.monotonic() - started)
        if len(wanted) < len(likeliest):  # a request that was preempted runs its earlier tokens again
            logits, likeliest = logits[wanted], [likeliest[i] for i in wanted]
        self._sample(sampled, logits, likeliest, guesses)

    def _add_guesses(self, inputs: dict[Request, list[int]]) -> dict[Request, list[int]]:
        """Appends guesses of the tokens that follow, where there are any, and returns them."""
        if self._proposer is None or any(len(each) > 1 for each in inputs.values()):  # one was preempted
            return {}
        limits = {r: min(r.pages[0].end * PAGE - r.filled, r.max_tokens - len(r.token_ids)) - 1 for r in inputs}
        guesses = self._proposer.propose(limits)
        for request, guess in guesses.items():
            inputs[request] += guess
            request.proposed_tokens += len(guess)
        return guesses

    def _sample(
        self, requests: list[Request], logits: Tensor, likeliest: list[int], guesses: Mapping[Request, list[int]] = {}
    ) -> None:
        self.generated_tokens += append_tokens(self._model, self._eos_ids, requests, logits, likeliest, guesses)
        for request in requests:
            if request.finish_reason is not None:
                self._release(request)

    # --- pages

    def _make_room(self, request: Request, positions: int) -> bool:
        """Gives a request the pages for so many positions. False if there are none: it is preempted.

        First those that no token sees any more are given back. If there are too few, prefixes of earlier prompts are
        dropped, then the newest request is preempted: it runs again later.
        """
        for kind, pages in enumerate(request.pages):
            pages.slide(request.filled)
            pages.grow(pages_of(positions))
            while pages.end < pages_of(positions):
                if self._prefixes is None or not self._prefixes.evict(kind):
                    newest = self._prefilling or self._running[-1]
                    self._give_back(newest)
                    newest.preempt()
                    self.waiting.appendleft(newest)
                    if newest is request:
                        return False
                pages.grow(pages_of(positions))
        return True

    def _release(self, request: Request) -> None:
        """Takes a finished request out of the batch."""
        if isinstance(request.failure, NumericalError):  # others share the pages of a prompt that another error ends
            first = len(request.prompt) if len(request.token_ids) else request.cached_tokens
            for pages in request.pages:
                pages.zero(first)
        self._give_back(request)

    def _give_back(self, request: Request) -> None:
        if request is self._prefilling:
            self._prefilling = None
        else:
            self._running.remove(request)
        for pages in request.pages:
            pages.clear()
        request.pages = []
        if self._prefixes is not None:
            self._prefixes.trim()
