"""Speculation: guesses of a request's next tokens, which one step verifies, and how many of them pay.

Reading the weights takes most of a step, so several tokens of one request take little longer than one. The last token
runs together with guesses of those that follow it. Then tokens are sampled one by one, and the guesses hold as long as
they equal them. So each token has the logits and the random numbers that it has without guesses: the text is the same,
sampled or greedy. Rejection sampling (Leviathan et al., 2023) would keep the distribution, but not the text.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from llama_mini.engine.request import Request

MOST_TOKENS = 16  # of a step with guesses; with as many requests, nothing is guessed
SMOOTHING = 0.1  # weight of the newest value in a moving average


class StepTimes:
    """How long a step takes, by its number of tokens: a straight line fitted to the latest steps."""

    decay = 0.98  # of the weights of earlier steps, at each new one: some 50 steps count
    overhead = 6.0  # of a step, in times of a token: assumed until steps of few and of many tokens were measured

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of weights, tokens, seconds, tokens², tokens · seconds

    def add(self, n: int, seconds: float) -> None:
        step, each = self.fit()
        if self._sums[0]:  # a step that other processes held up says little
            seconds = min(seconds, 2 * (step + each * n))
        new = 1, n, seconds, n * n, n * seconds
        self._sums = [self.decay * old + x for old, x in zip(self._sums, new, strict=True)]

    def fit(self) -> tuple[float, float]:
        """Seconds of a step by itself, and of each of its tokens. Before the first step only their ratio counts."""
        if not (weight := self._sums[0]):
            return self.overhead, 1.0
        n, seconds, squares, products = (total / weight for total in self._sums[1:])
        usual = seconds / (self.overhead + n)
        slope = (products - n * seconds + 0.05 * usual) / (squares - n * n + 0.05)
        slope = max(slope, usual / 4)
        return seconds - slope * n, slope


class Proposer(Protocol):
    """Guesses the next tokens of running requests. The engine adds the times of its steps to `times`."""

    times: StepTimes

    def propose(self, limits: Mapping[Request, int]) -> dict[Request, list[int]]:
        """Guesses for the next step of all running requests: of each at most as many as its limit."""


class PromptLookup:
    """Guesses that a text goes on as it did after the same tokens the last time. A long text takes no longer."""

    sizes = (3, 2, 1)  # of the n-grams that are looked up; the longest that is found counts
    # Share of guesses that is accepted after so many equal tokens, at first: of summaries, edits, code, chats.
    initial_rates = (0.0, 0.25, 0.4, 0.55, 0.65, 0.75, 0.75, 0.9)

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = list(prompt)
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest successor is
        for size in self.sizes:
            ngrams = zip(*(prompt[i:] for i in range(size)), strict=False)
            self._after.update(zip(ngrams, range(size, len(prompt)), strict=False))
        self._rates = list(self.initial_rates)
        self._next = self._equal = 0  # where the guess begins, after so many tokens that equal the last ones
        self._find()

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens of the answer, and sees whether they were guessed."""
        known = self._tokens
        for token in tokens:
            if self._equal:
                hit, i = known[self._next] == token, min(self._equal, len(self._rates) - 1)
                self._rates[i] += SMOOTHING * (hit - self._rates[i])
                self._next, self._equal = (self._next + 1, self._equal + 1) if hit else (0, 0)
            for size in self.sizes:
                self._after[tuple(known[-size:])] = len(known)
            known.append(token)
            if not self._equal:
                self._find()

    def __len__(self) -> int:
        return len(self._tokens)

    def token(self, i: int) -> int:
        """The i-th token of the guess, from 0. At the end of the text it begins again."""
        return self._tokens[self._next + i % (len(self._tokens) - self._next)]

    def rate(self, i: int) -> float:
        """How likely that token is accepted, if those before it are; 0 without a guess."""
        return self._rates[min(self._equal + i, len(self._rates) - 1)] if self._equal else 0.0

    def _find(self) -> None:
        for size in self.sizes:
            if (at := self._after.get(tuple(self._tokens[-size:]))) is not None:
                self._next, self._equal = at, size
                return


class LookupProposer:
    """Guesses by prompt lookup (Saxena, 2023), as many as pay."""

    def __init__(self) -> None:
        self.times = StepTimes()
        self._lookups: dict[Request, PromptLookup] = {}

    def propose(self, limits: Mapping[Request, int]) -> dict[Request, list[int]]:
        """A guess pays if it brings more tokens, on average, than the rest of the step does in the same time."""
        self._lookups = {request: lookup for request, lookup in self._lookups.items() if request in limits}
        if len(limits) >= MOST_TOKENS:
            return {}
        chances: dict[Request, float] = {}  # that all guesses, and the next one, are right
        for request, limit in limits.items():
            if (lookup := self._lookups.get(request)) is None:
                lookup = self._lookups[request] = PromptLookup(request.prompt)
            lookup.extend(request.token_ids[len(lookup) - len(request.prompt) :])
            if limit > 0:
                chances[request] = lookup.rate(0)
        found: dict[Request, list[int]] = {}
        step, each = self.times.fit()
        n, expected = len(limits), float(len(limits))
        while chances and n < MOST_TOKENS:
            request = max(chances, key=lambda request: chances[request])
            chance, lookup = chances[request], self._lookups[request]
            if chance * (step + each * n) <= expected * each:
                break
            guess = found.setdefault(request, [])
            guess.append(lookup.token(len(guess)))
            n, expected = n + 1, expected + chance
            chances[request] *= lookup.rate(len(guess))
            if len(guess) == limits[request]:
                del chances[request]
        return found
