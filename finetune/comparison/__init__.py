"""Several CLIPs side by side: one table as Markdown, CSV or JSON, and the plots of the paper as a page.

Changes are against the first CLIP, with paired bootstrap intervals: both saw the same samples. The plots are those of
Radford et al. 2021: score against GFLOPs an image on a logarithmic axis (figure 10), probes on a few labels of each
class beside zero-shot (figure 6), zero-shot against the probe on all labels, set by set (figure 8).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from curate import charts
from curate.errors import InputError
from curate.files import write_text
from curate.html import render
from finetune.config import RobustnessConfig
from finetune.evaluate import Evaluation, compare
from finetune.metrics import recall_at
from finetune.robustness import robustness
from finetune.sets import EvaluationSets
from finetune.tables import interval

# What is averaged into one score a CLIP, and drawn against its GFLOPs.
SCORES = {
    "zero-shot top-1": re.compile(r"zero_shot/[^/]+/top1"),
    "linear probe top-1": re.compile(r"probe/[^/]+/top1"),
    "retrieval recall@1": re.compile(r".+/(image_to_text|text_to_image)/recall@1"),
}
SHOTS = re.compile(r"probe/([^/]+)/(\d+)_shot/top1")


@dataclass(frozen=True, slots=True)
class Compared:
    """A CLIP's evaluation, and the GFLOPs of one image (two a multiply-add)."""

    name: str
    evaluation: Evaluation
    image_gflops: float


def check_same_classes(shifted: Mapping[str, RobustnessConfig], sets: EvaluationSets) -> None:
    """Check that each shifted set has its reference's classes.

    Raises:
        InputError: it has not; names one.
    """
    classes = {each.name: each.classes for each in all_classes(sets)}
    for name, asked in shifted.items():
        if odd := set(classes[name]) ^ set(classes[asked.reference]):
            raise InputError(f"robustness.{name}: other classes than {asked.reference}, such as '{min(odd)}'")


def all_classes(sets: EvaluationSets) -> list[Any]:
    """Every zero-shot set, those of the probes too."""
    return [*sets.zero_shot, *(probes.test for probes in sets.probes)]


def document(
    compared: Sequence[Compared], sets: EvaluationSets, shifted: Mapping[str, RobustnessConfig]
) -> dict[str, Any]:
    """Everything that was measured, ready for JSON.

    Returns:
        figures: by CLIP and metric: value, 95 % interval (low, high), number of samples n.
        changes: by each CLIP but the first, and metric: value, low, high of its difference to the first.
        image_gflops: by CLIP.
        classes: by classification task: the classes' names, in the order of the confusion matrix.
        confusion: by CLIP and task: how many images of each class (row) were taken for each (column).
        robustness: by shifted set and CLIP: see `finetune.robustness.Robustness`; and the reference's name.
    """
    first, *others = compared
    names = {each.name: each.classes for each in all_classes(sets)}
    confusion = {each.name: each.evaluation.confusion() for each in compared}
    return {
        "figures": {each.name: each.evaluation.summary() for each in compared},
        "changes": {each.name: compare(first.evaluation, each.evaluation)["delta"] for each in others},
        "image_gflops": {each.name: each.image_gflops for each in compared},
        "classes": {task: names[task.split("/")[1]] for task in confusion[first.name]},
        "confusion": confusion,
        "robustness": {
            name: {
                "reference": asked.reference,
                "clips": {each.name: _robustness(each.evaluation, name, asked) for each in compared},
            }
            for name, asked in shifted.items()
        },
    }


def _robustness(evaluation: Evaluation, name: str, asked: RobustnessConfig) -> dict[str, float | None]:
    there, here = (recall_at(evaluation.rankings[f"zero_shot/{each}"].ranks, 1) for each in (asked.reference, name))
    return asdict(robustness(there, here, asked.baseline))


# --- tables ----------------------------------------------------------------------------------------------------------


def write(found: Mapping[str, Any], path: Path) -> None:
    """Write the table (FILE.md, FILE.csv) or everything (FILE.json), whole or not at all."""
    writers: dict[str, Callable[[Mapping[str, Any]], str]] = {
        ".md": markdown,
        ".csv": as_csv,
        ".json": lambda everything: json.dumps(everything, indent=1) + "\n",
    }
    write_text(path, writers[path.suffix](found))


def markdown(found: Mapping[str, Any]) -> str:
    """A row a metric, a column a CLIP; the change where there are two; the table of robustness below."""
    clips, changes = list(found["figures"]), found["changes"]
    change = changes[clips[1]] if len(clips) == 2 else None
    rows = [
        [metric, *(interval(metric, found["figures"][clip][metric]) for clip in clips)]
        + ([interval(metric, change[metric], sign="+")] if change else [])
        for metric in found["figures"][clips[0]]
    ]
    rows.append(
        ["GFLOPs an image", *(f"{found['image_gflops'][clip]:.2f}" for clip in clips), *([""] if change else [])]
    )
    text = _table(["metric", *clips, *(["change"] if change else [])], rows)
    if found["robustness"]:
        text += "\n" + _table(
            ["shifted", "reference", "CLIP", "top-1 there", "top-1 here", "predicted", "effective robustness"],
            [
                [name, shift["reference"], clip, *_robustness_cells(row)]
                for name, shift in found["robustness"].items()
                for clip, row in shift["clips"].items()
            ],
        )
    return text


def _robustness_cells(row: Mapping[str, float | None]) -> list[str]:
    shares = [
        f"{100 * share:.1f} %" if share is not None else ""
        for share in (row["reference"], row["shifted"], row["predicted"])
    ]
    effective = {"value": row["effective"], "low": row["low"], "high": row["high"]}
    return [*shares, "" if row["effective"] is None else interval("", effective, sign="+")]  # type: ignore[arg-type]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def as_csv(found: Mapping[str, Any]) -> str:
    """A row a CLIP and metric; the change against the first CLIP is empty for the first."""
    file = io.StringIO()
    columns = ["clip", "metric", "value", "low", "high", "n", "change", "change_low", "change_high", "image_gflops"]
    rows = csv.DictWriter(file, columns, lineterminator="\n")
    rows.writeheader()
    for clip, figures in found["figures"].items():
        for metric, figure in figures.items():
            change = found["changes"].get(clip, {}).get(metric, {})
            ends = {"change": "value", "change_low": "low", "change_high": "high"}
            told = {column: change[key] for column, key in ends.items()} if change else {}
            rows.writerow(
                {"clip": clip, "metric": metric, **figure, **told, "image_gflops": found["image_gflops"][clip]}
            )
    return file.getvalue()


# --- plots -----------------------------------------------------------------------------------------------------------


def write_plots(found: Mapping[str, Any], path: Path) -> None:
    """Write the page of the plots: those for which something was measured."""
    plots = [plot for plot in (*_scores(found), *_few_shots(found), *_zero_shot_against_probe(found)) if plot["chart"]]
    values = {"plots": plots, "clips": list(found["figures"])}
    write_text(path, render(Path(__file__).parent, values))


def _mean(figures: Mapping[str, Mapping[str, float]], metrics: re.Pattern[str]) -> float:
    """Mean of the metrics with such a name; NaN if there is none."""
    values = [figure["value"] for metric, figure in figures.items() if metrics.fullmatch(metric)]
    return fmean(values) if values else float("nan")


def _scores(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    plots = []
    for score, metrics in SCORES.items():
        points = {
            clip: (found["image_gflops"][clip], 100 * _mean(figures, metrics))
            for clip, figures in found["figures"].items()
        }
        title = f"Mean {score} (%) against GFLOPs an image"
        plots.append({"title": title, "chart": charts.scatter(points, log_x=True, label=title), "clips": []})
    return plots


def _few_shots(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mean over the probed sets by labels a class; at 0 zero-shot."""
    series = {}
    for clip, figures in found["figures"].items():
        by_shots: dict[int, list[float]] = {}
        probed = dict.fromkeys(match[1] for metric in figures if (match := SHOTS.fullmatch(metric)))
        if probed:
            by_shots[0] = [100 * figures[f"zero_shot/{name}/top1"]["value"] for name in probed]
        for metric, figure in figures.items():
            if match := SHOTS.fullmatch(metric):
                by_shots.setdefault(int(match[2]), []).append(100 * figure["value"])
        if by_shots:
            series[clip] = [(float(shots), fmean(values)) for shots, values in sorted(by_shots.items())]
    title = "Mean top-1 (%) of a probe by labelled images of each class; at 0 zero-shot"
    return [{"title": title, "chart": charts.lines(series, label=title), "clips": list(series)}]


def _zero_shot_against_probe(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    points = {
        f"{metric.split('/')[1]}, {clip}" if len(found["figures"]) > 1 else metric.split("/")[1]: (
            100 * figure["value"],
            100 * figures[metric.replace("probe/", "zero_shot/", 1)]["value"],
        )
        for clip, figures in found["figures"].items()
        for metric, figure in figures.items()
        if SCORES["linear probe top-1"].fullmatch(metric)
    }
    title = "Zero-shot top-1 (%), upwards, against that of the probe on all labels"
    chart: Markup = charts.scatter(points, label=title)
    return [{"title": title, "chart": chart, "clips": []}]
