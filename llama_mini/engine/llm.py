"""LLM, the public interface: a checkpoint with its tokenizer, ready to generate, chat, stream and score."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import Adapters, open_checkpoint, resolve
from llama_mini.checkpoint.source import Source
from llama_mini.checkpoint.weight_formats import check_quantize, quantize_for
from llama_mini.engine.async_call import AsyncCall
from llama_mini.engine.draft import DraftProposer, check_draft
from llama_mini.engine.finite import non_finite_message
from llama_mini.engine.prompts import is_messages, one_prompt, params_argument, token_ids, with_params
from llama_mini.engine.request import Chunk, Completion, Request
from llama_mini.engine.runner import MAX_ROWS
from llama_mini.engine.sampling_params import SamplingParams, check_vocab, is_setting, sampling_params
from llama_mini.engine.scheduler import Activity, Call, Scheduler
from llama_mini.engine.speculative import LookupProposer, Proposer
from llama_mini.engine.structured import Structures
from llama_mini.errors import NumericalError, RequestError
from llama_mini.machine import as_device, as_dtype, gc_paused
from llama_mini.memory import cache_dtype
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser, load_kernels, runs_kernels, set_threads
from llama_mini.tokenizer.tokenizer import open_tokenizer
from llama_mini.validate import as_plain, check_choice, check_flag

Prompt = str | Sequence[int] | torch.Tensor | np.ndarray[Any, Any]
Params = SamplingParams | Mapping[str, Any]

TAKEN_AT_ONCE = 16  # prompts that `completions` takes before it runs them
MOST_AT_ONCE = MAX_ROWS + 8  # of its requests that are not answered yet: as many as run, and the next ones


class LLM:
    """A model with its tokenizer. Calls from several threads and tasks run together, in one batch.

    Args:
        model: a checkpoint: a directory, a GGUF or safetensors file, a hub name (org/name, org/name@revision), or the
            result of `open_checkpoint`.
        dtype: `auto` (bfloat16 if the device computes in it, else float32), a name or a torch dtype.
        device: `cpu`, `cuda`, ...
        quantize: `auto` (or None) keeps the bits that a file has: quantised matrices stay codes of four to eight bits,
            on the CPU and unless a dtype is given. `none` makes all of them floats. `int8` and `int4` quantise the
            matrices as they are loaded; beside int4 the head has 8 bits.
        kernels: `auto` compiles the fast operators the first time, 20 to 100 s; `off` uses PyTorch's operators.
        threads: number of threads of the whole process; None keeps what OMP_NUM_THREADS, MKL_NUM_THREADS or
            torch.set_num_threads has set, and else takes one per core that the process may use.
        adapter: a LoRA adapter of PEFT or mlx-lm that is merged into the model: a directory or a hub name; several in a
            list, or with their weights in a mapping, {"org/a": 1, "org/b": 0.5}. (A directory that holds an adapter
            alone may also be the `model`: it names its model.)
        prefix_cache: keeps the keys and values of prompts, so that others that begin alike are prefilled from there on.
        draft: a many times smaller model with the same vocabulary, which guesses the next tokens; a checkpoint.
        kv_dtype: `auto` keeps keys and values in the model's dtype; `int8` in codes of 8 bits, half of bfloat16.
        speculation: `auto` guesses tokens where that pays, which changes no text: by the draft model, or with the fast
            operators by what followed the same tokens earlier in the prompt and the answer. `off` guesses nothing.

    Raises:
        CheckpointError, ConfigError, TokenizerError, RequestError; CapacityError if it does not fit in memory.
    """

    def __init__(
        self,
        model: str | Path | Source,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        quantize: str | None = "auto",
        kernels: str = "auto",
        threads: int | None = None,
        adapter: Adapters | None = None,
        prefix_cache: bool = True,
        draft: str | Path | None = None,
        speculation: str = "auto",
        kv_dtype: str = "auto",
    ) -> None:
        if not isinstance(model, str | Path | Source):
            expected = "model must be a path or a hub name, org/name"
            raise RequestError(f"{expected}, not a {type(model).__name__}; save_pretrained writes a model to a path")
        if isinstance(model, Source) and adapter:
            raise RequestError("an opened checkpoint takes no adapter: give it to open_checkpoint")
        check_flag("prefix_cache", prefix_cache, RequestError)
        check_choice("speculation", speculation, ("auto", "off"), RequestError)
        of_cache = cache_dtype(kv_dtype)
        if draft is not None and speculation == "off":
            raise RequestError("a draft model is for speculation, which is off: leave one of them out")
        check_quantize(quantize)  # before the checkpoint is opened or fetched
        set_threads(as_plain(threads))
        started = time.perf_counter()
        device = as_device(device)
        source = model if isinstance(model, Source) else open_checkpoint(resolve(model), adapter=adapter)
        with gc_paused():
            self.tokenizer = open_tokenizer(source)
            self.quantize = quantize_for(source, quantize, dtype, device)
            held_in = as_dtype(dtype, device, load_kernels(kernels))
            self.model = load_model(Llama, source, held_in, device, fuser(kernels), self.quantize)
        self.config = self.model.config
        proposer: Callable[[], Proposer] | None = None
        if draft is not None:
            smaller = LLM(draft, dtype, device, quantize, kernels, threads, speculation="off")
            check_draft(self.tokenizer, smaller.tokenizer)
            proposer = partial(DraftProposer, smaller.model, self.config.vocab_size)
        elif speculation == "auto" and runs_kernels(self.model):
            proposer = LookupProposer
        self.load_seconds = time.perf_counter() - started
        self._scheduler = Scheduler(self.model, self.tokenizer.eos_ids, prefix_cache, proposer, of_cache)
        self.structures = Structures(self.tokenizer, self.config.vocab_size)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt] | None = None,
        params: Params | Iterable[Params] | None = None,
        **settings: Any,
    ) -> list[Completion]:
        """Completes prompts, each a text or token ids. Returns one completion for each, in order, always as a list.

        Args:
            prompts: one prompt or any number of them; ids in a list, an array or a tensor. A prefix that they share,
                with each other or with the call before, is prefilled once.
            params: one for all prompts, or one for each. With n > 1 a prompt has n completions in a row, and completion
                i uses seed + i.
            settings: fields of SamplingParams, or other names for them (`max_new_tokens`), which win over `params`.

        With the fast operators results have the same bits in a batch as alone, and with a reused prefix as without.
        PyTorch's operators round otherwise in a batch: by 1e-6 relative in float32, in bfloat16 sometimes by the last
        bit.

        Raises:
            RequestError, CapacityError: before anything runs. A request that fails later, because its logits are not
                finite or its logits processor raises, ends with `finish_reason="error"`; the others go on.
        """
        requests = [r for pair in with_params(prompts, params, settings) for r in self._requests(*pair)]
        longest_first = sorted(requests, key=lambda request: -request.positions)  # so that few rows are idle at the end
        self._run(longest_first)
        return [request.completion for request in requests if request.completion is not None]

    def completions(
        self, prompts: Prompt | Iterable[Prompt], params: Params | Iterable[Params] | None = None, **settings: Any
    ) -> Iterator[tuple[int, Completion]]:
        """Yields the completions of `generate` as they finish, in any order, each with the index of its prompt.

        Prompts, and params for each, are taken when they are needed, so that a generator of them may be endless. A
        refused prompt gets a completion with `finish_reason="error"`; the others run.
        """
        pairs, n_prompts = enumerate(with_params(prompts, params, settings)), length_hint(prompts)
        with Call(self._scheduler) as call:
            began = ended = False
            while not ended:
                n = min(TAKEN_AT_ONCE, MOST_AT_ONCE - call.n_open)
                taken, requests = list(islice(pairs, n)), list[Request]()
                for index, pair in taken:
                    try:
                        requests += self._requests(*pair, index)
                    except RequestError as error:
                        refused = Request([], SamplingParams(), 1, self.tokenizer, self.load_seconds)
                        refused.fail(error)
                        assert refused.completion is not None
                        yield index, refused.completion
                ended = len(taken) < n
                requests.sort(key=lambda request: request.max_tokens + len(request.prompt) / 20)  # as long as they take
                done = list[Request]()
                n_new = sum(r.max_tokens for r in requests) * max(1, n_prompts / n)  # of all prompts, about
                if not began and requests and 50 * requests[0].max_tokens <= n_new:
                    call.submit(requests[:1])  # alone: its answer comes at once, and the others hardly later
                    requests, done = requests[1:], [call.take()[0]]
                began = began or bool(requests or done)
                call.submit(requests)
                while done or call.has_chunks or call.n_open >= (1 if ended else MOST_AT_ONCE):
                    request = done.pop() if done else call.take()[0]
                    assert request.completion is not None
                    yield request.index, request.completion

    def chat(self, messages: Sequence[Mapping[str, Any]], params: Params | None = None, **settings: Any) -> Completion:
        """Answers a chat: messages with `role` and `content`, formatted with the checkpoint's chat template.

        settings: fields of SamplingParams, which win over `params`; all others are variables of the chat template, such
            as `tools` and `enable_thinking`.
        """
        request = self._one_request(messages, params, settings, chat=True)
        self._run([request])
        assert request.completion is not None
        return request.completion

    def stream(
        self, prompt: Prompt | Sequence[Mapping[str, Any]], params: Params | None = None, **settings: Any
    ) -> Generator[Chunk, None, None]:
        """Yields a chunk for each token; their texts joined are the text of `generate`. Raises if the request fails.

        prompt: as for `generate`, or messages as for `chat`. settings: as there.
        """
        return self._stream(self._one_request(prompt, params, settings, chat=is_messages(prompt)))

    async def astream(
        self, prompt: Prompt | Sequence[Mapping[str, Any]], params: Params | None = None, **settings: Any
    ) -> AsyncIterator[Chunk]:
        """`stream` for asyncio: the event loop is not blocked."""
        request = self._one_request(prompt, params, settings, chat=is_messages(prompt))
        with AsyncCall(self._scheduler, [request]) as call:
            while call.n_open:
                for _, chunk in await call.next():
                    yield chunk
        request.raise_failure()

    def submit(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: Params | Iterable[Params] | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
        **settings: Any,
    ) -> AsyncCall:
        """Starts the answers of `generate` for an event loop, which awaits their chunks; `n` for each prompt, in order.

        May be called from any thread, if the loop is given. Raises as `generate` does, before anything runs.
        """
        pairs = enumerate(with_params(prompts, params, settings))
        requests = [request for index, pair in pairs for request in self._requests(*pair, index)]
        return AsyncCall(self._scheduler, requests, loop)

    def score(self, ids: Prompt) -> list[float | None]:
        """The log-probability of each token given those before it, in nats; None for the first.

        Raises RequestError for what `generate` refuses as a prompt; CapacityError if the cache does not fit in memory;
        NumericalError for NaN or infinite logits.
        """
        ids = token_ids(one_prompt(ids), 0, self.tokenizer, self.config)
        params = SamplingParams(max_tokens=1, prompt_logprobs=True)
        request = Request(ids, params, 1, self.tokenizer, self.load_seconds)
        self._run([request])
        scores = request.prompt_logprobs
        if bad := [n for n, score in enumerate(scores) if score is not None and not math.isfinite(score)]:
            with self.exclusive():
                raise NumericalError(non_finite_message(self.model, ids[: bad[0]]))
        return scores

    def activity(self) -> Activity:
        """How many requests run and wait, how many tokens were generated, how full the cache is."""
        return self._scheduler.activity()

    def forget(self) -> None:
        """Frees the cache that is kept for prefix reuse, and all of the cache if nothing runs."""
        self._scheduler.forget()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an LLM holds a lock and is not copied or pickled: make one in each process, or pass llm.model")

    def exclusive(self) -> AbstractContextManager[None]:
        """Reserves the model for code that runs `llm.model` itself, after the step that runs; other calls wait.

        Raises RequestError within itself, as all calls of the same thread do: they would wait for their own caller.
        """
        return self._scheduler.exclusive()

    def _stream(self, request: Request) -> Generator[Chunk, None, None]:
        with Call(self._scheduler, each=True) as call:
            call.submit([request])
            while call.n_open:
                yield call.take()[1]
        request.raise_failure()

    def _run(self, requests: list[Request]) -> None:
        with Call(self._scheduler) as call:
            call.submit(requests)
            while call.n_open:
                call.take()

    def _one_request(self, prompt: Any, params: Params | None, settings: dict[str, Any], chat: bool) -> Request:
        """The request for one answer, to one prompt or to the messages of a chat."""
        params = params_argument(params, settings)
        variables = {name: settings.pop(name) for name in list(settings) if chat and not is_setting(name)}
        sampling = sampling_params(params, **settings)
        if sampling.n != 1:
            raise RequestError(f"n must be 1 where one answer is returned, not {sampling.n}: use generate")
        ids = self.tokenizer.apply_chat_template(prompt, **variables) if chat else one_prompt(prompt)
        (request,) = self._requests(ids, sampling)
        return request

    def _requests(self, prompt: Any, params: SamplingParams | RequestError, index: int = 0) -> list[Request]:
        """One request for each of the `n` answers."""
        if isinstance(params, RequestError):
            raise params
        ids = token_ids(prompt, params.max_tokens or max(params.min_tokens, 1), self.tokenizer, self.config)
        check_vocab(params, self.config.vocab_size)
        constraint = self.structures.constraint(params.structure)
        max_tokens = params.max_tokens or self.config.max_seq_len - len(ids)
        each = [
            params if params.seed is None else replace(params, seed=(params.seed + i) % 2**64) for i in range(params.n)
        ]
        shared = (max_tokens, self.tokenizer, self.load_seconds, index, constraint)
        return [Request(ids, sampling, *shared) for sampling in each]
