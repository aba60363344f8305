"""What the commands that ask take beside the folder: one frozen dataclass each. No heavy import here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from curate.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Limits of the database that answers."""

    memory_limit: str = "2GB"
    """Memory the database may use before it spills to disk."""
    threads: int = 0
    """Threads of the database; 0 means one a CPU core."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ConfigError(f"threads: expected at least 0, got {self.threads}")


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(EngineOptions):
    """Where the row is looked for."""

    out: Path = Path("dataset")
    """Folder of the dataset."""


@dataclass(frozen=True, kw_only=True)
class DiffOptions(EngineOptions):
    """What of the difference is shown and written."""

    examples: int = 3
    """Rows shown of each kind."""
    out: Path | None = None
    """A Parquet file to write every differing row to, with both decisions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples < 0:
            raise ConfigError(f"examples: expected at least 0, got {self.examples}")


@dataclass(frozen=True, kw_only=True)
class SqlOptions(EngineOptions):
    """What is asked, and how the answer is printed."""

    out: Path = Path("dataset")
    """Folder of the dataset."""
    format: Literal["table", "csv", "json", "parquet"] = "table"
    """table, csv, json (one array, a row a line), or parquet (to a pipe or file)."""
    limit: int | None = None
    """Most rows that are printed; of a table 100, of the others all, when not given."""
    time_limit_s: float = 600.0
    """Longest time for the answer; 0 sets no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 0:
            raise ConfigError(f"limit: expected at least 0, got {self.limit}")
        if self.time_limit_s < 0:
            raise ConfigError(f"time_limit_s: expected at least 0, got {self.time_limit_s}")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(EngineOptions):
    """How much is told of a folder that is not sound."""

    most: int = 20
    """Faults named of one kind in one file; the others are counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < 1:
            raise ConfigError(f"most: expected at least 1, got {self.most}")
