"""`curate diff`: two builds side by side: options that differ, the funnels, and the rows that were decided otherwise.

Rows are the same where their keys are (a key is a hash of URL and caption), whatever their place in the list. The join
is over keys and decisions alone, so it stays small; URLs and captions are read only for what is shown or written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.ask.arguments import DiffOptions
from curate.ask.overview import Step, funnel
from curate.ask.tables import check_ours, database, in_order, read_manifest, rows_of, step_names
from curate.database import arrow_batches, files
from curate.errors import ConfigError
from curate.files import made_from, write_batches

if TYPE_CHECKING:
    import duckdb

# In the order in which they are told.
KINDS = {
    "only_in_a": "rows only in A's list",
    "only_in_b": "rows only in B's list",
    "lost": "kept in A, dropped in B",
    "gained": "dropped in A, kept in B",
    "moved": "kept in both, in different splits",
    "otherwise": "dropped in both, by different steps",
}
# Not options of the result: where it lies, and how fast and with what memory it is made.
_NO_OPTION = ("out", "select.memory_limit", "select.threads")
_DECISION = ("row", "kept", "split", "stage", "step", "reason", "value")


@dataclass(frozen=True, slots=True)
class Flip:
    """Rows of one kind that one step decided.

    Attributes:
        kind: one of KINDS.
        decided: of lost rows, stage and step that dropped them in B; of gained ones, in A; of moved ones, the splits.
        rows: how many.
        examples: the first of them, in the order of the list: key, url, caption, value.
    """

    kind: str
    decided: str
    rows: int
    examples: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two builds.

    Attributes:
        notes: what could not be compared, and why.
        options: (key, in A, in B) of the options that differ.
        rows: (in A, in B) of the lists; kept: of the datasets.
        funnel: (stage, step, A's, B's), None where a build has no such step.
        flips: the rows, by kind and step.
    """

    notes: list[str]
    options: list[tuple[str, str, str]]
    rows: tuple[int, int]
    kept: tuple[int, int]
    funnel: list[tuple[str, str, Step | None, Step | None]]
    flips: list[Flip]


def diff(a: Path, b: Path, options: DiffOptions) -> Difference:
    """Compare two dataset folders; with `options.out`, write every differing row to that file.

    Raises:
        InputError: one of them is no dataset folder.
        ConfigError: `options.out` cannot be written.
    """
    for folder in (a, b):
        check_ours(folder)
    ledgers = [folder / "ledger.parquet" for folder in (a, b)]
    with database(ledgers, options, options.out.parent if options.out else a) as db:
        for name, path in zip("ab", ledgers, strict=True):
            db.execute(f"CREATE VIEW {name} AS FROM read_parquet({files([path])})")
        _find_flips(db)
        counts = [db.execute(f"SELECT count(*), count_if(kept) FROM {name}").fetchall()[0] for name in "ab"]
        found = Difference(
            _notes(a, b),
            _options(a, b),
            (counts[0][0], counts[1][0]),
            (counts[0][1], counts[1][1]),
            _funnels(db, a, b),
            _flips(db, options.examples),
        )
        if options.out:
            _write(db, options.out, [made_from(path) for path in ledgers])
    return found


# --- options ---------------------------------------------------------------------------------------------------------


def _notes(a: Path, b: Path) -> list[str]:
    notes = []
    for name, folder in (("A", a), ("B", b)):
        manifest = read_manifest(folder)
        if manifest is None:
            notes.append(f"{name} has no manifest.json, so its options are not known; run `curate report`")
        elif manifest["made_from"] != made_from(folder / "ledger.parquet"):
            notes.append(f"{name}'s manifest.json is of an earlier ledger: its options may be too; run `curate report`")
    return notes


def _options(a: Path, b: Path) -> list[tuple[str, str, str]]:
    """The options that differ; none where one of the builds has no manifest."""
    manifests = [read_manifest(folder) for folder in (a, b)]
    flat = [dict(_flat({"seed": found["seed"], **found["config"]})) for found in manifests if found]
    if len(flat) < 2:
        return []
    return [
        (key, flat[0].get(key, "–"), flat[1].get(key, "–"))
        for key in dict.fromkeys([*flat[0], *flat[1]])
        if flat[0].get(key) != flat[1].get(key) and key not in _NO_OPTION
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as text; a filter stands under its name."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif key == "filters" and isinstance(value, list):
        yield "filters (order)", ", ".join(str(step.get("name")) for step in value)
        for step in value:
            yield f"filters '{step.get('name')}'", str({name: item for name, item in step.items() if name != "name"})
    else:
        yield key, str(value)


# --- rows ------------------------------------------------------------------------------------------------------------


def _find_flips(db: duckdb.DuckDBPyConnection) -> None:
    """Table `flips`: key, kind and what decided it, of every row that is not the same in both."""
    told = "CASE WHEN stage = step THEN stage ELSE concat(stage, ' ', step) END"
    narrow = f"key, kept, split, CASE WHEN kept THEN split ELSE {told} END AS fate"
    db.execute(f"""
        CREATE TABLE flips AS SELECT * FROM (
            SELECT coalesce(a.key, b.key) AS key, CASE
                WHEN b.key IS NULL THEN 'only_in_a' WHEN a.key IS NULL THEN 'only_in_b'
                WHEN a.kept AND NOT b.kept THEN 'lost' WHEN b.kept AND NOT a.kept THEN 'gained'
                WHEN a.kept THEN 'moved' ELSE 'otherwise' END AS kind,
                CASE WHEN b.key IS NULL THEN CASE WHEN a.kept THEN 'kept' ELSE 'dropped' END
                    WHEN a.key IS NULL THEN CASE WHEN b.kept THEN 'kept' ELSE 'dropped' END
                    WHEN a.kept AND NOT b.kept THEN b.fate WHEN b.kept AND NOT a.kept THEN a.fate
                    ELSE a.fate || ' → ' || b.fate END AS decided
            FROM (SELECT {narrow} FROM a) a FULL JOIN (SELECT {narrow} FROM b) b ON a.key = b.key
            WHERE a.fate IS DISTINCT FROM b.fate
        )""")


def _flips(db: duckdb.DuckDBPyConnection, examples: int) -> list[Flip]:
    counts = db.execute(
        "SELECT kind, decided, count(*) AS n FROM flips GROUP BY ALL ORDER BY n DESC, kind, decided"
    ).fetchall()
    chosen = _examples(db, examples)
    return [
        Flip(kind, decided, rows, chosen.get((kind, decided), []))
        for known in KINDS
        for kind, decided, rows in counts
        if kind == known
    ]


def _examples(db: duckdb.DuckDBPyConnection, most: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The first rows of each kind and step. The value is that of the build that dropped the row."""
    # The smallest keys are a sample as good as any, and found in one pass without sorting all.
    found = (
        rows_of(
            db,
            f"""WITH chosen AS (
            SELECT kind, decided, unnest(keys) AS key
            FROM (SELECT kind, decided, min(key, {most}) AS keys FROM flips GROUP BY kind, decided)
        ), shown AS (
            SELECT key, url, caption, value, 'a' AS build FROM a SEMI JOIN chosen USING (key)
            UNION ALL SELECT key, url, caption, value, 'b' FROM b SEMI JOIN chosen USING (key)
        )
        SELECT kind, decided, key, url, caption, value FROM chosen JOIN shown USING (key)
        WHERE build = CASE WHEN kind IN ('lost', 'only_in_b', 'otherwise') THEN 'b' ELSE 'a' END
        ORDER BY kind, decided, key""",
        )
        if most
        else []
    )
    examples: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        examples.setdefault((row.pop("kind"), row.pop("decided")), []).append(row)
    return examples


def _funnels(db: duckdb.DuckDBPyConnection, a: Path, b: Path) -> list[tuple[str, str, Step | None, Step | None]]:
    names = [step_names(folder) for folder in (a, b)]
    steps = [
        {(step.stage, step.step): step for step in funnel(db, ledger, own)}
        for ledger, own in zip("ab", names, strict=True)
    ]
    # A step that only A has stands where A has it.
    order = list(dict.fromkeys([*names[1], *names[0]])) if len(names[1]) > len(names[0]) else [*names[0], *names[1]]
    places = in_order(list({*steps[0], *steps[1]}), list(dict.fromkeys(order)))
    return [(*place, steps[0].get(place), steps[1].get(place)) for place in places]


def _write(db: duckdb.DuckDBPyConnection, path: Path, made: list[str | None]) -> None:
    """Every differing row, with both decisions, in the order of A's list and then B's."""
    if path.suffix != ".parquet":
        raise ConfigError(f"--out {path}: expected the name of a Parquet file, such as flips.parquet")
    columns = ", ".join(f"{build}.{name} AS {name}_{build}" for build in "ab" for name in _DECISION)
    batches = arrow_batches(
        db,
        f"""SELECT key, kind, coalesce(a.url, b.url) AS url, coalesce(a.caption, b.caption) AS caption, {columns}
        FROM flips LEFT JOIN (FROM a SEMI JOIN flips USING (key)) a USING (key)
            LEFT JOIN (FROM b SEMI JOIN flips USING (key)) b USING (key)
        ORDER BY row_a NULLS LAST, row_b, key""",
    )
    try:
        write_batches(batches, batches.schema, path, made_from=" ".join(map(str, made)))
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written ({error.strerror or error})") from error


# --- in the terminal -------------------------------------------------------------------------------------------------


def shown(found: Difference, a: Path, b: Path) -> list[Any]:
    """The answer as tables and lines for `text.show`."""
    from curate.ask.text import rows, table

    answers: list[Any] = [f"A  {a}: {rows(found.rows[0])}, {found.kept[0]:,} kept"]
    answers += [f"B  {b}: {rows(found.rows[1])}, {found.kept[1]:,} kept", *found.notes, ""]
    if found.options:
        answers += [table(("option", "A", "B"), found.options, "options that differ"), ""]
    elif not found.notes:
        answers += ["no option differs", ""]
    funnels = [
        (stage, step, *(value for own in (in_a, in_b) for value in ((own.dropped, own.left) if own else (None, None))))
        for stage, step, in_a, in_b in found.funnel
    ]
    answers += [
        table(("stage", "step", "A dropped", "A left", "B dropped", "B left"), funnels, "funnel", grouped=True),
        "",
    ]
    if not found.flips:
        return [*answers, "every row was decided the same"]
    counted = [(KINDS[flip.kind], flip.decided, flip.rows) for flip in found.flips]
    answers += [table(("what", "decided by", "rows"), counted, "rows that differ", grouped=True)]
    for flip in found.flips:
        if flip.examples:
            lines = [(row["key"], row["value"], row["url"], row["caption"]) for row in flip.examples]
            heading = f"{KINDS[flip.kind]}: {flip.decided}, {rows(flip.rows)}"
            answers += ["", table(("key", "value", "url", "caption"), lines, heading)]
    return answers
