"""One URL to one body: requests, redirects, limits, retries; every way it can fail has a `Reason`.

A *try* is a chain of hops, one request each. A hop waits for its host's turn first and for a connection second, and
gives both back before the next hop, so that no slow host takes all connections and no two hosts that redirect to each
other lock up. The body is used up (decoded, stored) while the connection is held: at most `connections` bodies exist
at once. Of bodies above LARGE_BYTES only LARGE_AT_ONCE grow at once, which bounds the memory by connections × 1 MiB +
16 × max_bytes.
"""

from __future__ import annotations

import asyncio
import socket
import time
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TypeVar

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from curate.config import FetchConfig
from curate.fetch.guard import BlockedAddress, Guard, GuardedResolver
from curate.fetch.manners import MAY_PASS, backoff_after, opt_out, retry_after_s
from curate.images import SNIFF_BYTES, Rejected, sniff
from curate.ledger import Reason

T = TypeVar("T")
REDIRECTS = frozenset({301, 302, 303, 307, 308})
LARGE_BYTES = 1 << 20
LARGE_AT_ONCE = 16
ACCEPT = "image/jpeg, image/png, image/webp, image/gif, image/*;q=0.5, */*;q=0.1"
# Wanted here because redirects to signed storage are long; aiohttp's own limit is 8190.
MAX_HEADER_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class Body:
    """What a server gave: the bytes, content encoding undone."""

    content: bytes
    http_status: int


class TransferError(Rejected):
    """A URL that gave no body.

    Attributes:
        reason, value: as in the ledger.
        http_status: of the last response, if there was one.
        may_pass: whether another try can help.
        retry_after_s: what the server asked to wait, in seconds.
    """

    def __init__(
        self,
        reason: Reason,
        value: str = "",
        *,
        http_status: int | None = None,
        may_pass: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason, value)
        self.http_status = http_status
        self.may_pass = may_pass
        self.retry_after_s = retry_after_s


def open_session(config: FetchConfig, resolver: AbstractResolver | None = None) -> aiohttp.ClientSession:
    """A session whose every connection passes the guard, with keep-alive, a DNS cache, no cookies and no proxy.

    Args:
        config: the guard's networks, and the user agent.
        resolver: what looks names up; the system's by default.
    """
    guard = Guard.allowing(config.allow_addresses)
    connector = aiohttp.TCPConnector(
        limit=0,  # the Fetcher counts
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
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
        headers={"User-Agent": config.user_agent, "Accept": ACCEPT, "Accept-Encoding": "identity"},
    )


class Fetcher:
    """Gets bodies within the limits of a `FetchConfig`; one for all requests of a process at a time."""

    def __init__(self, session: aiohttp.ClientSession, config: FetchConfig) -> None:
        self.session, self.config = session, config
        self._connections = asyncio.Semaphore(config.connections)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._hosts: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(config.per_host))

    async def fetch(self, url: str, key: str, use: Callable[[Body], Awaitable[T]]) -> T:
        """What `use` makes of the body of a URL; the body counts against the limits until `use` is done.

        Args:
            url: as it stands in the list; spaces and non-ASCII letters are quoted.
            key: the row's, for the jitter.
            use: called once, with the body of the try that succeeded.

        Raises:
            TransferError: no body, after all tries.
        """
        attempt = 0
        while True:
            try:
                return await self._try(parse_target(url), use)
            except TransferError as error:
                wait_s = backoff_after(attempt, self.config.backoff_s, key)
                if error.retry_after_s is not None:
                    wait_s = error.retry_after_s
                too_long = wait_s > self.config.max_retry_after_s and error.retry_after_s is not None
                if not error.may_pass or too_long or attempt == self.config.retries:
                    raise
            attempt += 1
            await asyncio.sleep(wait_s)

    async def _try(self, target: URL, use: Callable[[Body], Awaitable[T]]) -> T:
        left_s = self.config.total_timeout_s
        for _ in range(self.config.max_redirects + 1):
            async with self._hosts[target.raw_host or ""], self._connections, AsyncExitStack() as held:
                started = time.monotonic()
                answer = await self._request(target, left_s, held)
                if isinstance(answer, Body):
                    return await use(answer)
            left_s -= time.monotonic() - started
            target = answer
        raise TransferError(Reason.TOO_MANY_REDIRECTS, str(self.config.max_redirects))

    async def _request(self, url: URL, left_s: float, held: AsyncExitStack) -> Body | URL:
        """The body, or where it is said to be. For a large body, leave to hold it is taken into `held`."""
        timeout = aiohttp.ClientTimeout(
            total=max(left_s, 0.001),  # 0 would mean no limit
            connect=self.config.connect_timeout_s,
            sock_read=self.config.read_timeout_s,
        )
        status = None
        try:
            async with self.session.get(url, timeout=timeout, allow_redirects=False) as response:
                status = response.status
                if status in REDIRECTS:
                    return redirect_target(response)
                self._check_head(response)
                return Body(await self._read(response, held), status)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            raise failure(error, status) from error

    def _check_head(self, response: aiohttp.ClientResponse) -> None:
        if response.status != 200:
            raise TransferError(
                Reason.HTTP_STATUS,
                str(response.status),
                http_status=response.status,
                may_pass=response.status in MAY_PASS,
                retry_after_s=retry_after_s(response.headers.get("Retry-After"), datetime.now(timezone.utc)),
            )
        directive = opt_out(response.headers.getall("X-Robots-Tag", ()), self.config.user_agent)
        if directive and directive not in self.config.ignore_opt_outs:
            raise TransferError(Reason.OPT_OUT, directive, http_status=200)
        if (response.content_length or 0) > self.config.max_bytes:
            raise TransferError(Reason.TOO_LARGE, f"{response.content_length} bytes", http_status=200)

    async def _read(self, response: aiohttp.ClientResponse, held: AsyncExitStack) -> bytes:
        """The body, decoded; given up at once when it is too large or begins like no image."""
        coding = ContentCoding(response.headers.get("Content-Encoding", ""))
        body, on_wire, sniffed, has_leave = bytearray(), 0, False, False
        async for chunk in response.content.iter_any():
            on_wire += len(chunk)
            body += coding.decode(chunk, room=self.config.max_bytes - len(body))
            if max(len(body), on_wire) > self.config.max_bytes:
                raise TransferError(Reason.TOO_LARGE, f"over {self.config.max_bytes} bytes", http_status=200)
            if not sniffed and len(body) >= SNIFF_BYTES:
                sniffed = True
                if sniff(body) is None:
                    raise TransferError(Reason.NOT_AN_IMAGE, response.content_type, http_status=200)
            if not has_leave and max(len(body), response.content_length or 0) > LARGE_BYTES:
                await held.enter_async_context(self._large)
                has_leave = True
        if not coding.complete:
            raise TransferError(Reason.BROKEN_TRANSFER, "content encoding ends early", http_status=200, may_pass=True)
        if not body:
            raise TransferError(Reason.EMPTY_BODY, http_status=200)
        return bytes(body)


class ContentCoding:
    """Undoes the Content-Encoding of servers that compress although asked for `identity`."""

    def __init__(self, header: str) -> None:
        self.name = header.strip().lower()
        if self.name not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise TransferError(Reason.BAD_RESPONSE, f"content-encoding {self.name}", http_status=200)
        self._inflate = None if self.name in ("", "identity") else zlib.decompressobj(wbits=47)  # 47: gzip or zlib
        self._started = False

    @property
    def complete(self) -> bool:
        """Whether the encoded stream has come to its end."""
        return self._inflate is None or self._inflate.eof or not self._started

    def decode(self, chunk: bytes, room: int) -> bytes:
        """The decoded bytes of a chunk, at most one more than there is room for."""
        if not self._started and sniff(chunk) is not None:
            self._inflate = None  # says that it is encoded, and is not
        self._started = True
        if self._inflate is None:
            return chunk
        try:
            return self._inflate.decompress(chunk, room + 1)
        except zlib.error as error:
            raise TransferError(
                Reason.BAD_RESPONSE, f"content-encoding {self.name}: {error}", http_status=200
            ) from error


def parse_target(text: str) -> URL:
    """A URL that may be asked for: http or https, with a host; user name, password and fragment are taken off.

    Raises:
        TransferError: it is none.
    """
    try:
        url = URL(text.strip())
    except ValueError as error:
        raise TransferError(Reason.BAD_URL, str(error)) from error
    if url.scheme not in ("http", "https") and url.scheme:
        raise TransferError(Reason.BLOCKED_SCHEME, url.scheme)
    if not url.scheme or not url.raw_host:
        raise TransferError(Reason.BAD_URL, "no scheme" if not url.scheme else "no host")
    return url.with_user(None).with_fragment(None)


def redirect_target(response: aiohttp.ClientResponse) -> URL:
    """Where a redirect points, checked like any URL.

    Raises:
        TransferError: nowhere, or where no request may go.
    """
    location = response.headers.get("Location", "").strip()
    if not location:
        raise TransferError(Reason.BAD_RESPONSE, "redirect without Location", http_status=response.status)
    try:
        return parse_target(str(response.url.join(URL(location))))
    except ValueError as error:
        raise TransferError(Reason.BAD_RESPONSE, "redirect to no URL", http_status=response.status) from error


def failure(error: Exception, status: int | None) -> TransferError:
    """What an exception of aiohttp, the socket or the resolver means for a row."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, BlockedAddress):
        return TransferError(Reason.BLOCKED_ADDRESS, cause.address, http_status=status)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        unknown = error.os_error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
        return TransferError(Reason.DNS, "no such host" if unknown else _words(cause), may_pass=not unknown)
    if isinstance(error, aiohttp.ClientSSLError):
        return TransferError(Reason.TLS, _words(cause))
    if isinstance(error, asyncio.TimeoutError):
        return TransferError(Reason.TIMEOUT, _phase(error), http_status=status, may_pass=True)
    if isinstance(error, aiohttp.ClientConnectorError):
        return TransferError(Reason.CONNECT, _words(cause), may_pass=True)
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ClientConnectionError | OSError):
        where = "before the answer" if status is None else "in the body"
        return TransferError(Reason.BROKEN_TRANSFER, where, http_status=status, may_pass=True)
    if isinstance(error, aiohttp.ClientError) and not isinstance(error, aiohttp.InvalidURL):
        message = str(getattr(error, "message", "")) or type(error).__name__
        return TransferError(Reason.BAD_RESPONSE, message.splitlines()[0].rstrip(":"), http_status=status)
    return TransferError(Reason.BAD_URL, type(error).__name__)


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


def _phase(error: BaseException) -> str:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return "connect"
    return "read" if isinstance(error, aiohttp.SocketTimeoutError) else "total"
