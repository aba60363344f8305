"""`examples.json` → what the page's sections of pictures show: won and lost, confusion, similarities, failures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from curate.errors import InputError

PICTURE = re.compile(r"data:image/(jpeg|png|webp);base64,[A-Za-z0-9+/=]+")
LEVELS = 20  # of a cell's colour
DIRECTIONS = {"image_to_text": "image → captions", "text_to_image": "caption → images"}
NOTHING: dict[str, list[Any]] = {"retrieval": [], "classification": [], "matrices": [], "left_out": []}


def changed(examples: Mapping[str, Any], title: Callable[[str], str], *, pictures: bool = True) -> dict[str, Any]:
    """What the sections show; nothing of a file that an earlier version wrote.

    Args:
        examples: examples.json (finetune/examples.py).
        title: a task's name in words.
        pictures: whether there is room for them.

    Raises:
        InputError: a part is missing.
    """
    if "pictures" not in examples:
        return dict(NOTHING)
    shown = {key: source for key, source in examples["pictures"].items() if pictures and _is_picture(source)}
    try:
        return {
            "retrieval": [_retrieval(task, shown, title) for task in examples["retrieval"]],
            "classification": [_classification(task, shown, title) for task in examples["classification"]],
            "matrices": [_matrix(found, shown, title) for found in examples["matrices"]],
            "left_out": examples["left_out"],
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"examples.json: {error} is missing or wrong; 'finetune fit' writes it") from error


def _is_picture(source: Any) -> bool:
    return isinstance(source, str) and PICTURE.fullmatch(source) is not None


def _retrieval(task: Mapping[str, Any], shown: Mapping[str, str], title: Callable[[str], str]) -> dict[str, Any]:
    def item(some: Mapping[str, Any]) -> dict[str, Any]:
        return {**some, "source": shown.get(some["picture"]), "is_image": some["picture"] is not None}

    def example(some: Mapping[str, Any]) -> dict[str, Any]:
        sides = {
            side: {**some[side], "nearest": [item(found) for found in some[side]["nearest"]]}
            for side in ("before", "after")
        }
        return {"query": item(some["query"]), "truth": [item(each) for each in some["truth"]], **sides}

    chosen = {kind: [example(some) for some in task["examples"][kind]] for kind in ("won", "lost", "worst")}
    return {**task, "title": title(task["set"]), "way": DIRECTIONS[task["direction"]], "examples": chosen}


def _classification(task: Mapping[str, Any], shown: Mapping[str, str], title: Callable[[str], str]) -> dict[str, Any]:
    confusion = task["confusion"]
    names = [*confusion["classes"], *(["all others"] if confusion["others"] else [])]
    diagonal = [[row == column for column in range(len(names))] for row in range(len(confusion["classes"]))]
    cells = {
        side: heat(confusion[side], (0.0, 1.0), diagonal, lambda value: f"{100 * value:.0f}" if value else "")
        for side in ("before", "after")
    }
    return {
        **task,
        "title": title(f"zero_shot/{task['set']}"),
        "changes": [
            {**change, "sources": [shown.get(key) for key in change["pictures"]], "fewer": _fewer(change)}
            for change in task["changes"]
        ],
        "confusion": {"rows": confusion["classes"], "columns": names, **cells},
        "worst": [{**some, "source": shown.get(some["picture"])} for some in task["worst"]],
    }


def _fewer(change: Mapping[str, Any]) -> bool:
    return bool(change["after"] < change["before"])


def _matrix(found: Mapping[str, Any], shown: Mapping[str, str], title: Callable[[str], str]) -> dict[str, Any]:
    """One scale for both sides, from the least to the highest cosine: what spread apart is seen to."""
    finite = [value for side in ("before", "after") for row in found[side] for value in row if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    sides = {
        side: heat(found[side], (low, high), found["true"], lambda value: f"{100 * value:.0f}".replace("-", "−"))
        for side in ("before", "after")
    }
    margins = {side: _margin(found[side], found["true"]) for side in ("before", "after")}
    return {
        "title": title(found["set"]),
        "captions": found["captions"],
        "images": [shown.get(key) for key in found["images"]],
        "low": f"{low:.2f}".replace("-", "−"),
        "high": f"{high:.2f}".replace("-", "−"),
        "margins": margins,
        **sides,
    }


def _margin(values: Sequence[Sequence[float]], true: Sequence[Sequence[bool]]) -> str | None:
    """By how much the pairs that belong together are nearer than the others, on average; None without others."""
    cells = [(value, own) for row, owns in zip(values, true, strict=True) for value, own in zip(row, owns, strict=True)]
    own, other = ([value for value, mine in cells if mine is which] for which in (True, False))
    if not own or not other:
        return None
    return f"{sum(own) / len(own) - sum(other) / len(other):+.2f}".replace("-", "−")


def heat(
    values: Sequence[Sequence[float]],
    scale: tuple[float, float],
    marked: Sequence[Sequence[bool]],
    write: Callable[[float], str],
) -> list[list[dict[str, Any]]]:
    """Cells: a level of colour from 0 to `LEVELS`, what stands in it, whether it is marked.

    Args:
        values: rows of numbers.
        scale: the least and the highest number that colours tell apart.
        marked: cells to be ringed.
        write: a number as it stands in its cell.
    """
    low, span = scale[0], scale[1] - scale[0] or 1.0
    return [
        [
            {"level": round(LEVELS * min(max((value - low) / span, 0.0), 1.0)), "text": write(value), "marked": mark}
            for value, mark in zip(row, marks, strict=True)
        ]
        for row, marks in zip(values, marked, strict=True)
    ]
