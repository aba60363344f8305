"""Measure: raw shards → `signals/`, what a CLIP says of every image and caption, stored once for every filter to use.

Signals that need only the caption are computed by `plan`, those that need only pixels by `fetch`, while it holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from curate.config import ClipConfig, MeasureConfig
from curate.progress import progress
from curate.shards import digest, fingerprint, made_from, shards_of, sweep, write_parquet

VERSION = 2  # raise it when the same inputs would give other signals


@dataclass(frozen=True)
class MeasureResult:
    """Shards measured now, shards whose signals were there already, and images measured now."""

    made: int = 0
    reused: int = 0
    images: int = 0


def run(out: Path, config: MeasureConfig) -> MeasureResult:
    """Write `signals/N.parquet` for each raw shard whose signals are not those of today's CLIP and images.

    Raises:
        ModelError: the CLIP cannot be loaded.
    """
    folder = out / "signals"
    raw = shards_of(out / "raw") if config.clip else []
    if folder.is_dir():
        sweep(folder)
        _remove_stale(folder, {stem.name for stem in raw})
    if config.clip is None:
        return MeasureResult()
    wanted = {stem: _fingerprint(stem, config.clip) for stem in raw}
    due = [stem for stem in raw if made_from(folder / f"{stem.name}.parquet") != wanted[stem]]
    if not due:
        return MeasureResult(reused=len(raw))
    return _measure(due, folder, config.clip, wanted, reused=len(raw) - len(due))


def _measure(due: list[Path], folder: Path, config: ClipConfig, wanted: dict[Path, str], reused: int) -> MeasureResult:
    # torch and open_clip take seconds to import: only when there is something to measure.
    from curate.clip import load_clip
    from curate.measure.clip import count_images, embed_shard, fetched_rows

    clip = load_clip(config.name, config.pretrained, device=config.device)
    images = sum(count_images(stem) for stem in due)
    with progress("measure", images) as advance:
        for stem in due:
            signals = embed_shard(clip, stem.with_suffix(".tar"), fetched_rows(stem), config.batch_size, advance)
            write_parquet(signals, folder / f"{stem.name}.parquet", made_from=wanted[stem])
    return MeasureResult(made=len(due), reused=reused, images=images)


def _fingerprint(stem: Path, config: ClipConfig) -> str:
    from curate.clip import weights_fingerprint

    weights = weights_fingerprint(config.name, config.pretrained)
    return fingerprint("measure", VERSION, digest(stem.with_suffix(".parquet")), weights)


def _remove_stale(folder: Path, names: set[str]) -> None:
    for path in folder.glob("*.parquet"):
        if path.stem not in names:
            path.unlink()
