"""A dataset folder as tables of a locked, read-only database: ledger, planned, raw, signals, samples.

They are views, so nothing is read but what a query needs, and a folder without some of them has the others.
"""

from __future__ import annotations

import json
import os
import re
import resource
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.ask.arguments import EngineOptions
from curate.database import SPILL, column_types, connect, files, literal, quoted
from curate.errors import InputError
from curate.files import made_from, notes
from curate.shards import SPLITS
from curate.signals import files_of, groups_there

if TYPE_CHECKING:
    import duckdb

TABLES = ("ledger", "planned", "raw", "signals", "samples")
STAGES = ("plan", "fetch", "select")
ROWS_AT_ONCE = 1_024


@contextmanager
def open_tables(out: Path, engine: EngineOptions) -> Iterator[duckdb.DuckDBPyConnection]:
    """A locked database with a view of each table that the folder has.

    - ledger: one row for each row of the list; planned: as the list gave it (plan/, dropped rows among them).
    - raw: one row for each candidate, what came of its request; signals: what was measured of its image and caption,
      of all groups of signals.
    - samples: what is packed, with its `split` and `shard`.

    Raises:
        InputError: not a dataset folder of ours.
    """
    check_ours(out)
    allowed = [path for name in ("plan", "raw", "signals", "shards") if (path := out / name).is_dir()]
    with database([out / "ledger.parquet", *allowed], engine, out) as db:
        for name, query in _views(db, out):
            db.execute(f"CREATE VIEW {name} AS {query}")
        yield db


@contextmanager
def database(allowed: Sequence[Path], engine: EngineOptions, folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A locked database that may read these files and folders, and spills beside the data where that can be written.

    Not where a build spills to: the folder may be at work.
    """
    _open_many_files()
    spill = (folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())) / f"{SPILL}-{os.getpid()}"
    with connect(engine.memory_limit, engine.threads, spill, allowed) as db:
        yield db


def _open_many_files() -> None:
    """As many as the system allows: raw/ may have a thousand files, and DuckDB holds those of one scan open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_ours(out: Path) -> None:
    """Check that a folder is one that `curate` made, or a copy of a part of one that has the ledger.

    Raises:
        InputError: no folder, none of ours, or nothing was selected yet.
    """
    if not out.is_dir():
        raise InputError(f"{out}: no such folder; give the one that `curate build --out` wrote")
    if not (out / "ledger.parquet").exists():
        if (out / "plan").is_dir() or (out / "raw").is_dir():
            raise InputError(f"{out}: nothing was selected yet (no ledger.parquet); run `curate select` first")
        raise InputError(
            f"{out}: not a dataset folder (no ledger.parquet); give the one that `curate build --out` wrote"
        )
    if made_from(out / "ledger.parquet") is None:
        raise InputError(f"{out / 'ledger.parquet'}: not a ledger of curate, or broken; run `curate select` again")


def _views(db: duckdb.DuckDBPyConnection, out: Path) -> Iterator[tuple[str, str]]:
    """Name and SQL of each view, of what is there."""
    yield "ledger", f"FROM {_parquet([out / 'ledger.parquet'])}"
    planned = [some for some in (numbered(out / "plan"), [*(out / "plan").glob("dropped.parquet")]) if some]
    if planned:
        yield "planned", " UNION ALL BY NAME ".join(f"SELECT * FROM {_parquet(some)}" for some in planned)
    if raw := numbered(out / "raw"):
        yield "raw", f"FROM {_parquet(raw)}"
    if groups := [files_of(out, group) for group in groups_there(out)]:
        yield "signals", _joined(db, groups)
    if samples := packed(out):
        yield "samples", _samples(db, samples)


def _parquet(paths: Sequence[Path]) -> str:
    return f"read_parquet({files(paths)})"


def _joined(db: duckdb.DuckDBPyConnection, groups: Sequence[Sequence[Path]]) -> str:
    """SQL of one row a key with the columns of all groups; each column once."""
    seen: set[str] = {"key"}
    parts = []
    for paths in groups:
        there = [name for name in column_types(db, _parquet(paths[:1])) if name not in seen]
        seen.update(there)
        parts.append(f"(SELECT {', '.join(map(quoted, ['key', *there]))} FROM {_parquet(paths)})")
    return "SELECT * FROM " + " FULL JOIN ".join(parts[:1] + [f"{part} USING (key)" for part in parts[1:]])


def _samples(db: duckdb.DuckDBPyConnection, paths: Sequence[Path]) -> str:
    clash = "RENAME (shard AS list_shard)" if "shard" in column_types(db, _parquet(paths[:1])) else ""
    renamed = f"(SELECT * {clash} FROM read_parquet({files(paths)}, filename = true))"
    stem = r"regexp_extract(filename, '([^/\\]+)\.parquet$', 1)"
    return f"SELECT {stem} AS shard, split_part({stem}, '-', 1) AS split, * EXCLUDE (filename) FROM {renamed}"


def numbered(folder: Path) -> list[Path]:
    """The Parquet files of a stage, `00000.parquet` …, sorted."""
    return sorted(path for path in folder.glob("*.parquet") if path.stem.isdigit())


def packed(out: Path) -> list[Path]:
    """The Parquet files of the packed shards, in the order of the splits."""
    folder = out / "shards"
    return [
        path for split in SPLITS for path in sorted(folder.glob(f"{split}-*.parquet")) if shard_split(path) == split
    ]


def shard_split(path: Path) -> str | None:
    """The split of a packed shard by its name, `train-00000.tar`; None for any other file."""
    found = re.fullmatch(rf"({'|'.join(SPLITS)})-\d+\.(?:tar|parquet)", path.name)
    return found[1] if found else None


# --- what the folder says of its configuration -----------------------------------------------------------------------


def read_manifest(out: Path) -> dict[str, Any] | None:
    """`manifest.json`; None if there is none (no report was made yet).

    Raises:
        InputError: it cannot be read.
    """
    path = out / "manifest.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); run `curate report` again") from error
    if not isinstance(found, dict) or "made_from" not in found:
        raise InputError(f"{path}: not a manifest of curate; run `curate report` again")
    return found


def step_names(out: Path) -> list[str]:
    """Names of the filters that made the ledger, in their order, as the ledger itself says; an older one's manifest."""
    if told := notes(out / "ledger.parquet").get("filters"):
        return [str(name) for name in json.loads(told)]
    return [str(step.get("name")) for step in ((read_manifest(out) or {}).get("config") or {}).get("filters") or []]


def in_order(places: Sequence[tuple[str, str]], names: Sequence[str]) -> list[tuple[str, str]]:
    """(stage, step) pairs in the order in which a row meets them; steps of no known place go last in their stage."""
    place = {name: number for number, name in enumerate(names)}
    stage = {name: number for number, name in enumerate(STAGES)}
    return sorted(
        places,
        key=lambda pair: (
            stage.get(pair[0], len(stage)),
            -1 if pair[0] == pair[1] else place.get(pair[1], len(place)),
            pair[1],
        ),
    )


def rows_of(db: duckdb.DuckDBPyConnection, query: str, values: Sequence[object] = ()) -> list[dict[str, Any]]:
    """The whole, short, answer to a query as dictionaries."""
    found = db.execute(query, list(values))
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def each_row(db: duckdb.DuckDBPyConnection, query: str) -> Iterator[dict[str, Any]]:
    """The answer to a query that may be long; read it to its end before the next query."""
    found = db.execute(query)
    names = [column[0] for column in found.description]
    while rows := found.fetchmany(ROWS_AT_ONCE):
        for row in rows:
            yield dict(zip(names, row, strict=True))


def key_list(keys: Sequence[str]) -> str:
    """Keys as an SQL list."""
    return f"({', '.join(map(literal, keys))})"
