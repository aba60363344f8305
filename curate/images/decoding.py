"""Bytes → pixels as a viewer shows them: rotated as EXIF says, on white, in sRGB, 8 bits, the first frame.

JPEGs are decoded by libjpeg-turbo at the smallest DCT scale that still has the pixels wanted; the others by Pillow.
"""

from __future__ import annotations

import io
import json
import logging
import math
import struct
import warnings
import zlib
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from curate.images.colours import RGB, apply_profile, foreign_profile, from_bgr, to_rgb
from curate.images.header import Header, Rejected, check_size, open_image, probe
from curate.images.resizing import Resize
from curate.ledger import Reason

# libjpeg's work grows with the scans, and a file of a few kB can have a thousand; real ones have about ten.
MAX_SCANS = 200
# Scaled decoding leaves at least so many times the pixels a side that are wanted: what is then left to the filter looks
# as if all had been decoded (35 dB and more on the sharpest photograph, most often 40).
DCT_MARGIN = 1.5
# libjpeg-turbo has vector code for these; by 8/7, 8/6, 8/5 or 8/3 it takes longer than for all pixels.
_DCT_STEPS = (8, 4, 2)
_COMPONENTS = {"Gray": 1, "CMYK": 4, "YCCK": 4}  # of a JPEG; of any other kind 3
_ORIENTATION = 0x0112
_EXIF_IFD = 0x8769
# Where and by whom (GPS, serial numbers, names of people) is nobody's business here.
_EXIF_TAGS = {0x010F: "Make", 0x0110: "Model", _ORIENTATION: "Orientation", 0x0131: "Software", 0x8298: "Copyright"}
_EXIF_CAMERA_TAGS = {
    0x9003: "DateTimeOriginal",
    0x829A: "ExposureTime",
    0x829D: "FNumber",
    0x8827: "ISOSpeedRatings",
    0x920A: "FocalLength",
}
_LONGEST_EXIF_TEXT = 100
_LARGEST_NOTE = 256 << 10
_LARGEST_UNPACKED = 1 << 20
_NOTES, _PACKED = (b"zTXt", b"iTXt", b"tEXt", b"iCCP"), (b"iCCP", b"zTXt")
_WEBP_NOTES = 0x0C  # the bits of VP8X that say: EXIF, XMP
# Pillow gives these upright, size and pixels; what the boxes of an AVIF say of rotation it gives as EXIF.
_UPRIGHT_ALREADY = ("tiff", "heic")
_NO_RESIZE = Resize()
# Pillow tells of broken EXIF and TIFFs, in the middle of a progress bar; the first just say nothing of the picture, and
# the others are rows with a reason.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image's pixels.

    Attributes:
        rgb: uint8 (H, W, 3), upright; a JPEG's may be fewer than width × height (see `decode`).
        format: as `Header`.
        width: of the whole image, upright.
        height: of the whole image, upright.
        plain: whether every reader that decodes the bytes to RGB sees these pixels.
        lossless: whether the bytes hold the pixels exactly.
        exif: a few facts of the camera and the picture as JSON; None if there are none.
    """

    rgb: RGB
    format: str
    width: int
    height: int
    plain: bool
    lossless: bool
    exif: str | None = None


def decode(content: bytes, *, max_pixels: int, min_side: int = 1, resize: Resize = _NO_RESIZE) -> Decoded:
    """An image's pixels, as a viewer shows them.

    Args:
        content: encoded image.
        max_pixels: most pixels its header may state; checked before any is decoded.
        min_side: least shorter side.
        resize: what the pixels are for: those of a JPEG may come scaled down, to not less than that needs.

    Raises:
        Rejected: NOT_AN_IMAGE, UNSUPPORTED_IMAGE, TOO_MANY_PIXELS, TOO_SMALL, TRUNCATED_IMAGE, CORRUPT_IMAGE.
    """
    header = probe(content)
    check_size(header, max_pixels, min_side)
    try:
        if header.format == "jpeg":
            return _decode_jpeg(content, header, resize)
        return _decode_other(content, header, max_pixels)
    except Rejected:
        raise
    except Exception as error:  # decoders fail in any way on hostile bytes; each costs its row only
        raise Rejected(_why(content, header, error), f"{header.format}: {type(error).__name__}") from error


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


def _decode_jpeg(content: bytes, header: Header, resize: Resize) -> Decoded:
    colours = simplejpeg.decode_jpeg_header(content, strict=False)[2]
    head, in_scan = _before_scan(content)
    in_one_scan = not header.coefficients and in_scan == _COMPONENTS.get(colours, 3)
    if not in_one_scan and content.count(b"\xff\xda") > MAX_SCANS:
        raise Rejected(Reason.CORRUPT_IMAGE, f"jpeg: over {MAX_SCANS} scans")
    orientation, exif, profile = _told(content) if _has_notes(head) else (1, None, None)
    if colours in ("CMYK", "YCCK"):
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            rgb, plain = to_rgb(image)
    else:
        rgb, plain = _turbo(content, header, resize), profile is None
        rgb = apply_profile(rgb, profile) if profile else rgb
    width, height = (header.width, header.height) if orientation < 5 else (header.height, header.width)
    plain = plain and orientation == 1
    return Decoded(_upright(rgb, orientation), "jpeg", width, height, plain=plain, lossless=False, exif=exif)


def _before_scan(content: bytes) -> tuple[bytes, int]:
    """What a JPEG has before its first scan, and how many components lie in that (0: there is none)."""
    place = 2
    while content[place : place + 1] == b"\xff" and place + 4 < len(content):
        code = content[place + 1]
        if code == 0xDA:
            return content[:place], content[place + 4]
        place += 1 if code == 0xFF else 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return content[:place], 0


def _has_notes(head: bytes) -> bool:
    return b"Exif\0\0" in head or b"ICC_PROFILE\0" in head


def _told(content: bytes) -> tuple[int, str | None, bytes | None]:
    """Orientation, EXIF facts and colour profile of a JPEG; no pixel is decoded."""
    with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
        return *_exif(image), foreign_profile(image.info.get("icc_profile"))


def _turbo(content: bytes, header: Header, resize: Resize) -> RGB:
    """Decode by libjpeg-turbo, at the smallest of its quick scales that leaves enough for `resize`."""
    wanted = DCT_MARGIN * (resize.factor(header.width, header.height) or 1.0)
    step = next((step for step in _DCT_STEPS if step * wanted <= 1), 1)
    least = {"min_width": math.ceil(header.width / step), "min_height": math.ceil(header.height / step)}
    # What is scaled down needs no smooth colours between the few that a JPEG has, and no last bit.
    quick = wanted < DCT_MARGIN
    size: dict[str, Any] = {**(least if step > 1 else {}), "fastupsample": quick, "fastdct": quick}
    try:
        return simplejpeg.decode_jpeg(content, "RGB", **size)
    except ValueError as error:
        # Every oddity is an error in strict mode; only missing data makes the picture a broken one.
        if "premature" in str(error).lower():
            raise
        return simplejpeg.decode_jpeg(content, "RGB", strict=False, **size)


def upright(content: bytes, header: Header) -> tuple[int, int, str | None]:
    """Width and height as `decode` gives them, and the facts of the EXIF; no pixel is decoded."""
    try:
        orientation, exif = _notes(content, header.format)
    except Exception:  # noqa: BLE001 - broken notes say nothing; what is wrong with the picture is not asked here
        orientation, exif = 1, None
    size = (header.width, header.height)
    return *(size if orientation < 5 else size[::-1]), exif


def _notes(content: bytes, kind: str) -> tuple[int, str | None]:
    """Orientation and EXIF facts, from what stands around the pixels."""
    if kind == "jpeg":
        return _told(content)[:2] if _has_notes(_before_scan(content)[0]) else (1, None)
    if kind in ("gif", "bmp") or (kind == "webp" and not (content[12:16] == b"VP8X" and content[20] & _WEBP_NOTES)):
        return 1, None
    content = _without_large_notes(content) if kind == "png" else content
    with open_image(content, kind) as image:
        if kind == "png" and "exif" not in image.info and (late := _png_exif(content)):
            image.info["exif"] = late
        orientation, exif = _exif(image, may_decode=False)
    return (1 if kind in _UPRIGHT_ALREADY else orientation), exif


def _png_exif(content: bytes) -> bytes | None:
    """The EXIF of a PNG wherever it stands; Pillow would decode the pixels to come to what is behind them."""
    place = 8
    while place + 8 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] == b"eXIf":
            return b"Exif\0\0" + content[place + 8 : end - 4]
        place = end
    return None


def _exif(image: Image.Image, *, may_decode: bool = True) -> tuple[int, str | None]:
    """The orientation (1 to 8), and the facts worth keeping as JSON."""
    try:
        read = image.getexif() if may_decode else Image.Image.getexif(image)  # a PNG's own decodes
        camera = read.get_ifd(_EXIF_IFD) if _EXIF_IFD in read else {}
        found = {name: read[tag] for tag, name in _EXIF_TAGS.items() if tag in read}
        found |= {name: camera[tag] for tag, name in _EXIF_CAMERA_TAGS.items() if tag in camera}
        facts = {name: shown for name, value in found.items() if (shown := _shown(value)) is not None}
    except Exception:  # noqa: BLE001 - broken EXIF says nothing; the picture is fine
        return 1, None
    orientation = facts.get("Orientation")
    turned = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True) if facts else None
    return turned, text


def _shown(value: Any) -> str | float | None:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        text = "".join(letter for letter in value if letter.isprintable()).strip()
        return text[:_LONGEST_EXIF_TEXT] or None
    if isinstance(value, tuple):
        return _shown(value[0]) if value else None
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else round(number, 6)


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
    if header.format == "png":
        content = _without_large_notes(content)
    with open_image(content, header.format) as image:
        # A frame can be larger than its screen.
        check_size(replace(header, width=image.size[0], height=image.size[1]), max_pixels)
        if header.format == "png":
            image.load()  # getexif would, and a second load of broken pixels is silent and black
        orientation, exif = _exif(image)
        orientation = 1 if header.format in _UPRIGHT_ALREADY else orientation
        animated = header.format in ("png", "webp") and getattr(image, "n_frames", 1) > 1
        if image.mode == "F":
            raise Rejected(Reason.UNSUPPORTED_IMAGE, f"{header.format} of floating-point numbers")
        one_webp = header.format == "webp" and not animated
        rgb, unchanged = _webp(content, image) if one_webp else to_rgb(image)
    rgb = _upright(rgb, orientation)
    lossless = header.format in ("png", "bmp", "gif", "tiff") or (header.format == "webp" and b"VP8L" in content[12:64])
    plain = unchanged and not animated and orientation == 1 and header.format in ("png", "webp")
    height, width = rgb.shape[:2]
    return Decoded(rgb, header.format, width, height, plain=plain, lossless=lossless, exif=exif)


def _webp(content: bytes, image: Image.Image) -> tuple[RGB, bool]:
    """As `to_rgb`, by OpenCV: the same library and pixels as Pillow's, in half of the memory and time."""
    if len(content) < int.from_bytes(content[4:8], "little") + 8:
        raise EOFError("the file is truncated")
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint8 or pixels.shape[:2] != image.size[::-1]:
        raise ValueError("broken pixels")
    return from_bgr(pixels.astype(np.uint8, copy=False), foreign_profile(image.info.get("icc_profile")))


def _without_large_notes(content: bytes) -> bytes:
    """A PNG without the texts and profiles that are, or unpack to, more than Pillow takes."""
    place, kept, since = 8, [], 0
    while place + 8 <= len(content) and (name := content[place + 4 : place + 8]) != b"IDAT":
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if name in _NOTES and (
            end - place > _LARGEST_NOTE or (name in _PACKED and _unpacks_large(content[place + 8 : end - 4]))
        ):
            kept.append(content[since:place])
            since = end
        place = end
    return b"".join([*kept, content[since:]]) if kept else content  # most have none, and a copy takes memory


def _unpacks_large(chunk: bytes) -> bool:
    packed = chunk[chunk.find(b"\0") + 2 :]
    unpack = zlib.decompressobj()
    try:
        return len(unpack.decompress(packed, _LARGEST_UNPACKED)) == _LARGEST_UNPACKED
    except zlib.error:
        return True
