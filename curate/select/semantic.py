"""Semantic duplicates: images whose CLIP embeddings are almost the same (SemDeDup, Abbas et al. 2023, section 3).

k-means cuts the embeddings into cells, and only what lies in one cell is compared. A pair on the border of two cells
would be missed: so an image is compared with all that have its cell among their CELLS nearest ones.

The embeddings lie in a file meanwhile; memory holds a sample of them for k-means, and one cell.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from curate.select.near import Ints, link

if TYPE_CHECKING:
    import faiss

Floats = npt.NDArray[np.float32]

# Cells in which an image is looked for.
CELLS = 3
# Images for k-means to learn a cell from.
LEARN_FROM = 40
ITERATIONS = 10
# So much less may the cosine of two equal vectors be than 1, by the order of additions in float32.
UNSURE = 2e-6
# Images of one cell compared with all others in it at a time.
_BLOCK = 2_048


@dataclass(frozen=True)
class Vectors:
    """Embeddings on disk.

    Attributes:
        file: float16 (N, D), rows of length 1 but for the rounding.
        rows: which row of the list each is of, int64 (N).
    """

    file: np.memmap[Any, np.dtype[np.float16]]
    rows: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, places: Any) -> Floats:
        """Some of them, float32."""
        return of_length_one(np.asarray(self.file[places], np.float32))


def of_length_one(vectors_ND: Floats) -> Floats:
    """Vectors that were rounded to float16, again of length 1: so the cosine of two equal ones is 1."""
    squares_N = np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64)
    return vectors_ND / np.maximum(np.sqrt(squares_N), np.finfo(np.float32).tiny).astype(np.float32)[:, None]


def write_vectors(folder: Path, batches: Iterator[tuple[Ints, Floats]]) -> Vectors:
    """Put embeddings into a file that is gone when the process is.

    Args:
        folder: where there is room.
        batches: rows of the list, and their embeddings (N, D).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, width = [np.zeros(0, np.int64)], 1
    with tempfile.TemporaryFile(dir=folder) as file:
        for batch, vectors_ND in batches:
            if len(batch):
                rows.append(batch)
                width = vectors_ND.shape[1]
                file.write(np.ascontiguousarray(vectors_ND, np.float16).tobytes())
        file.flush()
        number = np.concatenate(rows)
        if not len(number):
            file.write(b"\0\0")
            file.flush()
        shape = (max(1, len(number)), width)
        return Vectors(np.memmap(file, np.float16, "r", shape=shape), number)


def near_groups(vectors: Vectors, similarity: float, seed: int) -> Ints:
    """The first member of each image's group: all that is linked, directly or through others, by cosines ≥ similarity.

    Args:
        vectors: the embeddings.
        similarity: least cosine of two duplicates, but for UNSURE.
        seed: of k-means.
    """
    label = np.arange(len(vectors), dtype=np.int64)
    for i, j in near_pairs(vectors, similarity, seed):
        label = link(label, i, j)
    return label


def near_pairs(vectors: Vectors, similarity: float, seed: int) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of places with a cosine of at least `similarity`, a block at a time; some come twice."""
    size = len(vectors)
    # So many that finding each image's cells takes about as long as comparing within them.
    num_cells = max(1, round((CELLS * size) ** 0.5) // 2)
    cells_NC = _cells(vectors, num_cells, seed)
    num_near = cells_NC.shape[1]
    order = np.argsort(cells_NC.ravel(), kind="stable")
    starts = np.searchsorted(cells_NC.ravel()[order], np.arange(num_cells + 1))
    for cell in range(num_cells):
        members, rank = np.divmod(order[starts[cell] : starts[cell + 1]], num_near)
        vectors_MD, at_home = vectors.read(members), np.flatnonzero(rank == 0)
        for start in range(0, len(at_home), _BLOCK):
            home = at_home[start : start + _BLOCK]
            cosine_HM = vectors_MD[home] @ vectors_MD.T
            h, m = np.nonzero(cosine_HM >= similarity - UNSURE)
            near = home[h] != m
            yield members[home[h[near]]], members[m[near]]


def cosines(vectors: Vectors, i: Ints, j: Ints) -> Floats:
    """The cosine of each pair of places."""
    found = [np.zeros(0, np.float32)]
    for start in range(0, len(i), 65_536):
        part = slice(start, start + 65_536)
        found.append(np.einsum("nd,nd->n", vectors.read(i[part]), vectors.read(j[part])))
    return np.concatenate(found)


def _cells(vectors: Vectors, num_cells: int, seed: int) -> Ints:
    """The nearest cells of each image, nearest first: (N, up to CELLS)."""
    if num_cells <= CELLS:
        return np.zeros((len(vectors), 1), np.int64)
    centres = _centres(vectors, num_cells, seed)
    cells = []
    for start in range(0, len(vectors), 65_536):
        _, nearest = centres.search(vectors.read(slice(start, min(start + 65_536, len(vectors)))), CELLS)
        cells.append(nearest)
    return np.concatenate(cells)


def _centres(vectors: Vectors, num_cells: int, seed: int) -> faiss.IndexFlatIP:
    import faiss

    sample = np.random.default_rng(seed).permutation(len(vectors))[: num_cells * LEARN_FROM]
    width = vectors.file.shape[1]
    means = faiss.Kmeans(
        width,
        num_cells,
        niter=ITERATIONS,
        seed=seed,
        spherical=True,
        max_points_per_centroid=LEARN_FROM,
        min_points_per_centroid=1,
    )
    means.train(vectors.read(np.sort(sample)))
    index = faiss.IndexFlatIP(width)
    assert means.centroids is not None
    index.add(means.centroids)
    return index
