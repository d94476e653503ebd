"""Guesses of a draft model: a smaller one with the same vocabulary."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F

from llama_mini.engine.next_tokens import step
from llama_mini.engine.pages import PAGE, PagedCache, PagedTokens, SequencePages, pages_of
from llama_mini.engine.request import Request
from llama_mini.engine.sampling import processed, sample
from llama_mini.engine.speculative import MOST_TOKENS, SMOOTHING, StepTimes
from llama_mini.errors import RequestError
from llama_mini.machine import one_thread
from llama_mini.memory import fitting_positions, window_positions
from llama_mini.model.llama import Llama
from llama_mini.optimize.fused_step import FusedStep
from llama_mini.tokenizer import Tokenizer


@dataclass
class _DraftRow:
    """What the draft model knows of a request.

    pages: of its cache, which holds its first `filled` tokens, guesses included.
    guess: what was guessed after its first `at` tokens.
    rate: the share of guesses that were accepted lately.
    """

    pages: list[SequencePages]
    filled: int = 0
    guess: list[int] = field(default_factory=list)
    at: int = 0
    rate: float = 0.6


class DraftProposer:
    """Guesses of a smaller model. It samples with the same random numbers, so both mostly choose the same token."""

    prefilled = 256  # tokens of a prompt that it reads before a step
    retry = 32  # steps after which it guesses again where it did not pay

    def __init__(self, model: Llama, vocab_size: int) -> None:
        self.times = StepTimes()
        self._model, self._vocab_size, self._fused_step = model, vocab_size, FusedStep(model)
        config, self._rows = model.config, dict[Request, _DraftRow]()
        n, context = MOST_TOKENS // 2, pages_of(config.max_seq_len) * PAGE
        windowed = n * window_positions(config)
        fitting = fitting_positions(config, 8 * n * context, model.dtype, model.device, None, 8 * windowed)
        self._cache = PagedCache(model, fitting // 8, windowed)
        self._seconds = 0.0  # of a step of the draft, as measured
        self._skipped = 0

    def propose(self, limits: Mapping[Request, int]) -> dict[Request, list[int]]:
        for request in [request for request in self._rows if request not in limits]:
            self._forget(request)
        for request, row in self._rows.items():
            _compare(request, row)
        if not (most := self._most(limits)):
            return {}
        inputs: dict[Request, list[int]] = {}
        for request, limit in limits.items():
            row = self._rows.setdefault(request, _DraftRow(self._cache.sequence()))
            if limit > 0 and self._make_room(request, row, most):
                missing = self._prefill(request, row)
                if len(missing) <= MOST_TOKENS:
                    inputs[request] = missing
        return self._guess(inputs, limits, most) if inputs else {}

    def _most(self, limits: Mapping[Request, int]) -> int:
        """How many guesses of each request bring the most tokens a second."""
        step, each = self.times.fit()
        rates = [self._rows[request].rate if request in self._rows else _DraftRow.rate for request in limits]
        best, fastest, expected = 0, len(limits) / (step + each * len(limits)), float(len(limits))
        for n in range(1, MOST_TOKENS // len(limits)):
            expected += sum(rate**n for rate in rates)
            speed = expected / (step + each * len(limits) * (n + 1) + n * self._seconds)
            if speed > fastest:
                best, fastest = n, speed
        self._skipped = 0 if best else self._skipped + 1
        tries = self._skipped and not self._skipped % self.retry and 2 * len(limits) <= MOST_TOKENS
        return 1 if tries else best

    def _prefill(self, request: Request, row: _DraftRow) -> list[int]:
        """Reads a part of the prompt. Returns the tokens of the request that the draft has not read yet."""
        n_prompt = len(request.prompt)
        missing = [*request.prompt[row.filled :], *request.token_ids[max(0, row.filled - n_prompt) :]]
        if len(missing) <= MOST_TOKENS:
            return missing
        part = missing[: min(self.prefilled, len(missing) - 1)]
        positions = [range(row.filled, row.filled + len(part))]
        with torch.inference_mode():
            self._model.hidden(
                torch.tensor([part], device=self._model.device), PagedTokens(self._cache, [row.pages], positions)
            )
        row.filled += len(part)
        return missing[len(part) :]

    def _guess(
        self, inputs: dict[Request, list[int]], limits: Mapping[Request, int], most: int
    ) -> dict[Request, list[int]]:
        generators = {r: r.generator.clone_state() for r in inputs if r.params.temperature}
        constraints = {r: r.constraint.copy() for r in inputs if r.constraint is not None}
        rows = {request: self._rows[request] for request in inputs}
        for request, row in rows.items():
            row.at, row.guess = row.filled + len(inputs[request]), []
        for _ in range(most):
            started = time.monotonic()
            tokens = [[token] for each in inputs.values() for token in each]
            positions = [[rows[r].filled + i] for r, each in inputs.items() for i in range(len(each))]
            pages = [rows[r].pages for r, each in inputs.items() for _ in each]
            logits, _ = step(self._model, self._fused_step, tokens, PagedTokens(self._cache, pages, positions))
            logits = logits[[end - 1 for end in accumulate(map(len, inputs.values()))]]
            logits = F.pad(logits, (0, self._vocab_size - logits.shape[1]), value=-torch.inf).nan_to_num()
            with one_thread():
                for one, (request, each) in zip(logits, inputs.items(), strict=True):
                    row, params = rows[request], request.params
                    if params.changes_logits and not params.logits_processors:  # which may keep count of their calls
                        new, eos_ids = [*request.token_ids, *row.guess], request.tokenizer.eos_ids
                        with suppress(RequestError):  # which the request raises if it comes that far
                            one = processed(one, params, request.prompt, new, eos_ids, constraints.get(request))
                    token = sample(one, params, generators.get(request, request.generator))
                    if request in constraints and constraints[request].accept(token):
                        del constraints[request]  # the answer is complete
                    row.filled += len(each)
                    row.guess.append(token)
                    inputs[request] = [token]
            seconds = time.monotonic() - started
            self._seconds += SMOOTHING * (seconds - self._seconds) if self._seconds else seconds
        return {request: row.guess[: limits[request]] for request, row in rows.items()}

    def _make_room(self, request: Request, row: _DraftRow, most: int) -> bool:
        positions = len(request.prompt) + len(request.token_ids) + most
        if positions > self._model.config.max_seq_len:
            return False
        end = pages_of(min(positions, row.filled + self.prefilled + 2 * MOST_TOKENS))  # as many as it may run now
        for pages in row.pages:
            pages.slide(row.filled)
            pages.grow(end)
        return all(pages.end >= end for pages in row.pages)

    def _forget(self, request: Request) -> None:
        for pages in self._rows.pop(request).pages:
            pages.clear()


def _compare(request: Request, row: _DraftRow) -> None:
    """Sees which guesses were right. The cache of the draft holds the tokens of the others no more."""
    new = request.token_ids[row.at - len(request.prompt) :]
    hits = [guess == token for guess, token in zip(row.guess, new, strict=False)]
    n_right = hits.index(False) if False in hits else len(hits)
    for hit in hits[: n_right + 1]:
        row.rate += SMOOTHING * (hit - row.rate)
    if hits:  # the newest token has not run
        row.filled = min(row.filled, row.at + min(n_right, len(new) - 1))
    row.guess = []


def check_draft(tokenizer: Tokenizer, draft: Tokenizer) -> None:
    """Raises RequestError for a draft model whose tokens are others."""
    for id in range(min(tokenizer.vocab_size, draft.vocab_size)):
        ours, theirs = tokenizer.token_bytes(id, False), draft.token_bytes(id, False)
        if ours != theirs:
            raise RequestError(
                f"the draft model has another vocabulary: its token {id} is {theirs!r}, the model's is {ours!r}; "
                "give a smaller model of the same family"
            )
