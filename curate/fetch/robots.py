"""robots.txt as RFC 9309 asks: read once an origin by all workers together, kept for a day, unreachable means no.

An origin is scheme, host and port. What its robots.txt says lies in a small database in the dataset's folder, which the
workers and later runs share: the first to ask claims the origin and reads the file, the others wait for the entry. A
claim whose owner died is taken over.

What the answer means:

| answer | meaning |
|---|---|
| 2xx | its rules; a web page instead of rules has none |
| up to five redirects | the answer they end in, each target checked as any URL; more of them: no rules |
| 4xx but 429 | no rules |
| 429, 5xx, a broken or endless answer | nothing may be fetched until it can be read; asked again, less and less often |
| no connection, no address | that, for every URL of the origin; asked again in the same way |
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from protego import Protego
from yarl import URL

from curate.config import AGENT
from curate.fetch.transfer import Page, TransferError
from curate.ledger import Reason

# RFC 9309, 2.5: at least the first 500 kibibytes must be read.
MOST_BYTES = 500 << 10
MOST_REDIRECTS = 5
KEPT_S = 24 * 3600.0
# An origin that cannot be read is asked again after this long, then four times as long …
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 3600.0
PARSED_AT_ONCE = 4_096
LOOK_EVERY_S = 0.05
# What is wrong with the host itself, whichever of its pages is asked for.
_OF_THE_HOST = (Reason.BAD_URL, Reason.BLOCKED_ADDRESS, Reason.TLS)

_TABLE = """CREATE TABLE IF NOT EXISTS origins (
    origin TEXT PRIMARY KEY, claimed REAL NOT NULL, until REAL NOT NULL DEFAULT 0, tries INTEGER NOT NULL DEFAULT 0,
    rules TEXT, reason TEXT, value TEXT) WITHOUT ROWID"""
# Taken if nobody has it, if what is known is out of date, and if whoever took it has had the time to end.
_CLAIM = """INSERT INTO origins (origin, claimed) VALUES (:origin, :now)
    ON CONFLICT (origin) DO UPDATE SET claimed = :now WHERE until <= :now AND claimed <= :now - :patience"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a URL may be fetched.

    Attributes:
        error: why not; None if it may.
        crawl_delay_s: the pause between requests that the host asks for; 0 if it asks for none.
    """

    error: TransferError | None = None
    crawl_delay_s: float = 0.0


ALLOWED = Verdict()


class Robots:
    """What the robots.txt of each origin says; one for each worker, over one database.

    Args:
        path: of the database; made if it is not there.
        read: gives the page at a URL, without following redirects.
        patience_s: longest time that reading one takes; a claim older than that is nobody's.
    """

    def __init__(self, path: Path, read: Callable[[URL], Awaitable[Page]], patience_s: float) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, timeout=30)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = OFF")  # a cache: after a power cut it is read again
        self._db.execute(_TABLE)
        self._read, self._patience_s = read, patience_s
        self._known: OrderedDict[str, _Entry] = OrderedDict()
        self._asking: dict[str, asyncio.Future[_Entry]] = {}

    async def verdict(self, target: URL) -> Verdict:
        """Whether `target` may be fetched; reads its origin's robots.txt if nobody has lately."""
        origin = str(target.origin())
        entry = self._known.get(origin)
        if entry is None or entry.until <= time.time():
            entry = await self._entry(origin)
            self._known[origin] = entry
            if len(self._known) > PARSED_AT_ONCE:
                self._known.popitem(last=False)
        return entry.verdict(target)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    async def _entry(self, origin: str) -> _Entry:
        """The entry of an origin, of the database or new; asked for once however many tasks wait for it."""
        if origin in self._asking:
            return await asyncio.shield(self._asking[origin])
        answer = self._asking[origin] = asyncio.get_running_loop().create_future()
        try:
            entry = await self._claimed_or_read(origin)
            answer.set_result(entry)
        except BaseException as error:
            answer.set_exception(error)
            answer.exception()  # if nobody waits for it, nobody needs to be told
            raise
        finally:
            del self._asking[origin]
        return entry

    async def _claimed_or_read(self, origin: str) -> _Entry:
        while True:
            now = time.time()
            found = self._db.execute(
                "SELECT until, rules, reason, value FROM origins WHERE origin = ? AND until > ?", (origin, now)
            ).fetchone()
            if found:
                return _Entry.of(origin, *found)
            claim = {"origin": origin, "now": now, "patience": self._patience_s}
            if self._db.execute(_CLAIM, claim).rowcount:
                return await self._ask(origin)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _ask(self, origin: str) -> _Entry:
        rules, error = None, None
        try:
            rules = await self._rules(URL(origin).with_path("/robots.txt"))
        except TransferError as failed:
            error = failed
        (tries,) = self._db.execute("SELECT tries FROM origins WHERE origin = ?", (origin,)).fetchone()
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 4.0**tries) if error else KEPT_S
        until = time.time() + pause_s
        reason, value = (error.reason.value, error.value) if error else (None, None)
        self._db.execute(
            "UPDATE origins SET claimed = 0, until = ?, tries = ?, rules = ?, reason = ?, value = ? WHERE origin = ?",
            (until, tries + 1 if error else 0, rules, reason, value, origin),
        )
        return _Entry.of(origin, until, rules, reason, value)

    async def _rules(self, target: URL) -> str:
        """The text of the rules; empty if there are none.

        Raises:
            TransferError: they cannot be read: ROBOTS_UNREACHABLE, or why no server was reached.
        """
        for _ in range(MOST_REDIRECTS + 1):
            try:
                page = await self._read(target)
            except TransferError as error:
                if error.is_network or error.reason in _OF_THE_HOST:
                    raise
                raise _unreachable(f"{error.reason.value} {error.value}".strip()) from error
            if page.redirect is not None:
                target = page.redirect
            elif page.http_status == 429 or page.http_status >= 500 or page.http_status < 200:
                raise _unreachable(f"http status {page.http_status}")
            else:
                return text_of(page.content) if page.http_status < 300 else ""
        return ""


@dataclass(frozen=True, slots=True)
class _Entry:
    origin: str
    until: float
    rules: Protego | None
    error: TransferError | None

    @classmethod
    def of(cls, origin: str, until: float, rules: str | None, reason: str | None, value: str | None) -> _Entry:
        """From the columns of the database."""
        if reason is not None:
            return cls(origin, until, None, _as_error(Reason(reason), value or "", until - time.time()))
        return cls(origin, until, Protego.parse(rules) if rules else None, None)

    def verdict(self, target: URL) -> Verdict:
        if self.error is not None:
            return Verdict(self.error)
        if self.rules is None:
            return ALLOWED
        if not self.rules.can_fetch(str(target), AGENT):
            return Verdict(TransferError(Reason.ROBOTS_DISALLOW, self.origin))
        return Verdict(None, self.rules.crawl_delay(AGENT) or 0.0)


def text_of(content: bytes) -> str:
    """The text of a robots.txt: a byte order mark would hide its first line from the parser, a NUL the rest."""
    return content.decode("utf-8-sig", "replace").replace("\0", "")


def _unreachable(value: str) -> TransferError:
    return TransferError(Reason.ROBOTS_UNREACHABLE, value, may_pass=True)


def _as_error(reason: Reason, value: str, pause_s: float) -> TransferError:
    """What a URL of the origin ends as, for now; asking again is worth it when the origin is asked again."""
    is_network = reason in (Reason.DNS, Reason.CONNECT, Reason.TIMEOUT)
    may_pass = reason not in _OF_THE_HOST and value != "no such host"
    return TransferError(
        reason, value, may_pass=may_pass, is_network=is_network, retry_after_s=max(0.0, pause_s) if may_pass else None
    )
