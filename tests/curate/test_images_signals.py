"""What pixels tell, against the definitions in NumPy."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from curate.images import Resize, decode, phash, pixel_signals, resized

MANY = 50_000_000
CHINA, FLOWER = (np.asarray(image) for image in load_sample_images().images)


def encoded(image, kind="JPEG", **options):
    sink = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(sink, kind, **options)
    return sink.getvalue()


def mean_difference(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


def distance(a, b):
    return ((a ^ b) & (2**64 - 1)).bit_count()


def tiles():
    return [photo[y : y + 200, x : x + 200] for photo in (CHINA, FLOWER) for y in (0, 200) for x in (0, 200, 400)]


@pytest.mark.parametrize("number", range(12))
def test_copies_hash_alike(number):
    photo = np.ascontiguousarray(tiles()[number])
    hash_ = phash(photo)
    smaller = Image.fromarray(photo).resize((140, 140), Image.Resampling.LANCZOS)
    copies = [
        np.asarray(Image.open(io.BytesIO(encoded(photo, quality=60)))),
        np.asarray(smaller),
        np.asarray(Image.open(io.BytesIO(encoded(smaller, quality=60)))),
        np.asarray(Image.open(io.BytesIO(encoded(photo, "WEBP", quality=70))).convert("RGB")),
        decode(
            encoded(Image.fromarray(photo).resize((1600, 1600))), max_pixels=MANY, resize=Resize("keep_ratio", 200)
        ).rgb,
    ]
    assert max(distance(hash_, phash(np.ascontiguousarray(copy))) for copy in copies) <= 6


def test_different_photographs_hash_apart():
    hashes = [phash(np.ascontiguousarray(tile)) for tile in [*tiles(), CHINA, FLOWER]]
    assert min(distance(a, b) for n, a in enumerate(hashes) for b in hashes[:n]) > 15


def test_the_hash_is_a_signed_64_bit_number_with_half_of_its_bits_set():
    for tile in tiles():
        hash_ = phash(np.ascontiguousarray(tile))
        assert -(2**63) <= hash_ < 2**63
        assert 28 <= (hash_ & (2**64 - 1)).bit_count() <= 32


def test_the_hash_is_the_sign_of_the_dct_against_its_median():
    luma = np.asarray(Image.fromarray(CHINA[:320, :320]).convert("L"), dtype=float)
    small = luma.reshape(32, 10, 32, 10).mean(axis=(1, 3))
    n, k = np.arange(32)[None], np.arange(8)[:, None]
    basis = np.cos(np.pi * (2 * n + 1) * k / 64) * np.where(k == 0, np.sqrt(1 / 32), np.sqrt(2 / 32))
    low = (basis @ small @ basis.T).ravel()
    bits = (low > np.median(low[1:])) & (np.arange(64) > 0)
    expected = sum(1 << (63 - place) for place in np.flatnonzero(bits).tolist())
    assert distance(phash(np.ascontiguousarray(CHINA[:320, :320])), expected) <= 1  # of luma rounded to uint8


def test_coefficients_that_are_zero_are_not_told_apart_by_rounding_noise():
    for tile in tiles():
        half = tile[:192, :96]
        bits = np.array([phash(np.hstack([half, half[:, ::-1]])) >> place & 1 for place in range(63, -1, -1)]).reshape(
            8, 8
        )
        assert len(set(bits[:, 1::2].ravel().tolist())) == 1  # the odd ones, of a picture that mirrors itself


@pytest.mark.parametrize("value", [0, 77, 255])
def test_flat_images_hash_alike(value):
    assert phash(np.full((90, 61, 3), value, np.uint8)) == 0


def test_luma_figures_equal_their_definitions():
    tile = np.ascontiguousarray(CHINA[100:220, 50:178])  # small enough to be measured as it is
    luma = np.asarray(Image.fromarray(tile).convert("L"), dtype=float)
    share = np.bincount(luma.astype(int).ravel(), minlength=256) / luma.size
    signals = pixel_signals(tile)
    assert signals["luma_mean"] == pytest.approx(luma.mean(), abs=0.3)
    assert signals["luma_std"] == pytest.approx(luma.std(), abs=0.3)
    assert signals["entropy"] == pytest.approx(-(share[share > 0] * np.log2(share[share > 0])).sum(), abs=0.02)
    flat = {"phash": 0, "luma_mean": 0, "luma_std": 0, "entropy": 0, "blur": 0, "dominant_share": 1}
    flat["border_share"] = 1
    assert pixel_signals(np.zeros((9, 9, 3), np.uint8)) == flat


def test_blur_and_the_dominant_colours_share_equal_their_definitions():
    tile = np.ascontiguousarray(FLOWER[100:200, 100:220])  # small enough to be measured as it is
    luma = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY).astype(float)
    edge = np.pad(luma, 1, mode="reflect")
    laplacian = edge[:-2, 1:-1] + edge[2:, 1:-1] + edge[1:-1, :-2] + edge[1:-1, 2:] - 4 * luma
    signals = pixel_signals(tile)
    assert signals["blur"] == pytest.approx(laplacian.var(), rel=1e-3)
    for part in (tile[:60, :64], tile):  # of which the second has more than 64 pixels a side: every other one counts
        dots = part if part.shape[1] <= 64 else part[::2, ::2]
        _, counts = np.unique((dots // 16).reshape(-1, 3), axis=0, return_counts=True)
        share = pixel_signals(np.ascontiguousarray(part))["dominant_share"]
        assert share == pytest.approx(counts.max() / counts.sum(), abs=1e-4)
    blurred = cv2.GaussianBlur(tile, (9, 9), 3)
    assert pixel_signals(blurred)["blur"] < signals["blur"] / 10


def test_shrinking_keeps_the_shape_of_the_whole_image():
    resize = Resize("keep_ratio", 100)
    decoded = decode(encoded(Image.fromarray(CHINA).resize((1003, 677))), max_pixels=MANY, resize=resize)
    assert resized(decoded.rgb, resize, decoded.width, decoded.height).shape == (100, 148, 3)


@pytest.mark.parametrize(
    ("top", "left", "bottom", "right"), [(0, 0, 0, 0), (20, 0, 20, 0), (0, 32, 0, 0), (8, 16, 24, 0)]
)
def test_the_border_share_is_the_area_of_the_flat_margins(top, left, bottom, right):
    picture = np.full((100, 128, 3), 255, np.uint8)
    inner = np.random.default_rng(0).integers(0, 200, (100 - top - bottom, 128 - left - right, 3), np.uint8)
    picture[top : 100 - bottom, left : 128 - right] = inner
    assert pixel_signals(picture)["border_share"] == pytest.approx(1 - inner.size / picture.size, abs=1e-4)
