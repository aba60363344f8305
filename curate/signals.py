"""The signals: what `measure` finds out about each fetched image and caption, a group of columns a folder.

    signals/GROUP/00000.parquet    key, and the group's columns, one row for each image in raw/00000.tar

Each group is made, and made anew, by itself. Whoever reads signals does it through this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.config import MeasureConfig
from curate.database import files, quoted
from curate.errors import ConfigError, did_you_mean

# Group → column → DuckDB type. A user's own signals are groups of their own.
GROUPS: dict[str, dict[str, str]] = {
    "text": {
        "language": "VARCHAR",
        "language_score": "FLOAT",
        "letter_share": "FLOAT",
        "digit_share": "FLOAT",
        "is_filename": "BOOLEAN",
        "is_boilerplate": "BOOLEAN",
    },
    "safety": {"nsfw": "FLOAT"},
    "clip": {"clip_score": "FLOAT"},
}
HOW_TO_GET = {
    "text": "set measure.text: true",
    "safety": "set measure.safety: true, after `pip install 'cliptailor[safety]'`",
    "clip": "set measure.clip.name and measure.clip.pretrained",
}
EMBEDDINGS = ("image_embedding", "text_embedding")
TYPES = ("VARCHAR", "BOOLEAN", "INTEGER", "BIGINT", "FLOAT", "DOUBLE")


@dataclass(frozen=True)
class OwnSignal:
    """A group of columns that a function of the user's gives.

    Attributes:
        name: of the group and its folder.
        function: where it is imported from, `package.module:function`.
        columns: name → DuckDB type, one of TYPES.
    """

    name: str
    function: str
    columns: dict[str, str]


def own_signals(config: MeasureConfig) -> list[OwnSignal]:
    """The user's own signals, read from `measure.signals` and checked.

    Raises:
        ConfigError: names the entry, and what is wrong with it.
    """
    found = [_own_signal(number, entry) for number, entry in enumerate(config.signals)]
    taken = {name: group for group, columns in GROUPS.items() for name in columns}
    for number, signal in enumerate(found):
        where = f"measure.signals[{number}] '{signal.name}'"
        if signal.name in GROUPS or signal.name in [other.name for other in found[:number]]:
            raise ConfigError(f"{where}: the name is taken; choose another")
        for column in signal.columns:
            if group := taken.get(column.lower()):
                raise ConfigError(f"{where}: column '{column}' is one of {group}'s; choose another name")
            taken[column.lower()] = signal.name
    return found


def _own_signal(number: int, entry: Mapping[str, Any]) -> OwnSignal:
    where = f"measure.signals[{number}]"
    keys = ("name", "function", "columns")
    if unknown := [key for key in entry if key not in keys]:
        raise ConfigError(f"{where}: no key '{unknown[0]}'.{did_you_mean(unknown[0], keys)}")
    name, function, columns = (entry.get(key) for key in keys)
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"{where}: needs a name of letters, digits and _, such as 'name: brightness'")
    where = f"{where} '{name}'"
    if not isinstance(function, str) or function.count(":") != 1:
        raise ConfigError(f"{where}: needs the function's place, such as 'function: my_signals:brightness'")
    if not isinstance(columns, Mapping) or not columns:
        raise ConfigError(f"{where}: needs the columns that it gives, such as 'columns: {{brightness: DOUBLE}}'")
    for column, kind in columns.items():
        if kind not in TYPES:
            raise ConfigError(f"{where}: column '{column}': type '{kind}' is none of {', '.join(TYPES)}")
    return OwnSignal(name, function, {str(column): str(kind) for column, kind in columns.items()})


def asked(config: MeasureConfig) -> dict[str, dict[str, str]]:
    """The groups that a configuration asks for: group → column → DuckDB type, in the order in which they are made."""
    wanted = {"text": config.text, "safety": config.safety, "clip": config.clip is not None}
    groups = {group: columns for group, columns in GROUPS.items() if wanted[group]}
    return groups | {signal.name: signal.columns for signal in own_signals(config)}


def columns_of(groups: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Column → DuckDB type, of all these groups."""
    return {name: kind for columns in groups.values() for name, kind in columns.items()}


def how_to_get(columns: Iterable[str], config: MeasureConfig) -> str | None:
    """What to set so that the first of these columns that nothing measures is there; None if all are measured."""
    measured = asked(config)
    for name in columns:
        for group, its in GROUPS.items():
            if name in its and group not in measured:
                return HOW_TO_GET[group]
    return None


def groups_there(out: Path) -> list[str]:
    """The groups that a dataset's folder has signals of, sorted."""
    return sorted(path.name for path in (out / "signals").glob("*") if path.is_dir() and files_of(out, path.name))


def files_of(out: Path, group: str) -> list[Path]:
    """The files of a group, one a raw shard, sorted."""
    return sorted((out / "signals" / group).glob("[0-9]*.parquet"))


def beside(source: str, out: Path, shards: Sequence[str], groups: Iterable[str]) -> str:
    """SQL: `source` with the signals of its rows beside it; of the embeddings, nothing.

    Args:
        source: SQL of a table with the column `key`.
        out: the dataset's folder.
        shards: names of the raw shards that the rows are of, such as `00000`; one that a group lacks has nulls there.
        groups: whose columns.
    """
    import pyarrow.parquet as pq

    for group in groups:
        there = [path for name in shards if (path := out / "signals" / group / f"{name}.parquet").exists()]
        if there:
            names = ", ".join(quoted(name) for name in pq.read_schema(there[0]).names if name not in EMBEDDINGS)
            signals = f"SELECT {names} FROM read_parquet({files(there)})"
            source = f"(SELECT * FROM {source} LEFT JOIN ({signals}) AS {quoted(group)} USING (key))"
    return source
