"""What a user may write in a filter: one scalar DuckDB expression over the columns of a row, checked before it runs.

An expression is parsed by DuckDB itself into a syntax tree, and only trees of the kinds below pass: no sub-query (and
so no table, no file, no network), no window, no aggregate, nothing whose answer changes from run to run. The tree
also names the columns: that decides what can be filtered before the download, what is loaded, and which values the
ledger shows for a dropped row.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import duckdb

from curate.config import MeasureConfig
from curate.database import first_line, literal, quoted, scalar
from curate.errors import ConfigError, did_you_mean
from curate.filters import Dedup, Relevance, Sample, Step, Top, Where
from curate.shards import OFFSET_COLUMNS, PLACE
from curate.signals import GROUPS, columns_of, how_to_get

PLAN_COLUMNS = {
    "key": "VARCHAR",
    "row": "BIGINT",
    "url": "VARCHAR",
    "caption": "VARCHAR",
    "url_host": "VARCHAR",
    "caption_chars": "BIGINT",
    "caption_words": "BIGINT",
}
FETCH_COLUMNS = {
    **dict.fromkeys(("status", "error_message", "sha256", "reason", "value", "format", "exif"), "VARCHAR"),
    **dict.fromkeys(("width", "height", "original_width", "original_height"), "BIGINT"),
    **dict.fromkeys(("http_status", "bytes", "phash"), "BIGINT"),
    **dict.fromkeys(("luma_mean", "luma_std", "entropy", "aspect", "blur", "dominant_share", "border_share"), "DOUBLE"),
}
# What select counts itself, where a step asks for it: how many images came with a row's caption.
SELECT_COLUMNS = {"caption_count": "BIGINT"}
# The signals there can be without a user's own ones.
SIGNAL_COLUMNS = columns_of(GROUPS)
# Names that neither a column of the list nor a signal of the user's may take, in lower case.
RESERVED = frozenset(
    (
        *PLACE,
        *(*PLAN_COLUMNS, *FETCH_COLUMNS, *SIGNAL_COLUMNS, *SELECT_COLUMNS, *OFFSET_COLUMNS),
        *("image_embedding", "text_embedding"),
        *("kept", "split", "stage", "step", "twin", "duplicate_group"),
        *("base_", "problem_", "nth_", "file_", "known_", "bucket_"),  # of plan's own tables
        *("kept_", "tar_", "split_", "place_", "filename"),  # of select's, pack's and report's
    )
)

_ALLOWED = frozenset(
    (
        "COLUMN_REF",
        "CONSTANT",
        "FUNCTION",
        "OPERATOR",
        "COMPARISON",
        "CONJUNCTION",
        "CASE",
        "CAST",
        "TYPE",
        "BETWEEN",
        "LAMBDA",
    )
)
_REFUSED = {
    "SUBQUERY": "a sub-query",
    "WINDOW": "a window function",
    "STAR": "a *",
    "PARAMETER": "a parameter ($ or ?)",
}
# What the ledger shows of one value: enough to see why, not the whole of a long caption.
_SHOWN_CHARS = 120


@dataclass(frozen=True, slots=True)
class Expression:
    """A checked expression (or ORDER BY list): its text, and the columns it names, as they are spelled in the data."""

    text: str
    columns: tuple[str, ...]


def scalar_expression(db: duckdb.DuckDBPyConnection, where: str, text: str, columns: Collection[str]) -> Expression:
    """Check one scalar expression.

    Args:
        db: any connection; only its parser is used.
        where: what to call the place in an error, such as `filters 'min_side'`.
        text: the expression.
        columns: the names it may use.

    Raises:
        ConfigError: a syntax error, an unknown column, or anything but a scalar expression over one row.
    """
    if not text.strip():
        raise ConfigError(f"{where}: expected an expression over the columns, got nothing")
    # The line break ends a comment that the text may end with.
    node = _parse(db, where, text, f"SELECT ({text}\n)")
    if node["from_table"]["type"] != "EMPTY" or node["where_clause"] or node["modifiers"]:
        raise ConfigError(f"{where}: expected one expression over the columns, got '{_short(text)}'")
    return _checked(where, text, node["select_list"], columns)


def order_expression(db: duckdb.DuckDBPyConnection, where: str, text: str, columns: Collection[str]) -> Expression:
    """Check an ORDER BY list, such as `width * height DESC, key`; raises ConfigError as `scalar_expression` does."""
    node = _parse(db, where, text, f"SELECT 1 ORDER BY {text}\n")
    if [modifier["type"] for modifier in node["modifiers"]] != ["ORDER_MODIFIER"]:
        raise ConfigError(f"{where}: expected an order such as 'width * height DESC', got '{_short(text)}'")
    orders = [order["expression"] for order in node["modifiers"][0]["orders"]]
    return _checked(where, text, orders, columns)


def step_expressions(db: duckdb.DuckDBPyConnection, step: Step, columns: Collection[str]) -> list[Expression]:
    """The checked expressions of a step: of where, dedup, top and sample; none for the others."""
    if isinstance(step, Where | Top | Sample):
        return [scalar_expression(db, label(step), text, columns) for text in _texts(step)]
    if isinstance(step, Dedup):
        by = [scalar_expression(db, label(step), quoted(name), columns) for name in step.columns]
        return [*by, order_expression(db, label(step), step.keep, columns)]
    return []


def check_steps(db: duckdb.DuckDBPyConnection, steps: Sequence[Step], types: dict[str, str]) -> None:
    """Find every mistake in the filters that needs no data to be found: syntax, names, types that do not go together.

    Args:
        db: any connection.
        steps: all steps.
        types: DuckDB type of each column there will be.

    Raises:
        ConfigError: names the step, and what is wrong with it.
    """
    row = ", ".join(f"CAST(NULL AS {kind}) AS {quoted(name)}" for name, kind in types.items())
    for step in steps:
        for found in step_expressions(db, step, types):
            clause = f"WHERE ({found.text}\n)" if isinstance(step, Where) else f"ORDER BY {found.text}\n"
            with readable(label(step)):
                db.execute(f"EXPLAIN SELECT 1 FROM (SELECT {row}) {clause}").fetchall()


def check_measured(steps: Sequence[Step], measured: MeasureConfig) -> None:
    """Check that no step needs a signal that nothing measures. Needs no list and no data.

    Raises:
        ConfigError: names the first such step, what it needs, and how to get it.
    """
    with duckdb.connect(":memory:") as db:
        for step in steps:
            named = {name.lower() for text in _texts(step) for node in _parsed(db, step, text) for name in _names(node)}
            needs = {name: name for name in sorted(named & SIGNAL_COLUMNS.keys())}
            if embeds(step):
                needs = {"clip_score": "embeddings", **needs}
            for column, what in needs.items():
                if how := how_to_get([column], measured):
                    raise ConfigError(
                        f"{label(step)}: needs {what}, which nothing measures: {how}; or leave the step out"
                    )


def embeds(step: Step) -> bool:
    """Whether a step compares embeddings."""
    return isinstance(step, Relevance) or getattr(step, "similarity", None) is not None


def _texts(step: Step) -> list[str]:
    """What of a step is SQL."""
    match step:
        case Where():
            return [step.expression]
        case Top():
            return [step.by] if step.per is None else [step.by, step.per]
        case Sample():
            return [] if step.per is None else [step.per]
        case Dedup():
            return [*map(quoted, step.columns), step.keep]
    return []


def _parsed(db: duckdb.DuckDBPyConnection, step: Step, text: str) -> Iterator[dict[str, Any]]:
    return _walk(_parse(db, label(step), text, f"SELECT 1 ORDER BY {text}\n"))


def label(step: Step) -> str:
    """What a step is called in an error."""
    return f"filters '{step.name}'"


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn what DuckDB says of a user's expression into one line that names the step."""
    try:
        yield
    except (duckdb.OutOfMemoryException, duckdb.IOException):
        raise
    except duckdb.Error as error:
        if "CSV Error" in str(error) or "CSV Parser" in str(error):
            raise  # of the list that the expression is over
        hint = "; TRY_CAST gives NULL instead" if isinstance(error, duckdb.ConversionException) else ""
        raise ConfigError(f"{where}: {first_line(error)}{hint}") from error


def watch_drops(db: duckdb.DuckDBPyConnection) -> None:
    """Beside table `rows` (it has a column `row`), make table `drops`, and view `alive` of the rows not in it."""
    db.execute(
        "CREATE TABLE drops (row BIGINT, stage VARCHAR, step VARCHAR, reason VARCHAR, value VARCHAR, twin VARCHAR)"
    )
    db.execute("CREATE VIEW alive AS SELECT * FROM rows ANTI JOIN drops USING (row)")


def drop_where(db: duckdb.DuckDBPyConnection, step: Where, *, stage: str, columns: Collection[str]) -> None:
    """Add to `drops` the rows of `alive` for which the expression is false or NULL, and the values that decided."""
    found = scalar_expression(db, label(step), step.expression, columns)
    with readable(label(step)):
        db.execute(
            f"""INSERT INTO drops SELECT row, {literal(stage)}, {literal(step.name)}, 'where', {shown(found)}, NULL
            FROM alive WHERE NOT coalesce(CAST(({found.text}\n) AS BOOLEAN), false)"""
        )


def shown(found: Expression) -> str:
    """SQL for the values an expression was decided by: `width=120, height=90`."""
    if not found.columns:
        return literal(_short(found.text))
    values = (
        f"{literal(name + '=')} || coalesce(left(CAST({quoted(name)} AS VARCHAR), {_SHOWN_CHARS}), 'NULL')"
        for name in found.columns
    )
    return f"concat_ws(', ', {', '.join(values)})"


def _parse(db: duckdb.DuckDBPyConnection, where: str, text: str, statement: str) -> dict[str, Any]:
    tree = json.loads(scalar(db, f"SELECT json_serialize_sql({literal(statement)})"))
    if tree["error"]:
        message = tree["error_message"] if tree["error_type"] == "parser" else "expected one expression"
        raise ConfigError(f"{where}: '{_short(text)}': {message}")
    nodes = [statement["node"] for statement in tree["statements"]]
    if len(nodes) != 1 or nodes[0]["type"] != "SELECT_NODE":
        raise ConfigError(f"{where}: expected one expression over the columns, got '{_short(text)}'")
    return nodes[0]


def _checked(where: str, text: str, trees: list[dict[str, Any]], columns: Collection[str]) -> Expression:
    nodes = [node for tree in trees for node in _walk(tree)]
    for node in nodes:
        if node["class"] not in _ALLOWED:
            what = _REFUSED.get(node["class"], node["class"].lower())
            raise ConfigError(f"{where}: {what} is not allowed; a filter sees the columns of one row")
    _check_functions(where, {node["function_name"].lower() for node in nodes if node["class"] == "FUNCTION"})
    lambdas = {
        name for node in nodes if node["class"] == "LAMBDA" for left in _walk(node["lhs"]) for name in _names(left)
    }
    spelled = {name.lower(): name for name in columns}
    used = dict.fromkeys(name for node in nodes for name in _names(node) if name not in lambdas)
    for name in used:
        if name.lower() not in spelled:
            raise ConfigError(f"{where}: no column '{name}'.{did_you_mean(name, columns)}")
    return Expression(text, tuple(dict.fromkeys(spelled[name.lower()] for name in used)))


def _check_functions(where: str, used: set[str]) -> None:
    """Refuse what is not a function of the row alone, such as random(), now(), count(), current_setting()."""
    if found := sorted(used & _unsteady()):
        raise ConfigError(
            f"{where}: {found[0]}() is not allowed; a filter must give the same answer for a row each time"
        )


@cache
def _unsteady() -> frozenset[str]:
    """Functions whose answer hangs on more than one row; asked for once, for there are thousands."""
    with duckdb.connect(":memory:") as db:
        found = db.execute(
            """SELECT DISTINCT function_name FROM duckdb_functions()
            WHERE stability IN ('VOLATILE', 'CONSISTENT_WITHIN_QUERY') OR function_type = 'aggregate'"""
        ).fetchall()
    return frozenset({name for (name,) in found} | {"current_setting"})  # DuckDB 1.4 calls it steady


def _walk(tree: Any) -> Iterator[dict[str, Any]]:
    """Every expression node of a syntax tree."""
    if isinstance(tree, dict):
        if "class" in tree:
            yield tree
        for child in tree.values():
            yield from _walk(child)
    elif isinstance(tree, list):
        for child in tree:
            yield from _walk(child)


def _names(node: dict[str, Any]) -> list[str]:
    """The column a node names; of `meta.lang`, a field of column `meta`, it is the first word."""
    return node["column_names"][:1] if node["class"] == "COLUMN_REF" else []


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
