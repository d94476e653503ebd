"""Requests of a program with an event loop: it waits for their chunks without blocking the loop."""

import asyncio
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from llama_mini.engine.request import Chunk, Request
from llama_mini.engine.scheduler import Scheduler


class AsyncCall:
    """Requests that were started, and their chunks. Leaving its `with` cancels those that still run.

    It may be made in any thread, for an event loop: the running one if none is given. Raises as Scheduler.submit does.
    """

    def __init__(
        self, scheduler: Scheduler, requests: Sequence[Request], loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self.requests = list(requests)
        self._loop = loop or asyncio.get_running_loop()
        self._chunks: SimpleQueue[tuple[Request, Chunk]] = SimpleQueue()
        self._ready, self._woken = asyncio.Event(), False
        self._n_open = len(self.requests)
        scheduler.submit(self.requests, self._deliver)

    def _deliver(self, request: Request, chunk: Chunk) -> None:
        self._chunks.put((request, chunk))
        if not self._woken:  # once for all chunks of a step: it takes longer than the rest
            self._woken = True
            self._loop.call_soon_threadsafe(self._ready.set)

    @property
    def n_open(self) -> int:
        """How many requests go on, or have a chunk that was not taken."""
        return self._n_open

    async def next(self) -> list[tuple[Request, Chunk]]:
        """Waits for chunks; all that are there. Raises what a hook of the model raised."""
        await self._ready.wait()
        self._ready.clear()
        self._woken = False  # before the chunks are taken: one that comes now wakes again
        taken = list[tuple[Request, Chunk]]()
        while True:
            try:
                request, chunk = self._chunks.get_nowait()
            except Empty:
                return taken
            if request.crash is not None:
                raise request.crash
            self._n_open -= chunk.finish_reason is not None
            taken.append((request, chunk))

    def __enter__(self) -> "AsyncCall":
        return self

    def __exit__(self, *_: object) -> None:
        for request in self.requests:
            request.cancelled = True
