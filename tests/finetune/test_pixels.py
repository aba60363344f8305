"""Crops, and the pixels of both ways to decode: of photographs, of every kind of JPEG, of what is no JPEG."""

import io
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from open_clip.transform import image_transform
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn import functional
from torchvision import transforms
from torchvision.transforms import functional as reference

from finetune import pixels
from finetune.images import UNREADABLE
from finetune.pixels import EvaluationView, TrainingView, normalised, random_crop

CFG = {"size": 96, "mean": (0.48, 0.45, 0.40), "std": (0.27, 0.26, 0.28), "interpolation": "bicubic"}
SEED = (1, 2, 3)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return load_sample_images().images


def encoded(rgb: np.ndarray, form: str = "JPEG", mode: str = "RGB", **how) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).convert(mode).save(file, form, **how)
    return file.getvalue()


def shown(view: TrainingView | EvaluationView, content: bytes) -> torch.Tensor:
    room = view.room(1)
    view.prepare(content, SEED)(room[0])
    return room[0]


def both(content: bytes, scale=(0.5, 0.9), **changed) -> tuple[torch.Tensor, torch.Tensor]:
    fast, exact = (shown(TrainingView(CFG | changed, scale, fast=fast), content) for fast in (True, False))
    assert fast.dtype == exact.dtype == torch.uint8
    assert fast.shape == exact.shape
    return fast, exact


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (one.float() - other.float()).pow(2).mean()))


# --- crops ------------------------------------------------------------------------------------------------------------


def test_crops_have_the_asked_share_of_the_area_and_a_mild_aspect():
    boxes = [random_crop(200, 180, (0.3, 0.8), (seed,)) for seed in range(200)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 180
        width, height = right - left, bottom - top
        assert 0.29 <= width * height / (200 * 180) <= 0.81
        assert 0.74 <= width / height <= 1.35
    areas = [(right - left) * (bottom - top) / 36_000 for left, top, right, bottom in boxes]
    assert np.mean(areas) == pytest.approx(0.55, abs=0.03)


@pytest.mark.parametrize("size", [(1000, 2), (2, 1000), (1, 1)])
def test_an_image_too_narrow_for_any_crop_is_cut_in_its_middle(size):
    left, top, right, bottom = random_crop(*size, (0.9, 1.0), (0,))
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]


def test_equal_seeds_give_equal_crops_and_others_others():
    seeds = ((1, 2, 3), (1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (12, 3))
    boxes = [random_crop(300, 300, (0.2, 1.0), seed) for seed in seeds]
    assert boxes[0] == boxes[1]
    assert len(set(boxes)) == 5
    assert random_crop(300, 300, (0.2, 1.0), (1, 2, 3)) == (6, 79, 269, 282)  # on any machine, in any version


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_exact_pixels_are_those_of_open_clips_training_transform_with_the_same_box(photos, interpolation, monkeypatch):
    content = encoded(photos[0])
    box = random_crop(640, 427, (0.5, 0.9), SEED)
    theirs = image_transform(96, is_train=True, mean=CFG["mean"], std=CFG["std"], interpolation=interpolation)
    crop = next(step for step in theirs.transforms if isinstance(step, transforms.RandomResizedCrop))
    if interpolation == "bilinear":  # open_clip's training transform knows bicubic alone
        crop.interpolation = transforms.InterpolationMode.BILINEAR
    left, top, right, bottom = box
    monkeypatch.setattr(crop, "get_params", lambda *_: (top, left, bottom - top, right - left))
    ours = shown(TrainingView(CFG | {"interpolation": interpolation}, (0.5, 0.9), fast=False), content)
    assert torch.equal(normalised(ours[None], CFG)[0], theirs(Image.open(io.BytesIO(content))))


def test_pixels_in_evaluation_are_those_of_open_clips_transform(photos):
    theirs = image_transform(96, is_train=False, mean=CFG["mean"], std=CFG["std"])
    content = encoded(photos[1])
    assert torch.equal(shown(EvaluationView(theirs, CFG), content), theirs(Image.open(io.BytesIO(content))))


def test_normalised_pixels_are_torchvisions_to_the_bit():
    every = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(3, 16, 16)
    expected = reference.normalize(reference.to_tensor(every.permute(1, 2, 0).numpy()), CFG["mean"], CFG["std"])
    for batch in (every[None], every.permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]):
        assert torch.equal(normalised(batch, CFG)[0], expected)


# --- fast -------------------------------------------------------------------------------------------------------------


def test_a_batch_lies_in_the_memory_of_one_before_that_nobody_has_any_more():
    cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

    def of(value, count=2):
        return normalised(torch.full((count, 3, 5, 5), value, dtype=torch.uint8), cfg)

    places = set()
    for value in range(9):
        batch = of(value)
        places.add(batch.data_ptr())
    assert len(places) == 2, "the one that is made and the one before"
    weight = torch.ones(1, 3, 5, 5, requires_grad=True)
    first = functional.conv2d(of(255), weight).sum()
    assert of(255, count=3).shape == (3, 3, 5, 5)
    part, kept = of(51)[1, :, 2:], [of(value) for value in range(20)]
    with ThreadPoolExecutor(1) as other:
        other.submit(of, 102).result()
    first.backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 2.0)), "what autograd keeps is somebody's"
    assert torch.equal(part, of(51)[1, :, 2:])
    assert [int(each[0, 0, 0, 0] * 127.5 + 127.5) for each in kept] == list(range(20))


def test_fast_pixels_are_the_exact_ones_but_for_rounding_where_nothing_is_scaled(photos):
    for photo in photos:
        fast, exact = both(encoded(photo, quality=85), size=300)
        assert (fast.int() - exact.int()).abs().max() <= 2
        assert psnr(fast, exact) > 60


@pytest.mark.parametrize(("times", "step"), [(2.2, 4), (4.5, 8)])
def test_large_photographs_are_decoded_in_part_and_look_the_same(photos, times, step, monkeypatch):
    asked = []
    whole = simplejpeg.decode_jpeg

    def decode(content, *args, **how):
        asked.append((how["min_width"], how["min_height"]))
        return whole(content, *args, **how)

    monkeypatch.setattr(pixels.simplejpeg, "decode_jpeg", decode)
    large = cv2.resize(photos[1], None, fx=times / 2, fy=times / 2, interpolation=cv2.INTER_AREA)
    fast, exact = both(encoded(large))
    assert asked == [(-(-large.shape[1] // step), -(-large.shape[0] // step))]
    assert psnr(fast, exact) > 26  # the box is rounded to pixels that are as large as one of those that are wanted


@pytest.mark.parametrize(
    ("size", "box", "step"),
    [
        (100, (0, 0, 199, 400), 1),  # one side too few for a half
        (100, (5, 5, 205, 405), 2),
        (100, (0, 0, 799, 800), 4),
        (100, (0, 0, 5000, 5000), 8),
        ((100, 50), (0, 0, 100, 200), 2),  # height × width
        (100, (0, 0, 20, 20), 1),
    ],
)
def test_the_scale_is_the_smallest_that_has_all_the_pixels(size, box, step):
    height_width = (size, size) if isinstance(size, int) else size
    assert pixels._step(box, height_width) == step


@pytest.mark.parametrize("size", [224, (64, 128)])
def test_small_images_are_enlarged_and_sizes_may_be_oblong(photos, size):
    fast, exact = both(encoded(cv2.resize(photos[0], (120, 90), interpolation=cv2.INTER_AREA)), size=size)
    assert psnr(fast, exact) > 50


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_what_is_decoded_whole_is_resampled_as_torchs_interpolate_does_it(photos, interpolation):
    rgb = photos[0][:200, :260]
    found = shown(TrainingView(CFG | {"interpolation": interpolation}, (0.5, 0.9)), encoded(rgb, "PNG"))
    left, top, right, bottom = random_crop(260, 200, (0.5, 0.9), SEED)
    crop = torch.from_numpy(rgb[top:bottom, left:right].copy()).permute(2, 0, 1)[None]
    assert torch.equal(found, functional.interpolate(crop, (96, 96), mode=interpolation, antialias=True)[0])


def test_the_next_image_leaves_the_one_before_as_it_was(photos):
    one, other = (encoded(photo[:96, :96]) for photo in photos)
    view = TrainingView(CFG, (1.0, 1.0))  # the whole image, in its own size: nothing is resampled
    first = shown(view, one)
    kept = first.clone()
    assert not torch.equal(shown(view, other), kept)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("form", "mode", "how"),
    [
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("WEBP", "RGB", {}),
        ("GIF", "P", {}),
    ],
)
def test_every_form_has_the_same_pixels_both_ways(photos, form, mode, how):
    fast, exact = both(encoded(photos[0][:200, :260], form, mode, **how), size=120)
    assert psnr(fast, exact) > 55
    assert fast.shape == (3, 120, 120)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("damage", ["cut short", "empty", "a page", "no scan"])
def test_what_is_no_whole_image_is_an_error_both_ways(photos, fast, damage):
    whole = encoded(photos[0])
    content = {"cut short": whole[: len(whole) // 2], "empty": b"", "a page": b"<html>", "no scan": whole[:300]}[damage]
    with pytest.raises(UNREADABLE):
        shown(TrainingView(CFG, (0.9, 1.0), fast=fast), content)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what is odd in them
@pytest.mark.parametrize("form", ["AVIF", "WEBP", "PNG", "GIF", "TIFF", "JPEG", "BMP"])
def test_whatever_bytes_a_file_has_it_is_read_or_told_to_be_unreadable(photos, form):
    whole, random = np.frombuffer(encoded(photos[0][:48, :64], form), np.uint8), np.random.default_rng(0)
    told = set()
    for _ in range(300):
        content = whole.copy()
        places = random.integers(0, len(content), random.integers(1, 40))
        content[places] = random.integers(0, 256, len(places))
        try:
            shown(TrainingView(CFG, (0.9, 1.0), fast=True), content.tobytes())
        except UNREADABLE as error:
            told.add(type(error))
    assert told
    assert form != "AVIF" or RuntimeError in told


@pytest.mark.parametrize("fast", [True, False])
def test_an_odd_file_that_pillow_reads_is_read_both_ways(photos, fast):
    odd = encoded(photos[0])[:-2] + b"\0\0\xff\xd9trailing"
    assert shown(TrainingView(CFG, (0.9, 1.0), fast=fast), odd).shape == (3, 96, 96)


@pytest.mark.parametrize("fast", [True, False])
def test_a_bomb_is_refused_both_ways(photos, fast, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(Image.DecompressionBombError):
        shown(TrainingView(CFG, (0.9, 1.0), fast=fast), encoded(photos[0]))
