"""Any list of URLs and captions → candidates with stable keys, before any request.

The list is read by DuckDB, out of core. A row's key is a hash of its URL and caption, so it stays the same wherever
the row stands in whichever file. Empty and broken URLs and repeated (URL, caption) pairs are dropped here, and so is
whatever the first `where` filters can decide without an image. The rest is spread over files by a hash of the URL:
the rows of one host come in all files (so that no one host holds a shard up), rows of one URL in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import duckdb

from curate.config import PlanConfig, SelectConfig
from curate.database import SPILL, arrow_batches, arrow_table, column_types, connect, quoted, scalar
from curate.errors import InputError
from curate.expressions import (
    FETCH_COLUMNS,
    PLAN_COLUMNS,
    SIGNAL_COLUMNS,
    check_steps,
    drop_where,
    step_expressions,
    watch_drops,
)
from curate.filters import Step, Where
from curate.lists import ListColumns, ListFiles, choose_columns, find_list, readable_list, reader
from curate.progress import progress
from curate.shards import (
    OFFSET_COLUMNS,
    file_sha256,
    fingerprint,
    made_from,
    shard_name,
    sweep,
    write_batches,
    write_parquet,
)

FORMAT = 1

# Names that a column of the list may not take.
RESERVED = frozenset(
    (
        *(*PLAN_COLUMNS, *FETCH_COLUMNS, *SIGNAL_COLUMNS, *OFFSET_COLUMNS),
        *("image_embedding", "text_embedding"),
        *("kept", "split", "stage", "step", "twin", "duplicate_group"),
        *("base_", "problem_", "nth_", "file_"),  # of this module's own tables
        *("kept_", "tar_", "split_", "place_", "filename"),  # of select's, pack's and report's
    )
)

# White space and the marks that editors leave at a line's ends.
_BLANK = r"[\s\p{Z}\x{FEFF}\x{200B}]+"
_WORD = r"[^\s\p{Z}]+"
_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@\\]*@)?(\[[^\]/?#]+\]|[^/?#:@\\]+)"
_OTHER_SCHEME = r"^([A-Za-z][A-Za-z0-9+.-]*):(?://)"
# Schemes that are written without // too; `example.com:80/a.jpg` must not count as one.
_BARE_SCHEME = r"^(data|file|javascript|mailto|blob|about|ftp|cid):"


@dataclass(frozen=True, slots=True)
class PlanResult:
    """What `run` found.

    Attributes:
        rows: rows of the list.
        candidates: rows to fetch.
        dropped: rows dropped here, by reason; rows = candidates + all of these.
        made: whether files were written; False if all were there and up to date.
    """

    rows: int
    candidates: int
    dropped: dict[str, int]
    made: bool


def run(urls: str, out: Path, config: PlanConfig, steps: Sequence[Step]) -> PlanResult:
    """Write `out/plan/NNNNN.parquet` and `out/plan/dropped.parquet`; see docs/architecture.md for their columns.

    Args: urls: a list file, a folder of them, or a glob. out: the dataset's folder. config: names of columns,
        candidates a file. steps: all filter steps; each is checked, and the `where` steps before any other kind that
        need only the list's columns are applied.

    Raises:
        InputError: the list cannot be read, or has no rows.
        ConfigError: a column or an expression in the configuration is wrong.
    """
    folder = out / "plan"
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    source = find_list(urls)
    engine = SelectConfig()
    with connect(engine.memory_limit, engine.threads, out / SPILL, source.paths) as db:
        table = reader(db, source)
        with readable_list(source):
            types = column_types(db, table)
        columns = choose_columns(types, source, config, RESERVED)
        pushed = _pushed(db, steps, {**PLAN_COLUMNS, **columns.types})
        inputs = _inputs(source, config, pushed)
        if (found := _finished(folder, inputs)) is not None:
            return _count(found, made=False)
        _load(db, source, table, columns)
        for step in pushed:
            drop_where(db, step, stage="plan", columns=[*PLAN_COLUMNS, *columns.types])
        return _count(_write(db, folder, [*PLAN_COLUMNS, *columns.types], config.shard_size, inputs), made=True)


def _pushed(db: duckdb.DuckDBPyConnection, steps: Sequence[Step], types: dict[str, str]) -> list[Where]:
    """Check all steps; give those that can be decided before the download without changing what comes out."""
    every = {**FETCH_COLUMNS, **SIGNAL_COLUMNS, **types}
    check_steps(db, steps, every)
    first = [step for step in takewhile(lambda step: isinstance(step, Where), steps) if isinstance(step, Where)]
    return [step for step in first if set(step_expressions(db, step, every)[0].columns) <= types.keys()]


def _inputs(source: ListFiles, config: PlanConfig, pushed: Sequence[Where]) -> tuple[object, ...]:
    """All that the plan's files depend on, but their number."""
    content = [(file_sha256(path), path.stat().st_size) for path in source.paths]
    return ("plan", FORMAT, source.kind, content, asdict(config), [asdict(step) for step in pushed])


def _finished(folder: Path, inputs: tuple[object, ...]) -> list[Path] | None:
    """The plan's files if all are there and up to date; how many there are is part of what each was made from."""
    found = sorted(folder.glob("[0-9]*.parquet"))
    expected = fingerprint(*inputs, len(found))
    dropped = folder / "dropped.parquet"
    return [*found, dropped] if all(made_from(path) == expected for path in [*found, dropped]) else None


def _load(db: duckdb.DuckDBPyConnection, source: ListFiles, table: str, columns: ListColumns) -> None:
    """Read the list into table `rows`, and note the rows that are no candidates in `drops`."""
    carried = "".join(f", {sql} AS {quoted(name)}" for name, sql in columns.carried.items())
    names = "".join(f", {quoted(name)}" for name in columns.carried)
    with readable_list(source):
        db.execute(f"""
            CREATE TABLE rows AS
            SELECT CASE WHEN nth_ = 1 THEN base_ ELSE base_ || '-' || nth_ END AS key, row, url, caption, url_host,
                length(caption) AS caption_chars, len(regexp_extract_all(caption, '{_WORD}')) AS caption_words{names},
                base_, problem_, nth_
            FROM (
                -- Good rows come first, so the first good row of a pair has the bare key.
                SELECT *, row_number() OVER (PARTITION BY base_ ORDER BY problem_ IS NOT NULL, row) AS nth_
                FROM (
                    SELECT *, left(sha256(url || chr(10) || caption), 20) AS base_,
                        lower(regexp_extract(url, '{_HOST}', 1)) AS url_host, {_problem()} AS problem_
                    FROM (
                        SELECT row_number() OVER () - 1 AS row, {_stripped(columns.url)} AS url,
                            coalesce({columns.caption}, '') AS caption{carried}
                        FROM {table}
                    )
                )
            )""")
    if not scalar(db, "SELECT count(*) FROM rows"):
        raise InputError(f"{source.name}: has no rows")
    watch_drops(db)
    db.execute(f"""
        INSERT INTO drops
        SELECT row, 'plan', 'plan', coalesce(problem_, 'duplicate_row'),
            CASE problem_ WHEN 'bad_url' THEN left(url, 120) WHEN 'blocked_scheme' THEN {_scheme()} END,
            CASE WHEN problem_ IS NULL THEN base_ END
        FROM rows WHERE problem_ IS NOT NULL OR nth_ > 1""")


def _stripped(url: str) -> str:
    return f"regexp_replace(coalesce({url}, ''), '^{_BLANK}|{_BLANK}$', '', 'g')"


def _scheme() -> str:
    with_slashes = f"nullif(regexp_extract(url, '{_OTHER_SCHEME}', 1), '')"
    return f"lower(coalesce({with_slashes}, regexp_extract(url, '{_BARE_SCHEME}', 1, 'i')))"


def _problem() -> str:
    """SQL: why a URL cannot be fetched, or NULL."""
    return f"""CASE WHEN url = '' THEN 'empty_url'
        WHEN {_scheme()} NOT IN ('', 'http', 'https') THEN 'blocked_scheme'
        WHEN {_scheme()} = '' OR NOT regexp_matches(url, '{_HOST}') THEN 'bad_url'
        WHEN regexp_matches(url, '[\\x00-\\x1F]') THEN 'bad_url' END"""


def _write(
    db: duckdb.DuckDBPyConnection, folder: Path, names: Sequence[str], shard_size: int, inputs: tuple[object, ...]
) -> list[Path]:
    """Write the plan's files, one in memory at a time; `dropped.parquet` last, stale files before it removed."""
    columns = ", ".join(quoted(name) for name in names)
    num_files = -(-scalar(db, "SELECT count(*) FROM alive") // shard_size)
    made = fingerprint(*inputs, num_files)
    db.execute(f"""
        CREATE TABLE candidates AS
        SELECT {columns}, CAST(md5_number(url) % {max(1, num_files)} AS INTEGER) AS file_
        FROM alive ORDER BY file_, key""")
    paths = [folder / f"{shard_name(index)}.parquet" for index in range(num_files)]
    for stale in set(folder.glob("[0-9]*.parquet")) - set(paths):
        stale.unlink()
    with progress("plan", num_files) as advance:
        for index, path in enumerate(paths):
            query = f"SELECT {columns} FROM candidates WHERE file_ = {index} ORDER BY key"
            write_parquet(arrow_table(db, query), path, made_from=made)
            advance()
    dropped = folder / "dropped.parquet"
    query = f"""SELECT {columns}, step, reason, value, twin FROM rows JOIN drops USING (row) ORDER BY row"""
    batches = arrow_batches(db, query)
    write_batches(batches, batches.schema, dropped, made_from=made)
    return [*paths, dropped]


def _count(paths: Sequence[Path], *, made: bool) -> PlanResult:
    """Count what the files hold; the last of them is `dropped.parquet`."""
    import pyarrow.parquet as pq

    candidates = sum(pq.read_metadata(path).num_rows for path in paths[:-1])
    dropped = pq.read_table(paths[-1], columns=["reason"])["reason"].value_counts().to_pylist()
    by_reason = {count["values"]: count["counts"] for count in sorted(dropped, key=lambda count: count["values"])}
    return PlanResult(candidates + sum(by_reason.values()), candidates, by_reason, made)
