"""A dataset folder, planned and fetched, with the images given row by row: real lists and shards, without a network."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curate import pack, plan, select
from curate.config import ClipConfig, MeasureConfig, PackConfig, PlanConfig, SelectConfig
from curate.expressions import FETCH_COLUMNS
from curate.files import digest
from curate.filters import parse_steps
from curate.images import phash
from curate.shards import ShardWriter

ARROW = {"VARCHAR": pa.string(), "BIGINT": pa.int64(), "DOUBLE": pa.float64()}
ENGINE = SelectConfig(memory_limit="500MB", threads=1)
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
Filters = Sequence[dict[str, Any]]


def noise(seed: int, size: int = 64) -> np.ndarray:
    """8 × 8 coloured squares: for a perceptual hash, two seeds are as far apart as two pictures can be."""
    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(squares).resize((size, size), Image.Resampling.NEAREST))


def encoded(rgb: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, form, **options)
    return file.getvalue()


def row(number: int, rgb: np.ndarray | None = None, **facts: Any) -> dict[str, Any]:
    """One row of a list and what came for it; no `rgb` is a failed download.

    `facts` override what fetch would say, or are further columns of the list.
    """
    return {"url": f"http://host{number % 3}.test/{number}.png", "caption": f"caption {number}", "rgb": rgb} | facts


def fetched(out: Path, rows: Sequence[dict[str, Any]], filters: Filters = (), shard_size: int = 10) -> Path:
    """Plan a list of these rows, and write the raw shards as a fetch would; rows that the plan drops never come."""
    listed = out.parent / f"{out.name}.csv"
    with listed.open("w", newline="", encoding="utf-8") as file:
        more = sorted({name for r in rows for name in r} - {*FETCH_COLUMNS, "url", "caption", "rgb", "content"})
        writer = csv.DictWriter(file, ["url", "caption", "list_row", *more], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**r, "list_row": n} for n, r in enumerate(rows))
    plan.run(str(listed), out, PlanConfig(shard_size=shard_size), parse_steps(filters))
    for path in sorted((out / "plan").glob("[0-9]*.parquet")):
        write_raw(out, path, rows)
    return out


def write_raw(out: Path, plan_file: Path, rows: Sequence[dict[str, Any]]) -> None:
    table = pq.read_table(plan_file)
    columns = [pa.field(name, ARROW[kind]) for name, kind in FETCH_COLUMNS.items()]
    schema = pa.schema([*table.schema.remove_metadata(), *columns])
    with ShardWriter(out / "raw" / plan_file.stem, schema, made_from=digest(plan_file)) as shard:
        for planned in table.to_pylist():
            given = dict(rows[planned["row"]])
            rgb, content = given.pop("rgb"), given.pop("content", None)
            given = {name: value for name, value in given.items() if name in FETCH_COLUMNS}
            if rgb is None:
                shard.add(planned | {"status": "failed_to_download", "reason": "http_status", "value": "404"} | given)
                continue
            content = content or encoded(rgb)
            height, width = rgb.shape[:2]
            size = {"width": width, "height": height, "original_width": width, "original_height": height}
            marks = {"sha256": hashlib.sha256(content).hexdigest(), "phash": phash(rgb), "status": "success"}
            shard.add(planned | size | marks | given, content, "png")


def select_rows(
    out: Path,
    filters: Filters,
    *,
    clip: ClipConfig | None = None,
    measured: MeasureConfig | None = None,
    seed: int = 0,
    **shares: Any,
) -> select.SelectResult:
    """Select, as if nothing but the CLIP, or what is said, had been measured."""
    measured = measured or MeasureConfig(text=False, clip=clip)
    config = PackConfig(**{"val": 0, "test": 0, **shares})
    return select.run(out, parse_steps(filters), ENGINE, config, measured, seed)


def pack_rows(out: Path, *, seed: int = 0, **config: Any) -> pack.PackResult:
    return pack.run(out, PackConfig(**{"val": 0, "test": 0, **config}), seed)


def ledger(out: Path) -> list[dict[str, Any]]:
    """The ledger's lines, in the order of the list."""
    return pq.read_table(out / "ledger.parquet").to_pylist()


def dropped(out: Path, name: str) -> dict[int, str | None]:
    """Row → value, of what one step dropped."""
    return {line["row"]: line["value"] for line in ledger(out) if line["step"] == name and not line["kept"]}


def kept(out: Path) -> list[int]:
    return [line["row"] for line in ledger(out) if line["kept"]]


def tiny_clip(folder: Path) -> ClipConfig:
    """A real open_clip model with seeded random weights, as two files."""
    import open_clip
    import torch

    path = folder / "tiny-select.json"
    path.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-select").state_dict(), folder / "tiny.pt")
    return ClipConfig(name=str(path), pretrained=str(folder / "tiny.pt"), device="cpu", batch_size=4)
