"""The work that is handed to a worker: one shard to make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from curate.config import FetchConfig


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to make.

    Attributes:
        plan: the candidates.
        stem: path of the raw shard without extension.
        made_from: its fingerprint.
        config: how.
        known: stem of a raw shard made under the same settings, whose rows may be kept.
        root: folder below which the images of a local source lie.
        retry: whether its rows that failed for a reason that may pass are asked for again.
    """

    plan: Path
    stem: Path
    made_from: str
    config: FetchConfig
    known: Path | None = None
    root: Path | None = None
    retry: bool = False
