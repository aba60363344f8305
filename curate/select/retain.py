"""Which rows may go into the split `retain`: general pairs of the same crawl, good but off the domain.

They are the rows that a relevance step dropped and that every later `where`, `dedup` and `decontaminate` would have
kept: no bad images, no test images, no near copies of what is kept. Later `top`, `sample` and `relevance` steps
choose among the domain's rows, and say nothing of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from curate.database import literal
from curate.filters import Decontaminate, Dedup, Relevance, Step, Where
from curate.select.selection import Selection


def find_retainable(selection: Selection, steps: Sequence[Step], apply: Callable[[Selection, Step], None]) -> None:
    """Make table `retainable` (row). Table `drops` is lent to the steps meanwhile, and is as it was afterwards.

    Args:
        selection: after all steps.
        steps: all steps.
        apply: what applies one.
    """
    db = selection.db
    db.execute("CREATE TABLE retainable (row BIGINT)")
    if not any(isinstance(step, Relevance) for step in steps):
        return
    db.execute("CREATE TABLE fates AS SELECT * FROM drops")
    db.execute("DELETE FROM drops")
    for step in steps:
        if isinstance(step, Relevance):
            db.execute(
                f"INSERT INTO retainable SELECT row FROM fates WHERE step = {literal(step.name)} AND stage = 'select'"
            )
        elif isinstance(step, Where | Dedup | Decontaminate):
            _show(selection, with_kept=isinstance(step, Dedup))
            # Of two duplicates, one kept and one not, the kept one stays.
            apply(selection, replace(step, keep=f"kept_ DESC, {step.keep}") if isinstance(step, Dedup) else step)
            db.execute("DELETE FROM retainable WHERE row IN (SELECT row FROM drops)")
    db.execute("DELETE FROM drops")
    db.execute("INSERT INTO drops SELECT * FROM fates")
    db.execute("CREATE OR REPLACE VIEW alive AS SELECT * FROM rows ANTI JOIN drops USING (row)")


def _show(selection: Selection, *, with_kept: bool) -> None:
    """Let `alive` be the rows that may still be retained, and for the sake of duplicates the kept ones too."""
    kept = "UNION ALL SELECT *, true FROM rows ANTI JOIN fates USING (row)" if with_kept else ""
    selection.db.execute(
        f"CREATE OR REPLACE VIEW alive AS SELECT *, false AS kept_ FROM rows SEMI JOIN retainable USING (row) {kept}"
    )
