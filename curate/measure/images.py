"""The images that a raw shard holds: which, and in batches with their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.index import MemberReader
from curate.shards import OFFSET_COLUMNS

PLACE = ("image_offset", "image_size")


def fetched_rows(stem: Path, columns: Sequence[str] | None = ("key", "caption")) -> pa.Table:
    """The rows of a raw shard that have an image, by key: the columns asked for (None: all), and its place."""
    wanted = None if columns is None else [*columns, *PLACE]
    table = pq.read_table(stem.with_suffix(".parquet"), columns=wanted)
    return table.filter(pc.is_valid(table["image_offset"])).sort_by("key")


def count_images(stem: Path) -> int:
    """How many images a raw shard holds."""
    offsets = pq.read_table(stem.with_suffix(".parquet"), columns=["image_offset"])["image_offset"]
    return len(offsets) - int(offsets.null_count)


def batches(stem: Path, size: int) -> Iterator[pa.Table]:
    """All columns of the rows that have an image, `image` with its encoded bytes among them, `size` rows at a time."""
    rows = fetched_rows(stem, None)
    facts = rows.drop_columns([name for name in OFFSET_COLUMNS if name in rows.column_names])
    with closing(MemberReader([stem.with_suffix(".tar")])) as reader:
        for start in range(0, rows.num_rows, size):
            places = rows.select(PLACE).slice(start, size).to_pylist()
            images = [reader.read(0, place["image_offset"], place["image_size"]) for place in places]
            yield facts.slice(start, size).append_column("image", pa.array(images, pa.binary()))
