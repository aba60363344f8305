"""Pixels → the bytes that are stored.

The bytes as they came, whenever every reader would see the same pixels in them and they need no other size; else an
encoded image; but a lossless image that needs a change and no other size is stored as PNG, so that nothing is lost by
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from curate.images.colours import RGB
from curate.images.decoding import Decoded
from curate.images.header import Rejected
from curate.images.resizing import Resize, resized
from curate.ledger import Reason

LONGEST_SIDE = {"jpg": 65_500, "webp": 16_383, "png": 1_000_000}  # of the libraries
_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How images are encoded: jpg, webp or png, and the quality (png: compression, 0 to 9).

    Attributes:
        format: jpg, webp or png.
        quality: 0 to 100; of png the compression, 0 to 9.
        only_if_changed: whether bytes that can stay as they came do.
    """

    format: str = "jpg"
    quality: int = 95
    only_if_changed: bool = True


@dataclass(frozen=True, slots=True)
class Stored:
    """What goes into the tar: encoded image, its extension, and its pixels."""

    content: bytes
    extension: str
    rgb: RGB


def store(decoded: Decoded, content: bytes, resize: Resize, encoding: Encoding) -> Stored:
    """The bytes to keep of an image; the same image and settings always give the same.

    Args:
        decoded: the image, decoded for the same `resize`.
        content: the bytes as they came.
        resize: to which size.
        encoding: as what.

    Raises:
        Rejected: TOO_MANY_PIXELS, of what grows too large by resizing, or is longer than PNG takes; UNSUPPORTED_IMAGE,
            of what the encoder refuses for another reason.
    """
    if resize.factor(decoded.width, decoded.height) is None:
        if encoding.only_if_changed and decoded.plain:
            return Stored(content, _EXTENSIONS[decoded.format], decoded.rgb)
        if encoding.only_if_changed and decoded.lossless:
            return Stored(_encode(decoded.rgb, "png", 6), "png", decoded.rgb)
    rgb = resized(decoded.rgb, resize, decoded.width, decoded.height)
    fits = max(rgb.shape) <= LONGEST_SIDE[encoding.format]
    kind, quality = (encoding.format, encoding.quality) if fits else ("png", 6)
    return Stored(_encode(rgb, kind, quality), kind, rgb)


def _encode(rgb: RGB, kind: str, quality: int) -> bytes:
    height, width = rgb.shape[:2]
    if max(width, height) > LONGEST_SIDE[kind]:
        raise Rejected(Reason.TOO_MANY_PIXELS, f"{width}x{height}, which {kind} cannot hold")
    if kind == "jpg":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality, "RGB", "420"))
    setting = cv2.IMWRITE_WEBP_QUALITY if kind == "webp" else cv2.IMWRITE_PNG_COMPRESSION
    done, encoded = cv2.imencode(f".{kind}", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [setting, quality])
    if not done:
        raise Rejected(Reason.UNSUPPORTED_IMAGE, f"{width}x{height}, which cannot be stored as {kind}")
    return bytes(encoded.tobytes())
