"""`curate inspect`: what became of the list, in the terminal: the funnel, splits, reasons, hosts, distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.ask.arguments import EngineOptions
from curate.ask.tables import in_order, open_tables, rows_of, step_names
from curate.database import column_types, quoted
from curate.report.definitions import define
from curate.shards import OFFSET_COLUMNS, SPLITS

if TYPE_CHECKING:
    import duckdb

MOST = 10
# Of user:password@host:port, as between :// and the path; an address of IPv6 keeps its brackets.
HOST = r"regexp_extract(site, '^(?:[^@]*@)?(\[[^\]]*\]|[^?#:]+)', 1)"
NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
# Numbers that are names, places or codes: their median says nothing.
NO_QUANTITY = frozenset((*OFFSET_COLUMNS, "row", "phash", "http_status", "source_offset", "source_size"))


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the funnel: rows it dropped, rows it moved to retain (they count as left), rows left after it."""

    stage: str
    step: str
    dropped: int
    retained: int
    left: int


@dataclass(frozen=True, slots=True)
class Overview:
    """What became of the list.

    Attributes:
        rows, kept: of the list; the others were dropped.
        funnel: the steps in the order in which a row meets them.
        splits: rows of each split that has any.
        reasons: (stage, reason, rows, definition), the most frequent first.
        hosts: (host, rows, kept, its most frequent reason), those with most rows first.
        distributions: (column, kept rows that have it, and its 5th percentile, median and 95th percentile over the
            kept rows; then the median over the dropped ones).
    """

    rows: int
    kept: int
    funnel: list[Step]
    splits: dict[str, int]
    reasons: list[tuple[str, str, int, str]]
    hosts: list[tuple[str, int, int, str | None]]
    distributions: list[tuple[str, int, float, float, float, float | None]]


def overview(out: Path, engine: EngineOptions) -> Overview:
    """Count a dataset folder.

    Raises:
        InputError: not a dataset folder, or nothing was selected yet.
    """
    with open_tables(out, engine) as db:
        rows, kept = db.execute("SELECT count(*), count_if(kept) FROM ledger").fetchall()[0]
        splits = dict(db.execute("SELECT split, count(*) FROM ledger WHERE kept GROUP BY split").fetchall())
        return Overview(
            rows,
            kept,
            funnel(db, "ledger", step_names(out)),
            {split: splits[split] for split in SPLITS if split in splits},
            _reasons(db),
            _hosts(db),
            _distributions(db),
        )


def funnel(db: duckdb.DuckDBPyConnection, ledger: str, names: Sequence[str]) -> list[Step]:
    """The steps of a ledger.

    Args:
        db: a database with the ledger.
        ledger: its table or view.
        names: of the filters, in their order; one that dropped nothing is a step all the same.
    """
    counts = {
        (line["stage"], line["step"]): line
        for line in rows_of(
            db,
            f"""SELECT CASE WHEN kept THEN 'select' ELSE stage END AS stage, step,
                count_if(NOT kept) AS dropped, count_if(kept) AS retained
            FROM {ledger} WHERE step IS NOT NULL GROUP BY ALL""",
        )
    }
    pushed = {step for stage, step in counts if stage == "plan"}
    idle = {("select", name) for name in names if name not in pushed}
    left, steps = db.execute(f"SELECT count(*) FROM {ledger}").fetchall()[0][0], []
    for place in in_order(list({("plan", "plan"), ("fetch", "fetch"), *idle, *counts}), names):
        found = counts.get(place, {"dropped": 0, "retained": 0})
        left -= found["dropped"]
        steps.append(Step(*place, found["dropped"], found["retained"], left))
    return steps


def _reasons(db: duckdb.DuckDBPyConnection) -> list[tuple[str, str, int, str]]:
    found = db.execute(f"""
        SELECT stage, reason, count(*) AS dropped FROM ledger WHERE NOT kept
        GROUP BY ALL ORDER BY dropped DESC, stage, reason LIMIT {MOST}""").fetchall()
    return [(stage, reason, dropped, define(reason)) for stage, reason, dropped in found]


def _hosts(db: duckdb.DuckDBPyConnection) -> list[tuple[str, int, int, str | None]]:
    return db.execute(f"""
        WITH counted AS (
            SELECT split_part(url, '/', 3) AS site, coalesce(reason, '') AS reason, count(*) AS n
            FROM ledger GROUP BY ALL
        ), named AS (SELECT lower({HOST}) AS host, reason, CAST(sum(n) AS BIGINT) AS n FROM counted GROUP BY ALL)
        SELECT host, CAST(sum(n) AS BIGINT) AS listed, CAST(coalesce(sum(n) FILTER (reason = ''), 0) AS BIGINT),
            arg_max(reason, (n, reason)) FILTER (reason <> '')
        FROM named WHERE host <> '' GROUP BY host ORDER BY listed DESC, host LIMIT {MOST}""").fetchall()


def _distributions(db: duckdb.DuckDBPyConnection) -> list[tuple[str, int, float, float, float, float | None]]:
    """Of every column of numbers that fetch or measure made, or of the packed samples where these are not here."""
    views = {name for (name,) in db.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()}
    found = []
    seen: set[str] = set()
    for view in ("raw", "signals") if "raw" in views else ("samples", "signals"):
        if view in views:
            names = [name for name in _quantities(column_types(db, view)) if name not in seen]
            seen.update(names)
            found += _quantiles(db, view, names)
    return found


def _quantities(types: dict[str, str]) -> list[str]:
    return [
        name
        for name, kind in types.items()
        if name not in NO_QUANTITY and (kind in (*NUMBERS, "FLOAT", "DOUBLE") or kind.startswith("DECIMAL"))
    ]


def _quantiles(
    db: duckdb.DuckDBPyConnection, view: str, names: Sequence[str]
) -> list[tuple[str, int, float, float, float, float | None]]:
    """One pass over a view; the quantiles are t-digests, right to about one percent of their rank."""
    if not names:
        return []
    values = [f"CAST({view}.{quoted(name)} AS DOUBLE)" for name in names]
    asked = ", ".join(
        f"count({x}) FILTER (kept), approx_quantile({x}, [0.05, 0.5, 0.95]) FILTER (kept AND isfinite({x})), "
        f"approx_quantile({x}, 0.5) FILTER (NOT kept AND isfinite({x}))"
        for x in values
    )
    (row,) = db.execute(f"SELECT {asked} FROM {view} JOIN ledger USING (key)").fetchall()
    found: list[tuple[str, int, float, float, float, float | None]] = []
    for place, name in enumerate(names):
        count, quantiles, dropped = row[3 * place : 3 * place + 3]
        if quantiles:
            found.append((name, count, *quantiles, dropped))
    return found


# --- in the terminal -------------------------------------------------------------------------------------------------


def shown(found: Overview, title: str) -> list[Any]:
    """The answer as tables and lines for `text.show`."""
    from curate.ask.text import table
    from curate.html import share

    steps = [
        (step.stage, step.step, step.dropped, step.left, share(step.left, found.rows), _moved(step))
        for step in found.funnel
    ]
    rows_in = ("list", "rows in", None, found.rows, share(found.rows, found.rows), "")
    kept = [(split, number, share(number, found.rows)) for split, number in found.splits.items()]
    answers: list[Any] = [
        table(("stage", "step", "dropped", "left", "share", ""), [rows_in, *steps], title, grouped=True),
        f"{found.rows:,} rows in = {found.kept:,} kept + {found.rows - found.kept:,} dropped\n",
        table(("split", "rows", "share of the list"), kept, "splits", grouped=True),
    ]
    if found.reasons:
        answers += [
            "",
            table(("stage", "reason", "rows", "what it means"), found.reasons, "why rows were dropped", grouped=True),
        ]
    if found.hosts:
        answers += [
            "",
            table(
                ("host", "rows", "kept", "most often dropped for"), found.hosts, "hosts with most rows", grouped=True
            ),
        ]
    if found.distributions:
        columns = ("column", "kept rows", "5 %", "median", "95 %", "median of dropped")
        answers += ["", table(columns, found.distributions, "values", grouped=True)]
    return answers


def _moved(step: Step) -> str:
    return f"{step.retained:,} moved to retain" if step.retained else ""
