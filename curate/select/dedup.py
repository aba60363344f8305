"""One row of each group of duplicates stays: the first of an ORDER BY, ties to the smaller key."""

from __future__ import annotations

from curate.database import literal, quoted
from curate.expressions import label, order_expression, readable, scalar_expression
from curate.filters import Dedup
from curate.select.near import connected_components, near_pairs
from curate.select.selection import Selection


def apply(selection: Selection, step: Dedup) -> None:
    """Drop the duplicates; the ledger's twin is the row that stays. A row without a value is no one's duplicate.

    By `phash`, two rows within `distance` bits are linked, and a group is all that is linked, directly or through
    others.
    """
    order = order_expression(selection.db, label(step), step.keep, selection.columns).text
    if step.by.lower() == "phash":
        with readable(label(step)):
            _near(selection, step, order)
        return
    column = quoted(scalar_expression(selection.db, label(step), quoted(step.by), selection.columns).columns[0])
    with readable(label(step)):
        selection.db.execute(f"""
            INSERT INTO drops
            SELECT row, 'select', {literal(step.name)}, 'dedup',
                {literal(step.by + "=")} || left(CAST(same AS VARCHAR), 120), twin
            FROM (
                SELECT row, key, {column} AS same,
                    first_value(key) OVER (PARTITION BY {column} ORDER BY {order}\n, key) AS twin
                FROM alive WHERE {column} IS NOT NULL
            ) WHERE key <> twin""")


def _near(selection: Selection, step: Dedup, order: str) -> None:
    import numpy as np
    import pyarrow as pa

    found = selection.db.execute(
        f"SELECT row, phash FROM alive WHERE phash IS NOT NULL ORDER BY {order}\n, key"
    ).fetchnumpy()
    rows = np.asarray(found["row"], np.int64)
    hashes, which = np.unique(np.asarray(found["phash"], np.int64).view(np.uint64), return_inverse=True)
    i, j, _ = near_pairs(hashes, hashes, step.distance)
    group = connected_components(i, j, len(hashes))[which.ravel()]
    # Rows stand in the order of preference: the first of each group is the one that stays.
    _, first, member = np.unique(group, return_index=True, return_inverse=True)
    kept = rows[first][member.ravel()]
    twins = pa.table({"row": rows[kept != rows], "kept": kept[kept != rows]})
    selection.insert(
        twins,
        f"""SELECT found.row, 'select', {literal(step.name)}, 'dedup',
            'distance=' || bit_count(xor(a.phash, b.phash)), b.key
        FROM found JOIN rows a ON a.row = found.row JOIN rows b ON b.row = found.kept""",
    )
