"""Which size an image is stored in: img2dataset's modes, with its geometry."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from curate.images.colours import RGB


@dataclass(frozen=True, slots=True)
class Resize:
    """How images are resized.

    Attributes:
        mode: no; keep_ratio, center_crop: the shorter side becomes `size`, and a square is cut out of the middle;
            keep_ratio_largest, border: the longer side does, and white is added to a square.
        size: in pixels.
        only_if_bigger: whether images whose side is not longer are left as they are.
    """

    mode: str = "no"
    size: int = 0
    only_if_bigger: bool = True

    def factor(self, width: int, height: int) -> float | None:
        """By what the sides are multiplied; None if the image is left as it is."""
        if self.mode == "no":
            return None
        side = min(width, height) if self.mode in ("keep_ratio", "center_crop") else max(width, height)
        return None if self.only_if_bigger and side <= self.size else self.size / side


def resized(rgb: RGB, resize: Resize, width: int, height: int) -> RGB:
    """The pixels resized, down by area, up by Lanczos.

    Args:
        rgb: uint8 (H, W, 3), the image or a scaled-down version of it.
        resize: how.
        width: of the whole image.
        height: of the whole image.
    """
    factor = resize.factor(width, height)
    if factor is None:
        return rgb
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LANCZOS4
    scaled = np.asarray(cv2.resize(rgb, size, interpolation=interpolation), dtype=np.uint8)
    if resize.mode == "center_crop":
        top, left = ((side - resize.size) // 2 for side in scaled.shape[:2])
        return np.ascontiguousarray(scaled[top : top + resize.size, left : left + resize.size])
    if resize.mode == "border":
        down, right = (resize.size - side for side in scaled.shape[:2])
        edges = (down // 2, down - down // 2, right // 2, right - right // 2)
        return np.asarray(
            cv2.copyMakeBorder(scaled, *edges, cv2.BORDER_CONSTANT, value=(255, 255, 255)), dtype=np.uint8
        )
    return scaled
