"""The ledger and the raw shards → the dataset: shuffled, split, in shards of near-equal size.

The order is a seeded hash of the keys, so a sample's place depends on nothing but the list and the seed. Images are
copied byte for byte, by their offsets in the raw tars, one shard at a time. A shard whose fingerprint is right is
left alone; so a killed run continues with the next one, and the bytes come out the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb

from curate.config import PackConfig, SelectConfig
from curate.database import SPILL, arrow_table, connect, create_in_parts, files, literal, parts, scalar, seeded
from curate.errors import InputError
from curate.progress import progress
from curate.shards import (
    OFFSET_COLUMNS,
    SPLITS,
    MemberReader,
    ShardWriter,
    digest,
    fingerprint,
    made_from,
    shard_name,
    sweep,
)
from curate.signals import beside, files_of, groups_there

FORMAT = 1


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


def run(out: Path, config: PackConfig, seed: int) -> PackResult:
    """Write `out/shards/SPLIT-NNNNN.{tar,parquet}` for what the ledger keeps; remove shards that are no part of it.

    Args:
        out: the dataset's folder, with ledger and raw shards.
        config: samples a shard.
        seed: of the order.

    Raises:
        InputError: there is no ledger, or the raw shards lack what it names.
    """
    folder = out / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    samples = _kept(out / "ledger.parquet")
    shards = [shard for split in SPLITS for shard in _cut(split, samples[split], config.shard_size)]
    raw = sorted((out / "raw").glob("[0-9]*.parquet"))
    signals = [path for group in groups_there(out) for path in files_of(out, group)]
    # The ledger says who is kept, the raw shards' own fingerprints which bytes that means.
    inputs = [digest(out / "ledger.parquet"), *((made_from(path), digest(path)) for path in (*raw, *signals))]
    made = fingerprint("pack", FORMAT, inputs, asdict(config), seed)
    _remove_stale(folder, shards)
    missing = [shard for shard in shards if not _finished(folder / shard.name, made)]
    if missing:
        _write_all(out, missing, raw, seed, made)
    return PackResult(samples, len(shards), len(missing))


def _kept(ledger: Path) -> dict[str, int]:
    """Samples of each split."""
    import pyarrow.parquet as pq

    if not ledger.exists():
        raise InputError(f"{ledger}: not there; run `curate select` first")
    counts = {
        count["values"]: count["counts"]
        for count in pq.read_table(ledger, columns=["split"])["split"].value_counts().to_pylist()
    }
    return {split: counts.get(split, 0) for split in SPLITS}


def _cut(split: str, num_samples: int, shard_size: int) -> list[Shard]:
    """Shards of near-equal size, none over `shard_size`."""
    num_shards = -(-num_samples // shard_size)
    return [
        Shard(split, index, num_samples * index // num_shards, num_samples * (index + 1) // num_shards)
        for index in range(num_shards)
    ]


def _finished(stem: Path, made: str) -> bool:
    return stem.with_suffix(".tar").exists() and made_from(stem.with_suffix(".parquet")) == made


def _remove_stale(folder: Path, shards: list[Shard]) -> None:
    names = {shard.name for shard in shards}
    for split in SPLITS:
        for path in folder.glob(f"{split}-[0-9]*"):
            if path.suffix in (".parquet", ".tar") and path.stem not in names:
                path.unlink()


def _write_all(out: Path, shards: list[Shard], raw: list[Path], seed: int, made: str) -> None:
    engine = SelectConfig()
    allowed = [out / "ledger.parquet", out / "raw", out / "signals"]
    with (
        connect(engine.memory_limit, engine.threads, out / SPILL, allowed) as db,
        progress("pack", len(shards)) as advance,
    ):
        _load(db, out, raw, seed)
        reader = MemberReader([path.with_suffix(".tar") for path in raw])
        try:
            for shard in shards:
                _write(db, out / "shards" / shard.name, shard, reader, made)
                advance(1, samples=shard.end - shard.start)
        finally:
            reader.close()


def _load(db: duckdb.DuckDBPyConnection, out: Path, raw: list[Path], seed: int) -> None:
    """Table `samples`: all facts of each kept row, in the order of the shards, with its `tar_` and `place_`."""
    db.execute(f"""
        CREATE TABLE places AS
        SELECT key, duplicate_group, split AS split_,
            row_number() OVER (PARTITION BY split ORDER BY {seeded(seed, "order")}, key) - 1 AS place_
        FROM read_parquet({files([out / "ledger.parquet"])}) WHERE kept""")
    tar = {path: number for number, path in enumerate(raw)}
    queries = (_facts(out, {path: tar[path] for path in part}) for part in parts(raw))
    create_in_parts(db, "facts", queries)
    db.execute("CREATE TABLE samples AS SELECT * FROM facts WHERE image_offset IS NOT NULL ORDER BY split_, place_")
    db.execute("DROP TABLE facts")
    if lacking := scalar(db, "SELECT (SELECT count(*) FROM places) - count(*) FROM samples"):
        raise InputError(f"{out / 'raw'}: lacks the images of {lacking} kept rows; run `curate build` again")


def _facts(out: Path, tar: dict[Path, int]) -> str:
    """SQL for the kept rows of some raw shards, with the number of the tar each lies in."""
    numbers = ", ".join(f"({literal(str(path.resolve()))}, {number})" for path, number in tar.items())
    facts = f"""(SELECT * EXCLUDE (filename) FROM read_parquet({files(list(tar))}, filename = true)
        JOIN (VALUES {numbers}) numbered(filename, tar_) USING (filename))"""
    facts = beside(facts, out, [path.stem for path in tar], groups_there(out))
    return f"SELECT * FROM {facts} JOIN places USING (key)"


def _write(db: duckdb.DuckDBPyConnection, stem: Path, shard: Shard, reader: MemberReader, made: str) -> None:
    stem.with_suffix(".parquet").unlink(missing_ok=True)  # an old one must not stand beside the new tar
    ours = (*OFFSET_COLUMNS, "tar_", "split_", "place_")
    table = arrow_table(
        db,
        f"""SELECT * FROM samples WHERE split_ = {literal(shard.split)}
        AND place_ >= {shard.start} AND place_ < {shard.end} ORDER BY place_""",
    )
    facts = table.drop_columns(list(ours))
    with ShardWriter(stem, facts.schema, made_from=made) as writer:
        for row, place in zip(facts.to_pylist(), table.select(list(ours)).to_pylist(), strict=True):
            image = reader.read(place["tar_"], place["image_offset"], place["image_size"])
            writer.add(row, image, place["image_ext"])
