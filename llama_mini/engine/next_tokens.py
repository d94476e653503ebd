"""From the logits of a step to the next tokens of its requests, of which each may fail by itself."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from llama_mini.engine.finite import non_finite_message
from llama_mini.engine.request import Request
from llama_mini.engine.sampling import processed, sample
from llama_mini.errors import LlamaMiniError, NumericalError, RequestError
from llama_mini.machine import one_thread
from llama_mini.model.kv_cache import KVCache
from llama_mini.model.llama import Llama
from llama_mini.optimize.fused_step import FusedStep


@torch.inference_mode()
def step(model: Llama, fused: FusedStep, tokens: list[list[int]], cache: KVCache) -> tuple[Tensor, list[int]]:
    """The next tokens (N, 1) of a cache's rows -> logits (N, V), and the `likeliest_tokens`."""
    inputs = torch.tensor(tokens, device=model.device)
    if (found := fused(inputs, cache)) is not None:
        return found[0], found[1].tolist()
    logits = model.logits(model.hidden(inputs, cache))[:, -1]
    return logits, likeliest_tokens(logits)


@one_thread()
def likeliest_tokens(logits: Tensor) -> list[int]:
    """The likeliest token of each row of logits (N, V), the lowest id of equals; -1 where they are not all finite."""
    finite = logits.sum(1).isfinite()
    if not finite.all():
        finite |= logits.isfinite().all(1)  # a sum may overflow
    best = logits.numpy(force=True).argmax(1).tolist()  # 20 times faster than PyTorch's
    return [token if fine else -1 for token, fine in zip(best, finite.tolist(), strict=True)]


@one_thread()
def append_tokens(
    model: Llama,
    eos_ids: Collection[int],
    requests: Sequence[Request],
    logits: Tensor,
    likeliest: Sequence[int],
    guesses: Mapping[Request, list[int]] = {},
) -> int:
    """Appends the next token of each request, or ends it with an error. Returns the number of tokens.

    logits: (N, V), of the last token of each request, then of its guesses. A guess that equals the token sampled was an
        input of this step: the request has one token more, from the logits after it.
    likeliest: the token of each of them, as `likeliest_tokens` gives it.
    """
    first = n_tokens = 0
    for request in requests:
        guess = guesses.get(request, [])
        for i, expected in enumerate([*guess, None], first):
            try:
                if (token := likeliest[i]) < 0:  # sampling would silently return some token
                    raise NumericalError(non_finite_message(model, request.prompt + request.token_ids))
                if request.params.temperature or request.params.changes_logits:
                    token = _choose(request, logits[i], eos_ids)
            except LlamaMiniError as error:
                request.fail(error)
                break
            request.append_token(token, logits[i])
            n_tokens += 1
            if request.finish_reason is not None or token != expected:
                break
            request.filled += 1
            request.accepted_tokens += 1
        first += len(guess) + 1
    return n_tokens


def _choose(request: Request, logits: Tensor, eos_ids: Collection[int]) -> int:
    try:
        prompt, new = request.prompt, request.token_ids
        final = processed(logits, request.params, prompt, new, eos_ids, request.constraint)
        return sample(final, request.params, request.generator)
    except LlamaMiniError:
        raise
    except Exception as error:  # a logits processor is the user's code and may raise anything
        raise RequestError(f"a logits processor raised {error!r}") from error
