"""The bytes of an image → the pixels a CLIP is trained on, uint8, or sees in evaluation; and their normalisation.

Exact: Pillow decodes and resamples, as open_clip's own transforms. Fast: libjpeg-turbo decodes a JPEG, at a half, a
quarter or an eighth of its size where that leaves all the pixels that are wanted, and torch's vectorised filter
resamples: Pillow's, but for the rounding. A crop of a scaled image begins and ends at whole pixels of it. What
libjpeg-turbo does not take goes to Pillow, so that both ways read the same files and refuse the same.

Axes: B images, H W pixels.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""
Pixels = Callable[[Tensor], None]
"""Writes those of an image into memory of (3, H, W); raises what is UNREADABLE (finetune/images.py) for others."""
# libjpeg-turbo has vector code for these alone; scaled by 5/8 or 7/8 an image takes longer than whole.
_SCALES = (8, 4, 2)
_KEPT_BYTES = 16 << 20
# A batch that is made, those that Lightning has in its hands, and one to spare.
_KEPT_ROOMS = 4
# The operators behind torch.nn.functional.interpolate, which cannot write into a batch.
_RESAMPLE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}
_LOG_ASPECT = math.log(4 / 3)
_WORDS = struct.Struct("<16I")
_kept = threading.local()
_COLOURS = ("RGB", "YCbCr", "Gray")  # JPEGs of which libjpeg-turbo makes the RGB that Pillow does


def random_crop(width: int, height: int, scale: tuple[float, float], seed: Sequence[int]) -> Box:
    """The box of a random resized crop.

    The share of the area is uniform in `scale`, the aspect log-uniform in 3/4 … 4/3: as torchvision's
    `RandomResizedCrop`, down to the central crop after ten boxes that do not fit, but seeded.
    """
    uniform = _uniform(seed)
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * next(uniform))
        aspect = math.exp(_LOG_ASPECT * (2 * next(uniform) - 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int((width - w + 1) * next(uniform)), int((height - h + 1) * next(uniform))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _uniform(seed: Sequence[int]) -> Iterator[float]:
    """Numbers in [0, 1), the same for equal seeds: a hash of the seed and a counter.

    To set up one of the generators of Python or NumPy for four numbers takes longer than to read the image.
    """
    for block in itertools.count():
        for word in _WORDS.unpack(hashlib.blake2b(b"%d " * len(seed) % tuple(seed) + b"%d" % block).digest()):
            yield word * 2.0**-32


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

    def room(self, count: int) -> Tensor:
        """Memory for the pixels of so many images, uint8 (B, 3, H, W), the channels last."""
        return shared_room((count, *self._size, 3), torch.uint8).permute(0, 3, 1, 2)

    def prepare(self, content: bytes, seed: Sequence[int]) -> Pixels:
        """What writes the pixels of an image, when it is called; equal seeds, equal pixels."""
        if not self.fast:
            return partial(self._exact, content, seed)
        if size := _jpeg_size(content):
            return partial(self._jpeg, content, size, random_crop(*size, self.scale, seed))
        return partial(self._no_jpeg, content, seed)

    def _exact(self, content: bytes, seed: Sequence[int], out: Tensor) -> None:
        image = _pillow(content)
        box = random_crop(*image.size, self.scale, seed)
        filter_ = Image.Resampling.BILINEAR if self._filter == "bilinear" else Image.Resampling.BICUBIC
        height, width = self._size
        out[:] = torch.from_numpy(np.array(image.crop(box).resize((width, height), filter_))).permute(2, 0, 1)

    def _jpeg(self, content: bytes, size: tuple[int, int], box: Box, out: Tensor) -> None:
        self._resample(*_scaled_jpeg(content, size, _step(box, self._size)), box, out)

    def _no_jpeg(self, content: bytes, seed: Sequence[int], out: Tensor) -> None:
        rgb = np.array(_pillow(content))
        self._resample(rgb, 1, random_crop(rgb.shape[1], rgb.shape[0], self.scale, seed), out)

    def _resample(self, rgb: np.ndarray, step: int, box: Box, out: Tensor) -> None:
        left, top, right, bottom = (round(side / step) for side in box)
        # In one piece, and the axis of the batch before the permutation: what torch takes for channels last is filtered
        # in two thirds of the time.
        crop_1HW3 = torch.from_numpy(np.ascontiguousarray(rgb[top:bottom, left:right]))[None]
        _RESAMPLE[self._filter](crop_1HW3.permute(0, 3, 1, 2), self._size, False, out=out[None])

    @cached_property
    def _size(self) -> tuple[int, int]:
        return sides(self.preprocess_cfg)

    @cached_property
    def _filter(self) -> str:
        return "bilinear" if self.preprocess_cfg.get("interpolation") == "bilinear" else "bicubic"


@dataclass(frozen=True)
class EvaluationView:
    """What a CLIP sees in evaluation, of open_clip's own transform; the seed plays no part."""

    preprocess: Callable[[Image.Image], Tensor]
    preprocess_cfg: Mapping[str, Any]

    def room(self, count: int) -> Tensor:
        """Memory for the pixels of so many images, float32 (B, 3, H, W)."""
        return shared_room((count, 3, *sides(self.preprocess_cfg)), torch.float32)

    def prepare(self, content: bytes, seed: Sequence[int]) -> Pixels:
        """What writes the normalised pixels of an image, when it is called."""
        del seed
        return partial(self._write, content)

    def _write(self, content: bytes, out: Tensor) -> None:
        out[:] = self.preprocess(_pillow(content))


def normalised(pixel_B3HW: Tensor, preprocess_cfg: Mapping[str, Any]) -> Tensor:
    """Float32 pixels (B, 3, H, W) as a CLIP takes them, of uint8 ones, on their device.

    On the CPU bit for bit what torchvision's `ToTensor` and `Normalize` make.
    """
    shape, device = pixel_B3HW.shape, pixel_B3HW.device
    room = _room(shape, torch.float32) if device.type == "cpu" else torch.empty(shape, device=device)
    normal_B3HW = room.copy_(pixel_B3HW).div_(255)
    # Numbers instead of a tensor of them: nothing is copied to the device in the middle of a step.
    for channel, (mean, std) in enumerate(zip(preprocess_cfg["mean"], preprocess_cfg["std"], strict=True)):
        normal_B3HW[:, channel].sub_(mean).div_(std)
    return normal_B3HW


def shared_room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a batch; of a loader's process it is shared with the one that trains, so that it is sent uncopied."""
    if get_worker_info() is None:
        return _room(shape, dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize, device="cpu")  # as torch's collate
    return torch.empty(0, dtype=dtype).set_(storage).view(dtype).view(*shape)


def _room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that nobody uses, that of a batch before where no tensor lies in it any more.

    To touch new pages takes as long as to normalise an image; NumPy's are at least huge ones.
    """
    size = math.prod(shape)
    if not hasattr(_kept, "rooms"):
        _kept.rooms = {}
    rooms: list[np.ndarray] = _kept.rooms.setdefault(dtype, [])
    rooms[:] = [room for room in rooms if room.size == size]
    for number in range(len(rooms)):
        if _num_holders(rooms, number) == _HELD_BY_NOBODY:
            return torch.from_numpy(rooms[number]).view(*shape)
    room = np.empty(size, torch.empty(0, dtype=dtype).numpy().dtype)
    if len(rooms) < _KEPT_ROOMS:
        rooms.append(room)
    return torch.from_numpy(room).view(*shape)


def _num_holders(rooms: list[np.ndarray], number: int) -> int:
    """References to an array: the storage of the tensors that lie in it is one, whoever has them (autograd, too)."""
    return sys.getrefcount(rooms[number])


_HELD_BY_NOBODY = _num_holders([np.empty(0)], 0)


def sides(preprocess_cfg: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width that a CLIP sees."""
    size = preprocess_cfg["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


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
    room = _decoders_room(width * height * 3)
    try:
        return simplejpeg.decode_jpeg(content, "RGB", min_width=width, min_height=height, buffer=room), step
    except ValueError:  # every oddity is one here; Pillow knows which of them make it a broken image
        return np.array(_pillow(content)), 1


def _decoders_room(num_bytes: int) -> np.ndarray:
    """Memory for one image, of each thread, the same again: new pages for each take a tenth of the decoder's time."""
    room: np.ndarray | None = getattr(_kept, "room", None)
    if room is None or len(room) < num_bytes:
        room = np.empty(num_bytes, np.uint8)
        if num_bytes <= _KEPT_BYTES:
            _kept.room = room
    return room
