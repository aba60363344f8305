"""Answers as text: coloured tables on a terminal, plain aligned columns in a pipe, the same words in both.

Captions and URLs come from strangers: control characters and bidirectional overrides are shown as a mark, so that none
can move the cursor or turn a line around.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from curate.html import visible

PIPE_WIDTH = 20_000  # a row is one line, whatever its length
SHOWN_NUMBERS = 4
RIGHT = (int, float)


def cell(value: Any) -> str:
    """A value on one line: numbers short, vectors by their length and first numbers, nothing for null."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case bytes():
            return f"{len(value):,} bytes"
        case [float(), *_] if len(value) > SHOWN_NUMBERS:
            first = ", ".join(f"{number:.3g}" for number in value[:SHOWN_NUMBERS])
            return f"{len(value):,} numbers: {first} …"
    return visible(" ".join(str(value).split()))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "", *, grouped: bool = False) -> Group:
    """A table; columns of numbers stand to the right, with their thousands apart where `grouped`."""
    rows = list(rows)
    drawn = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, name in enumerate(columns):
        values = [row[place] for row in rows if row[place] is not None]
        numeric = bool(values) and all(isinstance(value, RIGHT) and not isinstance(value, bool) for value in values)
        drawn.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(f"{value:,}" if grouped and type(value) is int else cell(value)) for value in row))
    return _titled(title, drawn)


def facts(title: str, pairs: Iterable[tuple[str, Any]]) -> Group:
    """Names and values under a heading; null values are left out."""
    drawn = Table.grid(padding=(0, 2, 0, 0))
    drawn.add_column(style="dim", no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in pairs:
        if value is not None:
            drawn.add_row(Text(f"  {name}"), Text(cell(value)))
    return _titled(title, drawn)


def _titled(title: str, drawn: Table) -> Group:
    return Group(*([Text(visible(title), style="bold")] if title else []), drawn)


def rows(number: int) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} row{'' if number == 1 else 's'}"


def show(*answers: Group | str) -> None:
    """Print to stdout; where that is no terminal, without colour and as wide as it needs."""
    if sys.stdout.isatty():
        console = Console(highlight=False)
    else:
        console = Console(highlight=False, width=PIPE_WIDTH, file=io.StringIO(), no_color=True)
    for answer in answers:
        console.print(answer if isinstance(answer, Group) else Text(visible(answer)))
    if isinstance(console.file, io.StringIO):
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())
