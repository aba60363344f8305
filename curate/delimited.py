"""Lists as CSV and TSV: their header is read here and given to DuckDB, and the row that does not fit it is found here.

DuckDB's own detection takes for the header whichever line makes most rows after it fit, and passes over all before it
without a word. Here the header is the first line that is not blank, and a row with more or fewer fields is an error.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from curate.database import files, literal
from curate.errors import InputError

LARGEST_TEXT_BYTES = 8 << 20
PACKED = {".gz": "gzip", ".zst": "zstd"}
_UNPACKED = 6  # times the size of a packed file, about
_BLOCK_BYTES = 1 << 20


class _Form(NamedTuple):
    """What DuckDB must be told of a file: delimiter, columns, blank lines above them, and whether line ends differ."""

    delimiter: str
    names: tuple[str, ...]
    blank: int
    mixed: bool


class _Row(NamedTuple):
    line: int
    fields: list[str]
    end: str


class _RowError(Exception):
    """A row that does not fit, in words that begin with its line."""


def table(name: str, paths: Sequence[Path], delimiter: str) -> str:
    """The SQL that reads the files, in their order; columns that one has and another has not are united by name.

    Raises:
        InputError: there is no header, or a file of mixed line ends has a row that does not fit.
    """
    tables = []
    for form, run in groupby(paths, lambda path: _form(_called(name, path, paths), path, delimiter)):
        if form.names:
            tables.append(_read_csv(form, list(run)))
    if not tables:
        raise InputError(f"{name}: is empty; expected a header with the names of the columns, such as url,caption")
    return tables[0] if len(tables) == 1 else f"(FROM {' UNION ALL BY NAME FROM '.join(tables)})"


def fault(name: str, paths: Sequence[Path], delimiter: str) -> str | None:
    """The first row that does not fit: the file, the line and what is wrong; None, if none is seen."""
    for path in paths:
        if found := _fault(path, delimiter):
            return f"{_called(name, path, paths)}: {found}"
    return None


def _called(name: str, path: Path, paths: Sequence[Path]) -> str:
    """What the user calls a file of a list: the one that is read may be a copy."""
    return name if len(paths) == 1 else str(path)


def _fault(path: Path, delimiter: str) -> str | None:
    try:
        for _ in _rows(path, _between(path, delimiter)):
            pass
    except _RowError as found:
        return str(found)
    except (OSError, ValueError):  # a broken .gz, which DuckDB tells
        pass
    return None


def _read_csv(form: _Form, paths: Sequence[Path]) -> str:
    columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in form.names)
    dialect = f"""delim = {literal(form.delimiter)}, quote = '"', escape = '"', comment = ''"""
    # Strictly, DuckDB takes no mixed line ends; else it drops what follows a closed quote, which _form looks for.
    loose = ", strict_mode = false, parallel = false" if form.mixed else ""
    return (
        f"read_csv({files(paths)}, auto_detect = false, header = true, skip = {form.blank}, "
        f"columns = {{{columns}}}, {dialect}, max_line_size = {LARGEST_TEXT_BYTES}{loose})"
    )


def _form(name: str, path: Path, delimiter: str) -> _Form:
    try:
        delimiter = _between(path, delimiter)
        with _text(path) as text:
            lines = _Lines(text)
            blank, header = _header(csv.reader(lines, delimiter=delimiter, skipinitialspace=True), lines)
        return _Form(delimiter, tuple(_names(header)), blank, _seems_mixed(path) and _is_mixed(path, delimiter))
    except _RowError as found:
        raise InputError(f"{name}: {found}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{name}: cannot be read: {str(error).splitlines()[0]}") from error


def _between(path: Path, delimiter: str) -> str:
    """The usual delimiter, or a tab where the header has tabs and not one of that: open_clip's .csv are such."""
    with _text(path) as text:
        header = next((line for line in text if line.strip()), "")
    return "\t" if "\t" in header and delimiter not in header else delimiter


def _header(rows: Iterator[list[str]], lines: _Lines) -> tuple[int, list[str]]:
    """How many blank lines there are above it, and its fields; none, in a file without any."""
    ends: set[str] = set()
    for blank, fields in enumerate(rows):
        if fields:
            if not lines.is_utf8:
                raise _RowError(f"line {blank + 1} is not UTF-8")
            if len(ends) > 1:  # DuckDB would count them otherwise, and pass over rows
                raise _RowError(f"the blank lines above line {blank + 1} do not all end alike; remove them")
            return blank, fields
        ends.add(lines.end)
    return 0, []


def _names(header: Sequence[str]) -> Iterator[str]:
    """The columns' names as DuckDB itself would give them: trimmed, none of them empty or twice there."""
    taken: set[str] = set()
    for number, field in enumerate(header):
        name = ours = field.strip() or f"column{number}"
        repeats = 0
        while ours.lower() in taken:
            repeats += 1
            ours = f"{name}_{repeats}"
        taken.add(ours.lower())
        yield ours


def _seems_mixed(path: Path) -> bool:
    r"""Whether there are both \r and \n that stand alone or together; they may do so inside of quoted texts."""
    together = after = before = 0
    last = b""
    with opened(path) as file:
        while block := file.read(_BLOCK_BYTES):
            before += block.count(b"\r")
            after += block.count(b"\n")
            together += (block.count(b"\r\n") if before else 0) + (last == b"\r" and block[:1] == b"\n")
            last = block[-1:]
    return bool(before and after) and not before == after == together


def _is_mixed(path: Path, delimiter: str) -> bool:
    """Whether rows, or blank lines, end in different ways.

    Raises:
        _RowError: they do, and one does not fit.
    """
    ends: set[str] = set()
    try:
        for row in _rows(path, delimiter):
            ends.add(row.end)
    except _RowError:
        if len(ends) < 2:
            return False  # DuckDB reads it strictly, and finds that too
        raise
    return len(ends - {""}) > 1


def _rows(path: Path, delimiter: str) -> Iterator[_Row]:
    """The rows, each with the line it begins at: the header first, and blank lines wherever they are, without fields.

    Raises:
        _RowError: one does not fit.
    """
    csv.field_size_limit(LARGEST_TEXT_BYTES)
    header: _Row | None = None
    with _text(path) as text:
        lines = _Lines(text)
        rows = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
        while True:
            line = rows.line_num + 1
            try:
                fields = next(rows, None)
            except csv.Error as error:
                raise _RowError(
                    f'line {line}: a " that opens a text is not closed, or one in it is not "" ({error})'
                ) from error
            if fields is None:
                return
            if not lines.is_utf8:
                raise _RowError(f"line {rows.line_num} is not UTF-8")
            if fields:
                header = header or _Row(line, fields, lines.end)
                _check(line, fields, header, delimiter)
            yield _Row(line, fields, lines.end)


def _check(line: int, fields: Sequence[str], header: _Row, delimiter: str) -> None:
    count, expected = len(fields), len(header.fields)
    if count == expected or (count == expected + 1 and not fields[-1]):
        return
    mark = "tab" if delimiter == "\t" else "comma"
    if fields[0] == header.fields[0]:
        hint = "lists of other columns need files of their own, which one folder may hold"
    elif count > expected:
        hint = f'put "quotes" around a text that holds a {mark}'
    else:
        hint = f"an empty field needs its {mark} too"
    said = "1 field" if count == 1 else f"{count} fields"
    raise _RowError(f"line {line} has {said}, the header (line {header.line}) {expected}; {hint}")


class _Lines:
    """The lines of a text with what ends them, and what is to be known of the last one."""

    def __init__(self, text: io.TextIOBase) -> None:
        self._text, self._last, self.is_utf8 = text, "", True

    def __iter__(self) -> Iterator[str]:
        for line in self._text:
            self._last, self.is_utf8 = line, self.is_utf8 and _is_utf8(line)
            yield line

    @property
    def end(self) -> str:
        return self._last[len(self._last.rstrip("\r\n")) :]


def _is_utf8(text: str) -> bool:
    """Whether a text that was decoded with surrogates for other bytes has none of them."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _text(path: Path) -> Iterator[io.TextIOWrapper]:
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        yield text


def unpacked_size(path: Path) -> int:
    """Bytes of a text file; of a packed one a guess, which is the same each time."""
    return path.stat().st_size * (_UNPACKED if path.suffix.lower() in PACKED else 1)


def opened(path: Path) -> io.BufferedReader:
    """The bytes of a text file, unpacked if its name says that they are packed."""
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression=PACKED.get(path.suffix.lower())), _BLOCK_BYTES)
