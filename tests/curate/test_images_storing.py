"""Pixels → stored bytes, against Pillow, OpenCV and img2dataset's own resizer."""

import io
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from curate.images import Encoding, Rejected, Resize, decode, store
from curate.ledger import Reason

MANY = 50_000_000
CHINA, FLOWER = (np.asarray(image) for image in load_sample_images().images)


def encoded(image, kind="JPEG", **options):
    sink = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(sink, kind, **options)
    return sink.getvalue()


def mean_difference(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


def stored(content, max_side=512, mode="keep_ratio", bigger=True, **encoding):
    resize = Resize(mode, max_side, bigger)
    return store(decode(content, max_pixels=MANY, resize=resize), content, resize, Encoding(**encoding))


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_an_image_that_fits_is_kept_byte_for_byte(kind, extension):
    content = encoded(CHINA, kind)
    kept = stored(content)
    assert (kept.content, kept.extension) == (content, extension)


def test_a_larger_image_is_scaled_down_on_its_shorter_side():
    kept = stored(encoded(Image.fromarray(CHINA).resize((1600, 1000))), max_side=300)
    assert kept.extension == "jpg"
    assert Image.open(io.BytesIO(kept.content)).size == (480, 300) == kept.rgb.shape[1::-1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_scaling_is_by_area_and_near_a_full_decode(kind):
    large = Image.fromarray(FLOWER).resize((1920, 1281))
    content = encoded(large, kind, **({"quality": 95} if kind == "JPEG" else {}))
    expected = np.asarray(large.reduce(3))  # the mean of each 3 × 3
    assert mean_difference(stored(content, max_side=427).rgb, expected) < 2.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("height", [260, 300, 333, 375, 427, 480, 533, 601, 683, 769, 853, 1067, 1365])
def test_scaling_down_at_any_ratio_equals_the_area_filter_on_all_pixels(kind, height):
    photo = Image.fromarray(CHINA).resize((height * 3 // 2, height), Image.Resampling.LANCZOS)
    content = encoded(photo, kind, **({"quality": 85} if kind == "JPEG" else {"compress_level": 1}))
    for resize in (Resize("keep_ratio", 256), Resize("keep_ratio_largest", 200)):
        ours = stored(content, resize.size, resize.mode).rgb
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        theirs = cv2.resize(pixels, ours.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert cv2.PSNR(np.ascontiguousarray(ours), theirs) >= 35


def test_nothing_is_scaled_up():
    content = encoded(CHINA[:50, :80])
    assert stored(content, max_side=512).content == content


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_a_lossless_image_that_needs_a_change_but_no_scaling_stays_lossless(kind):
    image = Image.fromarray(FLOWER[:60, :60]).quantize(64)
    content = encoded(image, kind) if kind == "GIF" else encoded(np.dstack([FLOWER, FLOWER[..., 0]]), kind)
    kept = stored(content)
    assert kept.extension == "png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(kept.content))), decode(content, max_pixels=MANY).rgb)


def test_a_strip_too_long_for_a_jpeg_is_stored_as_png():
    assert stored(encoded(Image.new("L", (70_000, 20)), "PNG"), max_side=19).extension == "png"


@pytest.mark.parametrize(("kind", "extension"), [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_each_encoding_gives_its_format(kind, extension):
    quality = 3 if kind == "png" else 90
    kept = stored(encoded(CHINA), only_if_changed=False, format=kind, quality=quality)
    assert kept.extension == kind
    with Image.open(io.BytesIO(kept.content)) as image:
        assert image.format == extension
        assert mean_difference(np.asarray(image.convert("RGB")), decode(encoded(CHINA), max_pixels=MANY).rgb) < 8


MODES = ["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]


@pytest.mark.parametrize("bigger", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_the_geometry_is_img2datasets(mode, bigger):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from img2dataset.resizer import Resizer
    theirs = Resizer(image_size=256, resize_mode=mode, resize_only_if_bigger=bigger, encode_quality=98)
    sizes = ((640, 427), (427, 640), (1281, 855), (2048, 1366), (200, 150), (300, 120), (256, 256), (513, 257))
    photos = [(FLOWER, size) for size in sizes] + [(CHINA, size) for size in ((640, 427), (600, 400), (320, 214))]
    for photo, (width, height) in photos:
        content = encoded(Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS), quality=95)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            their_bytes, their_width, their_height, *_, error = theirs(io.BytesIO(content))
        assert error is None
        kept = stored(content, 256, mode, bigger, quality=98, only_if_changed=False)
        ours, other = (np.asarray(Image.open(io.BytesIO(each)), dtype=float) for each in (kept.content, their_bytes))
        assert kept.rgb.shape[1::-1] == (their_width, their_height)
        noise = ((ours - other) ** 2).mean()
        assert 10 * np.log10(255**2 / max(noise, 1e-9)) >= 35, (mode, bigger, width, height)


def test_storing_is_deterministic():
    content = encoded(Image.fromarray(CHINA).resize((1600, 1000)))
    assert stored(content).content == stored(content).content


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_what_is_stored_opens_upright_and_plain_for_every_reader(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(CHINA).resize((900, 700)), kind, **({} if kind == "GIF" else {"exif": exif}))
    kept = stored(content)
    assert mean_difference(np.asarray(Image.open(io.BytesIO(kept.content)).convert("RGB")), kept.rgb) < 3


@pytest.mark.parametrize("mode", ["keep_ratio", "center_crop"])
def test_a_thin_image_that_would_grow_to_gigabytes_is_refused(mode):
    thin = encoded(Image.new("RGB", (2, 60_000)))
    with pytest.raises(Rejected) as rejected:
        stored(thin, 256, mode, bigger=False)
    assert (rejected.value.reason, rejected.value.value) == (
        Reason.TOO_MANY_PIXELS,
        "2x60000, resized 256x7680000",
    )
    assert stored(encoded(Image.new("RGB", (2, 600))), 256, mode, bigger=False).rgb.shape[1] == 256


def test_an_image_longer_than_any_format_takes_is_refused():
    with pytest.raises(Rejected) as rejected:
        stored(encoded(Image.new("RGB", (2, 1_000_001)), "BMP"))
    assert (rejected.value.reason, rejected.value.value) == (Reason.TOO_MANY_PIXELS, "2x1000001, which png cannot hold")
