"""Where rows come from: a list here, a list far away, or images that are here already.

    file, folder or glob of list files           as it is (`curate.lists`)
    s3://…, gs://…, hf://…, memory://…           list files, copied to DIR/.list through fsspec
    a folder with tars                           img2dataset's (STEM.tar + STEM.parquet) or webdataset's shards
    a folder with images                         captions from metadata.{csv,jsonl,parquet}, sidecar .txt or folder name

Images that are here already become a list in DIR/.list: a place in a file for each, and what is known of it. They are
read from there instead of being downloaded; everything after that is the same. A folder is taken for what the first of
these says that fits: tars, images, list files.
"""

from __future__ import annotations

import csv
import json
import logging
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.errors import ConfigError, InputError
from curate.files import atomic, fingerprint, utf8
from curate.index import image_places, kept_index
from curate.lists import CAPTION_NAMES, ListFiles, find_list, free_name, kind_of, list_of, not_below
from curate.progress import progress
from curate.remote import COPIED_AT_ONCE, connect, readable
from curate.shards import PLACE

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

logger = logging.getLogger("cliptailor")

IMAGES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".apng")
)
ROWS_AT_ONCE = 50_000
FORMAT = 3
_LONGEST_FIELD = 8 << 20  # of a metadata.csv; Python's own limit is an eighth of a megabyte


def find(urls: str, cache: Path, out: Path | None = None, caption: str | None = None) -> ListFiles:
    """The list that `urls` means.

    Args:
        urls: as the user gave it.
        cache: folder for copies of remote lists, and for lists of local images.
        out: the dataset's folder: what lies below it was made from `urls`, and is no part of it.
        caption: the column of a metadata file that is the caption, if it has no usual name.

    Raises:
        InputError: nothing there, or not what it should be.
        ConfigError: it needs a driver that is not installed, or is the dataset's folder itself.
    """
    if "://" in urls:
        return _remote(urls, cache)
    folder = Path(urls).expanduser()
    if not folder.is_dir():
        return find_list(urls, out)
    if out is not None and out.resolve() == folder.resolve():
        raise ConfigError(f"--out {out}: is the folder that --urls names; choose another, beside it or below it")
    paths = sorted(not_below(out, folder, folder.rglob("*")))
    files = _with_readable_names(folder, [path for path in paths if _is_inside(path, folder)])
    if tars := [path for path in files if path.suffix == ".tar"]:
        return _local(urls, folder, tars, _tar_tables(folder, tars), "tars", cache)
    if packed := next((path for path in files if path.name.endswith((".tar.gz", ".tgz", ".tar.zst"))), None):
        raise InputError(f"{packed}: a compressed tar cannot be read in places; unpack it to a .tar first")
    if images := [path for path in files if path.suffix.lower() in IMAGES]:
        return _local(urls, folder, files, _image_tables(folder, images, caption), "images", cache, caption)
    return find_list(urls, out)


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether it is a file of this folder, not hidden, and no link out of it."""
    if any(part.startswith(".") for part in path.relative_to(folder).parts) or not path.is_file():
        return False
    return not path.is_symlink() or path.resolve().is_relative_to(folder.resolve())


def _with_readable_names(folder: Path, files: list[Path]) -> list[Path]:
    """The files whose names can stand in a list, which is UTF-8; that there are others is said."""
    odd = [path for path in files if utf8(name := str(path.relative_to(folder))) != name]
    if odd:
        first = utf8(str(odd[0].relative_to(folder)))
        logger.warning(
            "list    %s: %d files left out, whose names are not UTF-8; the first: %s", folder, len(odd), first
        )
    left_out = set(odd)
    return [path for path in files if path not in left_out]


# --- far away --------------------------------------------------------------------------------------------------------


def _remote(urls: str, cache: Path) -> ListFiles:
    with readable(urls):
        system, path = connect(urls)
        if "*" in path or "?" in path or "[" in path:
            found = system.glob(path)
        elif system.isdir(path):
            found = [name for name in system.find(path) if _is_list(name.removeprefix(path))]
        else:
            found = [path]
        found = sorted(found)
        list_of(urls, [Path(name) for name in found])  # what is no list is told before gigabytes are copied
        copies = [_copy(system, name, cache) for name in found]
    return list_of(urls, copies)


def _is_list(name: str) -> bool:
    """Whether a file of a folder far away, by its path below it, is a list: not hidden, nor a writer's `_SUCCESS`."""
    return bool(kind_of(Path(name))) and not any(part.startswith((".", "_")) for part in name.split("/"))


def _copy(system: Any, path: str, cache: Path) -> Path:
    """Copy a remote file, unless a copy of this very version is there."""
    info = system.info(path)
    size = info.get("size") or 0
    name = path.rstrip("/").rpartition("/")[2]
    copy = cache / f"{fingerprint(system.unstrip_protocol(path), size, system.ukey(path))}-{name}"
    if not copy.exists():
        with (
            system.open(path, "rb") as there,
            atomic(copy) as temporary,
            temporary.open("wb") as here,
            progress(f"copy {name}", size) as advance,
        ):
            while block := there.read(COPIED_AT_ONCE):
                here.write(block)
                advance(len(block))
    return copy


# --- here already ----------------------------------------------------------------------------------------------------


def _local(
    urls: str,
    folder: Path,
    files: list[Path],
    tables: Iterator[pa.Table],
    what: str,
    cache: Path,
    caption: str | None = None,
) -> ListFiles:
    """The list of local images, written once for the same files."""
    import pyarrow.parquet as pq

    seen = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    path = cache / f"{fingerprint(FORMAT, what, seen, caption)}-{what}.parquet"
    if not path.exists():
        first = next(tables, None)
        if first is None:
            raise InputError(f"{urls}: no images in its {what}")
        with atomic(path) as temporary, pq.ParquetWriter(temporary, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)
    logger.info("list    %s: %s, read from here without any download", urls, what)
    return ListFiles(urls, "parquet", (path,), root=folder.resolve())


def _place(folder: Path, path: Path, offset: int | None, size: int | None) -> dict[str, Any]:
    return {"source_file": path.relative_to(folder).as_posix(), "source_offset": offset, "source_size": size}


def _with_places(table: pa.Table, files: list[str], offsets: pa.Array, sizes: pa.Array) -> pa.Table:
    """The table with the place of each row's image; columns of its own of these names make way for ours.

    A dataset made of images that lay here has them, and they say where its images lay, not where they are.
    """
    import pyarrow as pa

    names = table.column_names
    table = table.rename_columns([free_name(name, names, PLACE) for name in names])
    for name, column in zip(PLACE, (pa.array(files, pa.string()), offsets, sizes), strict=True):
        table = table.append_column(name, column)
    return table


def _rows(rows: Iterator[Mapping[str, Any]]) -> Iterator[pa.Table]:
    """Rows with a URL, a caption and a place as tables of one schema."""
    import pyarrow as pa

    texts = dict.fromkeys(("url", "caption", "source_file"), pa.string())
    schema = pa.schema({**texts, "source_offset": pa.int64(), "source_size": pa.int64()})
    some: list[Mapping[str, Any]] = []
    for row in rows:
        some.append(row)
        if len(some) == ROWS_AT_ONCE:
            yield pa.Table.from_pylist(some, schema)
            some = []
    if some:
        yield pa.Table.from_pylist(some, schema)


def _tar_tables(folder: Path, tars: list[Path]) -> Iterator[pa.Table]:
    if all(tar.with_suffix(".parquet").exists() for tar in tars):
        return _img2dataset_tables(folder, tars)
    tables = (_tar_table(folder, tar) for tar in tars)
    return (table for table in tables if table.num_rows)


def _img2dataset_tables(folder: Path, tars: list[Path]) -> Iterator[pa.Table]:
    """The shards' own Parquet, and where in the tar each row's image lies; nowhere, for one that was not downloaded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schemas = [pq.read_schema(tar.with_suffix(".parquet")).remove_metadata() for tar in tars]
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{folder}: the Parquet files of its shards do not go together: {error}") from error
    if "key" not in schema.names:
        raise InputError(f"{tars[0].with_suffix('.parquet')}: no column 'key', which img2dataset's shards have")
    for tar in tars:
        table = pq.read_table(tar.with_suffix(".parquet"))
        table = pa.concat_tables([table, schema.empty_table()], promote_options="permissive").select(schema.names)
        places = image_places(tar)
        found = [places.get(str(key), (None, None)) for key in table["key"].to_pylist()]
        offsets = pa.array([offset for offset, _ in found], pa.int64())
        sizes = pa.array([size if size is not None else 0 for _, size in found], pa.int64())
        yield _with_places(table.cast(schema), [tar.relative_to(folder).as_posix()] * len(found), offsets, sizes)


def _tar_table(folder: Path, tar: Path) -> pa.Table:
    """The samples of a webdataset tar, and where in the folder they lie."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = dict.fromkeys(("name", "url", "caption"), pa.string())
    schema = pa.schema({**texts, "offset": pa.int64(), "size": pa.int64()})
    table = kept_index(tar, "samples", lambda: pa.Table.from_pylist(list(_tar_samples(tar)), schema))
    place = pa.scalar(tar.relative_to(folder).as_posix())
    return pa.table(
        {
            "url": pc.coalesce(table["url"], pc.binary_join_element_wise(place, table["name"], "/")),
            "caption": table["caption"],
            "source_file": pa.array([place.as_py()] * table.num_rows, pa.string()),
            "source_offset": table["offset"],
            "source_size": table["size"],
        }
    )


def _tar_samples(tar: Path) -> Iterator[dict[str, Any]]:
    """The samples of a webdataset tar: members with one name up to the first dot, adjacent."""
    sample: dict[str, Any] = {}
    try:
        with tarfile.open(tar, "r:") as members:
            for member in members:
                key, _, extension = member.name.rpartition("/")[2].partition(".")
                key = member.name.rpartition("/")[0] + "/" + key
                if sample.get("key") not in (None, key):
                    yield from _tar_sample(sample)
                    sample = {}
                sample["key"] = key
                if not member.isreg():
                    continue
                if f".{extension.lower()}" in IMAGES:
                    sample["image"] = (member.name, member.offset_data, member.size)
                elif extension in ("txt", "json"):
                    content = members.extractfile(member)
                    sample[extension] = content.read().decode("utf-8", "replace") if content else ""
    except tarfile.ReadError as error:
        raise InputError(f"{tar}: not an uncompressed tar ({error}); gunzip it first if it is compressed") from error
    yield from _tar_sample(sample)


def _tar_sample(sample: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if "image" not in sample:
        return
    name, offset, size = sample["image"]
    facts = _json_object(sample.get("json", ""))
    caption = sample.get("txt") or next((facts[key] for key in CAPTION_NAMES if isinstance(facts.get(key), str)), "")
    url = facts.get("url") if isinstance(facts.get("url"), str) else None
    clean = caption.encode("utf-8", "replace").decode()
    yield {"name": utf8(name), "url": utf8(url) if url else None, "caption": clean, "offset": offset, "size": size}


def _json_object(text: str) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _image_tables(folder: Path, images: list[Path], caption: str | None) -> Iterator[pa.Table]:
    metadata = [path for path in (folder / f"metadata.{kind}" for kind in ("csv", "jsonl", "parquet")) if path.exists()]
    if metadata:
        return _described(folder, metadata[0], caption)
    return _rows(
        {
            "url": path.relative_to(folder).as_posix(),
            "caption": _caption_of(folder, path),
            **_place(folder, path, None, None),
        }
        for path in images
    )


def _caption_of(folder: Path, image: Path) -> str:
    """The text beside an image, else its folder's name as words, else nothing."""
    sidecar = image.with_suffix(".txt")
    if sidecar.exists():
        return sidecar.read_text(encoding="utf-8", errors="replace").strip()
    return "" if image.parent == folder else image.parent.name.replace("_", " ")


def _described(folder: Path, metadata: Path, caption: str | None) -> Iterator[pa.Table]:
    """The rows of a metadata file, as Hugging Face's imagefolder has it: `file_name`, and whatever else."""
    import pandas as pd
    import pyarrow as pa

    readers: dict[str, Any] = {
        ".csv": lambda: _read_csv(metadata, caption),
        ".jsonl": lambda: pd.read_json(metadata, lines=True, dtype=False, convert_dates=False),
        ".parquet": lambda: pd.read_parquet(metadata),
    }
    try:
        table = pa.Table.from_pandas(readers[metadata.suffix](), preserve_index=False).replace_schema_metadata()
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{metadata}: cannot be read: {str(error).splitlines()[0]}") from error
    if "file_name" not in table.column_names:
        raise InputError(f"{metadata}: no column 'file_name'; it has {', '.join(table.column_names)}")
    names = [str(name) for name in table["file_name"].to_pylist()]
    if outside := next((name for name in names if not _leads_inside(folder, name)), None):
        raise InputError(f"{metadata}: file_name '{outside}' leads out of {folder}")
    nothing = pa.nulls(table.num_rows, pa.int64())
    yield _with_places(_with_urls(table, names), names, nothing, nothing)


def _read_csv(metadata: Path, caption: str | None) -> pd.DataFrame:
    """What pandas makes of it, but texts stay as they are written: `007` is no number.

    Raises:
        InputError: a line has more fields than the header, of which pandas would make an index or an error of its own.
    """
    import pandas as pd

    csv.field_size_limit(_LONGEST_FIELD)
    with metadata.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        header = next(filter(None, lines), [])
        for fields in lines:
            if len(fields) > len(header):
                raise InputError(
                    f"{metadata}: line {lines.line_num} has {len(fields)} fields, the header {len(header)}; "
                    'put "quotes" around a text that holds a comma'
                )
    texts = {"file_name", "url", *CAPTION_NAMES, caption}
    kept = {name: str for name in header if name in texts or name.lower() in texts}
    return pd.read_csv(metadata, keep_default_na=False, dtype=kept)


def _with_urls(table: pa.Table, names: list[str]) -> pa.Table:
    """The table with a URL in each row: that of its column, else the file's name."""
    import pyarrow as pa
    import pyarrow.compute as pc

    files = pa.array(names, pa.string())
    number = next((number for number, name in enumerate(table.column_names) if name.lower() == "url"), None)
    if number is None:
        return table.append_column("url", files)
    if pa.types.is_nested(table.column(number).type):
        return table  # no text, which is told where the columns are chosen
    urls = table.column(number).cast(pa.string())
    is_blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(urls), ""), fill_value=True)
    return table.set_column(number, table.column_names[number], pc.if_else(is_blank, files, urls))


def _leads_inside(folder: Path, name: str) -> bool:
    return (folder / name).resolve().is_relative_to(folder.resolve())
