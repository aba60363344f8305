"""How numbers are spread over the rows: histograms of kept and dropped rows, and the filters' thresholds in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curate.charts import nice_step
from curate.database import quoted
from curate.report.tables import Tables
from curate.report.thresholds import Threshold, as_double, find_thresholds, normal, score_of, what_if

BINS = 32
# A row that failed to download says nothing about a filter; one that a filter dropped before the download does.
JUDGED = "kept OR stage = 'select' OR reason = 'where'"


@dataclass(frozen=True)
class Drawn:
    """A histogram to draw: SQL of a number over the columns of `rows`."""

    name: str
    title: str
    unit: str
    expression: str


KNOWN = (
    Drawn("short_side", "Shorter side of the original", "px", "least(original_width, original_height)"),
    Drawn("aspect", "Aspect (long side / short side)", "", "aspect"),
    Drawn("caption_words", "Caption length", "words", "caption_words"),
    Drawn("clip_score", "CLIP score (cosine of image and caption)", "", "clip_score"),
    Drawn("nsfw", "Probability of unsafe content", "", "nsfw"),
    Drawn("language_score", "How sure the language is", "", "language_score"),
    Drawn("letter_share", "Share of letters in the caption", "", "letter_share"),
    Drawn("entropy", "Entropy of the brightness", "bits", "entropy"),
    Drawn("blur", "Sharpness (variance of the Laplacian)", "", "blur"),
)
MOST = 24  # histograms; the known ones come first, then those of the filters


def distributions(tables: Tables, filters: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By name: title, unit, SQL, edges and counts of each number, and `what_if` for each threshold on it."""
    thresholds = find_thresholds(tables, filters)
    found: dict[str, dict[str, Any]] = {}
    for wanted in [*_known(tables), *_named(tables, thresholds)][:MOST]:
        if figures := _histogram(tables, wanted):
            mine = [threshold for threshold in thresholds if threshold.expression == wanted.expression]
            made = (
                what_if(tables, threshold, f"distributions.{wanted.name}.what_if.{number}")
                for number, threshold in enumerate(mine)
            )
            found[wanted.name] = {**figures, "what_if": [figure for figure in made if figure]}
    return found


def _known(tables: Tables) -> list[Drawn]:
    """The usual ones whose columns are there, as DuckDB writes them."""
    there = set(tables.columns())
    needs = {"short_side": {"original_width", "original_height"}}
    own = [Drawn(name, name, "", quoted(name)) for name in tables.own]
    return [
        Drawn(drawn.name, drawn.title, drawn.unit, normal(tables.db, drawn.expression))
        for drawn in [*KNOWN, *own]
        if needs.get(drawn.name, {drawn.name}) <= there
    ]


def _named(tables: Tables, thresholds: Sequence[Threshold]) -> list[Drawn]:
    """What the filters compare beside the usual ones."""
    known = {drawn.expression for drawn in _known(tables)}
    fresh = dict.fromkeys(threshold.expression for threshold in thresholds if threshold.expression not in known)
    scores = {score_of(threshold.step): threshold.step for threshold in thresholds}
    return [
        Drawn(f"relevance {scores[text]}", f"Score of {scores[text]}, of what it did not keep", "", text)
        if text in scores
        else Drawn(text, text, "", text)
        for text in fresh
    ]


def _histogram(tables: Tables, wanted: Drawn) -> dict[str, Any] | None:
    """Kept and dropped rows over bins of round width; all above the 99.5th percentile are in the last bin."""
    x = as_double(tables, wanted.expression)
    judged = f"SELECT kept, dice, {x} AS x FROM rows WHERE {JUDGED}"
    low, most, high, whole = tables.ask(
        f"distributions.{wanted.name}.range",
        f"SELECT min(x), max(x), coalesce(quantile_cont(x, 0.995) FILTER ({tables.some}), max(x)), "
        "coalesce(bool_and(x = floor(x)), false) "
        f"FROM ({judged}) WHERE isfinite(x)",
    )[0]
    if low is None:
        return None
    edges = bin_edges(low, high, whole)
    query = f"SELECT kept, {bin_of(edges)} AS bin, count(*) FROM ({judged}) WHERE isfinite(x) GROUP BY ALL ORDER BY ALL"
    counts = {True: [0] * (len(edges) - 1), False: [0] * (len(edges) - 1)}
    for kept, number, amount in tables.ask(f"distributions.{wanted.name}", query):
        counts[kept][number] = amount
    return {
        "title": wanted.title,
        "unit": wanted.unit,
        "expression": wanted.expression,
        "edges": edges,
        "kept": counts[True],
        "dropped": counts[False],
        "min": low,
        "max": most,
    }


def bin_of(edges: Sequence[float], x: str = "x") -> str:
    """SQL of the bin that a number lies in; what lies beyond the edges is in the outer bins."""
    place = f"CAST(floor(({x} - {edges[0]!r}) / {edges[1] - edges[0]!r}) AS BIGINT)"
    return f"greatest(0, least({len(edges) - 2}, {place}))"


def bin_edges(low: float, high: float, whole: bool) -> list[float]:
    """Bounds of at most `BINS` + 1 bins of a round width that hold [low, high]; at least 1 where values are whole."""
    # Less apart than this, they are one value with a rounding error.
    spread = high - low > max(1e-9 * abs(low), 1e-9 * abs(high), 1e-300)
    step = nice_step(high - low, BINS) if spread else 1.0
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.floor(high / step + 1e-9) + 1
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
