"""Retrieval examples to look at: for a few captions, the best images before and after training."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from finetune.evaluate import Evaluation
from finetune.sets import EvaluationSets, RetrievalSet

THUMBNAIL_SIDE = 96


def examples(sets: EvaluationSets, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """What `examples.json` holds: the best images of a few captions of the first retrieval set, before and after.

    {"set": NAME, "examples": [{"caption", "truth": THUMBNAIL, "before": [IMAGE, …], "after": [IMAGE, …]}, …]} where an
    IMAGE, best first, is {"thumbnail", "caption", "similarity", "match"}; `match` says whether it belongs to the
    caption, `similarity` is the cosine, and a thumbnail is a data: URI of a small JPEG. The captions are drawn by seed,
    not picked.
    """
    task = next(iter(sets.retrieval), None)
    if task is None:
        return {"set": None, "examples": []}
    shown = [
        {
            "caption": task.captions[int(caption)],
            "truth": thumbnail(task.images.open(_first(task, caption=int(caption)))),
            "before": _images(task, int(caption), found),
            "after": _images(task, int(caption), after.examples[task.name][caption]),
        }
        for caption, found in before.examples[task.name].items()
    ]
    return {"set": task.name, "examples": shown}


def _images(task: RetrievalSet, caption: int, found: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
    belongs = set(task.pairs[task.pairs[:, 1] == caption, 0].tolist())
    return [
        {
            "thumbnail": thumbnail(task.images.open(image)),
            "caption": task.captions[int(task.pairs[task.pairs[:, 0] == image, 1][0])],
            "similarity": similarity,
            "match": image in belongs,
        }
        for image, similarity in found
    ]


def _first(task: RetrievalSet, *, caption: int) -> int:
    """The first image that belongs to a caption."""
    return int(task.pairs[task.pairs[:, 1] == caption, 0][0])


def thumbnail(image: Image.Image) -> str:
    """A data: URI of a JPEG with at most 96 px a side, without metadata."""
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
