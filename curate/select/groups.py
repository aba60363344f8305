"""Which rows must not be parted between train and test: duplicates, and rows with one URL or the same bytes.

Every row of the list has a group; most are alone in theirs. A group is named after the row of it that is kept.
"""

from __future__ import annotations

from curate.config import PackConfig
from curate.database import literal, scalar, seeded
from curate.select.near import connected_components
from curate.select.selection import Selection

# Each query gives pairs of rows that belong together.
_LINKS = (
    "SELECT d.row AS a, m.row AS b FROM drops d JOIN members m ON m.key = d.twin WHERE d.reason = 'dedup'",
    "SELECT d.row AS a, m.row AS b FROM planned_drops d JOIN members m ON m.key = d.twin",
    *(
        # Of many millions, few stand twice: their hashes tell which could, and only these texts are compared.
        f"""WITH twice AS (SELECT hash({text}) FROM {rows} WHERE {text} <> '' GROUP BY ALL HAVING count(*) > 1),
        likely AS (SELECT row, {text} FROM {rows} WHERE {text} <> '' AND hash({text}) IN (FROM twice))
        SELECT row AS a, min(row) OVER (PARTITION BY {text}) AS b FROM likely"""
        for text, rows in (("url", "members"), ("sha256", "rows"))
    ),
)


def find_groups(selection: Selection) -> None:
    """Make table `linked` (row, label) of the rows that are not alone in their group; equal labels, one group."""
    import numpy as np
    import pyarrow as pa

    db = selection.db
    db.execute(
        "CREATE VIEW members AS SELECT key, row, url FROM rows UNION ALL SELECT key, row, url FROM planned_drops"
    )
    pairs = db.execute(" UNION ALL ".join(f"(SELECT a, b FROM ({link}) WHERE a <> b)" for link in _LINKS)).fetchnumpy()
    a, b = (np.asarray(pairs[name], np.int64) for name in ("a", "b"))
    nodes, ends = np.unique(np.concatenate([a, b]), return_inverse=True)
    label = connected_components(ends[: len(a)], ends[len(a) :], len(nodes))
    db.register("found", pa.table({"row": nodes, "label": nodes[label] if len(nodes) else nodes}))
    db.execute("CREATE TABLE linked AS SELECT * FROM found")
    db.unregister("found")


def place(selection: Selection, pack: PackConfig) -> None:
    """Make table `placed` (row, split) of the kept rows, and `grouped` (row, duplicate_group) of all.

    Candidates for the retain split are in table `retainable`; those whose group has a kept row are left out, of the
    rest `pack.retain` are drawn.
    """
    db, seed = selection.db, selection.seed
    db.execute(f"""
        CREATE TABLE retained AS SELECT row FROM rows JOIN retainable USING (row)
        WHERE row NOT IN (
            SELECT row FROM linked WHERE label IN (SELECT linked.label FROM linked SEMI JOIN alive USING (row)))
        ORDER BY {seeded(seed, "retain")}, key LIMIT {pack.retain}""")
    db.execute("CREATE VIEW kept AS SELECT row, true AS is_kept FROM alive UNION ALL SELECT row, true FROM retained")
    db.execute("""
        CREATE TABLE grouped AS
        SELECT row, coalesce(named.duplicate_group, members.key) AS duplicate_group
        FROM members LEFT JOIN (
            SELECT row, first_value(key) OVER (PARTITION BY label ORDER BY is_kept NULLS LAST, key) AS duplicate_group
            FROM linked JOIN members USING (row) LEFT JOIN kept USING (row)
        ) named USING (row)""")
    share = f"md5_number_upper({literal(f'{seed} split ')} || duplicate_group) / pow(2, 64)"
    db.execute(f"""
        CREATE TABLE placed AS
        SELECT row, CASE WHEN {share} < {pack.test!r} THEN 'test' WHEN {share} < {pack.test + pack.val!r} THEN 'val'
            ELSE 'train' END AS split
        FROM alive JOIN grouped USING (row)
        UNION ALL SELECT row, 'retain' FROM retained""")
    assert scalar(db, "SELECT count(*) = (SELECT count(*) FROM members) FROM grouped")
