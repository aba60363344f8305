"""Bytes from anywhere → checked pixels → the bytes that are stored, and the signals that pixels give.

header     format, size and memory needed, before any pixel is decoded
colours    any mode and profile → 8-bit sRGB on white
decoding   bytes → upright pixels
resizing   which size is stored
storing    pixels → bytes
signals    what pixels tell
"""

from curate.images.decoding import Decoded, decode, upright
from curate.images.header import (
    SNIFF_BYTES,
    Header,
    Rejected,
    check_end,
    check_size,
    decode_cost,
    is_small_jpeg,
    probe,
    refusal,
    sniff,
)
from curate.images.resizing import Resize, resized
from curate.images.signals import PIXEL_SIGNALS, phash, pixel_signals
from curate.images.storing import Encoding, Stored, store

__all__ = [
    "PIXEL_SIGNALS",
    "SNIFF_BYTES",
    "Decoded",
    "Encoding",
    "Header",
    "Rejected",
    "Resize",
    "Stored",
    "check_end",
    "check_size",
    "decode",
    "decode_cost",
    "is_small_jpeg",
    "phash",
    "pixel_signals",
    "probe",
    "refusal",
    "resized",
    "sniff",
    "store",
    "upright",
]
