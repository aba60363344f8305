"""The user's own images and texts as the steps compare with them: kept in `.select/`, so that they are looked at once.

A file for each set of images and for each list of texts, with a line for each of them. Its fingerprint is of what is
in it and of the CLIP: a changed threshold reads the file and loads no CLIP, a new test image makes it anew. It is
written and read a block at a time, so that a test set may be larger than memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.files import fingerprint, made_from, sweep, write_batches
from curate.select.pictures import batched, decoded, pictures
from curate.select.selection import Selection

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FOLDER = ".select"
FORMAT = 1
BLOCK = 4_096  # images of a block; their embeddings are a few MB


def known_images(selection: Selection, path: Path, *, embed: bool) -> Path:
    """The file about the images of a file, a folder or a dataset.

    Its columns: `name`, `sha256` of the bytes, `phash`, and with `embed` also `embedding` (float32, D); the last two
    are null where an image cannot be decoded.

    Raises:
        InputError: no image is there.
    """
    found = selection.identity_of(path)
    weights = selection.weights if embed else None
    return _made(selection, ("images", str(path), found, weights), lambda: _looked_at(selection, path, embed))


def embedded_texts(selection: Selection, texts: Sequence[str]) -> np.ndarray:
    """The embeddings of texts, float32 (T, D), in their order; (0, 0) of none."""
    import numpy as np

    if not texts:
        return np.zeros((0, 0), np.float32)
    path = _made(selection, ("texts", list(texts), selection.weights), lambda: _read_texts(selection, texts))
    return np.concatenate([vectors(block) for block in blocks(path, ["embedding"])])


def blocks(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The file's rows, a block at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns=list(columns))


def vectors(block: pa.Table) -> np.ndarray:
    """The embeddings of a block, float32 (B, D), without those that are null."""
    import pyarrow.compute as pc

    column = block["embedding"]
    there = len(column) - column.null_count
    flat = pc.list_flatten(column).to_numpy()
    return flat.reshape(there, len(flat) // max(1, there))


def schema() -> pa.Schema:
    """Of the files."""
    import pyarrow as pa

    types = {"name": pa.string(), "sha256": pa.string(), "phash": pa.int64(), "embedding": pa.list_(pa.float32())}
    return pa.schema(types)


def remove_unused(selection: Selection) -> None:
    """Remove the files that no step of this selection asked for."""
    sweep(selection.known)
    for path in selection.known.glob("*.parquet"):
        if path not in selection.asked:
            path.unlink()


def _made(selection: Selection, parts: tuple[Any, ...], look: Any) -> Path:
    """The file of this fingerprint; made by `look`, which gives its batches, if it is not there."""
    made = fingerprint("known", FORMAT, *parts)
    path = selection.known / f"{made}.parquet"
    if made_from(path) != made:
        write_batches(look(), schema(), path, made_from=made, row_group=BLOCK)
    selection.asked.add(path)
    return path


def _looked_at(selection: Selection, path: Path, embed: bool) -> Iterator[pa.RecordBatch]:
    from curate.images import phash

    for batch in batched(pictures(path), selection.batch_size if embed else 64):
        rgbs = [decoded(name, content) for name, content in batch]
        embeddings: list[Any] = [None] * len(batch)
        if embed and (there := [place for place, rgb in enumerate(rgbs) if rgb is not None]):
            found = _embedded(selection, [rgbs[place] for place in there])
            for place, vector in zip(there, found, strict=True):
                embeddings[place] = vector
        yield _batch(
            [name for name, _ in batch],
            [hashlib.sha256(content).hexdigest() for _, content in batch],
            [None if rgb is None else phash(rgb) for rgb in rgbs],
            embeddings,
        )


def _embedded(selection: Selection, rgbs: Sequence[Any]) -> np.ndarray:
    from PIL import Image

    return selection.loaded_clip.embed_images([Image.fromarray(rgb) for rgb in rgbs]).cpu().numpy()


def _read_texts(selection: Selection, texts: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for batch in batched(texts, max(selection.batch_size, 64)):  # a list of concepts may be long
        found = selection.loaded_clip.embed_captions(batch).cpu().numpy()
        nothing = [None] * len(batch)
        yield _batch(batch, nothing, nothing, list(found))


def _batch(*columns: list[Any]) -> pa.RecordBatch:
    import pyarrow as pa

    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema(), strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema())
