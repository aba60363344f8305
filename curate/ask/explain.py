"""`curate explain`: the life of a row, from the list to its place in a shard, with every fact and signal on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.ask.arguments import ExplainOptions
from curate.ask.tables import TABLES, key_list, open_tables, rows_of
from curate.database import scalar
from curate.errors import InputError
from curate.expressions import PLAN_COLUMNS
from curate.report.definitions import define
from curate.shards import OFFSET_COLUMNS

if TYPE_CHECKING:
    import duckdb

# What of raw is the answer to the request; the rest, but the offsets, was measured from the pixels.
REQUEST = ("status", "http_status", "error_message", "bytes", "format", "sha256")
MOST_MEMBERS = 5
# Below this likeness (Jaro–Winkler, 0 to 1) another URL is no help.
LIKE = 0.85
_BARE = "regexp_replace({}, '^[A-Za-z]+://(www[.])?', '')"


@dataclass(frozen=True, slots=True)
class Life:
    """One row of the list.

    Attributes:
        title: its place in the list and what became of it, in one line.
        sections: heading → (name, value) pairs, in the order in which the row met the stages.
    """

    title: str
    sections: dict[str, list[tuple[str, Any]]]


def explain(what: str, options: ExplainOptions) -> list[Life]:
    """The life of every row with a URL, or of the row with a key.

    Raises:
        InputError: no such row, with the nearest there is; or not a dataset folder.
    """
    with open_tables(options.out, options) as db:
        lines = rows_of(db, "SELECT * FROM ledger WHERE key = ? OR url = ? ORDER BY row", [what, what])
        if not lines:
            raise InputError(f"{options.out}: no row has the URL or key '{what}'{_nearest(db, what)}")
        there = {name for (name,) in db.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()}
        keys = key_list([line["key"] for line in lines])
        told = {
            name: {row["key"]: row for row in rows_of(db, f"SELECT * FROM {name} WHERE key IN {keys}")}
            for name in TABLES[1:]
            if name in there
        }
        return [_life(db, options.out, line, told) for line in lines]


def _nearest(db: duckdb.DuckDBPyConnection, what: str) -> str:
    """What the user may have meant: a key that begins so, or the URL most like this one."""
    if len(what) >= 4:
        begun = db.execute("SELECT min(key) FROM ledger WHERE starts_with(key, ?)", [what]).fetchall()[0][0]
        if begun:
            return f". Did you mean '{begun}'?"
    url, likeness = db.execute(
        f"""SELECT arg_max(url, likeness), max(likeness) FROM (
            SELECT url, jaro_winkler_similarity({_BARE.format("url")}, {_BARE.format("?")}) AS likeness
            FROM ledger WHERE url <> ''
        )""",
        [what],
    ).fetchall()[0]
    if url and likeness >= LIKE:
        return f". Did you mean '{url}'?"
    return f"; it has {scalar(db, 'SELECT count(*) FROM ledger'):,} rows, none much like it"


def _life(
    db: duckdb.DuckDBPyConnection, out: Path, line: Mapping[str, Any], told: Mapping[str, Mapping[str, dict[str, Any]]]
) -> Life:
    planned, raw, signals, sample = (told.get(name, {}).get(line["key"], {}) for name in TABLES[1:])
    dropped_at = line["stage"]
    sections = {"list": _listed(line, planned), "plan": _plan(line)}
    if dropped_at != "plan":
        sections["request"] = _request(raw or sample, raw)
        known = {*planned, *PLAN_COLUMNS, *REQUEST, *signals, "reason", "value"}
        sections["pixels" if planned else "other facts"] = _others(raw or sample, known)
        sections["signals"] = _pairs(signals, {"key"})
        sections["select"] = _decision(line)
    sections["twins"] = _twins(db, line)
    sections["packed"] = _packed(out, sample) if line["kept"] else []
    return Life(_title(line), {name: pairs for name, pairs in sections.items() if pairs})


def _title(line: Mapping[str, Any]) -> str:
    by = "" if line["step"] == line["stage"] else f" by {line['step']}"
    fate = f"kept in {line['split']}" if line["kept"] else f"dropped at {line['stage']}{by}"
    return f"row {line['row']}: {fate}"


def _listed(line: Mapping[str, Any], planned: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What the list says: URL, caption, and its other columns."""
    first = [(name, line[name]) for name in ("row", "key", "url", "caption")]
    return [pair for pair in first if pair[1] is not None] + _pairs(planned, set(line))


def _plan(line: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if line["stage"] != "plan":
        return [("", "a candidate: its URL was to be asked for")]
    return [("", "dropped: no request was made"), *_why(line)]


def _request(raw: Mapping[str, Any], there: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if not raw:
        return [("", "not known: raw/ is not in this folder")]
    why = [] if raw["status"] == "success" else _why(raw)
    return _pairs({name: raw.get(name) for name in REQUEST}, set()) + (why if there else [])


def _others(facts: Mapping[str, Any], known: set[str]) -> list[tuple[str, Any]]:
    return _pairs(facts, known | {"shard", "split", "duplicate_group", *OFFSET_COLUMNS})


def _decision(line: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if line["stage"] == "fetch":
        return [("", "not asked: no image came")]
    if not line["kept"]:
        return [("dropped by", line["step"]), *_why(line)]
    if line["step"]:
        return [("kept in", line["split"]), ("moved there by", line["step"]), ("value", line["value"])]
    return [("kept in", line["split"])]


def _why(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Step, reason and its definition, value and twin, as far as they are there."""
    reason = facts.get("reason")
    said = f"{reason}: {define(reason)}" if reason and define(reason) else reason
    step = facts.get("step") if facts.get("stage") == "plan" else None
    return [
        (name, value)
        for name, value in (("step", step), ("reason", said), ("value", facts.get("value")))
        if value is not None
    ]


def _twins(db: duckdb.DuckDBPyConnection, line: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What this row is a duplicate of, and which others are."""
    pairs: list[tuple[str, Any]] = []
    if line["twin"]:
        found = rows_of(db, "SELECT * FROM ledger WHERE key = ?", [line["twin"]])
        pairs.append(("kept twin" if found else "test image", _named(found[0]) if found else line["twin"]))
    query = "FROM ledger WHERE duplicate_group = ? AND key <> ?"
    values = [line["duplicate_group"], line["key"]]
    count = db.execute(f"SELECT count(*) {query}", values).fetchall()[0][0]
    if count:
        pairs.append(("duplicate_group", f"{line['duplicate_group']}, {count:,} more in it:"))
        pairs += [
            ("", _named(other)) for other in rows_of(db, f"SELECT * {query} ORDER BY row LIMIT {MOST_MEMBERS}", values)
        ]
        pairs += [("", f"… and {count - MOST_MEMBERS:,} more")] if count > MOST_MEMBERS else []
    return pairs


def _named(line: Mapping[str, Any]) -> str:
    return f"{line['key']} ({_title(line)}) {line['url'] or ''}"


def _packed(out: Path, sample: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if not sample:
        return [("", "not packed yet; run `curate pack`")]
    members = [
        (what, f"{sample[f'{what}_size']:,} bytes at offset {sample[f'{what}_offset']:,}")
        for what in ("image", "caption", "json")
    ]
    return [("shard", str(out / "shards" / f"{sample['shard']}.tar")), *members]


def _pairs(facts: Mapping[str, Any], without: set[str]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in facts.items() if name not in without and value is not None]
