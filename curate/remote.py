"""Datasets far away (s3://…, gs://…, whatever fsspec reads): a mirror of their shards on this machine.

A mirror is a folder in the cache that other code reads as any dataset's. What is small, the Parquets, is copied whole.
The tars come when they are read, and go to make room for others (curate/cache.py); what each is stands in
`.mirror.json`, which is written last.

    CACHE/remote/NAME-HASH/VERSION/  train-00000.parquet …  .mirror.json  train-00000.tar (those that are here)

A mirror is of one version of the dataset and never changes, so that a run goes on with the samples it was begun with,
or says that they are gone. Of an older version it is removed as soon as no process reads it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from curate.errors import CliptailorError, ConfigError, InputError
from curate.files import atomic, fingerprint, sweep, write_text

DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs"}
EXTRAS = {"s3fs": "cliptailor[s3]", "gcsfs": "cliptailor[gcs]"}
# What changes with a file's content, as the file systems call it; the first that is there. The weak ones are last.
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "content_md5", "generation", "LastModified", "mtime", "created")
MANIFEST = ".mirror.json"
COPIED_AT_ONCE = 8 << 20
_COPIES = 16  # Parquets at once: small ones, so that most of the time is waiting
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)")
# Locks on mirrors in use, for as long as this process lives.
_held: dict[Path, int] = {}


class Far(NamedTuple):
    """A file far away: where, how many bytes, and what changes with its content."""

    address: str
    size: int
    version: str


def address(path: Path) -> str | None:
    """The address that a path stands for, of which pathlib keeps one slash: `s3://bucket/name`; None: it is a path."""
    found = _ADDRESS.fullmatch(path.as_posix())
    return f"{found[1]}://{found[2]}" if found else None


def shown(path: Path) -> str:
    """A path or address as the user wrote it."""
    return address(path) or str(path)


def cache_folder() -> Path:
    """Where mirrors are kept: in $CLIPTAILOR_CACHE, else in the user's cache."""
    given = os.environ.get("CLIPTAILOR_CACHE")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cliptailor"
    return (Path(given) if given else usual).expanduser().absolute() / "remote"


# --- a file system ---------------------------------------------------------------------------------------------------


def connect(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it; nothing that it remembers of earlier calls is believed.

    Raises:
        ConfigError: its driver is not installed.
    """
    protocol = url.partition("://")[0]
    driver = DRIVERS.get(protocol)
    if driver and importlib.util.find_spec(driver) is None:
        raise ConfigError(f"{url}: {protocol}:// needs {driver}: pip install '{EXTRAS.get(driver, driver)}'")
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    return system, path


def said(error: BaseException) -> str:
    """What a driver says, in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


@contextmanager
def readable(url: str) -> Iterator[None]:
    """What goes wrong with an address, in one line.

    Raises:
        InputError: it cannot be read.
    """
    try:
        yield
    except CliptailorError:
        raise
    except Exception as error:  # each driver has errors of its own, with no common base
        raise InputError(f"{url}: cannot be read: {said(error)}") from error


def version_of(info: Mapping[str, Any]) -> str:
    """What changes with a file's content, of what its file system says of it."""
    return next((f"{info[name]}" for name in VERSIONS if info.get(name)), "")


# --- mirrors ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def mirror(url: str) -> Path:
    """The folder that stands for a dataset far away, as it was when this process first asked for it.

    Args:
        url: of a dataset of `curate build` (its shards are in `shards`), or a folder of shards.

    Raises:
        InputError: it cannot be read, or has no shards.
        ConfigError: its driver is not installed.
    """
    with readable(url):
        system, path = connect(url)
        base, files = _shards(system, path.rstrip("/"))
        if not files:
            system.info(path)  # no such bucket or folder?
    if not files:
        raise InputError(
            f"{url}: no shard (STEM.tar with STEM.parquet), nor in its folder shards; give a dataset that curate build "
            "or img2dataset made, in an uncompressed form"
        )
    found = {name: Far(system.unstrip_protocol(f"{base}/{name}"), *what) for name, what in files.items()}
    name = url.rstrip("/").rpartition("/")[2]
    home = cache_folder() / f"{name}-{fingerprint(url)[:8]}"
    folder = home / fingerprint(sorted(found.items()))
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / ".lock"):
        folder.mkdir(exist_ok=True)
        _hold(folder)
        for other in home.iterdir():
            if other.is_dir() and other != folder:
                _remove_unused(other)
        if not (folder / MANIFEST).is_file():
            sweep(folder)
            with readable(url):
                _copy_parquets(system, found, folder)
            tars = {name: what for name, what in found.items() if name.endswith(".tar")}
            write_text(folder / MANIFEST, json.dumps(tars))
    return folder


def _shards(system: Any, path: str) -> tuple[str, dict[str, tuple[int, str]]]:
    """The folder that has them, and length and version of each Parquet beside a tar, and of that tar."""
    for base in (f"{path}/shards", path):
        listed = system.find(base, maxdepth=1, detail=True)
        there = {name.rpartition("/")[2]: info for name, info in listed.items()}
        stems = {name.removesuffix(".parquet") for name in there if name.endswith(".parquet")}
        names = sorted(f"{stem}{ending}" for stem in stems if f"{stem}.tar" in there for ending in (".parquet", ".tar"))
        if names:
            return base, {name: (int(there[name]["size"]), version_of(there[name])) for name in names}
    return path, {}


def _copy_parquets(system: Any, found: Mapping[str, Far], folder: Path) -> None:
    def copy(name: str) -> None:
        target = folder / name
        if target.exists():  # whole, of this version
            return
        with atomic(target) as temporary, temporary.open("wb") as here:
            copy_to(here, system, found[name])

    with ThreadPoolExecutor(_COPIES) as copies:
        for _ in copies.map(copy, [name for name in found if name.endswith(".parquet")]):
            pass


def copy_to(here: Any, system: Any, what: Far) -> None:
    """Copy a file far away into an open one, from its beginning.

    Raises:
        OSError: it ended early; or whatever its driver raises.
    """
    copied = 0
    with system.open(system._strip_protocol(what.address), "rb", cache_type="none") as there:
        while block := there.read(COPIED_AT_ONCE):
            here.write(block)
            copied += len(block)
    if copied != what.size:
        raise OSError(f"{copied:,} of {what.size:,} bytes came")


def far_files(folder: Path) -> Mapping[str, Far]:
    """The tars of a mirror, by name; none for any other folder."""
    return _manifest(folder) if (folder / MANIFEST).exists() else {}


@lru_cache(maxsize=64)
def _manifest(folder: Path) -> Mapping[str, Far]:
    return {name: Far(*what) for name, what in json.loads((folder / MANIFEST).read_text()).items()}


def far(tar: Path) -> Far | None:
    """What a tar of a mirror is; None for any other file."""
    return far_files(tar.parent).get(tar.name)


def stamp(file: Path) -> tuple[int, int | str]:
    """Length of a file, and what changes with its content: its time or, far away, its version."""
    if what := far(file):
        return what.size, what.version
    seen = os.stat(file)  # noqa: PTH116 - of whatever kind of path
    return seen.st_size, seen.st_mtime_ns


# --- locks -----------------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among all processes and threads; waits."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Not by closing alone: a process forked meanwhile has the same open file.
            fcntl.flock(file, fcntl.LOCK_UN)


def _hold(folder: Path) -> None:
    if folder not in _held:
        _held[folder] = os.open(folder, os.O_RDONLY)
        fcntl.flock(_held[folder], fcntl.LOCK_SH)


def _remove_unused(folder: Path) -> None:
    if folder in _held:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)
