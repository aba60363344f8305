"""One hop: one request, to the body of its answer or to the URL it redirects to; each way to fail has a `Reason`.

Small bodies are free; a larger one is read on only when there is memory for all that it may become, out of a budget
that all bodies share. So many servers at once can send what they like: what is held is bounded by connections × 128 KiB
and the budget.
"""

from __future__ import annotations

import asyncio
import re
import resource
import socket
import ssl
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urljoin

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from curate.config import FetchConfig
from curate.fetch.budget import Budget
from curate.fetch.coding import ContentCoding
from curate.fetch.failures import TransferError, failure
from curate.fetch.guard import Guard, GuardedResolver
from curate.fetch.manners import MAY_PASS, opt_out, retry_after_s
from curate.images import SNIFF_BYTES, refusal
from curate.ledger import Reason

T = TypeVar("T")
CLOSE = {"Connection": "close"}
REDIRECTS = frozenset({301, 302, 303, 307, 308})
SMALL_BYTES = 128 << 10
BODIES_BYTES = 24 << 20
# An idle connection costs a socket and, with TLS, about 50 kB.
KEEP_ALIVE_S = 5.0
ACCEPT = "image/jpeg, image/png, image/webp, image/gif, image/*;q=0.5, */*;q=0.1"
# Wanted here because redirects to signed storage are long; aiohttp's own limit is 8190.
MAX_HEADER_BYTES = 16_384
# RFC 3986: what may stand in a path and in a query as it is, beside letters, digits and escapes.
_IN_PATH = "-._~!$&'()*+,;=:@/"
_IN_QUERY = f"{_IN_PATH}?"
_NO_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")
_ESCAPE_OF_A_LETTER = re.compile("%(?:2[DEde]|3[0-9]|[46][1-9A-Fa-f]|5[0-9AFaf]|7[0-9AEae])")


@dataclass(frozen=True, slots=True)
class Body:
    """What a server or a file gave: the bytes, content encoding undone."""

    content: bytes
    http_status: int | None


@dataclass(frozen=True, slots=True)
class Page:
    """A page of text: status, content, where it redirects to, and what its Retry-After asks for in seconds."""

    http_status: int
    content: bytes
    redirect: URL | None = None
    retry_after_s: float | None = None


def tls_context() -> ssl.SSLContext:
    """The system's certificates, hosts checked; made once a session, because it takes 20 ms."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def allow_open_files(wanted: int) -> None:
    """Raise this process's limit of open files, often 1,024, towards `wanted`, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_session(config: FetchConfig, resolver: AbstractResolver | None = None) -> aiohttp.ClientSession:
    """A session whose every connection passes the guard, with keep-alive, a DNS cache, no cookies and no proxy.

    Args:
        config: the guard's networks, and the user agent.
        resolver: what looks names up; the system's by default.
    """
    guard = Guard.allowing(config.allow_addresses)
    # The total is the Deadline's, so that what is spent waiting for memory can be taken out of it.
    timeout = aiohttp.ClientTimeout(total=None, connect=config.connect_timeout_s, sock_read=config.read_timeout_s)
    connector = aiohttp.TCPConnector(
        limit=0,  # the frontier counts
        keepalive_timeout=KEEP_ALIVE_S,
        ssl=tls_context(),
        ttl_dns_cache=300,
        resolver=GuardedResolver(guard, resolver or aiohttp.ThreadedResolver()),
        socket_factory=guard.socket,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        # Decompression is ours, with a limit; and a proxy would connect where the guard does not see it.
        auto_decompress=False,
        trust_env=False,
        timeout=timeout,
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
        headers={"User-Agent": config.user_agent, "Accept": ACCEPT, "Accept-Encoding": "identity"},
    )


class Transfer:
    """One request at a time of many: what a URL answers, within the limits of a `FetchConfig`.

    Whose turn it is, robots.txt, redirects and retries are not decided here.
    """

    def __init__(self, session: aiohttp.ClientSession, config: FetchConfig) -> None:
        self.session, self.config = session, config
        self._bodies = Budget(BODIES_BYTES)

    async def hop(
        self, target: URL, left_s: float, use: Callable[[Body], Awaitable[T]], *, is_last: bool = False
    ) -> T | URL:
        """What `use` makes of the body, or the URL that the answer redirects to.

        Args:
            target: as `parse_target` gives it.
            left_s: seconds for the answer, body included; a wait for memory to hold the body does not count.
            use: its work on the body is not timed; the body counts against the memory until it is done.
            is_last: whether no other request to the host is in sight; the connection is then not kept open. A list of
                many hosts would else leave thousands of them behind.

        Raises:
            TransferError: neither came.
        """
        status = None
        async with AsyncExitStack() as held:
            try:
                async with Deadline(left_s) as deadline, self._get(target, is_last) as response:
                    status = response.status
                    if status in REDIRECTS:
                        return redirect_target(response)
                    self._check_head(response)
                    body = Body(await self._read(response, held, deadline), status)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
                raise failure(error, status) from error
            return await use(body)

    async def page(self, target: URL, left_s: float, limit: int) -> Page:
        """The status, and the first `limit` bytes, of a page of text: robots.txt.

        Raises:
            TransferError: no answer, or a body that cannot be read.
        """
        status = None
        try:
            async with Deadline(left_s), self._get(target, False) as response:
                status = response.status
                if status in REDIRECTS:
                    return Page(status, b"", redirect_target(response))
                coding, content = ContentCoding(response.headers.get("Content-Encoding", ""), limit), bytearray()
                async with AsyncExitStack() as held:
                    pieces = _pieces(response, coding, partial(self._hold, held))
                    await held.enter_async_context(aclosing(pieces))
                    async for piece in pieces:
                        content += piece
                        if len(content) >= limit:
                            break
                wait_s = retry_after_s(response.headers.get("Retry-After"), datetime.now(timezone.utc))
                return Page(status, bytes(content[:limit]), None, wait_s)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            raise failure(error, status) from error

    def _get(self, target: URL, is_last: bool) -> Any:
        return self.session.get(target, allow_redirects=False, headers=CLOSE if is_last else None)

    def _check_head(self, response: aiohttp.ClientResponse) -> None:
        headers = response.headers
        if response.status != 200:
            raise TransferError(
                Reason.HTTP_STATUS,
                str(response.status),
                http_status=response.status,
                may_pass=response.status in MAY_PASS,
                retry_after_s=retry_after_s(headers.get("Retry-After"), datetime.now(timezone.utc)),
            )
        tags, tdm = headers.getall("X-Robots-Tag", ()), headers.getall("TDM-Reservation", ())
        said = opt_out(tags, tdm, self.config.ignore_opt_outs)
        if said:
            raise TransferError(Reason.OPT_OUT, said, http_status=200)
        if (response.content_length or 0) > self.config.max_bytes:
            raise TransferError(Reason.TOO_LARGE, f"{response.content_length} bytes", http_status=200)

    async def _read(self, response: aiohttp.ClientResponse, held: AsyncExitStack, deadline: Deadline) -> bytes:
        """The body, decoded; given up at once when it is too large or begins like no image.

        A body that is, or becomes, large waits until there is memory for all that it may be.
        """
        most = self.config.max_bytes
        coding = ContentCoding(response.headers.get("Content-Encoding", ""), most)
        if coding.plain and 0 < (response.content_length or 0) <= min(SMALL_BYTES, most):
            small = await response.content.read()  # no larger than it says: the parser sees to that
            _check_start(small, response)
            return small
        body, sniffed, has_memory = bytearray(), False, False

        async def hold(size: int) -> None:
            nonlocal has_memory
            if not has_memory:
                has_memory = True
                await deadline.not_counting(self._hold(held, size))

        pieces = await held.enter_async_context(aclosing(_pieces(response, coding, hold)))
        async for piece in pieces:
            body += piece
            if not sniffed and len(body) >= SNIFF_BYTES:
                sniffed = True
                _check_start(body, response)
            size = max(len(body), response.content.total_bytes)
            if size > most:
                raise TransferError(Reason.TOO_LARGE, f"over {most} bytes", http_status=200)
            if max(size, response.content_length or 0) > SMALL_BYTES:
                known = response.content_length if coding.plain else None
                await hold(known or most)
        if not body:
            raise TransferError(Reason.EMPTY_BODY, http_status=200)
        return bytes(body)

    async def _hold(self, held: AsyncExitStack, size: int) -> None:
        await held.enter_async_context(self._bodies.hold(size))


async def _pieces(
    response: aiohttp.ClientResponse, coding: ContentCoding, hold: Callable[[int], Awaitable[None]]
) -> AsyncGenerator[bytes, None]:
    """The body as it comes, decoded, in pieces that need no budget; `hold` waits for what it takes to unpack them."""
    async for chunk in response.content.iter_any():
        for piece in coding.pieces(chunk):
            yield piece
    if coding.takes_memory:
        await hold(BODIES_BYTES)
    for piece in coding.rest():
        yield piece


def _check_start(body: bytes | bytearray, response: aiohttp.ClientResponse) -> None:
    """Raise TransferError if the body begins like no image; what is too short to tell is the decoder's to refuse."""
    if len(body) >= SNIFF_BYTES and (refused := refusal(body, response.content_type)):
        raise TransferError(refused.reason, refused.value, http_status=200)


class Deadline:
    """An `async with` block that may take so many seconds, less what it spends in `not_counting`.

    Raises:
        asyncio.TimeoutError: it took longer.
    """

    def __init__(self, seconds: float) -> None:
        self.left_s = seconds
        self._expired = False

    async def __aenter__(self) -> Deadline:
        self._task = asyncio.current_task()
        self._start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._timer.cancel()
        if self._expired and isinstance(error, asyncio.CancelledError):
            if sys.version_info >= (3, 11):
                assert self._task
                self._task.uncancel()
            raise asyncio.TimeoutError from error

    async def not_counting(self, wait: Awaitable[T]) -> T:
        """Wait while the clock stands still."""
        loop = asyncio.get_running_loop()
        self.left_s = max(0.0, self._timer.when() - loop.time())
        self._timer.cancel()
        try:
            return await wait
        finally:
            self._start()

    def _start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.left_s, self._expire)

    def _expire(self) -> None:
        self._expired = True
        if self._task:
            self._task.cancel()


async def reach(address: tuple[str, int], guard: Guard, timeout_s: float) -> None:
    """Look a host up afresh and connect to it, as the guard allows; the connection is closed at once.

    Raises:
        OSError, asyncio.TimeoutError: it cannot be reached.
    """
    host, port = address

    async def connect() -> None:
        loop = asyncio.get_running_loop()
        # A thread of its own: those that look up names for requests may all hang on names that nobody answers for.
        thread = ThreadPoolExecutor(1, thread_name_prefix="probe")
        try:
            found = await loop.run_in_executor(thread, partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
        finally:
            thread.shutdown(wait=False)
        for place in found:
            with suppress(OSError), guard.socket(place) as opened:
                opened.setblocking(False)
                await loop.sock_connect(opened, place[4])
                return
        raise OSError(f"{host} cannot be reached")

    await asyncio.wait_for(connect(), timeout_s)


def parse_target(text: str) -> URL:
    """A URL that may be asked for: http or https, with a host; user name, password and fragment are taken off.

    What is escaped stays escaped: `%2F` in a query is not `/` to who signed it.

    Raises:
        TransferError: it is none.
    """
    try:
        url, written = URL(text.strip()), URL(text.strip(), encoded=True)
        path, query = _escaped(written.raw_path, _IN_PATH), _escaped(written.raw_query_string, _IN_QUERY)
    except ValueError as error:
        raise TransferError(Reason.BAD_URL, "not a URL") from error  # its own words may quote a password
    if url.scheme not in ("http", "https") and url.scheme:
        raise TransferError(Reason.BLOCKED_SCHEME, url.scheme)
    if not url.scheme or not url.raw_host:
        raise TransferError(Reason.BAD_URL, "no scheme" if not url.scheme else "no host")
    return URL(f"{url.origin()}{_without_dots(path)}{'?' if query else ''}{query}", encoded=True)


def _escaped(part: str, legal: str) -> str:
    """A part of a URL in which what may not stand there is escaped, and no letter, digit or one of `-._~` is.

    Bytes of a header that are not UTF-8 are sent back as they came.
    """
    escaped = quote(_NO_ESCAPE.sub("%25", part), safe=f"{legal}%", errors="surrogateescape")
    return _ESCAPE_OF_A_LETTER.sub(lambda found: chr(int(found[0][1:], 16)), escaped)


def _without_dots(path: str) -> str:
    """The path that one with `.` and `..` in it means."""
    kept: list[str] = []
    for segment in path.split("/"):
        if segment not in (".", ".."):
            kept.append(segment)
        elif segment == ".." and len(kept) > 1:
            kept.pop()
    return "/".join([*kept, ""] if path.endswith(("/.", "/..")) else kept)


def redirect_target(response: aiohttp.ClientResponse) -> URL:
    """Where a redirect points, checked like any URL.

    Raises:
        TransferError: nowhere, or where no request may go.
    """
    location = response.headers.get("Location", "").strip()
    if not location:
        raise TransferError(Reason.BAD_RESPONSE, "redirect without Location", http_status=response.status)
    try:
        return parse_target(urljoin(str(response.url), location))
    except ValueError as error:
        raise TransferError(Reason.BAD_RESPONSE, "redirect to no URL", http_status=response.status) from error
