"""The user's list, in any of the usual forms, as something DuckDB can read: which files, which reader, which columns.

parquet · csv · tsv · txt (a URL a line) · json · jsonl, ndjson         text forms also as .gz and .zst
one file · a folder of them · a glob
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from curate.config import PlanConfig
from curate.database import column_types, files, literal, quoted
from curate.delimited import LARGEST_TEXT_BYTES, PACKED, fault, table
from curate.errors import ConfigError, InputError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
}
URL_NAMES = ("url", "image_url", "img_url", "imageurl", "image_link", "link", "uri", "contenturl", "image", "src")
CAPTION_NAMES = ("caption", "text", "alt", "alt_text", "alttext", "top_caption", "title", "description", "name")

# Kept as they are; lists and structs become JSON text, all else (times, UUIDs, huge integers) text.
_PLAIN_TYPES = frozenset(
    ("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
) | frozenset(("FLOAT", "DOUBLE", "VARCHAR", "DATE", "TIMESTAMP", "BLOB"))
_NESTED = ("STRUCT", "MAP", "UNION")
# DuckDB guesses these from text in JSON and spells them its own way: "2020-1-5" would become "2020-01-05". It guesses
# JSON where a column holds texts and something else, and then each text would keep its quotes and backslashes.
_GUESSED_FROM_TEXT = frozenset(("DATE", "TIME", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE", "UUID", "JSON"))
DELIMITERS = {"csv": ",", "tsv": "\t"}
# To unite columns by name DuckDB holds all files open, and a process may hold 1,024. So many parts are of one make.
_MOST_UNITED = 400


@dataclass(frozen=True, slots=True)
class ListFiles:
    """The files of a list, sorted by path, all of one kind.

    Attributes:
        name: what the user called it.
        kind: of KINDS.
        paths: of the files here.
        root: folder in which the images lie already, if its rows have places in files instead of URLs to ask for.
    """

    name: str
    kind: str
    paths: tuple[Path, ...]
    root: Path | None = None


@dataclass(frozen=True, slots=True)
class ListColumns:
    """How the columns of a list become ours.

    Attributes:
        url: SQL of the URL as text.
        caption: SQL of the caption as text.
        carried: name in our files → SQL, for every other column, in the list's order.
        types: name in our files → DuckDB type, of the carried columns.
    """

    url: str
    caption: str
    carried: dict[str, str]
    types: dict[str, str]


def find_list(urls: str, out: Path | None = None) -> ListFiles:
    """The files that `urls` means: a file, a folder of list files, or a glob.

    Args:
        urls: what the user called it.
        out: the dataset's folder, if what lies below it is to be passed over where `urls` reaches into it.

    Raises:
        InputError: nothing there, a form we do not know, or forms mixed in one folder.
    """
    path = Path(urls).expanduser()
    if path.suffix == ".tar" and not path.is_dir():  # also webdataset's {00000..00009}.tar
        raise InputError(f"{urls}: tars are read as a whole folder; give {path.parent}/")
    if path.is_dir():
        found = [file for file in not_below(out, path, path.rglob("*")) if file.is_file() and kind_of(file)]
    elif path.exists():
        found = [path]
    else:
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        plain = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [file for file in not_below(out, plain, map(Path, names)) if file.is_file()]
    return list_of(urls, sorted(found))


def not_below(out: Path | None, folder: Path, paths: Iterable[Path]) -> Iterator[Path]:
    """The paths of those below `folder` that are not below the dataset's folder too; all, if it is not below `folder`.

    Only the two folders are resolved: there may be millions of paths.
    """
    if out is None or out.resolve() == folder.resolve() or not out.resolve().is_relative_to(folder.resolve()):
        return iter(paths)
    ours = folder / out.resolve().relative_to(folder.resolve())
    return (path for path in paths if not path.is_relative_to(ours))


def list_of(urls: str, found: Sequence[Path]) -> ListFiles:
    """The list that these files are.

    Args:
        urls: what the user called it.
        found: in the order of their rows.

    Raises:
        InputError: there are none, or they are of a form that we do not know, or of several.
    """
    kinds = sorted({kind_of(file) for file in found})
    if not found:
        raise InputError(
            f"{urls}: no list there; expected a file, a folder or a glob of {', '.join(sorted(KINDS))} files"
        )
    if kinds == [""] or len(kinds) > 1:
        forms = ", ".join(kind or "unknown" for kind in kinds)
        raise InputError(
            f"{urls}: {forms} files; expected files of one form, with the ending {', '.join(sorted(KINDS))}"
        )
    return ListFiles(urls, kinds[0], tuple(found))


def kind_of(file: Path) -> str:
    """Which of KINDS a file is by its name; nothing, if it is no list."""
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in PACKED]
    kind = KINDS.get(suffixes[-1], "") if suffixes else ""
    return "" if kind == "parquet" and file.suffix.lower() in PACKED else kind


def reader(db: duckdb.DuckDBPyConnection, source: ListFiles) -> str:
    """The SQL table function that reads the list; rows come in the order of the sorted files.

    Raises:
        InputError: a file is not what its ending says.
    """
    paths = files(source.paths)
    by_name = f"union_by_name = {str(len(source.paths) <= _MOST_UNITED).lower()}"
    if source.kind == "parquet":
        is_text = str(not _marks_texts(source)).lower()
        return f"read_parquet({paths}, {by_name}, binary_as_string = {is_text})"
    if source.kind == "txt":
        # A separator that no URL holds: a line is a URL, whatever else is in it.
        dialect = r"delim = '\x01', quote = '', escape = '', comment = '', strict_mode = false"
        return f"read_csv({paths}, header = false, auto_detect = false, columns = {{'url': 'VARCHAR'}}, {dialect})"
    if source.kind in DELIMITERS:
        return table(source.name, source.paths, DELIMITERS[source.kind])
    options = f"{by_name}, sample_size = -1, maximum_object_size = {LARGEST_TEXT_BYTES}"
    with readable_list(source):
        guessed = column_types(db, f"read_json({paths}, {options})")
    if list(guessed) == ["json"]:
        raise InputError(f"{source.name}: expected JSON objects with a URL and a caption in each")
    columns = ", ".join(f"{literal(name)}: {literal(_as_written(kind))}" for name, kind in guessed.items())
    return f"read_json({paths}, columns = {{{columns}}}, maximum_object_size = {LARGEST_TEXT_BYTES})"


def _as_written(guessed: str) -> str:
    """The type, or list of a type, that leaves texts as they are written in JSON."""
    kind = guessed.rstrip("[]")
    return guessed.replace(kind, "VARCHAR", 1) if kind in _GUESSED_FROM_TEXT else guessed


def _marks_texts(source: ListFiles) -> bool:
    """Whether the first Parquet file says of a column that it is text; old writers never do, and call all bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return any(_holds_text(field.type) for field in pq.read_schema(source.paths[0]))
    except (OSError, pa.ArrowException):  # DuckDB, which reads it, says what is wrong
        return True


def _holds_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    if kind.num_fields:
        return any(_holds_text(kind.field(number).type) for number in range(kind.num_fields))
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


@contextmanager
def readable_list(source: ListFiles) -> Iterator[None]:
    """Turn what DuckDB says while it reads the list into one line that names the list."""
    try:
        yield
    except duckdb.OutOfMemoryException:
        raise
    except (duckdb.Error, OSError) as error:
        # Through a stream of Arrow, what DuckDB says comes as an OSError without a number.
        if isinstance(error, OSError) and (error.errno is not None or str(error).startswith("Out of Memory")):
            raise
        delimiter = DELIMITERS.get(source.kind)
        found = fault(source.name, source.paths, delimiter) if delimiter else None
        said = " ".join(" ".join(str(error).split("Possible")[0].split("LINE 1")[0].split()).split(" ")[:60])
        raise InputError(found or f"{source.name}: cannot be read as {source.kind}: {said}") from error


def choose_columns(
    types: dict[str, str], source: ListFiles, config: PlanConfig, reserved: Collection[str]
) -> ListColumns:
    """Which column is the URL and which the caption; how each is read.

    Args:
        types: DuckDB type of each column of the list.
        source: for the messages.
        config: the names, where the user gave them.
        reserved: names of ours, in lower case, that a carried column may not take.

    Raises:
        ConfigError: a column the user named is not there.
        InputError: none was named, and none has a usual name; or it holds lists or structs.
    """
    url = _choose("columns.url", config.columns.url, URL_NAMES, types, source)
    others = {name: kind for name, kind in types.items() if name != url}
    caption = None
    if source.kind != "txt" or config.columns.caption:
        caption = _choose("columns.caption", config.columns.caption, CAPTION_NAMES, others, source)
    for key, column in (("columns.url", url), ("columns.caption", caption)):
        if column and is_nested(types[column]):
            raise InputError(
                f"{source.name}: column '{column}' holds {types[column]}, no text; "
                f"write a row for each text, or name another column: plan.{key}"
            )
    carried, kept_types = {}, {}
    for name, kind in others.items():
        if name != caption:
            ours = free_name(name, types, reserved)
            carried[ours], kept_types[ours] = _carried(name, kind)
    text = _text(caption, types[caption]) if caption else "''"
    return ListColumns(_text(url, types[url]), text, carried, kept_types)


def is_nested(kind: str) -> bool:
    """Whether a DuckDB type is of lists, arrays, structs or maps, which a cast to text would spell DuckDB's way."""
    return kind.endswith("]") or kind.startswith(_NESTED)


def _text(name: str, kind: str) -> str:
    """SQL of a column as text; a cast of bytes would escape all but ASCII."""
    cast = f"CAST({quoted(name)} AS VARCHAR)"
    return f"coalesce(TRY(decode({quoted(name)})), {cast})" if kind == "BLOB" else cast


def _choose(key: str, given: str | None, usual: Sequence[str], types: dict[str, str], source: ListFiles) -> str:
    spelled = {name.lower(): name for name in types}
    if given is not None:
        if given.lower() not in spelled:
            raise ConfigError(f"plan.{key}: {source.name} has no column '{given}'.{did_you_mean(given, types)}")
        return given if given in types else spelled[given.lower()]
    for name in usual:
        if name in spelled:
            return spelled[name]
    raise InputError(
        f"{source.name}: none of its columns ({', '.join(types) or 'it has none'}) is named {' or '.join(usual[:4])}; "
        f"name one: plan.{key}"
    )


def free_name(name: str, names: Iterable[str], reserved: Collection[str]) -> str:
    """The name that a column of a list has in our files: its own, with as many `list_` in front as make it free.

    Args:
        name: of the column.
        names: of all columns of the list.
        reserved: names of ours, in lower case.
    """
    ours, others = name, {other.lower() for other in names if other != name}
    while ours.lower() in reserved or (ours != name and ours.lower() in others):
        ours = f"list_{ours}"
    return ours


def _carried(name: str, kind: str) -> tuple[str, str]:
    """SQL and type with which a column is carried."""
    column = quoted(name)
    if is_nested(kind):
        return f"CAST(to_json({column}) AS VARCHAR)", "VARCHAR"
    if kind in ("DATE", "TIMESTAMP"):  # Python has no others, and what reads our files may be written in it
        return f"CASE WHEN year({column}) BETWEEN 1 AND 9999 THEN {column} END", kind
    if kind.startswith("DECIMAL"):
        return f"CAST({column} AS DOUBLE)", "DOUBLE"
    return (column, kind) if kind in _PLAIN_TYPES else (f"CAST({column} AS VARCHAR)", "VARCHAR")
