"""The hostile server as a process of its own: many addresses of loopback, one port, and a log of who asked when.

    with hostile_server() as server:
        server.ports.http          # cases are served below /NAME/ on each address
        server.log()               # every request so far

Its own process, so that neither its memory nor its work counts as the worker's.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection

from tests.hostile.behaviours import Ports, behaviour_of, build
from tests.webserver import Behaviour, Exchange, WebServer


@dataclass(frozen=True)
class Request:
    """One request as the server saw it; times are of the monotonic clock, in seconds."""

    address: str
    host: str
    path: str
    began_s: float
    ended_s: float


class Hostile(WebServer):
    """One port on many addresses; the first part of a path names the behaviour."""

    def __init__(self, addresses: list[str], pages: dict[str, Behaviour]) -> None:
        super().__init__()
        self.addresses, self.log = addresses, list[Request]()
        self.pages = Routes(pages, self.log)

    async def _listen(self) -> None:
        first = socket.create_server((self.addresses[0], 0), backlog=1024)
        self.port = first.getsockname()[1]
        self._server = await asyncio.start_server(self._serve, sock=first)
        self._others = await asyncio.start_server(self._serve, self.addresses[1:], self.port, backlog=1024)

    async def _close(self) -> None:
        self._others.close()
        await super()._close()


@dataclass
class Routes(dict):
    """Paths → behaviours, each of which writes the log."""

    pages: dict[str, Behaviour]
    log: list[Request] = field(default_factory=list)

    def get(self, path: str, default: Behaviour | None = None) -> Behaviour:
        async def behave(exchange: Exchange) -> bool:
            address, began_s = exchange.writer.get_extra_info("sockname")[0], time.monotonic()
            try:
                return await behaviour_of(self.pages, address, path)(exchange)
            finally:
                host = exchange.headers.get("host", "")
                self.log.append(Request(address, host, path, began_s, time.monotonic()))

        return behave


class Listener:
    """A port that takes connections and treats each in its own way; counts them."""

    def __init__(self, greeting: bytes | None = b"", family: socket.AddressFamily = socket.AF_INET) -> None:
        address = "::1" if family == socket.AF_INET6 else "127.0.0.1"
        self.socket = socket.create_server((address, 0), family=family)
        self.port, self.accepted, self.greeting = self.socket.getsockname()[1], 0, greeting
        self.held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                self.accepted += 1
                if self.greeting is None:
                    self.held.append(connection)  # never a word
                    continue
                with suppress(OSError):
                    connection.sendall(self.greeting)
                    connection.shutdown(socket.SHUT_WR)
                self.held.append(connection)


def full_port() -> tuple[socket.socket, list[socket.socket], int]:
    """A port whose queue is full: a connection to it is neither taken nor refused."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=0)
    port, held = listening.getsockname()[1], []
    for _ in range(4):
        one = socket.socket()
        one.setblocking(False)
        assert one.connect_ex(("127.0.0.1", port)) in (0, errno.EINPROGRESS)
        held.append(one)
    return listening, held, port


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return int(closed.getsockname()[1])


def untrusted(server: WebServer) -> int:
    """A port with TLS and a certificate that nobody knows."""
    import trustme

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    listening = socket.create_server(("127.0.0.1", 0))

    async def listen() -> asyncio.Server:
        return await asyncio.start_server(server._serve, sock=listening, ssl=context)

    asyncio.run_coroutine_threadsafe(listen(), server._loop).result(10)
    return int(listening.getsockname()[1])


def _serve(pipe: Connection, addresses: list[str], heavy: bool) -> None:
    pages: dict[str, Behaviour] = {}
    with Hostile(addresses, pages) as server:
        forbidden, junk, mute = Listener(), Listener(b"\x15\x03\x03\xff\xff rubbish" * 20), Listener(None)
        full, _queue, full_number = full_port()
        ports = Ports(
            http=server.port,
            forbidden=forbidden.port,
            junk=junk.port,
            mute=mute.port,
            untrusted=untrusted(server),
            closed=closed_port(),
            full=full_number,
        )
        pages.update(build(ports, heavy=heavy))
        pipe.send(ports)
        while (asked := pipe.recv()) is not None:
            if asked == "clear":
                server.log.clear()
            pipe.send((list(server.log), forbidden.accepted))
        full.close()


@dataclass
class Remote:
    """The server as the test sees it."""

    pipe: Connection
    ports: Ports

    def log(self) -> list[Request]:
        """Every request that was answered, or given up, so far."""
        self.pipe.send("log")
        return list(self.pipe.recv()[0])

    def clear(self) -> None:
        self.pipe.send("clear")
        self.pipe.recv()

    def forbidden_connections(self) -> int:
        """How many came to the port that no address rule allows."""
        self.pipe.send("log")
        return int(self.pipe.recv()[1])


@contextmanager
def hostile_server(addresses: list[str], *, heavy: bool = False) -> Iterator[Remote]:
    """Start the server's process; it ends with the block."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, addresses, heavy), daemon=True)
    process.start()
    there.close()
    try:
        yield Remote(here, here.recv())
        here.send(None)
    finally:
        process.kill()
        process.join()
        here.close()
