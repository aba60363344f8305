"""One row of each group of duplicates stays: the first of an ORDER BY, ties to the smaller key."""

from __future__ import annotations

from pathlib import Path

from curate.database import literal, quoted, scalar
from curate.expressions import label, order_expression, readable, scalar_expression
from curate.filters import Dedup
from curate.select.near import Ints, near_groups
from curate.select.selection import Selection


def apply(selection: Selection, step: Dedup) -> None:
    """Drop the duplicates; the ledger's twin is the row that stays. A row without a value is no one's duplicate.

    By `phash`, two rows within `distance` bits are linked, by `embedding`, two with a cosine from `similarity` on; and
    a group is all that is linked, directly or through others.
    """
    order = order_expression(selection.db, label(step), step.keep, selection.columns).text
    with readable(label(step)):
        if step.similarity is not None:
            _similar(selection, step, order)
        elif [name.lower() for name in step.columns] == ["phash"]:
            _near(selection, step, order)
        else:
            _equal(selection, step, order)


def _equal(selection: Selection, step: Dedup, order: str) -> None:
    checked = [scalar_expression(selection.db, label(step), quoted(name), selection.columns) for name in step.columns]
    columns = [quoted(expression.columns[0]) for expression in checked]
    shown = " || ', ' || ".join(
        f"{literal(name + '=')} || left(CAST({column} AS VARCHAR), 120)"
        for name, column in zip(step.columns, columns, strict=True)
    )
    there = " AND ".join(f"{column} IS NOT NULL" for column in columns)
    same = ", ".join(columns)
    # Only what stands more than once is put into order: of ten million rows, most do not.
    selection.db.execute(f"""
        INSERT INTO drops
        SELECT row, 'select', {literal(step.name)}, 'dedup', value_, twin_
        FROM (
            SELECT row, key, {shown} AS value_, first_value(key) OVER (PARTITION BY {same} ORDER BY {order}
                , key) AS twin_
            FROM alive SEMI JOIN (SELECT {same} FROM alive WHERE {there} GROUP BY {same} HAVING count(*) > 1)
                USING ({same})
        ) WHERE key <> twin_""")


def _near(selection: Selection, step: Dedup, order: str) -> None:
    import numpy as np

    found = selection.db.execute("SELECT row, phash FROM alive WHERE phash IS NOT NULL").fetchnumpy()
    rows, hash_N = np.asarray(found["row"], np.int64), np.asarray(found["phash"], np.int64).view(np.uint64)
    distinct, which_N = np.unique(hash_N, return_inverse=True)
    group_N = near_groups(distinct, step.distance)[which_N.ravel()]
    dropped, kept = _others_than_first(selection, rows, group_N, order)
    differing = hash_N[_places(rows, dropped)] ^ hash_N[_places(rows, kept)]
    _drop(selection, step, dropped, kept, [f"distance={int(bits).bit_count()}" for bits in differing])


def _similar(selection: Selection, step: Dedup, order: str) -> None:
    import numpy as np

    from curate.select import semantic

    spill = Path(scalar(selection.db, "SELECT current_setting('temp_directory')"))
    vectors = semantic.write_vectors(spill, selection.alive_embeddings())
    group_N = semantic.near_groups(vectors, step.similarity or 1.0, selection.seed)
    dropped, kept = _others_than_first(selection, vectors.rows, group_N, order)
    cosines = semantic.cosines(vectors, _places(vectors.rows, dropped), _places(vectors.rows, kept))
    _drop(selection, step, dropped, kept, [f"cosine={cosine:.4f}" for cosine in np.asarray(cosines).tolist()])


def _others_than_first(selection: Selection, rows: Ints, group_N: Ints, order: str) -> tuple[Ints, Ints]:
    """The rows that are not the first of their group, and for each the row that is."""
    import numpy as np
    import pyarrow as pa

    in_company = np.bincount(group_N, minlength=1)[group_N] > 1
    db = selection.db
    db.register("found", pa.table({"row": rows[in_company], "place_": group_N[in_company]}))
    pairs = db.execute(f"""
        SELECT row, kept_row_ FROM (
            SELECT row, first_value(row) OVER (PARTITION BY place_ ORDER BY {order}
                , key) AS kept_row_
            FROM alive JOIN found USING (row)
        ) WHERE row <> kept_row_ ORDER BY row""").fetchnumpy()
    db.unregister("found")
    return np.asarray(pairs["row"], np.int64), np.asarray(pairs["kept_row_"], np.int64)


def _places(rows: Ints, wanted: Ints) -> Ints:
    """Where in `rows`, in any order, the wanted ones stand."""
    import numpy as np

    order = np.argsort(rows)
    return order[np.searchsorted(rows, wanted, sorter=order)]


def _drop(selection: Selection, step: Dedup, dropped: Ints, kept: Ints, values: list[str]) -> None:
    import pyarrow as pa

    selection.insert(
        pa.table({"row": dropped, "kept_row": kept, "value": pa.array(values, pa.string())}),
        f"""SELECT found.row, 'select', {literal(step.name)}, 'dedup', found.value, rows.key
        FROM found JOIN rows ON rows.row = found.kept_row""",
    )
