"""One thread runs the model for the callers of all threads and tasks: their requests join one running batch.

A turn of the thread is a step of all running requests, one new token each, after a part of the prompts that wait. So a
request joins and leaves between two steps, and a long prompt delays the others by one part at a time.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Self

import torch

from llama_mini.engine.request import Chunk, Request
from llama_mini.engine.runner import Runner
from llama_mini.engine.speculative import Proposer
from llama_mini.errors import CapacityError, RequestError
from llama_mini.machine import format_bytes
from llama_mini.memory import sequence_bytes
from llama_mini.model.llama import Llama

Message = Callable[["Scheduler"], None]
EXIT_SECONDS = 10  # that the process waits for a step before it ends


@dataclass(frozen=True)
class Activity:
    """What the engine does at the moment.

    Attributes:
        running: requests in the batch, whose prompts or answers are computed.
        waiting: requests that wait for their turn.
        generated_tokens: of all requests since the engine began.
        cache_usage: share of the cache that running requests use, from 0 to 1; of two kinds of pages, the larger.
    """

    running: int = 0
    waiting: int = 0
    generated_tokens: int = 0
    cache_usage: float = 0.0


class Scheduler:
    """Runs requests on a model. All methods that have no underscore may be called from any thread."""

    def __init__(
        self,
        model: Llama,
        eos_ids: frozenset[int],
        prefix_cache: bool,
        new_proposer: Callable[[], Proposer] | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """kv_dtype: of the cache; None: as the model."""
        self._model, self._kv_dtype = model, kv_dtype or model.dtype
        self._runner_settings = eos_ids, prefix_cache, new_proposer, self._kv_dtype
        self._reset()

    def _reset(self) -> None:
        """The state in which nothing runs. A forked child begins with it: it has not the thread of its parent."""
        self._process, self._lock = os.getpid(), threading.Lock()
        self._inbox: SimpleQueue[Message | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._runner: Runner | None = None
        self._forgotten_tokens = 0  # that earlier runners generated
        self._exclusive: int | None = None  # the thread that has the model for itself

    def submit(self, requests: Sequence[Request], deliver: Callable[[Request, Chunk], None]) -> None:
        """Queues requests. The engine's thread calls `deliver` with each chunk.

        Raises RequestError within `exclusive`; CapacityError if the cache of a request does not fit in memory.
        """
        self._begin()
        n_threads, runner = torch.get_num_threads(), self._get_runner()
        if runner.idle and any(request.least_positions > runner.most_positions for request in requests):
            self.forget()  # there may be more memory by now
            runner = self._get_runner()
        for request in requests:
            request.deliver = deliver
        self._fit(requests, runner)

        def queue(scheduler: Scheduler) -> None:
            if torch.get_num_threads() != n_threads:  # the number of a thread that was there before is not changed
                torch.set_num_threads(n_threads)
            with scheduler._lock:  # no other one may be made meanwhile: its requests would be lost
                scheduler._runner = scheduler._runner or runner
            if scheduler._runner is not runner:  # it was forgotten meanwhile, and there may be less memory by now
                try:
                    scheduler._fit(requests, scheduler._runner)
                except CapacityError as error:
                    for request in requests:
                        request.fail(error)
                    return
            scheduler._runner.waiting.extend(requests)

        self._inbox.put(queue)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Reserves the model for the calling thread, after the step that runs. Meanwhile requests wait."""
        self._begin()
        begun, done = threading.Event(), threading.Event()

        def wait(_: Scheduler) -> None:
            begun.set()
            done.wait()

        self._inbox.put(wait)
        try:
            begun.wait()
            self._exclusive = threading.get_ident()
            yield
        finally:
            if self._exclusive == threading.get_ident():  # else it was interrupted before its turn
                self._exclusive = None
            done.set()

    def forget(self) -> None:
        """Frees the pages that no request uses; all of the cache if nothing runs."""
        with self.exclusive():
            if self._runner is not None:
                self._runner.forget()
                if self._runner.idle:
                    with self._lock:  # else activity() might count its tokens twice
                        self._forgotten_tokens += self._runner.generated_tokens
                        self._runner = None

    def activity(self) -> Activity:
        with self._lock:
            runner, generated = self._runner, self._forgotten_tokens
        if runner is None:
            return Activity(generated_tokens=generated)
        generated += runner.generated_tokens
        running = runner.active
        usage = runner.cache.usage(request.pages for request in running)
        return Activity(len(running), len(runner.waiting), generated, usage)

    def _begin(self) -> None:
        """Starts the thread if there is none."""
        if os.getpid() != self._process:
            self._reset()
        if self._exclusive == threading.get_ident():
            raise RequestError("within exclusive() nothing else of this LLM can run: call it before or after")
        with self._lock:
            if self._thread is None:
                # It holds no reference while it waits, so that it ends with the LLM, or with the process.
                arguments = weakref.ref(self), self._inbox
                self._thread = threading.Thread(target=_serve, args=arguments, name="llama_mini", daemon=True)
                weakref.finalize(self, _end, self._thread, self._inbox)
                self._thread.start()

    def _fit(self, requests: Sequence[Request], runner: Runner) -> None:
        """Raises CapacityError for a request that can never run; a `max_tokens` that nobody gave shrinks."""
        longest = max((request.least_positions for request in requests), default=0)
        if longest > (most := runner.most_positions):
            need = format_bytes(sequence_bytes(self._model.config, longest, self._kv_dtype))
            raise CapacityError(
                f"a prompt with its new tokens has {longest} positions and needs {need} of cache, but only {most} "
                "positions fit in the memory that is available: give a shorter prompt or fewer max_tokens"
            )
        for request in requests:
            request.max_tokens = min(request.max_tokens, most - len(request.prompt) + 1)

    def _get_runner(self) -> Runner:
        with self._lock:
            if self._runner is None:
                self._runner = Runner(self._model, *self._runner_settings)
            return self._runner

    def _turn(self) -> bool:
        return self._runner is not None and self._runner.turn()


class Call:
    """The requests of one caller, and their chunks: the last one of each request, or with `each` all.

    Leaving its `with` cancels the requests.
    """

    def __init__(self, scheduler: Scheduler, each: bool = False) -> None:
        self._scheduler, self._each, self._process = scheduler, each, os.getpid()
        self._chunks: SimpleQueue[tuple[Request, Chunk]] = SimpleQueue()
        self._open: set[Request] = set()

    def submit(self, requests: Sequence[Request]) -> None:
        """Raises as Scheduler.submit does."""
        self._open.update(requests)  # first: Ctrl-C may come between the two
        self._scheduler.submit(requests, self._deliver)

    def _deliver(self, request: Request, chunk: Chunk) -> None:
        if self._each or chunk.finish_reason is not None:
            self._chunks.put((request, chunk))

    @property
    def n_open(self) -> int:
        """How many requests go on, or have a chunk that was not taken."""
        return len(self._open)

    @property
    def has_chunks(self) -> bool:
        return not self._chunks.empty()

    def take(self) -> tuple[Request, Chunk]:
        """Waits for the next chunk. Raises what a hook of the model raised."""
        if os.getpid() != self._process:  # only the parent has the thread that runs it
            raise RequestError("this call began before a fork, and goes on in the parent process alone")
        request, chunk = self._chunks.get()
        if request.crash is not None:
            raise request.crash
        if chunk.finish_reason is not None:
            self._open.discard(request)
        return request, chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for request in self._open:
            request.cancelled = True


def _serve(scheduler_or_none: "weakref.ref[Scheduler]", inbox: "SimpleQueue[Message | None]") -> None:
    """The thread: takes messages, and runs what they ask for until nothing is left."""
    while (message := inbox.get()) is not None and (scheduler := scheduler_or_none()) is not None:
        message(scheduler)
        while True:
            try:
                message = inbox.get_nowait()
            except Empty:
                if not scheduler._turn():
                    break
            else:
                if message is None:
                    return
                message(scheduler)
        del scheduler, message


def _end(thread: threading.Thread, inbox: "SimpleQueue[Message | None]") -> None:
    """Ends the thread: when the LLM is collected, and before the process ends, which must not happen within a step."""
    inbox.put(None)
    if thread is not threading.current_thread():
        thread.join(EXIT_SECONDS)
