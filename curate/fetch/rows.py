"""The rows of a raw shard: the candidate's columns, and what became of it.

The columns that img2dataset has too keep its names and words.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curate.config import FetchConfig
from curate.ledger import Reason

if TYPE_CHECKING:
    import pyarrow as pa

SUCCESS = "success"
# Column → Arrow type. width and height are of the stored image, original_* of the one that came, upright both.
RAW_COLUMNS = {
    "status": "string",
    "error_message": "string",
    "width": "int32",
    "height": "int32",
    "original_width": "int32",
    "original_height": "int32",
    "sha256": "string",
    "reason": "string",
    "value": "string",
    "http_status": "int32",
    "bytes": "int64",
    "format": "string",
    "phash": "int64",
    "luma_mean": "double",
    "luma_std": "double",
    "entropy": "double",
    "blur": "double",
    "dominant_share": "double",
    "border_share": "double",
    "aspect": "double",
    "exif": "string",
}
# Reasons that lie in the bytes that came, which img2dataset calls failed_to_resize.
_OF_THE_BYTES = frozenset(
    {
        Reason.NOT_AN_IMAGE,
        Reason.UNSUPPORTED_IMAGE,
        Reason.TOO_MANY_PIXELS,
        Reason.TOO_SMALL,
        Reason.TRUNCATED_IMAGE,
        Reason.CORRUPT_IMAGE,
    }
)
_LONGEST_VALUE = 200
_EXTENSIONS = {"jpeg": "jpg", "tiff": "tif"}


@dataclass(frozen=True, slots=True)
class Picture:
    """What became of a URL: the facts for the row, and the image if it is stored."""

    facts: dict[str, Any]
    content: bytes | None = None
    extension: str = "jpg"


def raw_schema(plan: pa.Schema) -> pa.Schema:
    """The columns of a raw shard: the plan's, then ours."""
    import pyarrow as pa

    ours = [pa.field(name, pa.type_for_alias(kind)) for name, kind in RAW_COLUMNS.items()]
    return pa.schema([*plan.remove_metadata(), *ours])


def rejected(reason: Reason, value: str, http_status: int | None = None) -> dict[str, Any]:
    """The facts of a row that has no image."""
    # A server has written parts of it: it goes into terminals and pages.
    value = "".join(letter if letter.isprintable() else "?" for letter in value[:_LONGEST_VALUE])
    return {
        "status": "failed_to_resize" if reason in _OF_THE_BYTES else "failed_to_download",
        "error_message": f"{reason.value}: {value}" if value else reason.value,
        "reason": reason.value,
        "value": value or None,
        "http_status": http_status,
    }


def picture(content: bytes, http_status: int | None, config: FetchConfig) -> Picture:
    """Check, decode, resize, encode and measure a body. Runs in threads: the codecs release the GIL."""
    from curate.images import Rejected

    came = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "http_status": http_status}
    try:
        found = _decoded(content, config) if config.decode else _looked_at(content, config)
    except Rejected as error:
        return Picture({**rejected(error.reason, error.value, http_status), **came})
    width, height = found.facts["original_width"], found.facts["original_height"]
    aspect = round(max(width, height) / min(width, height), 4)
    return Picture({**found.facts, **came, "status": SUCCESS, "aspect": aspect}, found.content, found.extension)


def _decoded(content: bytes, config: FetchConfig) -> Picture:
    from curate.images import Encoding, Resize, decode, pixel_signals, store

    resize = Resize(config.resize_mode, config.image_size, config.resize_only_if_bigger)
    encoding = Encoding(config.encode_format, config.encode_quality, config.skip_reencode)
    decoded = decode(content, max_pixels=config.max_pixels, min_side=config.min_side, resize=resize)
    stored = store(decoded, content, resize, encoding)
    height, width = stored.rgb.shape[:2]
    facts = {
        "width": width,
        "height": height,
        "original_width": decoded.width,
        "original_height": decoded.height,
        "format": decoded.format,
        "exif": decoded.exif,
        **pixel_signals(stored.rgb),
    }
    return Picture(facts, stored.content, stored.extension)


def _looked_at(content: bytes, config: FetchConfig) -> Picture:
    """What the header says, and the bytes as they came; no pixel is decoded."""
    from curate.images import check_end, check_size, probe, upright

    header = probe(content)
    check_size(header, config.max_pixels, config.min_side)
    check_end(content, header)
    width, height, exif = upright(content, header)
    facts = {
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "format": header.format,
        "exif": exif,
    }
    return Picture(facts, content, _EXTENSIONS.get(header.format, header.format))
