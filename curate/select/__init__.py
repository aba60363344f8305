"""The filter list, run over all that was fetched: who stays, who goes and why, in which split → `ledger.parquet`.

Signals are columns, filters are SQL. The steps run in order in one locked DuckDB, out of core; each adds to a table
of drops. See docs/filters.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb

from curate.concepts import MINED, read_concepts
from curate.config import ClipConfig, MeasureConfig, PackConfig, SelectConfig
from curate.database import (
    SPILL,
    arrow_batches,
    column_types,
    connect,
    create_in_parts,
    enough_memory,
    files,
    parts,
    quoted,
    scalar,
)
from curate.errors import InputError
from curate.expressions import (
    FETCH_COLUMNS,
    SELECT_COLUMNS,
    SIGNAL_COLUMNS,
    check_measured,
    drop_where,
    embeds,
    label,
    step_expressions,
    watch_drops,
)
from curate.files import digest, fingerprint, made_from, sweep, write_batches
from curate.filters import Balance, Decontaminate, Dedup, Relevance, Sample, Step, Top, Where
from curate.ledger import ledger_schema
from curate.progress import progress
from curate.select import balance, decontaminate, dedup, known, relevance
from curate.select.groups import find_groups, place
from curate.select.pictures import check, find, identity
from curate.select.ranked import apply_sample, apply_top
from curate.select.retain import find_retainable
from curate.select.selection import Identity, Selection
from curate.shards import SPLITS
from curate.signals import asked, beside, files_of

FORMAT = 3


@dataclass(frozen=True, slots=True)
class SelectResult:
    """What `run` decided.

    Attributes:
        kept: rows in each split.
        dropped: rows dropped, by (stage, step, reason), of all stages.
        made: whether the ledger was written; False if it was there and up to date.
    """

    kept: dict[str, int]
    dropped: dict[tuple[str, str, str], int]
    made: bool


def run(
    out: Path, steps: Sequence[Step], config: SelectConfig, pack: PackConfig, measured: MeasureConfig, seed: int
) -> SelectResult:
    """Write `out/ledger.parquet`: every row of the list once, kept in a split or dropped by a step.

    Args:
        out: the dataset's folder, planned, fetched and, if there is a CLIP, measured.
        steps: the filters, in order.
        config: limits of the database.
        pack: shares of the splits.
        measured: which signals there are.
        seed: of sample, splits and retain.

    Raises:
        ConfigError: a step names a column, file or measure that is not there, or an expression is wrong.
        InputError: a stage before this one has not run to its end.
    """
    check_measured(steps, measured)
    sweep(out)
    ledger = out / "ledger.parquet"
    plan, raw, signals = _stage_files(out, measured)
    every_signal = [path for paths in signals.values() for path in paths]
    inputs = [digest(path) for path in (*plan, out / "plan" / "dropped.parquet", *raw, *every_signal)]
    images, weights = _named_images(steps), _weights(steps, measured.clip)
    identity = [*_identity(steps), list(images.values()), weights]
    made = fingerprint("select", FORMAT, inputs, identity, [pack.val, pack.test, pack.retain], seed)
    if made_from(ledger) != made:
        allowed = [out / "plan", out / "raw", out / "signals"]
        with (
            enough_memory(config.memory_limit),
            connect(config.memory_limit, config.threads, out / SPILL, allowed) as db,
        ):
            selection = Selection(db, signals.get("clip", []), measured.clip, seed, out / known.FOLDER, weights, images)
            _load(selection, out, plan, raw, steps, list(signals))
            _decide(selection, steps, pack)
            _write(selection, ledger, made, steps)
            known.remove_unused(selection)
        return _count(ledger, made=True)
    return _count(ledger, made=False)


def apply(selection: Selection, step: Step) -> None:
    """Run one step: add the rows it drops to table `drops`."""
    match step:
        case Where():
            drop_where(selection.db, step, stage="select", columns=selection.columns)
        case Dedup():
            dedup.apply(selection, step)
        case Decontaminate():
            decontaminate.apply(selection, step)
        case Relevance():
            relevance.apply(selection, step)
        case Top():
            apply_top(selection, step)
        case Sample():
            apply_sample(selection, step)
        case Balance():
            balance.apply(selection, step)


def _stage_files(out: Path, measured: MeasureConfig) -> tuple[list[Path], list[Path], dict[str, list[Path]]]:
    """Files of plan, raw and each group of signals; the stages before must have run."""
    plan, raw = (sorted((out / stage).glob("[0-9]*.parquet")) for stage in ("plan", "raw"))
    if not (out / "plan" / "dropped.parquet").exists():
        raise InputError(f"{out / 'plan'}: not planned to the end; run `curate plan` first")
    if [path.name for path in plan] != [path.name for path in raw]:
        raise InputError(f"{out / 'raw'}: {len(raw)} of {len(plan)} shards; run `curate fetch` first")
    signals = {group: files_of(out, group) for group in asked(measured)}
    for group, there in signals.items():
        if [path.name for path in there] != [path.name for path in raw]:
            where = out / "signals" / group
            raise InputError(f"{where}: {len(there)} of {len(raw)} files; run `curate measure` first")
    return plan, raw, signals


def _identity(steps: Sequence[Step]) -> list[object]:
    """The steps, and the concepts that they name."""
    parts: list[object] = [(type(step).__name__, asdict(step)) for step in steps]
    for step in steps:
        concepts = getattr(step, "concepts", None)
        if isinstance(concepts, str) and concepts != MINED:
            parts.append(read_concepts(label(step), concepts))
    return parts


def check_named(steps: Sequence[Step]) -> None:
    """Look for the images and concepts that the steps name, without any dataset.

    Raises:
        ConfigError, InputError: a step names what is not there, or not what it should be.
    """
    _identity(steps)
    for path in _named_paths(steps):
        check(path)


def _named_images(steps: Sequence[Step]) -> dict[str, Identity]:
    """By path, what a change of the user's images there changes."""
    return {str(path): identity(path) for path in _named_paths(steps)}


def _named_paths(steps: Sequence[Step]) -> list[Path]:
    found = []
    for step in steps:
        named = step.against if isinstance(step, Decontaminate) else [getattr(step, "images", None)]
        found += [find(label(step), text) for text in named if text]
    return found


def _weights(steps: Sequence[Step], clip: ClipConfig | None) -> str | None:
    """The fingerprint of the CLIP, if a step embeds."""
    if clip is None or not any(embeds(step) for step in steps):
        return None
    from curate.clip import weights_fingerprint

    return weights_fingerprint(clip.name, clip.pretrained)


def _load(
    selection: Selection, out: Path, plan: list[Path], raw: list[Path], steps: Sequence[Step], groups: Sequence[str]
) -> None:
    """Make tables `rows` (what the steps name of raw, no more) and `planned_drops`; `drops` gets what did not come."""
    db = selection.db
    dropped = f"read_parquet({files([out / 'plan' / 'dropped.parquet'])})"
    db.execute(f"CREATE TABLE planned_drops AS SELECT key, row, url, caption, step, reason, value, twin FROM {dropped}")
    sources = [_source(out, part, groups) for part in parts(raw)] or [_no_source(db, dropped)]
    types = {**SELECT_COLUMNS, **column_types(db, sources[0])}
    needed = {"key", "row", "url", "caption", "status", "sha256", "phash", "reason", "value"}
    for step in steps:
        needed |= {name for found in step_expressions(db, step, types) for name in found.columns}
    columns = ", ".join(quoted(name) for name in types if name in needed - SELECT_COLUMNS.keys())
    create_in_parts(db, "rows", (f"SELECT {columns} FROM {source}" for source in sources))
    if "caption_count" in needed:
        _count_captions(db)
    lacking = sum(
        scalar(db, f"SELECT count(*) FROM read_parquet({files(part)}) ANTI JOIN rows USING (row)")
        for part in parts(plan)
    )
    if lacking:
        raise InputError(f"{out / 'raw'}: lacks {lacking} of the candidates in plan; run `curate fetch` first")
    watch_drops(db)
    db.execute("""
        INSERT INTO drops SELECT row, 'fetch', 'fetch', coalesce(reason, status), value, NULL
        FROM rows WHERE status IS DISTINCT FROM 'success'""")


def _count_captions(db: duckdb.DuckDBPyConnection) -> None:
    """Add to `rows` how many of the images that came have the row's caption."""
    db.execute("""
        CREATE TABLE counted AS SELECT rows.*, coalesce(caption_count, 0) AS caption_count
        FROM rows LEFT JOIN (
            SELECT caption, count(*) AS caption_count FROM rows WHERE status = 'success' GROUP BY caption
        ) USING (caption)""")
    db.execute("DROP TABLE rows")
    db.execute("ALTER TABLE counted RENAME TO rows")


def _source(out: Path, raw: list[Path], groups: Sequence[str]) -> str:
    """SQL for all that is known of the candidates in some raw shards."""
    return beside(f"read_parquet({files(raw)})", out, [path.stem for path in raw], groups)


def _no_source(db: duckdb.DuckDBPyConnection, dropped: str) -> str:
    """SQL for no row, but all the columns, so that the filters can be checked where plan dropped all."""
    types = {**column_types(db, dropped), **FETCH_COLUMNS, **SIGNAL_COLUMNS}
    nulls = ", ".join(f"CAST(NULL AS {kind}) AS {quoted(name)}" for name, kind in types.items())
    return f"(SELECT {nulls} WHERE false)"


def _decide(selection: Selection, steps: Sequence[Step], pack: PackConfig) -> None:
    with progress("select", len(steps)) as advance:
        for step in steps:
            apply(selection, step)
            advance()
    find_retainable(selection, steps, apply)
    find_groups(selection)
    place(selection, pack)


def _write(selection: Selection, ledger: Path, made: str, steps: Sequence[Step]) -> None:
    db = selection.db
    db.execute("""
        CREATE TABLE ledger AS
        -- Of a row in retain, the step and value of the relevance filter that moved it there stay.
        SELECT key, row, url, caption, split IS NOT NULL AS kept, split,
            CASE WHEN split IS NULL THEN stage END AS stage, step,
            CASE WHEN split IS NULL THEN out.reason END AS reason, out.value,
            CASE WHEN split IS NULL THEN twin END AS twin, duplicate_group
        FROM rows LEFT JOIN placed USING (row) JOIN grouped USING (row) LEFT JOIN drops out USING (row)
        UNION ALL
        SELECT key, row, url, caption, false, NULL, 'plan', step, reason, value, twin, duplicate_group
        FROM planned_drops JOIN grouped USING (row)""")
    _check(db)
    schema = ledger_schema()
    batches = arrow_batches(db, f"SELECT {', '.join(schema.names)} FROM ledger ORDER BY row")
    names = json.dumps([step.name for step in steps])  # `curate inspect` shows the steps in this order
    write_batches((batch.cast(schema) for batch in batches), schema, ledger, made_from=made, notes={"filters": names})


def _check(db: duckdb.DuckDBPyConnection) -> None:
    """Every row in = one line in the ledger, either kept in a split or dropped by a step for a reason."""
    num_rows = scalar(db, "SELECT (SELECT count(*) FROM rows) + (SELECT count(*) FROM planned_drops)")
    lines, rows, keys, sound = db.execute("""
        SELECT count(*), count(DISTINCT row), count(DISTINCT key),
            count_if(kept = (reason IS NULL) AND kept = (stage IS NULL) AND kept = (split IS NOT NULL))
        FROM ledger""").fetchall()[0]
    assert lines == rows == keys == sound == num_rows, f"ledger: {lines=} {rows=} {keys=} {sound=} {num_rows=}"


def _count(ledger: Path, *, made: bool) -> SelectResult:
    import pyarrow.parquet as pq

    table = pq.read_table(ledger, columns=["split", "stage", "step", "reason"])
    counts = table.group_by(["split", "stage", "step", "reason"]).aggregate([([], "count_all")]).to_pylist()
    kept = dict.fromkeys(SPLITS, 0)
    dropped = {}
    for count in counts:
        if count["split"]:
            kept[count["split"]] = count["count_all"]
        else:
            dropped[count["stage"], count["step"], count["reason"]] = count["count_all"]
    return SelectResult(kept, dict(sorted(dropped.items())), made)
