"""Fewer pairs of the concepts that a crawl is full of, all of the rare ones: WIT's rule and MetaCLIP's.

- wit (Radford et al. 2021, section 2.2): the pairs of each concept are gone through in a seeded order, and up to `cap`
  are taken. A pair is kept if any of its concepts took it. That is the same as going through all pairs in this order
  and keeping one whenever any of its concepts still has room.
- metaclip (Xu et al. 2023, algorithm 1): each concept takes each of its pairs with probability min(1, cap / count). A
  pair is kept if any of its concepts took it.

A pair without a concept is dropped by both. Chance hangs on the seed and a pair's key (and the concept) alone, so that
the order of the list is of no account.
"""

from __future__ import annotations

from curate.concepts import MINED, read_concepts
from curate.concepts.matching import find_matches
from curate.concepts.mining import mine
from curate.database import literal, seeded
from curate.errors import ConfigError
from curate.expressions import label
from curate.filters import Balance
from curate.select.selection import Selection


def apply(selection: Selection, step: Balance) -> None:
    """Drop what no concept took; the ledger's value is the rarest concept of the pair, as `cat (20000 of 53122)`.

    Raises:
        ConfigError: there is no such list of concepts, or the captions yield none.
    """
    import pyarrow as pa

    db = selection.db
    concepts = _concepts(selection, step)
    find_matches(db, "alive", concepts, step.match)
    names = pa.table({"concept": pa.array(range(len(concepts)), pa.int32()), "name": concepts})
    db.register("names", names)
    db.execute("""
        CREATE TABLE counted AS
        SELECT concept, name, pairs FROM (SELECT concept, count(*) AS pairs FROM matches GROUP BY concept)
        JOIN names USING (concept)""")
    db.unregister("names")
    taken = _taken_wit(step.cap, selection.seed) if step.method == "wit" else _taken_metaclip(step.cap, selection.seed)
    db.execute(f"CREATE TABLE taken AS SELECT DISTINCT row FROM ({taken})")
    db.execute(f"""
        INSERT INTO drops
        SELECT row, 'select', {literal(step.name)}, 'balance',
            coalesce(left(counted.name, 120) || ' ({step.cap} of ' || counted.pairs || ')', 'no concept'), NULL
        FROM (SELECT row FROM alive) ANTI JOIN taken USING (row)
        LEFT JOIN (
            SELECT row, min({{pairs: pairs, concept: concept}}) AS rarest_
            FROM matches ANTI JOIN taken USING (row) JOIN counted USING (concept) GROUP BY row
        ) USING (row)
        LEFT JOIN counted ON counted.concept = rarest_.concept""")
    for table in ("matches", "counted", "taken"):
        db.execute(f"DROP TABLE {table}")


def _concepts(selection: Selection, step: Balance) -> list[str]:
    if step.concepts != MINED:
        return read_concepts(label(step), step.concepts)
    found: list[str] = mine(selection.db, "alive", min_count=step.min_count)["concept"].to_pylist()
    if not found:
        raise ConfigError(
            f"{label(step)}: no word stands in {step.min_count:,} of the captions that are left: lower min_count, or "
            "give a list of concepts"
        )
    return found


def _taken_wit(cap: int, seed: int) -> str:
    """SQL: the first `cap` rows of each concept, in one seeded order of all."""
    turns = f"SELECT row, row_number() OVER (ORDER BY {seeded(seed, 'balance')}, key) AS turn FROM alive"
    return f"""
        SELECT row FROM matches JOIN counted USING (concept) WHERE pairs <= {cap}
        UNION ALL
        SELECT row FROM (
            SELECT row, row_number() OVER (PARTITION BY concept ORDER BY turn) AS place
            FROM matches JOIN counted USING (concept) JOIN ({turns}) USING (row) WHERE pairs > {cap}
        ) WHERE place <= {cap}"""


def _taken_metaclip(cap: int, seed: int) -> str:
    """SQL: rows whose lot, one for each row and concept, falls below cap / count."""
    lot = f"md5_number_upper({literal(f'{seed} balance ')} || key || ' ' || name) / pow(2, 64)"
    return f"""
        SELECT row FROM matches JOIN counted USING (concept) JOIN (SELECT row, key FROM alive) USING (row)
        WHERE pairs <= {cap} OR {lot} < {cap} / pairs"""
