"""A labelled mix: a crawl of which each row is known to be a good pair of a domain or one kind of junk.

The world is OpenMoji's concepts, each drawn many times: turned, scaled, moved, on backgrounds of several colours. The
domain is food. The CLIP is trained on other drawings of the same world (`pairs`). Nothing that a row shows to the
pipeline, neither URL nor order nor caption, says what kind it is.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from demo.corpus import emoji_font

SIDE = 288  # pixels of a drawing
FOOD = (
    "TOMATO", "AUBERGINE", "GRAPES", "WATERMELON", "LEMON", "BANANA", "HAMBURGER", "DOUGHNUT", "PINEAPPLE", "CHERRIES",
    "STRAWBERRY", "LOLLIPOP",
)  # fmt: skip
OTHER = {
    "AUTOMOBILE": "vehicle", "DOG FACE": "animal", "KEY": "tool", "GUITAR": "instrument", "EYEGLASSES": "clothing",
    "HOUSE BUILDING": "building", "CACTUS": "plant", "SOCCER BALL": "sport", "BICYCLE": "vehicle", "CAT FACE": "animal",
    "UMBRELLA": "tool", "TRUMPET": "instrument", "JEANS": "clothing", "OFFICE BUILDING": "building", "TULIP": "plant",
    "TROPHY": "sport",
}  # fmt: skip
# More of the world, by code points (Unicode 13, whose names every Python here knows).
GROUPS = {
    "food": ((0x1F32D, 0x1F32F), (0x1F336, 0x1F336), (0x1F33D, 0x1F33D), (0x1F345, 0x1F37C), (0x1F950, 0x1F96F),
             (0x1F9C0, 0x1F9CB), (0x1FAD0, 0x1FAD6)),
    "animal": ((0x1F400, 0x1F43E), (0x1F980, 0x1F9AE)),
    "plant": ((0x1F331, 0x1F335), (0x1F337, 0x1F33C), (0x1F33E, 0x1F343)),
    "vehicle": ((0x1F680, 0x1F6A3), (0x1F6F4, 0x1F6FC)),
    "clothing": ((0x1F451, 0x1F461),),
    "building": ((0x1F3E0, 0x1F3F0),),
    "instrument": ((0x1F3B7, 0x1F3BB),),
    "tool": ((0x1F4BB, 0x1F4E1), (0x1F4F7, 0x1F4FD), (0x1F526, 0x1F52E), (0x1F9EA, 0x1F9FF)),
}  # fmt: skip
COLOURS = {
    "white": (250, 250, 250),
    "grey": (150, 150, 150),
    "red": (205, 70, 60),
    "orange": (240, 160, 70),
    "yellow": (245, 225, 110),
    "green": (110, 180, 110),
    "blue": (90, 140, 215),
    "purple": (160, 110, 190),
}
CAPTIONS = (
    "a drawing of a {concept}",
    "picture of {kind}, a {concept}",
    "{kind}: {concept}",
    "a {concept}, drawn by hand",
    "{concept} on a {colour} background",
)
BOILERPLATE = (
    "image",
    "click to enlarge",
    "IMG_2041.JPG",
    "untitled",
    "stock photo",
    "photo not available",
    "DSC_0034",
)
# Rows of each kind at scale 1.
COUNTS = {
    "clean": 800,
    "mismatched caption": 160,
    "exact duplicate": 100,
    "near duplicate": 160,
    "leak, same file": 50,
    "leak, re-encoded": 50,
    "off topic, known": 240,
    "off topic, unknown": 120,
    "placeholder": 80,
    "tiny": 60,
    "broken": 60,
    "boilerplate caption": 60,
}


@dataclass(frozen=True)
class Pair:
    """A drawing, its caption and what it shows."""

    concept: str
    image: Image.Image
    caption: str


@dataclass(frozen=True)
class Row:
    """A row of the list, and the truth about it: kind, and the number of the picture that copies have in common."""

    path: str
    caption: str
    kind: str
    picture: int


@dataclass(frozen=True)
class Mix:
    """Bodies by path; rows in the list's order; images of the test set by name."""

    bodies: dict[str, bytes]
    rows: list[Row]
    test: dict[str, bytes]


def pairs(concepts: Sequence[str], count: int, seed: int) -> list[Pair]:
    """`count` drawings of the concepts in turn, each its own."""
    random = np.random.default_rng(seed)
    return [_pair(concepts[number % len(concepts)], random) for number in range(count)]


def concepts(*groups: str) -> tuple[str, ...]:
    """The concepts of these GROUPS that OpenMoji draws, in code point order within each."""
    from fontTools.ttLib import TTFont

    with TTFont(emoji_font()) as font:
        drawn = font.getBestCmap()
    ranges = [span for group in groups for span in GROUPS[group]]
    return tuple(unicodedata.name(chr(code)) for low, high in ranges for code in range(low, high + 1) if code in drawn)


def make_mix(
    scale: float = 1.0,
    seed: int = 0,
    food: Sequence[str] = FOOD,
    other: Sequence[str] = tuple(OTHER),
    shares: Mapping[str, float] = COUNTS,
) -> Mix:
    """The mix, with `scale` times `shares` rows of each kind; `food` is the domain, `other` what else there is."""
    random = np.random.default_rng(seed)
    counts = {kind: max(4, round(shares[kind] * scale)) for kind in COUNTS}
    test = pairs(food, counts["leak, same file"] + counts["leak, re-encoded"], seed + 1)
    test_bodies = {f"{number}.jpg": jpeg(pair.image) for number, pair in enumerate(test)}
    made: list[tuple[bytes, str, str, int]] = []
    clean = [(jpeg(pair.image), pair) for pair in pairs(food, counts["clean"], seed + 2)]
    made += [(body, pair.caption, "clean", number) for number, (body, pair) in enumerate(clean)]
    for kind, count in list(counts.items())[1:]:
        for number in range(count):
            if kind in {"exact duplicate", "near duplicate"}:
                # Copies of the first, and of the last; a picture may have several.
                place = number * 3 // 4 if kind == "exact duplicate" else len(clean) - 1 - number * 3 // 4
                body, pair = clean[place]
                made.append(
                    (body if kind == "exact duplicate" else edited(pair.image, random), pair.caption, kind, place)
                )
            elif kind.startswith("leak"):
                place = number + (counts["leak, same file"] if kind == "leak, re-encoded" else 0)
                image, caption = test[place].image, test[place].caption
                body = test_bodies[f"{place}.jpg"] if kind == "leak, same file" else edited(image, random)
                made.append((body, caption, kind, -1))
            else:
                made.append((*JUNK[kind](number, random, other if kind == "off topic, known" else food), kind, -1))
    rows, bodies = [], {}
    for place, chosen in enumerate(random.permutation(len(made))):
        body, caption, kind, picture = made[chosen]
        path = f"/img/{place:05d}.jpg"
        bodies[path] = body
        rows.append(Row(path, caption, kind, picture))
    return Mix(bodies, rows, test_bodies)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """The image as JPEG bytes."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def edited(image: Image.Image, random: np.random.Generator) -> bytes:
    """What the web makes of a picture: encoded anew, scaled, a little off at the edges or in brightness."""
    match random.integers(4):
        case 0:
            return jpeg(image, int(random.integers(40, 80)))
        case 1:
            side = int(SIDE * random.uniform(0.72, 0.95))
            return jpeg(image.resize((side, side), Image.Resampling.LANCZOS), 80)
        case 2:
            left, top, right, bottom = (int(SIDE * share) for share in random.uniform(0, 0.03, 4))
            return jpeg(image.crop((left, top, SIDE - right, SIDE - bottom)), 85)
        case _:
            return jpeg(ImageEnhance.Brightness(image).enhance(random.uniform(0.85, 1.1)), 85)


# --- drawings --------------------------------------------------------------------------------------------------------


def _pair(concept: str, random: np.random.Generator) -> Pair:
    colour = str(random.choice(list(COLOURS)))
    words = CAPTIONS[random.integers(len(CAPTIONS))]
    caption = words.format(concept=concept.lower(), kind=_kind(concept), colour=colour)
    return Pair(concept, _drawing(concept, COLOURS[colour], random), caption)


@cache
def _kind(concept: str) -> str:
    if concept in FOOD or concept in OTHER:
        return OTHER.get(concept, "food")
    code = ord(unicodedata.lookup(concept))
    return next(kind for kind, spans in GROUPS.items() if any(low <= code <= high for low, high in spans))


def _drawing(concept: str, colour: tuple[int, int, int], random: np.random.Generator) -> Image.Image:
    canvas = _background(colour, random)
    glyph = _glyph(concept)
    side = int(SIDE * random.uniform(0.55, 0.85))
    glyph = glyph.resize((side, side), Image.Resampling.BILINEAR).rotate(random.uniform(-25, 25), expand=True)
    if random.random() < 0.5:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    free = np.maximum(1, np.array([SIDE, SIDE]) - glyph.size)
    canvas.paste(glyph, (int(random.integers(free[0])), int(random.integers(free[1]))), glyph)
    return canvas


def _background(colour: tuple[int, int, int], random: np.random.Generator) -> Image.Image:
    """A colour with soft stains of itself, lighter and darker."""
    shade = random.normal(0, 22, (5, 5, 1)) + random.normal(0, 6, (1, 1, 3))
    pixels = np.clip(np.array(colour) + shade, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@cache
def _glyph(concept: str) -> Image.Image:
    """The concept's emoji, RGBA, cut to what is drawn, on a square."""
    font = ImageFont.truetype(str(emoji_font()), 256)
    image = Image.new("RGBA", (400, 400))
    ImageDraw.Draw(image).text((200, 200), unicodedata.lookup(concept), font=font, anchor="mm", embedded_color=True)
    drawn = image.crop(image.getbbox())
    square = Image.new("RGBA", (max(drawn.size), max(drawn.size)))
    square.paste(drawn, ((square.width - drawn.width) // 2, (square.height - drawn.height) // 2))
    return square


# --- junk: number, random, concepts → body and caption ---------------------------------------------------------------


def _mismatched(number: int, random: np.random.Generator, concepts: Sequence[str]) -> tuple[bytes, str]:
    """A good picture with the caption of another one."""
    shown = _pair(concepts[number % len(concepts)], random)
    told = _pair(concepts[(number + 1 + int(random.integers(len(concepts) - 1))) % len(concepts)], random)
    return jpeg(shown.image), told.caption


def _known(number: int, random: np.random.Generator, concepts: Sequence[str]) -> tuple[bytes, str]:
    """Something else that the CLIP was trained on."""
    pair = _pair(concepts[number % len(concepts)], random)
    return jpeg(pair.image), pair.caption


def _unknown(number: int, random: np.random.Generator, _: Sequence[str]) -> tuple[bytes, str]:
    """Something else that the CLIP never saw: handwriting, photographs, textures."""
    from sklearn.datasets import load_sample_image

    match number % 3:
        case 0:
            digit = int(random.integers(1797))
            pixels = (255 - _digits()[digit] * 255 / 16).astype(np.uint8)
            return jpeg(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)), "a handwritten number"
        case 1:
            name = ("china.jpg", "flower.jpg")[number % 2]
            photo = Image.fromarray(load_sample_image(name))
            left, top = int(random.integers(640 - SIDE)), int(random.integers(427 - SIDE))
            image = photo.crop((left, top, left + SIDE, top + SIDE))
            return jpeg(image), "a temple in Beijing" if name == "china.jpg" else "a dahlia in the garden"
        case _:
            pixels = random.integers(0, 255, (2 + number % 7, 2 + number % 5, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            return jpeg(image), "soft wallpaper in many colours"


@cache
def _digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return load_digits().images


def _placeholder(number: int, random: np.random.Generator, concepts: Sequence[str]) -> tuple[bytes, str]:
    """A flat colour, or words where a picture was, under the caption of that picture."""
    caption = _pair(concepts[number % len(concepts)], random).caption
    grey = int(random.integers(180, 256))
    image = Image.new("RGB", (SIDE + int(random.integers(60)), SIDE), (grey, grey, grey))
    if number % 2:
        words = ("image not available", "no photo", "hotlinking is not allowed", "coming soon")[number // 2 % 4]
        font = ImageFont.load_default(size=int(random.integers(18, 30)))
        place = (image.width / 2, image.height / 2)
        ImageDraw.Draw(image).text(place, words, fill=(90, 90, 90), anchor="mm", font=font)
    return jpeg(image), caption


def _tiny(number: int, random: np.random.Generator, concepts: Sequence[str]) -> tuple[bytes, str]:
    """A thumbnail, an icon, a tracking pixel."""
    pair = _pair(concepts[number % len(concepts)], random)
    side = (1, 16, 64, 120)[number % 4]
    return jpeg(pair.image.resize((side, side))), pair.caption


def _broken(number: int, random: np.random.Generator, concepts: Sequence[str]) -> tuple[bytes, str]:
    """Half a file, a web page, rubbish, or a picture torn in the middle of its bytes."""
    pair = _pair(concepts[number % len(concepts)], random)
    whole = jpeg(pair.image)
    page = b"<!doctype html><html><body>Not found</body></html>"
    rubbish = random.integers(0, 256, 3000, dtype=np.uint8).tobytes()
    return (whole[: len(whole) // 2], page, rubbish, whole[:200])[number % 4], pair.caption


def _boilerplate(number: int, random: np.random.Generator, concepts: Sequence[str]) -> tuple[bytes, str]:
    """A good picture under words that say nothing of it."""
    return jpeg(_pair(concepts[number % len(concepts)], random).image), BOILERPLATE[number % len(BOILERPLATE)]


JUNK: dict[str, Callable[[int, np.random.Generator, Sequence[str]], tuple[bytes, str]]] = {
    "mismatched caption": _mismatched,
    "off topic, known": _known,
    "off topic, unknown": _unknown,
    "placeholder": _placeholder,
    "tiny": _tiny,
    "broken": _broken,
    "boilerplate caption": _boilerplate,
}
