"""The worker of fetch: plan files → raw shards, in one process.

    plan file → errands (a URL and the rows that have it) → frontier → hop → picture (in a thread) → tar
                                                               ↑ redirects, retries │

One event loop serves all shards that the process is at, so that the last slow rows of one leave its connections to the
next. `connections` hops run at once; the frontier says which. Images go into the tar as they come, so memory holds what
is in flight and no more; the Parquet is sorted by key.

A decoder that crashes takes the process along. Which rows were in a decoder then stands in a file beside the shard: on
the shard's second try they are left out as `worker_died`, and the others come through.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import cv2
from yarl import URL

from curate.config import FetchConfig
from curate.fetch import local, reuse
from curate.fetch.budget import Budget
from curate.fetch.decoding import Decoder, Journal
from curate.fetch.failures import TransferError
from curate.fetch.frontier import Errand, Frontier
from curate.fetch.guard import Guard
from curate.fetch.hosts import WHOLE, Hosts, Share
from curate.fetch.manners import SLOW_DOWN, backoff_after
from curate.fetch.outage import Address, Watch
from curate.fetch.robots import MOST_BYTES, Robots
from curate.fetch.rows import RAW_COLUMNS, SUCCESS, Picture, raw_schema, rejected
from curate.fetch.task import ShardTask
from curate.fetch.transfer import (
    BODIES_BYTES,
    Body,
    Page,
    Transfer,
    allow_open_files,
    open_session,
    parse_target,
    reach,
)
from curate.files import read_rows, write_text
from curate.ledger import Reason
from curate.shards import ShardWriter

Row = dict[str, Any]
Report = Callable[[dict[str, Any]], None]
Do = Callable[[ShardTask, Report], Awaitable[None]]
_NO_FACTS = dict.fromkeys(RAW_COLUMNS)
LOOKUP_THREADS = 64
REPORT_EVERY_S = 0.5
# An origin whose robots.txt cannot be read is left alone at first for so many times the first back-off.
FIRST_ROBOTS_PAUSE = 5
# A row that fails in more outages than this may itself be what looks like one: each further one costs it a try.
MOST_OUTAGES = 8


@asynccontextmanager
async def open_worker(number: int, *, state: Path, config: FetchConfig, share: Share = WHOLE) -> AsyncIterator[Do]:
    """What one worker process works with, for all of its shards.

    Args:
        number: of the worker.
        state: folder that the workers share: the turns of the hosts, and robots.sqlite.
        config: how to fetch.
        share: this machine's part of the hosts' limits.

    Yields:
        A coroutine function that makes one shard; `report` is called twice a second with what came so far.
    """
    allow_open_files(4 * config.connections + 1024)
    cv2.setNumThreads(0)  # the decoding threads are enough
    # getaddrinfo blocks a thread for each name; asyncio's own few would be what all connections wait for.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="lookup"))
    hosts = Hosts(state / "hosts", number, config.per_host, config.per_host_rate, share)
    try:
        async with open_session(config) as session:
            with Decoder(config) as decoder:
                engine = Engine(config, Transfer(session, config), hosts, decoder, state / "robots.sqlite")
                try:
                    async with engine.running():
                        yield engine.make
                finally:
                    await engine.robots.close()
    finally:
        hosts.close()


@dataclass(slots=True, eq=False)
class Shard:
    """A shard at work.

    Attributes:
        task: what to make.
        number: in the order of arrival.
        writer: where its rows go.
        journal: what of it is in a decoder.
        counts: rows so far, by reason and `success`.
        kept: those of them that an earlier run had fetched.
        bytes: of the bodies that came.
        open: errands whose end is not known yet.
        finished: set when there are none.
    """

    task: ShardTask
    number: int
    writer: ShardWriter
    journal: Journal
    counts: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    open: int = 0
    finished: asyncio.Event = field(default_factory=asyncio.Event)

    def write(self, rows: list[Row], result: Picture) -> None:
        """Write what became of these rows."""
        for row in rows:
            self._add(row, result)
        self.bytes += result.facts.get("bytes") or 0

    def keep(self, row: Row, result: Picture) -> None:
        """Write what became of a row before."""
        self._add(row, result)
        self.kept[result.facts.get("reason") or SUCCESS] += 1

    def _add(self, row: Row, result: Picture) -> None:
        facts = {**_NO_FACTS, **result.facts}  # each row has all, null or not, wherever its result is from
        self.writer.add({**row, **facts}, result.content, result.extension)
        self.counts[result.facts.get("reason") or SUCCESS] += 1


class Engine:
    """Errands in, rows out; for all shards of a process."""

    def __init__(
        self, config: FetchConfig, transfer: Transfer, hosts: Hosts, decoder: Decoder, robots_path: Path
    ) -> None:
        self.config, self.transfer, self.hosts, self.decoder = config, transfer, hosts, decoder
        self.frontier = Frontier(hosts, config.max_wait_s, self._throttled)
        self.robots = Robots(robots_path, self._read_robots, FIRST_ROBOTS_PAUSE * config.backoff_s)
        guard = Guard.allowing(config.allow_addresses)
        self.watch: Watch[tuple[Errand, TransferError]] = Watch(
            lambda address: reach(address, guard, config.connect_timeout_s),
            config.outage_s,
            self._stand,
            self._again,
            waiting=lambda: map(_address, self.frontier.targets()),
        )
        self.shards: dict[int, Shard] = {}
        self._files = Budget(BODIES_BYTES)
        self._numbers = count()
        self._slots = asyncio.Semaphore(config.connections)
        self._hops: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send errands on their way for the length of the block."""
        tasks = [asyncio.create_task(self._dispatch()), asyncio.create_task(self._decide_what_is_held())]
        for task in tasks:
            task.add_done_callback(self._note_failure)
        try:
            yield
        finally:
            for task in (*tasks, *self._hops):
                task.cancel()
            await asyncio.gather(*tasks, *self._hops, return_exceptions=True)
            self._failure.cancel()

    async def make(self, task: ShardTask, report: Report) -> None:
        """Fetch every candidate of a plan file and write the raw shard."""
        started, number = time.monotonic(), next(self._numbers)
        candidates = await asyncio.to_thread(read_rows, task.plan)
        writer = ShardWriter(task.stem, raw_schema(candidates.schema), made_from=task.made_from)
        async with _written_in_a_thread(writer), _reported(report) as tell:
            with self.decoder.journal(task.stem) as journal:
                shard = Shard(task, number, writer, journal)
                tell(lambda: self._progress(shard))
                rows = await asyncio.to_thread(reuse.keep, task, candidates.to_pylist(), shard.keep)
                if task.root is not None:
                    await self._read(shard, rows)
                else:
                    await self._fetch(shard, rows)
            await asyncio.to_thread(writer.sort_rows)
            _write_stats(task.stem, shard.counts, time.monotonic() - started)

    async def _read(self, shard: Shard, rows: list[Row]) -> None:
        async def use(body: Body, key: str) -> Picture:
            return await self.decoder.picture(body, key, shard.journal)

        assert shard.task.root
        await local.fetch(rows, shard.task.root, self.config.max_bytes, self._files, shard.write, use)

    async def _fetch(self, shard: Shard, rows: list[Row]) -> None:
        errands = []
        for same in by_url(rows):
            try:
                target = parse_target(same[0]["url"])
            except TransferError as error:
                shard.write(same, _rejected(error))
                continue
            errands.append(Errand(shard.number, same, target, self.config.max_redirects, self.config.total_timeout_s))
        if not errands:
            return
        self.shards[shard.number], shard.open = shard, len(errands)
        self.frontier.add_shard(shard.number, errands)
        try:
            waiting = asyncio.ensure_future(shard.finished.wait())
            await asyncio.wait((waiting, self._failure), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if self._failure.done():
                self._failure.result()
        finally:
            del self.shards[shard.number]
        self.frontier.end_shard(shard.number)

    # --- on the way --------------------------------------------------------------------------------------------------

    async def _dispatch(self) -> None:
        while True:
            await self._slots.acquire()
            await self.watch.running()
            errand = await self.frontier.next()
            hop = asyncio.create_task(self._hop(errand))
            self._hops.add(hop)
            hop.add_done_callback(self._hop_ended)

    def _hop_ended(self, hop: asyncio.Task[None]) -> None:
        self._hops.discard(hop)
        self._slots.release()
        self._note_failure(hop)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        """A fault of ours, or an outage, ends all shards at work."""
        if not task.cancelled() and (error := task.exception()) and not self._failure.done():
            self._failure.set_exception(error)

    async def _hop(self, errand: Errand) -> None:
        """One request of an errand, its host's turn held; then what its answer means."""
        host, shard, holds_turn, began = errand.host, self.shards[errand.shard], True, time.monotonic()

        async def use(body: Body) -> Picture:
            nonlocal holds_turn
            self.frontier.done(host)
            holds_turn = False
            return await self.decoder.picture(body, errand.rows[0]["key"], shard.journal)

        try:
            await self._ask_robots(errand.target)
            started = time.monotonic()
            is_last = not self.frontier.has(host)
            outcome = await self.transfer.hop(errand.target, errand.left_s, use, is_last=is_last)
            if isinstance(outcome, URL):
                errand.left_s -= time.monotonic() - started
        except TransferError as error:
            self._failed(errand, error, began)
        else:
            self._answered(errand)
            if isinstance(outcome, URL):
                self._redirect(errand, outcome)
            else:
                self._end(errand, outcome)
        finally:
            if holds_turn:
                self.frontier.done(host)

    async def _ask_robots(self, target: URL) -> None:
        if "robots.txt" in self.config.ignore_opt_outs:
            return
        verdict = await self.robots.verdict(target)
        if verdict.crawl_delay_s:
            self.hosts.pause_between(target.raw_host or "", min(verdict.crawl_delay_s, self.config.max_retry_after_s))
        if verdict.error is not None:
            raise verdict.error

    async def _read_robots(self, target: URL, held: str) -> Page:
        """One page on the way to a robots.txt; it counts against its host as any request does."""
        total_s = self.config.total_timeout_s
        if target.raw_host == held:
            return await self.transfer.page(target, total_s, MOST_BYTES)
        async with self.hosts.turn(target.raw_host or "", total_s):
            return await self.transfer.page(target, total_s, MOST_BYTES)

    # --- what became of it -------------------------------------------------------------------------------------------

    def _redirect(self, errand: Errand, target: URL) -> None:
        if not errand.hops:
            self._end(errand, Picture(rejected(Reason.TOO_MANY_REDIRECTS, str(self.config.max_redirects))))
            return
        errand.hops, errand.target = errand.hops - 1, target
        self.frontier.add(errand)

    def _answered(self, errand: Errand) -> None:
        self.hosts.went_well(errand.host)
        self.watch.answered(_address(errand.target))

    def _failed(self, errand: Errand, error: TransferError, began: float) -> None:
        if error.is_network:
            self.frontier.tried(errand)
            self.watch.failed((errand, error), _address(errand.target), f"{error.reason.value} {error.value}", began)
            return
        if error.http_status is not None:
            self.watch.answered(_address(errand.target))
        if error.http_status in SLOW_DOWN:
            asked_s = self.config.backoff_s if error.retry_after_s is None else error.retry_after_s
            self.hosts.slow_down(errand.host, min(asked_s, self.config.max_retry_after_s))
        self._retry_or_end(errand, error)

    def _retry_or_end(self, errand: Errand, error: TransferError) -> None:
        wait_s = backoff_after(errand.tries, self.config.backoff_s, errand.rows[0]["key"])
        asked_s = error.retry_after_s or 0.0
        if not error.may_pass or errand.tries == self.config.retries or asked_s > self.config.max_retry_after_s:
            self._end(errand, _rejected(error))
            return
        errand.tries += 1
        self.frontier.tried(errand)
        self._start_over(errand)
        self.frontier.add_retry(errand, max(wait_s, asked_s))

    def _start_over(self, errand: Errand) -> None:
        errand.target = parse_target(errand.rows[0]["url"])
        errand.hops, errand.left_s = self.config.max_redirects, self.config.total_timeout_s

    def _end(self, errand: Errand, result: Picture) -> None:
        self.frontier.tried(errand)
        shard = self.shards[errand.shard]
        shard.write(errand.rows, result)
        shard.open -= 1
        if not shard.open:
            shard.finished.set()

    def _throttled(self, errand: Errand) -> None:
        self._end(errand, Picture(rejected(Reason.THROTTLED, f"{errand.host}: over {self.config.max_wait_s:g} s")))

    # --- the network -------------------------------------------------------------------------------------------------

    async def _decide_what_is_held(self) -> None:
        """Let a probe decide where much failed, or where nothing else is left that could."""
        while True:
            await asyncio.sleep(0.05)
            if self.watch.is_suspicious or (self.watch.holds and not self._hops and self.frontier.is_idle):
                await self.watch.decide()

    def _stand(self, held: Any) -> None:
        for errand, error in held:
            self._retry_or_end(errand, error)

    def _again(self, held: Any) -> None:
        self.robots.forget_unreached()
        for errand, error in held:
            errand.outages += 1
            if errand.outages > MOST_OUTAGES:
                self._retry_or_end(errand, error)
            else:
                self._start_over(errand)
                self.frontier.add(errand)

    # --- telling -----------------------------------------------------------------------------------------------------

    def _progress(self, shard: Shard) -> dict[str, Any]:
        return {
            "counts": dict(shard.counts),
            "kept": dict(shard.kept),
            "bytes": shard.bytes,
            "throttled": self.hosts.throttled(),
            "paused": self.watch.paused_s,
        }


def by_url(rows: list[Row]) -> list[list[Row]]:
    """The rows, those with one URL together."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["url"], []).append(row)
    return list(groups.values())


@asynccontextmanager
async def _written_in_a_thread(writer: ShardWriter) -> AsyncIterator[None]:
    """Close the writer, which sorts, compresses and syncs, while the loop goes on with the other shard."""
    writer.__enter__()
    try:
        yield
    except BaseException as error:
        writer.__exit__(type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(writer.__exit__, None, None, None)


@asynccontextmanager
async def _reported(report: Report) -> AsyncIterator[Callable[[Callable[[], dict[str, Any]]], None]]:
    """Report what the function handed over gives, now and then and at the end."""
    sources: list[Callable[[], dict[str, Any]]] = []

    async def often() -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            for source in sources:
                report(source())

    reporting = asyncio.create_task(often())
    try:
        yield sources.append
        for source in sources:
            report(source())
    finally:
        reporting.cancel()


def write_dead_shard(task: ShardTask, made_from: str) -> Counter[str]:
    """Write a shard whose worker died each time: the rows that were not there before fail as `worker_died`."""
    candidates = read_rows(task.plan)
    with ShardWriter(task.stem, raw_schema(candidates.schema), made_from=made_from) as writer:
        counts: Counter[str] = Counter()

        def write(row: Row, result: Picture) -> None:
            writer.add({**row, **result.facts}, result.content, result.extension)
            counts[result.facts.get("reason") or SUCCESS] += 1

        for row in reuse.keep(task, candidates.to_pylist(), write):
            write(row, Picture(rejected(Reason.WORKER_DIED, "")))
        writer.sort_rows()
        _write_stats(task.stem, counts, 0.0)
    return counts


def _rejected(error: TransferError) -> Picture:
    return Picture(rejected(error.reason, error.value, error.http_status))


def _address(target: URL) -> Address:
    return target.raw_host or "", target.port or 80


def _write_stats(stem: Path, counts: Counter[str], duration_s: float) -> None:
    """img2dataset's `NNNNN_stats.json`; the one file here with a clock's figure in it."""
    of_the_bytes = sum(n for word, n in counts.items() if word != SUCCESS and _is_resize(word))
    stats = {
        "count": counts.total(),
        "successes": counts[SUCCESS],
        "failed_to_download": counts.total() - counts[SUCCESS] - of_the_bytes,
        "failed_to_resize": of_the_bytes,
        "duration": round(duration_s, 3),
        "status_dict": dict(sorted(counts.items())),
    }
    write_text(stem.with_name(f"{stem.name}_stats.json"), json.dumps(stats, indent=2) + "\n")


def _is_resize(word: str) -> bool:
    return bool(rejected(Reason(word), "")["status"] == "failed_to_resize")
