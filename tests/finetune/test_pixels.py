"""Crops, and the pixels of both ways to decode: of photographs, of every kind of JPEG, of what is no JPEG."""

import io

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from open_clip.transform import image_transform
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms
from torchvision.transforms import functional as reference

from finetune import pixels
from finetune.pixels import UNREADABLE, EvaluationView, TrainingView, normalised, random_crop

CFG = {"size": 96, "mean": (0.48, 0.45, 0.40), "std": (0.27, 0.26, 0.28), "interpolation": "bicubic"}
SEED = (1, 2, 3)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return load_sample_images().images


def encoded(rgb: np.ndarray, form: str = "JPEG", mode: str = "RGB", **how) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).convert(mode).save(file, form, **how)
    return file.getvalue()


def both(content: bytes, scale=(0.5, 0.9), **changed) -> tuple[torch.Tensor, torch.Tensor]:
    fast, exact = (TrainingView(CFG | changed, scale, fast=fast)(content, SEED) for fast in (True, False))
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
    assert random_crop(300, 300, (0.2, 1.0), (1, 2, 3)) == (47, 21, 289, 254)  # on any machine, in any version


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
    ours = TrainingView(CFG | {"interpolation": interpolation}, (0.5, 0.9), fast=False)(content, SEED)
    assert torch.equal(normalised(ours[None], CFG)[0], theirs(Image.open(io.BytesIO(content))))


def test_pixels_in_evaluation_are_those_of_open_clips_transform(photos):
    theirs = image_transform(96, is_train=False, mean=CFG["mean"], std=CFG["std"])
    content = encoded(photos[1])
    assert torch.equal(EvaluationView(theirs)(content, SEED), theirs(Image.open(io.BytesIO(content))))


def test_normalised_pixels_are_torchvisions_to_the_bit():
    every = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(3, 16, 16)
    expected = reference.normalize(reference.to_tensor(every.permute(1, 2, 0).numpy()), CFG["mean"], CFG["std"])
    for batch in (every[None], every.permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]):
        assert torch.equal(normalised(batch, CFG)[0], expected)


# --- fast -------------------------------------------------------------------------------------------------------------


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


def test_the_next_image_leaves_the_one_before_as_it_was(photos):
    one, other = (encoded(photo[:96, :96]) for photo in photos)
    view = TrainingView(CFG, (1.0, 1.0))  # the whole image, in its own size: nothing is resampled
    first = view(one, SEED)
    kept = first.clone()
    assert not torch.equal(view(other, SEED), kept)
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
        TrainingView(CFG, (0.9, 1.0), fast=fast)(content, SEED)


@pytest.mark.parametrize("fast", [True, False])
def test_an_odd_file_that_pillow_reads_is_read_both_ways(photos, fast):
    odd = encoded(photos[0])[:-2] + b"\0\0\xff\xd9trailing"
    assert TrainingView(CFG, (0.9, 1.0), fast=fast)(odd, SEED).shape == (3, 96, 96)


@pytest.mark.parametrize("fast", [True, False])
def test_a_bomb_is_refused_both_ways(photos, fast, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(Image.DecompressionBombError):
        TrainingView(CFG, (0.9, 1.0), fast=fast)(encoded(photos[0]), SEED)
