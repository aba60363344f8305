"""One packed shard, its Parquet against its tar: every page, every member, and nothing else in the tar."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curate.shards import OFFSET_COLUMNS

MEMBERS = ("image", "caption", "json")
BLOCK = tarfile.BLOCKSIZE
ROWS_AT_ONCE = 1_024
COLUMNS = ("key", "caption", *OFFSET_COLUMNS)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it should be.

    Attributes:
        kind: what was checked; faults of one kind and file are counted together.
        file: path below the dataset folder.
        row: of the file, from 0; None where it is the file as a whole.
        what: what was found, and what was expected.
    """

    kind: str
    file: str
    row: int | None
    what: str

    def __str__(self) -> str:
        """`shards/train-00000.tar row 3: …`."""
        place = self.file if self.row is None else f"{self.file} row {self.row}"
        return f"{place}: {self.what}"


def check_parquet(path: Path, name: str) -> Iterator[Fault]:
    """Read a Parquet file to its end, with the checksum of every page."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        yield Fault("pages", name, row or None, f"not readable from here on ({_first_line(error)}); copy it again")


def check_shard(stem: Path, name: str) -> Iterator[Fault]:
    """Check a shard whose Parquet can be read.

    Args:
        stem: path without extension.
        name: what to call it: the path below the dataset folder, without extension.
    """
    import pyarrow.parquet as pq

    tar, parquet = stem.with_suffix(".tar"), stem.with_suffix(".parquet")
    absent = [column for column in COLUMNS if column not in pq.read_schema(parquet).names]
    if absent:
        yield Fault("columns", f"{name}.parquet", None, f"no column {', '.join(absent)}")
        return
    if not tar.exists():
        yield Fault("files", f"{name}.tar", None, "not there, but its Parquet is; copy it again")
        return
    with tar.open("rb") as file:
        checked = _Tar(file.fileno(), tar.stat().st_size, f"{name}.tar")
        row = 0
        with pq.ParquetFile(parquet) as facts:
            for batch in facts.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(COLUMNS)):
                for sample in batch.to_pylist():
                    yield from checked.check_sample(row, sample)
                    row += 1
        yield from checked.check_rest()


@dataclass(slots=True)
class _Tar:
    """A tar that is gone through once; `spans` are the members that the Parquet names."""

    handle: int
    size: int
    name: str
    spans: list[tuple[int, int]] = field(default_factory=list)

    def check_sample(self, row: int, sample: Mapping[str, Any]) -> Iterator[Fault]:
        """Each member's header at its place, and that caption and facts are those of the row."""
        extensions = {"image": sample["image_ext"], "caption": "txt", "json": "json"}
        for what in MEMBERS:
            offset, size = sample[f"{what}_offset"], sample[f"{what}_size"]
            if offset is None or size is None or offset < BLOCK or size < 0:
                yield Fault("members", self.name, row, f"{sample['key']}: the Parquet has no place for its {what}")
                continue
            self.spans.append((offset, size))
            if found := self._header_fault(offset, size, f"{sample['key']}.{extensions[what]}"):
                yield Fault("members", self.name, row, found)
                continue
            if what != "image":
                yield from self._content_faults(row, sample, what, os.pread(self.handle, size, offset))

    def _header_fault(self, offset: int, size: int, name: str) -> str | None:
        if offset + size > self.size:
            return f"{name}: reaches to {offset + size:,}, but the tar ends at {self.size:,}"
        try:
            info = tarfile.TarInfo.frombuf(os.pread(self.handle, BLOCK, offset - BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            return f"{name}: no tar header before offset {offset:,} ({error})"
        if not info.isreg() or info.name != name or info.size != size:
            return f"{name}: expected {size:,} bytes at {offset:,}, found {info.name} of {info.size:,} bytes"
        return None

    def _content_faults(self, row: int, sample: Mapping[str, Any], what: str, content: bytes) -> Iterator[Fault]:
        caption = (sample["caption"] or "").encode("utf-8", "surrogatepass")
        if what == "caption":
            if content != caption:
                yield Fault("captions", self.name, row, f"{sample['key']}.txt: not the caption in the Parquet")
            return
        try:
            facts = json.loads(content.decode("utf-8", "surrogatepass"))
            same = (facts["key"], (facts["caption"] or "").encode("utf-8", "surrogatepass")) == (sample["key"], caption)
        except (ValueError, KeyError, TypeError, AttributeError):
            same = False
        if not same:
            yield Fault("captions", self.name, row, f"{sample['key']}.json: not the facts of this row")

    def check_rest(self) -> Iterator[Fault]:
        """The members lie one after the other, and after the last there is nothing but the tar's end."""
        end = 0
        for offset, size in sorted(self.spans):
            if offset != end + BLOCK:
                what = "members overlap" if offset < end + BLOCK else "bytes that no row of the Parquet names"
                yield Fault("members", self.name, None, f"{what} before offset {offset:,}")
            end = max(end, offset + -(-size // BLOCK) * BLOCK)
        if self.size - end < 2 * BLOCK:
            yield Fault(
                "members", self.name, None, f"{self.size:,} bytes: the end of the tar is missing; copy it again"
            )
        for place in range(end, self.size, 1 << 20):
            if os.pread(self.handle, min(1 << 20, self.size - place), place).strip(b"\0"):
                yield Fault("members", self.name, None, f"bytes that no row of the Parquet names after {end:,}")
                return


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
