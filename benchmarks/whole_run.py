"""A whole run, `finetune fit` beside open_clip_train: wall time, CPU time and memory on the same pairs and model.

    python benchmarks/whole_run.py             20,480 pairs, two epochs; ten minutes and more
    python benchmarks/whole_run.py --quick     2,048 pairs

Both commands, one after the other, from the start of Python to its end, the last checkpoint written. The same tars of
photographs of about 500 pixels with captions as long as web captions are, of which the first words say what is to be
seen; the same folder with the weights that both start from (a ViT of 112 pixels, 3 + 3 blocks of width 128, random by
seed); float32, batches of 64, AdamW with the same rates, warm-up, cosine, decay and clipping, a checkpoint an epoch, a
log line every ten steps. Each has one thread for the step and one worker that reads. Ours also writes its report and
TensorBoard's file; open_clip_train pads captions to 77 tokens and decodes with Pillow.

`wall_ratio`, `cpu_ratio`: open_clip_train's seconds to ours, CPU seconds of the process tree. `peak_mb`,
`peak_mb_open_clip`: most memory of the tree at once, what is shared counted once (PSS); `memory_share`: ours to its.
`end_loss`, `end_loss_open_clip`: the contrast on 512 pairs that neither has seen, in batches of 64, by one function;
`start_loss`: before training. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from benchmarks.shared.cost import Cost, spend
from benchmarks.shared.photographs import write_shards

PEER = REPOSITORY / "benchmarks" / "shared" / "peer.py"
BATCH, EPOCHS, SHARD, UNSEEN = 64, 2, 1024, 512
RATE, DECAY, BETAS, EPSILON, CLIPPED_AT = 1e-3, 0.1, (0.9, 0.98), 1e-6, 1.0
LOGGED_EVERY = 10
SMALL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 112, "layers": 3, "width": 128, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}


@dataclass(frozen=True)
class Setting:
    """What is trained on.

    Attributes:
        folder: holds `shards`, `unseen` and `start`.
        pairs: a multiple of the batch, so that both tools make the same steps.
    """

    folder: Path
    pairs: int

    @property
    def steps(self) -> int:
        """Of the optimiser, in the whole run."""
        return EPOCHS * self.pairs // BATCH

    @property
    def warmup(self) -> int:
        """Of these, with rising learning rate."""
        return round(0.05 * self.steps)


def prepare(folder: Path, pairs: int, shard_size: int = SHARD, unseen: int = UNSEEN) -> Setting:
    """Write the pairs, those to compare on, and the CLIP that both start from."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    for name in ("shards", "unseen", "start"):
        (folder / name).mkdir()
    write_shards(folder / "shards", pairs, shard_size, split="train")
    write_shards(folder / "unseen", unseen, unseen, seed=1)
    torch.manual_seed(0)
    model = open_clip.CLIP(**SMALL)
    save_file(model.state_dict(), folder / "start" / "open_clip_model.safetensors")
    norm = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    told = json.dumps({"model_cfg": SMALL, "preprocess_cfg": norm})
    (folder / "start" / "open_clip_config.json").write_text(told, encoding="utf-8")
    (folder / "small.json").write_text(json.dumps(SMALL), encoding="utf-8")
    return Setting(folder, pairs)


# --- the two commands -------------------------------------------------------------------------------------------------


def ours(setting: Setting) -> list[str]:
    """What comes after `finetune`."""
    given: dict[str, Any] = {
        "out": setting.folder / "ours",
        "model.clip.name": f"local-dir:{setting.folder / 'start'}",
        "model.clip.pretrained": "null",
        "model.adapter.kind": "full",
        "model.loss.multi_positive": "false",  # open_clip_train has one positive a caption
        "model.optimizer.lr": RATE,
        "model.optimizer.weight_decay": DECAY,
        "model.optimizer.betas": json.dumps(BETAS),
        "model.optimizer.eps": EPSILON,
        "model.optimizer.warmup": setting.warmup / setting.steps,
        "data.dataset": setting.folder,
        "data.batch_size": BATCH,
        "data.num_workers": 1,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_epochs": EPOCHS,
        "trainer.gradient_clip_val": CLIPPED_AT,
        "trainer.log_every_n_steps": LOGGED_EVERY,
        "checkpoint_every_n_steps": setting.steps // EPOCHS,
    }
    return ["fit", *(part for key, value in given.items() for part in (f"--{key}", str(value)))]


def theirs(setting: Setting) -> list[str]:
    """What comes after `open_clip_train`."""
    given: dict[str, Any] = {
        "logs": setting.folder,
        "name": "theirs",
        "model": f"local-dir:{setting.folder / 'start'}",
        "lr": RATE,
        "wd": DECAY,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "eps": EPSILON,
        "warmup": setting.warmup,
        "train-data": "::".join(str(path) for path in sorted((setting.folder / "shards").glob("*.tar"))),
        "dataset-type": "webdataset",
        "train-num-samples": setting.pairs,
        "batch-size": BATCH,
        "workers": 1,
        "device": "cpu",
        "precision": "fp32",
        "epochs": EPOCHS,
        "grad-clip-norm": CLIPPED_AT,
        "log-every-n-steps": LOGGED_EVERY,
    }
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


def measure(setting: Setting) -> dict[str, Cost]:
    """Both commands; they must have made the same steps."""
    costs = {
        "open_clip_train": spend([sys.executable, str(PEER), *theirs(setting)]),
        "finetune fit": spend([sys.executable, "-m", "finetune", *ours(setting)]),
    }
    made = json.loads((setting.folder / "ours" / "finished.json").read_text())["steps"]
    if not made == steps_of((setting.folder / "theirs" / "out.log").read_text()) == setting.steps:
        sys.exit(f"not the same work: {made} steps, and wanted were {setting.steps}")
    return costs


def steps_of(log: str) -> int:
    """Steps of a run by open_clip_train's log; of its epochs each must have come to its end."""
    found = re.findall(r"Train Epoch: \d+ \[ *(\d+)/\d+ \(100%\)\]", log)
    return sum(map(int, found)) // BATCH


# --- what came out ----------------------------------------------------------------------------------------------------


def losses(setting: Setting) -> dict[str, float]:
    """The contrast on pairs that were not trained on, of the start and of both ends."""
    from curate.clip import load_clip
    from finetune.runs import load_trained_clip

    ends: dict[str, Callable[[], Any]] = {
        "start_loss": lambda: load_clip(f"local-dir:{setting.folder / 'start'}", device="cpu"),
        "end_loss": lambda: load_trained_clip(setting.folder / "ours" / "checkpoints" / "last.ckpt", "cpu"),
        "end_loss_open_clip": lambda: load_clip(
            str(setting.folder / "small.json"),
            str(setting.folder / f"theirs/checkpoints/epoch_{EPOCHS}.pt"),
            device="cpu",
        ),
    }
    return {name: round(unseen_loss(load(), setting.folder / "unseen"), 3) for name, load in ends.items()}


def unseen_loss(clip: Any, folder: Path) -> float:
    """Mean contrastive loss over the pairs of a folder, in batches."""
    import io

    import torch
    from PIL import Image

    from curate.index import MemberReader, read_index
    from finetune.losses import contrastive_loss

    index = read_index(folder)
    reader = MemberReader(index.tars)
    columns = (index.table[name].to_pylist() for name in ("tar", "image_offset", "image_size"))
    photos = [Image.open(io.BytesIO(reader.read(*place))) for place in zip(*columns, strict=True)]
    image = clip.embed_images(photos).split(BATCH)
    text = clip.embed_captions(index.table["caption"].to_pylist()).split(BATCH)
    with torch.no_grad():
        scale = clip.model.logit_scale
        found = [float(contrastive_loss(*each, scale)) for each in zip(image, text, strict=True)]
    return sum(found) / len(found)


def figures(costs: dict[str, Cost]) -> dict[str, float]:
    """What the last line says of time and memory."""
    one, other = costs["finetune fit"], costs["open_clip_train"]
    return {
        "wall_ratio": round(other.wall_s / one.wall_s, 2),
        "cpu_ratio": round(other.cpu_s / one.cpu_s, 2),
        "memory_share": round(one.tree_mb / other.tree_mb, 2),
        "peak_mb": round(one.tree_mb),
        "peak_mb_open_clip": round(other.tree_mb),
    }


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,048 pairs")
    parser.add_argument("--pairs", type=int, default=20_480, help="a multiple of 64")
    given = parser.parse_args()
    pairs = 2_048 if given.quick else given.pairs
    if pairs % BATCH:
        parser.error(f"--pairs: expected a multiple of {BATCH}")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "open_clip_torch", "webdataset"))
    print(f"{platform.machine()}, {os.cpu_count()} cores; {packages}")
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(Path(folder), pairs)
        print(f"{pairs:,} pairs, {EPOCHS} epochs, {setting.steps:,} steps of {BATCH}\n", flush=True)
        costs = measure(setting)
        found = losses(setting)
    print("| | wall s | CPU s | MB at once | loss on unseen pairs |\n|---|---|---|---|---|")
    ends = {"open_clip_train": found["end_loss_open_clip"], "finetune fit": found["end_loss"]}
    for name, cost in costs.items():
        print(f"| {name} | {cost.wall_s:.1f} | {cost.cpu_s:.1f} | {cost.tree_mb:,.0f} | {ends[name]:.3f} |")
    print(json.dumps(figures(costs) | found | {"pairs": pairs, "epochs": EPOCHS}))


if __name__ == "__main__":
    main()
