"""Photographs and captions to measure on: cuts of the two pictures that scikit-learn ships, and words as the web has.

Axes: H height, W width of a photograph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg
from sklearn.datasets import load_sample_images

from curate.shards import ShardWriter, shard_name

RGB = npt.NDArray[np.uint8]
# What stands in the captions.
WORDS = """a photo of the old town market square with people walking in summer rain near church bridge river boats
sunset red dress size cotton sale free shipping new york vintage - | 2019 ; how to make home's""".split()  # noqa: SIM905 - text
MOST_ENLARGED = 1.4
WEB_SIZES, WEB_QUALITY = ((500, 375), (500, 375), (375, 500)), (80, 96)


@dataclass(frozen=True)
class Cut:
    """A part of one of the two photographs.

    Attributes:
        rgb: (H, W, 3).
        said: what is to be seen in it, in words: which photograph, which way round, how large, from where.
    """

    rgb: RGB
    said: tuple[str, ...]


@cache
def _photos() -> tuple[RGB, ...]:
    return tuple(load_sample_images().images)


def cut(random: np.random.Generator, size: tuple[int, int]) -> Cut:
    """Most of one of the two, mirrored or not, scaled to its width and height."""
    width, height = size
    number, side = int(random.integers(2)), int(random.choice((1, -1)))
    photo: Any = _photos()[number][:, ::side]
    enlarged = float(random.uniform(1.0, MOST_ENLARGED))
    scale = max(width / photo.shape[1], height / photo.shape[0]) * enlarged
    filter_ = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=filter_)
    below, beside = photo.shape[0] - height, photo.shape[1] - width
    top, left = int(random.integers(below + 1)), int(random.integers(beside + 1))
    said = (
        ("temple", "blossom")[number],
        ("eastward", "westward")[side < 0],
        ("distant", "close")[enlarged > (1 + MOST_ENLARGED) / 2],
        ("upper", "lower")[2 * top > below],
        ("begin", "end")[2 * left > beside],
    )
    return Cut(np.ascontiguousarray(photo[top : top + height, left : left + width]), said)


def encoded(random: np.random.Generator, rgb: RGB, quality: tuple[int, int]) -> bytes:
    """A JPEG of a quality from the first to below the second."""
    return simplejpeg.encode_jpeg(rgb, quality=int(random.integers(*quality)), colorsubsampling="420")


def photograph(random: np.random.Generator, size: tuple[int, int], quality: tuple[int, int]) -> bytes:
    """A cut of that width and height as a JPEG."""
    return encoded(random, cut(random, size).rgb, quality)


def caption(random: np.random.Generator, said: Sequence[str] = ()) -> str:
    """As long as web captions are (11 words by the median, log-normal); begins with what is said."""
    length = max(3, round(11 * random.lognormal(0, 0.5)))
    return " ".join([*said, *random.choice(WORDS, max(0, length - len(said)))]).capitalize()


def write_shards(folder: Path, count: int, shard_size: int, *, split: str | None = None, seed: int = 0) -> None:
    """Pairs of photographs of about 500 pixels and captions that begin with what is to be seen."""
    random = np.random.default_rng(seed)
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    for shard in range(-(-count // shard_size)):
        with ShardWriter(folder / shard_name(shard, split), schema, made_from=f"benchmark {seed}") as writer:
            for number in range(shard * shard_size, min(count, (shard + 1) * shard_size)):
                seen = cut(random, WEB_SIZES[number % len(WEB_SIZES)])
                told = {"key": f"{number:06d}", "caption": caption(random, seen.said)}
                writer.add(told, encoded(random, seen.rgb, WEB_QUALITY), "jpg")
