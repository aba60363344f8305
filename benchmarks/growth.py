"""Index and shuffle of very large datasets: seconds and memory to the first batch, at 1, 10 and 100 million samples.

    python benchmarks/growth.py                 1, 10 and 100 million
    python benchmarks/growth.py --quick         1 and 10 million
    python benchmarks/growth.py --millions 100  that size alone
    python benchmarks/growth.py --work DIR      where the dataset is put (and removed from)

The dataset is synthetic, the code real: shards of 10,000 rows as `curate build` packs them, with their columns and
captions of web length. Eight of them are different; the others are further names of these. Each row's image lies in a
tar with its caption and facts behind it, as everywhere. A process of its own makes a CLIPDataModule of it (a ViT of 32
pixels, batches of 256, two epochs' orders) and takes the first batch of both epochs; what is counted begins with
`setup` and ends with the batch, and the peak is the process's high-water mark, torch and all.

`seconds_first_batch`, `cpu_s`, `peak_gb`: of the largest; each size's own have `_1m`, `_10m`, `_100m` behind them;
`base_gb` is what the process held before `setup`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

SHARD, BODIES = 10_000, 8
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 10 million")
    parser.add_argument("--millions", type=int, nargs="+", help="these sizes, from small to large")
    parser.add_argument("--work", type=Path, help="folder for the dataset")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    figures: dict[str, float] = {}
    print(f"{platform.machine()}, {os.cpu_count()} cores\n\n| samples | seconds to the first batch | CPU s | peak GB |")
    print("|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        write_bodies(Path(folder))
        for millions in given.millions or ((1, 10) if given.quick else (1, 10, 100)):
            dataset = name_shards(Path(folder), millions * 1_000_000)
            found = measured(dataset)
            figures |= {f"{name}_{millions}m": value for name, value in found.items()} | found
            row = f"{found['seconds_first_batch']:.1f} | {found['cpu_s']:.1f} | {found['peak_gb']:.2f}"
            print(f"| {millions},000,000 | {row} |", flush=True)
    print(json.dumps(figures))


# --- the dataset ------------------------------------------------------------------------------------------------------


def write_bodies(folder: Path) -> None:
    """The different shards, written as `curate build` writes them."""
    import io

    import numpy as np
    import pyarrow as pa
    from PIL import Image

    from curate.shards import ShardWriter

    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), random.integers(2, 9))) for _ in range(5_000)]
    images = []
    for _ in range(100):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((48, 48)).save(file, "JPEG")
        images.append(file.getvalue())
    texts = ("url", "url_host", "status", "format", "sha256", "error_message", "duplicate_group")
    numbers = ("width", "height", "original_width", "original_height", "http_status", "bytes", "phash", "caption_chars")
    reals = ("luma_mean", "luma_std", "entropy", "blur", "dominant_share", "border_share", "aspect", "clip_score")
    fields = [(name, pa.string()) for name in ("key", "caption", *texts)]
    fields += [(name, pa.int64()) for name in numbers] + [(name, pa.float64()) for name in reals]
    for body in range(BODIES):
        with ShardWriter(folder / "bodies" / f"{body:05d}", pa.schema(fields), made_from="growth") as shard:
            for number in range(SHARD):
                key = random.bytes(10).hex()
                row: dict[str, Any] = dict.fromkeys(texts, key) | dict.fromkeys(numbers, number)
                chosen = random.integers(0, len(words), max(2, int(random.lognormal(2.2, 0.6))))
                row |= dict.fromkeys(reals, random.random())
                row |= {"key": key, "caption": " ".join(words[word] for word in chosen)}
                shard.add(row, images[number % 100], "jpg")


def name_shards(folder: Path, samples: int) -> Path:
    """A dataset of so many samples; those of a smaller one are there already."""
    dataset = folder / "dataset"
    (dataset / "shards").mkdir(parents=True, exist_ok=True)
    for number in range(samples // SHARD):
        for ending in ("tar", "parquet"):
            name = dataset / "shards" / f"train-{number:05d}.{ending}"
            if not name.exists():
                name.hardlink_to(folder / "bodies" / f"{number % BODIES:05d}.{ending}")
    return dataset


# --- one size, in a process of its own -------------------------------------------------------------------------------


def measured(dataset: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(dataset)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(dataset: Path) -> dict[str, float]:
    """Seconds from `setup` to the first batch of each of two epochs."""
    import torch  # noqa: F401 - counts as held before

    from curate.clip import load_clip
    from finetune.config import DataConfig
    from finetune.data import CLIPDataModule

    with tempfile.TemporaryDirectory() as folder:
        name = Path(folder) / "tiny.json"
        name.write_text(json.dumps(TINY), encoding="utf-8")
        clip = load_clip(str(name), device="cpu")

    class Data(CLIPDataModule):
        """Without a trainer."""

        def _clip(self) -> Any:
            return clip

    base, started, cpu = peak_gb(), time.perf_counter(), time.process_time()
    data = Data(DataConfig(dataset=dataset, batch_size=256, num_workers=0))
    data.setup()
    loader = data.train_dataloader()
    batch = next(iter(loader))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    loader.epoch, loader.next_batch = 1, 0
    other = next(iter(loader))
    assert len(batch["row"]) == 256
    assert batch["row"].tolist() != other["row"].tolist()
    return {
        "seconds_first_batch": round(seconds, 2),
        "cpu_s": round(cpu, 2),
        "peak_gb": round(peak_gb(), 2),
        "base_gb": round(base, 2),
    }


def peak_gb() -> float:
    """The high-water mark of this process."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 / 1e9 if found else 0.0


if __name__ == "__main__":
    main()
