"""Every figure of the report, counted by DuckDB over the dataset's Parquet files: `report.json` is this.

Nothing row by row comes into Python but the samples that are shown (`curate.report.samples`), so memory does not grow
with the dataset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from curate.charts import nice_step
from curate.database import SPILL, column_types, connect, create_in_parts, files, parts
from curate.errors import InputError
from curate.report.definitions import STAGES, define
from curate.shards import SPLITS
from curate.signals import beside, files_of, groups_there

if TYPE_CHECKING:
    import duckdb

BINS = 32
TOP_HOSTS = 15
TOP_CAPTIONS = 12
LONGEST_CAPTION = 300

# What is read of each stage's files.
COLUMNS = {
    "planned": ("key", "caption_words"),
    "raw": (
        *("key", "url_host", "status", "reason", "original_width", "original_height", "aspect"),
        *("image_offset", "image_size", "filename"),
    ),
    "signals": ("key", "clip_score"),
}
FETCHED = "raw JOIN ledger USING (key) WHERE raw.status = 'success' AND (ledger.kept OR ledger.stage = 'select')"
# A caption is judged before or after the download: whoever failed to download says nothing about it.
JUDGED = "planned JOIN ledger USING (key) WHERE ledger.kept OR ledger.stage = 'select' OR ledger.reason = 'where'"


@dataclass(frozen=True)
class Distribution:
    """A histogram to draw: which column, over which rows."""

    name: str
    title: str
    unit: str
    column: str
    view: str
    rows: str


DISTRIBUTIONS = (
    Distribution(
        "short_side",
        "Shorter side of the original",
        "px",
        "least(raw.original_width, raw.original_height)",
        "raw",
        FETCHED,
    ),
    Distribution("aspect", "Aspect (long side / short side)", "", "raw.aspect", "raw", FETCHED),
    Distribution("caption_words", "Caption length", "words", "planned.caption_words", "planned", JUDGED),
    Distribution(
        "clip_score",
        "CLIP score (cosine of image and caption)",
        "",
        "signals.clip_score",
        "signals",
        "signals JOIN ledger USING (key) WHERE true",
    ),
)


# --- the tables ------------------------------------------------------------------------------------------------------


def open_tables(out: Path) -> duckdb.DuckDBPyConnection:
    """A database with what is counted: view `ledger`, and tables `planned`, `raw` and `signals` of what is there.

    The tables hold the columns in COLUMNS, as far as the files have them; they spill to disk where they must.

    Raises:
        InputError: no ledger: nothing was selected yet.
    """
    ledger = out / "ledger.parquet"
    if not ledger.exists():
        raise InputError(f"{ledger}: not there; run 'curate build' or 'curate select' on {out} first")
    paths = {
        "planned": [*numbered(out / "plan"), *(out / "plan").glob("dropped.parquet")],
        "raw": numbered(out / "raw"),
    }
    folders = [some[0].parent for some in paths.values() if some]
    database = connect("2GB", 0, out / SPILL, [ledger, *folders, *([out / "signals"] if groups_there(out) else [])])
    database.execute(f"CREATE VIEW ledger AS FROM read_parquet({files([ledger])})")
    for name, some in paths.items():
        if some:
            there = column_types(database, f"read_parquet({files(some[:1])}, filename = true)")
            wanted = ", ".join(column for column in COLUMNS[name] if column in there)
            queries = (f"SELECT {wanted} FROM read_parquet({files(part)}, filename = true)" for part in parts(some))
            create_in_parts(database, name, queries)
    _load_signals(database, out)
    return database


def _load_signals(database: duckdb.DuckDBPyConnection, out: Path) -> None:
    """Table `signals`: what was measured of each image, and is shown."""
    groups = groups_there(out)
    if groups:
        paths = files_of(out, groups[0])
        sources = [
            beside(f"(SELECT key FROM read_parquet({files(part)}))", out, [path.stem for path in part], groups)
            for part in parts(paths)
        ]
        there = column_types(database, sources[0])
        wanted = ", ".join(column for column in COLUMNS["signals"] if column in there)
        create_in_parts(database, "signals", (f"SELECT {wanted} FROM {source}" for source in sources))


def numbered(folder: Path) -> list[Path]:
    """The Parquet files of a stage, `00000.parquet` …, sorted."""
    return sorted(path for path in folder.glob("*.parquet") if path.stem.isdigit())


def columns(database: duckdb.DuckDBPyConnection, view: str) -> list[str]:
    """The columns of a view; none if it is not there."""
    found = database.execute("SELECT column_name FROM duckdb_columns() WHERE table_name = ?", [view]).fetchall()
    return [name for (name,) in found]


# --- the figures -----------------------------------------------------------------------------------------------------


def count_all(database: duckdb.DuckDBPyConnection, filters: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All figures as JSON-ready data.

    Args:
        database: from `open_tables`.
        filters: the `filters` of the configuration, for the order and the wording of the steps.
    """
    rows, kept = _one(database, "SELECT count(*), count(*) FILTER (kept) FROM ledger")
    reasons = _reasons(database)
    return {
        "rows": rows,
        "kept": kept,
        "dropped": rows - kept,
        "images": _one(database, "SELECT count(*) FROM raw WHERE status = 'success'")[0]
        if columns(database, "raw")
        else 0,
        "splits": _splits(database),
        "funnel": _funnel(rows, reasons, _retained(database), filters),
        "reasons": reasons,
        "distributions": {
            wanted.name: figures for wanted in DISTRIBUTIONS if (figures := _histogram(database, wanted))
        },
        "hosts": _hosts(database),
        "captions": _captions(database),
    }


def _one(database: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    row = database.execute(query).fetchone()
    assert row is not None
    return row


def _splits(database: duckdb.DuckDBPyConnection) -> dict[str, int]:
    counts = dict(database.execute("SELECT split, count(*) FROM ledger WHERE kept GROUP BY split").fetchall())
    return {split: counts.get(split, 0) for split in SPLITS}


def _reasons(database: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    query = """
        SELECT stage, step, reason, count(*) AS dropped FROM ledger WHERE NOT kept
        GROUP BY stage, step, reason ORDER BY dropped DESC, stage, step, reason
    """
    return [
        {"stage": stage, "step": step, "reason": reason, "definition": define(reason), "dropped": dropped}
        for stage, step, reason, dropped in database.execute(query).fetchall()
    ]


def _retained(database: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """By step: the rows that it moved into the split retain."""
    return dict(database.execute("SELECT step, count(*) FROM ledger WHERE split = 'retain' GROUP BY step").fetchall())


def _funnel(
    rows: int, reasons: Sequence[dict[str, Any]], retained: dict[str, int], filters: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The stages and steps in the order in which a row meets them: what each dropped, moved to retain, and left.

    What lies in retain is kept, so it counts as left.
    """
    dropped: dict[tuple[str, str], int] = {}
    for entry in reasons:
        place = (entry["stage"], entry["step"])
        dropped[place] = dropped.get(place, 0) + entry["dropped"]
    left, funnel = rows, []
    for stage, step, what in _places(dropped, filters):
        gone, moved = dropped.get((stage, step), 0), retained.get(step, 0) if stage == "select" else 0
        left -= gone
        funnel.append({"stage": stage, "step": step, "what": what, "dropped": gone, "retained": moved, "left": left})
    return funnel


def _places(dropped: dict[tuple[str, str], int], filters: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    said = {str(step.get("name")): describe(step) for step in filters}
    pushed = [("plan", name, what) for name, what in said.items() if ("plan", name) in dropped]
    selected = [
        ("select", name, what)
        for name, what in said.items()
        if ("plan", name) not in dropped or ("select", name) in dropped
    ]
    known = [("plan", "plan", STAGES["plan"]), *pushed, ("fetch", "fetch", STAGES["fetch"]), *selected]
    there = {(stage, step) for stage, step, _ in known}
    # A ledger made with other filters than those given: its steps are still counted.
    return known + [(stage, step, "") for stage, step in sorted(dropped) if (stage, step) not in there]


def describe(step: dict[str, Any]) -> str:
    """A filter in one line, as it stands in the configuration: `width >= 200`, `dedup {by: sha256}`."""
    rest = {key: value for key, value in step.items() if key != "name"}
    if "where" in rest:
        return str(rest["where"])
    written = yaml.safe_dump(rest, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return written.strip().removeprefix("{").removesuffix("}").replace(": {", " {", 1)


# --- distributions ---------------------------------------------------------------------------------------------------


def _histogram(database: duckdb.DuckDBPyConnection, wanted: Distribution) -> dict[str, Any] | None:
    """Kept and dropped rows over bins of round width; all above the 99.5th percentile are in the last bin."""
    if wanted.column.rpartition(".")[2].rstrip(")") not in columns(database, wanted.view):
        return None
    x = f"CAST({wanted.column} AS DOUBLE)"
    # The join is made once; the table of one byte and one number a row spills to disk where it must.
    database.execute(
        f"CREATE OR REPLACE TEMP TABLE drawn AS SELECT ledger.kept, {x} AS x FROM {wanted.rows} AND isfinite({x})"
    )
    low, most, high, whole = _one(
        database, "SELECT min(x), max(x), quantile_cont(x, 0.995), coalesce(bool_and(x = floor(x)), false) FROM drawn"
    )
    if low is None:
        return None
    edges = bin_edges(low, high, whole)
    query = """
        SELECT kept, greatest(0, least(?, CAST(floor((x - ?) / ?) AS BIGINT))) AS bin, count(*)
        FROM drawn GROUP BY kept, bin
    """
    counts = {True: [0] * (len(edges) - 1), False: [0] * (len(edges) - 1)}
    for kept, number, amount in database.execute(query, [len(edges) - 2, edges[0], edges[1] - edges[0]]).fetchall():
        counts[kept][number] = amount
    figures = {
        "title": wanted.title,
        "unit": wanted.unit,
        "edges": edges,
        "kept": counts[True],
        "dropped": counts[False],
    }
    return {**figures, "min": low, "max": most}


def bin_edges(low: float, high: float, whole: bool) -> list[float]:
    """Bounds of at most `BINS` + 1 bins of a round width that hold [low, high]; at least 1 where values are whole."""
    spread = high - low > max(
        1e-9 * abs(low), 1e-9 * abs(high), 1e-300
    )  # else they are one value, with a rounding error
    step = nice_step(high - low, BINS) if spread else 1.0
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.floor(high / step + 1e-9) + 1
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


# --- hosts and captions ----------------------------------------------------------------------------------------------


def _hosts(database: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """The hosts most rows were fetched from, how many of them came, and what went wrong most often."""
    if not {"url_host", "status", "reason"} <= set(columns(database, "raw")):
        return {"hosts": 0, "top": []}
    query = """
        SELECT url_host, count(*) AS rows, count(*) FILTER (status = 'success') AS images FROM raw
        WHERE url_host IS NOT NULL GROUP BY url_host ORDER BY rows DESC, url_host LIMIT ?
    """
    top = database.execute(query, [TOP_HOSTS]).fetchall()
    worst = _worst_reasons(database, [host for host, _, _ in top])
    return {
        "hosts": _one(database, "SELECT count(DISTINCT url_host) FROM raw")[0],
        "top": [{"host": host, "rows": rows, "images": images, "worst": worst.get(host)} for host, rows, images in top],
    }


def _worst_reasons(database: duckdb.DuckDBPyConnection, hosts: Sequence[str]) -> dict[str, str]:
    query = """
        SELECT url_host, reason FROM raw WHERE reason IS NOT NULL AND list_contains(?, url_host)
        GROUP BY url_host, reason ORDER BY count(*), reason DESC
    """
    return dict(database.execute(query, [list(hosts)]).fetchall())  # the last of a host is its most frequent


def _captions(database: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """How many different captions the kept pairs have, and the most common ones."""
    query = f"""
        SELECT left(caption, {LONGEST_CAPTION}), count(*) AS n FROM ledger WHERE kept AND caption IS NOT NULL
        GROUP BY caption HAVING n > 1 ORDER BY n DESC, caption LIMIT {TOP_CAPTIONS}
    """
    return {
        "different": _one(database, "SELECT count(DISTINCT caption) FROM ledger WHERE kept")[0],
        "top": [{"caption": caption, "count": n} for caption, n in database.execute(query).fetchall()],
    }
