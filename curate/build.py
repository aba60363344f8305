"""The road from a list to a dataset: the order of the stages, the folder's lock, and whether the result is as asked.

Each stage decides by itself what it has to make (docs/architecture.md, "Done or not done"); here they are only
called in order.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from curate.config import BuildConfig
from curate.errors import Busy, ConfigError, InputError, UnwantedResult
from curate.filters import parse_steps

logger = logging.getLogger("cliptailor")


def build(config: BuildConfig, stages: Sequence[str] = ()) -> None:
    """Run the stages (all, if none is named) on `config.out`, and check what came out.

    Raises:
        CliptailorError: as the stages do; Busy, if another run holds the folder; UnwantedResult, if the images did not
            arrive or nothing was kept.
    """
    parse_steps(config.filters)  # a mistake in them is told before any work
    chosen = [name for name in STAGES if name in stages] or list(STAGES)
    if "plan" in chosen and not config.urls:
        raise ConfigError(
            "--urls: needs a list of URLs: a parquet, csv, tsv, txt, json or jsonl file, a folder, or a glob"
        )
    with holding(config.out):
        for name in chosen:
            STAGES[name](config)
    if "report" in chosen:
        check_books(config.out)


def _plan(config: BuildConfig) -> None:
    from curate import plan

    result = plan.run(str(config.urls), config.out, config.plan, parse_steps(config.filters))
    dropped = sum(result.dropped.values())
    _say("plan", result.made, f"{result.rows:,} rows: {result.candidates:,} candidates, {dropped:,} dropped")
    if not result.candidates:
        raise UnwantedResult(f"{config.urls}: of {result.rows:,} rows none can be fetched: {_counts(result.dropped)}")


def _fetch(config: BuildConfig) -> None:
    from curate import fetch

    _needs(config.out / "plan", "plan")
    result = fetch.run(config.out, config.fetch)
    arrived, total = result.counts.get("success", 0), sum(result.counts.values())
    failed = {reason: count for reason, count in result.counts.items() if reason != "success"}
    _say("fetch", bool(result.made), f"{arrived:,} of {total:,} images arrived")
    if total and (not arrived or arrived / total < config.fetch.min_yield):
        _forget_empty_shards(config.out)
        raise UnwantedResult(
            f"fetch: only {arrived:,} of {total:,} images arrived ({_counts(failed)}); "
            "see the column reason in raw/*.parquet; the same command tries again"
        )


def _measure(config: BuildConfig) -> None:
    from curate import measure

    _needs(config.out / "raw", "fetch")
    result = measure.run(config.out, config.measure)
    what = f"{result.images:,} images" if config.measure.clip else "no CLIP asked for (measure.clip)"
    _say("measure", bool(result.made), what)


def _select(config: BuildConfig) -> None:
    from curate import select

    _needs(config.out / "raw", "fetch")
    result = select.run(
        config.out, parse_steps(config.filters), config.select, config.pack, config.measure.clip, config.seed
    )
    _say("select", result.made, _counts(result.kept) or "nothing kept")


def _pack(config: BuildConfig) -> None:
    from curate import pack

    _needs(config.out / "ledger.parquet", "select")
    result = pack.run(config.out, config.pack, config.seed)
    _say("pack", bool(result.made), f"{sum(result.samples.values()):,} samples")


def _report(config: BuildConfig) -> None:
    from curate import report

    _needs(config.out / "ledger.parquet", "select")
    result = report.run(config.out, config.report, effective(config), config.seed)
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


def check_books(out: Path) -> None:
    """Rows in = kept + dropped, each row once; and something was kept.

    Raises:
        UnwantedResult: nothing was kept.
        AssertionError: the books do not balance, which is a bug.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    ledger = pq.read_table(out / "ledger.parquet", columns=["key", "kept", "stage", "step"])
    planned = sum(pq.read_metadata(path).num_rows for path in (out / "plan").glob("*.parquet"))
    kept = pc.sum(ledger["kept"]).as_py() or 0
    dropped = pc.sum(pc.is_valid(ledger["stage"])).as_py() or 0
    assert planned == ledger.num_rows == kept + dropped, f"{planned} rows in, {kept} kept, {dropped} dropped"
    assert pc.count_distinct(ledger["key"]).as_py() == planned, "a row is in the ledger twice"
    if not kept:
        raise UnwantedResult(f"{out}: all {planned:,} rows were dropped; {out / 'report.html'} shows by what")


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the lock of a dataset folder.

    Raises:
        Busy: another process holds it.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be made a folder ({error.strerror})") from error
    owner = folder / ".owner"
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        pid = owner.read_text() if owner.exists() else "unknown"
        raise Busy(f"{folder}: process {pid} is building here; wait for it or stop it") from None
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _forget_empty_shards(out: Path) -> None:
    """After an outage: raw shards in which nothing arrived are removed, so that the next run asks for them again."""
    import pyarrow.parquet as pq

    for path in (out / "raw").glob("*.parquet"):
        if "success" not in pq.read_table(path, columns=["status"])["status"].to_pylist():
            path.unlink()


def _needs(path: Path, stage: str) -> None:
    if not path.exists():
        raise InputError(f"{path}: not there; run `curate {stage}` (or `curate build`) first")


def _say(stage: str, made: bool, what: str) -> None:
    logger.info("%-8s%s%s", stage, what, "" if made else " (unchanged)")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(
        f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
