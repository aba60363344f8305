"""The demo's web: one process that serves the site on several loopback addresses, and misbehaves where the web does."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from aiohttp import web

from demo.junk import HOSTS

PIXEL = bytes.fromhex("47494638396101000100800000ffffff00000021f90401000000002c00000000010001000002024401003b")
START_S = 30
# The same ports, the same URLs, the same keys, the same order: the demo's figures are the same on the same machine.
PORTS = [18471, 18472, 18473]


@dataclass(frozen=True)
class Web:
    """A running server: its port, a port no request may be led to, and a closed one."""

    port: int
    forbidden_port: int
    closed_port: int
    pipe: Connection

    def hits(self) -> Counter[str]:
        """Requests so far by the first part of the path; `forbidden` counts connections to the forbidden port."""
        self.pipe.send("hits")
        return self.pipe.recv()


@contextmanager
def serving(bodies: dict[str, bytes], ports: list[int]) -> Iterator[Web]:
    """Serve the bodies from a process of its own, for the length of a `with` block.

    Args:
        bodies: by path.
        ports: port, forbidden port and closed port to use if they are free; others are chosen where not.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(bodies, ports, there), daemon=True)
    process.start()
    try:
        if not here.poll(START_S):
            raise RuntimeError(f"the demo's web server did not start within {START_S} s")
        port, forbidden_port, closed_port = here.recv()
        yield Web(port, forbidden_port, closed_port, here)
    finally:
        process.terminate()
        process.join()


def _serve(bodies: dict[str, bytes], ports: list[int], pipe: Connection) -> None:
    wanted = ports or PORTS
    if not all(_is_free(port) for port in wanted):
        wanted = [_free_port() for _ in wanted]
    asyncio.run(_Server(bodies).run(wanted, pipe))


class _Server:
    def __init__(self, bodies: dict[str, bytes]) -> None:
        self.bodies = bodies
        self.hits: Counter[str] = Counter()
        self.turned_away: set[str] = set()
        self.forbidden_port = 0

    async def run(self, ports: list[int], pipe: Connection) -> None:
        port, self.forbidden_port, _ = ports
        forbidden = await asyncio.start_server(self._forbidden, HOSTS[0], self.forbidden_port)
        app = web.Application()
        app.router.add_get("/robots.txt", self._robots)
        app.router.add_get("/{folder}/{file}", self._answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        for host in HOSTS:
            await web.TCPSite(runner, host, port).start()
        pipe.send(ports)
        async with forbidden:
            while True:
                await asyncio.to_thread(pipe.recv)
                pipe.send(self.hits)

    async def _forbidden(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hits["forbidden"] += 1
        writer.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        folder = request.match_info["folder"]
        self.hits[folder] += 1
        misbehave = getattr(self, f"_{folder}", None)
        if misbehave is not None:
            return await misbehave(request)
        if folder.startswith("busy-") and request.path not in self.turned_away:
            self.turned_away.add(request.path)
            return web.Response(status=503, headers={"Retry-After": "1"})
        body = self.bodies.get(request.path)
        return web.Response(body=body, content_type=_type(request.path)) if body else web.Response(status=404)

    async def _robots(self, _: web.Request) -> web.Response:
        self.hits["robots.txt"] += 1
        return web.Response(text="User-agent: *\nDisallow: /private/\n")

    async def _silent(self, _: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        return web.Response()

    async def _endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        await response.prepare(request)
        await response.write(png_bomb())
        with suppress(ConnectionError):  # nobody reads it to the end
            for _ in range(100_000):
                await response.write(bytes(65_536))
        return response

    async def _cut(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "image/png", "Content-Length": "4000"})
        await response.prepare(request)
        await response.write(b"\x89PNG\r\n\x1a\n" + b"\0" * 1000)
        assert request.transport is not None
        request.transport.close()
        return response

    async def _page(self, _: web.Request) -> web.StreamResponse:
        return web.Response(text="<html><body>Hotlinking is not allowed.</body></html>", content_type="text/html")

    async def _empty(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=b"", content_type="image/png")

    async def _pixel(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=PIXEL, content_type="image/gif")

    async def _bomb(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=png_bomb(), content_type="image/png")

    async def _optout(self, _: web.Request) -> web.StreamResponse:
        body = self.bodies["/digits/0.png"]
        return web.Response(body=body, content_type="image/png", headers={"X-Robots-Tag": "noai, noimageai"})

    async def _tdm(self, _: web.Request) -> web.StreamResponse:
        body = self.bodies["/digits/0.png"]
        return web.Response(body=body, content_type="image/png", headers={"TDM-Reservation": "1"})

    async def _internal(self, _: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(f"http://{HOSTS[0]}:{self.forbidden_port}/admin")


def png_bomb() -> bytes:
    """A PNG of a few hundred bytes whose header says 60 000 × 60 000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


def _type(path: str) -> str:
    return "image/jpeg" if path.endswith(".jpg") else "image/png"


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex((HOSTS[0], port)) != 0


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind((HOSTS[0], 0))
        return int(probe.getsockname()[1])
