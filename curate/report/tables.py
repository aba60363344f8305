"""The dataset's files as tables that the report's figures are counted from, and the SQL that counted each of them.

Every query runs over `ledger`, `raw` or `rows`, and is kept under its figure's name, so that `report.json` can tell a
reader how to get the same number from the files: `TABLES` and `ROWS` there are what ran here, with the files' names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.config import SelectConfig
from curate.database import (
    SPILL,
    column_types,
    connect,
    create_in_parts,
    enough_memory,
    files,
    parts,
    quoted,
    scalar,
)
from curate.errors import InputError
from curate.report.thumbnails import Thumbnails
from curate.signals import EMBEDDINGS, GROUPS, files_of, groups_there

if TYPE_CHECKING:
    import duckdb

# What is read of each stage's files beside what the filters name.
COLUMNS = {
    "planned": ("key", "row", "caption_words", "license", "licence", "rights"),
    "raw": (
        *("key", "row", "url_host", "status", "reason", "original_width", "original_height", "aspect", "http_status"),
        *("entropy", "blur", "image_offset", "image_size", "filename"),
    ),
    "signals": ("key", "clip_score", "language", "language_score", "letter_share", "nsfw"),
}
LICENCES = ("license", "licence", "rights")
TEXTS = ("url", "caption", "duplicate_group")
MEASURED_ON = 1_000_000  # rows that a quantile is taken of
NUMBERS = ("INTEGER", "BIGINT", "FLOAT", "DOUBLE")


@dataclass
class Tables:
    """A locked database with view `ledger` and tables `raw` and `rows`.

    Attributes:
        db: `rows` has a line for each row of the ledger, without its long texts, with its plan's, raw shard's and
            signals' columns beside it, and `dice`, a seeded random number.
        sql: name of a figure → the query that counted it.
        views: name → the statement that makes it from the dataset's folder.
        embedded: the files with image embeddings.
        own: the columns of the user's own signals that are numbers.
        thumbnails: small pictures, of this report and the last one.
    """

    db: duckdb.DuckDBPyConnection
    thumbnails: Thumbnails
    sql: dict[str, str] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    embedded: list[Path] = field(default_factory=list)
    own: list[str] = field(default_factory=list)

    def ask(self, figure: str, query: str) -> list[tuple[Any, ...]]:
        """The result of a query, which is remembered as where the figure comes from."""
        query = " ".join(query.split())
        self.sql[figure] = query
        return list(self.db.execute(query).fetchall())

    @cached_property
    def some(self) -> str:
        """SQL that holds for about MEASURED_ON rows, by the dice; for all of no more."""
        every = max(1, scalar(self.db, "SELECT count(*) FROM rows") // MEASURED_ON)
        return f"dice % {every} = 0"

    def texts(self, keys: Iterable[str], url: int, caption: int) -> dict[str, tuple[str | None, str | None]]:
        """By key: the ledger's URL and caption, cut to these lengths, of those of the keys that it has."""
        query = f"SELECT key, left(url, {url}), left(caption, {caption}) FROM ledger WHERE key IN (SELECT unnest(?))"
        return {key: (found, text) for key, found, text in self.db.execute(query, [sorted(keys)]).fetchall()}

    def columns(self, table: str = "rows") -> dict[str, str]:
        """Name → DuckDB type of the columns of a table; none if it is not there."""
        found = self.db.execute(
            "SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = ? ORDER BY column_index", [table]
        ).fetchall()
        return dict(found)


@contextmanager
def open_tables(out: Path, engine: SelectConfig, wanted: Sequence[str], seed: int) -> Iterator[Tables]:
    """The tables of a dataset folder, within the memory that `engine` allows; beyond it they spill to disk.

    Args:
        out: the dataset folder.
        engine: limits of the database.
        wanted: columns to load, beside those the report always shows.
        seed: of `dice`.

    Raises:
        InputError: no ledger: nothing was selected yet.
        ConfigError: memory_limit is too small.
    """
    ledger = out / "ledger.parquet"
    if not ledger.exists():
        raise InputError(f"{ledger}: not there; run 'curate build' or 'curate select' on {out} first")
    sources = _sources(out)
    folders = sorted({path.parent for some in sources.values() for path in some})
    with (
        enough_memory(engine.memory_limit),
        connect(engine.memory_limit, engine.threads, out / SPILL, [ledger, *folders]) as db,
    ):
        tables = Tables(db, Thumbnails(out))
        db.execute(f"CREATE VIEW ledger AS FROM read_parquet({files([ledger])})")
        tables.views["ledger"] = "CREATE VIEW ledger AS FROM read_parquet('ledger.parquet')"
        for name, some in sources.items():
            _load(tables, out, name, some, wanted)
        _join(tables, [name for name in sources if name != "planned"], wanted, seed)
        yield tables


def _sources(out: Path) -> dict[str, list[Path]]:
    """The files of each table, as far as they are there: planned, raw, and each group of signals."""
    found = {
        "planned": [*numbered(out / "plan"), *(out / "plan").glob("dropped.parquet")],
        "raw": numbered(out / "raw"),
    }
    found |= {f"signals_{group}": files_of(out, group) for group in groups_there(out)}
    return {name: some for name, some in found.items() if some}


def numbered(folder: Path) -> list[Path]:
    """The Parquet files of a stage, `00000.parquet` …, sorted."""
    return sorted(path for path in folder.glob("*.parquet") if path.stem.isdigit())


def _load(tables: Tables, out: Path, name: str, some: list[Path], wanted: Sequence[str]) -> None:
    there = column_types(tables.db, f"read_parquet({files(some[:1])}, filename = true)")
    stage, _, group = name.partition("_")
    always, named = set(COLUMNS[stage]), {column.lower() for column in wanted}
    if group and group not in GROUPS:  # a signal of the user's own: each of its numbers is shown
        own = [column for column, kind in there.items() if kind in NUMBERS]
        tables.own += own
        always = {"key", *own}
    chosen = [column for column in there if column in always or (column.lower() in named and column not in EMBEDDINGS)]
    listed = ", ".join(_as_decimal(quoted(column), there[column]) for column in chosen)
    queries = (f"SELECT {listed} FROM read_parquet({files(part)}, filename = true)" for part in parts(some))
    create_in_parts(tables.db, name, queries)
    pattern = (some[0].parent.relative_to(out) / "*.parquet").as_posix()
    tables.views[name] = (
        f"CREATE VIEW {quoted(name)} AS SELECT {listed} "
        f"FROM read_parquet('{pattern}', filename = true, union_by_name = true)"
    )
    if EMBEDDINGS[0] in there:
        tables.embedded = some


def _as_decimal(column: str, kind: str) -> str:
    """A FLOAT as the double of its shortest decimal, so that its 0.7 equals the 0.7 of a filter."""
    return f"CAST(CAST({column} AS VARCHAR) AS DOUBLE) AS {column}" if kind == "FLOAT" else column


def _join(tables: Tables, names: Sequence[str], wanted: Sequence[str], seed: int) -> None:
    """Make `rows`; a column that two tables have is the ledger's, then the plan's, then the raw shard's.

    Its long texts stay in the ledger, unless a filter names them: they are most of its bytes, and few are shown.
    """
    ledger = list(column_types(tables.db, "ledger"))
    taken = {name.lower() for name in ledger}
    named = {column.lower() for column in wanted}
    chosen = [f"ledger.{quoted(name)}" for name in ledger if name not in TEXTS or name in named]
    chosen.append(f"md5_number_lower('{seed} ' || ledger.key) AS dice")
    joined = []
    for name in ["planned", *names]:
        fresh = [column for column in tables.columns(name) if column.lower() not in {*taken, "filename", "dice"}]
        if name in tables.views:
            chosen += [f"{quoted(name)}.{quoted(column)}" for column in fresh]
            by = "row" if "row" in tables.columns(name) else "key"  # numbers are joined in half the time of texts
            joined.append(f'LEFT JOIN {quoted(name)} ON ledger."{by}" = {quoted(name)}."{by}"')
            taken |= {column.lower() for column in fresh}
    select = f"SELECT {', '.join(chosen)} FROM ledger {' '.join(joined)}"
    tables.views["rows"] = f"CREATE VIEW rows AS {select}"
    tables.db.execute(f"CREATE TABLE rows AS {select}")
    for name in ["planned", *names]:
        if name in tables.views and name != "raw":
            tables.db.execute(f"DROP TABLE {quoted(name)}")
