"""What servers ask of us: opt-outs, and when to come back. Pure functions over headers; clocks are handed in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from curate.config import AGENT

# Not to be used for AI, or not to be indexed; `none` is noindex and nofollow together.
DIRECTIVES = frozenset({"noai", "noimageai", "noml", "noindex", "noimageindex", "none"})
TDM_RESERVATION = "tdm-reservation"
# Directives with a colon of their own, which is not the end of an agent's name.
WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_SCOPE = re.compile(r"\s*([\w.*-]+)\s*:\s*(.*)", re.DOTALL)

# 425 Too Early, 522 and 524 are a CDN's words for an origin that did not answer.
MAY_PASS = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 522, 523, 524})
# Asked for too much, or too busy: the host itself wants fewer requests.
SLOW_DOWN = frozenset({429, 503})


def opt_out(robots_tags: Iterable[str], tdm: Iterable[str] = (), ignored: Collection[str] = ()) -> str | None:
    """The first thing in an answer's headers that asks us to leave an image alone; None if there is none.

    The headers of the answer with the image count, not those of a redirect on the way to it: they speak of the page
    that moved. What is written badly but can only be meant as an opt-out is taken for one.

    Args:
        robots_tags: the values of all `X-Robots-Tag` headers. A directive after an agent's name (`googlebot: noindex,
            noai`) is for that agent until the next name or the end of the header; it binds us only if the name is ours.
        tdm: the values of all `TDM-Reservation` headers (W3C TDMRep): 1 keeps text and data mining to the owner, also
            where a `TDM-Policy` beside it says under which terms it may be bought.
        ignored: names of opt-outs not to be heeded.
    """
    for header in robots_tags:
        for directive in _directives(header):
            if directive in DIRECTIVES and directive not in ignored:
                return directive
    is_reserved = any(part.strip() == "1" for header in tdm for part in header.split(","))
    return TDM_RESERVATION if is_reserved and TDM_RESERVATION not in ignored else None


def _directives(header: str) -> Iterable[str]:
    """The directives of one X-Robots-Tag header that are for every agent or for us."""
    for_us = True
    for part in re.split("[,;]", header.lower()):
        scope = _SCOPE.fullmatch(part)
        name, text = scope.groups() if scope else (None, part)
        if name in WITH_VALUE:
            continue
        if name in DIRECTIVES:  # `noai: true`
            text = name
        elif name is not None:
            for_us = name in ("*", AGENT)
        if for_us:
            yield text.strip()


def retry_after_s(header: str | None, now: datetime) -> float | None:
    """Seconds that a `Retry-After` header asks to wait, from 0; None if it is absent or says nothing.

    Args:
        header: seconds or an HTTP date (RFC 9110, 10.2.3).
        now: an aware time.
    """
    text = (header or "").strip()
    if re.fullmatch(r"[0-9]{1,12}", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, IndexError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - now).total_seconds())


def backoff_after(attempt: int, first_s: float, key: str) -> float:
    """Seconds to wait after try number `attempt` (from 0): anything up to `first_s` doubled each time (full jitter).

    The jitter comes from the key, so that rows spread out and yet a run can be repeated.
    """
    draw = int.from_bytes(hashlib.sha256(f"{key} {attempt}".encode()).digest()[:4], "big") / 2**32
    return first_s * 2.0**attempt * draw
