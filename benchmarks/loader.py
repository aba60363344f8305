"""Batches for training out of tars of photographs, beside open_clip_train's loader, in CPU time an image.

    python benchmarks/loader.py                         1,024 JPEGs of about 500 pixels, five rounds
    python benchmarks/loader.py --quick                 256 of them, one round
    PYTHONPATH=CHECKOUT/src python benchmarks/loader.py     beside another version of open_clip_train

The same tars for all: cuts of the two photographs that scikit-learn ships, 500 × 375 or 375 × 500, with captions. Out
of them a random resized crop of 224 pixels (0.9 to 1 of the area, bicubic) and token ids of ViT-B-32, in batches of 64.
Each arm is a process of its own, one thread, no workers; what is counted is the CPU time of a whole epoch, after all is
imported and the loader is made.

    open_clip           open_clip_train.data.get_wds_dataset with open_clip's training transform: normalised floats
    ours                CLIPDataModule's loader, and the bytes normalised as the module does it on its device
    ours, 2nd epoch     the same, with captions that it knows by now
    ours, exact         as `ours, 2nd epoch`, data.decode: exact
    ours, bytes         as `ours, 2nd epoch`, without normalising: what the loader hands out
    decode and resize   libjpeg-turbo and the filter alone, of bytes and boxes that lie in memory

`ratio_loader`: `ours` to open_clip, images per CPU-second; `ratio_bytes`: `ours, bytes` to it; `decode_share`: `ours,
bytes` to `decode and resize`. Medians over the rounds.

Then, for photographs of several sizes, the cosine distance between embeddings of fast and of exact pixels in a ViT-B-32
of random weights, and between those of two crops: the largest are `drift_mean` and `drift_max`, the least `crop_mean`.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from benchmarks.shared.peer import read_todays_tars
from benchmarks.shared.photographs import WEB_QUALITY, photograph, write_shards
from curate.index import MemberReader, read_index
from finetune.libraries import import_libraries

SIZE, BATCH, SCALE, SHARD = 224, 64, (0.9, 1.0), 128
DRIFT_SIZES = ((320, 240), (500, 375), (640, 480), (1024, 768), (2048, 1536))
ARMS = ("open_clip", "ours", "ours, exact", "ours, bytes", "decode and resize")


# --- photographs ------------------------------------------------------------------------------------------------------


def photographs(count: int, size: tuple[int, int]) -> Iterator[bytes]:
    """JPEGs of that width and height."""
    random = np.random.default_rng(0)
    for _ in range(count):
        yield photograph(random, size, WEB_QUALITY)


# --- an arm, in a process of its own ----------------------------------------------------------------------------------


def measure(arm: str, folder: Path, count: int) -> dict[str, float]:
    """CPU seconds an image, by the name of what they are of."""
    torch.set_num_threads(1)
    if arm == "open_clip":
        return {arm: open_clip_train(folder, count)}
    import_libraries("lightning.pytorch", "open_clip")  # as the command does
    if arm == "decode and resize":
        return {arm: decode_and_resize(folder)}
    first, second = ours(folder, "exact" if "exact" in arm else "fast", normalise="bytes" not in arm)
    return {"ours": first, "ours, 2nd epoch": second} if arm == "ours" else {arm: second}


def open_clip_train(folder: Path, count: int) -> float:
    """open_clip_train's own pipeline: shuffle, decode, transform, tokenise, batch."""
    import open_clip
    from open_clip.transform import image_transform
    from open_clip_train import data

    read_todays_tars()
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    told = Namespace(
        train_data="::".join(tars), train_num_samples=count, train_data_upsampling_factors=None, seed=0,
        batch_size=BATCH, workers=0, world_size=1, dataset_resampled=False,
    )  # fmt: skip
    transform = image_transform(SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    tokenizer(["a warm-up"])
    found = data.get_wds_dataset(told, transform, is_train=True, tokenizer=tokenizer)
    seen = 0
    start = time.process_time()
    for batch in found.dataloader:
        images, _ = batch.values() if isinstance(batch, dict) else batch
        assert images.dtype == torch.float32
        assert images.shape[1:] == (3, SIZE, SIZE)
        seen += len(images)
    assert seen == count, seen
    return (time.process_time() - start) / seen


def ours(folder: Path, decode: str, *, normalise: bool) -> tuple[float, float]:
    """Of a first epoch, and of a second."""
    from curate.clip import load_clip
    from finetune.config import DataConfig
    from finetune.data import CLIPDataModule
    from finetune.pixels import normalised

    clip = load_clip("ViT-B-32", device="cpu")
    clip.tokenizer(["a warm-up"])

    class Data(CLIPDataModule):
        def _clip(self) -> Any:
            return clip

        def _trim(self) -> None:
            """Captions of 77 tokens, as open_clip has them."""

    config = DataConfig(dataset=folder, batch_size=BATCH, num_workers=0, crop_scale=SCALE, decode=decode)  # type: ignore[arg-type]
    data = Data(config)
    data.setup()
    loader = data.train_dataloader()
    taken = []
    for _ in range(2):
        start, seen = time.process_time(), 0
        for batch in loader:
            pixels = normalised(batch["pixels"], clip.preprocess_cfg) if normalise else batch["pixels"]
            assert pixels.shape[1:] == (3, SIZE, SIZE)
            seen += len(pixels)
        assert seen == len(data.train_index)
        taken.append((time.process_time() - start) / seen)
    return taken[0], taken[1]


def decode_and_resize(folder: Path) -> float:
    """What no loader can do without."""
    from finetune.pixels import random_crop

    index = read_index(folder)
    reader = MemberReader(index.tars)
    columns = (index.table[name].to_pylist() for name in ("tar", "image_offset", "image_size"))
    images = [reader.read(*place) for place in zip(*columns, strict=True)]
    heads = [simplejpeg.decode_jpeg_header(content) for content in images]
    boxes = [random_crop(width, height, SCALE, (0, number)) for number, (height, width, *_) in enumerate(heads)]
    start = time.process_time()
    for content, (left, top, right, bottom) in zip(images, boxes, strict=True):
        rgb = simplejpeg.decode_jpeg(content, "RGB")
        crop = torch.from_numpy(np.ascontiguousarray(rgb[top:bottom, left:right]))[None].permute(0, 3, 1, 2)
        torch.nn.functional.interpolate(crop, (SIZE, SIZE), mode="bicubic", antialias=True)
    return (time.process_time() - start) / len(images)


# --- drift ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def drift(count: int) -> dict[str, float]:
    """Cosine distances between what a CLIP makes of fast and of exact pixels, and of two crops."""
    from curate.clip import load_clip
    from finetune.pixels import TrainingView, normalised

    torch.manual_seed(0)
    clip = load_clip("ViT-B-32", device="cpu")

    def embedded(content: list[bytes], seed: int, *, fast: bool) -> torch.Tensor:
        view = TrainingView(clip.preprocess_cfg, SCALE, fast=fast)
        pixels = view.room(len(content))
        for number, (each, slot) in enumerate(zip(content, pixels, strict=True)):
            view.prepare(each, (seed, number))(slot)
        return clip.embed_images(normalised(pixels, clip.preprocess_cfg)).double()

    print("\n| photographs | fast and exact, mean | most | two crops, mean |\n|---|---|---|---|", flush=True)
    rows = []
    for width, height in DRIFT_SIZES:
        content = list(photographs(count, (width, height)))
        exact = embedded(content, 0, fast=False)
        decoded, cropped = (
            1 - (embedded(content, seed, fast=fast) * exact).sum(dim=1) for seed, fast in ((0, True), (1, False))
        )
        rows.append((float(decoded.mean()), float(decoded.max()), float(cropped.mean())))
        print(
            f"| {width} × {height} | " + " | ".join(f"{max(0.0, value):.1e}" for value in rows[-1]) + " |", flush=True
        )
    mean, most, crops = zip(*rows, strict=True)
    return {"drift_mean": max(mean), "drift_max": max(most), "crop_mean": min(crops)}


# --- all of it --------------------------------------------------------------------------------------------------------


def compare(folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Run the arms in turn, so that a neighbour's load meets all."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for arm in ARMS:
            command = [sys.executable, __file__, "--arm", arm, str(folder), str(count)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            for name, seconds in json.loads(done.stdout.splitlines()[-1]).items():
                found.setdefault(name, []).append(seconds)
    print("| | ms an image | images per CPU-second |\n|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {1000 * median(seconds):.2f} | {1 / median(seconds):,.0f} |", flush=True)

    def ratio(one: str, other: str) -> float:
        return round(median(b / a for a, b in zip(found[one], found[other], strict=True)), 2)

    return {
        "ratio_loader": ratio("ours", "open_clip"),
        "ratio_bytes": ratio("ours, bytes", "open_clip"),
        "decode_share": ratio("ours, bytes", "decode and resize"),
        "ratio_exact": ratio("ours, exact", "open_clip"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 photographs, one round")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        arm, folder, count = given.arm
        print(json.dumps(measure(arm, Path(folder), int(count))))
        return
    import open_clip

    count, rounds = (256, 1) if given.quick else (1024, 5)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), count, SHARD)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.tar"))
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, one thread, torch {version('torch')}, open_clip "
            f"{open_clip.__version__}, webdataset {version('webdataset')}, pillow {version('pillow')}\n"
            f"{count:,} photographs in tars of {size / 1e6:,.0f} MB\n"
        )
        figures = compare(Path(folder), count, rounds)
    print(
        json.dumps(figures | {name: float(f"{value:.1e}") for name, value in drift(16 if given.quick else 40).items()})
    )


if __name__ == "__main__":
    main()
