"""What the pixels of an image tell, measured on a small copy of its luma: the longer side SIDE pixels at most."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from curate.images.colours import RGB

Luma = npt.NDArray[np.uint8]
SIDE = 128
# Colours are counted on so many pixels a side: 3,000 in all tell a share to a hundredth.
DOTS = 64
PIXEL_SIGNALS = ("phash", "luma_mean", "luma_std", "entropy", "blur", "dominant_share", "border_share")
# A line of pixels is flat when its luma differs by no more: JPEG's noise around an edge is as large.
FLAT = 12


def pixel_signals(rgb: RGB) -> dict[str, int | float]:
    """The signals of an image.

    - `phash`: see there.
    - `luma_mean`, `luma_std`, of the luma (0–255); `entropy`: of its histogram, in bits.
    - `blur`: the variance of the luma's Laplacian; low where nothing is sharp (Pech-Pacheco et al. 2000).
    - `dominant_share`: of the most frequent colour, of 16 levels a channel, among evenly spaced pixels.
    - `border_share`: of the area that lies in flat margins, as of a letterbox or a cut-out on white; 1 if all is flat.
    """
    luma = _small(_luma(rgb))
    share = cv2.calcHist([luma], [0], None, [256], [0, 256]).ravel() / np.float64(luma.size)
    seen = share[share > 0]
    mean, spread = cv2.meanStdDev(luma)
    _, edges = cv2.meanStdDev(cv2.Laplacian(luma, cv2.CV_16S))
    dots = _dots(rgb)
    colours = cv2.calcHist([dots], [0, 1, 2], None, [16, 16, 16], [0, 256] * 3)
    return {
        "phash": _phash_of_luma(luma),
        "luma_mean": round(mean.item(), 3),
        "luma_std": round(spread.item(), 3),
        "entropy": round(abs(float(seen @ np.log2(seen))), 4),
        "blur": round(edges.item() ** 2, 2),
        "dominant_share": round(int(colours.max()) / (dots.shape[0] * dots.shape[1]), 4),
        "border_share": _border_share(luma),
    }


def _border_share(luma: Luma) -> float:
    inner = 1.0
    for axis in (0, 1):
        (busy,) = np.nonzero(luma.max(axis) - luma.min(axis) > FLAT)
        inner *= (int(busy[-1]) - int(busy[0]) + 1) / luma.shape[1 - axis] if len(busy) else 0.0
    return round(1.0 - inner, 4)


def phash(rgb: RGB) -> int:
    """A 64-bit perceptual hash, as a signed number.

    Its bits say which of the 8 × 8 lowest DCT coefficients of the luma at 32 × 32 lie above their median. Copies of an
    image that were scaled or re-encoded differ in few bits, different images in about 32 (Zauner 2010, pHash). The
    first coefficient, the image's brightness, is left out: its bit is always 0. A flat image's hash is 0.
    """
    return _phash_of_luma(_small(_luma(rgb)))


def _luma(rgb: RGB) -> Luma:
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), np.uint8)


def _small(luma: Luma) -> Luma:
    """The luma in SIDE pixels: by means of whole blocks to less than twice of that, and the rest by lines."""
    height, width = luma.shape
    factor = SIDE / max(width, height)
    if factor >= 1:
        return luma
    step = min(height, width, int(1 / factor))
    if step > 1:  # what does not fill the last block is left out
        whole = luma[: height // step * step, : width // step * step]
        luma = np.asarray(cv2.resize(whole, (width // step, height // step), interpolation=cv2.INTER_AREA), np.uint8)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(cv2.resize(luma, size, interpolation=cv2.INTER_LINEAR), np.uint8)


def _dots(rgb: RGB) -> RGB:
    """Every so many pixels each way, DOTS a side at most: the shares of colours are those of the whole."""
    height, width, _ = rgb.shape
    step = -(-max(height, width) // DOTS)
    size = (-(-width // step), -(-height // step))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_NEAREST), np.uint8)


def _phash_of_luma(luma: Luma) -> int:
    small = cv2.resize(luma, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.partition(low[1:], 31)[31]  # the median of 63
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True)
