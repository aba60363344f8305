"""The tars of mirrors (curate/remote.py): fetched when they are read, within a bound, removed for others.

A tar is fetched whole, under another name that is locked meanwhile: whoever else needs it waits, so that all processes
together fetch it once. Its name appears when it is whole; a kill at any moment leaves a part that the next one who
needs room removes. The room that it will take is taken at its beginning, so all tars and parts together stay within
$CLIPTAILOR_CACHE_GB. What has not been read for the longest time goes first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from curate.errors import CliptailorError, ConfigError, Outage, UnwritableDisk
from curate.remote import Far, cache_folder, connect, copy_to, far, locked, said, version_of

USUAL_GB = 50.0
PAUSES_S = (1.0, 4.0, 16.0)  # between attempts; each driver has made several by itself
_WAIT_S = 0.05
_AT_ONCE = 4


def cache_bytes() -> int:
    """The most bytes that tars may take.

    Raises:
        ConfigError: $CLIPTAILOR_CACHE_GB is no number above 0.
    """
    given = os.environ.get("CLIPTAILOR_CACHE_GB") or str(USUAL_GB)
    try:
        size = float(given) * 1e9
        if size > 0:
            return round(size)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"CLIPTAILOR_CACHE_GB: expected gigabytes, above 0, got '{given}'")


def open_tar(tar: Path) -> int:
    """A tar, open for reading; one of a mirror is fetched first if it is not here.

    Raises:
        OSError: it is no mirror's, and cannot be opened.
        Outage: it cannot be fetched.
        ConfigError: it is larger than the cache may be.
    """
    while True:
        with suppress(FileNotFoundError):
            return os.open(tar, os.O_RDONLY)
        if not far(tar):
            return os.open(tar, os.O_RDONLY)
        fetch(tar)  # it may be removed again before it is open


def read_far(tar: Path, offset: int, size: int) -> bytes:
    """Bytes of a tar of a mirror. It is not kept open: then it would take up room even after it was removed.

    Raises:
        Outage, ConfigError: as `open_tar`.
    """
    handle = open_tar(tar)
    try:
        os.utime(handle)
        return os.pread(handle, size, offset)
    finally:
        os.close(handle)


def fetch(tar: Path) -> None:
    """Have a tar of a mirror here.

    Raises:
        Outage: it cannot be had; or it is no longer what it was when the mirror was made.
        ConfigError: it is larger than the cache may be.
    """
    what = far(tar)
    assert what is not None
    failed = _failed(tar, what)
    for pause in PAUSES_S:
        if failed is None:
            return
        time.sleep(pause)
        failed = _failed(tar, what)
    if failed is None:
        return
    raise Outage(
        f"{what.address}: cannot be read: {said(failed)}; when it can be, the same command goes on where it stopped"
    )


def _failed(tar: Path, what: Far) -> Exception | None:
    """Try to fetch a tar; what went wrong, if it may go well another time."""
    try:
        _fetch(tar, what)
    except CliptailorError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise Outage(f"{what.address}: cannot be read any more: {said(error)}") from error
    except Exception as error:  # each driver has errors of its own, with no common base
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise UnwritableDisk(f"{tar}: {error.strerror}; CLIPTAILOR_CACHE names another folder") from error
        return error
    return None


def _fetch(tar: Path, what: Far) -> None:
    part = tar.with_name(f".{tar.name}.part")
    with _alone(part) as file:
        if tar.exists():  # another process has fetched it meanwhile
            part.unlink()
            return
        _take_room(part, file, what)
        system, path = connect(what.address)
        info = system.info(path)
        if (int(info["size"]), version_of(info)) != (what.size, what.version):
            raise Outage(
                f"{what.address}: is no longer what it was when this command began; "
                "begin again, or bring back the dataset as it was"
            )
        file.seek(0)
        copy_to(file, system, what)
        file.flush()
        os.fsync(file.fileno())
        part.rename(tar)


@contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """The file, made if need be, locked; waits for whoever has it."""
    while True:
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if part.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        _let_go(file)  # it has become a tar, or was removed, while this one waited
    try:
        yield file
    finally:
        _let_go(file)


def _let_go(file: BinaryIO) -> None:
    # Not by closing alone: a process forked meanwhile has the same open file.
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


# --- room ------------------------------------------------------------------------------------------------------------


class _Held(NamedTuple):
    read: int
    size: int
    path: Path


def _take_room(part: Path, file: BinaryIO, what: Far) -> None:
    """Make the part as long as it will be; remove tars for that, the longest unread ones first.

    Raises:
        ConfigError: it is larger than the cache may be.
    """
    most = cache_bytes()
    if what.size > most:
        raise ConfigError(
            f"CLIPTAILOR_CACHE_GB: {most / 1e9:g}, but {what.address} alone has {what.size / 1e9:.3g} GB; give it more"
        )
    file.truncate(0)
    while True:
        with locked(cache_folder() / ".lock"):
            held = sorted(_in_cache())
            excess = sum(each.size for each in held) + what.size - most
            for each in held:
                if excess > 0 and each.path != part and _removed(each.path):
                    excess -= each.size
            if excess <= 0:
                file.truncate(what.size)
                return
        time.sleep(_WAIT_S)  # the rest is being fetched by others, and can be removed then


def _in_cache() -> Iterator[_Held]:
    # Parts first: one that becomes a tar meanwhile is counted twice, and not passed over.
    for pattern in ("*/*/.*.tar.part", "*/*/*.tar"):
        for path in cache_folder().glob(pattern):
            with suppress(FileNotFoundError):
                seen = path.stat()
                yield _Held(seen.st_mtime_ns, seen.st_size, path)


def _removed(path: Path) -> bool:
    """Remove a tar, or the part that a killed process left; not one that is being fetched."""
    if path.suffix == ".part":
        with suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            path.unlink()
            fcntl.flock(file, fcntl.LOCK_UN)
        return True
    path.unlink(missing_ok=True)
    return True


# --- ahead -----------------------------------------------------------------------------------------------------------


class ReadAhead:
    """Fetches in the background what will be read next. What goes wrong is left to whoever reads it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Path] = []
        self._under_way: set[Path] = set()
        self._closed = False
        for _ in range(_AT_ONCE):
            threading.Thread(target=self._work, daemon=True).start()

    def want(self, tars: Sequence[Path]) -> None:
        """From now on these are needed, the first ones first: they are fetched, and stay longer than others."""
        missing = [tar for tar in reversed(tars) if not _read_now(tar)]
        with self._changed:
            self._waiting = [tar for tar in reversed(missing) if tar not in self._under_way]
            self._changed.notify_all()

    def close(self) -> None:
        """Fetch no more."""
        with self._changed:
            self._closed, self._waiting = True, []
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                tar = self._waiting.pop(0)
                self._under_way.add(tar)
            with suppress(CliptailorError, OSError):
                fetch(tar)
            with self._changed:
                self._under_way.discard(tar)


def _read_now(tar: Path) -> bool:
    """Whether a tar is here; it stays longer then."""
    with suppress(FileNotFoundError):
        os.utime(tar)
        return True
    return False
