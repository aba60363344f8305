"""`curate sql`: one query over the tables of a dataset folder, in a database that can read these and no more."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from typing import IO, TYPE_CHECKING, Any

import duckdb

from curate.ask.arguments import SqlOptions
from curate.ask.tables import TABLES, open_tables
from curate.database import arrow_batches
from curate.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_ROWS = 100
_COLUMN = re.compile(r'column (?:named )?"([^"]+)"')
_HINT = re.compile(r'Did you mean "[^"]+"\?')
_TABLE = re.compile(r"Table with name (\S+) does not exist")


@dataclass(frozen=True, slots=True)
class Answer:
    """Rows as they come: the columns' names, each once, and the batches of rows, which have them too."""

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]


@contextmanager
def answer(query: str, options: SqlOptions) -> Iterator[Answer]:
    """The rows that a query gives, as a stream; they must be read within the `with` block.

    Args:
        query: one SELECT (or FROM …, WITH …, DESCRIBE, SUMMARIZE, SHOW TABLES) over ledger, planned, raw, signals and
            samples.
        options: folder, limits.

    Raises:
        ConfigError: the query is wrong, needs what is not allowed, or does not end within the limits; also while the
            rows are read.
        InputError: not a dataset folder.
    """
    with open_tables(options.out, options) as db:
        try:
            _check(db, query)
            with _interrupted_after(db, options.time_limit_s):
                reader = arrow_batches(db, query)
                names = _unique(reader.schema.names)
                schema = reader.schema.empty_table().rename_columns(names).schema
                yield Answer(schema, _batches(db, reader, names, options))
        except duckdb.Error as error:
            raise _told(db, str(error), options) from error


def _batches(
    db: duckdb.DuckDBPyConnection, reader: pa.RecordBatchReader, names: list[str], options: SqlOptions
) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    while True:
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except (OSError, pa.ArrowException) as error:  # what DuckDB says comes through Arrow as one of these
            raise _told(db, str(error), options) from error
        yield batch.rename_columns(names)


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with _1, _2 … after those that are there already."""
    taken: dict[str, None] = {}
    for name in names:
        candidates = chain([name], (f"{name}_{number}" for number in count(1)))
        taken[next(free for free in candidates if free not in taken)] = None
    return list(taken)


def _check(db: duckdb.DuckDBPyConnection, query: str) -> None:
    kinds = [statement.type.name for statement in db.extract_statements(query)]
    if kinds != ["SELECT"]:
        what = f"{len(kinds)} statements" if len(kinds) != 1 else kinds[0]
        raise ConfigError(f"sql: expected one SELECT, got {what if kinds else 'nothing'}; the tables can only be read")


@contextmanager
def _interrupted_after(db: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    if not seconds:
        yield
        return
    timer = threading.Timer(seconds, db.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _told(db: duckdb.DuckDBPyConnection, said: str, options: SqlOptions) -> ConfigError:
    """What DuckDB says of a query, in one line with the way out."""
    line = said.strip().splitlines()[0]
    if "INTERRUPT Error" in line:
        return ConfigError(f"sql: no answer within {options.time_limit_s:g} s; ask for less, or raise --time_limit_s")
    if "Out of Memory Error" in line:
        return ConfigError(f"sql: {line}; ask for less, or raise --memory_limit")
    if missing := _TABLE.search(said):
        there = _names(db, "SELECT view_name FROM duckdb_views() WHERE NOT internal")
        gone = ", ".join(name for name in TABLES if name not in there)
        absent = f" (not in this folder: {gone})" if gone else ""
        return ConfigError(f"sql: no table '{missing[1]}'.{did_you_mean(missing[1], there)}{absent}")
    if "Binder Error" in line and (missing := _COLUMN.search(said)):
        known = _names(db, "SELECT column_name FROM duckdb_columns() WHERE NOT internal")
        return ConfigError(f"sql: no column '{missing[1]}'.{did_you_mean(missing[1], known)}")
    if "Permission Error" in line:
        return ConfigError(f"sql: {line}; only {', '.join(TABLES)} can be read")
    hint = _HINT.search(said)
    return ConfigError(f"sql: {line}{f' {hint[0]}' if hint and hint[0] not in line else ''}")


def _names(db: duckdb.DuckDBPyConnection, query: str) -> list[str]:
    return [name for (name,) in db.execute(query).fetchall()]


# --- forms of the answer ---------------------------------------------------------------------------------------------


def first_rows(found: Answer, limit: int) -> tuple[list[list[Any]], bool]:
    """The first rows, and whether there are more."""
    rows: list[list[Any]] = []
    for batch in found.batches:
        rows += _rows(batch.slice(0, limit + 1 - len(rows)))
        if len(rows) > limit:
            return rows[:limit], True
    return rows, False


def write_csv(found: Answer, limit: int | None, file: IO[str]) -> None:
    """With a header line; null is an empty field."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(found.schema.names)
    for batch in _limited(found, limit):
        writer.writerows(_rows(batch))


def write_json(found: Answer, limit: int | None, file: IO[str]) -> None:
    """One array, a row a line; what JSON has no form for (dates, bytes) is text, NaN and infinity are null."""
    separator = "[\n"
    for batch in _limited(found, limit):
        for row in _rows(batch):
            named = dict(zip(found.schema.names, map(_finite, row), strict=True))
            file.write(separator + json.dumps(named, ensure_ascii=True, default=str, allow_nan=False))
            separator = ",\n"
    file.write("\n]\n" if separator == ",\n" else "[]\n")


def write_parquet(found: Answer, limit: int | None, file: IO[bytes]) -> None:
    """With zstd and page checksums, by way of a temporary file: a pipe cannot be sought in."""
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as whole:
        with pq.ParquetWriter(whole, found.schema, compression="zstd", write_page_checksum=True) as writer:
            for batch in _limited(found, limit):
                writer.write_batch(batch)
        whole.seek(0)
        shutil.copyfileobj(whole, file)


def _limited(found: Answer, limit: int | None) -> Iterator[pa.RecordBatch]:
    left = math.inf if limit is None else limit
    for batch in found.batches:
        if left <= 0:
            return
        yield batch if batch.num_rows <= left else batch.slice(0, int(left))
        left -= batch.num_rows


def _rows(batch: pa.RecordBatch) -> list[list[Any]]:
    columns: Sequence[list[Any]] = [column.to_pylist() for column in batch.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list():
            return [_finite(item) for item in value]
        case dict():
            return {name: _finite(item) for name, item in value.items()}
        case bytes():
            return value.hex()
    return value
