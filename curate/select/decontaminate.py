"""Rows whose image is, or nearly is, one of a test set's are dropped, so that what is measured there stays honest.

Three looks, each at what the one before left: equal bytes; perceptual hash within a distance; cosine of CLIP
embeddings from a similarity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from curate.database import literal
from curate.expressions import label
from curate.filters import Decontaminate
from curate.select.near import near_pairs
from curate.select.pictures import decoded, embedded, find, pictures
from curate.select.selection import Selection, same_width
from curate.shards import read_index, shard_folder, shards_of

if TYPE_CHECKING:
    import numpy as np


@dataclass
class TestImages:
    """What a test set's images are told by; where two look the same, the first one's name stands.

    Attributes:
        by_sha256: sha256 of the bytes → name.
        by_phash: perceptual hash → name.
        names: of the rows of `embeddings`.
        embeddings: float32 (T, D), a block a batch.
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

    by_sha256: dict[str, str] = field(default_factory=dict)
    by_phash: dict[int, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    embeddings: list[np.ndarray] = field(default_factory=list)

    def look_at(self, named: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, np.ndarray]]:
        """Take in the pictures one by one, and hand on the pixels of those that can be decoded."""
        from curate.images import phash

        for name, content in named:
            self.by_sha256.setdefault(hashlib.sha256(content).hexdigest(), name)
            rgb = decoded(name, content)
            if rgb is not None:
                self.by_phash.setdefault(phash(rgb), name)
                yield name, rgb


def apply(selection: Selection, step: Decontaminate) -> None:
    """Drop what is in the test sets; the ledger's twin is the test image, the value how it was found.

    Raises:
        ConfigError: a path of `against` is not there, or `similarity` is asked for and no CLIP measures.
        InputError: a path of `against` holds no image.
    """
    test = _read(selection, step)
    _drop_equal(selection, step, test)
    _drop_near(selection, step, test)
    if step.similarity is not None:
        _drop_similar(selection, step, test)


def _read(selection: Selection, step: Decontaminate) -> TestImages:
    test = TestImages()
    for text in step.against:
        path = find(label(step), text)
        seen = test.look_at(pictures(path))
        if step.similarity is None:
            for _ in seen:
                pass
        else:
            clip = selection.loaded_clip
            for names, embeddings in embedded(clip, seen, selection.batch_size):
                test.names += names
                test.embeddings.append(embeddings)
        for sha256, name in _original_bytes(path):
            test.by_sha256.setdefault(sha256, name)
    return test


def _original_bytes(path: Path) -> Iterator[tuple[str, str]]:
    """(sha256, name) of a dataset's images as they came; what it stores may be smaller copies."""
    import pyarrow.parquet as pq

    stems = shards_of(shard_folder(path))
    if stems and all("sha256" in pq.read_schema(stem.with_suffix(".parquet")).names for stem in stems):
        table = read_index(path, columns=["sha256"]).table
        for key, sha256 in zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True):
            if sha256:
                yield sha256, f"{path}/{key}"


def _drop_equal(selection: Selection, step: Decontaminate, test: TestImages) -> None:
    import pyarrow as pa

    selection.insert(
        pa.table({"sha256": list(test.by_sha256), "name": list(test.by_sha256.values())}),
        f"""SELECT row, 'select', {literal(step.name)}, 'decontaminate', 'sha256', found.name
        FROM alive JOIN found USING (sha256)""",
    )


def _drop_near(selection: Selection, step: Decontaminate, test: TestImages) -> None:
    import numpy as np
    import pyarrow as pa

    alive = selection.db.execute("SELECT row, phash FROM alive WHERE phash IS NOT NULL ORDER BY row").fetchnumpy()
    rows = np.asarray(alive["row"], np.int64)
    hashes = np.asarray(alive["phash"], np.int64).view(np.uint64)
    known = np.array(list(test.by_phash), np.int64).view(np.uint64)
    i, j, distance = near_pairs(hashes, known, step.distance)
    order = np.lexsort((j, distance, i))  # of each row, the nearest test image; of equals, the first
    _, first = np.unique(i[order], return_index=True)
    best = order[first]
    names = list(test.by_phash.values())
    selection.insert(
        pa.table(
            {
                "row": pa.array(rows[i[best]], pa.int64()),
                "distance": pa.array(distance[best], pa.int64()),
                "name": pa.array([names[place] for place in j[best]], pa.string()),
            }
        ),
        f"SELECT row, 'select', {literal(step.name)}, 'decontaminate', 'distance=' || distance, name FROM found",
    )


def _drop_similar(selection: Selection, step: Decontaminate, test: TestImages) -> None:
    import numpy as np
    import pyarrow as pa

    if not test.embeddings:
        return
    test_TD = np.concatenate(test.embeddings)
    for keys, image_ND in selection.embeddings():
        if not len(image_ND):
            continue
        same_width(image_ND, test_TD, label(step))
        cosine_NT = image_ND @ test_TD.T
        best_N = cosine_NT.argmax(axis=1)
        cosine_N = np.round(cosine_NT.max(axis=1).astype(np.float64), 6)
        found = pa.table({"key": keys, "cosine": cosine_N, "name": [test.names[place] for place in best_N]})
        selection.insert(
            found.filter(pa.array(cosine_N >= step.similarity)),
            f"""SELECT row, 'select', {literal(step.name)}, 'decontaminate', printf('cosine=%.4f', found.cosine),
                found.name FROM alive JOIN found USING (key)""",
        )
