"""The dataset format: names, columns, tar members and their offsets, fingerprints, writing and reading.

A shard is `STEM.tar` beside `STEM.parquet`. The tar is what webdataset and open_clip read: for each sample the members
`KEY.jpg` (or .png, .webp, .gif: the image's own bytes), `KEY.txt` (the caption, UTF-8) and `KEY.json` (the facts),
adjacent, in USTAR, with no clock, owner or mode of this machine in it. The Parquet has one row per sample, with the
columns that img2dataset gives them (`key, url, caption, status, error_message, width, height, original_width,
original_height, sha256, …`) and, for each member, where its bytes lie in the tar: any sample is one `pread`.

Every file is written under a temporary name in its own folder, fsynced and renamed. The Parquet comes last, so a shard
is complete when its Parquet is there. Each Parquet of ours carries two words in its metadata: `cliptailor.fingerprint`,
of everything it was made from, and `cliptailor.digest`, of what is in it (not of where in the tar: images come in the
order in which servers answer). A stage reruns exactly those files whose fingerprint is no longer what it would be.

This module needs no torch, network or database.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from curate.errors import InputError, did_you_mean
from curate.ustar import header

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "val", "test", "retain")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic")
OFFSET_COLUMNS = (
    "image_ext",
    "image_offset",
    "image_size",
    "caption_offset",
    "caption_size",
    "json_offset",
    "json_size",
)
PLACES = ("image_offset", "caption_offset", "json_offset")
FINGERPRINT = b"cliptailor.fingerprint"
DIGEST = b"cliptailor.digest"
NOTE = b"cliptailor.note."
INDEX_FORMAT = 1
ROW_GROUP = 65_536
# From so many samples on, what an index for training says of each is where it lies; the rest is read from its tar.
MANY_SAMPLES = 4_000_000
# Images are written to a tar so many bytes at a time: a call into the system for each costs more than the copy.
WRITE_BYTES = 1 << 20
# A shuffled dataset may have more tars than a process may hold open (1,024 by default).
MAX_OPEN_TARS = 256


# --- names -----------------------------------------------------------------------------------------------------------


def shard_name(index: int, split: str | None = None) -> str:
    """`00042`, or `train-00042` for a packed shard."""
    return f"{split}-{index:05d}" if split else f"{index:05d}"


# --- writing files so that a kill at any moment leaves none half-written ---------------------------------------------


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


def sweep(folder: Path) -> None:
    """Remove temporary files that a killed run left in `folder`. Call it only while holding the folder's lock."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# --- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint(*parts: Any) -> str:
    """16 hex digits of a sha256 over the parts as canonical JSON; equal parts, equal fingerprint, on any machine."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


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


# --- writing a shard -------------------------------------------------------------------------------------------------


_AS_JSON = json.JSONEncoder(ensure_ascii=False, default=str, sort_keys=True).encode


class ShardWriter:
    """Writes one shard: `add` each sample, then leave the `with` block; nothing is visible before that.

    Args:
        stem: path of the shard without extension.
        schema: Arrow schema of the facts in each row, without the offset columns, which are appended.
        made_from: fingerprint of everything the shard is made from.
    """

    def __init__(self, stem: Path, schema: pa.Schema, *, made_from: str) -> None:
        import pyarrow as pa

        self.stem = stem
        self.made_from = made_from
        types = {"image_ext": pa.string()}
        self.schema = schema
        for name in OFFSET_COLUMNS:
            self.schema = self.schema.append(pa.field(name, types.get(name, pa.int64())))
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> ShardWriter:
        self._atomic = atomic(self.stem.with_suffix(".tar"))
        self._file: BinaryIO = self._atomic.__enter__().open("wb", buffering=WRITE_BYTES)
        self._end = 0
        return self

    def add(self, row: Mapping[str, Any], image: bytes | None = None, image_ext: str = "jpg") -> None:
        """Add a sample; without an image the row is in the Parquet alone (a candidate that could not be fetched).

        Args:
            row: the facts; needs `key` (no dot in it) and `caption`.
            image: encoded image.
            image_ext: one of IMAGE_EXTENSIONS.
        """
        places: dict[str, Any] = dict.fromkeys(OFFSET_COLUMNS)
        if image is not None:
            facts = {name: value for name, value in row.items() if not isinstance(value, bytes)}
            members = (
                ("image", image_ext, image),
                ("caption", "txt", (row["caption"] or "").encode("utf-8", "surrogatepass")),
                ("json", "json", _AS_JSON(facts).encode("utf-8", "surrogatepass")),
            )
            places["image_ext"] = image_ext
            blocks: list[bytes] = []
            for what, extension, content in members:
                places[f"{what}_offset"], places[f"{what}_size"] = self._end + tarfile.BLOCKSIZE, len(content)
                padding = -len(content) % tarfile.BLOCKSIZE
                blocks += (header(f"{row['key']}.{extension}", len(content)), content, bytes(padding))
                self._end += tarfile.BLOCKSIZE + len(content) + padding
            self._file.writelines(blocks)
        self._rows.append({**row, **places})

    def sort_rows(self) -> None:
        """Put the Parquet's rows into the order of their keys; the tar stays in the order of arrival."""
        self._rows.sort(key=lambda row: str(row["key"]))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        import pyarrow as pa

        if error is None:
            end = self._end + 2 * tarfile.BLOCKSIZE  # two empty blocks, and then to a whole record
            self._file.write(bytes(end - self._end + -end % tarfile.RECORDSIZE))
            self._file.flush()
            os.fsync(self._file.fileno())
            # An older Parquet never stands beside the new tar, in which its places are wrong.
            self.stem.with_suffix(".parquet").unlink(missing_ok=True)
        self._file.close()
        self._atomic.__exit__(kind, error, trace)
        if error is None:
            table = pa.Table.from_pylist(self._rows, schema=self.schema)
            write_parquet(table, self.stem.with_suffix(".parquet"), made_from=self.made_from)


# --- reading ---------------------------------------------------------------------------------------------------------


def shards_of(folder: Path, split: str | None = None) -> list[Path]:
    """Stems of the complete shards in a folder, sorted: of one split of a packed dataset, or all."""
    pattern = f"{split}-*.parquet" if split else "*.parquet"
    return [path.with_suffix("") for path in sorted(folder.glob(pattern)) if path.with_suffix(".tar").exists()]


def shard_folder(path: Path) -> Path:
    """Where the shards of a dataset lie: `path/shards` for a folder that `curate build` made, else `path` itself."""
    return path / "shards" if (path / "shards").is_dir() else path


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
        tables.append(table.append_column("tar", pa.array([number] * table.num_rows, pa.int32())))
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
        if tar.stat().st_size < end:
            raise InputError(
                f"{tar}: {tar.stat().st_size:,} bytes, but its samples reach to {end:,}: it is cut short; "
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

    Raises:
        InputError: not an uncompressed tar.
    """
    try:
        with tarfile.open(tar, "r:") as members:
            for member in members:
                key, _, extension = member.name.partition(".")
                if member.isreg() and extension.lower() in IMAGE_EXTENSIONS:
                    yield key, (member.offset_data, member.size)
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

    seen = tar.stat()
    stamp = fingerprint(INDEX_FORMAT, what, seen.st_size, seen.st_mtime_ns)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cliptailor"
    paths = (tar.with_name(f"{tar.name}.index"), cache / f"{fingerprint(str(tar.resolve()))}.index")
    for path in paths:
        if made_from(path) == stamp:
            with suppress(OSError, pa.ArrowInvalid):
                return read_rows(path)
    table = read()
    for path in paths:
        with suppress(OSError):
            write_parquet(table, path, made_from=stamp)
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
        """
        handle = self._open.get((os.getpid(), tar))
        if handle is None:
            if len(self._open) >= MAX_OPEN_TARS:
                os.close(self._open.pop(next(iter(self._open))))
            handle = self._open[os.getpid(), tar] = os.open(self.tars[tar], os.O_RDONLY)
        content = os.pread(handle, size, offset)
        if len(content) != size:
            raise InputError(
                f"{self.tars[tar]}: ends at {offset + len(content):,}, but a sample ends at {offset + size:,}; "
                "copy or build it again"
            )
        return content

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

    def _value(self, name: str, row: int) -> Any:
        return self._columns[name][row].as_py()

    def place(self, row: int) -> tuple[int, int, int]:
        """Number of the tar, offset and size of the image."""
        return self._value("tar", row), self._value("image_offset", row), self._value("image_size", row)

    def key(self, row: int) -> str:
        """The sample's id."""
        key = self._value("key", row)
        if key is None:
            tar, offset, _ = self.place(row)
            head = tarfile.TarInfo.frombuf(self._reader.read(tar, offset - 512, 512), "utf-8", "surrogateescape")
            key = head.name.partition(".")[0]
        return str(key)

    def captions(self, row: int) -> list[str]:
        """What is said of it."""
        captions = self._value("captions", row)
        if captions is None:
            caption, _ = self._behind(row)
            text = caption.decode("utf-8", "surrogatepass")
            captions = [text] if text.strip() else []
        return list(captions)

    def group(self, row: int) -> str | None:
        """The duplicates that it belongs to, in all datasets."""
        if self._value("captions", row) is None:
            group = json.loads(self._behind(row)[1]).get("duplicate_group")
            return None if group is None else f"{self._reader.tars[self._value('tar', row)].parent}:{group}"
        group = self._value("duplicate_group", row)
        return None if group is None else str(group)

    def _behind(self, row: int) -> list[bytes]:
        """The two members behind an image: its caption and its facts."""
        tar, offset, size = self.place(row)
        members = []
        for _ in range(2):
            offset += size + -size % tarfile.BLOCKSIZE
            head = self._reader.read(tar, offset, tarfile.BLOCKSIZE)
            size = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape").size
            offset += tarfile.BLOCKSIZE
            members.append(self._reader.read(tar, offset, size))
        return members


def iter_images(index: SampleIndex) -> Iterable[tuple[str, str, bytes]]:
    """(key, caption, image bytes) of every sample, in order."""
    reader = MemberReader(index.tars)
    try:
        columns = (index.table[name].to_pylist() for name in ("key", "caption", "tar", "image_offset", "image_size"))
        for key, caption, tar, offset, size in zip(*columns, strict=True):
            yield key, caption or "", reader.read(tar, offset, size)
    finally:
        reader.close()
