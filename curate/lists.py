"""The user's list, in any of the usual forms, as something DuckDB can read: which files, which reader, which columns.

parquet · csv · tsv · txt (a URL a line) · json · jsonl, ndjson         text forms also as .gz and .zst
one file · a folder of them · a glob
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from curate.config import PlanConfig
from curate.database import column_types, files, literal, quoted
from curate.errors import ConfigError, InputError, did_you_mean

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
# DuckDB guesses these from text in JSON and spells them its own way: "2020-1-5" would become "2020-01-05".
_GUESSED_FROM_TEXT = frozenset(("DATE", "TIME", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE", "UUID"))
PACKED = (".gz", ".zst")
_LARGEST_TEXT_BYTES = 8 << 20
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


def find_list(urls: str) -> ListFiles:
    """The files that `urls` means: a file, a folder of list files, or a glob.

    Raises:
        InputError: nothing there, a form we do not know, or forms mixed in one folder.
    """
    path = Path(urls).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and _kind(file)]
    elif path.exists():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]  # noqa: PTH207 - Path.glob takes no absolute pattern
    return list_of(urls, sorted(found))


def list_of(urls: str, found: Sequence[Path]) -> ListFiles:
    """The list that these files are.

    Args:
        urls: what the user called it.
        found: in the order of their rows.

    Raises:
        InputError: there are none, or they are of a form that we do not know, or of several.
    """
    kinds = sorted({_kind(file) for file in found})
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


def _kind(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in (".gz", ".zst")]
    kind = KINDS.get(suffixes[-1], "") if suffixes else ""
    return "" if kind == "parquet" and file.suffix.lower() in (".gz", ".zst") else kind


def reader(db: duckdb.DuckDBPyConnection, source: ListFiles) -> str:
    """The SQL table function that reads the list; rows come in the order of the sorted files.

    Raises:
        InputError: a file is not what its ending says.
    """
    paths = files(source.paths)
    by_name = f"union_by_name = {str(len(source.paths) <= _MOST_UNITED).lower()}"
    if source.kind == "parquet":
        return f"read_parquet({paths}, {by_name}, binary_as_string = true)"
    if source.kind == "txt":
        # A separator that no URL holds: a line is a URL, whatever else is in it.
        dialect = r"delim = '\x01', quote = '', escape = '', comment = ''"
        return f"read_csv({paths}, header = false, auto_detect = false, columns = {{'url': 'VARCHAR'}}, {dialect})"
    if source.kind in ("csv", "tsv"):
        delim = r"'\t'" if source.kind == "tsv" else "','"
        dialect = f"""delim = {delim}, quote = '"', escape = '"', comment = '', max_line_size = {_LARGEST_TEXT_BYTES}"""
        return f"read_csv({paths}, header = true, all_varchar = true, {by_name}, {dialect})"
    options = f"{by_name}, sample_size = -1, maximum_object_size = {_LARGEST_TEXT_BYTES}"
    with readable_list(source):
        guessed = column_types(db, f"read_json({paths}, {options})")
    if list(guessed) == ["json"]:
        raise InputError(f"{source.name}: expected JSON objects with a URL and a caption in each")
    types = {name: "VARCHAR" if kind in _GUESSED_FROM_TEXT else kind for name, kind in guessed.items()}
    columns = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in types.items())
    return f"read_json({paths}, columns = {{{columns}}}, maximum_object_size = {_LARGEST_TEXT_BYTES})"


@contextmanager
def readable_list(source: ListFiles) -> Iterator[None]:
    """Turn what DuckDB says while it reads the list into one line that names the list."""
    try:
        yield
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        said = " ".join(" ".join(str(error).split("Possible")[0].split("LINE 1")[0].split()).split(" ")[:60])
        raise InputError(f"{source.name}: cannot be read as {source.kind}: {said}") from error


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
        InputError: none was named, and none has a usual name.
    """
    url = _choose("columns.url", config.columns.url, URL_NAMES, types, source)
    others = {name: kind for name, kind in types.items() if name != url}
    caption = None
    if source.kind != "txt" or config.columns.caption:
        caption = _choose("columns.caption", config.columns.caption, CAPTION_NAMES, others, source)
    carried, kept_types = {}, {}
    for name, kind in others.items():
        if name != caption:
            ours = _free_name(name, types, reserved)
            carried[ours], kept_types[ours] = _carried(name, kind)
    text = f"CAST({quoted(caption)} AS VARCHAR)" if caption else "''"
    return ListColumns(f"CAST({quoted(url)} AS VARCHAR)", text, carried, kept_types)


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


def _free_name(name: str, types: dict[str, str], reserved: Collection[str]) -> str:
    ours, others = name, {other.lower() for other in types if other != name}
    while ours.lower() in reserved or (ours != name and ours.lower() in others):
        ours = f"list_{ours}"
    return ours


def _carried(name: str, kind: str) -> tuple[str, str]:
    """SQL and type with which a column is carried."""
    column = quoted(name)
    if kind.endswith("]") or kind.startswith(_NESTED):
        return f"CAST(to_json({column}) AS VARCHAR)", "VARCHAR"
    if kind.startswith("DECIMAL"):
        return f"CAST({column} AS DOUBLE)", "DOUBLE"
    return (column, kind) if kind in _PLAIN_TYPES else (f"CAST({column} AS VARCHAR)", "VARCHAR")
