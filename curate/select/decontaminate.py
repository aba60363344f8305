"""Rows whose image is, or nearly is, one of a test set's are dropped, so that what is measured there stays honest.

Three looks, each at what the one before left: equal bytes; perceptual hash within a distance; cosine of CLIP
embeddings from a similarity. A test set may be large: a block of it is in memory at a time, and of all of it 16 bytes
an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from curate.database import literal
from curate.expressions import label
from curate.filters import Decontaminate
from curate.index import read_index
from curate.select.known import blocks, known_images, vectors
from curate.select.near import nearest
from curate.select.pictures import find
from curate.select.selection import Selection, same_width
from curate.shards import shard_folder, shards_of

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

AT_ONCE = 1_024  # images that are compared with a block of the test set


def apply(selection: Selection, step: Decontaminate) -> None:
    """Drop what is in the test sets; the ledger's twin is the test image, the value how it was found.

    Of several test images that are equally near, the first one's name stands.

    Raises:
        ConfigError: a path of `against` is not there, or `similarity` is asked for and no CLIP measures.
        InputError: a path of `against` holds no image.
    """
    paths = [find(label(step), text) for text in step.against]
    test = [known_images(selection, path, embed=step.similarity is not None) for path in paths]
    for path, file in zip(paths, test, strict=True):
        for block in blocks(file, ["sha256", "name"]):
            _drop_equal(selection, step, block)
        for block in _original_bytes(path):
            _drop_equal(selection, step, block)
    _drop_near(selection, step, test)
    if step.similarity is not None:
        _drop_similar(selection, step, test)


def _original_bytes(path: Path) -> Iterator[pa.Table]:
    """sha256 and name of a dataset's images as they came; what it stores may be smaller copies."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stems = shards_of(shard_folder(path))
    if stems and all("sha256" in pq.read_schema(stem.with_suffix(".parquet")).names for stem in stems):
        table = read_index(path, columns=["sha256"]).table
        names = pa.array([f"{path}/{key}" for key in table["key"].to_pylist()], pa.string())
        yield pa.table({"sha256": table["sha256"], "name": names})


def _drop_equal(selection: Selection, step: Decontaminate, block: pa.Table) -> None:
    import numpy as np

    # A block's later rows find none that an earlier block dropped: so of equals the first one's name stands.
    selection.insert(
        block.append_column("place_", [np.arange(block.num_rows)]),
        f"""SELECT row, 'select', {literal(step.name)}, 'decontaminate', 'sha256', test.name
        FROM alive JOIN (SELECT sha256, arg_min(name, place_) AS name FROM found GROUP BY sha256) AS test
            USING (sha256)""",
    )


def _drop_near(selection: Selection, step: Decontaminate, test: list[Path]) -> None:
    import numpy as np
    import pyarrow as pa

    places, known = _hashes(test)
    alive = selection.db.execute("SELECT row, phash FROM alive WHERE phash IS NOT NULL ORDER BY row").fetchnumpy()
    rows = np.asarray(alive["row"], np.int64)
    hashes, which = np.unique(np.asarray(alive["phash"], np.int64).view(np.uint64), return_inverse=True)
    which = which.ravel()
    distance, best = nearest(hashes, known, step.distance)
    hit = np.flatnonzero(best[which] >= 0)
    names = _names(test, places[best[which[hit]]])
    selection.insert(
        pa.table({"row": rows[hit], "distance": distance[which[hit]], "name": pa.array(names, pa.string())}),
        f"SELECT row, 'select', {literal(step.name)}, 'decontaminate', 'distance=' || distance, name FROM found",
    )


def _hashes(test: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The different perceptual hashes, uint64, and the place of the first test image that has each."""
    import numpy as np

    places, found, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for file in test:
        for block in blocks(file, ["phash"]):
            column = block["phash"].combine_chunks()
            there = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
            places.append(start + there)
            found.append(column.drop_null().to_numpy())
            start += block.num_rows
    every = np.concatenate(places)
    hashes, first = np.unique(np.concatenate(found).view(np.uint64), return_index=True)
    order = np.argsort(every[first])
    return every[first][order], hashes[order]


def _names(test: list[Path], places: np.ndarray) -> list[str]:
    """The names of the test images at these places, counted over all files."""
    import numpy as np

    names, start = [""] * len(places), 0
    for file in test:
        for block in blocks(file, ["name"]):
            here = np.flatnonzero((places >= start) & (places < start + block.num_rows))
            for place, name in zip(here.tolist(), block["name"].take(places[here] - start).to_pylist(), strict=True):
                names[place] = name
            start += block.num_rows
    return names


@dataclass
class Best:
    """Of each image the nearest test image so far.

    Attributes:
        cosine: float64 (N), rounded to six places; −2 where none is near enough.
        name: of the test image.
    """

    cosine: np.ndarray
    name: list[str]


def _drop_similar(selection: Selection, step: Decontaminate, test: list[Path]) -> None:
    import pyarrow as pa

    from curate.select.semantic import UNSURE

    least = (step.similarity or 1.0) - UNSURE
    for rows, image_ND in selection.alive_embeddings():
        if not len(rows):
            continue
        best = most_similar(image_ND, test, step)
        found = pa.table({"row": rows, "cosine": best.cosine, "name": pa.array(best.name, pa.string())})
        selection.insert(
            found.filter(pa.array(best.cosine >= least)),
            f"""SELECT row, 'select', {literal(step.name)}, 'decontaminate', printf('cosine=%.4f', cosine), name
            FROM found""",
        )


def most_similar(image_ND: np.ndarray, test: list[Path], step: Decontaminate) -> Best:
    """Of images (N, D), the most similar of the test images in these files, if it is similar enough for the step."""
    import numpy as np

    best = Best(np.full(len(image_ND), -2.0), [""] * len(image_ND))
    for whole in (block for file in test for block in blocks(file, ["name", "embedding"])):
        block = whole.filter(whole["embedding"].is_valid())
        if block.num_rows:
            test_TD = vectors(block)
            same_width(image_ND, test_TD, label(step))
            for start in range(0, len(image_ND), AT_ONCE):
                cosine_NT = image_ND[start : start + AT_ONCE] @ test_TD.T
                _take_better(best, start, cosine_NT, block["name"], step.similarity or 1.0)
    return best


def _take_better(best: Best, start: int, cosine_NT: np.ndarray, names: pa.ChunkedArray, least: float) -> None:
    """Update the best from place `start` on with the cosines to further test images."""
    import numpy as np

    from curate.select.semantic import UNSURE

    # A little less first: rounding all of them takes longer than the product.
    near = np.flatnonzero(cosine_NT.max(axis=1) >= least - 2 * UNSURE)
    rounded = np.round(cosine_NT[near].astype(np.float64), 6)
    for n, t, cosine in zip((start + near).tolist(), rounded.argmax(axis=1), rounded.max(axis=1), strict=True):
        if cosine > best.cosine[n]:
            best.cosine[n], best.name[n] = cosine, names[t].as_py()
