"""The road from a list to a dataset: the order of the stages, the folder's lock, and whether the result is as asked.

Each stage decides by itself what it has to make (docs/architecture.md, "Done or not done"); here they are only
called in order.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from curate.config import BuildConfig, SelectConfig
from curate.errors import Busy, ConfigError, InputError, UnwantedResult
from curate.filters import parse_steps

logger = logging.getLogger("cliptailor")

LOCK = ".lock"
WRITTEN = (
    *("plan", "raw", "signals", "shards", "ledger.parquet"),
    *("report.html", "README.md", "report.json", "croissant.json", "manifest.json", "concepts.txt", "concepts.parquet"),
)


def build(config: BuildConfig, stages: Sequence[str] = ()) -> None:
    """Run the stages (all, if none is named) on `config.out`, and check what came out.

    Raises:
        CliptailorError: as the stages do; Busy, if another run holds the folder; UnwantedResult, if the images did not
            arrive or nothing was kept to train on.
    """
    chosen = [name for name in STAGES if name in stages] or list(STAGES)
    _check_filters(config, select="select" in chosen)
    if config.executor == "ray":
        from curate.executor import cluster

        cluster.check_installed()
    if "plan" in chosen and not config.urls:
        raise ConfigError(
            "--urls: needs a list of URLs: a parquet, csv, tsv, txt, json or jsonl file, a folder, or a glob"
        )
    with holding(config.out):
        for name in chosen:
            STAGES[name](config)
    if not {"select", "pack", "report"}.isdisjoint(chosen):
        check_books(config.out, config.select)


def _check_filters(config: BuildConfig, *, select: bool) -> None:
    """Tell mistakes in the filters and in what is measured before any work, not after an hour of download.

    Without `select`, what the filters name may still be on its way: a list of `curate concepts` comes after the plan.
    """
    steps = parse_steps(config.filters)
    if steps:
        from curate.expressions import check_measured

        check_measured(steps, config.measure)
    if steps and select:
        from curate.select import check_named

        check_named(steps)
    if config.measure.safety or config.measure.signals:
        from curate.measure import check

        check(config.measure)


def _plan(config: BuildConfig) -> None:
    from curate import plan
    from curate.signals import asked, columns_of

    signals = columns_of(asked(config.measure))
    result = plan.run(str(config.urls), config.out, config.plan, parse_steps(config.filters), signals)
    dropped = sum(result.dropped.values())
    changed = (
        f" ({result.new:,} new, {result.gone:,} gone)" if 0 < result.new < result.candidates or result.gone else ""
    )
    _say("plan", result.made, f"{result.rows:,} rows: {result.candidates:,} candidates{changed}, {dropped:,} dropped")
    if not result.candidates:
        why = _counts(_dropped_by_plan(config.out))
        raise UnwantedResult(f"{config.urls}: of {result.rows:,} rows none can be fetched: {why}")


def _dropped_by_plan(out: Path) -> dict[str, int]:
    """Rows that plan dropped, by reason; of a `where`, by the filter's name too."""
    import pyarrow.parquet as pq

    table = pq.read_table(out / "plan" / "dropped.parquet", columns=["reason", "step"])
    counts = table.group_by(["reason", "step"]).aggregate([([], "count_all")]).to_pylist()
    return {
        f"{count['reason']} '{count['step']}'" if count["reason"] == "where" else count["reason"]: count["count_all"]
        for count in counts
    }


def _fetch(config: BuildConfig) -> None:
    from curate import fetch

    _needs(config.out / "plan", "plan")
    result = fetch.run(config.out, config.fetch, retry_failed=config.retry_failed, executor=config.executor)
    arrived, total = result.counts.get("success", 0), sum(result.counts.values())
    failed = {reason: count for reason, count in result.counts.items() if reason != "success"}
    _say("fetch", bool(result.made), f"{arrived:,} of {total:,} images arrived")
    if total and (not arrived or arrived / total < config.fetch.min_yield):
        raise UnwantedResult(
            f"fetch: only {arrived:,} of {total:,} images arrived ({_counts(failed)}; by shard in "
            f"{config.out / 'raw'}/*_stats.json); --retry-failed asks again for those whose reason may pass"
        )


def _measure(config: BuildConfig) -> None:
    from curate import measure

    _needs(config.out / "raw", "fetch")
    result = measure.run(config.out, config.measure, executor=config.executor)
    what = f"{result.made:,} files of signals made, {result.reused:,} were there"
    _say("measure", bool(result.made), what)


def _select(config: BuildConfig) -> None:
    from curate import select

    _needs(config.out / "raw", "fetch")
    result = select.run(
        config.out, parse_steps(config.filters), config.select, config.pack, config.measure, config.seed
    )
    _say("select", result.made, _counts(result.kept))


def _pack(config: BuildConfig) -> None:
    from curate import pack

    _needs(config.out / "ledger.parquet", "select")
    result = pack.run(config.out, config.pack, config.seed, config.select)
    _say("pack", bool(result.made), f"{sum(result.samples.values()):,} samples")


def _report(config: BuildConfig) -> None:
    from curate import report

    _needs(config.out / "ledger.parquet", "select")
    result = report.run(config.out, config.report, effective(config), config.seed, config.select)
    _say("report", True, f"{result.path} ({result.size / 1e6:.1f} MB)")


STAGES: dict[str, Callable[[BuildConfig], None]] = {
    "plan": _plan,
    "fetch": _fetch,
    "measure": _measure,
    "select": _select,
    "pack": _pack,
    "report": _report,
}


def effective(config: BuildConfig) -> dict[str, Any]:
    """The configuration as plain data, as the manifest keeps it."""
    plain: dict[str, Any] = dataclasses.asdict(config)
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def check_books(out: Path, engine: SelectConfig) -> None:
    """Rows in = kept + dropped, each row once; and something was kept for the domain, not for `retain` alone.

    Raises:
        UnwantedResult: nothing was kept to train on.
        AssertionError: the books do not balance, which is a bug.
    """
    import pyarrow.parquet as pq

    from curate.database import SPILL, connect, files

    listed = json.loads((out / "plan" / "plan.json").read_text())["result"]["rows"]
    planned = sum(pq.read_metadata(path).num_rows for path in (out / "plan").glob("*.parquet"))
    ledger = out / "ledger.parquet"
    with connect(engine.memory_limit, engine.threads, out / SPILL, [ledger]) as db:
        ((rows, keys, kept, retained, dropped),) = db.execute(f"""
            SELECT count(*), count(DISTINCT key), count_if(kept), count_if(split = 'retain'), count(stage)
            FROM read_parquet({files([ledger])})""").fetchall()
    assert listed == planned == rows == kept + dropped, (
        f"{listed} rows in, {planned} planned, {kept} kept, {dropped} dropped"
    )
    assert keys == planned, "a row is in the ledger twice"
    if not kept:
        raise UnwantedResult(f"{out}: all {planned:,} rows were dropped; report.html and ledger.parquet show by what")
    if kept == retained:
        raise UnwantedResult(
            f"{out}: nothing was kept to train on: all {kept:,} pairs kept are in retain, off the topic; "
            "loosen the relevance step (keep, threshold)"
        )


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the lock of a dataset folder.

    Raises:
        Busy: another process holds it.
        ConfigError: it cannot be written to, or holds somebody else's files under the names of ours.
    """
    from filelock import FileLock, Timeout

    _spare_others(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be made a folder ({error.strerror})") from error
    owner = folder / ".owner"
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        pid = owner.read_text() if owner.exists() else "unknown"
        raise Busy(f"{folder}: process {pid} is building here; wait for it or stop it") from None
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written to ({error.strerror})") from error
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _spare_others(folder: Path) -> None:
    """Leave a folder alone whose files would be overwritten or deleted, if nothing in it says that a run made them.

    The lock stays when a run has ended, however it did; a dataset that was copied without it has Parquet files of ours.
    """
    if not folder.is_dir() or (folder / LOCK).exists():
        return
    there = [name for name in WRITTEN if (path := folder / name).exists() and not _is_empty(path)]
    if there and not _has_parquet_of_ours(folder):
        raise ConfigError(
            f"--out {folder}: is no dataset of curate and has {', '.join(there)}, which would be overwritten or "
            "deleted; name a new folder"
        )


def _is_empty(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def _has_parquet_of_ours(folder: Path) -> bool:
    from curate.files import made_from

    tables = ("ledger.parquet", "plan/*.parquet", "raw/*.parquet", "signals/*/*.parquet", "shards/*.parquet")
    return any(made_from(path) for table in tables for path in folder.glob(table))


def _needs(path: Path, stage: str) -> None:
    if not path.exists():
        raise InputError(f"{path}: not there; run `curate {stage}` (or `curate build`) first")


def _say(stage: str, made: bool, what: str) -> None:
    logger.info("%-8s%s%s", stage, what, "" if made else " (unchanged)")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(
        f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
