"""A whole dataset folder, from list to manifest, without a network: what `curate build` leaves."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import report
from curate.cli import main
from curate.config import ReportConfig
from curate.files import write_parquet
from tests.curate.fetched import fetched, noise, pack_rows, row, select_rows

FILTERS: list[dict[str, Any]] = [
    {"name": "words", "where": "caption_words > 1"},
    {"name": "wide", "where": "width >= 60"},
    {"name": "exact", "dedup": {"by": "sha256", "keep": "row"}},
    {"name": "few", "sample": {"count": 34}},
]
# 60 rows: 0 to 39 are pictures of their own, 40 to 44 copies of 0 to 4, 45 to 47 narrow, 48 to 51 did not come,
# 52 to 54 have one word, 55 is 54 again, 56 to 59 are pictures of their own.
COPIES, NARROW, GONE, ONE_WORD, REPEATED = range(40, 45), range(45, 48), range(48, 52), range(52, 55), 55


def example_list() -> list[dict[str, Any]]:
    rows = [row(n, noise(n), shop=f"shop {n % 4}") for n in range(60)]
    for n in COPIES:
        rows[n]["rgb"] = noise(n - 40)
    for n in NARROW:
        rows[n]["rgb"] = noise(n, 40)
    for n in GONE:
        rows[n]["rgb"] = None
    for n in ONE_WORD:
        rows[n]["caption"] = "alone"
    rows[REPEATED] |= {"url": rows[54]["url"], "caption": "alone"}
    return rows


def build(
    out: Path,
    rows: list[dict[str, Any]] | None = None,
    filters: list[dict[str, Any]] | None = None,
    seed: int = 0,
    **pack: Any,
) -> Path:
    """Plan, store, measure (a made-up score), select, pack, report."""
    filters = FILTERS if filters is None else filters
    fetched(out, rows or example_list(), filters, shard_size=12)
    write_signals(out)
    shares = {"val": 0.2, "test": 0.2}
    select_rows(out, filters, seed=seed, **shares)
    pack = {**shares, "shard_size": 6, **pack}
    pack_rows(out, seed=seed, **pack)
    config = {"urls": "list.csv", "out": out, "seed": seed, "filters": filters, "pack": pack}
    report.run(out, ReportConfig(), config, seed)
    return out


def write_signals(out: Path) -> None:
    for path in (out / "raw").glob("*.parquet"):
        keys = [line["key"] for line in pq.read_table(path).to_pylist() if line["status"] == "success"]
        scores = pa.array([score(key) for key in keys], pa.float32())
        write_parquet(
            pa.table({"key": keys, "clip_score": scores}), out / "signals" / "clip" / path.name, made_from="raw"
        )


def score(key: str) -> float:
    return int(key[:4], 16) / 65536


def asked(*words: object, status: int = 0) -> str:
    """What `curate WORDS` prints to stdout; on an error (`status`), its one line on stderr."""
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        if not status:
            main([str(word) for word in words])
            return said.getvalue()
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
    assert stopped.value.code == status, wrong.getvalue()
    assert wrong.getvalue().count("\n") == 1
    return wrong.getvalue().removeprefix("curate: ").strip()
