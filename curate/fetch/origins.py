"""The database of what each origin's robots.txt says, shared by the workers of a run and kept for the next."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

KEPT_S = 24 * 3600.0

_TABLE = """CREATE TABLE IF NOT EXISTS origins (
    origin TEXT PRIMARY KEY, until REAL NOT NULL, tries INTEGER NOT NULL, rules TEXT, reason TEXT, value TEXT
) WITHOUT ROWID"""


def prepare(path: Path) -> None:
    """Make the database, or take what is out of date out of the one that is there; before any worker opens it.

    One that cannot be read is made anew: what it held can be asked for again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _prune(path)
    except sqlite3.DatabaseError:
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        _prune(path)


def _prune(path: Path) -> None:
    db = open_origins(path)
    try:
        db.execute("DELETE FROM origins WHERE until < ?", (time.time() - KEPT_S,))
    finally:
        db.close()


def open_origins(path: Path) -> sqlite3.Connection:
    """The database, made if it is not there."""
    db = sqlite3.connect(path, isolation_level=None, timeout=30)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = OFF")  # a cache: after a power cut it is read again
    db.execute(_TABLE)
    return db
