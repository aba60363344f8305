"""The dataset format: names, columns, tar members and their offsets; writing a shard.

A shard is `STEM.tar` beside `STEM.parquet`. The tar is what webdataset and open_clip read: for each sample the members
`KEY.jpg` (or .png, .webp, .gif: the image's own bytes), `KEY.txt` (the caption, UTF-8) and `KEY.json` (the facts),
adjacent, in USTAR, with no clock, owner or mode of this machine in it. The Parquet has one row per sample, with the
columns that img2dataset gives them (`key, url, caption, status, error_message, width, height, original_width,
original_height, sha256, …`) and, for each member, where its bytes lie in the tar: any sample is one `pread`
(curate/index.py). The Parquet is written last, so a shard is complete when its Parquet is there.

This module needs no torch, network or database.
"""

from __future__ import annotations

import json
import math
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from curate.files import atomic, write_parquet
from curate.remote import address, far_files, mirror
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
# Where an image lies that is here already: path below the source's folder, and place in that file if it is a tar.
PLACE = ("source_file", "source_offset", "source_size")
# Images are written to a tar so many bytes at a time: a call into the system for each costs more than the copy.
WRITE_BYTES = 1 << 20


def shard_name(index: int, split: str | None = None) -> str:
    """`00042`, or `train-00042` for a packed shard."""
    return f"{split}-{index:05d}" if split else f"{index:05d}"


_AS_JSON = json.JSONEncoder(ensure_ascii=False, default=str, sort_keys=True, allow_nan=False).encode


def _as_json(facts: dict[str, Any]) -> str:
    """Facts as JSON, which has no NaN and no infinity: they are null there, and what they are in the Parquet."""
    try:
        return _AS_JSON(facts)
    except ValueError:
        return _AS_JSON(_finite(facts))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value


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
                ("json", "json", _as_json(facts).encode("utf-8", "surrogatepass")),
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


def shards_of(folder: Path, split: str | None = None) -> list[Path]:
    """Stems of the complete shards in a folder, sorted: of one split of a packed dataset, or all."""
    pattern = f"{split}-*.parquet" if split else "*.parquet"
    stems, far = [path.with_suffix("") for path in sorted(folder.glob(pattern))], far_files(folder)
    return [stem for stem in stems if f"{stem.name}.tar" in far or stem.with_suffix(".tar").exists()]


def shard_folder(path: Path) -> Path:
    """Where the shards of a dataset lie: `path/shards` for a folder that `curate build` made, else `path` itself.

    Of a dataset far away (`s3://…`) it is the mirror, which the first call of a process makes (curate/remote.py).

    Raises:
        InputError, ConfigError: it cannot be read from there.
    """
    if far := address(path):
        return mirror(far)
    return path / "shards" if (path / "shards").is_dir() else path
