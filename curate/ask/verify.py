"""`curate verify`: is a dataset folder what its manifest, its ledger and its Parquet files say?

File by file first (sha256, page checksums, each member of each tar), then over all of them in the database: keys,
duplicate groups, the ledger's books. Nothing but one shard's places is held in memory. raw/ is not needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.ask.arguments import VerifyOptions
from curate.ask.members import Fault, check_parquet, check_shard
from curate.ask.tables import check_ours, database, each_row, numbered, packed, read_manifest, shard_split
from curate.database import column_types, files
from curate.files import digest, file_sha256, fingerprint, made_from
from curate.progress import progress

if TYPE_CHECKING:
    import duckdb


@dataclass(slots=True)
class Verified:
    """What was checked, and what is wrong.

    Attributes:
        files, bytes: that the manifest names and that are there.
        samples: in the packed shards.
        rows: of the ledger.
        faults: at most `VerifyOptions.most` of one kind in one file.
        more: by kind and file, how many further ones there are.
    """

    files: int = 0
    bytes: int = 0
    samples: int = 0
    rows: int = 0
    faults: list[Fault] = field(default_factory=list)
    more: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, faults: Iterable[Fault], most: int) -> int:
        """Take faults over, and give how many there were."""
        number = 0
        seen = Counter((fault.kind, fault.file) for fault in self.faults)
        for fault in faults:
            number += 1
            place = (fault.kind, fault.file)
            seen[place] += 1
            if seen[place] <= most:
                self.faults.append(fault)
            else:
                self.more[place] += 1
        return number


def verify(out: Path, options: VerifyOptions) -> Verified:
    """Check everything; a fault does not end the check.

    Raises:
        InputError: not a dataset folder, or its manifest.json cannot be read.
    """
    check_ours(out)
    manifest = read_manifest(out)
    told: Mapping[str, Any] = (manifest or {}).get("files", {})
    found = Verified()
    found.add(_check_manifest(out, manifest), options.most)
    shards = packed(out)
    whole = []
    with progress("verify", len(told) + len(shards) + 1) as advance:
        for name, facts in told.items():
            faults = found.add(_check_file(out / name, name, facts, found), options.most)
            advance(1, faults=faults)
        for path in [out / "ledger.parquet", *shards]:
            name = path.relative_to(out).as_posix()
            faults = found.add(check_parquet(path, name), options.most)
            if not faults:
                whole.append(path)
                if path.parent.name == "shards":
                    faults += found.add(check_shard(path.with_suffix(""), name.removesuffix(".parquet")), options.most)
            advance(1, faults=faults)
    if whole and whole[0].name == "ledger.parquet":
        with database(whole, options, out) as db:
            found.add(_check_together(db, out, whole[1:], found, all_read=len(whole) == len(shards) + 1), options.most)
    return found


# --- files -----------------------------------------------------------------------------------------------------------


def _check_manifest(out: Path, manifest: Mapping[str, Any] | None) -> Iterator[Fault]:
    """That there is one, that it is of this ledger, and that it names every file of the dataset."""
    if manifest is None:
        yield Fault("manifest", "manifest.json", None, "not there: run `curate report`, which writes it last")
        return
    ledger, shards = out / "ledger.parquet", packed(out)
    if manifest["made_from"] != made_from(ledger):
        yield Fault("manifest", "manifest.json", None, "of another ledger than the one here; run `curate report` again")
    elif manifest.get("fingerprint") != fingerprint(digest(ledger), [digest(path) for path in sorted(shards)]):
        yield Fault("manifest", "manifest.json", None, "its fingerprint is not that of the ledger and shards here")
    for path in sorted((out / "shards").glob("*")):
        name = path.relative_to(out).as_posix()
        if shard_split(path) and name not in manifest["files"]:
            yield Fault("files", name, None, "not in manifest.json: it is no part of this dataset")


def _check_file(path: Path, name: str, told: Mapping[str, Any], found: Verified) -> Iterator[Fault]:
    if not path.is_file():
        yield Fault("files", name, None, "not there, but in manifest.json; copy it, or run `curate build` again")
        return
    size = path.stat().st_size
    found.files += 1
    found.bytes += size
    if size != told["bytes"]:
        yield Fault("sha256", name, None, f"{size:,} bytes, but {told['bytes']:,} in manifest.json")
    elif (sha256 := file_sha256(path)) != told["sha256"]:
        yield Fault("sha256", name, None, f"sha256 {sha256}, but {told['sha256']} in manifest.json")


# --- over all files --------------------------------------------------------------------------------------------------


def _check_together(
    db: duckdb.DuckDBPyConnection, out: Path, shards: list[Path], found: Verified, *, all_read: bool
) -> Iterator[Fault]:
    db.execute(f"CREATE VIEW ledger AS FROM read_parquet({files([out / 'ledger.parquet'])}, file_row_number = true)")
    found.rows = db.execute("SELECT count(*) FROM ledger").fetchall()[0][0]
    yield from _check_ledger(db, out)
    if not shards:
        if kept := db.execute("SELECT count(*) FROM ledger WHERE kept").fetchall()[0][0]:
            yield Fault("books", "shards", None, f"no shard here, but {kept:,} rows of the ledger are kept")
        return
    source = f"read_parquet({files(shards)}, filename = true, file_row_number = true)"
    types = column_types(db, source)
    group = "duplicate_group" if "duplicate_group" in types else "NULL"
    db.execute(rf"""
        CREATE TABLE samples AS SELECT key, {group} AS duplicate_group, md5(coalesce(caption, '')) AS caption,
            regexp_extract(filename, 'shards[/\\]([^/\\]+)$', 1) AS file, split_part(file, '-', 1) AS split,
            file_row_number AS place
        FROM {source}""")
    found.samples = db.execute("SELECT count(*) FROM samples").fetchall()[0][0]
    yield from _check_samples(db)
    yield from _check_books(db, all_read=all_read)


def _check_ledger(db: duckdb.DuckDBPyConnection, out: Path) -> Iterator[Fault]:
    """Every row of the list once; kept and in a split, or dropped at a stage for a reason."""
    rows, numbers, first, last = db.execute(
        "SELECT count(*), count(DISTINCT row), min(row), max(row) FROM ledger"
    ).fetchall()[0]
    if rows and (numbers != rows or first != 0 or last != rows - 1):
        what = (
            f"{rows:,} rows with {numbers:,} places in the list, {first} to {last}; expected 0 to {rows - 1}, each once"
        )
        yield Fault("books", "ledger.parquet", None, what)
    import pyarrow.parquet as pq

    plan = [*numbered(out / "plan"), *(out / "plan").glob("dropped.parquet")]
    if plan and (planned := sum(pq.read_metadata(path).num_rows for path in plan)) != rows:
        yield Fault("books", "ledger.parquet", None, f"{rows:,} rows, but plan/ has {planned:,}")
    for row in each_row(db, "SELECT key, min(file_row_number) AS place FROM ledger GROUP BY key HAVING count(*) > 1"):
        yield Fault("books", "ledger.parquet", row["place"], f"key {row['key']} is in the ledger twice")
    unsound = """
        SELECT key, file_row_number AS place FROM ledger
        WHERE NOT (kept = (split IS NOT NULL) AND kept = (stage IS NULL) AND kept = (reason IS NULL)
            AND (kept OR step IS NOT NULL)) ORDER BY place"""
    for row in each_row(db, unsound):
        what = f"{row['key']}: neither kept in a split nor dropped at a stage by a step for a reason"
        yield Fault("books", "ledger.parquet", row["place"], what)


def _check_samples(db: duckdb.DuckDBPyConnection) -> Iterator[Fault]:
    """No key twice over all shards, no duplicate group in two splits."""
    twice = """
        SELECT key, place, file, first_value(file || ' row ' || place) OVER same AS first FROM samples
        SEMI JOIN (SELECT key FROM samples GROUP BY key HAVING count(*) > 1) repeated USING (key)
        WINDOW same AS (PARTITION BY key ORDER BY file, place)
        QUALIFY row_number() OVER same > 1 ORDER BY file, place"""
    for row in each_row(db, twice):
        what = f"key {row['key']} is there already, in shards/{row['first']}"
        yield Fault("keys", f"shards/{row['file']}", row["place"], what)
    crossing = """
        SELECT duplicate_group, string_agg(DISTINCT split, ', ' ORDER BY split) AS splits,
            arg_min(file, (file, place)) AS file, arg_min(place, (file, place)) AS place
        FROM samples WHERE duplicate_group IS NOT NULL
        GROUP BY duplicate_group HAVING count(DISTINCT split) > 1 ORDER BY duplicate_group"""
    for row in each_row(db, crossing):
        what = f"duplicate group {row['duplicate_group']} lies in several splits: {row['splits']}"
        yield Fault("groups", f"shards/{row['file']}", row["place"], what)


def _check_books(db: duckdb.DuckDBPyConnection, *, all_read: bool) -> Iterator[Fault]:
    """The shards hold what the ledger keeps, in the same splits, with the same captions; and nothing else."""
    counts = """
        SELECT split, coalesce(l.n, 0) AS told, coalesce(s.n, 0) AS there
        FROM (SELECT split, count(*) AS n FROM ledger WHERE kept GROUP BY split) l
        FULL JOIN (SELECT split, count(*) AS n FROM samples GROUP BY split) s USING (split)
        WHERE told <> there ORDER BY split"""
    for row in each_row(db, counts) if all_read else []:
        what = f"{row['there']:,} samples in {row['split']}, but {row['told']:,} in ledger.parquet"
        yield Fault("books", "shards", None, what)
    other = """
        SELECT samples.key, samples.file, samples.place,
            CASE WHEN ledger.key IS NULL THEN 'not in ledger.parquet'
                WHEN NOT ledger.kept THEN 'dropped in ledger.parquet, by ' || ledger.step
                WHEN ledger.split <> samples.split THEN 'in split ' || ledger.split || ' in ledger.parquet'
                ELSE 'another caption than in ledger.parquet' END AS what
        FROM samples LEFT JOIN (
            SELECT key, kept, step, split, md5(coalesce(caption, '')) AS caption
            FROM ledger SEMI JOIN samples USING (key)
        ) ledger USING (key)
        WHERE ledger.key IS NULL OR NOT ledger.kept
            OR ledger.split <> samples.split OR ledger.caption <> samples.caption
        ORDER BY samples.file, samples.place"""
    for row in each_row(db, other):
        yield Fault("books", f"shards/{row['file']}", row["place"], f"{row['key']}: {row['what']}")
    lost = """
        SELECT key, file_row_number AS place, split FROM ledger ANTI JOIN samples USING (key)
        WHERE kept ORDER BY place"""
    for row in each_row(db, lost) if all_read else []:
        yield Fault("books", "ledger.parquet", row["place"], f"{row['key']}: kept in {row['split']}, but in no shard")


# --- in the terminal -------------------------------------------------------------------------------------------------


def shown(found: Verified) -> list[str]:
    """The answer as lines: each fault, and at the end what was checked."""
    lines = [str(fault) for fault in found.faults]
    lines += [f"{file}: {count:,} more of these ({kind})" for (kind, file), count in found.more.items()]
    checked = (
        f"{found.files:,} files ({found.bytes / 1e6:,.1f} MB), {found.samples:,} samples, {found.rows:,} ledger rows"
    )
    return [*lines, f"checked {checked}"]
