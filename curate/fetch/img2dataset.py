"""`fetch.engine: img2dataset`: the real img2dataset on the same plan, watched over and checked, to the same raw shards.

    plan file → addresses looked up and checked → img2dataset, in a process of its own → each row checked → raw shard

What it does of itself it does as ever: connections, retries at once, sizes, encoding. It knows no robots.txt, no limit
for a host and no Retry-After. What stands under it, in its process, is in `img2dataset_process`; here is what stands
over it. Each row that it hands over is checked: its image is opened anew and measured as any other, its words become
our reasons. When it hands over nothing for as long as a row may take, it is killed: what it was waiting for has timed
out, and it starts again with the rest. It does so too when it dies; after a second death over one row's image that row
is left out, after a second over none all of them are. So there is an end, and each row has one.

That nothing can be reached any more is recognised as in the other engine, but at the end of a shard: until then
img2dataset runs through its rows.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from yarl import URL

from curate.config import FetchConfig
from curate.errors import ConfigError
from curate.fetch import DIED, reuse
from curate.fetch.decoding import Decoder
from curate.fetch.engine import (
    LOOKUP_THREADS,
    Do,
    Report,
    Row,
    Shard,
    _address,
    _rejected,
    _reported,
    _write_stats,
    _written_in_a_thread,
)
from curate.fetch.failures import TransferError
from curate.fetch.guard import BlockedAddress, Guard
from curate.fetch.img2dataset_errors import from_words, lookup_failed
from curate.fetch.outage import Watch
from curate.fetch.rows import SUCCESS, raw_schema
from curate.fetch.task import ShardTask
from curate.fetch.transfer import Body, parse_target, reach
from curate.ledger import Reason
from curate.shards import ShardWriter

logger = logging.getLogger("cliptailor")

TRIES = 2
# Its imports take ten seconds of CPU time.
START_S = 300.0
# Beyond a row's own time: decoding, and a machine with other things to do.
GRACE_S = 15.0
LONGEST_LINE = 1 << 20


@dataclass(slots=True, eq=False)
class Errand:
    """A URL, and the rows that have it."""

    rows: list[Row]
    target: URL


@dataclass(slots=True)
class Sitting:
    """What is known of img2dataset from one start to its end, or death.

    Attributes:
        open: rows that it waits for a server for.
        came: what was noted of each answer: http_status, and bytes and format where a body came.
        decoding: the row whose image went into its decoder last.
        done: rows that it handed over.
    """

    open: set[int] = field(default_factory=set)
    came: dict[int, dict[str, Any]] = field(default_factory=dict)
    decoding: int | None = None
    done: int = 0


class Died(Exception):  # noqa: N818 - an outcome, not an error of the program
    """img2dataset's process is gone, or was killed because it made no progress."""

    def __init__(self, *, hung: bool) -> None:
        super().__init__()
        self.hung = hung


def prepare() -> None:
    """Say what this engine does not do.

    Raises:
        ConfigError: img2dataset cannot be imported on this Python.
    """
    for name in ("img2dataset", "imghdr"):
        if importlib.util.find_spec(name) is None:
            version = ".".join(map(str, sys.version_info[:2]))
            raise ConfigError(
                f"fetch.engine img2dataset: it cannot be imported on this Python {version} (no module '{name}'); "
                "set fetch.engine native, or use a Python up to 3.12 with img2dataset installed"
            )
    logger.info("fetch   img2dataset knows no robots.txt, no limit of requests to a host and no Retry-After")


@asynccontextmanager
async def open_worker(number: int, *, state: Path, config: FetchConfig) -> AsyncIterator[Do]:
    """What one worker process works with: as `engine.open_worker`."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="lookup"))
    # What img2dataset gives is measured and stored as it is.
    with Decoder(replace(config, resize_mode="no", skip_reencode=True, min_side=1)) as decoder:
        process = Process(config, state / f"img2dataset-{number}")
        try:
            yield Engine(config, decoder, process).make
        finally:
            await process.end()


class Process:
    """img2dataset's process, started when it is needed."""

    def __init__(self, config: FetchConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        # A row may take its time once more than it should, where a server's headers drip.
        self._patience_s = config.total_timeout_s + GRACE_S
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, rows: Iterable[tuple[int, str]]) -> None:
        """Hand over rows (number, URL).

        Raises:
            Died: it did not start.
            ConfigError: img2dataset cannot be imported.
        """
        if self._process is None:
            await self._start()
        assert self._process
        assert self._process.stdin
        with suppress(ConnectionError):  # `next` says so
            self._process.stdin.write(json.dumps(list(rows)).encode() + b"\n")
            await self._process.stdin.drain()

    async def next(self, patience_s: float | None = None) -> tuple[dict[str, Any], bytes]:
        """The next event, and the bytes that belong to it.

        Raises:
            Died: there is none, or none came in time. The process is gone then.
            RuntimeError: something is wrong with img2dataset, or here.
        """
        try:
            event, content = await asyncio.wait_for(self._read(), patience_s or self._patience_s)
        except (asyncio.IncompleteReadError, ConnectionError):
            await self.end()
            raise Died(hung=False) from None
        except asyncio.TimeoutError:
            await self.end()
            raise Died(hung=True) from None
        if event["event"] == "cannot":
            await self.end()
            if event["why"].startswith(("ImportError", "ModuleNotFoundError")):
                raise ConfigError(f"fetch.engine img2dataset: it cannot be imported: {event['why']}")
            raise RuntimeError(f"img2dataset: {event['trace']}")
        return event, content

    async def end(self) -> None:
        """Kill it, if it is there."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        self._pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _start(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        here, there = os.pipe()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "curate.fetch.img2dataset_process", str(there), str(self._folder)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            pass_fds=(there,),
            env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"},  # it would ask PyPI for a newer one
        )
        os.close(there)
        self._events = asyncio.StreamReader(LONGEST_LINE)
        self._pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._events), os.fdopen(here, "rb")
        )
        assert self._process.stdin
        with suppress(ConnectionError):
            self._process.stdin.write(json.dumps(asdict(self._config)).encode() + b"\n")
        await self.next(START_S)  # ready

    async def _read(self) -> tuple[dict[str, Any], bytes]:
        event: dict[str, Any] = json.loads(await self._events.readuntil(b"\n"))
        return event, await self._events.readexactly(event["size"])


class Engine:
    """Plan files in, raw shards out; one at a time."""

    def __init__(self, config: FetchConfig, decoder: Decoder, process: Process) -> None:
        self.config, self.decoder, self.process = config, decoder, process
        self.guard = Guard.allowing(config.allow_addresses)
        self.watch: Watch[tuple[Shard, Errand, TransferError]] = Watch(
            lambda address: reach(address, self.guard, config.connect_timeout_s),
            config.outage_s,
            self._stand,
            self._again,
        )
        self._one_at_a_time = asyncio.Lock()
        self._numbers = count()
        self._todo: list[Errand] = []

    async def make(self, task: ShardTask, report: Report) -> None:
        """Fetch every candidate of a plan file and write the raw shard."""
        started = time.monotonic()
        candidates = await asyncio.to_thread(pq.read_table, task.plan, page_checksum_verification=True)
        writer = ShardWriter(task.stem, raw_schema(candidates.schema), made_from=task.made_from)
        async with _written_in_a_thread(writer), _reported(report) as tell:
            with self.decoder.journal(task.stem) as journal:
                shard = Shard(task, next(self._numbers), writer, journal)
                tell(lambda: self._progress(shard))
                rows = await asyncio.to_thread(reuse.keep, task, candidates.to_pylist(), shard.keep)
                async with self._one_at_a_time:
                    await self._fetch(shard, rows)
            await asyncio.to_thread(writer.sort_rows)
            _write_stats(task.stem, shard.counts, time.monotonic() - started)

    async def _fetch(self, shard: Shard, rows: list[Row]) -> None:
        errands: dict[str, Errand] = {}
        for row in rows:
            target = _target(row["url"])
            if isinstance(target, TransferError):
                shard.write([row], _rejected(target))
            else:
                errands.setdefault(str(target), Errand([], target)).rows.append(row)
        self._todo = list(errands.values())
        while self._todo:
            todo, self._todo = self._todo, []
            await self._download(shard, dict(enumerate(await self._with_good_addresses(shard, todo))))
            if self.watch.holds:
                await self.watch.decide()

    # --- before: addresses -------------------------------------------------------------------------------------------

    async def _with_good_addresses(self, shard: Shard, errands: list[Errand]) -> list[Errand]:
        """The errands whose host has addresses that may be connected; the others are ended."""
        slots = asyncio.Semaphore(LOOKUP_THREADS)

        async def look_up(host: str, port: int) -> TransferError | None:
            async with slots:
                return await self._look_up(host, port)

        addresses = list({_address(errand.target) for errand in errands})
        faults = await asyncio.gather(*(look_up(*address) for address in addresses))
        fault_of, good = dict(zip(addresses, faults, strict=True)), []
        for errand in errands:
            fault = fault_of[_address(errand.target)]
            if fault is None:
                good.append(errand)
            else:
                self._failed(shard, errand, fault)
        return good

    async def _look_up(self, host: str, port: int) -> TransferError | None:
        """Why no request may go to a host; None if it may."""
        try:
            answers = await asyncio.wait_for(
                asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM),
                self.config.connect_timeout_s,
            )
            for *_, address in answers:
                self.guard.check(str(address[0]), port)
        except BlockedAddress as error:
            return TransferError(Reason.BLOCKED_ADDRESS, error.address)
        except asyncio.TimeoutError:
            return TransferError(Reason.DNS, "no answer", may_pass=True, is_network=True)
        except (OSError, UnicodeError) as error:
            return lookup_failed(error if isinstance(error, OSError) else OSError(socket.EAI_NONAME, ""))
        return None

    # --- img2dataset -------------------------------------------------------------------------------------------------

    async def _download(self, shard: Shard, errands: dict[int, Errand]) -> None:
        """Let img2dataset download until each of these has ended."""
        strikes: Counter[int | None] = Counter()
        while errands:
            sitting = Sitting()
            try:
                await self._sit(shard, errands, sitting)
            except Died as death:
                if sitting.done:
                    strikes[None] = 0
                self._lose(shard, errands, sitting, death, strikes)
            else:
                for errand in errands.values():
                    self._end(shard, errand, TransferError(Reason.WORKER_DIED, "lost by img2dataset"))
                errands.clear()

    async def _sit(self, shard: Shard, errands: dict[int, Errand], sitting: Sitting) -> None:
        """Take what img2dataset hands over, until it has nothing more; what has ended leaves `errands`."""
        await self.process.ask((number, str(errand.target)) for number, errand in errands.items())
        while True:
            event, content = await self.process.next()
            number: int = event.pop("row", -1)
            match event.pop("event"):
                case "open":
                    sitting.open.add(number)
                case "closed":
                    sitting.open.discard(number)
                    sitting.came[number] = event
                case "decoding":
                    sitting.decoding = number
                case "row" if errand := errands.pop(number, None):
                    sitting.done, sitting.decoding = sitting.done + 1, None
                    await self._check(shard, errand, event, sitting.came.pop(number, {}), content)
                case "end":
                    return

    def _lose(
        self, shard: Shard, errands: dict[int, Errand], sitting: Sitting, death: Died, strikes: Counter[int | None]
    ) -> None:
        """End what its death is laid to: rows that hung, or after two deaths the row in the decoder, or else all."""
        stuck = sitting.open & errands.keys() if death.hung else set()
        for number in stuck:
            self._end(shard, errands.pop(number), TransferError(Reason.TIMEOUT, "img2dataset hung", may_pass=True))
        if stuck:
            return
        blamed = sitting.decoding if sitting.decoding in errands else None
        strikes[blamed] += 1
        if strikes[blamed] < TRIES:
            return
        if blamed is not None:
            self._end(shard, errands.pop(blamed), TransferError(Reason.WORKER_DIED, "in the decoder of img2dataset"))
            return
        for errand in errands.values():
            self._end(shard, errand, TransferError(Reason.WORKER_DIED, "img2dataset died"))
        errands.clear()
        shard.writer.made_from = shard.task.made_from + DIED  # the next run asks for them again

    # --- what became of it -------------------------------------------------------------------------------------------

    async def _check(
        self, shard: Shard, errand: Errand, said: dict[str, Any], came: dict[str, Any], content: bytes
    ) -> None:
        """Write what img2dataset says of a row, after a look at the image that it gives."""
        http_status = came.get("http_status")
        if said["status"] != SUCCESS:
            self._failed(shard, errand, from_words(said["status"], said["error_message"], http_status))
            return
        self.watch.answered(_address(errand.target))
        result = await self.decoder.picture(Body(content, http_status), errand.rows[0]["key"], shard.journal)
        came_facts: dict[str, Any] = {"bytes": came.get("bytes"), "sha256": said["sha256"]}
        if result.facts["status"] == SUCCESS and said["sha256"] != result.facts["sha256"]:
            came_facts |= {"format": came.get("format"), **_size(said["original_width"], said["original_height"])}
        shard.write(errand.rows, replace(result, facts={**result.facts, **came_facts}))

    def _failed(self, shard: Shard, errand: Errand, error: TransferError) -> None:
        if error.is_network:
            self.watch.failed((shard, errand, error), _address(errand.target), f"{error.reason.value} {error.value}")
            return
        if error.http_status is not None:
            self.watch.answered(_address(errand.target))
        self._end(shard, errand, error)

    def _end(self, shard: Shard, errand: Errand, error: TransferError) -> None:
        shard.write(errand.rows, _rejected(error))

    def _stand(self, held: Iterable[tuple[Shard, Errand, TransferError]]) -> None:
        for shard, errand, error in held:
            self._end(shard, errand, error)

    def _again(self, held: Iterable[tuple[Shard, Errand, TransferError]]) -> None:
        self._todo.extend(errand for _, errand, _ in held)

    def _progress(self, shard: Shard) -> dict[str, Any]:
        return {
            "counts": dict(shard.counts),
            "kept": dict(shard.kept),
            "bytes": shard.bytes,
            "throttled": [],
            "paused": self.watch.paused_s,
        }


def _target(url: str) -> URL | TransferError:
    try:
        return parse_target(url)
    except TransferError as error:
        return error


def _size(width: int, height: int) -> dict[str, Any]:
    """The facts about the size of what came."""
    return {
        "original_width": width,
        "original_height": height,
        "aspect": round(max(width, height) / min(width, height), 4),
    }
