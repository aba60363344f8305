"""Which request may go next: the errands of all shards at work, in queues by host.

A host whose turn has not come costs nothing: its errands lie in its queue, and the host in a heap, by the time at which
asking again is worth it. Of the hosts that may be asked each gives one errand in turn, those of the oldest shard first.
So no slow host holds up the others, however many errands it has.

A redirect comes back as an errand for its new host; a failure that may pass waits until every errand of its shard has
had its first try, and at least as long as the back-off says.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from yarl import URL


class Turns(Protocol):
    """What of `hosts.Hosts` the frontier needs."""

    def ask(self, host: str) -> float:
        """0.0, or the seconds after which to ask again."""

    def done(self, host: str) -> None:
        """Give the turn back."""

    def is_slowed(self, host: str) -> bool:
        """Whether the host itself asked for less."""


@dataclass(slots=True, eq=False)
class Errand:
    """One URL on its way to a body.

    Attributes:
        shard: number of its shard; lower ones go first.
        rows: the candidates with this URL.
        target: what to ask for next.
        hops: redirects that may still be followed.
        left_s: seconds left for all its hops.
        tries: how often it failed.
        outages: how often it failed for an outage, which is no try.
        queued: when it was last put into the queue, in monotonic seconds.
        had_its_try: whether its first try is over.
    """

    shard: int
    rows: list[dict[str, Any]]
    target: URL
    hops: int
    left_s: float
    tries: int = 0
    outages: int = 0
    queued: float = 0.0
    had_its_try: bool = False

    @property
    def host(self) -> str:
        """Whose turn it must be."""
        return self.target.raw_host or ""


@dataclass(slots=True)
class _Shard:
    untried: int = 0
    retries: list[tuple[float, Errand]] = field(default_factory=list)


class Frontier:
    """The queues.

    Args:
        turns: whose turn it is.
        max_wait_s: longest time that an errand waits for a host that asked for less than the configuration allows.
        on_throttled: called with an errand that waited longer.
    """

    def __init__(self, turns: Turns, max_wait_s: float, on_throttled: Callable[[Errand], None]) -> None:
        self._turns, self._max_wait_s, self._on_throttled = turns, max_wait_s, on_throttled
        self._queues: dict[str, deque[Errand]] = {}
        self._ready: dict[int, deque[str]] = {}
        self._asleep: dict[str, float] = {}
        self._alarms: list[tuple[float, str]] = []
        self._later: list[tuple[float, int, Errand]] = []
        self._shards: dict[int, _Shard] = {}
        self._numbers = count()
        self._changed = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        """Whether no errand could go now or soon, but for retries that wait out their back-off."""
        return not self._queues

    def targets(self) -> list[URL]:
        """What would be asked next, of each host."""
        return [queue[0].target for queue in self._queues.values()]

    def has(self, host: str) -> bool:
        """Whether errands of a host are in its queue."""
        return host in self._queues

    def add_shard(self, shard: int, errands: list[Errand]) -> None:
        """Take the errands of a new shard."""
        self._shards[shard] = _Shard(len(errands))
        for errand in errands:
            self.add(errand)

    def end_shard(self, shard: int) -> None:
        """Forget a shard none of whose errands is left."""
        del self._shards[shard]

    def add(self, errand: Errand) -> None:
        """Put an errand into the queue of its host."""
        errand.queued = time.monotonic()
        queue = self._queues.get(errand.host)
        if queue is None:
            self._queues[errand.host] = deque((errand,))
            self._make_ready(errand.host)
        else:
            queue.append(errand)
        self._changed.set()

    def tried(self, errand: Errand) -> None:
        """Note that an errand has had its first try; after the last one of its shard the retries come."""
        if errand.had_its_try:
            return
        errand.had_its_try = True
        at_work = self._shards[errand.shard]
        at_work.untried -= 1
        if not at_work.untried:
            for ready_at, retry in at_work.retries:
                self._add_later(ready_at, retry)
            at_work.retries.clear()

    def add_retry(self, errand: Errand, wait_s: float) -> None:
        """Put an errand back, for after the first tries of its shard and not before `wait_s` seconds are over."""
        ready_at = time.monotonic() + wait_s
        if self._shards[errand.shard].untried:
            self._shards[errand.shard].retries.append((ready_at, errand))
        else:
            self._add_later(ready_at, errand)

    def done(self, host: str) -> None:
        """Give a host's turn back."""
        self._turns.done(host)
        if host in self._asleep and self._asleep[host] <= time.monotonic() + 1.0:
            del self._asleep[host]  # it waited for a turn such as this one; its alarm finds nothing
            self._make_ready(host)
            self._changed.set()

    async def next(self) -> Errand:
        """The next errand, its host's turn taken; waits until there is one."""
        while True:
            self._wake()
            self._changed.clear()
            errand = self._take()
            if errand is not None:
                return errand
            due = min((heap[0][0] for heap in (self._alarms, self._later) if heap), default=None)
            timeout = None if due is None else max(0.0, due - time.monotonic())
            try:
                await asyncio.wait_for(self._changed.wait(), timeout)
            except asyncio.TimeoutError:
                continue

    def _take(self) -> Errand | None:
        while self._ready:
            shard = min(self._ready)
            host = self._ready[shard].popleft()
            if not self._ready[shard]:
                del self._ready[shard]
            if host not in self._queues:
                continue
            wait_s = self._turns.ask(host)
            if wait_s > 0:
                self._sleep(host, wait_s)
                continue
            queue = self._queues[host]
            errand = queue.popleft()
            if queue:
                self._make_ready(host)
            else:
                del self._queues[host]
            return errand
        return None

    def _sleep(self, host: str, wait_s: float) -> None:
        """Let a host wait; errands at the head of its queue that waited too long are given up."""
        queue, now = self._queues[host], time.monotonic()
        slowed = self._turns.is_slowed(host)
        while slowed and queue and now + wait_s - queue[0].queued > self._max_wait_s:
            self._on_throttled(queue.popleft())
        if not queue:
            del self._queues[host]
            return
        self._asleep[host] = now + wait_s
        heapq.heappush(self._alarms, (now + wait_s, host))

    def _wake(self) -> None:
        now = time.monotonic()
        while self._alarms and self._alarms[0][0] <= now:
            at, host = heapq.heappop(self._alarms)
            if self._asleep.get(host) == at:
                del self._asleep[host]
                self._make_ready(host)
        while self._later and self._later[0][0] <= now:
            self.add(heapq.heappop(self._later)[2])

    def _make_ready(self, host: str) -> None:
        if host in self._queues:
            self._ready.setdefault(self._queues[host][0].shard, deque()).append(host)

    def _add_later(self, ready_at: float, errand: Errand) -> None:
        heapq.heappush(self._later, (ready_at, next(self._numbers), errand))
        self._changed.set()
