"""Text lists with a few broken lines: a copy in which each of them is as much of a row as can be read.

One broken line among a million costs its row. Many of them are no accident, but another encoding or another form.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from curate.delimited import LARGEST_TEXT_BYTES, PACKED, opened, unpacked_size
from curate.errors import InputError
from curate.files import atomic, fingerprint
from curate.lists import ListFiles
from curate.progress import progress

logger = logging.getLogger("cliptailor")

# Of a file's lines so many, or so large a share, are broken by accident.
_FEW, _SMALL_SHARE = 10, 0.01
_BLOCK_BYTES = 1 << 20
_TOLD_EVERY = 50_000
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class _Broken:
    """How many lines of a file are broken, of how many, and the number of the first."""

    count: int
    lines: int
    first: int

    @property
    def is_accident(self) -> bool:
        return self.count <= max(_FEW, _SMALL_SHARE * self.lines) and 2 * self.count < self.lines

    def __str__(self) -> str:
        return f"{self.count:,} of {self.lines:,} lines, the first is line {self.first}"


class _NoAccidentError(Exception):
    """More lines are broken than by accident."""


def in_utf8(source: ListFiles, cache: Path) -> ListFiles:
    """The list in UTF-8: a copy in the place of each file that has other bytes, in which U+FFFD stands for them.

    Args:
        source: a list as CSV, TSV or plain lines.
        cache: folder of the copies.

    Raises:
        InputError: a file has many such lines, or its header is one.
    """
    return replace(source, paths=tuple(_in_utf8(path, source.kind, cache) for path in source.paths))


def in_json_lines(source: ListFiles, cache: Path) -> ListFiles:
    """The list with a copy in the place of each file that has a few lines which are no JSON object.

    Such a line becomes an object without a URL. Bytes that are not UTF-8, and halves of emojis, become U+FFFD. A file
    with many such lines, as one that is not of lines, is left as it is.
    """
    return replace(source, paths=tuple(_in_json_lines(path, cache) for path in source.paths))


def _in_utf8(path: Path, kind: str, cache: Path) -> Path:
    if _is_utf8(path):
        return path

    def check(broken: _Broken) -> None:
        if not broken.is_accident or (broken.first == 1 and kind != "txt"):
            raise InputError(
                f"{path}: line {broken.first} is not UTF-8 ({broken.count:,} of {broken.lines:,} lines are not); "
                "convert the file, such as by iconv -f latin1 -t utf-8"
            )
        logger.warning("list    %s: not UTF-8: %s; U+FFFD stands for what cannot be read", path, broken)

    return _copy(path, cache, _utf8_line, check)


def _in_json_lines(path: Path, cache: Path) -> Path:
    def check(broken: _Broken) -> None:
        if not broken.count or not broken.is_accident:
            raise _NoAccidentError
        logger.warning("list    %s: broken JSON: %s; a line that is no object is a row without a URL", path, broken)

    try:
        return _copy(path, cache, _json_line, check)
    except (_NoAccidentError, InputError):
        return path


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with opened(path) as file:
            while block := file.read(_BLOCK_BYTES):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    except OSError:  # a broken .gz, which its reader tells
        return True
    return True


def _utf8_line(line: bytes) -> bytes:
    return line.decode("utf-8", "replace").encode()


def _json_line(line: bytes) -> bytes:
    """The line, if DuckDB can read it; else as much of it as can be read."""
    text = line.decode("utf-8", "replace")
    try:
        row = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return b"{}\n"
    if not isinstance(row, dict):
        return b"{}\n"
    whole = json.dumps(row, ensure_ascii=False)
    # Python reads half of an emoji, DuckDB does not.
    return _HALF.sub("\ufffd", whole).encode() + b"\n" if _HALF.search(whole) else text.encode()


def _copy(path: Path, cache: Path, mended: Callable[[bytes], bytes], check: Callable[[_Broken], None]) -> Path:
    """A copy with each line mended; an error of `check`, which is told what was broken, leaves none.

    Raises:
        InputError: a packed file is broken.
    """
    seen = path.stat()
    name = path.stem if path.suffix.lower() in PACKED else path.name
    copy = cache / f"{fingerprint(str(path.resolve()), seen.st_size, seen.st_mtime_ns)}-{name}"
    if copy.exists():
        return copy
    try:
        _write(path, copy, mended, check)
    except (OSError, EOFError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    return copy


def _write(path: Path, copy: Path, mended: Callable[[bytes], bytes], check: Callable[[_Broken], None]) -> None:
    count = lines = first = told = 0
    with (
        opened(path) as file,
        atomic(copy) as temporary,
        temporary.open("wb") as sink,
        progress(f"mend {path.name}", unpacked_size(path)) as advance,
    ):
        for line in iter(lambda: file.readline(LARGEST_TEXT_BYTES), b""):
            lines += 1
            plain = line if lines > 1 else line.removeprefix(codecs.BOM_UTF8)
            whole = mended(plain)
            if whole != plain:
                count, first = count + 1, first or lines
            sink.write(whole)
            if lines % _TOLD_EVERY == 0:
                advance(sink.tell() - told)
                told = sink.tell()
        check(_Broken(count, lines, first))
