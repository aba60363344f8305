"""The ledger and the raw shards → the dataset: shuffled, split, in shards of near-equal size.

The order is a seeded hash of the keys, so a sample's place depends on nothing but the list and the seed. The facts are
dealt into buckets on disk by their place, and sorted bucket by bucket, so memory does not grow with the dataset. Images
are copied byte for byte, by their offsets in the raw tars, one shard at a time. A shard whose fingerprint is right is
left alone; so a killed run continues with the next one, and the bytes come out the same.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import numpy as np

from curate.buckets import Buckets
from curate.config import PackConfig, SelectConfig
from curate.database import (
    SPILL,
    column_types,
    connect,
    enough_memory,
    files,
    literal,
    parts,
    quoted,
    scalar,
    seeded,
)
from curate.errors import InputError
from curate.files import digest, fingerprint, made_from, sweep
from curate.index import MemberReader
from curate.progress import progress
from curate.shards import OFFSET_COLUMNS, SPLITS, ShardWriter, shard_name
from curate.signals import beside, files_of, groups_there

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
# Characters of a number or true/false in JSON, at most.
WIDEST_NUMBER = 30
# Rows of raw shards that are joined with their places at once.
JOINED_AT_ONCE = 200_000
# Samples in a bucket, while there are not so many that the open files would be too many.
DEALT, MOST_BUCKETS, DEALT_IN = 32_768, 256, ".pack"


@dataclass(frozen=True, slots=True)
class PackResult:
    """What lies in `out/shards` now.

    Attributes:
        samples: in each split.
        shards: in all splits.
        made: shards that were written now; the others were there and up to date.
    """

    samples: dict[str, int]
    shards: int
    made: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard to be: samples `start` to `end` of a split's order."""

    split: str
    index: int
    start: int
    end: int

    @property
    def name(self) -> str:
        """File name without extension."""
        return shard_name(self.index, self.split)


def run(out: Path, config: PackConfig, seed: int, engine: SelectConfig | None = None) -> PackResult:
    """Write `out/shards/SPLIT-NNNNN.{tar,parquet}` for what the ledger keeps; remove shards that are no part of it.

    Args:
        out: the dataset's folder, with ledger and raw shards.
        config: samples or bytes a shard.
        seed: of the order.
        engine: limits of the database that sorts the samples.

    Raises:
        ConfigError: the limits are too low.
        InputError: there is no ledger, or the raw shards lack what it names.
    """
    engine = engine or SelectConfig()
    folder, ledger = out / "shards", out / "ledger.parquet"
    if not ledger.exists():
        raise InputError(f"{ledger}: not there; run `curate select` first")
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    raw = sorted((out / "raw").glob("[0-9]*.parquet"))
    signals = [path for group in groups_there(out) for path in files_of(out, group)]
    # The ledger says who is kept, the raw shards' own fingerprints which bytes that means.
    inputs = [digest(ledger), *((made_from(path), digest(path)) for path in (*raw, *signals))]
    made = fingerprint("pack", FORMAT, inputs, asdict(config), seed)
    with (
        enough_memory(engine.memory_limit),
        connect(engine.memory_limit, engine.threads, out / SPILL, [ledger, out / "raw", out / "signals"]) as db,
    ):
        samples = _kept(db, ledger)
        if config.shard_bytes:
            _place(db, ledger, seed)
            shards = _cut_by_bytes(db, out, raw, config.shard_bytes)
        else:
            shards = [shard for split in SPLITS for shard in _cut(split, samples[split], config.shard_size)]
        _remove_stale(folder, shards)
        missing = [shard for shard in shards if not _finished(folder / shard.name, made)]
        if missing and not raw:
            raise InputError(f"{out / 'raw'}: no raw shards; run `curate build` again")
        if missing:
            _place(db, ledger, seed)
            _write_all(db, out, missing, samples, raw, made)
    return PackResult(samples, len(shards), len(missing))


def _kept(db: duckdb.DuckDBPyConnection, ledger: Path) -> dict[str, int]:
    """Samples of each split."""
    query = f"SELECT split, count(*) FROM read_parquet({files([ledger])}) WHERE kept GROUP BY split"
    counts = dict(db.execute(query).fetchall())
    return {split: counts.get(split, 0) for split in SPLITS}


# --- how the samples are cut into shards -----------------------------------------------------------------------------


def _cut(split: str, num_samples: int, shard_size: int) -> list[Shard]:
    """Shards of near-equal size, none over `shard_size`."""
    num_shards = -(-num_samples // shard_size)
    return [
        Shard(split, index, num_samples * index // num_shards, num_samples * (index + 1) // num_shards)
        for index in range(num_shards)
    ]


def _cut_by_bytes(db: duckdb.DuckDBPyConnection, out: Path, raw: list[Path], shard_bytes: int) -> list[Shard]:
    """Shards of near-equal bytes, no tar over `shard_bytes`; eight bytes a sample are held in memory."""
    tar = {path: number for number, path in enumerate(raw)}
    db.execute("CREATE TABLE sizes (split_ VARCHAR, place_ BIGINT, size BIGINT)")
    for part in _few(raw):
        facts = _facts(out, {path: tar[path] for path in part})
        size = f"SELECT split_, place_, {_bytes(db, facts, raw)} FROM ({facts}) WHERE image_offset IS NOT NULL"
        db.execute(f"INSERT INTO sizes {size}")
    _check_none_lacks(out, scalar(db, "SELECT (SELECT count(*) FROM places) - count(*) FROM sizes"))
    shards = []
    for split in SPLITS:
        query = f"SELECT size FROM sizes WHERE split_ = {literal(split)} ORDER BY place_"
        bounds = cut_evenly(db.execute(query).fetchnumpy()["size"], shard_bytes - tarfile.RECORDSIZE)
        shards += [Shard(split, index, start, end) for index, (start, end) in enumerate(pairwise(bounds))]
    db.execute("DROP TABLE sizes")
    return shards


def _bytes(db: duckdb.DuckDBPyConnection, facts: str, raw: list[Path]) -> str:
    """SQL for the bytes that a sample takes in a tar at most: three headers, image, caption, JSON.

    The JSON is that of the raw shard, and what is new in it: null columns that it left out, group and signals.
    """
    before = column_types(db, f"read_parquet({files(raw[:1])})")
    after = {name: kind for name, kind in column_types(db, f"({facts})").items() if name not in before}
    texts = [name for name, kind in after.items() if kind == "VARCHAR"]
    new = "".join(f" + coalesce(strlen(CAST(to_json({quoted(name)}) AS VARCHAR)), 4)" for name in texts)
    known = sum(len(name.encode()) + len('"": null, ') for name in (*before, *after)) + WIDEST_NUMBER * len(after)
    members = ("image_size", "caption_size", f"json_size + {known}{new}")
    blocks = " + ".join(f"1 + ceil(({size}) / {tarfile.BLOCKSIZE}.0)" for size in members)
    return f"{tarfile.BLOCKSIZE} * ({blocks})"


def cut_evenly(sizes: np.ndarray, most: int) -> list[int]:
    """Bounds of runs of near-equal sums, none over `most` but of a single item.

    Args:
        sizes: int64, N positive numbers.
        most: of a run's sum.

    Returns:
        The first item of each run, and N at the end; `[0]` of nothing.
    """
    if len(sizes) and most <= sizes.min():  # each alone; even shares would be many times as many
        return list(range(len(sizes) + 1))
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    middles = ends - sizes / 2
    number = max(1, -(-total // max(most, 1)))
    while total:
        inner = np.searchsorted(middles, np.arange(1, number) * (total / number))
        bounds = np.unique([0, *inner, len(sizes)])
        sums = np.diff(ends[bounds[1:] - 1], prepend=0)
        if ((sums <= most) | (np.diff(bounds) == 1)).all():
            return [int(bound) for bound in bounds]
        # Twice as many are always enough: of items whose middles lie within w, the sum is at most 2 w.
        number += 1 + number // 50
    return [0]


def _finished(stem: Path, made: str) -> bool:
    return stem.with_suffix(".tar").exists() and made_from(stem.with_suffix(".parquet")) == made


def _remove_stale(folder: Path, shards: list[Shard]) -> None:
    names = {shard.name for shard in shards}
    for split in SPLITS:
        for path in folder.glob(f"{split}-[0-9]*"):
            if path.suffix in (".parquet", ".tar") and path.stem not in names:
                path.unlink()


def _write_all(
    db: duckdb.DuckDBPyConnection,
    out: Path,
    shards: list[Shard],
    samples: dict[str, int],
    raw: list[Path],
    made: str,
) -> None:
    """Deal the samples into buckets by their place in the order, then write shard by shard, bucket by bucket."""
    total = sum(samples.values())
    number = min(MOST_BUCKETS, -(-total // DEALT))
    reader = MemberReader([path.with_suffix(".tar") for path in raw])
    with Buckets(out / DEALT_IN, number) as buckets, progress("pack", len(shards)) as advance:
        ordered = _Ordered(buckets, -(-total // number), samples)
        ordered.deal(db, out, raw)
        try:
            for shard in shards:
                _write(out / "shards" / shard.name, ordered.table(shard), reader, made)
                advance(1, samples=shard.end - shard.start)
        finally:
            reader.close()


@dataclass(slots=True)
class _Ordered:
    """All facts of the samples in the order of the shards, split after split, `each` of them in a bucket on disk."""

    buckets: Buckets
    each: int
    samples: dict[str, int]
    held: dict[int, pa.Table] = field(default_factory=dict)

    def deal(self, db: duckdb.DuckDBPyConnection, out: Path, raw: list[Path]) -> None:
        tar = {path: number for number, path in enumerate(raw)}
        first = " ".join(f"WHEN {literal(split)} THEN {self._first(split)}" for split in SPLITS)
        queries = [
            f"""SELECT * REPLACE (CASE split_ {first} END + place_ AS place_)
            FROM ({_facts(out, {path: tar[path] for path in part})}) WHERE image_offset IS NOT NULL"""
            for part in _few(raw)
        ]
        dealt = self.buckets.deal(db, "samples", queries, f"CAST(place_ // {self.each} AS INTEGER)")
        _check_none_lacks(out, sum(self.samples.values()) - dealt)

    def table(self, shard: Shard) -> pa.Table:
        """The rows of a shard; the buckets that it does not touch are let go."""
        import pyarrow as pa

        start, end = self._first(shard.split) + shard.start, self._first(shard.split) + shard.end
        touched = range(start // self.each, (end - 1) // self.each + 1)
        self.held = {number: self.held[number] if number in self.held else self._sorted(number) for number in touched}
        slices = []
        for number, table in self.held.items():
            low, high = (min(max(place - number * self.each, 0), table.num_rows) for place in (start, end))
            slices.append(table.slice(low, high - low))
        return pa.concat_tables(slices)

    def _sorted(self, number: int) -> pa.Table:
        table = self.buckets.read("samples", number)
        assert table is not None, f"bucket {number} of {self.buckets.num_buckets} is empty"
        return table.sort_by("place_")

    def _first(self, split: str) -> int:
        """The place of a split's first sample in the order of all."""
        return sum(self.samples[before] for before in SPLITS[: SPLITS.index(split)])


def _place(db: duckdb.DuckDBPyConnection, ledger: Path, seed: int) -> None:
    """Table `places`: key, group and split of each kept row, and its place in the split's shuffled order."""
    db.execute(f"""
        CREATE TABLE IF NOT EXISTS places AS
        SELECT key, duplicate_group, split AS split_,
            row_number() OVER (PARTITION BY split ORDER BY {seeded(seed, "order")}, key) - 1 AS place_
        FROM read_parquet({files([ledger])}) WHERE kept""")


def _few(raw: list[Path]) -> Iterator[list[Path]]:
    """A few raw shards at a time: a join holds their rows, not all of `places`."""
    import pyarrow.parquet as pq

    for part in parts(raw):
        some: list[Path] = []
        num_rows = 0
        for path in part:
            more = pq.read_metadata(path).num_rows
            if some and num_rows + more > JOINED_AT_ONCE:
                yield some
                some, num_rows = [], 0
            some.append(path)
            num_rows += more
        yield some


def _check_none_lacks(out: Path, lacking: int) -> None:
    if lacking:
        raise InputError(f"{out / 'raw'}: lacks the images of {lacking} kept rows; run `curate build` again")


def _facts(out: Path, tar: dict[Path, int]) -> str:
    """SQL for the kept rows of some raw shards, with the number of the tar each lies in."""
    numbers = ", ".join(f"({literal(str(path.resolve()))}, {number})" for path, number in tar.items())
    facts = f"""(SELECT * EXCLUDE (filename) FROM read_parquet({files(list(tar))}, filename = true)
        JOIN (VALUES {numbers}) numbered(filename, tar_) USING (filename))"""
    facts = beside(facts, out, [path.stem for path in tar], groups_there(out))
    return f"SELECT * FROM {facts} JOIN places USING (key)"


def _write(stem: Path, table: pa.Table, reader: MemberReader, made: str) -> None:
    stem.with_suffix(".parquet").unlink(missing_ok=True)  # an old one must not stand beside the new tar
    ours = (*OFFSET_COLUMNS, "tar_", "split_", "place_")
    facts = table.drop_columns(list(ours))
    with ShardWriter(stem, facts.schema, made_from=made) as writer:
        for row, place in zip(facts.to_pylist(), table.select(list(ours)).to_pylist(), strict=True):
            image = reader.read(place["tar_"], place["image_offset"], place["image_size"])
            writer.add(row, image, place["image_ext"])
