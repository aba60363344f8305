"""One hop: one request, to the body of its answer or to the URL it redirects to; each way to fail has a `Reason`.

Small bodies are free; a larger one is read on only when there is memory for all that it may become, out of a budget
that all bodies share. So many servers at once can send what they like: what is held is bounded by connections × 128 KiB
and the budget.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import sys
import zlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any, TypeVar

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from curate.config import FetchConfig
from curate.fetch.budget import Budget
from curate.fetch.guard import BlockedAddress, Guard, GuardedResolver
from curate.fetch.manners import MAY_PASS, opt_out, retry_after_s
from curate.images import SNIFF_BYTES, Rejected, refusal, sniff
from curate.ledger import Reason

T = TypeVar("T")
CLOSE = {"Connection": "close"}
REDIRECTS = frozenset({301, 302, 303, 307, 308})
SMALL_BYTES = 128 << 10
BODIES_BYTES = 24 << 20
# An idle connection costs a socket and, with TLS, about 50 kB.
KEEP_ALIVE_S = 5.0
ZLIB = 8  # the low half of the first byte of zlib's frame
ACCEPT = "image/jpeg, image/png, image/webp, image/gif, image/*;q=0.5, */*;q=0.1"
# Wanted here because redirects to signed storage are long; aiohttp's own limit is 8190.
MAX_HEADER_BYTES = 16_384


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


class TransferError(Rejected):
    """A URL that gave no body.

    Attributes:
        reason, value: as in the ledger.
        http_status: of the last response, if there was one.
        may_pass: whether another try can help.
        retry_after_s: what the server asked to wait, in seconds.
        is_network: whether no server was reached at all, which may be the network's fault and not the URL's.
    """

    def __init__(
        self,
        reason: Reason,
        value: str = "",
        *,
        http_status: int | None = None,
        may_pass: bool = False,
        retry_after_s: float | None = None,
        is_network: bool = False,
    ) -> None:
        super().__init__(reason, value)
        self.is_network = is_network
        self.http_status = http_status
        self.may_pass = may_pass
        self.retry_after_s = retry_after_s


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
                coding, content = ContentCoding(response.headers.get("Content-Encoding", "")), bytearray()
                async for chunk in response.content.iter_any():
                    content += coding.decode(chunk, room=limit - len(content))
                    if len(content) >= limit:
                        break
                else:
                    coding.check_complete()
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
        coding = ContentCoding(response.headers.get("Content-Encoding", ""))
        most = self.config.max_bytes
        if coding.plain and 0 < (response.content_length or 0) <= min(SMALL_BYTES, most):
            small = await response.content.read()  # no larger than it says: the parser sees to that
            _check_start(small, response)
            return small
        body, on_wire, sniffed, has_memory = bytearray(), 0, False, False
        async for chunk in response.content.iter_any():
            on_wire += len(chunk)
            body += coding.decode(chunk, room=most - len(body))
            if not sniffed and len(body) >= SNIFF_BYTES:
                sniffed = True
                _check_start(body, response)
            if max(len(body), on_wire) > most:
                raise TransferError(Reason.TOO_LARGE, f"over {most} bytes", http_status=200)
            if not has_memory and max(len(body), response.content_length or 0) > SMALL_BYTES:
                known = response.content_length if coding.plain else None
                await deadline.not_counting(held.enter_async_context(self._bodies.hold(known or most)))
                has_memory = True
        coding.check_complete()
        if not body:
            raise TransferError(Reason.EMPTY_BODY, http_status=200)
        return bytes(body)


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


class ContentCoding:
    """Undoes the Content-Encoding of servers that compress although asked for `identity`."""

    def __init__(self, header: str) -> None:
        self.name = header.strip().lower()
        if self.name not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise TransferError(Reason.BAD_RESPONSE, f"content-encoding {self.name}", http_status=200)
        self._inflate = None if self.name in ("", "identity") else zlib.decompressobj(wbits=47)  # 47: gzip or zlib
        self._started = False

    @property
    def plain(self) -> bool:
        """Whether the bytes on the wire are the body's own, so that Content-Length is its length."""
        return self._inflate is None

    def check_complete(self) -> None:
        """Do nothing if the encoded stream has come to its end.

        Raises:
            TransferError: it has not.
        """
        if self._inflate is not None and self._started and not self._inflate.eof:
            raise TransferError(Reason.BROKEN_TRANSFER, "content encoding ends early", http_status=200, may_pass=True)

    def decode(self, chunk: bytes, room: int) -> bytes:
        """The decoded bytes of a chunk, at most one more than there is room for.

        Raises:
            TransferError: it is not encoded as it says.
        """
        if not self._started and self._inflate is not None:
            if sniff(chunk) is not None:
                self._inflate = None  # says that it is encoded, and is not
            elif self.name == "deflate" and chunk[0] & 0x0F != ZLIB:
                self._inflate = zlib.decompressobj(wbits=-15)  # without zlib's frame, as some servers understand it
        self._started = True
        if self._inflate is None:
            return chunk
        try:
            return self._inflate.decompress(chunk, room + 1)
        except zlib.error as error:
            raise TransferError(
                Reason.BAD_RESPONSE, f"content-encoding {self.name}: {error}", http_status=200
            ) from error


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

    Raises:
        TransferError: it is none.
    """
    try:
        url = URL(text.strip())
    except ValueError as error:
        raise TransferError(Reason.BAD_URL, "not a URL") from error  # its own words may quote a password
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
        value = "no such host" if unknown else _words(cause)
        return TransferError(Reason.DNS, value, may_pass=not unknown, is_network=True)
    if isinstance(error, aiohttp.ClientSSLError):
        return TransferError(Reason.TLS, _words(cause))
    if isinstance(error, asyncio.TimeoutError):
        phase = _phase(error, status)
        return TransferError(Reason.TIMEOUT, phase, http_status=status, may_pass=True, is_network=phase == "connect")
    if isinstance(error, aiohttp.ClientConnectorError):
        return TransferError(Reason.CONNECT, _words(cause), may_pass=True, is_network=True)
    return _broken(error, status)


def _broken(error: Exception, status: int | None) -> TransferError:
    """What an exception means that came after the connection."""
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ClientConnectionError | OSError):
        where = "before the answer" if status is None else "in the body"
        return TransferError(Reason.BROKEN_TRANSFER, where, http_status=status, may_pass=True)
    if isinstance(error, aiohttp.ClientError) and not isinstance(error, aiohttp.InvalidURL):
        message = str(getattr(error, "message", "")) or type(error).__name__
        return TransferError(Reason.BAD_RESPONSE, message.splitlines()[0].rstrip(":"), http_status=status)
    return TransferError(Reason.BAD_URL, type(error).__name__)


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return getattr(error, "strerror", None) or type(error).__name__


def _phase(error: BaseException, status: int | None) -> str:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return "connect"
    if isinstance(error, aiohttp.SocketTimeoutError):
        return "first byte" if status is None else "stall"
    return "total"
