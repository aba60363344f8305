"""The errors a user can meet, and the exit status of each.

    CliptailorError           1   (base; never raised itself)
    ├── ConfigError           2   a key, value or file named in the configuration or on the command line
    ├── InputError            2   a list, image folder or dataset that cannot be read as what it should be
    ├── ModelError            2   a CLIP that cannot be found or loaded, or does not fit what is asked of it
    ├── UnwantedResult        3   the run ended, but not with what was asked for: nothing kept, an outage
    ├── Diverged              3   a training run whose numbers are none any more
    ├── UnwritableDisk        1   the disk is full, or a limit of the system is reached
    ├── Outage               69   nothing could be reached for fetch.outage_s, or a dataset far away no longer be read;
    │                             what was not done stays to be done
    └── Busy                 75   another run holds this folder

A message is one or two lines: which file, key or row; what was expected; what to do.
Anything else that escapes is a bug and keeps its traceback (exit status 1); Ctrl-C exits 130.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable


class CliptailorError(Exception):
    """Base of all errors that are shown to the user without a traceback."""

    exit_status = 1


class ConfigError(CliptailorError):
    """A key, value or file named by the user is not what it must be."""

    exit_status = 2


class InputError(CliptailorError):
    """An input file or folder cannot be read as what it should be."""

    exit_status = 2


class ModelError(CliptailorError):
    """A CLIP cannot be found, loaded or used as asked."""

    exit_status = 2


class UnwantedResult(CliptailorError):
    """The run ended, but the result is not what was asked for."""

    exit_status = 3


class Diverged(CliptailorError):
    """Training has made numbers that are none: infinite, or not a number."""

    exit_status = 3


class UnwritableDisk(CliptailorError):
    """The disk is full or read-only, or the system allows no more open files."""


class Outage(CliptailorError):
    """The network was gone for too long; nothing that was not done is marked as done."""

    exit_status = 69


class Busy(CliptailorError):
    """Another process is at work in the same folder."""

    exit_status = 75


# The disk's or the system's limits, which no row and no bug is to blame for.
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE))
# The same in the words of SQLite, which keeps the system's number to itself.
_FULL_TO_SQLITE = frozenset(
    (
        "database or disk is full",
        "disk I/O error",
        "unable to open database file",
        "attempt to write a readonly database",
    )
)
# And of safetensors, which has it at the end.
_SYSTEMS_NUMBER = re.compile(r"\(os error (\d+)\)$")

_CONTINUES = "what is done is kept, the same command continues"


def told(error: BaseException) -> CliptailorError | None:
    """What a user is told of what escaped: itself, or that the disk is full; None: it is a bug."""
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f" ({error.filename})" if error.filename else ""
        return UnwritableDisk(f"{error.strerror}{where}; {_CONTINUES}")
    if type(error).__module__ == "sqlite3" and str(error) in _FULL_TO_SQLITE:  # by its name, so that none imports it
        return UnwritableDisk(f"robots.sqlite: {error}; is the disk full? {_CONTINUES}")
    number = _SYSTEMS_NUMBER.search(str(error)) if type(error).__module__.startswith("safetensors") else None
    if number and int(number[1]) in _FULL:
        return UnwritableDisk(f"{os.strerror(int(number[1]))}; {_CONTINUES}")
    return error if isinstance(error, CliptailorError) else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known word, or the list of what there is."""
    known = sorted(set(known))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""
