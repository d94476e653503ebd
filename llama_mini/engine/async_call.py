"""Requests of a program with an event loop: it waits for their chunks without blocking the loop."""

import asyncio
from collections.abc import Sequence

from llama_mini.engine.request import Chunk, Request
from llama_mini.engine.scheduler import Call, Scheduler


class AsyncCall(Call):
    """Requests that were started, and all their chunks.

    It may be made in any thread, for an event loop: the running one if none is given. Raises as Scheduler.submit does.
    """

    def __init__(
        self, scheduler: Scheduler, requests: Sequence[Request], loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(scheduler, each=True)
        self.requests = list(requests)
        self._loop = loop or asyncio.get_running_loop()
        self._ready, self._woken = asyncio.Event(), False
        self.submit(self.requests)

    def _deliver(self, request: Request, chunk: Chunk) -> None:
        super()._deliver(request, chunk)
        if not self._woken:  # once for all chunks of a step: it takes longer than the rest
            self._woken = True
            self._loop.call_soon_threadsafe(self._ready.set)

    async def next(self) -> list[tuple[Request, Chunk]]:
        """Waits for chunks; all that are there. Raises what a hook of the model raised."""
        await self._ready.wait()
        self._ready.clear()
        self._woken = False  # before the chunks are taken: one that comes now wakes again
        taken = list[tuple[Request, Chunk]]()
        while self.has_chunks:
            taken.append(self.take())
        return taken
