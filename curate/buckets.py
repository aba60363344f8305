"""Rows dealt into buckets on disk, by a hash of their URL or by their place: what is done on one has bounded memory."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from curate.database import arrow_batches

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

DEALT_AT_ONCE = 200_000


def bucket_of(num_buckets: int) -> str:
    """SQL: the number of the bucket that a row's `url` belongs to."""
    return f"CAST(md5_number_upper(url) % {num_buckets} AS INTEGER)"


class Buckets:
    """Buckets of rows in a folder that is there for the length of the block."""

    def __init__(self, folder: Path, num_buckets: int) -> None:
        self.folder, self.num_buckets = folder, num_buckets
        self._schemas: dict[str, pa.Schema] = {}

    def __enter__(self) -> Buckets:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def deal(
        self, db: duckdb.DuckDBPyConnection, name: str, queries: Sequence[str], bucket_sql: str | None = None
    ) -> int:
        """Deal the rows of some queries into buckets; gives back how many there were.

        `bucket_sql` is the number of a row's bucket; by its URL where it is not given.
        """
        import pyarrow as pa

        num_rows = 0
        number = bucket_sql or bucket_of(self.num_buckets)
        with ExitStack() as stack:
            streams: dict[int, pa.RecordBatchStreamWriter] = {}
            for query in queries:
                batches = arrow_batches(db, f"SELECT *, {number} AS bucket_ FROM ({query})")
                for bucket, table in _sorted_into_buckets(batches):
                    if bucket not in streams:
                        self._schemas[name] = table.schema
                        stream = pa.ipc.new_stream(str(self._path(name, bucket)), table.schema)
                        streams[bucket] = stack.enter_context(stream)
                    streams[bucket].write_table(table)
                    num_rows += table.num_rows
        return num_rows

    def read(self, name: str, bucket: int) -> pa.Table | None:
        """The rows of one bucket, in the order in which they were dealt; None if there are none."""
        import pyarrow as pa

        path = self._path(name, bucket)
        if not path.exists():
            return None
        with pa.ipc.open_stream(str(path)) as stream:
            return stream.read_all()

    def empty(self, name: str) -> pa.Table:
        """A table of no rows, with the columns of the others."""
        return self._schemas[name].empty_table()

    def _path(self, name: str, bucket: int) -> Path:
        return self.folder / f"{name}-{bucket:05d}.arrow"


def _sorted_into_buckets(batches: pa.RecordBatchReader) -> Iterator[tuple[int, pa.Table]]:
    """The rows of each bucket in turn; sorted in a thread while the next rows are read."""
    ahead: deque[Future[list[tuple[int, pa.Table]]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="deal") as thread:
        for table in _larger(batches):
            ahead.append(thread.submit(_by_bucket, table))
            if len(ahead) > 1:
                yield from ahead.popleft().result()
        for sorted_rows in ahead:
            yield from sorted_rows.result()


def _larger(batches: pa.RecordBatchReader) -> Iterator[pa.Table]:
    import pyarrow as pa

    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(some.num_rows for some in waiting) >= DEALT_AT_ONCE:
            yield pa.Table.from_batches(waiting, batches.schema)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting, batches.schema)


def _by_bucket(table: pa.Table) -> list[tuple[int, pa.Table]]:
    import pyarrow.compute as pc

    table = table.take(pc.array_sort_indices(table["bucket_"].combine_chunks()))
    counts = sorted((c["values"], c["counts"]) for c in pc.value_counts(table["bucket_"]).to_pylist())
    table, start, found = table.drop_columns(["bucket_"]), 0, []
    for bucket, count in counts:
        found.append((bucket, table.slice(start, count)))
        start += count
    return found
