"""Signals of the user's own: a function from a batch of images and captions to columns.

# my_signals.py, beside the configuration
def brightness(batch):                       # pyarrow.Table: key, caption, image (bytes), and fetch's columns
    return {"brightness": [mean(decode(image)) for image in batch["image"].to_pylist()]}

measure:
  signals:
    - {name: brightness, function: "my_signals:brightness", columns: {brightness: DOUBLE}}
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from curate.errors import ConfigError
from curate.files import file_sha256
from curate.signals import OwnSignal

ARROW = {
    "VARCHAR": pa.string(),
    "BOOLEAN": pa.bool_(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "FLOAT": pa.float32(),
    "DOUBLE": pa.float64(),
}
BATCH = 256
Function = Callable[[pa.Table], Mapping[str, Any]]


def load(signal: OwnSignal) -> Function:
    """The function; modules are looked for in the current folder too.

    Raises:
        ConfigError: it cannot be imported.
    """
    module, _, name = signal.function.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        function: Function = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of the user's can fail in any way
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{_where(signal)}: '{signal.function}' cannot be imported ({what})") from error
    if not callable(function):
        raise ConfigError(f"{_where(signal)}: '{signal.function}' is no function")
    return function


def identity(signal: OwnSignal) -> list[object]:
    """What the columns depend on beside the images: the source of the function's module, and the columns' types."""
    load(signal)
    source = getattr(sys.modules[signal.function.partition(":")[0]], "__file__", None)
    return [signal.function, signal.columns, file_sha256(Path(source)) if source else None]


def columns_of(signal: OwnSignal, function: Function, batch: pa.Table) -> pa.Table:
    """`key` and the signal's columns, for one batch.

    Raises:
        ConfigError: the function failed, or gave other columns, lengths or types than were declared.
    """
    try:
        given = function(batch)
    except Exception as error:  # of the user's
        raise ConfigError(f"{_where(signal)}: {signal.function} failed: {type(error).__name__}: {error}") from error
    if not isinstance(given, Mapping) or set(given) != set(signal.columns):
        got = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise ConfigError(f"{_where(signal)}: expected the columns {', '.join(signal.columns)}, got {got}")
    columns = {"key": batch["key"]}
    for name, kind in signal.columns.items():
        values = given[name]
        if len(values) != batch.num_rows:
            raise ConfigError(f"{_where(signal)}: column '{name}': {len(values)} values for {batch.num_rows} images")
        try:
            is_arrow = isinstance(values, pa.Array | pa.ChunkedArray)
            columns[name] = values.cast(ARROW[kind]) if is_arrow else pa.array(values, ARROW[kind])
        except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise ConfigError(f"{_where(signal)}: column '{name}' is no {kind}: {said}") from error
    return pa.table(columns)


def _where(signal: OwnSignal) -> str:
    return f"measure.signals '{signal.name}'"
