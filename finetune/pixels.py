"""The bytes of an image → the pixels a CLIP is trained on, uint8, or sees in evaluation; and their normalisation.

Exact: Pillow decodes and resamples, as open_clip's own transforms. Fast: libjpeg-turbo decodes a JPEG, at a half, a
quarter or an eighth of its size where that leaves all the pixels that are wanted, and torch's vectorised filter
resamples: Pillow's, but for the rounding. A crop of a scaled image begins and ends at whole pixels of it. What
libjpeg-turbo does not take goes to Pillow, so that both ways read the same files and refuse the same.

Axes: B images, H W pixels.
"""

from __future__ import annotations

import io
import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What the views raise for bytes that are no whole image."""
# libjpeg-turbo has vector code for these alone; scaled by 5/8 or 7/8 an image takes longer than whole.
_SCALES = (8, 4, 2)
_KEPT_BYTES = 16 << 20
_COLOURS = ("RGB", "YCbCr", "Gray")  # JPEGs of which libjpeg-turbo makes the RGB that Pillow does


def random_crop(width: int, height: int, scale: tuple[float, float], seed: Sequence[int]) -> Box:
    """The box of a random resized crop.

    The share of the area is uniform in `scale`, the aspect log-uniform in 3/4 … 4/3: as torchvision's
    `RandomResizedCrop`, down to the central crop after ten boxes that do not fit, but seeded.
    """
    draw = random.Random(" ".join(map(str, seed)))  # noqa: S311 - nothing secret; four times as fast to seed as numpy's
    for _ in range(10):
        area = width * height * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randrange(width - w + 1), draw.randrange(height - h + 1)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclass(frozen=True)
class TrainingView:
    """A random resized crop, in the size and with the filter of a CLIP's own preprocessing.

    Attributes:
        preprocess_cfg: of the CLIP (`size`, `interpolation`).
        scale: share of the image's area.
        fast: decode and resample with vectorised code; else with Pillow.
    """

    preprocess_cfg: Mapping[str, Any]
    scale: tuple[float, float]
    fast: bool = True

    def __call__(self, content: bytes, seed: Sequence[int]) -> Tensor:
        """Uint8 pixels (3, H, W); equal seeds, equal pixels.

        Raises:
            UNREADABLE: no whole image.
        """
        if self.fast:
            return self._fast(content, seed)
        image = _pillow(content)
        box = random_crop(*image.size, self.scale, seed)
        filter_ = Image.Resampling.BILINEAR if self._filter == "bilinear" else Image.Resampling.BICUBIC
        height, width = self._size
        return torch.from_numpy(np.array(image.crop(box).resize((width, height), filter_))).permute(2, 0, 1)

    def _fast(self, content: bytes, seed: Sequence[int]) -> Tensor:
        if found := _jpeg_size(content):
            box = random_crop(*found, self.scale, seed)
            rgb, step = _scaled_jpeg(content, found, _step(box, self._size))
        else:
            rgb, step = np.array(_pillow(content)), 1
            box = random_crop(rgb.shape[1], rgb.shape[0], self.scale, seed)
        left, top, right, bottom = (round(side / step) for side in box)
        # In one piece, and the axis of the batch before the permutation: what torch takes for channels last is filtered
        # in two thirds of the time, and comes out so.
        crop_1HW3 = torch.from_numpy(np.ascontiguousarray(rgb[top:bottom, left:right]))[None]
        mode = self._filter
        return functional.interpolate(crop_1HW3.permute(0, 3, 1, 2), self._size, mode=mode, antialias=True)[0]

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width."""
        size = self.preprocess_cfg["size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def _filter(self) -> str:
        return "bilinear" if self.preprocess_cfg.get("interpolation") == "bilinear" else "bicubic"


@dataclass(frozen=True)
class EvaluationView:
    """What a CLIP sees in evaluation, of open_clip's own transform; the seed plays no part."""

    preprocess: Callable[[Image.Image], Tensor]

    def __call__(self, content: bytes, seed: Sequence[int]) -> Tensor:
        """Normalised float32 pixels (3, H, W).

        Raises:
            UNREADABLE: no whole image.
        """
        del seed
        return self.preprocess(_pillow(content))


def normalised(pixel_B3HW: Tensor, preprocess_cfg: Mapping[str, Any]) -> Tensor:
    """Float32 pixels (B, 3, H, W) as a CLIP takes them, of uint8 ones, on their device.

    On the CPU bit for bit what torchvision's `ToTensor` and `Normalize` make.
    """
    normal_B3HW = pixel_B3HW.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    # Numbers instead of a tensor of them: nothing is copied to the device in the middle of a step.
    for channel, (mean, std) in enumerate(zip(preprocess_cfg["mean"], preprocess_cfg["std"], strict=True)):
        normal_B3HW[:, channel].sub_(mean).div_(std)
    return normal_B3HW


def _pillow(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that libjpeg-turbo may decode; None: Pillow is to see to it."""
    if not content.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    return (width, height) if colours in _COLOURS and width * height <= limit else None


def _step(box: Box, size: tuple[int, int]) -> int:
    """By how much an image may be scaled down and still have the box in no fewer pixels than are wanted."""
    left, top, right, bottom = box
    most = min((right - left) / size[1], (bottom - top) / size[0])
    return next((step for step in _SCALES if step <= most), 1)


def _scaled_jpeg(content: bytes, size: tuple[int, int], step: int) -> tuple[np.ndarray, int]:
    """RGB (H, W, 3) of a JPEG scaled down by `step`, and by how much it is: what Pillow has to decode is whole.

    The next one overwrites it.
    """
    width, height = (math.ceil(side / step) for side in size)
    room = _room(width * height * 3)
    try:
        return simplejpeg.decode_jpeg(content, "RGB", min_width=width, min_height=height, buffer=room), step
    except ValueError:  # every oddity is one here; Pillow knows which of them make it a broken image
        return np.array(_pillow(content)), 1


_kept = threading.local()


def _room(num_bytes: int) -> np.ndarray:
    """Memory for one image, of each thread, the same again: new pages for each take a tenth of the decoder's time."""
    room: np.ndarray | None = getattr(_kept, "room", None)
    if room is None or len(room) < num_bytes:
        room = np.empty(num_bytes, np.uint8)
        if num_bytes <= _KEPT_BYTES:
            _kept.room = room
    return room
