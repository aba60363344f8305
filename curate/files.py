"""Files that are whole or not there, and that say what they were made from.

Every file is written under a temporary name in its own folder, fsynced and renamed. Each Parquet of ours carries two
words in its metadata: `cliptailor.fingerprint`, of everything it was made from, and `cliptailor.digest`, of what is in
it (not of where in a tar: images come in the order in which servers answer). A stage reruns exactly those files whose
fingerprint is no longer what it would be.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

# Where members lie in their tar.
PLACES = ("image_offset", "caption_offset", "json_offset")
FINGERPRINT = b"cliptailor.fingerprint"
DIGEST = b"cliptailor.digest"
NOTE = b"cliptailor.note."
ROW_GROUP = 65_536


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; on success fsync it, rename it to `path`, fsync the folder.

    On an error the temporary file is removed and `path` stays as it was. A kill leaves at most a `.NAME.PID.tmp`, which
    `sweep` removes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(key: str, folder: Path) -> None:
    """Check before the work that a folder can be written to, or made.

    Args:
        key: what names it to the user.
        folder: that is, or will be.

    Raises:
        ConfigError: it cannot, as far as can be seen.
    """
    there = nearest(folder)
    if not there.is_dir():
        raise ConfigError(f"{key}: {there} is a file; expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {there} cannot be written to; give another folder, or the right to write there")


def nearest(path: Path) -> Path:
    """A path, or the nearest above it that is there."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def sweep(folder: Path) -> None:
    """Remove temporary files that a killed run left in `folder`. Call it only while holding the folder's lock."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def utf8(text: str) -> str:
    """A text as UTF-8 can hold it: half an emoji, or a byte of another encoding in a name, is escaped."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def fingerprint(*parts: Any) -> str:
    """16 hex digits of a sha256 over the parts as canonical JSON; equal parts, equal fingerprint, on any machine."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    # A file's name need not be UTF-8.
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def write_parquet(table: pa.Table, path: Path, *, made_from: str) -> None:
    """Write a table atomically, zstd with page checksums, `made_from` as its fingerprint and a digest of its content.

    The same table gives the same bytes.
    """
    write_batches(table.to_batches(), table.schema, path, made_from=made_from)


def write_batches(
    batches: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    path: Path,
    *,
    made_from: str,
    notes: Mapping[str, str] | None = None,
    row_group: int = ROW_GROUP,
) -> None:
    """`write_parquet` for more rows than memory should hold; how the rows are cut into batches changes nothing.

    `notes` are further words for the metadata: `notes(path)` reads them. `row_group`: rows that are written, and can
    be read, at once.
    """
    import pyarrow.parquet as pq

    content = hashlib.sha256()
    schema = schema.remove_metadata()
    with (
        atomic(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as file,
        ThreadPoolExecutor(1) as hashing,
    ):
        done: Future[None] | None = None
        for rows in _row_groups(batches, schema, row_group):
            if done is not None:
                done.result()
            done = hashing.submit(lambda rows: content.update(_ipc_bytes(rows)), rows)
            file.write_table(rows)
        assert done is not None
        done.result()
        said = {NOTE + name.encode(): text.encode() for name, text in (notes or {}).items()}
        file.add_key_value_metadata(said | {FINGERPRINT: made_from.encode(), DIGEST: content.hexdigest()[:16].encode()})


def _row_groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema, size: int) -> Iterator[pa.Table]:
    """The rows in tables of `size` rows, the last one shorter; one empty table if there are none."""
    import pyarrow as pa

    waiting, num_rows, given = [], 0, False
    for batch in batches:
        waiting.append(batch)
        num_rows += batch.num_rows
        while num_rows >= size:
            table = pa.Table.from_batches(waiting, schema)
            yield table.slice(0, size).combine_chunks()
            waiting, num_rows, given = table.slice(size).to_batches(), num_rows - size, True
    if num_rows or not given:
        yield pa.Table.from_batches(waiting, schema).combine_chunks()


def _ipc_bytes(table: pa.Table) -> pa.Buffer:
    """The rows of a table as bytes, the same for equal rows: where in the tar their members lie does not count."""
    import pyarrow as pa

    table = table.drop_columns([name for name in table.column_names if name in PLACES])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        # Equal arrays may differ in bytes where a value is null: a copy by `take` has zeros there.
        stream.write_table(table.take(_places(table.num_rows)))
    return sink.getvalue()


def _places(num_rows: int) -> pa.Array:
    """0, 1, 2 …, made by Arrow alone: for an array of Python's numbers it imports pandas, which takes half a second."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.indices_nonzero(pa.nulls(num_rows).is_null())


def _parquet_metadata(path: Path) -> Mapping[bytes, bytes]:
    try:
        there = path.stat()
    except OSError:
        return {}
    return _metadata_of(path, there.st_ino, there.st_mtime_ns, there.st_size)


@lru_cache(maxsize=65_536)
def _metadata_of(path: Path, *_: int) -> Mapping[bytes, bytes]:
    """Of a file as it is now: a dataset of a hundred million samples has ten thousand, and is asked more than once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return {}


def read_rows(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file of ours, its pages checked; `pq.read_table` would first import pandas, which takes half a second.

    Raises:
        OSError, pyarrow.ArrowInvalid: it is not there, or broken.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns=columns)


def made_from(path: Path) -> str | None:
    """The fingerprint a Parquet file of ours was written with; None if it is absent, broken or not ours."""
    value = _parquet_metadata(path).get(FINGERPRINT)
    return value.decode() if value else None


def notes(path: Path) -> dict[str, str]:
    """The further words that a Parquet file of ours carries in its metadata."""
    said = _parquet_metadata(path).items()
    return {name.removeprefix(NOTE).decode(): text.decode() for name, text in said if name.startswith(NOTE)}


def digest(path: Path) -> str:
    """What identifies the content of a Parquet file: our own digest, or for a foreign file the sha256 of its bytes."""
    value = _parquet_metadata(path).get(DIGEST)
    return value.decode() if value else file_sha256(path)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()
