"""A training run → `report.html`: what was trained on what, what that did to every metric, curves, cost, recipe.

It computes nothing that was not measured in the run: figures and intervals come from `evaluation.json` as they are. A
metric is called worse as plainly as better: when the paired 95 % interval of its change lies on one side of zero.
"""

from __future__ import annotations

import csv
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from curate import charts
from curate.errors import InputError
from curate.files import fingerprint, write_text
from curate.html import MAX_BYTES, count, duration, render, share, size
from finetune.report.changed import NOTHING, changed, heat

POINTS = 300  # of a curve; longer ones are averaged
SHARES = ("recall@", "map", "top", "per_class_mean", "ece", "accuracy")  # metrics from 0 to 1
LOWER_IS_BETTER = ("loss", "median_rank", "ece", "ece_fitted")
FACTS: dict[str, Callable[[Any], str]] = {
    "model": str,
    "adapter": str,
    "checkpoint": str,
    "trainable_parameters": count,
    "total_parameters": count,
    "train_samples": count,
    "steps": count,
    "seconds": duration,
    "samples_per_second": count,
    "features": lambda found: (
        f"{found['tower']}: {found['embeddings']:,} embeddings, {found['computed']:,} of them computed in this run "
        f"({found['seconds']:g} s), read {found['spared']:,} times instead of decoding and encoding again"
    ),
    "samples_seen": count,
    "evaluation_seconds": duration,
    "peak_memory_bytes": size,
    "device": str,
    "fingerprint": str,
}
TASKS = {
    "val": "Validation split: unseen pairs of the domain",
    "test": "Test split: unseen pairs of the domain",
    "retain": "Retain split: general pairs, where forgetting shows",
}


def run(run: Path) -> Path:
    """Write `report.html` into the folder of a run and return its path.

    Args:
        run: has config.yaml and evaluation.json; metrics.csv and examples.json as far as they are there.

    Raises:
        InputError: a file is missing or is not what it should be; names it.
    """
    config = _read(run / "config.yaml", yaml.safe_load)
    evaluation = _read(run / "evaluation.json", json.loads)
    curves = read_curves(run / "metrics.csv")
    examples = _read(run / "examples.json", json.loads) if (run / "examples.json").exists() else {}
    values = _values(run, config, evaluation, curves)
    values["interpolation"] = _interpolation(run / "interpolation.json")
    page = _page({**values, **changed(examples, _title)})
    if len(page.encode()) > MAX_BYTES:  # pictures of a size that the evaluation never writes
        page = _page({**values, **changed(examples, _title, pictures=False)})
    if len(page.encode()) > MAX_BYTES:
        page = _page({**values, **NOTHING})
    write_text(run / "report.html", page)
    return run / "report.html"


def _page(values: Mapping[str, Any]) -> str:
    return render(Path(__file__).parent, values, more=("changed.css",))


def _read(path: Path, parse: Any) -> dict[str, Any]:
    try:
        found = parse(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: not there; 'finetune fit' writes it at the end of a run") from error
    except (ValueError, yaml.YAMLError, OSError) as error:
        raise InputError(f"{path}: not readable: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected names and values, found {type(found).__name__}")
    return found


def _values(
    run: Path, config: Mapping[str, Any], evaluation: Mapping[str, Any], curves: Mapping[str, list[tuple[float, float]]]
) -> dict[str, Any]:
    rows = compare(evaluation)
    dataset = Path(str((config.get("data") or {}).get("dataset", "")))
    plain = json.loads(json.dumps(config, default=str))
    return {
        "name": run.resolve().name,
        "facts": _facts(evaluation.get("facts") or {}),
        "headlines": headlines(rows),
        "tally": {
            verdict: [row["metric"] for row in rows if row["verdict"] == verdict]
            for verdict in ("better", "worse", "same")
        },
        "tasks": _tasks(rows),
        "plots": _plots(curves),
        "dataset": dataset,
        "dataset_report": _relative(dataset / "report.html", run),
        "used_data": _data(config, run),
        "start_fingerprint": _start_fingerprint(run / "inputs.json"),
        "fingerprint": fingerprint({key: value for key, value in plain.items() if key != "out"}),
        "config": yaml.safe_dump(plain, sort_keys=False, allow_unicode=True),
        "versions": _versions(),
    }


def _facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts that are known, as they are read."""
    known = {name: value for name, value in facts.items() if value is not None}
    told = {name: write(known[name]) for name, write in FACTS.items() if name in known}
    if {"trainable_parameters", "total_parameters"} <= set(known):
        told["trained_share"] = share(known["trainable_parameters"], known["total_parameters"])
    return told


# --- before and after ------------------------------------------------------------------------------------------------


def compare(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each metric that was measured before and after: its values as they are written, and the verdict.

    Args:
        evaluation: `evaluation.json`: before, after {METRIC: {value, low, high, n}}, delta {METRIC: {value, low, high}}

    Raises:
        InputError: a part or a metric's figure is missing.
    """
    try:
        before, after, delta = evaluation["before"], evaluation["after"], evaluation["delta"]
        return [_row(metric, before[metric], after[metric], delta[metric]) for metric in after if metric in before]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"evaluation.json: {error} is missing; 'finetune fit' writes before, after and delta"
        ) from error


def _row(
    metric: str, before: Mapping[str, float], after: Mapping[str, float], delta: Mapping[str, float]
) -> dict[str, Any]:
    told = verdict(metric, delta["low"], delta["high"])
    ends = [values[key] for values in (before, after) for key in ("value", "low", "high") if math.isfinite(values[key])]
    low, high = (0.0, 1.0) if _is_share(metric) else (min(ends, default=0.0), max(ends, default=1.0))
    marks = [(values["value"], values["low"], values["high"]) for values in (before, after)]
    drawable = all(math.isfinite(value) for mark in marks for value in mark)
    return {
        "metric": metric,
        "before": written(metric, before["value"]),
        "before_interval": f"{written(metric, before['low'])} – {written(metric, before['high'])}",
        "after": written(metric, after["value"]),
        "after_interval": f"{written(metric, after['low'])} – {written(metric, after['high'])}",
        "delta": written_change(metric, delta["value"]),
        "delta_interval": f"{written_change(metric, delta['low'])} … {written_change(metric, delta['high'])}",
        "n": count(after["n"]) if "n" in after else "",
        "verdict": told,
        "chart": charts.change(marks[0], marks[1], low, high, told) if drawable else "",
    }


def verdict(metric: str, low: float, high: float) -> str:
    """`better`, `worse` or `same` (no clear change), by the 95 % interval of after − before."""
    if _lower_is_better(metric):
        low, high = -high, -low
    if low > 0:
        return "better"
    return "worse" if high < 0 else "same"


def written(metric: str, value: float) -> str:
    """A value as it is read: `97.8 %` of a share, `0.412` of anything else."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if _is_share(metric) else f"{value:.4g}"


def written_change(metric: str, value: float) -> str:
    """A change with its sign: `+87.5` points of a share, `−0.12` of anything else."""
    if not math.isfinite(value):
        return "–"
    text = f"{100 * value:+.1f}" if _is_share(metric) else f"{value:+.3g}"
    return text.replace("-", "−")


def _is_share(metric: str) -> bool:
    return metric.rpartition("/")[2].startswith(SHARES)


def _lower_is_better(metric: str) -> bool:
    return metric.rpartition("/")[2] in LOWER_IS_BETTER


def headlines(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows a reader looks for first: zero-shot accuracy, else retrieval in the domain; and what was forgotten."""
    wanted = (r"zero_shot/.+/top1", r"val/image_to_text/recall@1", r"retain/image_to_text/recall@1")
    found = [next((row for row in rows if re.fullmatch(pattern, row["metric"])), None) for pattern in wanted]
    return [row for row in found if row is not None]


def _tasks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows by task, each with a title and the metric's name within it."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        task, name = split_metric(row["metric"])
        tasks.setdefault(task, []).append({**row, "name": name})
    return [{"title": _title(task), "rows": some} for task, some in tasks.items()]


def split_metric(metric: str) -> tuple[str, str]:
    """Task and name: (`zero_shot/digits`, `top1`), (`val`, `image_to_text/recall@1`)."""
    parts = metric.split("/")
    cut = 2 if parts[0] == "zero_shot" and len(parts) > 2 else 1
    return "/".join(parts[:cut]), "/".join(parts[cut:]) or metric


def _title(task: str) -> str:
    if task.startswith("zero_shot/"):
        return f"Zero-shot classification: {task.removeprefix('zero_shot/')}"
    return TASKS.get(task, f"Retrieval: {task}")


# --- curves ----------------------------------------------------------------------------------------------------------


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """By column: (step, value) points in the order of the steps, of Lightning's metrics.csv; none if it is not there.

    Of a step that was logged twice (a run continued from before it) the later row counts. Cells that are not finite
    numbers are left out.
    """
    curves: dict[str, dict[float, float]] = {}
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            step = _number(row.pop("step", None))
            for column, cell in row.items():
                value = _number(cell)
                if column and column != "epoch" and step is not None and value is not None:
                    curves.setdefault(column, {})[step] = value
    return {column: sorted(points.items()) for column, points in curves.items()}


def _number(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def thin(points: Sequence[tuple[float, float]], at_most: int = POINTS) -> list[tuple[float, float]]:
    """At most `at_most` points: means of as many equal runs of neighbours."""
    if len(points) <= at_most:
        return list(points)
    cuts = [round(number * len(points) / at_most) for number in range(at_most + 1)]
    runs = [points[start:end] for start, end in itertools.pairwise(cuts)]
    return [(sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some)) for some in runs]


def _plots(curves: Mapping[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for column, points in sorted(curves.items()):
        groups.setdefault(_plot_of(column), {})[split_metric(column)[1] if "loss" not in column else column] = thin(
            points
        )
    return [
        {"title": title, "chart": charts.lines(series, label=title), "names": list(series)}
        for title, series in sorted(groups.items(), key=lambda group: (group[0] != "Loss", group[0]))
    ]


def _interpolation(path: Path) -> dict[str, Any] | None:
    """The curve from start to end, of the towers together, and every point within the budget, the best first."""
    if not path.exists():
        return None
    told = _read(path, json.loads)
    goal, points = told["goal"], told["points"]
    together = [point for point in points if point["image"] == point["text"]]
    kept = goal["keep"][0] if len(goal["keep"]) == 1 else f"mean of {', '.join(goal['keep'])}"
    series = {
        goal["gain"]: [(point["image"], point["gain"]) for point in together],
        kept: [(point["image"], point["keep"]) for point in together],
    }
    rows = [
        {
            "alpha": _alpha(point),
            "gain": written(goal["gain"], point["gain"]),
            "keep": written(goal["keep"][0], point["keep"]),
            "gain_interval": _written_interval(goal["gain"], point.get("gain_interval")),
            "keep_interval": _written_interval(goal["keep"][0], point.get("keep_interval")),
            "within": point["within"],
            "chosen": told["chosen"] == {tower: point[tower] for tower in ("image", "text")},
        }
        for point in points
    ]
    return {
        "names": list(series),
        "grid": _alpha_grid(points) if len(together) < len(points) else None,
        "chart": charts.lines(series, label="Between start and end"),
        "rows": rows,
        "chosen": told["chosen"] and _alpha(told["chosen"]),
        "budget": f"{100 * goal['budget']:g}",
    }


def _written_interval(metric: str, ends: Sequence[float] | None) -> str:
    return f"{written(metric, ends[0])} – {written(metric, ends[1])}" if ends else ""


def _alpha_grid(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The gain at each α of the towers apart."""
    images, texts = ({point[tower] for point in points} for tower in ("image", "text"))
    at = {(point["image"], point["text"]): point for point in points}
    rows, columns = sorted(images), sorted(texts)
    ends = [point["gain"] for point in points]
    cells = heat(
        [[at[image, text]["gain"] for text in columns] for image in rows],
        (min(ends), max(ends)),
        [[at[image, text]["within"] for text in columns] for image in rows],
        lambda value: f"{100 * value:.0f}",
    )
    return {"rows": [f"{image:g}" for image in rows], "columns": [f"{text:g}" for text in columns], "cells": cells}


def _alpha(point: Mapping[str, float]) -> str:
    image, text = point["image"], point["text"]
    return f"{image:g}" if image == text else f"{image:g} image, {text:g} text"


def _plot_of(column: str) -> str:
    if column.rpartition("/")[2].startswith("loss"):
        return "Loss"
    if column.startswith("lr-"):
        return "Learning rate"
    if "logit_scale" in column:
        return "Logit scale"
    task, name = split_metric(column)
    if task == "train" and name.endswith(("_rank", "_spread")):
        return "Effective rank in a batch" if name.endswith("_rank") else "Spread in a batch"
    direction, slash, metric = name.partition("/")
    if not slash:
        return _title(task)
    # No chart has more lines than there are colours.
    return f"{_title(task)}, {metric if metric == 'median_rank' else direction.replace('_', ' ')}"


# --- the rest --------------------------------------------------------------------------------------------------------


def _data(config: Mapping[str, Any], run: Path) -> list[dict[str, Any]]:
    """What was trained on and evaluated with: paths, what they were for, links to their reports and data cards."""
    data = config.get("data") or {}
    sources = [source for source in data.get("sources") or [] if isinstance(source, dict)]
    used = [("trained on", source.get("path")) for source in sources] or [("trained on", data.get("dataset"))]
    used += [("evaluated and replayed", data.get("dataset"))] if sources else []
    used += [("replayed", data.get("replay_dataset"))] if data.get("replay_dataset") else []
    return [
        {
            "use": use,
            "path": str(path),
            "report": _relative(Path(str(path)) / "report.html", run),
            "card": _relative(Path(str(path)) / "README.md", run),
            "fingerprint": _dataset_fingerprint(Path(str(path)) / "manifest.json"),
        }
        for use, path in used
        if path
    ]


def _start_fingerprint(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text("utf-8"))["weights"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _relative(path: Path, start: Path) -> str | None:
    """A link from a file in `start` to a file that is there; None if it is not."""
    if not path.is_file():
        return None
    return quote(Path(os.path.relpath(path.resolve(), start.resolve())).as_posix())


def _dataset_fingerprint(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text("utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a folder of img2dataset's has no manifest


def _versions() -> dict[str, str]:
    packages = ("cliptailor", "torch", "lightning", "open_clip_torch", "peft")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
