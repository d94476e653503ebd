"""LLM: prefill by row, decode by batch, stream. It knows text; it knows no terminal."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama_mini.checkpoint.load import load_model, open_tokenizer
from llama_mini.checkpoint.open import open_checkpoint, resolve
from llama_mini.checkpoint.source import Source
from llama_mini.checks import is_whole, shown
from llama_mini.collector import collector_off
from llama_mini.dtypes import as_device, as_dtype
from llama_mini.errors import NumericalError, RequestError
from llama_mini.kv_cache import KVCache
from llama_mini.memory import PREFILL_CHUNK, check_cache_fits
from llama_mini.model import Llama
from llama_mini.optimize import fuser, set_threads
from llama_mini.request import Chunk, Completion, Request
from llama_mini.sampling import SamplingParams, sample
from llama_mini.scoring import token_logprobs

DECODE_BATCH = 16  # rows that decode together
UNKNOWN_NEED = 256  # positions reserved at first for an answer without max_tokens; the cache doubles when they are full

Prompt = str | list[int]


class LLM:
    """A checkpoint, ready to generate. Not thread-safe: one call at a time, a second one raises RequestError.

    Args:
        path: a checkpoint: a directory, a GGUF or safetensors file, a hub name (org/name, org/name@revision), or
            what `open_checkpoint` made of one.
        dtype: `auto` (bfloat16 where the device computes in it, else float32), a name or a torch dtype.
        device: `cpu`, `cuda`, ...
        quantize: None, or `int8` or `int4`: the matrices as codes of so many bits; the head has 8 at least.
        kernels: `auto` builds the fast operators once, about 10 s; `off` uses PyTorch's own.
        threads: None takes the cores that the process may use. It holds for the whole process.

    Raises:
        CheckpointError, ConfigError, TokenizerError, RequestError; CapacityError if it does not fit in memory.
    """

    def __init__(
        self,
        path: str | Path | Source,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        quantize: str | None = None,
        kernels: str = "auto",
        threads: int | None = None,
    ) -> None:
        set_threads(threads)
        started = time.perf_counter()
        device = as_device(device)
        source = path if isinstance(path, Source) else open_checkpoint(resolve(path))
        with collector_off():
            self.tokenizer = open_tokenizer(source)
            fuse = fuser(quantize, kernels)
            self.model = load_model(Llama, source, as_dtype(dtype, device), device, fuse, quantize)
        self.config = self.model.config
        self.load_seconds = time.perf_counter() - started
        self._lock = threading.Lock()

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """Completes raw text or token ids: one prompt or a list of them, always a list back, in order.

        With the fast operators a row of a batch has the bits that it has alone. PyTorch's own differ by the rounding
        of a matrix product: 1e-6 relative in float32, and in bfloat16 now and then the last of its eight bits.
        Raises RequestError before anything runs. A row whose numbers fail ends alone, with `finish_reason="error"`.
        """
        single = isinstance(prompts, str) or (bool(prompts) and all(is_whole(p) for p in prompts))
        batch: list[Any] = [prompts] if single else list(prompts)
        requests = [self._request(prompt, params) for prompt in batch]
        for _ in self._run(requests):
            pass
        return [request.completion for request in requests if request.completion is not None]

    def chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> Completion:
        """The answer to messages, each with `role` and `content`, through the checkpoint's chat template."""
        return self.generate(self.tokenizer.apply_chat_template(messages), params)[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """One chunk a token; their texts joined are what `generate` gives. Raises NumericalError if numbers fail."""
        request = self._request(prompt, params)
        return self._stream(request)

    def score(self, ids: list[int]) -> list[float | None]:
        """Of each token its log-probability after those before it, in nats; None for the first."""
        ids = self._ids(ids, new=0)
        with self._exclusive(), torch.inference_mode():
            cache = self.model.new_cache(1, len(ids))
            scores: list[float | None] = [None]
            for chunk in self._chunks(ids):
                logits = self.model(chunk, cache)[0]
                targets = torch.tensor(ids[len(scores) : len(scores) + len(logits)], device=logits.device)
                scores += token_logprobs(logits[: len(targets)], targets).tolist()
            return scores

    def _stream(self, request: Request) -> Iterator[Chunk]:
        yield from self._run([request])
        if request.error is not None:
            raise NumericalError(request.error)

    def _request(self, prompt: Prompt, params: SamplingParams | None) -> Request:
        params = SamplingParams() if params is None else params
        ids = self._ids(prompt, params.max_tokens or 1)
        room = self.config.max_seq_len - len(ids)
        return Request(ids, params, params.max_tokens or room, self.tokenizer, self.load_seconds)

    def _ids(self, prompt: Prompt, new: int) -> list[int]:
        """A prompt as token ids that the model knows and, with `new` ones, has room for."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not isinstance(ids, list) or not all(is_whole(i) for i in ids):
            raise RequestError(f"a prompt is text or a list of token ids, not {shown(prompt)}")
        if not ids:
            raise RequestError("the prompt is empty: there is no token to start from")
        if outside := [i for i in ids if not 0 <= i < self.config.vocab_size]:
            raise RequestError(f"token id {outside[0]} is outside the vocabulary of {self.config.vocab_size}")
        limit = self.config.max_seq_len
        if len(ids) + new > limit:
            raise RequestError(f"{len(ids)} prompt tokens and {new} new ones exceed the context of {limit}")
        return ids

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):  # waiting could be waiting for itself
            raise RequestError("this LLM is busy: it serves one call at a time, a stream until it is used up or closed")
        try:
            yield
        finally:
            self._lock.release()

    def _run(self, requests: list[Request]) -> Iterator[Chunk]:
        with self._exclusive():
            groups = [requests[start : start + DECODE_BATCH] for start in range(0, len(requests), DECODE_BATCH)]
            dtype, device = self.model.dtype, self.model.device
            for group in groups:
                longest = max(len(request.prompt) for request in group)
                check_cache_fits(self.config, len(group), dtype, _positions(group), longest, device)
            for group in groups:
                yield from self._run_group(group)

    def _run_group(self, group: list[Request]) -> Iterator[Chunk]:
        """Prefills each row alone, then steps all rows together; a row that ends leaves the batch."""
        cache = self.model.new_cache(len(group), _positions(group))
        active = list(group)
        for row, request in enumerate(group):
            request.start()
            yield self._take(request, self._prefill(request, cache.row(row)))
        while True:
            for row in reversed(range(len(active))):
                if active[row].finish_reason is not None:
                    cache.drop(row)
                    active[row] = active[-1]
                    active.pop()
            if not active:
                return
            logits = self._decode(active, cache)
            for row, request in enumerate(active):
                yield self._take(request, logits[row])

    def _prefill(self, request: Request, cache: KVCache) -> Tensor:
        """Runs a prompt through an empty row, in chunks; the logits (V,) after its last token."""
        with torch.inference_mode():
            for chunk in self._chunks(request.prompt):
                x = self.model.hidden(chunk, cache)
            return self.model.logits(x[0, -1])

    def _decode(self, active: list[Request], cache: KVCache) -> Tensor:
        """One step of every row: the logits (B, V) after each one's newest token."""
        filled = max(cache.lengths)
        if filled == cache.length:
            cache.grow(min(2 * filled, self.config.max_seq_len))
        tokens = torch.tensor([[request.token_ids[-1]] for request in active], device=self.model.device)
        with torch.inference_mode():
            return self.model(tokens, cache)[:, -1]

    def _chunks(self, ids: list[int]) -> Iterator[Tensor]:
        return iter(torch.tensor([ids], dtype=torch.int64, device=self.model.device).split(PREFILL_CHUNK, dim=1))

    def _take(self, request: Request, logits: Tensor) -> Chunk:
        """Samples the next token of a row and books it."""
        if not torch.isfinite(logits).all():  # argmax and multinomial would silently answer with some token
            return request.fail(self._blame(request))
        token = sample(logits, request.params, request.generator)
        logprob = float(token_logprobs(logits, torch.tensor(token, device=logits.device)))
        return request.accept(token, logprob)

    def _blame(self, request: Request) -> str:
        """Where the numbers went wrong: the same tokens once more, watching every layer."""
        bad: list[str] = []

        def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _module, _args, y: None if torch.isfinite(y).all() else bad.append(name)

        stages = {"tok_embeddings": self.model.tok_embeddings} | {
            f"layers.{i}": layer for i, layer in enumerate(self.model.layers)
        }
        hooks = [module.register_forward_hook(watch(name)) for name, module in stages.items()]
        ids = request.prompt + request.token_ids
        try:
            cache = self.model.new_cache(1, len(ids))
            with torch.inference_mode():
                for chunk in self._chunks(ids):
                    self.model.hidden(chunk, cache)
        finally:
            for hook in hooks:
                hook.remove()
        where = f"the output of {bad[0]} is the first that does" if bad else "the output of every layer is finite"
        return f"the logits after position {len(ids) - 1} hold NaN or infinity; {where}"


def _positions(group: list[Request]) -> int:
    """What the longest row needs: the prompt and every new token but the last, which is never fed back."""

    def need(request: Request) -> int:
        new = request.max_tokens if request.params.max_tokens is not None else min(request.max_tokens, UNKNOWN_NEED)
        return len(request.prompt) + new - 1

    return max(map(need, group))
