"""The turn of a host: at most N requests at once and R a second, by all workers of a run together.

The workers share a table in a file: a row of numbers for each slot, and a column of counts for each worker. A host's
slot is a hash of its name; two hosts in one slot share a limit, which errs on the polite side. Asking is a few
microseconds under a lock of the file (`fcntl`: the kernel gives it back when its holder dies). Each worker counts in a
column of its own, and holds a lock as long as it lives: who finds a host at its limit and a worker's lock free gives
back the turns of that dead worker by clearing the column.

The table is for the workers of one machine. Where several work on one dataset, each has a table of its own and a part
of each limit (`Share`), so that the sum is what one machine would be allowed.

The limit of a host that answers 429 or 503 is halved, its rate with it, and it is left alone for as long as it asks;
each success after that lifts the limit a little, until it is what it was (additive increase, multiplicative decrease,
as in TCP). Below one at once, the rate alone is lowered.

Times are those of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import math
import mmap
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SLOTS = 1 << 15
# What a slot holds, as doubles: when the next request may start; until when the host is to be left alone; by how much
# its limit is lowered; when it was lowered last; the longest pause between requests that its robots.txt asks for.
NEXT_START, NOT_BEFORE, LOWERED, LOWERED_AT, PAUSE = range(5)
DOUBLES = 5
# Another process gives its turn back unseen: how often to look.
POLL_S = 0.02
# Requests that were in flight together fail together; that is one sign, not many.
ONE_SIGN_S = 1.0
LIFT = 0.2
# How far a limit is lowered at most.
LEAST_SHARE = 1 / 64
# How often a worker at a host's limit looks whether those who hold its turns are alive.
LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Share:
    """A machine's part of every host's limits: it is number `index`, from 0, of the `of` machines of a run."""

    index: int = 0
    of: int = 1

    def at_once(self, per_host: int) -> int:
        """Its part of so many requests at once; all parts add up to that."""
        return per_host // self.of + (self.index < per_host % self.of)


WHOLE = Share()


def create(path: Path, workers: int) -> None:
    """Make the empty table of a new run.

    Args:
        path: of the file; one that is there is replaced, and with it the locks of workers that are not quite dead yet.
        workers: how many processes will attach, numbered from 0.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in (path, *path.parent.glob(f"{path.name}-*")):
        old.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(SLOTS * (DOUBLES * 8 + workers * 2))


class Hosts:
    """The table, as one worker sees it.

    Args:
        path: of the file that `create` made.
        worker: this worker's number.
        per_host: most requests to one host at once.
        rate: most requests a second to one host; 0 is no limit.
        share: this machine's part of both.
    """

    def __init__(self, path: Path, worker: int, per_host: int, rate: float, share: Share = WHOLE) -> None:
        self.per_host, self.spacing_s = share.at_once(per_host), share.of / rate if rate else 0.0
        self._pauses = share.of
        self._file = os.open(path, os.O_RDWR)
        self._map = mmap.mmap(self._file, 0)
        whole = memoryview(self._map)
        counts_from = SLOTS * DOUBLES * 8
        self._numbers = whole[:counts_from].cast("d")
        self._counts = whole[counts_from:].cast("H")
        self._workers = len(self._counts) // SLOTS
        self._own = worker * SLOTS
        self._slowed: set[str] = set()
        whole.release()
        self._path, self._worker, self._looked_at = path, worker, -math.inf
        self._life = os.open(_life(path, worker), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._life, fcntl.LOCK_EX)  # waits for one of that number that is not quite dead yet
        self._clear(worker)

    def ask(self, host: str) -> float:
        """0.0 if a request may go now (then call `done` after it), else in how many seconds to ask again."""
        slot = _slot(host)
        place, now = slot * DOUBLES, time.monotonic()
        numbers = self._numbers
        with self._locked():
            wait_s = max(numbers[place + NEXT_START], numbers[place + NOT_BEFORE]) - now
            if wait_s > 0:
                return wait_s
            limit = self._limit(place)
            if self._in_flight(slot) >= max(1.0, limit):
                self._bury(slot, now)
                return POLL_S
            self._counts[self._own + slot] += 1
            pause_s = max(self.spacing_s * self.per_host / limit, numbers[place + PAUSE])
            if pause_s:
                numbers[place + NEXT_START] = now + pause_s
        return 0.0

    def done(self, host: str) -> None:
        """Give a turn back."""
        self._counts[self._own + _slot(host)] -= 1  # this worker's own count: no other writes it

    @asynccontextmanager
    async def turn(self, host: str, patience_s: float) -> AsyncIterator[None]:
        """Hold a turn for the length of the block; for the few requests that are not the frontier's.

        Raises:
            asyncio.TimeoutError: it did not come within `patience_s` seconds.
        """
        last = time.monotonic() + patience_s
        while wait_s := self.ask(host):
            if time.monotonic() + wait_s > last:
                raise asyncio.TimeoutError
            await asyncio.sleep(wait_s)
        try:
            yield
        finally:
            self.done(host)

    def slow_down(self, host: str, wait_s: float) -> None:
        """After a 429 or 503: half as many at once, and none for `wait_s` seconds."""
        place, now = _slot(host) * DOUBLES, time.monotonic()
        with self._locked():
            self._numbers[place + NOT_BEFORE] = max(self._numbers[place + NOT_BEFORE], now + wait_s)
            if now - self._numbers[place + LOWERED_AT] > ONE_SIGN_S:
                least = self.per_host * LEAST_SHARE
                self._numbers[place + LOWERED] = self.per_host - max(least, self._limit(place) / 2)
                self._numbers[place + LOWERED_AT] = now
        self._slowed.add(host)

    def went_well(self, host: str) -> None:
        """After an answer: lift a lowered limit a little."""
        place = _slot(host) * DOUBLES
        if self._numbers[place + LOWERED]:
            with self._locked():
                self._numbers[place + LOWERED] = max(0.0, self._numbers[place + LOWERED] - LIFT)

    def pause_between(self, host: str, seconds: float) -> None:
        """Heed a Crawl-delay: at least this long from one request's start to the next one's; longer, to share it."""
        place, seconds = _slot(host) * DOUBLES, seconds * self._pauses
        if seconds > self._numbers[place + PAUSE]:
            with self._locked():
                now = time.monotonic()
                self._numbers[place + PAUSE] = seconds
                self._numbers[place + NEXT_START] = max(self._numbers[place + NEXT_START], now + seconds)
            self._slowed.add(host)

    def throttled(self) -> list[str]:
        """The hosts this worker knows of that get less than the configuration allows, sorted."""
        self._slowed = {host for host in self._slowed if self.is_slowed(host)}
        return sorted(self._slowed)

    def is_slowed(self, host: str) -> bool:
        """Whether a host gets less than the configuration allows, because it asked for it."""
        place, numbers = _slot(host) * DOUBLES, self._numbers
        waits = numbers[place + NOT_BEFORE] > time.monotonic()
        return waits or numbers[place + LOWERED] > 0 or numbers[place + PAUSE] > self.spacing_s

    def close(self) -> None:
        """Let the file go."""
        self._numbers.release()
        self._counts.release()
        self._map.close()
        os.close(self._file)
        os.close(self._life)

    def _limit(self, place: int) -> float:
        return self.per_host - self._numbers[place + LOWERED]

    def _in_flight(self, slot: int) -> int:
        return sum(self._counts[worker * SLOTS + slot] for worker in range(self._workers))

    def _bury(self, slot: int, now: float) -> None:
        """Give back the turns of workers that died holding one of this slot's."""
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        for worker in range(self._workers):
            if worker != self._worker and self._counts[worker * SLOTS + slot]:
                life = os.open(_life(self._path, worker), os.O_RDWR)
                try:
                    fcntl.flock(life, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._clear(worker)
                except BlockingIOError:
                    pass
                finally:
                    os.close(life)

    def _clear(self, worker: int) -> None:
        self._counts[worker * SLOTS : (worker + 1) * SLOTS] = memoryview(bytes(SLOTS * 2)).cast("H")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self._workers == 1:
            yield
            return
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)


def _life(table: Path, worker: int) -> Path:
    """The file that a worker holds a lock of (`flock`: the kernel gives it back when its holder dies)."""
    return table.with_name(f"{table.name}-{worker}")


@lru_cache(1 << 14)
def _slot(host: str) -> int:
    name = host.rstrip(".").encode()  # example.org. is example.org
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") % SLOTS
