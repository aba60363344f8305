"""Bytes from anywhere → checked pixels → the bytes that are stored, and the signals that pixels give.

Nothing is decoded before its header has been read: format (JPEG, PNG, WebP, GIF; all others are refused, so no rare
decoder ever runs) and size. JPEGs are decoded by libjpeg-turbo at the smallest DCT scale that still has the pixels
wanted; the others by Pillow. Pixels are what a viewer shows: EXIF rotation applied, transparency on white, the first
frame of an animation, 16 bits scaled to 8.

What is stored: the bytes as they came whenever every reader would see those same pixels in them; else a JPEG; but a
lossless image that needs a change and no scaling is stored as PNG, so that nothing is lost by it.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from curate.ledger import Reason

RGB = npt.NDArray[np.uint8]
SNIFF_BYTES = 16
# libjpeg's work grows with the scans, and a file of a few kB can have a thousand; real ones have about ten.
MAX_SCANS = 200
LONGEST_JPEG_SIDE = 65_500  # libjpeg's own limit
_ORIENTATION = 0x0112


class Rejected(Exception):  # noqa: N818 - an outcome of a row, not an error of the program
    """A row that is dropped.

    Attributes:
        reason: a `Reason`.
        value: what decided it, as text.
    """

    def __init__(self, reason: Reason, value: str = "") -> None:
        super().__init__(f"{reason.value}: {value}" if value else reason.value)
        self.reason, self.value = reason, value


@dataclass(frozen=True, slots=True)
class Header:
    """What an image says of itself: format, and size as it is stored, before rotation."""

    format: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image's pixels.

    Attributes:
        rgb: uint8 (H, W, 3), upright; a JPEG's may be fewer than width × height (see `decode`).
        format: jpeg, png, webp or gif.
        width: of the whole image, upright.
        height: of the whole image, upright.
        plain: whether every reader that decodes the bytes to RGB sees these pixels.
        lossless: whether the bytes hold the pixels exactly.
    """

    rgb: RGB
    format: str
    width: int
    height: int
    plain: bool
    lossless: bool


@dataclass(frozen=True, slots=True)
class Stored:
    """What goes into the tar: encoded image, its extension, and its pixels."""

    content: bytes
    extension: str
    rgb: RGB


# --- reading the header ----------------------------------------------------------------------------------------------


def sniff(content: bytes | bytearray) -> str | None:
    """The format that the first bytes show: jpeg, png, webp, gif, or None."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    return "gif" if content[:6] in (b"GIF87a", b"GIF89a") else None


def probe(content: bytes) -> Header:
    """Format and size from the header alone.

    Raises:
        Rejected: NOT_AN_IMAGE, or TRUNCATED_IMAGE or CORRUPT_IMAGE in the header already.
    """
    kind = sniff(content)
    if kind is None:
        raise Rejected(Reason.NOT_AN_IMAGE, f"begins with {content[:8].hex()}")
    sizes = {"jpeg": _jpeg_size, "png": _png_size, "webp": _webp_size, "gif": _gif_size}
    try:
        width, height = sizes[kind](content)
    except struct.error as error:
        raise Rejected(Reason.TRUNCATED_IMAGE, f"{kind} header") from error
    except ValueError as error:
        raise Rejected(Reason.CORRUPT_IMAGE, f"{kind} header") from error
    if width < 1 or height < 1:
        raise Rejected(Reason.CORRUPT_IMAGE, f"{width}x{height}")
    return Header(kind, width, height)


def _png_size(content: bytes) -> tuple[int, int]:
    if content[12:16] != b"IHDR":
        raise ValueError("IHDR is not first")
    width, height = struct.unpack_from(">II", content, 16)
    return width, height


def _gif_size(content: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", content, 6)
    return width, height


def _webp_size(content: bytes) -> tuple[int, int]:
    """RFC 9649: extended (canvas), lossless, or lossy (its key frame's header)."""
    kind = content[12:16]
    if kind == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", content, 24)
        return (low_w | high_w << 16) + 1, (low_h | high_h << 16) + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no picture chunk")


def _jpeg_size(content: bytes) -> tuple[int, int]:
    """Walk the segments up to the frame header (SOF0–SOF15 without DHT, JPG and DAC)."""
    place = 2
    while True:
        marker, code = struct.unpack_from(">BB", content, place)
        if marker != 0xFF:
            raise ValueError("no marker where one must be")
        if code == 0xFF:  # fill byte
            place += 1
            continue
        if code == 0xD9 or code == 0xDA:
            raise ValueError("no frame before the first scan")
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", content, place + 5)
            return width, height
        (length,) = struct.unpack_from(">H", content, place + 2)
        place += 2 + length


# --- decoding --------------------------------------------------------------------------------------------------------


def decode(content: bytes, *, max_pixels: int, min_side: int = 1, short_side: int = 0) -> Decoded:
    """An image's pixels, as a viewer shows them.

    Args:
        content: encoded image.
        max_pixels: most pixels its header may state; checked before any is decoded.
        min_side: least shorter side.
        short_side: the pixels of a JPEG may come scaled down, their shorter side not below this (0: all pixels).

    Raises:
        Rejected: NOT_AN_IMAGE, TOO_MANY_PIXELS, TOO_SMALL, TRUNCATED_IMAGE, CORRUPT_IMAGE.
    """
    header = probe(content)
    _check_size(header.width, header.height, max_pixels, min_side)
    try:
        if header.format == "jpeg":
            return _decode_jpeg(content, header, short_side)
        return _decode_other(content, header, max_pixels)
    except Rejected:
        raise
    except Exception as error:  # decoders fail in any way on hostile bytes; each costs its row only
        raise Rejected(_why(content, header, error), f"{header.format}: {type(error).__name__}") from error


def decode_cost(content: bytes) -> int:
    """About how many bytes of memory `decode` will take for these, from the header alone; 0 if it will refuse them."""
    try:
        header = probe(content)
    except Rejected:
        return 0
    return header.width * header.height * (3 if header.format == "jpeg" else 7)


def _check_size(width: int, height: int, max_pixels: int, min_side: int = 1) -> None:
    if width * height > max_pixels:
        raise Rejected(Reason.TOO_MANY_PIXELS, f"{width}x{height}")
    if min(width, height) < min_side:
        raise Rejected(Reason.TOO_SMALL, f"{width}x{height}")


def _why(content: bytes, header: Header, error: Exception) -> Reason:
    """Whether a decoder failed because the bytes end too early."""
    if isinstance(error, Image.DecompressionBombError):
        return Reason.TOO_MANY_PIXELS
    short = isinstance(error, EOFError) or any(word in str(error).lower() for word in ("truncated", "premature"))
    if header.format == "webp":
        (said,) = struct.unpack_from("<I", content, 4)
        short = short or len(content) < said + 8
    if header.format == "png":
        short = short or b"IEND" not in content
    return Reason.TRUNCATED_IMAGE if short else Reason.CORRUPT_IMAGE


def _decode_jpeg(content: bytes, header: Header, short_side: int) -> Decoded:
    if content.count(b"\xff\xda") > MAX_SCANS:
        raise Rejected(Reason.CORRUPT_IMAGE, f"jpeg: over {MAX_SCANS} scans")
    colours = simplejpeg.decode_jpeg_header(content, strict=False)[2]
    if colours in ("CMYK", "YCCK"):
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            rgb = np.asarray(image.convert("RGB"))
    else:
        rgb = _turbo(content, header, short_side)
    orientation = _jpeg_orientation(content)
    width, height = (header.width, header.height) if orientation < 5 else (header.height, header.width)
    plain = orientation == 1 and colours not in ("CMYK", "YCCK")
    return Decoded(_upright(rgb, orientation), "jpeg", width, height, plain=plain, lossless=False)


def _turbo(content: bytes, header: Header, short_side: int) -> RGB:
    """Decode by libjpeg-turbo, at the smallest of its scales with a shorter side of at least `short_side`."""
    scale = short_side / min(header.width, header.height) if short_side else 1.0
    least = {"min_width": math.ceil(header.width * scale), "min_height": math.ceil(header.height * scale)}
    size: dict[str, Any] = least if scale < 1 else {}
    try:
        return simplejpeg.decode_jpeg(content, "RGB", **size)
    except ValueError as error:
        # Every oddity is an error in strict mode; only missing data makes the picture a broken one.
        if "premature" in str(error).lower():
            raise
        return simplejpeg.decode_jpeg(content, "RGB", strict=False, **size)


def _jpeg_orientation(content: bytes) -> int:
    if b"Exif\0\0" not in content[:65536]:
        return 1
    with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
        return _orientation(image)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - broken EXIF says nothing; the picture is fine
        return 1
    return value if value in range(1, 9) else 1


def _upright(rgb: RGB, orientation: int) -> RGB:
    """Turn pixels as the EXIF orientation (1 to 8) asks."""
    turned = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: p[::-1].swapaxes(0, 1),
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
        8: lambda p: p[:, ::-1].swapaxes(0, 1),
    }[orientation](rgb)
    return np.ascontiguousarray(turned)


def _decode_other(content: bytes, header: Header, max_pixels: int) -> Decoded:
    with Image.open(io.BytesIO(content), formats=[header.format.upper()]) as image:
        _check_size(*image.size, max_pixels)  # a GIF's frame can be larger than its screen
        orientation = _orientation(image)
        animated = header.format != "gif" and getattr(image, "n_frames", 1) > 1  # a GIF's would have to be counted
        rgb, unchanged = _to_rgb(image)
    rgb = _upright(rgb, orientation)
    lossless = header.format != "webp" or b"VP8L" in content[12:64]
    plain = unchanged and not animated and orientation == 1 and header.format != "gif"
    height, width = rgb.shape[:2]
    return Decoded(rgb, header.format, width, height, plain=plain, lossless=lossless)


def _to_rgb(image: Image.Image) -> tuple[RGB, bool]:
    """The pixels of the first frame on white, and whether a plain conversion to RGB would give the same."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip to white
        grey = np.asarray(image).astype(np.uint32)
        return np.repeat((((grey & 0xFFFF) + 128) // 257).astype(np.uint8)[..., None], 3, axis=2), False
    if not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        return np.asarray(image.convert("RGB")), True
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=alpha)
    return np.asarray(white), alpha.getextrema()[0] == 255


# --- storing ---------------------------------------------------------------------------------------------------------


def store(decoded: Decoded, content: bytes, *, max_side: int, quality: int) -> Stored:
    """The bytes to keep of an image; the same image and settings always give the same.

    Args:
        decoded: the image, decoded with `short_side=max_side`.
        content: the bytes as they came.
        max_side: most pixels of the shorter side; larger images are scaled down by area. 0 keeps the bytes as they
            came.
        quality: of a JPEG, if one is made.
    """
    came_as = "jpg" if decoded.format == "jpeg" else decoded.format
    scaled = 0 < max_side < min(decoded.width, decoded.height)
    rgb = shrink(decoded, max_side) if scaled else decoded.rgb
    if max_side == 0 or (decoded.plain and not scaled):
        return Stored(content, came_as, rgb)
    if (decoded.lossless and not scaled) or max(rgb.shape) > LONGEST_JPEG_SIDE:
        return Stored(_png(rgb), "png", rgb)
    return Stored(simplejpeg.encode_jpeg(rgb, quality, "RGB", "420"), "jpg", rgb)


def shrink(decoded: Decoded, short_side: int) -> RGB:
    """The pixels scaled down by area to this shorter side, the shape that of the whole image."""
    factor = short_side / min(decoded.width, decoded.height)
    size = (max(1, round(decoded.width * factor)), max(1, round(decoded.height * factor)))
    return np.asarray(cv2.resize(decoded.rgb, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _png(rgb: RGB) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(rgb).save(sink, "PNG")
    return sink.getvalue()


# --- signals ---------------------------------------------------------------------------------------------------------


def pixel_signals(rgb: RGB) -> dict[str, int | float]:
    """Of the pixels, `phash`; of their luma (0–255), `luma_mean`, `luma_std` and the histogram's `entropy` in bits."""
    luma = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    share = cv2.calcHist([luma], [0], None, [256], [0, 256]).ravel().astype(np.float64) / luma.size
    levels = np.arange(256.0)
    mean = float(share @ levels)
    seen = share[share > 0]
    return {
        "phash": _phash_of_luma(luma),
        "luma_mean": round(mean, 3),
        "luma_std": round(math.sqrt(float(share @ (levels - mean) ** 2)), 3),
        "entropy": round(abs(float(seen @ np.log2(seen))), 4),
    }


def phash(rgb: RGB) -> int:
    """A 64-bit perceptual hash, as a signed number.

    Its bits say which of the 8 × 8 lowest DCT coefficients of the luma at 32 × 32 lie above their median. Copies of an
    image that were scaled or re-encoded differ in few bits, different images in about 32 (Zauner 2010, pHash). The
    first coefficient, the image's brightness, is left out: its bit is always 0. A flat image's hash is 0.
    """
    return _phash_of_luma(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))


def _phash_of_luma(luma: npt.NDArray[Any]) -> int:
    small = cv2.resize(luma, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True)
