"""What the hostile server does, and what must become of a row that meets it: one `Case` each.

A case's URL is written with the names of the server's ports; a case whose host suffers for it (slowed down, or with a
robots.txt of its own) has an address of its own.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from functools import cache

from curate.ledger import Reason
from tests.curate.fetching import encoded, jpeg, photo
from tests.hostile import pictures
from tests.webserver import (
    Behaviour,
    Exchange,
    after,
    cut_chunks,
    cut_short,
    drip,
    endless,
    endless_headers,
    gzipped,
    head,
    in_coding,
    one_after_another,
    packed,
    page,
    raw,
    reset,
    until_close,
)

SECRET = "hunter2"
"""Looked for in everything that a run writes."""
SHARED = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
USUAL = "http://{host}:{http}/{name}/{n}.jpg"
IMAGE = jpeg()
BROTLI = in_coding(IMAGE, "br")
OK = page(IMAGE)


@dataclass(frozen=True)
class Ports:
    """Where the server listens: with the cases, where nobody may go, and where TCP or TLS itself goes wrong."""

    http: int = 0
    forbidden: int = 0
    junk: int = 0
    mute: int = 0
    untrusted: int = 0
    closed: int = 0
    full: int = 0


@dataclass(frozen=True)
class Case:
    """One way to treat a client.

    Attributes:
        name: first part of the path.
        reasons: what its rows may end as; empty for success.
        behaviour: what the server does; None where it is not asked.
        value: the beginning of the ledger's value, where it matters.
        url: of its rows.
        robots: what its robots.txt is, at an address of its own.
        alone: whether it has an address of its own.
        asked: how often the page is asked for, where it matters.
        heavy: whether it takes long to make or to send.
    """

    name: str
    reasons: frozenset[Reason] = frozenset()
    behaviour: Behaviour | None = None
    value: str = ""
    url: str = USUAL
    robots: Behaviour | None = None
    alone: bool = False
    asked: int | None = None
    heavy: bool = False

    @property
    def has_own_address(self) -> bool:
        return self.alone or self.robots is not None

    def address(self, cases: list[Case]) -> str | None:
        """Its own address; None if it has none."""
        return f"127.2.0.{cases.index(self) + 1}" if self.has_own_address else None

    def url_of(self, number: int, host: str, ports: Ports) -> str:
        return self.url.format(name=self.name, n=number, host=host, secret=SECRET, **vars(ports))


def _bad(name: str, reason: Reason | tuple[Reason, ...], behaviour: Behaviour | None = None, **more: object) -> Case:
    return Case(name, frozenset(reason if isinstance(reason, tuple) else (reason,)), behaviour, **more)  # type: ignore[arg-type]


def to(location: str, status: int = 302) -> Behaviour:
    """A redirect; {host}, {path} and the ports are filled in when it is asked."""

    async def behave(exchange: Exchange) -> bool:
        port = exchange.writer.get_extra_info("sockname")[1]
        where = location.format(host=exchange.headers["host"], http=port, path=exchange.path)
        answer = f"HTTP/1.1 {status} Found\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n"
        await exchange.send(answer.encode("utf-8"))
        return True

    return behave


def half_close(exchange: Exchange) -> object:
    """Half the body, then our side of the connection shut, the other still open."""

    async def behave() -> bool:
        await exchange.send(head(headers={"Content-Length": str(len(IMAGE))}), IMAGE[:500])
        exchange.writer.write_eof()
        await asyncio.sleep(5)
        return False

    return behave()


def informational_flood(exchange: Exchange) -> object:
    """100 Continue without end."""

    async def behave() -> bool:
        while True:
            await exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 50)
            await asyncio.sleep(0.005)

    return behave()


def slow_headers(exchange: Exchange) -> object:
    """One header every tenth of a second, never the last."""

    async def behave() -> bool:
        await exchange.send(b"HTTP/1.1 200 OK\r\n")
        for number in range(1_000):
            await exchange.send(f"X-{number}: more\r\n".encode())
            await asyncio.sleep(0.1)
        return False

    return behave()


def bomb() -> Behaviour:
    """20 kB of gzip that unpack to 20 MB and more, with a JPEG's beginning."""
    return page(gzip.compress(IMAGE + bytes(100_000_000)), headers={"Content-Encoding": "gzip"})


def retry_at(seconds: float) -> Behaviour:
    """429 with a date."""

    async def behave(exchange: Exchange) -> bool:
        when = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=seconds), usegmt=True)
        return await page(b"", status=429, headers={"Retry-After": when})(exchange)

    return behave


def tagged(value: str, name: str = "X-Robots-Tag") -> Behaviour:
    return page(IMAGE, headers={name: value})


async def numbered(exchange: Exchange) -> bool:
    """After a moment, the picture of the path's number: /numbered/7.jpg."""
    number = int(exchange.path.split("/")[2].partition(".")[0])
    return await after(0.03, page(jpeg(number)))(exchange)


def rules(*lines: str, start: bytes = b"") -> Behaviour:
    return page(start + "\n".join(lines).encode(), type_="text/plain")


R = Reason


def _servers() -> list[Case]:
    """What goes wrong between the request and the body."""
    chunked = head(headers={"Transfer-Encoding": "chunked"})
    many = {f"X-{number}": "y" * 4_000 for number in range(200)}
    return [
        Case("ok", behaviour=OK),
        Case("until-close", behaviour=until_close(IMAGE)),
        Case("gzipped", behaviour=gzipped(IMAGE)),
        Case("deflated", behaviour=page(zlib.compress(IMAGE), headers={"Content-Encoding": "deflate"})),
        Case("brotli", behaviour=packed(IMAGE, "br")),
        Case("zstd", behaviour=packed(IMAGE, "zstd")),
        Case("says-brotli", behaviour=page(IMAGE, headers={"Content-Encoding": "br"})),
        Case("says-gzip", behaviour=page(IMAGE, headers={"Content-Encoding": "gzip"})),
        Case("wrong-type", behaviour=page(IMAGE, type_="text/html")),
        Case("control-characters", behaviour=raw(b"HTTP/1.1 200 OK\r\nX-Bad: a\tb\xff\r\n\r\n" + IMAGE)),
        _bad("silent", R.TIMEOUT, after(30, OK), value="first byte"),
        _bad("drips", R.TIMEOUT, drip(IMAGE, 0.1), value="total"),
        _bad("stalls", R.TIMEOUT, drip(IMAGE, 30), value="stall"),
        _bad("slow-headers", R.TIMEOUT, slow_headers),
        _bad("flood", (R.TIMEOUT, R.BAD_RESPONSE), informational_flood),
        _bad("endless", R.TOO_LARGE, endless(IMAGE)),
        _bad("endless-rubbish", R.NOT_AN_IMAGE, endless(b"no image at all" * 9)),
        _bad("endless-headers", (R.BAD_RESPONSE, R.TIMEOUT), endless_headers),
        _bad("many-headers", (R.BAD_RESPONSE, R.TRUNCATED_IMAGE), page(IMAGE[:300], headers=many)),
        _bad("says-huge", R.TOO_LARGE, raw(head(headers={"Content-Length": "5000000000"}))),
        _bad("says-more", R.BROKEN_TRANSFER, cut_short(IMAGE, len(IMAGE) - 1)),
        _bad("says-less", (R.TRUNCATED_IMAGE, R.BAD_RESPONSE), raw(head(headers={"Content-Length": "700"}) + IMAGE)),
        _bad("says-nonsense", R.BAD_RESPONSE, raw(head(headers={"Content-Length": "many"}) + IMAGE)),
        _bad("says-negative", R.BAD_RESPONSE, raw(head(headers={"Content-Length": "-5"}) + IMAGE)),
        _bad("cut-chunks", R.BROKEN_TRANSFER, cut_chunks(IMAGE, 500)),
        _bad("bad-chunks", (R.BAD_RESPONSE, R.BROKEN_TRANSFER), raw(chunked + b"zz\r\n" + IMAGE)),
        _bad("gzip-bomb", R.TOO_LARGE, bomb()),
        _bad("deflate-rubbish", R.BAD_RESPONSE, page(b"\x78\xff" * 400, headers={"Content-Encoding": "deflate"})),
        _bad("brotli-bomb", R.TOO_LARGE, packed(IMAGE + bytes(100_000_000), "br")),
        _bad("brotli-cut", R.BROKEN_TRANSFER, page(BROTLI[:600], headers={"Content-Encoding": "br"})),
        _bad("zstd-bomb", R.TOO_LARGE, packed(IMAGE + bytes(100_000_000), "zstd")),
        _bad("zstd-rubbish", R.BAD_RESPONSE, page(b"?" * 400, headers={"Content-Encoding": "zstd"})),
        _bad("lzma", R.BAD_RESPONSE, page(b"?" * 400, headers={"Content-Encoding": "lzma"}), value="content-enc"),
        _bad("gzip-cut", R.BROKEN_TRANSFER, page(gzip.compress(IMAGE)[:600], headers={"Content-Encoding": "gzip"})),
        _bad("reset", R.BROKEN_TRANSFER, reset()),
        _bad("reset-in-body", R.BROKEN_TRANSFER, reset(head(headers={"Content-Length": "5000"}) + IMAGE[:400])),
        _bad("half-close", R.BROKEN_TRANSFER, half_close),
        _bad("hangs-up", R.BROKEN_TRANSFER, raw(b"")),
        _bad("no-http", R.BAD_RESPONSE, raw(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")),
        _bad("nul-in-header", (R.BAD_RESPONSE,), raw(b"HTTP/1.1 200 OK\r\nX-Bad: a\0b\r\n\r\n" + IMAGE)),
        _bad("escape-in-type", R.NOT_AN_IMAGE, page(b"<p>no", type_="text/\x1b[2J")),
        _bad("missing", R.HTTP_STATUS, page(b"", status=404), value="404", asked=1),
        _bad("gone", R.HTTP_STATUS, page(IMAGE, status=410), value="410", asked=1),
        _bad("forbidden", R.HTTP_STATUS, page(IMAGE, status=403), value="403", asked=1),
        _bad("no-content", R.HTTP_STATUS, page(b"", status=204), value="204", asked=1),
        _bad("partial", R.HTTP_STATUS, page(IMAGE[:500], status=206), value="206", asked=1),
        _bad("broken-server", R.HTTP_STATUS, page(IMAGE, status=500), value="500", asked=3),
        _bad("tls-junk", (R.TLS, R.CONNECT, R.BROKEN_TRANSFER), url="https://127.0.0.1:{junk}/{n}.jpg"),
        _bad("tls-silent", R.TIMEOUT, url="https://127.0.0.1:{mute}/{n}.jpg"),
        _bad("tls-unknown", R.TLS, url="https://127.0.0.1:{untrusted}/{n}.jpg"),
        _bad("refused", R.CONNECT, url="http://127.0.0.1:{closed}/{n}.jpg"),
        _bad("no-room", R.TIMEOUT, url="http://127.0.0.1:{full}/{n}.jpg", value="connect"),
        _bad("no-name", R.DNS, url="http://nobody{n}.invalid/{n}.jpg", value="no such host"),
    ]  # fmt: skip


def _guards() -> list[Case]:
    """Where no request may go, directly or by a redirect; and redirects that are fine."""
    blocked = {
        "loopback": "http://127.0.0.1:{forbidden}/{n}",
        "nothing": "http://0.0.0.0:{forbidden}/{n}",
        "ipv6": "http://[::1]:{forbidden}/{n}",
        "mapped": "http://[::ffff:127.0.0.1]:{forbidden}/{n}",
        "nat64": "http://[64:ff9b::7f00:1]:{forbidden}/{n}",
        "metadata": "http://169.254.169.254/latest/meta-data/{n}",
        "private": "http://10.0.0.{n}/",
        "multicast": "http://224.0.0.1/{n}",
        "rebinding": "http://inside.test:{forbidden}/{n}",
    }
    # aiohttp itself refuses most of these; the test's resolver knows no escaped name.
    spelt = {
        "octal": "http://0177.0.0.1:{forbidden}/{n}",
        "decimal": "http://2130706433:{forbidden}/{n}",
        "hexadecimal": "http://0x7f000001:{forbidden}/{n}",
        "short": "http://127.1:{forbidden}/{n}",
        "circled": "http://①②⑦.⓪.⓪.①:{forbidden}/{n}",
        "escaped": "http://%31%32%37.0.0.1:{forbidden}/{n}",
        "with-dot": "http://127.0.0.1.:{forbidden}/{n}",
        "scoped": "http://[fe80::1%25lo]:{forbidden}/{n}",
    }
    locations = {
        "private": ("http://10.0.0.1/", R.BLOCKED_ADDRESS),
        "metadata": ("http://169.254.169.254/", R.BLOCKED_ADDRESS),
        "file": ("file:///etc/passwd", R.BLOCKED_SCHEME),
        "gopher": ("gopher://{host}/", R.BLOCKED_SCHEME),
        "nowhere": ("", R.BAD_RESPONSE),
        "no-host": ("http://", (R.BAD_URL, R.TOO_MANY_REDIRECTS)),
        "itself": ("{path}", R.TOO_MANY_REDIRECTS),
        "bad-port": ("http://{host}99999/", (R.BAD_RESPONSE, R.BAD_URL)),
    }
    fine = {
        "elsewhere": "http://127.0.0.3:{http}/ok{path}",
        "relative": "../../ok{path}",
        "spaces": "http://{host}/ok/a b{path}",
        "unicode": "http://{host}/ok/größe ✓{path}",
        "user": f"http://user:{SECRET}@{{host}}/ok{{path}}",
        "fragment": "/ok{path}#part",
    }
    return [
        *(_bad(f"blocked-{name}", R.BLOCKED_ADDRESS, url=url) for name, url in blocked.items()),
        *(_bad(f"spelt-{name}", (R.BLOCKED_ADDRESS, R.BAD_URL, R.DNS), url=url) for name, url in spelt.items()),
        *(_bad(f"to-{name}", reason, to(location)) for name, (location, reason) in locations.items()),
        *(Case(f"via-{name}", behaviour=to(location, status=307)) for name, location in fine.items()),
        Case("five-redirects", behaviour=_redirects(5)),
        _bad("six-redirects", R.TOO_MANY_REDIRECTS, _redirects(6)),
        _bad("ftp", R.BLOCKED_SCHEME, url="ftp://127.0.0.1/{n}.jpg"),
        _bad("no-scheme", R.BAD_URL, url="127.0.0.1/{n}.jpg"),
        Case("user", behaviour=OK, url="http://user:{secret}@{host}:{http}/user/{n}.jpg"),
        Case("ipv6", behaviour=OK, url="http://[::1]:{http}/ipv6/{n}.jpg"),
        Case("mapped", behaviour=OK, url="http://[::ffff:127.0.0.1]:{http}/mapped/{n}.jpg"),
        Case("name", behaviour=OK, url="http://images.test:{http}/name/{n}.jpg"),
    ]


def _redirects(count: int) -> Behaviour:
    """So many redirects, then an image: /NAME/7.jpg, /NAME/7.jpg/1, /NAME/7.jpg/1/2 …"""

    async def behave(exchange: Exchange) -> bool:
        done = exchange.path.count("/") - 2
        return await (to(f"{exchange.path}/{done + 1}") if done < count else OK)(exchange)

    return behave


def _manners() -> list[Case]:
    """What asks for patience, or to be left alone."""
    wait = page(b"", status=429, headers={"Retry-After": "1"})
    absurd = page(b"", status=429, headers={"Retry-After": "999999999999"})
    soon = page(b"", status=429, headers={"Retry-After": "soon"})
    busy = page(b"", status=503)
    opted_out = {
        "noai": tagged("noai"),
        "noimageai": tagged("max-snippet:3, NoImageAI"),
        "noml": tagged("noml"),
        "none": tagged("none"),
        "noindex": tagged("unavailable_after: 1 Jan 2030 00:00:00 GMT, noindex"),
        "noimageindex": tagged("noimageindex"),
        "for-us": tagged("cliptailor: noai"),
        "second": page(IMAGE, headers={"X-Robots-Tag": "all", "X-Robots-Tag+": "noai"}),
        "tdm": tagged("1", "TDM-Reservation"),
    }
    no = "User-agent: *"
    no_for_us = rules(no, "Allow: /", "User-agent: ClipTailor", "Disallow: /*.jpg$")
    return [
        Case("wait-seconds", behaviour=one_after_another(wait, OK), alone=True, asked=2),
        Case("wait-date", behaviour=one_after_another(retry_at(1), OK), alone=True, asked=2),
        Case("wait-nonsense", behaviour=one_after_another(soon, OK), alone=True),
        _bad("wait-absurd", (R.HTTP_STATUS, R.THROTTLED), absurd, alone=True),
        Case("busy-twice", behaviour=one_after_another(busy, busy, OK), alone=True, asked=3),
        _bad("busy", (R.HTTP_STATUS, R.THROTTLED), busy, alone=True),
        Case("flaky", behaviour=one_after_another(reset(), OK), asked=2),
        *(_bad(f"tag-{name}", R.OPT_OUT, behaviour, asked=1) for name, behaviour in opted_out.items()),
        Case("tag-for-others", behaviour=tagged("googlebot: noindex, noai")),
        Case("tag-harmless", behaviour=tagged("all, nofollow, nosnippet")),
        Case("tdm-zero", behaviour=tagged("0", "TDM-Reservation")),
        _bad("robots-no", R.ROBOTS_DISALLOW, OK, robots=rules(no, "Disallow: /"), asked=0),
        _bad("robots-no-for-us", R.ROBOTS_DISALLOW, OK, robots=no_for_us, asked=0),
        _bad("robots-mark", R.ROBOTS_DISALLOW, OK, robots=rules(no, "Disallow: /", start=b"\xef\xbb\xbf"), asked=0),
        _bad("robots-nul", R.ROBOTS_DISALLOW, OK, robots=rules("# \0", no, "Disallow: /"), asked=0),
        _bad("robots-moved", R.ROBOTS_DISALLOW, OK, robots=to("/robots-there"), asked=0),
        _bad("robots-long", R.ROBOTS_DISALLOW, OK, robots=rules(no, "Disallow: /", *["# more"] * 90_000), asked=0),
        _bad("robots-broken", R.ROBOTS_UNREACHABLE, OK, robots=page(b"", status=500), asked=0),
        _bad("robots-silent", R.ROBOTS_UNREACHABLE, OK, robots=after(30, OK), asked=0),
        _bad("robots-reset", R.ROBOTS_UNREACHABLE, OK, robots=reset(), asked=0),
        Case("robots-forbidden", behaviour=OK, robots=page(b"", status=403)),
        Case("robots-page", behaviour=OK, robots=page(b"<html>Disallow: /</html>", type_="text/html")),
        Case("robots-loop", behaviour=OK, robots=to("/robots.txt")),
        Case("robots-for-others", behaviour=OK, robots=rules("User-agent: other", "Disallow: /")),
        Case("robots-allowed", behaviour=OK, robots=rules(no, "Disallow: /private", "Allow: /robots-allowed")),
    ]  # fmt: skip


def _bodies() -> list[Case]:
    """What is wrong, or merely rare, in the pixels."""
    html = page(b"<!doctype html><title>404</title>" * 9, type_="text/html")
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    xml = page(b"<?xml version='1.0' standalone='no'?>" + svg, type_="image/svg+xml")
    whole = ["png", "jpeg", "gif", "bmp", "tiff", "webp"]
    either = (R.TRUNCATED_IMAGE, R.CORRUPT_IMAGE)
    garbled = bytearray(IMAGE)
    garbled[4:40] = bytes(36)
    return [
        *(Case(f"kind-{name}", behaviour=page(content)) for name, content in pictures.kinds().items()),
        *(_bad(f"cut-{kind}", R.TRUNCATED_IMAGE, page(pictures.truncated(kind))) for kind in whole),
        *(_bad(f"cut-{kind}", either, page(pictures.truncated(kind))) for kind in ("avif", "heic")),
        _bad("nothing", R.EMPTY_BODY, page(b"")),
        _bad("one-byte", R.NOT_AN_IMAGE, page(b"\xff")),
        _bad("pixel", R.TOO_SMALL, page(encoded(photo(size=(1, 1)), "GIF"))),
        _bad("html", R.NOT_AN_IMAGE, html),
        _bad("html-as-image", R.NOT_AN_IMAGE, page(b"<html>not found</html>" * 20)),
        _bad("svg", R.UNSUPPORTED_IMAGE, page(svg), value="svg"),
        _bad("svg-as-xml", (R.UNSUPPORTED_IMAGE, R.NOT_AN_IMAGE), xml, value="image/svg+xml"),
        _bad("zeros", R.NOT_AN_IMAGE, page(bytes(5_000))),
        _bad("photoshop", R.UNSUPPORTED_IMAGE, page(b"8BPS\0\1" + bytes(500))),
        _bad("postscript", R.UNSUPPORTED_IMAGE, page(b"%!PS-Adobe-3.0\n(/etc/passwd) run" + bytes(99))),
        _bad("corrupt-jpeg", (R.CORRUPT_IMAGE, R.TRUNCATED_IMAGE), page(bytes(garbled))),
        _bad("corrupt-png", R.CORRUPT_IMAGE, page(pictures.corrupt_png())),
        _bad("png-bomb", R.TOO_MANY_PIXELS, page(pictures.png_bomb()), value="60000x60000"),
        _bad("gif-frame", R.TOO_MANY_PIXELS, page(pictures.gif_large_frame())),
        _bad("scans", R.CORRUPT_IMAGE, page(pictures.jpeg_of_scans()), value="jpeg: over"),
        Case("gif-bomb", behaviour=page(pictures.gif_bomb())),
        Case("apng-bomb", behaviour=page(pictures.apng_bomb())),
    ]  # fmt: skip


def _heavy() -> list[Case]:
    """Fifty million pixels, twenty million bytes. What would not fit into a worker's memory is refused by its size."""
    fits = ("huge-jpeg", "huge-progressive", "padded")
    large = ("huge-png", "huge-gif", "huge-bmp", "huge-tiff", "huge-webp")
    return [
        *(Case(name, heavy=True) for name in fits),
        *(_bad(name, R.TOO_MANY_PIXELS, value="7100x7000", heavy=True) for name in large),
    ]


@cache
def cases() -> list[Case]:
    """Every case; pictures that are slow to make are not made here."""
    return [*_servers(), *_guards(), *_manners(), *_bodies(), *_heavy()]


def addresses(all_cases: list[Case]) -> list[str]:
    """Where the server must listen for them."""
    return [*SHARED, *(own for case in all_cases if (own := case.address(all_cases))), "::1"]


def build(ports: Ports, *, heavy: bool) -> dict[str, Behaviour]:
    """What is served, by the first part of the path, or by `robots ADDRESS`."""
    all_cases = cases()
    built = {case.name: case.behaviour for case in all_cases if case.behaviour}
    for case in all_cases:
        if case.robots:
            built[f"robots {case.address(all_cases)}"] = case.robots
    built["numbered"] = numbered
    built["robots-there"] = rules("User-agent: *", "Disallow: /")
    if heavy:
        built |= {name: page(content) for name, content in pictures.huge().items()}
        built["padded"] = page(pictures.padded())
    return built


def behaviour_of(built: dict[str, Behaviour], address: str, path: str) -> Behaviour:
    """What is done with a request."""
    name = f"robots {address}" if path == "/robots.txt" else path.split("/")[1]
    return built.get(name, page(b"nothing here", status=404))
