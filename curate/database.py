"""A DuckDB connection that is locked before any expression of a user runs in it.

The order of the settings matters: what may be read is named first, then all other access to files, networks and
extensions is shut off, then the configuration itself is locked. What is left to an expression is arithmetic over the
rows (`curate.expressions` refuses the rest: sub-queries, and with them every function that reads a file).

Tables live in memory up to `memory_limit` and spill to `temp_directory` beyond it. DuckDB 1.4 to 2.x.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from curate.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

SPILL = ".spill"
# DuckDB may hold every file of one scan open, and a process may hold 1,024.
FILES_AT_ONCE = 256


def connect(
    memory_limit: str, threads: int, temp_directory: Path, allowed: Sequence[Path]
) -> duckdb.DuckDBPyConnection:
    """A connection to an empty database in memory, locked.

    Args:
        memory_limit: such as `4GB`; a query that needs more spills, and fails cleanly where it cannot.
        threads: 0 is one a CPU core.
        temp_directory: for spilled data; what a killed run left there is removed first.
        allowed: the only files and folders that queries may read.

    Raises:
        ConfigError: memory_limit is not a size.
    """
    shutil.rmtree(temp_directory, ignore_errors=True)
    start = {
        "memory_limit": memory_limit,
        "temp_directory": str(temp_directory),
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "python_enable_replacements": False,
    }
    try:
        db = duckdb.connect(":memory:", config={**start, "threads": threads} if threads else start)
    except duckdb.Error as error:
        raise ConfigError(f"select.memory_limit '{memory_limit}': {first_line(error)}; expected such as 4GB") from error
    real = [path.resolve() for path in allowed]
    for setting, paths in (
        ("allowed_directories", [path for path in real if path.is_dir()]),
        ("allowed_paths", [path for path in real if not path.is_dir()]),
    ):
        # A name with a * in it is asked for by a pattern, and the pattern must be allowed as well as the file.
        names = sorted({name for path in paths for name in (str(path), _no_glob(str(path)))})
        db.execute(f"SET {setting} = [{', '.join(map(literal, names))}]")
    # DuckDB draws its progress bar on stdout, whether that is a terminal or not.
    for setting in (
        *("allow_persistent_secrets = false", "enable_progress_bar = false"),
        *("TimeZone = 'UTC'", "preserve_insertion_order = true"),
    ):
        db.execute(f"SET {setting}")
    db.execute("SET enable_external_access = false")
    db.execute("SET lock_configuration = true")
    return db


@contextmanager
def enough_memory(limit: str) -> Iterator[None]:
    """Tell in one line that a query found no room, even by spilling.

    Raises:
        ConfigError: that.
    """
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise ConfigError(
            f"select.memory_limit {limit}: not enough ({first_line(error)}); raise it, or lower select.threads"
        ) from error


def literal(text: str) -> str:
    """A text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def quoted(name: str) -> str:
    """A column's or table's name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def seeded(seed: int, purpose: str, column: str = "key") -> str:
    """SQL of a text to order rows by, at random; choices for different purposes are independent."""
    return f"md5({literal(f'{seed} {purpose} ')} || {column})"


def first_line(error: duckdb.Error) -> str:
    """What DuckDB says, without its drawing of the query."""
    return str(error).strip().splitlines()[0]


def files(paths: Sequence[Path]) -> str:
    """Paths as an SQL list for `read_parquet` and its like; a `*` or `[` in a name is that character."""
    return f"[{', '.join(literal(_no_glob(str(path.resolve()))) for path in paths)}]"


def _no_glob(path: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


def create_in_parts(db: duckdb.DuckDBPyConnection, table: str, queries: Iterable[str]) -> None:
    """Make a table of the rows of several queries with the same columns, one query after the other."""
    for number, query in enumerate(queries):
        db.execute(f"INSERT INTO {table} {query}" if number else f"CREATE TABLE {table} AS {query}")


def parts(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """The files in lists of at most FILES_AT_ONCE."""
    for start in range(0, len(paths), FILES_AT_ONCE):
        yield list(paths[start : start + FILES_AT_ONCE])


def arrow_table(db: duckdb.DuckDBPyConnection, query: str) -> pa.Table:
    """The whole result of a query as an Arrow table."""
    return db.sql(query).to_arrow_table()


def arrow_batches(db: duckdb.DuckDBPyConnection, query: str) -> pa.RecordBatchReader:
    """The result of a query as a stream of record batches, of whatever lengths DuckDB finds handy."""
    import pyarrow as pa

    return pa.RecordBatchReader.from_stream(db.sql(query))


def scalar(db: duckdb.DuckDBPyConnection, query: str) -> Any:
    """The one value of a query with one row and one column."""
    # All is fetched: DuckDB 2 lets nothing else run on a connection that still has a result to give.
    ((value,),) = db.execute(query).fetchall()
    return value


def column_types(db: duckdb.DuckDBPyConnection, relation: str) -> dict[str, str]:
    """Names and DuckDB types of the columns of a table, view or table function, in order."""
    return {name: kind for name, kind, *_ in db.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()}
