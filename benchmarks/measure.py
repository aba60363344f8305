"""`curate measure` with a CLIP: CPU time an image, beside the bare forward on the same images and captions.

    python benchmarks/measure.py             512 photographs of 512 pixels, ViT-B-32
    python benchmarks/measure.py --quick     32 of them
    python benchmarks/measure.py --images N

Random weights: they cost what trained ones do. Bare forward: pixels and tokens lie ready in memory, same batches,
same threads. CPU time, because a shared machine has no steady wall time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from curate.clip import Clip, load_clip
from curate.measure.clip import embed_shard
from curate.measure.images import fetched_rows
from curate.shards import ShardWriter

SIDE, BATCH, ROUNDS = 512, 32, 3
DIFFERENT = 64  # pictures; more images than that are these again, which nothing here is told


@cache
def jpeg(number: int) -> bytes:
    """A picture with detail at every scale, as large a JPEG as a photograph's."""
    rng = np.random.default_rng(number)
    total = np.zeros((SIDE, SIDE, 3))
    for side in (4, 16, 64, 256):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 4
    buffer = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shard(stem: Path, images: int) -> None:
    schema = pa.schema({"key": pa.string(), "caption": pa.string(), "status": pa.string()})
    with ShardWriter(stem, schema, made_from="benchmark") as writer:
        for number in range(images):
            row = {"key": f"{number:06d}", "caption": f"a photograph of thing {number}", "status": "success"}
            writer.add(row, jpeg(number % DIFFERENT), "jpg")


def bare(clip: Clip, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for pixels, tokens in batches:
        clip.embed_images(pixels)
        clip.embed_captions(tokens)


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--images", type=int, default=512)
    given = parser.parse_args()
    images = 32 if given.quick else given.images
    torch.manual_seed(0)
    clip = load_clip("ViT-B-32", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "00000"
        write_shard(stem, images)
        rows = fetched_rows(stem)
        pictures = [
            clip.preprocess(Image.open(io.BytesIO(jpeg(number % DIFFERENT))).convert("RGB")) for number in range(images)
        ]
        captions = rows["caption"].to_pylist()
        batches = [
            (torch.stack(pictures[start : start + BATCH]), clip.tokenizer(captions[start : start + BATCH]))
            for start in range(0, images, BATCH)
        ]
        bare(clip, batches[:1])
        pairs = []
        for _ in range(ROUNDS):  # in turn, so that a neighbour's load meets both
            forward = cpu_seconds(lambda: bare(clip, batches))
            ours = cpu_seconds(lambda: embed_shard(clip, stem.with_suffix(".tar"), rows, BATCH, lambda _: None))
            pairs.append((forward, ours))
            print(
                f"bare forward {1000 * forward / images:.1f} ms an image, measure {1000 * ours / images:.1f} ms",
                flush=True,
            )
    versions = {name: version(name) for name in ("torch", "open_clip_torch", "pillow", "torchvision")}
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}")
    share = median(forward / ours for forward, ours in pairs)
    print(json.dumps({"forward_share": round(share, 3), "images": images, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
