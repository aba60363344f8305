"""A CLIP and a dataset small enough to train in a second: real open_clip models, real images, real shards."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw
from torch import Tensor, nn

from curate.shards import ShardWriter, shard_name
from finetune.adapters import merge

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
ARCHITECTURES = {
    "tiny-vit": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": TEXT,
    },
    "tiny-resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
        "text_cfg": TEXT,
    },
}
COLOURS = ("red", "green", "blue", "yellow", "white", "purple", "orange", "cyan")
SHAPES = ("circle", "square")


def write_architecture(name: str, folder: Path) -> Path:
    """An open_clip model configuration file."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(ARCHITECTURES[name]))
    return path


def picture(colour: str, shape: str, seed: int) -> bytes:
    """A coloured shape somewhere on a noisy ground, as PNG."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 60, (40, 48, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    left, top = (int(x) for x in random.integers(2, 14, 2))
    box = (left, top, left + 22, top + 22)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_split(folder: Path, split: str, size: int, *, shard_size: int = 16, first: int = 0) -> None:
    """Shards of `size` coloured shapes, captioned by what they show."""
    schema = pa.schema([("key", pa.string()), ("caption", pa.string()), ("duplicate_group", pa.int64())])
    for start in range(0, size, shard_size):
        stem = folder / "shards" / shard_name(start // shard_size, split)
        with ShardWriter(stem, schema, made_from="test") as shard:
            for number in range(first + start, first + min(start + shard_size, size)):
                colour, shape = COLOURS[number % 8], SHAPES[number // 8 % 2]
                row = {"key": f"{split}{number:06d}", "caption": f"a {colour} {shape}", "duplicate_group": number}
                shard.add(row, picture(colour, shape, number), "png")


def write_dataset(folder: Path, *, train: int = 40, val: int = 8, retain: int = 8) -> Path:
    """A dataset folder as `curate build` makes it."""
    for first, (split, size) in enumerate({"train": train, "val": val, "retain": retain}.items()):
        if size:
            write_split(folder, split, size, first=first * 10_000)
    return folder


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of an adapted model, LoRA merged, under open_clip's keys; the model itself stays as it is."""
    merged = copy.deepcopy(model)
    merge(merged)
    return {name: value.detach() for name, value in merged.state_dict().items()}
