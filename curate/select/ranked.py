"""Keep so many of the rows: the best by a column (top), or any (sample)."""

from __future__ import annotations

from math import ceil

from curate.database import literal, scalar, seeded
from curate.expressions import label, readable, scalar_expression
from curate.filters import Sample, Top
from curate.select.selection import Selection


def how_many(selection: Selection, fraction: float | None, count: int | None) -> int:
    """Rows to keep of those alive; a fraction is rounded up, so that it never keeps none of some."""
    return count if count is not None else ceil((fraction or 0) * scalar(selection.db, "SELECT count(*) FROM alive"))


def apply_top(selection: Selection, step: Top) -> None:
    """Keep the rows with the highest values; ties go to the smaller key. A row without one (NULL, NaN) is dropped."""
    by = scalar_expression(selection.db, label(step), step.by, selection.columns)
    num_kept = how_many(selection, step.fraction, step.count)
    with readable(label(step)):
        selection.db.execute(f"""
            INSERT INTO drops
            WITH valued AS (SELECT row, key, CAST(({by.text}\n) AS DOUBLE) AS number FROM alive),
            ranked AS (
                SELECT row, number, row_number() OVER (ORDER BY number DESC, key) AS rank
                FROM valued WHERE number IS NOT NULL AND NOT isnan(number)
            ),
            cut AS (SELECT min(number) AS least FROM ranked WHERE rank <= {num_kept})
            SELECT row, 'select', {literal(step.name)}, 'top',
                coalesce(printf('%.6g', ranked.number), 'NULL') || coalesce(printf(' (cut %.6g)', cut.least), ''), NULL
            FROM valued LEFT JOIN ranked USING (row) CROSS JOIN cut
            WHERE rank IS NULL OR rank > {num_kept}""")


def apply_sample(selection: Selection, step: Sample) -> None:
    """Keep the rows that come first in a seeded random order, which depends on a row's key alone."""
    num_kept = how_many(selection, step.fraction, step.count)
    asked = f"count={step.count}" if step.count is not None else f"fraction={step.fraction}"
    selection.db.execute(f"""
        INSERT INTO drops
        SELECT row, 'select', {literal(step.name)}, 'sample', {literal(asked)}, NULL
        FROM (SELECT row, row_number() OVER (ORDER BY {seeded(selection.seed, "sample")}, key) AS rank FROM alive)
        WHERE rank > {num_kept}""")
