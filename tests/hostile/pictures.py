"""Pictures of every kind, whole, broken and malicious, as the hostile server sends them."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

from tests.curate.fetching import encoded, photo

HUGE = (7_100, 7_000)
"""49.7 million pixels: just under the default limit."""


def kinds() -> dict[str, bytes]:
    """One whole small picture of each kind that is decoded."""
    image = photo(1)
    grey16 = Image.fromarray((np.arange(64 * 48, dtype=np.uint32) * 21 % 65536).astype(np.uint16).reshape(48, 64))
    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [photo(number) for number in range(3)]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {
        "jpeg": encoded(image),
        "jpeg-progressive": encoded(image, progressive=True),
        "jpeg-grey": encoded(image.convert("L")),
        "jpeg-cmyk": encoded(image.convert("CMYK")),
        "jpeg-turned": encoded(image, exif=turned),
        "jpeg-icc": encoded(image, icc_profile=profile),
        "jpeg-broken-icc": encoded(image, icc_profile=b"\xff" * 4000),
        "jpeg-broken-exif": encoded(image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 200),
        "jpeg-big-exif": encoded(image, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0" + bytes(64_000)),
        "jpeg-big-icc": encoded(image, icc_profile=profile + bytes(2_000_000)),
        "png": encoded(image, "PNG"),
        "png-1-bit": encoded(image.convert("1"), "PNG"),
        "png-16-bit": encoded(grey16, "PNG"),
        "png-palette": encoded(image.quantize(16), "PNG"),
        "png-alpha": encoded(clear, "PNG"),
        "png-big-text": _with_chunk(encoded(image, "PNG"), b"zTXt", b"t\0\0" + zlib.compress(bytes(50_000_000))),
        "apng": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "webp": encoded(image, "WEBP"),
        "webp-lossless": encoded(clear, "WEBP", lossless=True),
        "webp-animated": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF", compression="tiff_lzw"),
        "avif": encoded(image, "AVIF"),
        "heic": _heic(image),
    }


def _heic(image: Image.Image) -> bytes:
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)
    return encoded(image, "HEIF")


def truncated(kind: str) -> bytes:
    """The first two thirds of a noisy picture of that kind."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8))
    whole = _heic(noise) if kind == "heic" else encoded(noise, kind.upper())
    return whole[: len(whole) * 2 // 3]


def corrupt_png() -> bytes:
    """A PNG whose pixels are no zlib stream, checksums right."""
    start = encoded(photo(), "PNG")[:33]
    return start + _chunk(b"IDAT", b"\x78\x9c" + b"\xff" * 400) + _chunk(b"IEND", b"")


def png_bomb(side: int = 60_000) -> bytes:
    """A header that promises more pixels than are allowed."""
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + bytes(100)


def gif_bomb() -> bytes:
    """Two thousand frames: only the first is anybody's business."""
    two = encoded(photo(), "GIF", save_all=True, append_images=[photo(1)])
    second = two.find(b"\x21\xf9", two.find(b"\x2c"))
    return two[:-1] + two[second:-1] * 2_000 + b"\x3b"


def gif_large_frame() -> bytes:
    """A screen of 10 × 10 with a first frame of 60 000 × 60 000."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0x81, 0, 0) + bytes(12) + frame + b"\x3b"


def apng_bomb() -> bytes:
    """Five thousand frames by its word, one to show."""
    plain = encoded(photo(), "PNG")
    return _with_chunk(plain, b"acTL", struct.pack(">II", 5_000, 0))


def jpeg_of_scans(count: int = 1_000) -> bytes:
    """A progressive JPEG whose last scan stands a thousand times: minutes of work in a few kB."""
    content = encoded(photo(), progressive=True)
    place = content.rfind(b"\xff\xda")
    return content[:place] + content[place:-2] * count + content[-2:]


def huge() -> dict[str, bytes]:
    """HUGE in each kind whose encoder is quick: one colour, so that few bytes become many pixels."""
    plain = Image.new("RGB", HUGE, (200, 30, 60))
    pixels = np.full((HUGE[1], HUGE[0], 3), (200, 30, 60), dtype=np.uint8)
    return {
        "huge-jpeg": simplejpeg.encode_jpeg(pixels, quality=80),
        "huge-progressive": encoded(plain, progressive=True),
        "huge-png": encoded(plain, "PNG", compress_level=1),
        "huge-gif": encoded(plain.convert("P"), "GIF"),
        "huge-bmp": encoded(plain.convert("1"), "BMP"),
        "huge-tiff": encoded(plain, "TIFF", compression="tiff_deflate"),
        "huge-webp": encoded(plain, "WEBP", method=0),
    }


def padded(size: int = 19_900_000) -> bytes:
    """A small JPEG with comments up to this size."""
    content = encoded(photo(2))
    comment = b"\xff\xfe" + struct.pack(">H", 65_000) + bytes(64_998)
    return content[:2] + comment * ((size - len(content)) // len(comment)) + content[2:]


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    """With one more chunk behind the header."""
    return png[:33] + _chunk(name, content) + png[33:]
