"""robots.txt as RFC 9309 asks: read once an origin by all workers together, kept for a day, unreachable means no.

An origin is scheme, host and port. What its robots.txt says lies in a small database in the dataset's folder, which the
workers and later runs share. Who reads a file holds a lock for its origin meanwhile, which the kernel gives back when
its holder dies; the others wait for the entry.

What the answer means:

| answer | meaning |
|---|---|
| 2xx | its rules; a web page instead of rules has none |
| up to five redirects | the answer they end in, each target checked as any URL; more of them: no rules |
| 4xx but 429 | no rules |
| 429, 5xx, any other status, a broken answer | nothing may be fetched until it can be read |
| no connection, no address | that, for every URL of the origin |

What could not be read is asked for again, less and less often.

Of the rules only the group that means us is kept, and handed to Protego; the rest of a robots.txt is nobody's memory.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from protego import Protego
from yarl import URL

from curate.config import AGENT
from curate.fetch.failures import TransferError
from curate.fetch.origins import KEPT_S, open_origins
from curate.fetch.transfer import Page
from curate.ledger import Reason

# RFC 9309, 2.5: at least the first 500 kibibytes must be read.
MOST_BYTES = 500 << 10
MOST_REDIRECTS = 5
# An origin that cannot be read is asked again after a first pause, then after four times as long, up to this.
LONGEST_PAUSE_S = 3600.0
# Characters of rules that are held parsed, which takes up to a hundred times as many bytes, and what an entry costs.
PARSED_CHARACTERS, ENTRY_CHARACTERS = 512 << 10, 128
LOOK_EVERY_S = 0.05
# What is wrong with the host itself, whichever of its pages is asked for.
_OF_THE_HOST = (Reason.BAD_URL, Reason.BLOCKED_ADDRESS, Reason.TLS)
# No server was reached.
_OF_THE_NETWORK = (Reason.DNS, Reason.CONNECT, Reason.TIMEOUT)
_AGENT_LINE = re.compile(r"user[\s-]?agent\s*[:\s]\s*(.*)", re.IGNORECASE)
# Said of the whole site; stands between the lines of a group without ending it.
_SITE_LINE = re.compile(r"(sitemap|site-map|host)\s*[:\s]", re.IGNORECASE)
_TOKEN = re.compile(r"[a-z_-]*")


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
        read: gives the page at a URL, without following redirects, or raises TransferError or TimeoutError; the second
            argument is the host whose turn the asker holds.
        first_pause_s: how long an origin that cannot be read is left alone at first.
    """

    def __init__(self, path: Path, read: Callable[[URL, str], Awaitable[Page]], first_pause_s: float = 5.0) -> None:
        self._db = open_origins(path)
        self._locks = os.open(path.with_name(f"{path.name}-lock"), os.O_RDWR | os.O_CREAT, 0o644)
        self._read, self._first_pause_s = read, first_pause_s
        self._known: OrderedDict[str, _Entry] = OrderedDict()
        self._characters = 0
        self._asking: dict[str, asyncio.Task[_Entry]] = {}

    async def verdict(self, target: URL) -> Verdict:
        """Whether `target` may be fetched; reads its origin's robots.txt if nobody has lately."""
        origin = str(target.origin())
        entry = self._known.get(origin)
        if entry is None or entry.until <= time.time():
            entry = await self._entry(origin)
            self._remember(entry)
        return entry.verdict(target)

    def forget_unreached(self) -> None:
        """After an outage: ask anew where no server was reached, as if nobody had tried."""
        marks = ", ".join("?" * len(_OF_THE_NETWORK))
        self._db.execute(f"DELETE FROM origins WHERE reason IN ({marks})", [reason.value for reason in _OF_THE_NETWORK])
        for origin in [origin for origin, entry in self._known.items() if entry.reason in _OF_THE_NETWORK]:
            self._characters -= self._known.pop(origin).size

    async def close(self) -> None:
        """End what is being read and close the database."""
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        self._db.close()
        os.close(self._locks)

    def _remember(self, entry: _Entry) -> None:
        old = self._known.pop(entry.origin, None)
        self._known[entry.origin] = entry
        self._characters += entry.size - (old.size if old else 0)
        while self._characters > PARSED_CHARACTERS and len(self._known) > 1:
            self._characters -= self._known.popitem(last=False)[1].size

    async def _entry(self, origin: str) -> _Entry:
        """The entry of an origin, of the database or new; asked for once however many tasks wait for it."""
        task = self._asking.get(origin)
        if task is None:
            task = self._asking[origin] = asyncio.create_task(self._found_or_read(origin))
            task.add_done_callback(lambda _: self._asking.pop(origin))
        return await asyncio.shield(task)

    async def _found_or_read(self, origin: str) -> _Entry:
        while True:
            if found := self._find(origin):
                return found
            with self._claim(origin) as is_ours:
                if is_ours:
                    return self._find(origin) or await self._ask(origin)
            await asyncio.sleep(LOOK_EVERY_S)

    def _find(self, origin: str) -> _Entry | None:
        found = self._db.execute(
            "SELECT until, rules, reason, value FROM origins WHERE origin = ? AND until > ?", (origin, time.time())
        ).fetchone()
        return _Entry.of(origin, *found) if found else None

    @contextmanager
    def _claim(self, origin: str) -> Iterator[bool]:
        """Whether the origin is ours to read: a lock on one byte, at the hash of its name, of a file with none."""
        place = int.from_bytes(hashlib.blake2b(origin.encode(), digest_size=8).digest(), "big") >> 2
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)

    async def _ask(self, origin: str) -> _Entry:
        rules, error = None, None
        try:
            rules = await self._rules(URL(origin).with_path("/robots.txt"))
        except TransferError as failed:
            error = failed
        before = self._db.execute("SELECT tries FROM origins WHERE origin = ?", (origin,)).fetchone()
        tries = before[0] if before else 0
        pause_s = KEPT_S if error is None else self._pause_s(tries, error)
        until, (reason, value) = time.time() + pause_s, (error.reason.value, error.value) if error else (None, None)
        self._db.execute(
            "INSERT OR REPLACE INTO origins (origin, until, tries, rules, reason, value) VALUES (?, ?, ?, ?, ?, ?)",
            (origin, until, tries + 1 if error else 0, rules, reason, value),
        )
        return _Entry.of(origin, until, rules, reason, value)

    def _pause_s(self, tries: int, error: TransferError) -> float:
        ours_s = self._first_pause_s * 4.0 ** min(tries, 20)
        return min(LONGEST_PAUSE_S, max(ours_s, error.retry_after_s or 0.0))

    async def _rules(self, target: URL) -> str | None:
        """The rules for us; None if there are none.

        Raises:
            TransferError: they cannot be read: ROBOTS_UNREACHABLE, or why no server was reached.
        """
        host = target.raw_host or ""
        for _ in range(MOST_REDIRECTS + 1):
            try:
                page = await self._read(target, host)
            except TransferError as error:
                if error.is_network or error.reason in _OF_THE_HOST:
                    raise
                raise _unreachable(f"{error.reason.value} {error.value}".strip()) from error
            except asyncio.TimeoutError as error:
                raise _unreachable(f"{target.raw_host}: its turn did not come") from error
            if page.redirect is not None:
                target = page.redirect
            elif 200 <= page.http_status < 300:
                return rules_for_us(text_of(page.content)) or None
            elif 400 <= page.http_status < 500 and page.http_status != 429:
                return None
            else:
                raise _unreachable(f"http status {page.http_status}", page.retry_after_s)
        return None


@dataclass(frozen=True, slots=True)
class _Entry:
    origin: str
    until: float
    rules: Protego | None
    size: int
    reason: Reason | None
    value: str

    @classmethod
    def of(cls, origin: str, until: float, rules: str | None, reason: str | None, value: str | None) -> _Entry:
        """From the columns of the database."""
        parsed = Protego.parse(f"User-agent: *\n{rules}") if rules else None
        size = ENTRY_CHARACTERS + len(rules or "")
        return cls(origin, until, parsed, size, Reason(reason) if reason else None, value or "")

    def verdict(self, target: URL) -> Verdict:
        if self.reason is not None:
            return Verdict(_as_error(self.reason, self.value, self.until - time.time()))
        if self.rules is None:
            return ALLOWED
        if not self.rules.can_fetch(str(target), AGENT):
            return Verdict(TransferError(Reason.ROBOTS_DISALLOW, self.origin))
        return Verdict(None, self.rules.crawl_delay(AGENT) or 0.0)


def text_of(content: bytes) -> str:
    """The text of a robots.txt: a byte order mark would hide its first line from the parser, a NUL the rest.

    What was cut at the size limit loses its last line: half of `Disallow: /private` would forbid everything.
    """
    if len(content) >= MOST_BYTES:
        content = content[: content.rfind(b"\n") + 1]
    return content.decode("utf-8-sig", "replace").replace("\0", "")


def rules_for_us(text: str) -> str:
    """The lines of the groups that mean us, or else of those that mean everybody; without their `User-agent` lines.

    A group is one or more `User-agent` lines and what follows up to the next ones (RFC 9309, 2.2.1). Protego alone
    would keep the rules of each agent that is named with them: with fifteen thousand agents and as many rules, all of
    the memory there is.
    """
    ours: dict[str, list[str]] = {}
    agents: set[str] = set()
    is_naming = False
    for raw in text.splitlines():
        line = raw.partition("#")[0].strip()
        if not line or _SITE_LINE.match(line):
            continue
        if named := _AGENT_LINE.match(line):
            if not is_naming:
                agents.clear()
            is_naming = True
            agent = _agent(named[1])
            if agent in (AGENT, "*"):
                agents.add(agent)
                ours.setdefault(agent, [])
            continue
        is_naming = False
        for agent in agents:
            ours[agent].append(line)
    return "\n".join(ours.get(AGENT, ours.get("*", [])))


def _agent(value: str) -> str:
    """The product token of a `User-agent` line, in small letters; `*` for everybody."""
    value = value.strip().lower()
    token = _TOKEN.match(value)
    return "*" if value.startswith("*") else token[0] if token else ""


def _unreachable(value: str, retry_after_s: float | None = None) -> TransferError:
    return TransferError(Reason.ROBOTS_UNREACHABLE, value, may_pass=True, retry_after_s=retry_after_s)


def _as_error(reason: Reason, value: str, pause_s: float) -> TransferError:
    """What a URL of the origin ends as, for now; asking again is worth it when the origin is asked again."""
    is_network = reason in _OF_THE_NETWORK
    may_pass = reason not in _OF_THE_HOST and value != "no such host"
    return TransferError(
        reason, value, may_pass=may_pass, is_network=is_network, retry_after_s=max(0.0, pause_s) if may_pass else None
    )
