"""Reading a dataset: where every sample lies, and its bytes by one `pread`.

Offsets come from the Parquet beside a tar of ours; those of any other tar (img2dataset's, webdataset's) from one pass
over its headers, kept beside it.

This module needs no torch, network or database.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.cache import open_tar, read_far
from curate.errors import InputError, did_you_mean
from curate.files import fingerprint, made_from, read_rows, write_parquet
from curate.remote import far, stamp
from curate.shards import IMAGE_EXTENSIONS, SPLITS, shard_folder, shards_of

if TYPE_CHECKING:
    import pyarrow as pa

INDEX_FORMAT = 2
# From so many samples on, what an index for training says of each is where it lies; the rest is read from its tar.
MANY_SAMPLES = 4_000_000
# A shuffled dataset may have more tars than a process may hold open (1,024 by default).
MAX_OPEN_TARS = 256


@dataclass(frozen=True, slots=True)
class SampleIndex:
    """Where every sample of a dataset lies: one row per sample, in the order of the shards.

    Attributes:
        tars: paths of the tar files.
        table: `tar` (index into tars), `key`, `caption`, `image_offset`, `image_size`, and the columns asked for.
    """

    tars: list[Path]
    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)


def read_index(dataset: Path, split: str | None = None, columns: Sequence[str] = ()) -> SampleIndex:
    """Index the samples of one split of our dataset, or of any folder of img2dataset/webdataset shards.

    A shard whose Parquet lacks our offset columns (img2dataset's) gets them from one pass over the tar's headers, made
    once.

    Args:
        dataset: the folder; `dataset/shards` is taken where it is there.
        split: train, val, test or retain; a folder without split names has only `train`.
        columns: further Parquet columns to carry.

    Raises:
        InputError: no shard, a column that is not there, or a tar that ends early.
    """
    import pyarrow as pa

    folder = shard_folder(dataset)
    stems = shards_of(folder, split)
    if not stems and not any(shards_of(folder, name) for name in SPLITS) and split in (None, "train"):
        stems = shards_of(folder)
    if not stems:
        what = f"no {split} shard" if split else "no shard"
        raise InputError(
            f"{folder}: {what} (STEM.tar with STEM.parquet); give a folder made by curate build or img2dataset"
        )
    tables = []
    for number, stem in enumerate(stems):
        table = _read_shard_index(stem, columns)
        tables.append(table.append_column("tar", pa.repeat(pa.scalar(number, pa.int32()), table.num_rows)))
    return SampleIndex(
        [stem.with_suffix(".tar") for stem in stems], pa.concat_tables(tables, promote_options="permissive")
    )


def read_places(dataset: Path, split: str) -> SampleIndex | None:
    """Where the samples of a large dataset of ours lie, and no more: 20 bytes a sample; None for any other.

    Columns `key`, `caption` and `duplicate_group` are null: `Facts` reads them from the tars, where each image is
    followed by its caption and its facts.

    Raises:
        InputError: a tar that ends early.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    stems = shards_of(shard_folder(dataset), split)
    if not stems or len(stems) * pq.read_metadata(stems[0].with_suffix(".parquet")).num_rows < MANY_SAMPLES:
        return None
    if not made_from(stems[0].with_suffix(".parquet")):
        return None  # someone else's tars may have another order
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:
        tables = list(readers.map(_read_places, range(len(stems)), stems))
    return SampleIndex([stem.with_suffix(".tar") for stem in stems], pa.concat_tables(tables))


def _read_places(number: int, stem: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(stem.with_suffix(".parquet"), page_checksum_verification=True) as file:
        table = file.read(columns=["image_offset", "image_size"], use_threads=False)
    if table["image_offset"].null_count:
        table = table.filter(pc.is_valid(table["image_offset"]))
    table = table.combine_chunks()
    _check_tar_is_whole(stem.with_suffix(".tar"), table)
    size = table["image_size"].cast(pa.int32())
    tar = pa.repeat(pa.scalar(number, pa.int32()), len(table))
    nothing = pa.nulls(len(table))
    return pa.table(
        {
            "tar": tar,
            "key": nothing,
            "caption": nothing,
            "image_offset": table["image_offset"],
            "image_size": size,
            "duplicate_group": nothing,
        }
    )


def _read_shard_index(stem: Path, columns: Sequence[str]) -> pa.Table:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    parquet = stem.with_suffix(".parquet")
    there = pq.read_schema(parquet).names
    wanted = ["key", "caption", "image_offset", "image_size", *columns]
    missing = [name for name in wanted if name not in there]
    if "image_offset" in missing:
        return _index_foreign_tar(stem, [name for name in wanted if name not in ("image_offset", "image_size")])
    if missing:
        raise InputError(f"{parquet}: no column '{missing[0]}'.{did_you_mean(missing[0], there)}")
    table = read_rows(parquet, list(dict.fromkeys(wanted)))
    table = table.filter(pc.is_valid(table["image_offset"]))
    _check_tar_is_whole(stem.with_suffix(".tar"), table)
    return table


def _check_tar_is_whole(tar: Path, table: pa.Table) -> None:
    import pyarrow.compute as pc

    if table.num_rows:
        end = pc.max(pc.add(table["image_offset"], table["image_size"])).as_py()
        size, _ = stamp(tar)
        if size < end:
            what = far(tar)
            raise InputError(
                f"{what.address if what else tar}: {size:,} bytes, but its samples reach to {end:,}: it is cut short; "
                "copy or build it again"
            )


def _index_foreign_tar(stem: Path, wanted: Sequence[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    parquet = stem.with_suffix(".parquet")
    there = pq.read_schema(parquet).names
    if absent := [name for name in wanted if name not in there]:
        raise InputError(f"{parquet}: no column '{absent[0]}'.{did_you_mean(absent[0], there)}")
    places = image_places(stem.with_suffix(".tar"))
    table = read_rows(parquet, list(dict.fromkeys(wanted)))
    keys = table["key"].cast(pa.string()).to_pylist()
    table = table.set_column(table.schema.get_field_index("key"), "key", pa.array(keys, pa.string()))
    found = [places.get(key) for key in keys]
    table = table.append_column("image_offset", pa.array([place and place[0] for place in found], pa.int64()))
    table = table.append_column("image_size", pa.array([place and place[1] for place in found], pa.int64()))
    return table.filter(pc.is_valid(table["image_offset"]))


def tar_images(tar: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """(key, (offset, size)) of each image member of any uncompressed tar, from its headers alone.

    A key is the member's name up to the first dot of its last part, without the `./` that `tar -c .` writes.

    Raises:
        InputError: not an uncompressed tar.
    """
    try:
        with os.fdopen(open_tar(tar), "rb") as file, tarfile.open(tar, "r:", file) as members:
            for member in members:
                folder, slash, name = member.name.removeprefix("./").rpartition("/")
                key, _, extension = name.partition(".")
                if member.isreg() and extension.lower() in IMAGE_EXTENSIONS:
                    yield f"{folder}{slash}{key}", (member.offset_data, member.size)
    except tarfile.ReadError as error:
        raise InputError(f"{tar}: not an uncompressed tar ({error}); gunzip it first if it is compressed") from error


def image_places(tar: Path) -> dict[str, tuple[int, int]]:
    """`tar_images` as a dict, read from the tar once (see `kept_index`).

    Raises:
        InputError: not an uncompressed tar.
    """
    import pyarrow as pa

    def read() -> pa.Table:
        found = list(tar_images(tar))
        columns = {
            "key": pa.array([key for key, _ in found], pa.string()),
            "offset": pa.array([offset for _, (offset, _) in found], pa.int64()),
            "size": pa.array([size for _, (_, size) in found], pa.int64()),
        }
        return pa.table(columns)

    table = kept_index(tar, "images", read)
    keys, offsets, sizes = (table[name].to_pylist() for name in ("key", "offset", "size"))
    return dict(zip(keys, zip(offsets, sizes, strict=True), strict=True))


def kept_index(tar: Path, what: str, read: Callable[[], pa.Table]) -> pa.Table:
    """What `read` finds in a tar, kept as NAME.tar.index beside it for as long as the tar's size and time are the same.

    Where that folder cannot be written to, it is kept in the user's cache; where neither can, not at all.
    """
    import pyarrow as pa

    stamped = fingerprint(INDEX_FORMAT, what, *stamp(tar))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cliptailor"
    paths = (tar.with_name(f"{tar.name}.index"), cache / f"{fingerprint(str(tar.resolve()))}.index")
    for path in paths:
        if made_from(path) == stamped:
            with suppress(OSError, pa.ArrowInvalid):
                return read_rows(path)
    table = read()
    for path in paths:
        with suppress(OSError):
            write_parquet(table, path, made_from=stamped)
            break
    return table


@dataclass(slots=True)
class MemberReader:
    """Reads members by offset with `pread`; opens each tar once per process and is safe to pickle or fork."""

    tars: list[Path]
    _open: dict[tuple[int, int], int] = field(default_factory=dict)

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> tuple[list[Path]]:
        return (self.tars,)

    def __setstate__(self, state: tuple[list[Path]]) -> None:
        self.tars, self._open = state[0], {}

    def read(self, tar: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of tar number `tar`.

        Raises:
            InputError: the file ends before that.
            Outage: it is far away, and cannot be fetched.
        """
        handle = self._open.get((os.getpid(), tar))
        if handle is None and far(self.tars[tar]):
            content = read_far(self.tars[tar], offset, size)
        else:
            content = os.pread(self._opened(tar) if handle is None else handle, size, offset)
        if len(content) != size:
            raise InputError(
                f"{self.tars[tar]}: ends at {offset + len(content):,}, but a sample ends at {offset + size:,}; "
                "copy or build it again"
            )
        return content

    def _opened(self, tar: int) -> int:
        if len(self._open) >= MAX_OPEN_TARS:
            os.close(self._open.pop(next(iter(self._open))))
        handle = self._open[os.getpid(), tar] = os.open(self.tars[tar], os.O_RDONLY)
        return handle

    def close(self) -> None:
        """Close the tars this process opened."""
        for (pid, _), handle in self._open.items():
            if pid == os.getpid():
                os.close(handle)
        self._open.clear()


class Facts:
    """Key, captions and duplicates of the samples of an index, from its columns or, where they are null, from the tars.

    Args:
        index: with `captions`, a list a sample, and `duplicate_group`.
        reader: of its tars.
    """

    def __init__(self, index: SampleIndex, reader: MemberReader) -> None:
        self._reader = reader
        names = ("tar", "image_offset", "image_size", "key", "captions", "duplicate_group")
        self._columns = {name: index.table[name] for name in names}
        self._has_texts_in_tars = self._columns["captions"].null_count > 0

    def _value(self, name: str, row: int) -> Any:
        return self._columns[name][row].as_py()

    def place(self, row: int) -> tuple[int, int, int]:
        """Number of the tar, offset and size of the image."""
        return self._value("tar", row), self._value("image_offset", row), self._value("image_size", row)

    def key(self, row: int) -> str:
        """The sample's id; where the tar is damaged there, the place of its image."""
        key = self._value("key", row)
        if key is None:
            tar, offset, _ = self.place(row)
            try:
                head = tarfile.TarInfo.frombuf(self._reader.read(tar, offset - 512, 512), "utf-8", "surrogateescape")
            except tarfile.TarError:
                return f"at byte {offset:,}"
            key = head.name.partition(".")[0]
        return str(key)

    def check(self, row: int) -> None:
        """Read what lies in the tar beside the image, if anything has to be read there.

        Raises:
            InputError: it is damaged.
        """
        if self._has_texts_in_tars and self._value("captions", row) is None:
            self._behind(row)

    def captions(self, row: int) -> list[str]:
        """What is said of it.

        Raises:
            InputError: it is damaged.
        """
        captions = self._value("captions", row)
        if captions is None:
            caption, _ = self._behind(row)
            captions = [caption] if caption.strip() else []
        return list(captions)

    def group(self, row: int) -> str | None:
        """The duplicates that it belongs to, in all datasets.

        Raises:
            InputError: it is damaged.
        """
        if self._value("captions", row) is None:
            group = self._behind(row)[1].get("duplicate_group")
            return None if group is None else f"{self._reader.tars[self._value('tar', row)].parent}:{group}"
        group = self._value("duplicate_group", row)
        return None if group is None else str(group)

    def _behind(self, row: int) -> tuple[str, dict[str, Any]]:
        """The two members behind an image: its caption and its facts."""
        tar, offset, size = self.place(row)
        members = []
        try:
            for _ in range(2):
                offset += size + -size % tarfile.BLOCKSIZE
                head = self._reader.read(tar, offset, tarfile.BLOCKSIZE)
                size = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape").size
                offset += tarfile.BLOCKSIZE
                members.append(self._reader.read(tar, offset, size))
            caption, facts = members[0].decode("utf-8", "surrogatepass"), json.loads(members[1])
        except (tarfile.TarError, ValueError, RecursionError) as error:
            raise InputError(f"{self._reader.tars[tar]}: the text at byte {offset:,} is damaged ({error})") from error
        return caption, facts if isinstance(facts, dict) else {}


def iter_images(index: SampleIndex) -> Iterable[tuple[str, str, bytes]]:
    """(key, caption, image bytes) of every sample, in order."""
    reader = MemberReader(index.tars)
    try:
        columns = (index.table[name].to_pylist() for name in ("key", "caption", "tar", "image_offset", "image_size"))
        for key, caption, tar, offset, size in zip(*columns, strict=True):
            yield key, caption or "", reader.read(tar, offset, size)
    finally:
        reader.close()
