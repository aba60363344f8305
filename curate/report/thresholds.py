"""The thresholds in the filters: which number is compared with what, and what another threshold would have done.

`width >= 200 AND caption_words BETWEEN 3 AND 60` has three. For each, the rows that are kept, and those that this
comparison alone dropped at this step, are counted over fine bins with the threshold on an edge; so at every edge the
count of rows that would change is exact, whatever the page's slider shows, without a row of the dataset at hand.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import duckdb

from curate.charts import nice_step
from curate.database import literal, scalar
from curate.report.tables import Tables

FINE = 240  # steps of a slider
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
COMPARISONS = {
    "COMPARE_GREATERTHANOREQUALTO": ">=",
    "COMPARE_GREATERTHAN": ">",
    "COMPARE_LESSTHANOREQUALTO": "<=",
    "COMPARE_LESSTHAN": "<",
}
MIRRORED = {">=": "<=", ">": "<", "<=": ">=", "<": ">"}


@dataclass(frozen=True)
class Threshold:
    """One comparison of a step with a number.

    Attributes:
        step: the filter's name.
        expression: SQL of the number that is compared, over the columns of `rows`.
        operator: `>=`, `>`, `<=` or `<`: the rows that pass.
        value: what it is compared with.
        rest: SQL of what else the step asks of a row; `true` if nothing.
        ranked: whether the value is the place where a `top` or `relevance` step cut, and not one that was given.
        met: SQL of the rows that passed the step and were kept.
    """

    step: str
    expression: str
    operator: str
    value: float
    rest: str = "true"
    ranked: bool = False
    met: str = "kept"


def named_columns(filters: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every word of the filters' expressions that may be a column."""
    texts = [str(step.get("where", "")) + " " + str((step.get("top") or {}).get("by", "")) for step in filters]
    return sorted({a or b for text in texts for a, b in re.findall(r'"([^"]+)"|(\w+)', text)})


def find_thresholds(tables: Tables, filters: Sequence[Mapping[str, Any]]) -> list[Threshold]:
    """The thresholds of the steps, in their order; a comparison of another shape, or inside an OR, is none."""
    found = []
    for step in filters:
        name = str(step.get("name"))
        if "where" in step:
            found += list(_of_where(tables.db, name, str(step["where"])))
        elif isinstance(step.get("top"), dict):
            found += _of_ranking(tables, name, normal(tables.db, str(step["top"].get("by"))))
        elif "relevance" in step:
            found += _of_ranking(tables, name, score_of(name))
    return [replace(each, met=met(filters, each.step)) for each in found if _runs(tables.db, each)]


def met(filters: Sequence[Mapping[str, Any]], name: str) -> str:
    """SQL of the rows that passed a step and were kept.

    A row in retain passed neither the relevance step that moved it there nor a later `top` or `relevance`, which chose
    without it.
    """
    names = [str(step.get("name")) for step in filters]
    place = names.index(name)
    moved = [names[number] for number in range(place + 1) if "relevance" in filters[number]]
    if not moved or not {"top", "relevance"} & filters[place].keys():
        return "kept"
    return f"(kept AND coalesce(step NOT IN ({', '.join(map(literal, moved))}), true))"


def score_of(step: str) -> str:
    """SQL of the score that a relevance step wrote into the ledger: of rows it dropped or moved to retain."""
    number = f"TRY_CAST(regexp_extract(value, {literal(NUMBER)}) AS DOUBLE)"
    return f"CASE WHEN step = {literal(step)} THEN {number} END"


def normal(db: duckdb.DuckDBPyConnection, text: str) -> str:
    """An expression as DuckDB writes it; as it is where DuckDB cannot read it."""
    try:
        return _written(db, *_parsed(db, text))
    except (duckdb.Error, LookupError):
        return text


def _of_where(db: duckdb.DuckDBPyConnection, step: str, text: str) -> Iterator[Threshold]:
    try:
        tree, node = _parsed(db, text)
    except (duckdb.Error, LookupError):  # filters of another build, say
        return
    both = node["children"] if node["type"] == "CONJUNCTION_AND" else [node]
    for place, part in enumerate(both):
        rest = [_written(db, tree, other) for number, other in enumerate(both) if number != place]
        for expression, operator, value, also in _compared(db, tree, part):
            yield Threshold(step, expression, operator, value, " AND ".join([*rest, *also]) or "true")


def _compared(
    db: duckdb.DuckDBPyConnection, tree: dict[str, Any], part: dict[str, Any]
) -> Iterator[tuple[str, str, float, list[str]]]:
    """(expression, operator, number, the other half of a BETWEEN) of a comparison with a constant."""
    if part["class"] == "BETWEEN":
        sides = [(">=", part["lower"]), ("<=", part["upper"])]
        numbers = [_constant(db, tree, side) for _, side in sides]
        expression = _written(db, tree, part["input"])
        for place, (operator, _) in enumerate(sides):
            other = f"{expression} {sides[1 - place][0]} {_written(db, tree, sides[1 - place][1])}"
            if (value := numbers[place]) is not None:
                yield expression, operator, value, [other]
    elif operator := COMPARISONS.get(part["type"], ""):
        left, right = _constant(db, tree, part["left"]), _constant(db, tree, part["right"])
        if right is not None and left is None:
            yield _written(db, tree, part["left"]), operator, right, []
        elif left is not None and right is None:
            yield _written(db, tree, part["right"]), MIRRORED[operator], left, []


def _of_ranking(tables: Tables, step: str, expression: str) -> list[Threshold]:
    """Where a ranking cut: the value that the ledger names (`0.2134 (cut 0.25)`), else the best that it dropped."""
    cut = f"TRY_CAST(regexp_extract(value, 'cut ({NUMBER})', 1) AS DOUBLE)"
    best = f"TRY_CAST(regexp_extract(value, '{NUMBER}') AS DOUBLE)"
    value = scalar(tables.db, f"SELECT coalesce(max({cut}), max({best})) FROM ledger WHERE step = {literal(step)}")
    return [] if value is None else [Threshold(step, expression, ">=", float(value), ranked=True)]


def _parsed(db: duckdb.DuckDBPyConnection, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    tree = json.loads(scalar(db, f"SELECT json_serialize_sql({literal(f'SELECT ({text}' + chr(10) + ')')})"))
    return tree, tree["statements"][0]["node"]["select_list"][0]


def _written(db: duckdb.DuckDBPyConnection, tree: dict[str, Any], node: dict[str, Any]) -> str:
    """A part of a syntax tree as SQL again."""
    copy = json.loads(json.dumps(tree))
    copy["statements"][0]["node"]["select_list"] = [node]
    return str(scalar(db, f"SELECT json_deserialize_sql({literal(json.dumps(copy))}::JSON)")).removeprefix("SELECT ")


def _constant(db: duckdb.DuckDBPyConnection, tree: dict[str, Any], node: dict[str, Any]) -> float | None:
    """The number an expression without a column stands for."""
    if '"COLUMN_REF"' in json.dumps(node):
        return None
    try:
        value = scalar(db, f"SELECT TRY_CAST(({_written(db, tree, node)}) AS DOUBLE)")
    except duckdb.Error:
        return None
    return float(value) if value is not None and math.isfinite(value) else None


def _runs(db: duckdb.DuckDBPyConnection, threshold: Threshold) -> bool:
    """Whether the expression is a number of this dataset's rows; a column may be gone since the ledger was made."""
    try:
        db.execute(f"EXPLAIN SELECT CAST({threshold.expression} AS DOUBLE), {threshold.rest} FROM rows").fetchall()
    except duckdb.Error:
        return False
    return True


# --- what if ---------------------------------------------------------------------------------------------------------


def as_double(tables: Tables, expression: str) -> str:
    """SQL of an expression as a DOUBLE; a FLOAT as its shortest decimal, so that 0.7 equals the 0.7 of a filter."""
    kind = tables.db.execute(f"SELECT typeof(({expression})) FROM rows LIMIT 1").fetchall()
    return (
        f"CAST(CAST(({expression}) AS VARCHAR) AS DOUBLE)"
        if kind == [("FLOAT",)]
        else f"CAST(({expression}) AS DOUBLE)"
    )


def what_if(tables: Tables, threshold: Threshold, figure: str) -> dict[str, Any] | None:
    """Fine counts around a threshold: of kept rows, and of rows that this comparison alone dropped.

    Returns:
        The threshold's facts, with `edges` (N, rising; `at` is the threshold's place) and `kept` and `dropped`
        (N + 1 counts each: below the first edge, between edges, from the last edge on). A value on an edge lies in the
        bin above it where the operator is `>=` or `<`, and in the bin below it for `>` and `<=`: so at each edge the
        rows that pass are those of whole bins. None where no row has a value.
    """
    x = as_double(tables, threshold.expression)
    name, rest = literal(threshold.step), f"coalesce(CAST(({threshold.rest}) AS BOOLEAN), false)"
    judged = f"""SELECT {threshold.met} AS kept, dice, {x} AS x FROM rows
        WHERE {threshold.met} OR (step = {name} AND {rest})"""
    quantiles = f"quantile_cont(x, [0.002, 0.998]) FILTER ({tables.some})"
    ends, whole = tables.db.execute(
        f"SELECT coalesce({quantiles}, [min(x), max(x)]), bool_and(x = floor(x)) FROM ({judged}) WHERE isfinite(x)"
    ).fetchall()[0]
    low, high = ends
    if low is None:
        return None
    edges, at = fine_edges(threshold.value, low, high, bool(whole) and threshold.value == math.floor(threshold.value))
    counted = tables.ask(
        figure,
        f"""SELECT kept, {_bin(edges, closed_left=threshold.operator in (">=", "<"))} AS bin, count(*)
        FROM ({judged}) WHERE NOT isnan(x) GROUP BY ALL ORDER BY ALL""",
    )
    counts = {True: [0] * (len(edges) + 1), False: [0] * (len(edges) + 1)}
    for kept, place, number in counted:
        counts[kept][place] = number
    return {
        "step": threshold.step,
        "expression": threshold.expression,
        "operator": threshold.operator,
        "value": threshold.value,
        "ranked": threshold.ranked,
        "edges": edges,
        "at": at,
        "kept": counts[True],
        "dropped": counts[False],
    }


def fine_edges(value: float, low: float, high: float, whole: bool) -> tuple[list[float], int]:
    """At most about FINE edges of a round width over [low, high] and `value`, which is one of them, and its place."""
    low, high = min(low, value), max(high, value)
    spread = high - low
    step = nice_step(spread, FINE) if spread > max(1e-9 * abs(low), 1e-9 * abs(high), 1e-300) else 1.0
    step = max(step, 1.0) if whole else step
    before, after = math.ceil((value - low) / step - 1e-9), math.ceil((high - value) / step - 1e-9)
    edges = [float(f"{value + number * step:.12g}") for number in range(-before, after + 1)]
    edges[before] = value
    return edges, before


def _bin(edges: Sequence[float], *, closed_left: bool) -> str:
    """SQL of how many edges lie at or below x (below x, if a value on an edge belongs under it)."""
    listed = f"[{', '.join(f'{edge!r}::DOUBLE' for edge in edges)}]"
    step = (edges[-1] - edges[0]) / (len(edges) - 1) if len(edges) > 1 else 1.0
    near = f"CAST(floor(greatest(-1, least({len(edges)}, (x - {edges[0]!r}) / {step!r}))) AS INTEGER) + 1"
    guess = f"least({len(edges)}, {near})"
    above, beyond = (">=", "<") if closed_left else (">", "<=")
    # The place by division may be off by one where rounding moved an edge; the edges themselves decide.
    return (
        f"CASE WHEN {guess} < {len(edges)} AND x {above} {listed}[{guess} + 1] THEN {guess} + 1 "
        f"WHEN {guess} > 0 AND x {beyond} {listed}[{guess}] THEN {guess} - 1 ELSE {guess} END"
    )
