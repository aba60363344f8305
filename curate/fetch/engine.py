"""One plan file → one raw shard, in one process: an event loop for the transfers, a few threads for the pixels.

All URLs of the shard are started at once and wait in the Fetcher for their turn; a URL that stands in several rows is
fetched once. Images go into the tar as they come, so no more than the bodies in flight are in memory; the Parquet is
sorted by key.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import pyarrow.parquet as pq

from curate.config import FetchConfig
from curate.fetch.rows import SUCCESS, Picture, picture, raw_schema, rejected
from curate.fetch.transfer import Body, Fetcher, TransferError, open_session
from curate.ledger import Reason
from curate.shards import ShardWriter, write_text

Row = dict[str, Any]
Report = Callable[[Mapping[str, int]], None]
# Two keep a core busy while the loop writes; more processes, not more threads, use more cores.
DECODING_THREADS = 2
LOOKUP_THREADS = 64
REPORT_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to make.

    Attributes:
        plan: the candidates.
        stem: path of the raw shard without extension.
        made_from: its fingerprint.
        config: how.
    """

    plan: Path
    stem: Path
    made_from: str
    config: FetchConfig


def fetch_shard(task: ShardTask, report: Report) -> None:
    """Fetch every candidate of a plan file and write the raw shard.

    Args:
        task: what to make.
        report: called now and then with how many rows so far ended as `success` or as which reason.
    """
    cv2.setNumThreads(0)  # the threads here are enough
    asyncio.run(_fetch_shard(task, report))


async def _fetch_shard(task: ShardTask, report: Report) -> None:
    started = time.monotonic()
    # getaddrinfo blocks a thread for each name; asyncio's own few would be what all connections wait for.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="lookup"))
    candidates = pq.read_table(task.plan, page_checksum_verification=True)
    counts: Counter[str] = Counter()
    with (
        ShardWriter(task.stem, raw_schema(candidates.schema), made_from=task.made_from) as writer,
        ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="decode") as threads,
    ):
        async with open_session(task.config) as session:
            shard = _Shard(task.config, Fetcher(session, task.config), threads, writer, counts)
            reporting = asyncio.create_task(_report_often(report, counts))
            try:
                await asyncio.gather(*(shard.fetch(rows) for rows in by_url(candidates.to_pylist())))
            finally:
                reporting.cancel()
        report(counts)
        writer.sort_rows()
        _write_stats(task.stem, counts, time.monotonic() - started)


def by_url(rows: list[Row]) -> list[list[Row]]:
    """The rows, those with one URL together."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["url"], []).append(row)
    return list(groups.values())


async def _report_often(report: Report, counts: Counter[str]) -> None:
    while True:
        await asyncio.sleep(REPORT_EVERY_S)
        report(counts)


@dataclass(frozen=True, slots=True)
class _Shard:
    config: FetchConfig
    fetcher: Fetcher
    threads: ThreadPoolExecutor
    writer: ShardWriter
    counts: Counter[str]

    async def fetch(self, rows: list[Row]) -> None:
        """Fetch the one URL of these rows and write them all."""
        try:
            result = await self.fetcher.fetch(rows[0]["url"], rows[0]["key"], self._picture)
        except TransferError as error:
            result = Picture(rejected(error.reason, error.value, error.http_status))
        for row in rows:
            self.writer.add({**row, **result.facts}, result.content, result.extension)
        self.counts[result.facts.get("reason", SUCCESS)] += len(rows)

    async def _picture(self, body: Body) -> Picture:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, picture, body.content, body.http_status, self.config)


def write_dead_shard(task: ShardTask, made_from: str) -> Counter[str]:
    """Write a shard whose worker died each time: every row failed as `worker_died`."""
    candidates = pq.read_table(task.plan, page_checksum_verification=True)
    facts = rejected(Reason.WORKER_DIED, "")
    counts = Counter({Reason.WORKER_DIED.value: candidates.num_rows})
    with ShardWriter(task.stem, raw_schema(candidates.schema), made_from=made_from) as writer:
        for row in candidates.to_pylist():
            writer.add({**row, **facts})
        writer.sort_rows()
        _write_stats(task.stem, counts, 0.0)
    return counts


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
