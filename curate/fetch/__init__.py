"""Candidates → raw shards: `run` fetches every plan file whose raw shard is not already what it would be today.

    rows      the columns of a raw shard, and what each row says
    manners   opt-outs, Retry-After, back-off
    guard     which addresses a request may go to
    transfer  one URL → one body
    engine    one plan file → one raw shard

Nothing heavy is imported before `run` is called.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.config import FetchConfig
from curate.errors import InputError
from curate.fetch.rows import RAW_COLUMNS, SUCCESS
from curate.shards import digest, fingerprint, made_from, sweep

if TYPE_CHECKING:
    from curate.fetch.engine import ShardTask

__all__ = ["RAW_COLUMNS", "SUCCESS", "FetchResult", "run"]

# Raise it when the same responses would be stored otherwise than before.
FORMAT_VERSION = 1
# Keys of FetchConfig that decide how fast and how patiently, not what is stored.
MANNER_OF_FETCHING = frozenset(
    {
        "engine",
        "processes",
        "connections",
        "per_host",
        "per_host_rate",
        "contact",
        "connect_timeout_s",
        "read_timeout_s",
        "total_timeout_s",
        "max_wait_s",
        "retries",
        "backoff_s",
        "max_retry_after_s",
        "outage_s",
        "min_yield",
    }
)


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What the raw shards hold after a run.

    Attributes:
        counts: rows by reason, and `success`, over all shards.
        made: shards fetched by this run.
        reused: shards that were right already.
    """

    counts: Mapping[str, int]
    made: int
    reused: int

    @property
    def rows(self) -> int:
        """Candidates in all shards."""
        return sum(self.counts.values())

    @property
    def images(self) -> int:
        """Candidates that arrived as images."""
        return self.counts.get(SUCCESS, 0)


def run(out: Path, config: FetchConfig) -> FetchResult:
    """Make `out/raw` what `out/plan` and the configuration ask for; call it while holding the folder's lock.

    A shard whose workers died in each try is written with all its rows failed as `worker_died`, under a fingerprint
    that the next run does not take for its own: it tries again.

    Raises:
        InputError: `out` has no plan.
    """
    plan, raw = out / "plan", out / "raw"
    if not plan.is_dir():
        raise InputError(f"{plan}: no such folder; run `curate plan` first, or `curate build`, which does")
    raw.mkdir(parents=True, exist_ok=True)
    sweep(raw)
    tasks = _tasks(plan, raw, config)
    _remove_strays(raw, {task.stem.name for task in tasks})
    todo = [task for task in tasks if not _is_made(task)]
    if todo:
        try:
            _fetch(todo, config.processes or _cores())
        finally:
            sweep(raw)  # what killed workers left
    return FetchResult(_count([task.stem for task in tasks]), made=len(todo), reused=len(tasks) - len(todo))


def _tasks(plan: Path, raw: Path, config: FetchConfig) -> list[ShardTask]:
    from curate.fetch.engine import ShardTask

    stored = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in MANNER_OF_FETCHING}
    return [
        ShardTask(path, raw / path.stem, fingerprint("fetch", FORMAT_VERSION, digest(path), stored), config)
        for path in sorted(plan.glob("*.parquet"))
        if path.stem.isdigit()
    ]


def _is_made(task: ShardTask) -> bool:
    there = task.stem.with_suffix(".tar").exists()
    return there and made_from(task.stem.with_suffix(".parquet")) == task.made_from


def _remove_strays(raw: Path, names: set[str]) -> None:
    """Remove shards whose plan file is gone; the Parquet first, without which a shard is none."""
    for pattern in ("*.parquet", "*.tar", "*_stats.json"):
        for path in raw.glob(pattern):
            name = path.stem.removesuffix("_stats")
            if name.isdigit() and name not in names:
                path.unlink()


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fetch(todo: list[ShardTask], processes: int) -> None:
    import pyarrow.parquet as pq

    from curate.executor import run_over
    from curate.fetch.engine import fetch_shard, write_dead_shard
    from curate.progress import progress

    shown: dict[Path, Counter[str]] = {task.stem: Counter() for task in todo}
    with progress("fetch", sum(pq.read_metadata(task.plan).num_rows for task in todo)) as advance:

        def show(task: ShardTask, counts: Mapping[str, int]) -> None:
            # A shard that is tried again begins at 0: only what is beyond the first try's count is news.
            news = Counter(counts) - shown[task.stem]
            shown[task.stem] |= Counter(counts)
            advance(news.total(), **news)

        workers = run_over(fetch_shard, todo, processes=min(processes, len(todo)), on_report=show)
        with closing(workers) as outcomes:
            for outcome in outcomes:
                if outcome.died:
                    made_without = fingerprint(outcome.item.made_from, "worker_died")
                    show(outcome.item, write_dead_shard(outcome.item, made_without))


def _count(stems: list[Path]) -> dict[str, int]:
    """Rows by reason over finished shards, from the shards themselves; most frequent first."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    counts: Counter[str] = Counter()
    for stem in stems:
        reasons = pq.read_table(stem.with_suffix(".parquet"), columns=["reason"])["reason"]
        tally: list[dict[str, Any]] = pc.value_counts(pc.fill_null(reasons, SUCCESS)).to_pylist()
        counts.update({entry["values"]: entry["counts"] for entry in tally})
    return dict(counts.most_common())
