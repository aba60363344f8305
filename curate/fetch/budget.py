"""Bytes of memory that may be held at once, given out in the order in which they were asked for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Budget:
    """A number of bytes that the tasks of one event loop share; what asks for more than all of it gets all of it."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, wanted: int) -> AsyncIterator[None]:
        """Hold `wanted` bytes for the length of the block; waits its turn until they are there."""
        amount = min(wanted, self.size)
        await self._take(amount)
        try:
            yield
        finally:
            self.free += amount
            self._serve()

    def has(self, wanted: int) -> bool:
        """Whether `hold` would not wait."""
        return not self._waiting and min(wanted, self.size) <= self.free

    async def _take(self, amount: int) -> None:
        if not self._waiting and amount <= self.free:
            self.free -= amount
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.free += amount  # it was given in the same moment
            else:
                self._waiting.remove((amount, turn))
            self._serve()
            raise

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.free:
            amount, turn = self._waiting.popleft()
            if not turn.cancelled():
                self.free -= amount
                turn.set_result(None)
