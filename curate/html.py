"""What the two reports share: the page's frame, safe text and links, and how figures are written.

A report is one file that opens offline and may be mailed around, and most of its text comes from strangers on the
web. So:

- Jinja2 escapes every value, and `visible` goes over each one first: control characters, bidirectional overrides and
  lone surrogates become a replacement mark, so that a caption can neither close a tag nor turn the text around it.
- The page's Content-Security-Policy allows nothing but `data:` pictures and the one style sheet and one script whose
  sha256 it names; its data stand beside them as JSON, which is no script. There are no style or event attributes
  anywhere; a page that was tampered with would not run.
- A link goes to http(s), or it is plain text.

Charts are in `curate.charts`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2
from markupsafe import Markup

FRAME = Path(__file__).parent / "report"  # page.html.j2, page.css, page.js
MAX_BYTES = 8_000_000  # a report that a browser opens at once, and a mail server lets through
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# C0 and C1 controls without tab and newline, bidirectional marks, line separators, surrogates, byte-order mark.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


# --- text ------------------------------------------------------------------------------------------------------------


def visible(value: Any) -> str:
    """A value's text, with a replacement mark for what would hide or reorder other characters; markup as it is."""
    return value if isinstance(value, Markup) else _HIDDEN.sub(REPLACEMENT, str(value))


def clip(text: str | None, length: int = 160) -> str:
    """Text on one line, at most `length` characters, with … where it was cut."""
    line = " ".join((text or "").split())
    return line if len(line) <= length else line[: length - 1] + "…"


def link(url: str | None, text: str | None = None) -> Markup:
    """A link that tells the other side nothing of this page; the bare text where `url` is not a plain http(s) URL."""
    shown = Markup("<bdi>{}</bdi>").format(visible(clip(text if text is not None else url, 80)))
    if not linkable(url):
        return shown
    return Markup('<a href="{}" rel="noopener noreferrer nofollow" target="_blank">{}</a>').format(url, shown)


def linkable(url: str | None) -> bool:
    """Whether a text is a plain http(s) URL."""
    if url is None or len(url) > 2_000 or _HIDDEN.search(url) or re.search(r"\s", url):
        return False
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


# --- figures ---------------------------------------------------------------------------------------------------------


def count(value: float) -> str:
    """`12,345`."""
    return f"{value:,.0f}"


def share(part: float, whole: float) -> str:
    """`34.3 %`; `–` of nothing, and never 0 % or 100 % for what is not exactly that."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %"


def size(num_bytes: float) -> str:
    """`7.9 MB`, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """`48 s`, `12 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


# --- the page --------------------------------------------------------------------------------------------------------


def render(templates: Path, values: Mapping[str, Any], *, more: Sequence[str] = (), data: Any = None) -> str:
    """Fill `report.html.j2` of the folder `templates`, which extends the shared `page.html.j2`.

    Args:
        templates: folder of the template.
        values: what the template names; everything but `Markup` is made visible and escaped.
        more: names of style sheets and scripts to go with `page.css` and `page.js`, in order, in `templates` or beside
            the shared ones; scripts share one scope.
        data: JSON-ready, for the scripts: they find it in `#data`, and may only ever show it as text.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([templates, FRAME]),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clip": clip, "link": link, "count": count, "size": size, "duration": duration}
    environment.globals |= {"share": share}
    style, script = (_sources(kind, templates, more) for kind in ("css", "js"))
    frame = {
        "style": Markup(style),  # noqa: S704 - our own files
        "script": Markup(script),  # noqa: S704 - our own files
        "policy": policy(style, script),
        "data": None if data is None else as_data(data),
    }
    page = environment.get_template("report.html.j2").render(**frame, **values)
    # A lone surrogate in markup of ours would not encode; there is none, but a report is no place to fail.
    return page.encode("utf-8", "replace").decode("utf-8")


def _sources(kind: str, templates: Path, more: Sequence[str]) -> str:
    names = [f"page.{kind}", *(name for name in more if name.endswith(f".{kind}"))]
    paths = (next(path for path in (templates / name, FRAME / name) if path.is_file()) for name in names)
    return "".join(path.read_text("utf-8") for path in paths)


def as_data(data: Any) -> Markup:
    """Data as JSON that nothing in it can end the script element it stands in; all text in it made visible."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)
    # Outside of strings JSON has none of these, so that each can be written as an escape.
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(_HIDDEN.sub(REPLACEMENT, text))  # noqa: S704 - no < is left


def policy(style: str, script: str) -> str:
    """The Content-Security-Policy of a page with this one style sheet and this one script, and `data:` pictures."""
    return "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_source_hash(style)}'",
            f"script-src '{_source_hash(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _source_hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
