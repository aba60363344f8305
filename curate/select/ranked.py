"""Keep so many of the rows: the best by a column (top), or any (sample); of all, or of each value of a column."""

from __future__ import annotations

from math import ceil

from curate.database import literal, scalar, seeded
from curate.expressions import label, readable, scalar_expression
from curate.filters import Sample, Top
from curate.select.selection import Selection

# In floating point 0.07 × 100 is a little over 7, and would be rounded up to 8.
_BARELY_LESS = 1 - 1e-15


def how_many(selection: Selection, fraction: float | None, count: int | None) -> int:
    """Rows to keep of those alive; a fraction is rounded up, so that it never keeps none of some."""
    if count is not None:
        return count
    return ceil((fraction or 0) * scalar(selection.db, "SELECT count(*) FROM alive") * _BARELY_LESS)


def apply_top(selection: Selection, step: Top) -> None:
    """Keep the rows with the highest values; ties go to the smaller key. A row without one (NULL, NaN) is dropped.

    With `per`, so many of each of its values; rows without one (NULL) are together.
    """
    by = scalar_expression(selection.db, label(step), step.by, selection.columns)
    per = _per(selection, step)
    num_kept = str(step.count) if step.count is not None else _share(step.fraction)
    among = "" if step.per is None else f"|| {_shown(step.per)}"
    with readable(label(step)):
        selection.db.execute(f"""
            INSERT INTO drops
            WITH valued AS (
                SELECT row, key, CAST(({by.text}\n) AS DOUBLE) AS given, ({per}\n) AS part FROM alive
            ),
            numbered AS (SELECT row, key, part, CASE WHEN NOT isnan(given) THEN given END AS number FROM valued),
            ranked AS (
                SELECT row, part, number,
                    row_number() OVER (PARTITION BY part ORDER BY number DESC NULLS LAST, key) AS rank,
                    {num_kept} AS num_kept
                FROM (SELECT *, count(*) OVER (PARTITION BY part) AS num_rows FROM numbered)
            ),
            judged AS (
                SELECT *, min(number) FILTER (WHERE rank <= num_kept) OVER (PARTITION BY part) AS least FROM ranked
            )
            SELECT row, 'select', {literal(step.name)}, 'top',
                coalesce(printf('%.6g', number), 'NULL') || coalesce(printf(' (cut %.6g)', least), '') {among}, NULL
            FROM judged WHERE number IS NULL OR rank > num_kept""")


def apply_sample(selection: Selection, step: Sample) -> None:
    """Keep the rows that come first in a seeded random order, which depends on a row's key alone.

    With `per` and a count, every value's first row comes before any value's second one: each gives as many rows as any
    other, as long as it has some.
    """
    lot = seeded(selection.seed, "sample")
    asked = f"count={step.count}" if step.count is not None else f"fraction={step.fraction}"
    among = "" if step.per is None else f"|| {_shown(step.per)}"
    kept = (
        f"row_number() OVER (ORDER BY rank, lot, key) <= {step.count}"
        if step.count is not None
        else f"rank <= {_share(step.fraction)}"
    )
    with readable(label(step)):
        selection.db.execute(f"""
            INSERT INTO drops
            SELECT row, 'select', {literal(step.name)}, 'sample', {literal(asked)} {among}, NULL
            FROM (
                SELECT row, part, {kept} AS is_kept
                FROM (
                    SELECT row, key, lot, part, row_number() OVER (PARTITION BY part ORDER BY lot, key) AS rank,
                        count(*) OVER (PARTITION BY part) AS num_rows
                    FROM (SELECT row, key, {lot} AS lot, ({_per(selection, step)}\n) AS part FROM alive)
                )
            ) WHERE NOT is_kept""")


def _share(fraction: float | None) -> str:
    """SQL: as `how_many`, of `num_rows`."""
    return f"ceil({fraction!r}::DOUBLE * num_rows * {_BARELY_LESS!r}::DOUBLE)"


def _per(selection: Selection, step: Top | Sample) -> str:
    """SQL of what the rows are parted by."""
    return (
        "NULL" if step.per is None else scalar_expression(selection.db, label(step), step.per, selection.columns).text
    )


def _shown(per: str) -> str:
    """SQL: among which rows one was judged."""
    return f"{literal(f' among {per}=')} || coalesce(left(CAST(part AS VARCHAR), 120), 'NULL')"
