"""Any list of URLs and captions → candidates with stable keys, before any request.

The list is read once, as a stream, and its rows are dealt into buckets on disk by a hash of their URL; then bucket
after bucket is worked on, so that memory does not grow with the list. A row's key is a hash of its URL and caption, so
it stays the same wherever the row stands in whichever file. Empty and broken URLs and repeated (URL, caption) pairs are
dropped here, and so is whatever the first `where` filters can decide without an image. The rest is spread over files by
the hash: the rows of one host come in all files (so that no one host holds a shard up), rows of one URL in one.

A list that changed: what is planned already stays in its file, with new row numbers and columns if need be, so that
nothing is fetched again for it; also where a `where` that was tightened since would drop it here (`curate select` runs
that step as well, and drops it there). Rows that left the list leave their file. New rows come in new files, but
rows of a URL that is planned join it.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from curate.buckets import Buckets, bucket_of
from curate.config import PlanConfig
from curate.database import SPILL, arrow_table, column_types, connect, files, parts, quoted
from curate.delimited import unpacked_size
from curate.errors import InputError
from curate.expressions import (
    FETCH_COLUMNS,
    PLAN_COLUMNS,
    RESERVED,
    SELECT_COLUMNS,
    SIGNAL_COLUMNS,
    check_steps,
    drop_where,
    step_expressions,
    watch_drops,
)
from curate.files import digest, file_sha256, fingerprint, sweep, write_batches, write_parquet, write_text
from curate.filters import Step, Where
from curate.lists import ListColumns, ListFiles, choose_columns, readable_list, reader
from curate.mending import in_json_lines, in_utf8
from curate.progress import progress
from curate.shards import PLACE, shard_name
from curate.sources import find

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 3
DONE = "plan.json"
BUCKETS = ".buckets"
LISTS = ".list"
# Rows that are worked on at once; the list is dealt into buckets of about so many.
BUCKET_ROWS = 150_000
# Of the database alone; the streams and buckets in Arrow come on top of it.
MEMORY_LIMIT = "512MB"
# Each is a file that is open while the list is dealt, and a process may hold 1,024.
MOST_BUCKETS = 256
# Files on their way to disk while the next bucket is worked on.
WRITING_AT_ONCE = 32
# A plan file is right or not by plan.json; its own fingerprint only says what it is.
_MADE_FROM = fingerprint("plan", FORMAT)

# Most URLs and captions are as plain as this, which is seen in one pass without captures; the rest takes the long way.
_PLAIN_URL = r"^https?://[a-z0-9.-]+/[!-~]*$"
_ODD_SPACE = r"^ |  | $|[\t-\r\x1C-\x1F\x{85}]|[^\P{Z} ]|^$"
# White space and the marks that editors leave at a line's ends.
_BLANK = r"[\s\p{Z}\x{FEFF}\x{200B}]+"
_WORD = r"[^\s\p{Z}]+"
_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@\\]*@)?(\[[^\]/?#]+\]|[^/?#:@\\]+)"
_USER = r"^([A-Za-z][A-Za-z0-9+.-]*://)[^/?#\\]*@"
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
        new: candidates that were not planned before; all of them, in a new folder.
        gone: rows that were planned before and are no candidates any more.
    """

    rows: int
    candidates: int
    dropped: dict[str, int]
    made: bool
    new: int = 0
    gone: int = 0


def run(
    urls: str, out: Path, config: PlanConfig, steps: Sequence[Step], signals: Mapping[str, str] = SIGNAL_COLUMNS
) -> PlanResult:
    """Write `out/plan/NNNNN.parquet` and `out/plan/dropped.parquet`; see docs/architecture.md for their columns.

    Args:
        urls: a list, or images that are there already; see `curate.lists` and `curate.sources`.
        out: the dataset's folder.
        config: names of columns, candidates a file.
        steps: all filter steps; each is checked, and the `where` steps before any other kind that need only the list's
            columns are applied.
        signals: the columns that will be measured later, and their DuckDB types.

    Raises:
        InputError: the list cannot be read, or has no rows.
        ConfigError: a column or an expression in the configuration is wrong.
    """
    cache = out / LISTS
    source = find(urls, cache, out, config.columns.caption)
    if source.kind == "json":
        cache.mkdir(parents=True, exist_ok=True)  # the database must know that it may read there
    elif source.kind != "parquet":
        source = in_utf8(source, cache)
    folder = out / "plan"
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    with connect(MEMORY_LIMIT, 0, out / SPILL, [*source.paths, cache, folder]) as db:
        source, table = _readable(db, source, cache)
        with readable_list(source):
            types = column_types(db, table)
        columns = choose_columns(types, source, config, RESERVED.difference(PLACE) if source.root else RESERVED)
        pushed = _pushed(db, steps, {**PLAN_COLUMNS, **columns.types}, signals)
        inputs = fingerprint("plan", FORMAT, *_inputs(source, config, pushed))
        before = _read_done(folder)
        same_root = before.get("root") == (str(source.root) if source.root else None)
        if same_root and before.get("inputs") == inputs and before.get("files") == _digests(folder):
            return PlanResult(**before["result"], made=False)
        if not before:  # a first plan that did not get to its end
            for leftover in folder.glob("*.parquet"):
                leftover.unlink()
        result = _make(db, folder, source, table, columns, pushed, config.shard_size)
    root = str(source.root) if source.root else None
    done = {"root": root, "inputs": inputs, "files": _digests(folder), "result": _plain(result)}
    write_text(folder / DONE, json.dumps(done, indent=1) + "\n")
    return result


def _readable(db: duckdb.DuckDBPyConnection, source: ListFiles, cache: Path) -> tuple[ListFiles, str]:
    """The list and the SQL that reads it; where JSON lines cannot be read, a list without those few that are broken."""
    try:
        return source, reader(db, source)
    except InputError:
        mended = in_json_lines(source, cache) if source.kind == "json" else source
        if mended == source:
            raise
        return mended, reader(db, mended)


def _read_done(folder: Path) -> dict[str, Any]:
    """What the last plan that got to its end was made from, and what it came to."""
    path = folder / DONE
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return done


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in sorted(folder.glob("*.parquet"))}


def _plain(result: PlanResult) -> dict[str, Any]:
    return {name: value for name, value in asdict(result).items() if name not in ("made", "new", "gone")}


def _pushed(
    db: duckdb.DuckDBPyConnection, steps: Sequence[Step], types: dict[str, str], signals: Mapping[str, str]
) -> list[Where]:
    """Check all steps; give those that can be decided before the download without changing what comes out."""
    every = {**FETCH_COLUMNS, **SELECT_COLUMNS, **signals, **types}
    check_steps(db, steps, every)
    first = [step for step in takewhile(lambda step: isinstance(step, Where), steps) if isinstance(step, Where)]
    return [step for step in first if set(step_expressions(db, step, every)[0].columns) <= types.keys()]


def _inputs(source: ListFiles, config: PlanConfig, pushed: Sequence[Where]) -> tuple[object, ...]:
    """All that the plan depends on, but what was planned before."""
    content = [(file_sha256(path), path.stat().st_size) for path in source.paths]
    return (source.kind, content, asdict(config.columns), [asdict(step) for step in pushed])


# --- bucket after bucket ---------------------------------------------------------------------------------------------


def _make(
    db: duckdb.DuckDBPyConnection,
    folder: Path,
    source: ListFiles,
    table: str,
    columns: ListColumns,
    pushed: Sequence[Where],
    shard_size: int,
) -> PlanResult:
    planned = sorted(folder.glob("[0-9]*.parquet"))
    (folder / "dropped.parquet").unlink(missing_ok=True)  # without it, nobody takes the plan for whole
    num_buckets = max(1, min(MOST_BUCKETS, -(-_num_rows(source) // BUCKET_ROWS)))
    carried = "".join(f", {sql} AS {quoted(name)}" for name, sql in columns.carried.items())
    listed = f"""SELECT row_number() OVER () - 1 AS row, {_stripped(columns.url)} AS url,
        coalesce({columns.caption}, '') AS caption{carried} FROM {table}"""
    with Buckets(folder / BUCKETS, num_buckets) as spill:
        with readable_list(source):
            rows = spill.deal(db, "list", [listed])
        if not rows:
            raise InputError(f"{source.name}: has no rows")
        were_planned = spill.deal(db, "planned", [_planned(part) for part in parts(planned)])
        with (
            _Files(folder, [*PLAN_COLUMNS, *columns.types], shard_size, _last_buckets(db, planned, num_buckets)) as out,
            progress("plan", rows) as advance,
        ):
            for bucket in range(num_buckets):
                num_rows = _load(db, spill, bucket, [*columns.types], has_urls=source.root is None)
                for step in pushed:
                    drop_where(db, step, stage="plan", columns=out.columns)
                db.execute("DELETE FROM drops WHERE reason = 'where' AND row IN (SELECT row FROM rows WHERE known_)")
                out.take(db, bucket)
                advance(num_rows)
            out.finish(db, planned)
    kept = out.known
    return PlanResult(
        rows, out.candidates, dict(sorted(out.dropped.items())), True, out.candidates - kept, were_planned - kept
    )


def _num_rows(source: ListFiles) -> int:
    """Rows of the list; of text, a guess from its size, which is the same each time."""
    if source.kind == "parquet":
        import pyarrow.parquet as pq

        return sum(pq.read_metadata(path).num_rows for path in source.paths)
    return sum(map(unpacked_size, source.paths)) // 150


def _file_number(column: str = "filename") -> str:
    return f"CAST(regexp_extract({column}, '([0-9]+)[.]parquet$', 1) AS INTEGER)"


def _planned(paths: Sequence[Path]) -> str:
    return f"SELECT key, url, {_file_number()} AS file_ FROM read_parquet({files(paths)}, filename = true)"


def _last_buckets(db: duckdb.DuckDBPyConnection, planned: Sequence[Path], num_buckets: int) -> dict[int, int]:
    """Of each file that is there: the last bucket with a row of it."""
    last: dict[int, int] = {}
    for part in parts(planned):
        last |= dict(
            db.execute(f"SELECT file_, max({bucket_of(num_buckets)}) FROM ({_planned(part)}) GROUP BY file_").fetchall()
        )
    return last


def _load(db: duckdb.DuckDBPyConnection, spill: Buckets, bucket: int, carried: Sequence[str], *, has_urls: bool) -> int:
    """Make tables `rows` and `drops` of one bucket, with the rows that are no candidates in `drops`.

    Returns:
        How many rows there are.
    """
    names = "".join(f", {quoted(name)}" for name in carried)
    for what, name in (("VIEW", "alive"), ("TABLE", "drops"), ("TABLE", "rows")):
        db.execute(f"DROP {what} IF EXISTS {name}")
    listed, planned = spill.read("list", bucket), spill.read("planned", bucket)
    if listed is None:
        listed = spill.empty("list")
    db.register("listed", listed)
    db.register("planned", planned if planned is not None else _no_plan())
    db.execute(f"""
        CREATE TABLE rows AS
        SELECT named.*, places.file_, key IN (SELECT key FROM planned) AS known_
        FROM (
            SELECT CASE WHEN nth_ = 1 THEN base_ ELSE base_ || '-' || nth_ END AS key, row, url, caption, url_host,
                length(caption) AS caption_chars, {_words()} AS caption_words{names},
                base_, problem_, nth_
            FROM (
                -- Good rows come first, so the first good row of a pair has the bare key.
                SELECT *, row_number() OVER (PARTITION BY base_ ORDER BY problem_ IS NOT NULL, row) AS nth_
                FROM (
                    SELECT *, left(sha256(url || chr(10) || caption), 20) AS base_,
                        {_host()} AS url_host, {_problem() if has_urls else "NULL"} AS problem_
                    FROM listed
                )
            )
        ) AS named LEFT JOIN (SELECT url, min(file_) AS file_ FROM planned GROUP BY url) AS places USING (url)""")
    watch_drops(db)
    db.execute(f"""
        INSERT INTO drops
        SELECT row, 'plan', 'plan', coalesce(problem_, 'duplicate_row'),
            CASE problem_ WHEN 'bad_url' THEN left(url, 120) WHEN 'blocked_scheme' THEN {_scheme()} END,
            CASE WHEN problem_ IS NULL THEN base_ END
        FROM rows WHERE problem_ IS NOT NULL OR nth_ > 1""")
    db.unregister("listed")
    db.unregister("planned")
    return int(listed.num_rows)


def _no_plan() -> pa.Table:
    import pyarrow as pa

    schema = pa.schema({"key": pa.string(), "url": pa.string(), "file_": pa.int32()})
    return pa.Table.from_arrays([pa.nulls(0, kind) for kind in schema.types], schema=schema)


def _stripped(url: str) -> str:
    """SQL: a URL without white space around it, and without a user's name and password, which no file should hold."""
    bare = f"regexp_replace(coalesce({url}, ''), '^{_BLANK}|{_BLANK}$', '', 'g')"
    return f"CASE WHEN {_is_plain(url)} THEN {url} ELSE regexp_replace({bare}, '{_USER}', '\\1') END"


def _is_plain(url: str) -> str:
    return f"regexp_matches({url}, '{_PLAIN_URL}')"


def _host() -> str:
    long_way = f"lower(regexp_extract(url, '{_HOST}', 1))"
    return f"CASE WHEN {_is_plain('url')} THEN split_part(url, '/', 3) ELSE {long_way} END"


def _words() -> str:
    spaces = "length(caption) - length(replace(caption, ' ', ''))"
    long_way = f"len(regexp_extract_all(caption, '{_WORD}'))"
    return f"CASE WHEN regexp_matches(caption, '{_ODD_SPACE}') THEN {long_way} ELSE {spaces} + 1 END"


def _scheme() -> str:
    with_slashes = f"nullif(regexp_extract(url, '{_OTHER_SCHEME}', 1), '')"
    return f"lower(coalesce({with_slashes}, regexp_extract(url, '{_BARE_SCHEME}', 1, 'i')))"


def _problem() -> str:
    """SQL: why a URL cannot be fetched, or NULL."""
    return f"""CASE WHEN {_is_plain("url")} THEN NULL WHEN url = '' THEN 'empty_url'
        WHEN {_scheme()} NOT IN ('', 'http', 'https') THEN 'blocked_scheme'
        WHEN {_scheme()} = '' OR NOT regexp_matches(url, '{_HOST}') THEN 'bad_url'
        WHEN regexp_matches(url, '[\\x00-\\x1F]') THEN 'bad_url' END"""


# --- the plan's files ------------------------------------------------------------------------------------------------


class _Files:
    """Writes the plan's files as the buckets come; in a thread, while the next bucket is worked on.

    Args:
        folder: of the plan.
        columns: of the files.
        shard_size: candidates a new file.
        last: of each file that is there, the last bucket with a row of it.
    """

    def __init__(self, folder: Path, columns: Sequence[str], shard_size: int, last: dict[int, int]) -> None:
        self.folder, self.columns, self.shard_size = folder, list(columns), shard_size
        self.candidates = self.known = 0
        self.dropped: Counter[str] = Counter()
        self._last, self._written = last, set[Path]()
        self._old: dict[int, list[pa.Table]] = {}
        self._new: list[pa.Table] = []
        self._next = max(last, default=-1) + 1
        self._names = ", ".join(quoted(name) for name in columns)

    def __enter__(self) -> _Files:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._writing: deque[Future[None]] = deque()
        self._drops = self.folder / BUCKETS / "dropped.arrow"
        self._drops_stream: pa.RecordBatchStreamWriter | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._drops_stream is not None:
            self._drops_stream.close()

    def take(self, db: duckdb.DuckDBPyConnection, bucket: int) -> None:
        """Take what a bucket came to: `alive` and `drops`."""
        self._take_drops(db)
        if self._last:
            self._take_old(db, bucket)
        self._new.append(arrow_table(db, f"SELECT {self._names} FROM alive WHERE file_ IS NULL"))
        if sum(table.num_rows for table in self._new) > BUCKET_ROWS // 2:
            self._write_new(db)

    def _take_old(self, db: duckdb.DuckDBPyConnection, bucket: int) -> None:
        """Gather the rows of files that are there, and write those files of which no later bucket has a row."""
        import pyarrow as pa

        query = f"SELECT {self._names}, file_, known_ FROM alive WHERE file_ IS NOT NULL ORDER BY file_"
        old = arrow_table(db, query)
        self.known += sum(old["known_"].to_pylist())
        for number, table in _by_number(old.drop_columns(["known_"]), "file_"):
            self._old.setdefault(number, []).append(table)
        for number in [number for number in self._old if self._last[number] <= bucket]:
            self._write(number, pa.concat_tables(self._old.pop(number)).sort_by("key"))

    def finish(self, db: duckdb.DuckDBPyConnection, planned: Sequence[Path]) -> None:
        """Write what is left, and remove the files of `planned` that no row is left of."""
        import pyarrow as pa

        self._write_new(db)
        while self._writing:
            self._writing.popleft().result()
        for path in set(planned) - self._written:
            path.unlink()
        assert self._drops_stream is not None
        self._drops_stream.close()
        with pa.ipc.open_stream(str(self._drops)) as stream:
            write_batches(stream, stream.schema, self.folder / "dropped.parquet", made_from=_MADE_FROM)

    def _take_drops(self, db: duckdb.DuckDBPyConnection) -> None:
        import pyarrow as pa

        query = f"SELECT {self._names}, step, reason, value, twin FROM rows JOIN drops USING (row) ORDER BY row"
        dropped = arrow_table(db, query)
        if self._drops_stream is None:
            self._drops_stream = pa.ipc.new_stream(str(self._drops), dropped.schema)
        self._drops_stream.write_table(dropped)
        self.dropped.update(dropped["reason"].to_pylist())

    def _write_new(self, db: duckdb.DuckDBPyConnection) -> None:
        import pyarrow as pa

        if not self._new:
            return
        rows, self._new = pa.concat_tables(self._new), []
        num_files = -(-rows.num_rows // self.shard_size)
        if not num_files:
            return
        db.register("new_rows", rows)
        query = f"""SELECT {self._names}, CAST(md5_number_lower(url) % {num_files} AS INTEGER) AS file_
            FROM new_rows ORDER BY file_, key"""
        for _, table in _by_number(arrow_table(db, query), "file_"):
            self._write(self._next, table)
            self._next += 1
        db.unregister("new_rows")

    def _write(self, number: int, table: pa.Table) -> None:
        path = self.folder / f"{shard_name(number)}.parquet"
        self._written.add(path)
        self.candidates += table.num_rows
        self._writing.append(self._thread.submit(write_parquet, table, path, made_from=_MADE_FROM))
        while len(self._writing) > WRITING_AT_ONCE:
            self._writing.popleft().result()


def _by_number(table: pa.Table, column: str) -> Iterator[tuple[int, pa.Table]]:
    """The rows of a table that is sorted by a column of numbers, those with one number together, without the column."""
    import pyarrow.compute as pc

    counts = sorted((c["values"], c["counts"]) for c in pc.value_counts(table[column]).to_pylist())
    table, start = table.drop_columns([column]), 0
    for number, count in counts:
        yield number, table.slice(start, count)
        start += count
