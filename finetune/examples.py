"""What training changed, to look at: queries won and lost, the worst failures, confusions, similarities, in pictures.

Everything is read off two evaluations of the same sets; its size is bounded whatever theirs. What stands for many is
drawn by seed, not picked; what is the worst, or changed most, is said to be.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from finetune.evaluate import Evaluation
from finetune.images import Images
from finetune.nearest import Matrix
from finetune.sets import EvaluationSets, RetrievalSet, ZeroShotSet

THUMBNAIL_SIDE = 96
SETS = 6  # of each kind that are shown
SHOWN = 4  # queries won, lost, and of the worst failures, of each task
CAPTIONS = 3  # of an image that are shown
CONFUSIONS = 6  # of a set that changed most
CLASSES = 12  # of a confusion matrix
Counts = Counter[tuple[int, int]]  # how many images of a class (first) were taken for a class (second)


def examples(sets: EvaluationSets, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """What `examples.json` holds.

    {"pictures": {ID: a data: URI of a small JPEG},
     "retrieval": [{"set", "direction", "queries", "watched", "won", "lost",
                    "examples": {"won": [EXAMPLE, …], "lost": […], "worst": […]}}, …],
     "classification": [{"set", "images", "won", "lost", "changes": [CHANGE, …], "confusion": …, "worst": […]}, …],
     "matrices": [{"set", "captions": [TEXT, …], "images": [ID, …], "true": [[bool, …], …], "before": [[cosine, …], …],
                   "after": …}, …],
     "left_out": [names of sets beyond the first six of a kind]}

    An EXAMPLE is {"query": ITEM, "truth": [ITEM, …], "before": {"rank", "nearest": [ITEM, …]}, "after": …}, an ITEM
    {"picture": ID or None, "caption"}, of what was found with "similarity" (the cosine) and "match" (whether it belongs
    to the query). The functions below say what the rest is.
    """
    pictures = _Pictures()
    shown, named = sets.retrieval[:SETS], sets.zero_shot[:SETS]
    left = [task.name for task in sets.retrieval[SETS:]] + [f"zero_shot/{task.name}" for task in sets.zero_shot[SETS:]]
    retrieval = [
        found
        for task in shown
        for view in (_ImageToText(task, pictures), _TextToImage(task, pictures))
        if (found := _retrieval(view, before, after))
    ]
    classification = [_classification(task, pictures, before, after) for task in named]
    captions = {task.name: task.captions for task in shown} | {f"zero_shot/{t.name}": t.classes for t in named}
    images = {task.name: task.images for task in shown} | {f"zero_shot/{t.name}": t.images for t in named}
    truths = {task.name: {(int(i), int(c)) for i, c in task.pairs} for task in shown}
    truths |= {f"zero_shot/{task.name}": set(enumerate(task.labels)) for task in named}
    matrices = [
        {
            "set": name,
            "captions": [captions[name][number] for number in was.captions],
            "images": [pictures.add(name, images[name], number) for number in was.images],
            "true": [[(image, caption) in truths[name] for image in was.images] for caption in was.captions],
            "before": was.similarity,
            "after": now.similarity,
        }
        for name, was, now in _in_both(before.matrices, after.matrices, images)
    ]
    return {
        "pictures": pictures.shown,
        "retrieval": retrieval,
        "classification": classification,
        "matrices": matrices,
        "left_out": left,
    }


def _in_both(
    before: Mapping[str, Matrix], after: Mapping[str, Matrix], names: Iterable[str]
) -> Iterable[tuple[str, Matrix, Matrix]]:
    return ((name, before[name], after[name]) for name in names if name in before and name in after)


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Thumbnails, each made once."""

    shown: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, images: Images, number: int) -> str:
        """The id of an image of a set."""
        key = f"{name}/{number}"
        if key not in self.shown:
            self.shown[key] = thumbnail(images.open(number))
        return key


# --- retrieval -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _View:
    """One direction of a retrieval set: what its queries and its candidates are."""

    task: RetrievalSet
    pictures: _Pictures

    def image(self, number: int) -> dict[str, Any]:
        """An image as an ITEM, with a caption of its own."""
        caption = int(self.task.pairs[self.task.pairs[:, 0] == number, 1][0])
        return {
            "picture": self.pictures.add(self.task.name, self.task.images, number),
            "caption": self.task.captions[caption],
        }

    def text(self, number: int) -> dict[str, Any]:
        """A caption as an ITEM."""
        return {"picture": None, "caption": self.task.captions[number]}

    def belong(self, query: int, side: int) -> list[int]:
        """The true candidates of a query that stands in column `side` of the pairs."""
        return [int(number) for number in self.task.pairs[self.task.pairs[:, side] == query, 1 - side]]


class _ImageToText(_View):
    direction = "image_to_text"
    __slots__ = ()

    def query(self, number: int) -> dict[str, Any]:
        return self.image(number)

    def candidate(self, number: int) -> dict[str, Any]:
        return self.text(number)

    def true(self, query: int) -> list[int]:
        return self.belong(query, 0)


class _TextToImage(_View):
    direction = "text_to_image"
    __slots__ = ()

    def query(self, number: int) -> dict[str, Any]:
        return self.text(number)

    def candidate(self, number: int) -> dict[str, Any]:
        return self.image(number)

    def true(self, query: int) -> list[int]:
        return self.belong(query, 1)


def _retrieval(view: _ImageToText | _TextToImage, before: Evaluation, after: Evaluation) -> dict[str, Any] | None:
    """Queries whose first candidate became a true one (won), or ceased to be (lost), and those that stand worst now.

    None where the evaluation before the run did not keep what its queries found.
    """
    task = f"{view.task.name}/{view.direction}"
    if task not in before.nearest or task not in after.nearest:
        return None
    was, now = (np.array(each.rankings[task].ranks) for each in (before, after))
    watched = np.array(sorted(set(before.nearest[task].queries) & set(after.nearest[task].queries)), dtype=np.int64)
    won, lost = (was > 1) & (now == 1), (was == 1) & (now > 1)
    worst = watched[np.argsort(-now[watched], kind="stable")]
    chosen = {
        "won": _drawn(watched[won[watched]]),
        "lost": _drawn(watched[lost[watched]]),
        "worst": [int(query) for query in worst[:SHOWN] if now[query] > 1],
    }
    found = before.nearest[task].of(), after.nearest[task].of()

    def example(query: int) -> dict[str, Any]:
        true = view.true(query)
        sides = {
            side: {
                "rank": int(ranks[query]),
                "nearest": [
                    {**view.candidate(number), "similarity": similarity, "match": number in true}
                    for number, similarity in nearest[query]
                ],
            }
            for side, ranks, nearest in zip(("before", "after"), (was, now), found, strict=True)
        }
        return {
            "query": view.query(query),
            "truth": [view.candidate(number) for number in true[:CAPTIONS]],
            **sides,
        }

    return {
        "set": view.task.name,
        "direction": view.direction,
        "queries": len(now),
        "watched": len(watched),
        "won": int(won.sum()),
        "lost": int(lost.sum()),
        "examples": {kind: [example(query) for query in queries] for kind, queries in chosen.items()},
    }


def _drawn(numbers: Sequence[int] | np.ndarray, most: int = SHOWN) -> list[int]:
    """A few of these numbers, drawn by seed."""
    return sorted(int(number) for number in np.random.default_rng(0).permutation(numbers)[:most])


# --- classification --------------------------------------------------------------------------------------------------


def _classification(task: ZeroShotSet, pictures: _Pictures, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """What was taken for what, before and after, where that changed most; and the surest of the mistakes."""
    name = f"zero_shot/{task.name}"
    was, now = before.rankings[name], after.rankings[name]
    labels, old, new = (np.array(each) for each in (task.labels, was.predicted, now.predicted))

    def picture(number: int) -> str:
        return pictures.add(name, task.images, number)

    def told(number: int) -> dict[str, Any]:
        """An image, its class, and what it was and is taken for, with the probability of that."""
        sides = {
            side: {
                "class": task.classes[ranking.predicted[number]],
                "probability": ranking.confidence[number],
                "rank": ranking.ranks[number],
            }
            for side, ranking in (("before", was), ("after", now))
        }
        return {"picture": picture(number), "class": task.classes[task.labels[number]], **sides}

    mistaken = np.flatnonzero(new != labels)
    surest = mistaken[np.argsort(-np.array(now.confidence)[mistaken], kind="stable")][: 2 * SHOWN]
    then, later = (Counter(zip(task.labels, ranking.predicted, strict=True)) for ranking in (was, now))
    changes = [
        {
            "class": task.classes[true],
            "taken_for": task.classes[taken],
            "of": int((labels == true).sum()),
            "before": then[true, taken],
            "after": later[true, taken],
            "pictures": [picture(n) for n in _drawn(_moved(labels == true, old == taken, new == taken), 3)],
        }
        for true, taken in changed_most(then, later)
    ]
    return {
        "set": task.name,
        "images": len(labels),
        "won": int(((old != labels) & (new == labels)).sum()),
        "lost": int(((old == labels) & (new != labels)).sum()),
        "changes": changes,
        "confusion": _confusion(task.classes, then, later),
        "worst": [told(int(number)) for number in surest],
    }


def _moved(of_class: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The images of a class that ceased to be taken for another, or, where that is more, began to."""
    gone, new = np.flatnonzero(of_class & before & ~after), np.flatnonzero(of_class & after & ~before)
    return gone if len(gone) >= len(new) else new


def changed_most(before: Counts, after: Counts, most: int = CONFUSIONS) -> list[tuple[int, int]]:
    """The mistakes (true class, predicted class) whose number changed most, the most changed first.

    Args:
        before: how many images of a class were taken for which.
        after: the same.
        most: how many mistakes.
    """
    change = {pair: abs(after[pair] - before[pair]) for pair in before.keys() | after.keys() if pair[0] != pair[1]}
    changed = [pair for pair, by in change.items() if by]
    return sorted(changed, key=lambda pair: (-change[pair], pair))[:most]


def _confusion(classes: Sequence[str], before: Counts, after: Counts) -> dict[str, Any]:
    """{"classes", "others", "before", "after"}: of each class (row) the share that was taken for each (column).

    At most `CLASSES`: those whose rows and columns changed most; then the last column is all the `others` together.
    Classes without an image have no row's shares to show: zeros.
    """
    weight: Counter[int] = Counter()
    for true, taken in before.keys() | after.keys():
        change = abs(after[true, taken] - before[true, taken])
        weight[true] += change
        weight[taken] += change
    kept = sorted(sorted(range(len(classes)), key=lambda number: (-weight[number], number))[:CLASSES])
    others = len(kept) < len(classes)

    def shares(counts: Counts) -> list[list[float]]:
        totals: Counter[int] = Counter()
        for (true, _), images in counts.items():
            totals[true] += images
        rows = []
        for true in kept:
            row = [counts[true, taken] for taken in kept]
            row += [totals[true] - sum(row)] if others else []
            rows.append([round(images / max(totals[true], 1), 4) for images in row])
        return rows

    names = [classes[number] for number in kept]
    return {"classes": names, "others": others, "before": shares(before), "after": shares(after)}


def thumbnail(image: Image.Image) -> str:
    """A data: URI of a JPEG with at most 96 px a side, without metadata."""
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
