"""A web server on loopback that behaves as badly as asked, byte for byte, and remembers who asked for what.

    with WebServer() as server:
        url = server.add("/slow.jpg", after(5, page(JPEG)))

It runs in a thread of the test's process on a free port. A behaviour is a coroutine over an `Exchange`; it writes
what it likes to the socket and returns whether the connection stays open.
"""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus

import pyarrow as pa

NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True)
class Exchange:
    """One request, and the socket to answer it on."""

    path: str
    headers: Mapping[str, str]
    number: int
    """How many requests for this path came before."""
    writer: asyncio.StreamWriter

    async def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))
        await self.writer.drain()


Behaviour = Callable[[Exchange], Awaitable[bool]]


class WebServer:
    """Serves the pages it was given; 404 for all others.

    Attributes:
        asked: how often each path was asked for.
        headers: of the last request for each path.
        accepted: TCP connections.
        most_at_once: most requests being answered at one time.
    """

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.host, self.port, self.tls = host, 0, tls
        self.pages: dict[str, Behaviour] = {}
        self.asked: Counter[str] = Counter()
        self.headers: dict[str, Mapping[str, str]] = {}
        self.accepted = self.at_once = self.most_at_once = 0

    def __enter__(self) -> WebServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def add(self, path: str, behaviour: Behaviour) -> str:
        """Serve a path; gives back its URL."""
        self.pages[path] = behaviour
        return self.url(path)

    def url(self, path: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._answer(await reader.readuntil(b"\r\n\r\n"), writer):
                pass
        writer.close()
        with suppress(ConnectionError, asyncio.CancelledError):
            await writer.wait_closed()

    async def _answer(self, head: bytes, writer: asyncio.StreamWriter) -> bool:
        first, *lines = head.decode("latin-1").strip().split("\r\n")
        path = first.split(" ")[1]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        exchange = Exchange(path, headers, self.asked[path], writer)
        self.asked[path] += 1
        self.headers[path] = headers
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self.pages.get(path, page(b"nothing here", status=404))(exchange)
        finally:
            self.at_once -= 1


# --- behaviours ------------------------------------------------------------------------------------------------------


def head(status: int = 200, headers: Mapping[str, str] = NOTHING, type_: str = "image/jpeg") -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Type: {type_}"]
    lines += [f"{name.rstrip('+')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def page(
    content: bytes, *, status: int = 200, headers: Mapping[str, str] = NOTHING, type_: str = "image/jpeg"
) -> Behaviour:
    """A whole, honest answer. A header's name may end in + to stand twice."""

    async def behave(exchange: Exchange) -> bool:
        await exchange.send(head(status, {"Content-Length": str(len(content)), **headers}, type_), content)
        return True

    return behave


def redirect(location: str, status: int = 302) -> Behaviour:
    return page(b"", status=status, headers={"Location": location})


def one_after_another(*behaviours: Behaviour) -> Behaviour:
    """The first behaviour to the first request, and so on; the last to all further ones."""

    async def behave(exchange: Exchange) -> bool:
        return await behaviours[min(exchange.number, len(behaviours) - 1)](exchange)

    return behave


def after(seconds: float, behaviour: Behaviour) -> Behaviour:
    """Silence first."""

    async def behave(exchange: Exchange) -> bool:
        await asyncio.sleep(seconds)
        return await behaviour(exchange)

    return behave


def when(gate: threading.Event, behaviour: Behaviour) -> Behaviour:
    """Silence until the gate is open."""

    async def behave(exchange: Exchange) -> bool:
        while not gate.is_set():  # noqa: ASYNC110 - the gate is opened in another thread
            await asyncio.sleep(0.01)
        return await behaviour(exchange)

    return behave


def drip(content: bytes, every_s: float) -> Behaviour:
    """One byte at a time: never a stall, never an end."""

    async def behave(exchange: Exchange) -> bool:
        await exchange.send(head(headers={"Content-Length": str(len(content))}))
        for place in range(len(content)):
            await exchange.send(content[place : place + 1])
            await asyncio.sleep(every_s)
        return True

    return behave


def endless(start: bytes, headers: Mapping[str, str] = NOTHING) -> Behaviour:
    """A chunked body without end, as fast as it is taken."""

    async def behave(exchange: Exchange) -> bool:
        await exchange.send(head(headers={"Transfer-Encoding": "chunked", **headers}), chunk(start))
        while True:
            await exchange.send(chunk(bytes(65536)))

    return behave


def endless_headers(exchange: Exchange) -> Awaitable[bool]:
    async def behave() -> bool:
        await exchange.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            await exchange.send(b"X-More: and more\r\n" * 100)

    return behave()


def cut_short(content: bytes, at: int) -> Behaviour:
    """Content-Length of the whole, then the connection ends early."""
    return raw(head(headers={"Content-Length": str(len(content))}) + content[:at])


def cut_chunks(content: bytes, at: int) -> Behaviour:
    """A chunked body whose last chunk never comes."""
    return raw(head(headers={"Transfer-Encoding": "chunked"}) + chunk(content[:at]))


def until_close(content: bytes) -> Behaviour:
    """A body without a length: it ends where the connection ends."""
    return raw(head(headers={"Connection": "close"}) + content)


def raw(answer: bytes) -> Behaviour:
    """These bytes, then the end of the connection."""

    async def behave(exchange: Exchange) -> bool:
        await exchange.send(answer)
        return False

    return behave


def reset(answer: bytes = b"") -> Behaviour:
    """These bytes, then RST."""

    async def behave(exchange: Exchange) -> bool:
        await exchange.send(answer)
        await asyncio.sleep(0.05)  # the bytes go out before the reset throws away what is unsent
        sock: socket.socket = exchange.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        exchange.writer.transport.abort()
        return False

    return behave


def gzipped(content: bytes) -> Behaviour:
    """Compressed, although nobody asked for it."""
    return page(gzip.compress(content), headers={"Content-Encoding": "gzip"})


def in_coding(content: bytes, coding: str) -> bytes:
    """Compressed as the Content-Encoding `br` or `zstd` means it."""
    return bytes(pa.compress(content, {"br": "brotli"}.get(coding, coding), asbytes=True))


def packed(content: bytes, coding: str) -> Behaviour:
    """In `br` or `zstd`, although nobody asked for it."""
    return page(in_coding(content, coding), headers={"Content-Encoding": coding})


def chunk(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"
