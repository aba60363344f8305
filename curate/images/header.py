"""What an image says of itself, read before any pixel is decoded: format, size, and how much memory it would take.

Nothing here calls a codec for JPEG, PNG, WebP, GIF and BMP; the containers of TIFF, AVIF and HEIC are opened by Pillow,
which reads their tables and no pixel.
"""

from __future__ import annotations

import importlib.util
import io
import struct
from dataclasses import dataclass

from PIL import Image

from curate.ledger import Reason

SNIFF_BYTES = 32
# What decoding one image may take, in bytes: a worker decodes one of that size at a time, and stays below 400 MB.
MOST_MEMORY = 150_000_000
# A JPEG of so many decodes in up to 25 milliseconds.
SMALL_PIXELS = 4_000_000
# Bytes a pixel that decoding to 8-bit RGB takes: the decoder's own buffers, Pillow's image, and the result.
_BYTES_A_PIXEL = {"jpeg": 3, "png": 7, "bmp": 7, "gif": 8, "tiff": 11, "webp": 7, "avif": 10.5, "heic": 8}
# A WebP of several frames, or with transparency: the bits that say so (the same in VP8X and VP8L), and the bytes.
_WEBP_FRAMES, _WITH_FRAMES = 0x02, 17
_ALPHA, _WITH_ALPHA = 0x10, 12
_BOXES = 64 << 10  # of a HEIC or AVIF: what describes its planes stands in front
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "avif"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "heic"),
}
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_UNSUPPORTED = {
    b"8BPS": "psd",
    b"%!PS": "eps",
    b"\xff\x0a": "jxl",
    b"\0\0\0\x0cJXL ": "jxl",
    b"\0\0\0\x0cjP  ": "jp2",
    b"\0\0\1\0": "ico",
    b"<svg": "svg",
}


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
    """What an image says of itself: format, and size as it is stored, before rotation.

    Attributes:
        format: jpeg, png, webp, gif, bmp, tiff, avif or heic.
        width: in pixels.
        height: in pixels.
        coefficients: bytes that a progressive JPEG keeps of every pixel until its last scan, in any scale; else 0.
        bytes_a_pixel: that decoding takes.
    """

    format: str
    width: int
    height: int
    coefficients: int = 0
    bytes_a_pixel: float = 3


def sniff(content: bytes | bytearray) -> str | None:
    """The format that the first bytes (SNIFF_BYTES are enough) show: one that is decoded here, or None."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    if content[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if content[4:8] == b"ftyp":
        return _BRANDS.get(bytes(content[8:12]))
    if content[:2] == b"BM" and int.from_bytes(content[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    return "tiff" if content[:4] in (b"II*\0", b"MM\0*") else None


def refusal(content: bytes | bytearray, said: str) -> Rejected | None:
    """Why bytes that begin like this are no image for us; None if they may be one.

    Args:
        content: at least the first SNIFF_BYTES, or all there are.
        said: the value for what is no image at all.
    """
    if sniff(content) is not None:
        return None
    start = bytes(content[:SNIFF_BYTES]).lstrip(b"\xef\xbb\xbf \t\r\n") if content[:1] in b"\xef <" else bytes(content)
    kind = next((kind for magic, kind in _UNSUPPORTED.items() if start.startswith(magic)), None)
    return Rejected(Reason.UNSUPPORTED_IMAGE, kind) if kind else Rejected(Reason.NOT_AN_IMAGE, said)


def probe(content: bytes) -> Header:
    """Format and size from the header alone.

    Raises:
        Rejected: NOT_AN_IMAGE, UNSUPPORTED_IMAGE, or TRUNCATED_IMAGE or CORRUPT_IMAGE in the header already.
    """
    if refused := refusal(content, f"begins with {content[:8].hex()}"):
        raise refused
    kind = str(sniff(content))
    sizes = {"jpeg": _jpeg_size, "png": _png_size, "webp": _webp_size, "gif": _gif_size, "bmp": _bmp_size}
    try:
        width, height, *more = sizes[kind](content) if kind in sizes else _container_size(content, kind)
    except struct.error as error:
        raise Rejected(Reason.TRUNCATED_IMAGE, f"{kind} header") from error
    except Rejected:
        raise
    except Exception as error:  # readers of containers fail in any way on hostile bytes; each costs its row only
        raise Rejected(Reason.CORRUPT_IMAGE, f"{kind} header") from error
    if width < 1 or height < 1:
        raise Rejected(Reason.CORRUPT_IMAGE, f"{width}x{height}")
    return Header(kind, width, height, more[0] if more else 0, _bytes_a_pixel(content, kind))


def check_size(header: Header, max_pixels: int, min_side: int = 1) -> None:
    """Refuse an image by the size that its header states.

    Raises:
        Rejected: TOO_MANY_PIXELS, also for what would take too much memory; TOO_SMALL.
    """
    size = f"{header.width}x{header.height}"
    if header.width * header.height > max_pixels:
        raise Rejected(Reason.TOO_MANY_PIXELS, size)
    if memory_of(header) > MOST_MEMORY:
        raise Rejected(Reason.TOO_MANY_PIXELS, f"{size} {header.format}, {memory_of(header) / 1e6:.0f} MB to decode")
    if min(header.width, header.height) < min_side:
        raise Rejected(Reason.TOO_SMALL, size)


def memory_of(header: Header) -> int:
    """About how many bytes decoding takes; of a progressive JPEG, the coefficients, for its pixels can come scaled."""
    return header.coefficients or int(header.width * header.height * header.bytes_a_pixel)


def decode_cost(content: bytes) -> int:
    """About how many bytes of memory decoding will take, from the header alone; 0 if it will be refused."""
    try:
        header = probe(content)
    except Rejected:
        return 0
    return memory_of(header)


def is_small_jpeg(content: bytes) -> bool:
    """Whether the bytes are a JPEG that decodes in milliseconds: not progressive, and of few pixels."""
    if content[:3] != b"\xff\xd8\xff":
        return False
    try:
        header = probe(content)
    except Rejected:
        return True
    return not header.coefficients and header.width * header.height <= SMALL_PIXELS


def _bytes_a_pixel(content: bytes, kind: str) -> float:
    if kind == "webp" and content[12:16] == b"VP8X" and content[20] & _WEBP_FRAMES:
        return _WITH_FRAMES
    if kind == "webp" and content[12:16] != b"VP8 " and content[20 if content[12:16] == b"VP8X" else 24] & _ALPHA:
        return _WITH_ALPHA
    if kind not in ("avif", "heic"):
        return _BYTES_A_PIXEL[kind]
    boxes = content[:_BOXES]
    planes = _av1_planes(boxes) if kind == "avif" else _hevc_planes(boxes)
    return _BYTES_A_PIXEL[kind] + planes + (2 if b"auxl" in boxes else 0)  # auxl: an image of the transparency


def _av1_planes(boxes: bytes) -> float:
    """Bytes a pixel of the decoded planes, by the largest `av1C` (AV1 in ISOBMFF 2.3.3)."""
    flags = [box[2] for box in boxes.split(b"av1C")[1:] if len(box) > 2]
    return max((_planes(f & 0x60 > 0, f & 0x10 > 0, f & 8 > 0, f & 4 > 0) for f in flags), default=6.0)


def _hevc_planes(boxes: bytes) -> float:
    """The same by the largest `hvcC` (ISO/IEC 14496-15, 8.3.3.1)."""
    found = [(box[16] & 3, box[17] & 7) for box in boxes.split(b"hvcC")[1:] if len(box) > 17]
    return max((_planes(depth > 0, chroma == 0, chroma in (1, 2), chroma == 1) for chroma, depth in found), default=6.0)


def _planes(is_deep: bool, is_grey: bool, half_across: bool, half_down: bool) -> float:
    chroma = 0.0 if is_grey else 2.0 / (1 + half_across) / (1 + half_down)
    return (1 + is_deep) * (1 + chroma)


def check_end(content: bytes, header: Header) -> None:
    """See whether the bytes go on to where the format ends; no pixel is decoded.

    Raises:
        Rejected: TRUNCATED_IMAGE.
    """
    tail = content[-4096:]
    ends = {
        "jpeg": lambda: b"\xff\xd9" in tail,
        "png": lambda: b"IEND" in tail,
        "gif": lambda: b"\x3b" in tail[-16:],
        "webp": lambda: len(content) >= int.from_bytes(content[4:8], "little") + 8,
        "bmp": lambda: len(content) >= int.from_bytes(content[10:14], "little") + header.width * header.height // 8,
    }
    if header.format in ends and not ends[header.format]():
        raise Rejected(Reason.TRUNCATED_IMAGE, f"{header.format}: no end")


# --- the formats -----------------------------------------------------------------------------------------------------


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


def _jpeg_size(content: bytes) -> tuple[int, ...]:
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
            height, width, components = struct.unpack_from(">HHB", content, place + 5)
            progressive = code in (0xC2, 0xC6, 0xCA, 0xCE)
            return width, height, _coefficients(content, place + 10, width * height, components) if progressive else 0
        (length,) = struct.unpack_from(">H", content, place + 2)
        place += 2 + length


def _coefficients(content: bytes, place: int, pixels: int, components: int) -> int:
    """Bytes of the coefficients of a progressive JPEG: two each, less where a component is subsampled."""
    factors = [struct.unpack_from(">B", content, place + 3 * number + 1)[0] for number in range(components)]
    areas = [(factor >> 4) * (factor & 15) for factor in factors]
    if not areas or not all(areas):
        raise ValueError("no sampling factor")
    return 2 * pixels * sum(areas) // max(areas)


def _bmp_size(content: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", content, 14)[0] == 12:
        width, height = struct.unpack_from("<HH", content, 18)
        return width, height
    width, height = struct.unpack_from("<ii", content, 18)
    return width, abs(height)  # negative: stored from the top


def _container_size(content: bytes, kind: str) -> tuple[int, int]:
    with open_image(content, kind) as image:
        return image.size


def open_image(content: bytes, kind: str) -> Image.Image:
    """The image as Pillow opens it, by this format's reader and no other; nothing is decoded yet.

    Raises:
        Rejected: UNSUPPORTED_IMAGE, a HEIC where pillow-heif is not installed.
    """
    if kind == "heic":
        if importlib.util.find_spec("pillow_heif") is None:
            raise Rejected(Reason.UNSUPPORTED_IMAGE, "heic: pip install 'cliptailor[heic]'")
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)
    return Image.open(io.BytesIO(content), formats=["HEIF" if kind == "heic" else kind.upper()])
