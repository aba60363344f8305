"""What the commands print: figures of one or several CLIPs, before and after, predictions."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 1_000  # a table takes what it needs
Summary = Mapping[str, Mapping[str, float]]


def show(table: Table) -> None:
    """Print to stdout; where that is no terminal, wide enough that nothing is cut."""
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def figures_table(summaries: Mapping[str, Summary]) -> Table:
    """One row a metric, one column a CLIP: value and 95 % interval."""
    table = Table(title="with 95 % intervals", title_justify="left")
    table.add_column("metric", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for name in summaries:
        # Text, not str: a path may have brackets, which would be read as colours.
        table.add_column(Text(name), justify="right", overflow="fold")
    for metric in dict.fromkeys(metric for summary in summaries.values() for metric in summary):
        cells = [summary.get(metric) for summary in summaries.values()]
        size = max(int(cell["n"]) for cell in cells if cell)
        table.add_row(Text(metric), f"{size:,}", *(interval(metric, cell) if cell else "" for cell in cells))
    return table


def change_table(evaluation: Mapping[str, Any]) -> Table:
    """evaluation.json as a table: before, after and the change; a change whose interval excludes 0 is coloured."""
    table = Table(title="before and after, with 95 % intervals", title_justify="left")
    table.add_column("metric", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right", overflow="fold")  # in a narrow terminal, no figure is cut
    for metric, after in evaluation["after"].items():
        before, delta = evaluation["before"][metric], evaluation["delta"][metric]
        change = f"[{_style(metric, delta)}]{interval(metric, delta, sign='+')}"
        table.add_row(Text(metric), f"{after['n']:,}", interval(metric, before), interval(metric, after), change)
    return table


def _style(metric: str, delta: Mapping[str, float]) -> str:
    if delta["low"] <= 0 <= delta["high"]:
        return "default"
    better = delta["value"] < 0 if less_is_better(metric) else delta["value"] > 0
    return "green" if better else "red"


def is_rank(metric: str) -> bool:
    """Whether the metric is a rank; the others are shares."""
    return metric.endswith("median_rank")


def less_is_better(metric: str) -> bool:
    """Whether the metric is a rank or an error."""
    return is_rank(metric) or metric.rpartition("/")[2].startswith("ece")


def interval(metric: str, figure: Mapping[str, float], sign: str = "") -> str:
    """`91.2 % (88.0 to 94.1)`; ranks without percent."""
    if is_rank(metric):
        return f"{figure['value']:{sign}.1f} ({figure['low']:{sign}.1f} to {figure['high']:{sign}.1f})"
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.1f} % ({low:{sign}.1f} to {high:{sign}.1f})"


def prediction_table(images: Iterable[tuple[str, Iterable[tuple[float, float, str]]]], top: int) -> Table:
    """One row an image: its `top` most probable queries.

    Args:
        images: name, and (probability, logit, query) of each query, the most probable first.
        top: how many of them are shown.
    """
    table = Table("image", *(f"{place}." for place in range(1, top + 1)))
    for image, queries in images:
        best = itertools.islice(queries, top)
        # Text, not str: a query or a file name may have brackets, which would be read as colours.
        table.add_row(
            Text(image), *(Text(f"{share:6.1%}  {query}  (logit {logit:.2f})") for share, logit, query in best)
        )
    return table


def search_table(rows: Iterable[tuple[str, int, str, float, str]]) -> Table:
    """One row a result: query, rank, image, similarity and caption."""
    table = Table("query", "rank", "image", "similarity", "caption")
    for query, rank, image, similarity, caption in rows:
        table.add_row(Text(query), str(rank), Text(image), f"{similarity:.3f}", Text(caption))
    return table
