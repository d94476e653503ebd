"""Perplexity of texts with a sliding window, and a comparison of two models: KL divergence, agreement, loss."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llama_mini.engine.llm import LLM, Prompt
from llama_mini.engine.logprobs import kl_divergence, predictions, token_logprobs
from llama_mini.engine.prompts import split_prompts, text_or_ids
from llama_mini.errors import NumericalError, RequestError
from llama_mini.memory import check_cache_fits
from llama_mini.validate import as_plain, check_token_ids, check_whole, short_repr

DEFAULT_CONTEXT = 2048  # the usual one for comparing quantised models


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts texts, and the conditions of the measurement.

    Attributes:
        tokens: number of scored tokens.
        nll: their mean negative log-likelihood in nats.
        bits_per_byte: of the text of the scored tokens; NaN if they have no text.
        context: maximum tokens of a window, BOS included.
        stride: tokens from the start of one window to the next.
        bos: the id that was put before each window, or None.
    """

    tokens: int
    nll: float
    bits_per_byte: float
    context: int
    stride: int
    bos: int | None

    @property
    def perplexity(self) -> float:
        return float(np.exp(np.float64(self.nll)))


@dataclass(frozen=True)
class Comparison:
    """A model compared with a reference, on the same windows of the same tokens.

    Attributes:
        model, reference: perplexity of each.
        kl_mean, kl_median, kl_99, kl_max: KL(reference ‖ model) per token in nats; `kl_99` is the 99th percentile.
        top1: share of tokens for which both models have the same likeliest token.
        nll_difference: mean NLL of the model minus that of the reference, in nats.
        nll_error: its standard error if tokens were independent; NaN for a single token.
    """

    model: Perplexity
    reference: Perplexity
    kl_mean: float
    kl_median: float
    kl_99: float
    kl_max: float
    top1: float
    nll_difference: float
    nll_error: float


def perplexity(
    llm: LLM,
    ids: Prompt | Iterable[Prompt],
    context: int | None = None,
    stride: int | None = None,
    bos: int | None = None,
) -> Perplexity:
    """Perplexity of one text or several, as token ids, with the sliding window of transformers' perplexity guide.

    A window starts every `stride` tokens and scores the tokens that no window before it contained, so that none is
    scored twice. The first token of a window is not scored, since nothing predicts it. No window spans two texts.

    Args:
        ids: one text or several, in lists, arrays or tensors.
        context: tokens per window; default: the model's context, at most 2,048.
        stride: with a smaller one each token has more context, and scoring takes longer; default: the whole window.
        bos: an id to put before every window, which counts in `context`; None adds nothing.

    Raises:
        RequestError; CapacityError if a window does not fit in memory; NumericalError for NaN or infinite logits.
    """
    task = _task([llm], ids, context, stride, bos)
    nll = [-_checked(token_logprobs(*pair)) for (pair,) in _scored([llm], task)]
    return _summary(torch.cat(nll), llm, task)


def compare(
    llm: LLM,
    reference: LLM,
    ids: Prompt | Iterable[Prompt],
    context: int | None = None,
    stride: int | None = None,
    bos: int | None = None,
) -> Comparison:
    """Compares two models on the windows of `perplexity`: KL divergence, agreement and difference in loss.

    Raises what `perplexity` raises, and RequestError if the two have different vocabularies.
    """
    _check_same_vocabulary(llm, reference)
    task = _task([llm, reference], ids, context, stride, bos)
    parts: list[tuple[Tensor, ...]] = []
    for (logits, tokens), (expected, _) in _scored([llm, reference], task):
        expected = expected.to(logits.device)
        both = [-_checked(token_logprobs(each, tokens)) for each in (logits, expected)]
        parts.append((*both, kl_divergence(expected, logits), logits.argmax(-1) == expected.argmax(-1)))
    nll, reference_nll, divergence, same = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    kl, difference = divergence.numpy(), (nll.double() - reference_nll.double()).numpy()
    n = len(difference)
    return Comparison(
        model=_summary(nll, llm, task),
        reference=_summary(reference_nll, reference, task),
        kl_mean=float(kl.mean()),
        kl_median=float(np.median(kl)),
        kl_99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1=int(same.sum()) / n,
        nll_difference=float(difference.mean()),
        nll_error=float(difference.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan,
    )


def windows(length: int, context: int, stride: int, first: int) -> Iterator[tuple[int, int, int]]:
    """Yields (begin, end, scored): the window text[begin:end], of which text[scored:end], never empty, is scored.

    first: number of tokens at the start of a window that nothing predicts: 0 with BOS, 1 without.
    """
    done = 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        scored = max(done, begin + first)
        if scored < end:
            yield begin, end, scored
        done = end
        if end == length:
            return


@dataclass(frozen=True)
class _Task:
    """What to score, with the defaults filled in."""

    texts: list[list[int]]
    context: int
    stride: int
    bos: int | None

    def windows(self) -> Iterator[tuple[list[int], int, int, int]]:
        n_text = self.context - len(self.prefix)
        for text in self.texts:
            for window in windows(len(text), n_text, self.stride, 1 - len(self.prefix)):
                yield text, *window

    @property
    def prefix(self) -> list[int]:
        return [] if self.bos is None else [self.bos]


def _task(
    llms: list[LLM], ids: Prompt | Iterable[Prompt], context: int | None, stride: int | None, bos: int | None
) -> _Task:
    context, stride, bos = map(as_plain, (context, stride, bos))
    texts = [_as_ids(text) for text in split_prompts(ids)] or [[]]
    for text in [*texts, [] if bos is None else [bos]]:
        check_token_ids(text, llms[0].config.vocab_size, RequestError)
    least = 2 if bos is None else 1
    if short := [len(text) for text in texts if len(text) < least]:
        raise RequestError(f"the text has {short[0]} tokens; at least {least} are needed to predict one")
    limit = min(llm.config.max_seq_len for llm in llms)
    context = min(limit, DEFAULT_CONTEXT) if context is None else context
    check_whole("context", context, RequestError, 2, limit, ", the model's context")
    n_text = context if bos is None else context - 1
    stride = n_text if stride is None else stride
    why = f", the context of {context}" + ("" if bos is None else " less BOS")
    check_whole("stride", stride, RequestError, 1, n_text, why)
    for llm in llms:
        check_cache_fits(llm.config, 1, llm.model.dtype, context, context, llm.model.device)
    return _Task(texts, context, stride, bos)


def _as_ids(text: object) -> list[int]:
    ids = text_or_ids(text)
    if isinstance(ids, str):
        raise RequestError(f"a text is a list of token ids, not {short_repr(text)}")
    return ids


def _scored(llms: list[LLM], task: _Task) -> Iterator[tuple[tuple[Tensor, Tensor], ...]]:
    """Yields the `predictions` of each model for the scored tokens, in order and in parts."""
    longest = min(task.context, max(map(len, task.texts)) + len(task.prefix))
    total = sum(end - scored for _, _, end, scored in task.windows())
    with ExitStack() as stack:
        for llm in llms:
            stack.enter_context(llm.exclusive())
        caches = [llm.model.new_cache(1, longest) for llm in llms]
        bar = stack.enter_context(tqdm(desc="scoring", total=total, unit="token", delay=1, leave=False, disable=None))
        for text, begin, end, scored in task.windows():
            ids = [*task.prefix, *text[begin:end]]
            first = len(ids) - (end - scored)
            for cache in caches:
                cache.truncate(0, 0)
            parts = [predictions(llm.model, ids, first, cache) for llm, cache in zip(llms, caches, strict=True)]
            for pairs in zip(*parts, strict=True):
                yield pairs
                bar.update(len(pairs[0][1]))


def _checked(logprobs: Tensor) -> Tensor:
    if not torch.isfinite(logprobs).all():
        raise NumericalError("the logits hold NaN or infinity; llm.generate says in which layer they first appear")
    return logprobs


def _summary(nll: Tensor, llm: LLM, task: _Task) -> Perplexity:
    counts = Counter(i for text, _, end, scored in task.windows() for i in text[scored:end])
    n_bytes = sum(n * len(llm.tokenizer.token_bytes(i)) for i, n in counts.items())
    total = float(nll.double().sum())
    bits_per_byte = total / math.log(2) / n_bytes if n_bytes else math.nan
    return Perplexity(len(nll), total / len(nll), bits_per_byte, task.context, task.stride, task.bos)


def _check_same_vocabulary(one: LLM, other: LLM) -> None:
    sizes = [llm.config.vocab_size for llm in (one, other)]
    if sizes[0] != sizes[1]:
        raise RequestError(f"the vocabularies differ, {sizes[0]} tokens and {sizes[1]}: the models cannot be compared")
    for i in range(sizes[0]):
        a, b = (llm.tokenizer.token_bytes(i, False) for llm in (one, other))
        if a != b:
            raise RequestError(
                f"the tokenizers differ: token {i} is {short_repr(a)} and {short_repr(b)}, so they cannot be compared"
            )
