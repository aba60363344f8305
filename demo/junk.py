"""The demo's two lists, and what the demo's web server answers to each of their URLs.

`kind` says what a row is, so that the ledger can be held against the truth at the end.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

from PIL import Image

from demo.corpus import DIGIT_CAPTIONS, DIGIT_WORDS, Picture, digits, emoji, noise, png

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
EXAMPLES = 30
# Every so manieth emoji is not in the domain's crawl, so that nothing replays it.
UNSEEN = 8
# What the ledger should call each kind of junk: any of these (stage, reason).
EXPECTED = {
    "empty url": {("plan", "empty_url")},
    "not a url": {("plan", "bad_url"), ("plan", "blocked_scheme")},
    "repeated row": {("plan", "duplicate_row")},
    "caption of one word": {("plan", "where")},
    "file: url": {("plan", "blocked_scheme")},
    "dead link": {("fetch", "http_status")},
    "closed port": {("fetch", "connect"), ("fetch", "blocked_address")},
    "never answers": {("fetch", "timeout")},
    "endless body": {("fetch", "too_large")},
    "cut short": {("fetch", "broken_transfer"), ("fetch", "truncated_image")},
    "web page instead": {("fetch", "not_an_image")},
    "empty body": {("fetch", "empty_body")},
    "tracking pixel": {("fetch", "too_small")},
    "png bomb": {("fetch", "too_many_pixels")},
    "asked to opt out": {("fetch", "opt_out")},
    "data mining reserved": {("fetch", "opt_out")},
    "disallowed by robots.txt": {("fetch", "robots_disallow")},
    "redirect to a forbidden port": {("fetch", "blocked_address")},
    "same file elsewhere": {("select", "dedup")},
    "re-encoded copy": {("select", "dedup")},
    "leaked test image": {("select", "decontaminate")},
    # Off-topic rows that are good otherwise become the split `retain`; some are copies of each other.
    "off topic": {("select", "relevance"), ("kept", "retain"), ("select", "dedup")},
}
# Share of a kind that may slip through: to a CLIP this small a black chess piece looks like a stroke of a pen.
SLIPS = {"off topic": 0.02}
# Kept rows: what should arrive, and what no filter here can see.
KEPT = ("digit", "digit, busy server", "digit, wrong caption")


@dataclass(frozen=True)
class Row:
    """One row of a list: its URL path ("" for an empty URL, or a whole URL), caption, and what it is."""

    path: str
    caption: str
    kind: str


@dataclass(frozen=True)
class Site:
    """What the server serves: bodies by path, and the rows of the two lists."""

    bodies: dict[str, bytes]
    general: list[Row]
    domain: list[Row]


def make_site() -> Site:
    """The pictures, and the lists of the general web and of the domain's crawl."""
    bodies: dict[str, bytes] = {}
    train, test = digits()
    general = list(_serve(bodies, "emoji", emoji(), "emoji"))
    domain = [
        *_serve(bodies, "digits", train[:-EXAMPLES], "digit"),
        *(Row(row.path, row.caption, "off topic") for number, row in enumerate(general) if number % UNSEEN),
        *_serve(bodies, "textures", noise(60), "off topic"),
        *_leaked(bodies, test),
        *_copies(bodies, train),
        *_wrong_captions(bodies, train),
        *_hostile(),
        *_broken_rows(train),
    ]
    return Site(bodies, general, domain)


def examples() -> list[Picture]:
    """The handful of pictures the user gives as examples of the domain, from the training part."""
    return digits()[0][-EXAMPLES:]


def unseen_emoji() -> list[Picture]:
    """Emoji that the CLIP was pretrained on and that the domain's crawl does not hold."""
    return emoji()[::UNSEEN]


def url(row: Row, port: int, closed_port: int) -> str:
    """The row's URL on the demo's server; paths are spread over its hosts."""
    if row.kind == "closed port":
        return f"http://{HOSTS[0]}:{closed_port}{row.path}"
    host = HOSTS[zlib.crc32(row.path.encode()) % len(HOSTS)]
    return f"http://{host}:{port}{row.path}" if row.path.startswith("/") else row.path


def _serve(
    bodies: dict[str, bytes], folder: str, pictures: Iterator[Picture] | list[Picture], kind: str
) -> Iterator[Row]:
    for number, picture in enumerate(pictures):
        busy = kind == "digit" and number % 50 == 7
        path = f"/{'busy-' if busy else ''}{folder}/{number}.png"
        bodies[path] = png(picture.image)
        yield Row(path, picture.caption, f"{kind}, busy server" if busy else kind)


def _leaked(bodies: dict[str, bytes], test: list[Picture]) -> Iterator[Row]:
    for number, picture in enumerate(test[:40]):
        path = f"/blog/{number}.{'png' if number % 2 else 'jpg'}"
        bodies[path] = png(picture.image) if number % 2 else _reencoded(picture.image)
        yield Row(path, picture.caption, "leaked test image")


def _copies(bodies: dict[str, bytes], train: list[Picture]) -> Iterator[Row]:
    for number, picture in enumerate(train[100:150]):
        bodies[f"/mirror/{number}.png"] = png(picture.image)
        yield Row(f"/mirror/{number}.png", picture.caption, "same file elsewhere")
    for number, picture in enumerate(train[200:250]):
        bodies[f"/thumbs/{number}.jpg"] = _reencoded(picture.image)
        yield Row(f"/thumbs/{number}.jpg", picture.caption, "re-encoded copy")


def _wrong_captions(bodies: dict[str, bytes], train: list[Picture]) -> Iterator[Row]:
    """Mismatched captions: pictures of their own, which this small CLIP cannot tell from good ones."""
    for number, picture in enumerate(train[300:330]):
        wrong = DIGIT_WORDS[(DIGIT_WORDS.index(picture.name) + 3) % 10]
        path = f"/mislabelled/{number}.png"
        bodies[path] = png(picture.image.rotate(4, fillcolor="white", resample=Image.Resampling.BICUBIC))
        yield Row(path, DIGIT_CAPTIONS[number % len(DIGIT_CAPTIONS)].format(wrong), "digit, wrong caption")


def _hostile() -> Iterator[Row]:
    """What the web is like. The server's answers to these paths are in demo/web.py."""
    kinds = {
        "gone": ("dead link", 40),
        "closed": ("closed port", 5),
        "silent": ("never answers", 4),
        "endless": ("endless body", 4),
        "cut": ("cut short", 10),
        "page": ("web page instead", 30),
        "empty": ("empty body", 10),
        "pixel": ("tracking pixel", 30),
        "bomb": ("png bomb", 5),
        "optout": ("asked to opt out", 20),
        "tdm": ("data mining reserved", 10),
        "private": ("disallowed by robots.txt", 10),
        "internal": ("redirect to a forbidden port", 10),
    }
    words = cycle(DIGIT_WORDS)
    for path, (kind, count) in kinds.items():
        for number in range(count):
            yield Row(
                f"/{path}/{number}.png", f"a handwritten {next(words)}, picture {number} of a {path} folder", kind
            )


def _broken_rows(train: list[Picture]) -> Iterator[Row]:
    yield from (Row("", picture.caption, "empty url") for picture in train[:12])
    yield from (Row("picture.png", picture.caption, "not a url") for picture in train[12:15])
    yield Row("file:///etc/hostname", "a handwritten secret", "file: url")
    yield from (Row(f"/digits/{number}.png", "digit", "caption of one word") for number in range(20))
    # The same pair again, word for word.
    yield from (Row(f"/digits/{number}.png", train[number].caption, "repeated row") for number in range(20, 45))


def _reencoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.resize((48, 48), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
