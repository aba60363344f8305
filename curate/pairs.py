"""Image–caption pairs of any form, read where they lie: for training, no image is downloaded or copied.

    a dataset of `curate build`, a folder of img2dataset shards      one split; captions from the shards' Parquet
    every other form of `curate.sources`                             tars without Parquet, folders of images
    a list file (Parquet, CSV, TSV, JSON lines)                      a column of paths, relative to the file's folder

All end as one `SampleIndex`: an image that is a file of its own is a member at offset 0 that is as long as the file.
So one reader reads them all. Rows that name the same image are one sample with several captions.

DuckDB is imported where it is asked: a dataset of shards, read as it is, needs none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.errors import ConfigError, InputError, did_you_mean
from curate.index import SampleIndex, read_index, read_places
from curate.remote import address
from curate.shards import shard_folder, shards_of

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

IMAGE_NAMES = ("image", "path", "image_path", "file_name", "filename", "filepath", "file", "img")
MEMORY_LIMIT = "4GB"
_NO_GROUP = "CAST(NULL AS VARCHAR)"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which pairs of a source, and from which columns.

    Attributes:
        key: what the source is called in the configuration, for messages: `data.sources[1]`.
        where: DuckDB expression over the source's columns; None: all rows.
        image: column of paths, of a list file; None: the first with a usual name.
        caption: column of the caption, or of a list of captions; None: the first with a usual name.
        is_labelled: whether captions are labels, which are looked at all together.
    """

    key: str
    where: str | None = None
    image: str | None = None
    caption: str | None = None
    is_labelled: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether all pairs are wanted, with their own captions."""
        return not (self.where or self.image or self.caption or self.is_labelled)


@dataclass(frozen=True, slots=True)
class _Places:
    """SQL of where a row's image lies: file (a text, or a number of a tar), offset, size; and of its key and group."""

    file: str
    offset: str
    size: str
    key: str
    group: str = _NO_GROUP


def read_pairs(path: Path, wanted: Wanted, split: str = "train") -> SampleIndex:
    """The pairs of a source, in its order.

    Args:
        path: a folder or a list file.
        wanted: which of them.
        split: of a dataset that has splits; everything else is `train`.

    Returns:
        Its table has `tar` (index into the files), `key`, `captions` (list of texts, may be empty), `image_offset`,
        `image_size` and `duplicate_group` (text or null). Of a very large dataset captions, key and group are null and
        stand in the tars (`curate.index.Facts`).

    Raises:
        ConfigError: a column or expression of `wanted` that does not fit the source.
        InputError: nothing there, not what it should be, or an image file that is missing: names the row.
    """
    if not (address(path) or path.exists()):
        raise InputError(f"{wanted.key}: {path}: no such file or folder; expected a dataset, images, tars or a list")
    with tempfile.TemporaryDirectory(prefix="cliptailor-") as scratch:
        if address(path) or (path.is_dir() and shards_of(shard_folder(path))):
            return _of_shards(path, wanted, split, Path(scratch))
        if split != "train":
            raise InputError(f"{wanted.key}: {path}: no {split} split; only a dataset of shards has splits")
        return _of_list(path, wanted, Path(scratch))


def _of_shards(path: Path, wanted: Wanted, split: str, scratch: Path) -> SampleIndex:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = shard_folder(path)
    if wanted.is_plain and (places := read_places(path, split)):
        table = places.table
        return SampleIndex(places.tars, table.rename_columns({"caption": "captions"}))
    first = (shards_of(folder, split) or shards_of(folder))[0].with_suffix(".parquet")
    there = pq.read_schema(first).names
    if wanted.image:
        raise ConfigError(f"{wanted.key}.image: the images of {path} are in its tars; leave it out")
    caption = _column(f"{wanted.key}.caption", wanted.caption or "caption", there, first)
    grouped = ["duplicate_group"] if "duplicate_group" in there else []
    if wanted.where:
        from curate.database import connect
        from curate.expressions import scalar_expression

        with connect(MEMORY_LIMIT, 0, scratch / "spill", []) as db:
            used = scalar_expression(db, f"{wanted.key}.where", wanted.where, there).columns
            index = read_index(path, split, list(dict.fromkeys([caption, *used, *grouped])))
            table = index.table.take(_rows_that_fit(db, index.table, wanted))
    else:
        index = read_index(path, split, list(dict.fromkeys([caption, *grouped])))
        table = index.table
    columns = {
        "tar": table["tar"],
        "key": table["key"].cast(pa.string()),
        "captions": _lists(table[caption]),
        "image_offset": table["image_offset"],
        "image_size": table["image_size"],
        "duplicate_group": table["duplicate_group"].cast(pa.string()) if grouped else pa.nulls(len(table), pa.string()),
    }
    return SampleIndex(index.tars, pa.table(columns))


def _rows_that_fit(db: duckdb.DuckDBPyConnection, table: pa.Table, wanted: Wanted) -> pa.Array:
    """Numbers of the rows for which the expression is true."""
    import pyarrow as pa

    from curate.database import arrow_table, column_types
    from curate.expressions import readable, scalar_expression

    db.register("listed", table.append_column("row_", pa.array(range(len(table)), pa.int64())))
    expression = scalar_expression(db, f"{wanted.key}.where", wanted.where or "true", column_types(db, "listed"))
    with readable(f"{wanted.key}.where"):
        text = f"SELECT row_ FROM listed WHERE coalesce(CAST(({expression.text}\n) AS BOOLEAN), false) ORDER BY row_"
        found = arrow_table(db, text)
    db.unregister("listed")
    return found["row_"]


def _lists(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Captions as lists: of the one that is there, or of none where it is blank."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(captions.type) or pa.types.is_large_list(captions.type):
        return captions.cast(pa.list_(pa.string()))
    texts = captions.cast(pa.string()).combine_chunks()
    said = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(texts), ""), fill_value=False)
    offsets = np.concatenate([[0], np.cumsum(said.to_numpy(zero_copy_only=False))]).astype(np.int32)
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(offsets), texts.filter(said))])


def _of_list(path: Path, wanted: Wanted, scratch: Path) -> SampleIndex:
    """Any other form: `curate.sources` makes a list of it, which has the places, or it is a list with paths."""
    from curate.database import column_types, connect, quoted
    from curate.lists import CAPTION_NAMES, is_nested, readable_list, reader
    from curate.sources import find

    listed = find(str(path), scratch, caption=wanted.caption)
    with connect(MEMORY_LIMIT, 0, scratch / "spill", list(listed.paths)) as db, readable_list(listed):
        relation = reader(db, listed)
        types = column_types(db, relation)
        if listed.root:
            if wanted.image:
                raise ConfigError(f"{wanted.key}.image: {path} is a folder of images, not a list; leave it out")
            root = listed.root
            places = _Places("source_file", "source_offset", "source_size", "'row ' || row_")
        else:
            root = listed.paths[0].parent
            image = _usual(f"{wanted.key}.image", wanted.image, IMAGE_NAMES, types, path)
            nothing = "CAST(NULL AS BIGINT)"
            places = _Places(f"CAST({quoted(image)} AS VARCHAR)", nothing, nothing, "'row ' || row_")
        caption = _usual(f"{wanted.key}.caption", wanted.caption, CAPTION_NAMES, types, path)
        if is_nested(types[caption].removesuffix("[]")):
            raise InputError(
                f"{path}: column '{caption}' holds {types[caption]}, neither text nor a list of texts; "
                f"name another column: {wanted.key}.caption"
            )
        table = _select(db, relation, places, caption, wanted)
    return _with_files(path, root, table)


def _column(where: str, name: str, there: Sequence[str], source: Path) -> str:
    if name not in there:
        raise ConfigError(f"{where}: {source} has no column '{name}'.{did_you_mean(name, there)}")
    return name


def _usual(where: str, given: str | None, usual: Sequence[str], types: dict[str, str], source: Path) -> str:
    """The column that was named, else the first with a usual name."""
    if given:
        return _column(where, given, list(types), source)
    spelled = {name.lower(): name for name in types}
    for name in usual:
        if name in spelled:
            return spelled[name]
    raise InputError(f"{source}: none of its columns ({', '.join(types)}) is named {', '.join(usual[:4])}; set {where}")


def _select(db: duckdb.DuckDBPyConnection, relation: str, places: _Places, caption: str, wanted: Wanted) -> pa.Table:
    """The samples: one row an image, in the order of the first row that names it.

    The rows are numbered before they are filtered, so that a message names the row as the user's editor counts it.
    """
    from curate.database import arrow_table, column_types, quoted
    from curate.expressions import readable, scalar_expression

    types = column_types(db, relation)
    where = "true"
    if wanted.where:
        found = scalar_expression(db, f"{wanted.key}.where", wanted.where, types)
        where = f"coalesce(CAST(({found.text}\n) AS BOOLEAN), false)"
    text = quoted(caption)
    texts = f"CAST({text} AS VARCHAR[])" if types[caption].endswith("[]") else f"[CAST({text} AS VARCHAR)]"
    # Without an expression of the user what DuckDB says is about the list, and its reader tells it.
    with readable(f"{wanted.key}.where") if wanted.where else nullcontext():
        return arrow_table(
            db,
            f"""SELECT file, min(row_) AS row, arg_min(key_, row_) AS key,
                list_filter(flatten(list(texts_ ORDER BY row_)), lambda t: trim(coalesce(t, '')) != '') AS captions,
                offset_ AS image_offset, size_ AS image_size, arg_min(group_, row_) AS duplicate_group
            FROM (
                SELECT row_, {places.file} AS file, {places.key} AS key_, {places.group} AS group_,
                    coalesce({texts}, []) AS texts_, {places.offset} AS offset_, {places.size} AS size_
                FROM (SELECT *, row_number() OVER () AS row_ FROM {relation}) WHERE {where}
            ) GROUP BY file, offset_, size_ ORDER BY row""",
        )


def _with_files(path: Path, root: Path, table: pa.Table) -> SampleIndex:
    """The index over files named by text; those that are images of their own get their length here.

    Each is asked for its length at once: one that is missing is found before training and not in the middle of it.
    """
    import pyarrow as pa

    numbers: dict[str, int] = {}
    columns: dict[str, list[Any]] = {"tar": [], "image_offset": [], "image_size": []}
    kept = []
    for place, (name, row, offset, size) in enumerate(
        zip(*(table[column].to_pylist() for column in ("file", "row", "image_offset", "image_size")), strict=True)
    ):
        if offset is None and size is not None:
            continue  # img2dataset could not download this one: it is in the Parquet alone
        kept.append(place)
        columns["tar"].append(numbers.setdefault(name, len(numbers)))
        columns["image_offset"].append(offset or 0)
        columns["image_size"].append(_length(path, root, name, row) if offset is None else size)
    types = {"tar": pa.int32(), "image_offset": pa.int64(), "image_size": pa.int64()}
    rest = table.select(["key", "captions", "duplicate_group"]).take(pa.array(kept, pa.int64()))
    arrays = {name: pa.array(values, types[name]) for name, values in columns.items()}
    whole = pa.table({**arrays, **{name: rest[name] for name in rest.column_names}})
    return SampleIndex([root / name for name in numbers], whole)


def _length(path: Path, root: Path, name: str | None, row: int) -> int:
    if not name:
        raise InputError(f"{path}: row {row}: no image; expected the path of an image file")
    if "://" in name:
        raise InputError(f"{path}: row {row}: {name} is a URL; expected a path: `curate build` downloads URLs")
    try:
        return (root / name).stat().st_size
    except OSError as error:
        raise InputError(f"{path}: row {row}: {root / name}: no such image ({error.strerror})") from error
