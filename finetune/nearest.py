"""What an evaluation keeps to be looked at: its queries' nearest candidates, and a piece of its similarity matrix.

Both are bounded, whatever the size of a set, and drawn by seed: never picked by what a CLIP does, so that the same
queries are seen before and after training.

Letters: N queries · M candidates · K nearest · D embedding width · R C rows and columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

WATCHED = 5_000  # queries of a task whose nearest candidates are kept
NEAREST = 4  # candidates kept for each
SIDE = 12  # rows and columns of a matrix
SCORES_AT_ONCE = 1 << 24
DIGITS = 4  # of a similarity; more are the device's, not the model's


@dataclass(frozen=True, slots=True)
class Nearest:
    """The nearest candidates of some queries, best first.

    Attributes:
        queries: their numbers, rising: all of them, or a sample of `WATCHED`.
        candidates: of each query the numbers of its nearest.
        similarity: the cosine of each.
    """

    queries: list[int]
    candidates: list[list[int]]
    similarity: list[list[float]]

    def of(self) -> dict[int, list[tuple[int, float]]]:
        """(candidate, similarity) of each query, by its number."""
        found = zip(self.queries, self.candidates, self.similarity, strict=True)
        return {query: list(zip(numbers, scores, strict=True)) for query, numbers, scores in found}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A piece of a similarity matrix: the cosine of each of these captions (rows) with each of these images."""

    captions: list[int]
    images: list[int]
    similarity: list[list[float]]


def nearest(query_ND: torch.Tensor, candidate_MD: torch.Tensor) -> Nearest:
    """The nearest candidates of (a seeded sample of) the queries, in chunks of bounded memory; NaN is the farthest.

    Args:
        query_ND: L2-normalised embeddings of the queries.
        candidate_MD: L2-normalised embeddings of the candidates.
    """
    watched = np.arange(len(query_ND))
    if len(watched) > WATCHED:
        watched = np.sort(np.random.default_rng(0).choice(len(query_ND), WATCHED, replace=False))
    rows = max(1, SCORES_AT_ONCE // max(1, len(candidate_MD)))
    found = Nearest(watched.tolist(), [], [])
    for first in range(0, len(watched), rows):
        chunk = torch.from_numpy(watched[first : first + rows]).to(query_ND.device)
        best = _cosines(query_ND[chunk], candidate_MD).topk(min(NEAREST, len(candidate_MD)), dim=1)
        found.candidates.extend(best.indices.tolist())
        found.similarity.extend(_rounded(best.values))
    return found


def _cosines(query_ND: torch.Tensor, candidate_MD: torch.Tensor) -> torch.Tensor:
    return (query_ND @ candidate_MD.T).nan_to_num_(nan=-1.0)


def _rounded(score_NK: torch.Tensor) -> list[list[float]]:
    return [[round(score, DIGITS) for score in row] for row in score_NK.tolist()]


def matrix(image_ND: torch.Tensor, caption_MD: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> Matrix:
    """The similarity of some true pairs with each other; on the diagonal each caption meets its own image.

    Args:
        image_ND: L2-normalised embeddings of all images.
        caption_MD: L2-normalised embeddings of all captions.
        pairs: (image, caption) to show; see `draw_pairs`.
    """
    images, captions = [image for image, _ in pairs], [caption for _, caption in pairs]
    return Matrix(captions, images, _rounded(_cosines(caption_MD[captions], image_ND[images])))


def draw_pairs(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """At most `SIDE` of the (image, caption) that belong together, drawn by seed; no image and no caption twice.

    They come in the order of the captions, which of classes is that of their names.
    """
    images: set[int] = set()
    captions: set[int] = set()
    drawn: list[tuple[int, int]] = []
    for number in np.random.default_rng(0).permutation(len(pairs)).tolist():
        image, caption = (int(each) for each in pairs[number])
        if image in images or caption in captions or len(drawn) == SIDE:
            continue
        images.add(image)
        captions.add(caption)
        drawn.append((image, caption))
    return sorted(drawn, key=lambda pair: pair[1])
