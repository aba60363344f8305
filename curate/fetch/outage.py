"""Is it the URL's server that cannot be reached, or is the network gone?

A failure of the network's kind (no address, no connection) is not believed at once: it is held until something
answers, which shows that the network is there and the failure the server's own. Where many failures of many hosts come
without an answer between them, or nothing else is left to do, a probe decides: it looks up and connects anew to hosts
that answered before. If one can be reached, the failures stand. If none can, the run pauses and probes on; when a probe
gets through, what had failed is asked again as if it had not been tried, and so is what began in the outage and fails
after it; after `outage_s` seconds the run ends.

Before anything has answered there is nobody to probe but those that failed and those whose turn has not come, some of
them each time: a few hosts that are all dead are taken for dead, many at once for an outage.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

from curate.errors import Outage

logger = logging.getLogger("cliptailor")

E = TypeVar("E")
Address = tuple[str, int]
SUSPICIOUS_FAILURES = 20
# Fewer hosts than this may well all be dead.
SUSPICIOUS_HOSTS = 5
WITNESSES = 16
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0


class Watch(Generic[E]):
    """What failed since the last answer, and whether the run is paused for it.

    Args:
        reach: opens a connection to a host and port and closes it; raises OSError or TimeoutError where it cannot.
        outage_s: how long to wait for the network.
        stand: called with errands whose failure is their own.
        again: called with errands that failed in an outage.
        waiting: the hosts that are still to be asked.
    """

    def __init__(
        self,
        reach: Callable[[Address], Awaitable[None]],
        outage_s: float,
        stand: Callable[[Iterable[E]], None],
        again: Callable[[Iterable[E]], None],
        waiting: Callable[[], Iterable[Address]] = tuple,
    ) -> None:
        self._reach, self._outage_s, self._stand, self._again, self._waiting = reach, outage_s, stand, again, waiting
        self._held: list[E] = []
        self._failed: OrderedDict[Address, str] = OrderedDict()
        self._witnesses: OrderedDict[Address, None] = OrderedDict()
        self._running = asyncio.Event()
        self._running.set()
        self._since: float | None = None
        self._back = -math.inf  # when the last outage ended
        self._answers, self._probes = 0, 0

    @property
    def paused_s(self) -> float:
        """For how long the run has been paused; 0 if it is not."""
        return time.monotonic() - self._since if self._since is not None else 0.0

    @property
    def holds(self) -> bool:
        """Whether any failure is not decided yet."""
        return bool(self._held)

    @property
    def is_suspicious(self) -> bool:
        """Whether so much failed since the last answer that a probe should decide."""
        return len(self._held) >= SUSPICIOUS_FAILURES and len(self._failed) >= SUSPICIOUS_HOSTS

    def answered(self, address: Address) -> None:
        """A server answered: the network is there, and what failed before failed by itself."""
        self._answers += 1
        self._witnesses[address] = None
        self._witnesses.move_to_end(address)
        if len(self._witnesses) > WITNESSES:
            self._witnesses.popitem(last=False)
        if self._held:
            self._release(self._stand)

    def failed(self, errand: E, address: Address, why: str, began: float = math.inf) -> None:
        """Nothing was reached; hold the errand until it is clear whose fault that is.

        Args:
            errand: what failed.
            address: that could not be reached.
            why: in a word or two.
            began: when it was tried, in seconds of `time.monotonic`, if that is known.
        """
        if began < self._back:
            self._again([errand])
            return
        self._held.append(errand)
        self._failed[address] = why
        self._failed.move_to_end(address)

    async def running(self) -> None:
        """Wait while the run is paused."""
        await self._running.wait()

    async def decide(self) -> None:
        """Probe, and pause until the network is there.

        Raises:
            Outage: it did not come back in time.
        """
        if not self._witnesses and not self.is_suspicious:
            self._release(self._stand)
            return
        self._running.clear()
        answers = self._answers
        try:
            if await self._probe() or self._answers > answers:  # what was in flight can answer, too
                self._release(self._stand)
            else:
                await self._wait_for_network()
                self._back = time.monotonic()
                self._release(self._again)
        finally:
            self._since = None
            self._running.set()

    async def _wait_for_network(self) -> None:
        self._since, pause_s, answers = time.monotonic(), FIRST_PAUSE_S, self._answers
        logger.warning("fetch: paused: no network (%s)", self._what())
        while True:
            left_s = self._outage_s - self.paused_s
            if left_s <= 0:
                raise Outage(
                    f"fetch: nothing could be reached for {self._outage_s:,.0f} s ({self._what()}); "
                    "what was not done stays to be done: the same command continues"
                )
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if await self._probe() or self._answers > answers:
                logger.warning("fetch: the network is back after %.0f s", self.paused_s)
                return

    def _what(self) -> str:
        host, why = next(reversed(self._failed.items()))
        return f"{host[0]}: {why}; {len(self._failed):,} hosts"

    async def _probe(self) -> bool:
        """Whether any host that answered before can be reached, or else any of the others."""
        tries = [asyncio.ensure_future(self._reach(address)) for address in self._witnesses or self._strangers()]
        try:
            for finished in asyncio.as_completed(tries):
                try:
                    await finished
                except (OSError, asyncio.TimeoutError):
                    continue
                return True
            return False
        finally:
            for attempt in tries:
                attempt.cancel()
            await asyncio.gather(*tries, return_exceptions=True)

    def _strangers(self) -> list[Address]:
        """As many hosts that never answered as there are witnesses at most; the next ones each time."""
        known = list(dict.fromkeys((*self._failed, *self._waiting())))
        first = self._probes * WITNESSES % len(known)
        self._probes += 1
        return (known[first:] + known[:first])[:WITNESSES]

    def _release(self, to: Callable[[Iterable[E]], None]) -> None:
        held, self._held = self._held, []
        self._failed.clear()
        to(held)
