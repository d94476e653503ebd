"""LLM, the public interface: a checkpoint with its tokenizer, ready to generate, chat, stream and score."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint, resolve
from llama_mini.checkpoint.source import Source
from llama_mini.engine.logprobs import predictions, token_logprobs
from llama_mini.engine.request import Chunk, Completion, Request
from llama_mini.engine.runner import Runner
from llama_mini.engine.sampling_params import SamplingParams, check_vocab
from llama_mini.errors import RequestError
from llama_mini.machine import as_device, as_dtype, gc_paused
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser, set_threads
from llama_mini.tokenizer.tokenizer import open_tokenizer
from llama_mini.validate import check_token_ids, is_whole, short_repr

Prompt = str | list[int]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model with its tokenizer. It runs one call at a time: a second call, from any thread, raises RequestError.

    Args:
        path: a checkpoint: a directory, a GGUF or safetensors file, a hub name (org/name, org/name@revision), or the
            result of `open_checkpoint`.
        dtype: `auto` (bfloat16 if the device computes in it, else float32), a name or a torch dtype.
        device: `cpu`, `cuda`, ...
        quantize: `int8` or `int4` quantizes the weight matrices as they are loaded, the head always to int8; None
            quantizes nothing.
        kernels: `auto` compiles the fast operators the first time, about 10 s; `off` uses PyTorch's operators.
        threads: number of threads of the whole process; None: one per core that the process may use.

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
        with gc_paused():
            self.tokenizer = open_tokenizer(source)
            fuse = fuser(quantize, kernels)
            self.model = load_model(Llama, source, as_dtype(dtype, device), device, fuse, quantize)
        self.config = self.model.config
        self.load_seconds = time.perf_counter() - started
        self._lock = threading.Lock()
        self._runner = Runner(self.model, self.tokenizer.eos_ids)

    def generate(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> list[Completion]:
        """Completes prompts, each a text or token ids. Returns one completion for each, in order, always as a list.

        Args:
            prompts: one prompt or a list of them. A prefix that they share, with each other or with the call before, is
                prefilled once.
            params: one for all prompts, or a list with one for each. With n > 1 a prompt has n completions in a row,
                and completion i uses seed + i.

        With the fast operators results have the same bits in a batch as alone, unless a prefix is reused. A prefill in
        two parts rounds differently, and so do PyTorch's operators in a batch: by 1e-6 relative in float32, in bfloat16
        sometimes by the last bit.

        Raises:
            RequestError, CapacityError: before anything runs. A request that fails later, because its logits are not
                finite or its logits processor raises, ends with `finish_reason="error"`; the others go on.
        """
        requests = [r for pair in self._pairs(prompts, params) for r in self._requests(*pair)]
        for _ in self._run(requests):
            pass
        return [request.completion for request in requests if request.completion is not None]

    def completions(self, prompts: Sequence[Prompt], params: Params = None) -> Iterator[tuple[int, Completion]]:
        """Yields the completions of `generate` as they finish, in any order, each with the index of its prompt.

        A refused prompt gets a completion with `finish_reason="error"`; the others run.
        """
        requests = []
        for index, (prompt, sampling) in enumerate(self._pairs(list(prompts), params)):
            try:
                requests += [replace(request, index=index) for request in self._requests(prompt, sampling)]
            except RequestError as error:
                refused = Request([], sampling, 0, self.tokenizer, self.load_seconds)
                refused.fail(error)
                assert refused.completion is not None
                yield index, refused.completion
        for request in self._run(requests):
            if request.completion is not None:
                yield request.index, request.completion

    def chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> Completion:
        """Answers a chat: messages with `role` and `content`, formatted with the checkpoint's chat template."""
        return self.generate(self.tokenizer.apply_chat_template(messages), _for_one_answer(params))[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Chunk, None, None]:
        """Yields a chunk for each token; their texts joined are the text of `generate`. Raises if the request fails."""
        (request,) = self._requests(prompt, _for_one_answer(params))
        return self._stream(request)

    async def astream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[Chunk]:
        """`stream` for asyncio: the model runs in a thread, so that the event loop is not blocked."""
        chunks = self.stream(prompt, params)
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            try:
                while (chunk := await loop.run_in_executor(thread, next, chunks, None)) is not None:
                    yield chunk
            finally:
                await loop.run_in_executor(thread, chunks.close)

    def score(self, ids: list[int]) -> list[float | None]:
        """The log-probability of each token given those before it, in nats; None for the first."""
        ids = self._ids(ids, 0)
        with self.exclusive():
            pairs = predictions(self.model, ids, 1, self.model.new_cache(1, len(ids)))
            return [None, *(value for pair in pairs for value in token_logprobs(*pair).tolist())]

    def forget(self) -> None:
        """Frees the cache that the last call kept for prefix reuse."""
        with self.exclusive():
            self._runner.last_prefix = None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Reserves the model for code that runs `llm.model` itself. Meanwhile other calls raise RequestError."""
        if not self._lock.acquire(blocking=False):  # not waiting: a thread that holds the lock would wait for itself
            raise RequestError("this LLM is busy: it runs one call at a time, and a stream until it ends or is closed")
        try:
            yield
        finally:
            self._lock.release()

    def _stream(self, request: Request) -> Generator[Chunk, None, None]:
        for _ in self._run([request]):
            yield request.chunk
        if request.failure is not None:
            raise request.failure

    def _pairs(self, prompts: Prompt | Sequence[Prompt], params: Params) -> list[tuple[Prompt, SamplingParams]]:
        """Each prompt with its parameters."""
        single = isinstance(prompts, str) or (bool(prompts) and all(is_whole(p) for p in prompts))
        batch: list[Any] = [prompts] if single else list(prompts)
        if params is None or isinstance(params, SamplingParams):
            return [(prompt, params or SamplingParams()) for prompt in batch]
        if len(params) != len(batch):
            raise RequestError(f"there are {len(params)} params for {len(batch)} prompts: give one, or one for each")
        return list(zip(batch, params, strict=True))

    def _requests(self, prompt: Prompt, params: SamplingParams) -> list[Request]:
        """One request for each of the `n` answers."""
        ids = self._ids(prompt, params.max_tokens or 1)
        check_vocab(params, self.config.vocab_size)
        max_tokens = params.max_tokens or self.config.max_seq_len - len(ids)
        each = [
            params if params.seed is None else replace(params, seed=(params.seed + i) % 2**64) for i in range(params.n)
        ]
        return [Request(ids, sampling, max_tokens, self.tokenizer, self.load_seconds) for sampling in each]

    def _ids(self, prompt: Prompt, n_new: int) -> list[int]:
        """A prompt as token ids; raises RequestError unless they and `n_new` more tokens fit in the context."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not isinstance(ids, list) or not all(is_whole(i) for i in ids):
            raise RequestError(f"a prompt is text or a list of token ids, not {short_repr(prompt)}")
        if not ids:
            raise RequestError("the prompt is empty: there is no token to start from")
        check_token_ids(ids, self.config.vocab_size, RequestError)
        limit = self.config.max_seq_len
        if len(ids) + n_new > limit:
            raise RequestError(f"{len(ids)} prompt tokens and {n_new} new ones exceed the context of {limit}")
        return ids

    def _run(self, requests: list[Request]) -> Generator[Request, None, None]:
        with self.exclusive():
            yield from self._runner.run(requests)


def _for_one_answer(params: SamplingParams | None) -> SamplingParams:
    params = SamplingParams() if params is None else params
    if params.n != 1:
        raise RequestError(f"n must be 1 where one answer is returned, not {params.n}: use generate")
    return params
