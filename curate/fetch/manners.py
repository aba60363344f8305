"""What servers ask of us: opt-outs, and when to come back. Pure functions over headers; clocks are handed in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

# Not to be used for AI, or not to be indexed; `none` is noindex and nofollow together.
OPT_OUTS = frozenset({"noai", "noimageai", "noml", "noindex", "noimageindex", "none"})
# Directives with a colon of their own, which is not the end of an agent's name.
WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_SCOPE = re.compile(r"\s*([\w.*-]+)\s*:\s*(.*)", re.DOTALL)

# 425 Too Early, 522 and 524 are a CDN's words for an origin that did not answer.
MAY_PASS = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 522, 523, 524})


def opt_out(headers: Iterable[str], user_agent: str) -> str | None:
    """The first directive in `X-Robots-Tag` headers that asks us to leave an image alone; None if there is none.

    A directive after an agent's name (`googlebot: noindex, noai`) is for that agent until the next name or the end
    of the header; it binds us only if the name is ours.

    Args:
        headers: the values of all X-Robots-Tag headers of a response.
        user_agent: our User-Agent; its first word up to a slash is our name.
    """
    ours = {"*", re.split(r"[/\s]", user_agent.strip(), maxsplit=1)[0].lower()}
    for header in headers:
        for_us = True
        for part in header.split(","):
            scope = _SCOPE.fullmatch(part)
            if scope and scope[1].lower() not in WITH_VALUE:
                for_us, part = scope[1].lower() in ours, scope[2]  # noqa: PLW2901 - the part without its scope
            directive = part.strip().lower()
            if for_us and directive in OPT_OUTS:
                return directive
    return None


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
    except (ValueError, IndexError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - now).total_seconds())


def backoff_after(attempt: int, first_s: float, key: str) -> float:
    """Seconds to wait after try number `attempt` (from 0): `first_s` doubled each time, times 0.5 to 1.5.

    The jitter comes from the key, so that rows spread out and yet a run can be repeated.
    """
    draw = int.from_bytes(hashlib.sha256(f"{key} {attempt}".encode()).digest()[:4], "big") / 2**32
    return first_s * 2.0**attempt * (0.5 + draw)
