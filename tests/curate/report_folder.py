"""A small dataset folder with everything a report can show, in the stages' own formats, without running the stages."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from PIL import Image, ImageDraw

from curate.files import fingerprint, write_parquet
from curate.ledger import ledger_schema
from curate.shards import SPLITS, ShardWriter, shard_name

FILTERS: list[dict[str, Any]] = [
    {"name": "caption_length", "where": "caption_words BETWEEN 3 AND 60"},
    {"name": "min_side", "where": "least(original_width, original_height) >= 200"},
    {"name": "exact", "dedup": {"by": "sha256"}},
    {"name": "leak", "decontaminate": {"against": ["test_images/"], "distance": 4}},
    {"name": "on_topic", "relevance": {"prompts": ["a handwritten digit"], "keep": 0.5}},
    {"name": "aligned", "top": {"by": "clip_score", "fraction": 0.5}},
    {"name": "never", "where": "true"},
]
CONFIG: dict[str, Any] = {
    "urls": "list.parquet",
    "out": Path("dataset"),
    "seed": 3,
    "measure": {"clip": {"name": "ViT-B-32", "pretrained": "openai"}},
    "filters": FILTERS,
}

PLAN = pa.schema(
    {"key": pa.string(), "row": pa.int64(), "url": pa.string(), "caption": pa.string(), "url_host": pa.string()}
    | {"caption_chars": pa.int64(), "caption_words": pa.int64(), "license": pa.string()}
)
DROPPED = pa.schema([*PLAN, *(pa.field(name, pa.string()) for name in ("step", "reason", "value", "twin"))])
RAW = pa.schema(
    [
        *PLAN,
        *(pa.field(name, pa.string()) for name in ("status", "error_message", "sha256", "reason", "value", "format")),
        *(pa.field(name, pa.int64()) for name in ("width", "height", "original_width", "original_height", "phash")),
        pa.field("aspect", pa.float64()),
    ]
)
SIGNALS = pa.schema({"key": pa.string(), "clip_score": pa.float32()})


@dataclass
class Row:
    """One row of the list and what became of it; `stage` None is kept."""

    key: str
    caption: str | None = "a picture of something"
    url: str | None = "http://example.org/a.jpg"
    split: str | None = "train"
    stage: str | None = None
    step: str | None = None
    reason: str | None = None
    value: str | None = None
    twin: str | None = None
    image: bytes | None = None
    width: int = 320
    height: int = 240
    clip_score: float = 0.25
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def fetched(self) -> bool:
        return self.stage in (None, "select")

    def facts(self, number: int) -> dict[str, Any]:
        planned = {
            "key": self.key,
            "row": number,
            "url": self.url,
            "caption": self.caption,
            "url_host": _host(self.url),
        }
        text = self.caption or ""
        why = {"step": self.step, "reason": self.reason, "value": self.value, "twin": self.twin}
        came = {"status": "success" if self.fetched else "failed_to_download", "aspect": self.width / self.height}
        sizes = {
            "width": self.width,
            "height": self.height,
            "original_width": self.width,
            "original_height": self.height,
        }
        counted = {"caption_chars": len(text), "caption_words": len(text.split())}
        return {**planned, **counted, **why, **came, **(sizes if self.fetched else {}), **self.extra}


def _host(url: str | None) -> str | None:
    try:
        return urlsplit(url or "").hostname
    except ValueError:
        return None


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema)


def write_folder(out: Path, rows: list[Row]) -> Path:
    """Write plan, raw, signals, ledger and shards of these rows."""
    facts = {row.key: row.facts(number) for number, row in enumerate(rows)}
    of = {
        stage: [facts[row.key] for row in rows if (row.stage == "plan") == (stage == "plan")]
        for stage in ("plan", "raw")
    }
    write_parquet(_table(of["raw"], PLAN), out / "plan" / "00000.parquet", made_from="list")
    write_parquet(_table(of["plan"], DROPPED), out / "plan" / "dropped.parquet", made_from="list")
    with ShardWriter(out / "raw" / "00000", RAW, made_from="plan") as shard:
        for row in rows:
            if row.stage != "plan":
                told = {name: facts[row.key].get(name) for name in RAW.names}
                told |= {} if row.stage == "fetch" else {"reason": None, "value": None}
                shard.add(told, row.image if row.fetched else None)
    signals = [{"key": row.key, "clip_score": row.clip_score} for row in rows if row.fetched]
    write_parquet(_table(signals, SIGNALS), out / "signals" / "clip" / "00000.parquet", made_from="raw")
    ledger = [
        {
            **facts[row.key],
            "kept": row.stage is None,
            "split": row.split if row.stage is None else None,
            "stage": row.stage,
        }
        for row in rows
    ]
    write_parquet(_table(ledger, ledger_schema()), out / "ledger.parquet", made_from=fingerprint("all"))
    for split in SPLITS:
        kept = [row for row in rows if row.stage is None and row.split == split]
        if kept:
            with ShardWriter(out / "shards" / shard_name(0, split), RAW, made_from="ledger") as shard:
                for row in kept:
                    shard.add({name: facts[row.key].get(name) for name in RAW.names} | {"reason": None}, row.image)
    return out


def jpeg(number: int, width: int = 320, height: int = 240, **options: Any) -> bytes:
    """A drawn picture, its own for each number."""
    rng = random.Random(number)
    colour = tuple(rng.randrange(256) for _ in range(3))
    image = Image.new("RGB", (width, height), colour)
    drawing = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, r = rng.randrange(width), rng.randrange(height), rng.randrange(10, 90)
        drawing.ellipse([x - r, y - r, x + r, y + r], fill=tuple(rng.randrange(256) for _ in range(3)))
    content = io.BytesIO()
    image.save(content, "JPEG", **options)
    return content.getvalue()


def _any_row(rng: random.Random, number: int) -> dict[str, Any]:
    width, height = rng.randrange(200, 1200), rng.randrange(200, 900)
    return {
        "key": f"{number:020x}",
        "caption": " ".join(["a", "picture", *["word"] * rng.randrange(1, 14), str(number % 40)]),
        "url": f"http://host{rng.randrange(20)}.example.org/{number}.jpg",
        "image": jpeg(number, 160, 120),
        "width": width,
        "height": height,
        "clip_score": rng.gauss(0.28, 0.04),
    }


def example_rows(each: int = 12) -> list[Row]:
    """Rows kept in each split, and dropped by each stage and step of FILTERS."""
    rng = random.Random(7)
    rows: list[Row] = []

    def add(count: int, **what: Any) -> None:
        for place in range(count):
            told = _any_row(rng, len(rows))
            rows.append(
                Row(**{**told, **{name: each(place) if callable(each) else each for name, each in what.items()}})
            )

    add(6 * each, split="train")
    add(each, split="val")
    add(each, split="test")
    add(2 * each, split="retain", step="on_topic", value="0.2000", clip_score=lambda _: rng.gauss(0.2, 0.03))
    add(3, stage="plan", step="plan", reason="empty_url", url=None)
    add(5, stage="plan", step="plan", reason="duplicate_row", twin=rows[0].key)
    add(
        9,
        stage="plan",
        step="caption_length",
        reason="where",
        value=lambda n: f"caption_words={n % 3}",
        caption=lambda n: " ".join(["x"] * (n % 3)),
    )
    add(each, stage="fetch", step="fetch", reason="http_status", value="404")
    add(4, stage="fetch", step="fetch", reason="dns")
    add(2, stage="fetch", step="fetch", reason="opt_out", value="noai")
    add(3, stage="fetch", step="fetch", reason="too_many_pixels", value="60000x60000")
    add(
        2 * each,
        stage="select",
        step="min_side",
        reason="where",
        value=lambda n: f"original_width={40 + 6 * n}, original_height=600",
        width=lambda n: 40 + 6 * n,
        height=600,
    )
    add(
        each,
        stage="select",
        step="exact",
        reason="dedup",
        twin=lambda n: rows[n].key,
        value="sha256",
        image=lambda n: rows[n].image,
    )
    add(
        4,
        stage="select",
        step="leak",
        reason="decontaminate",
        twin=lambda n: f"test_images/digit-{n}.png",
        value=lambda n: f"distance={n}",
    )
    add(
        3 * each,
        stage="select",
        step="on_topic",
        reason="relevance",
        value=lambda n: f"{0.1 + n / 1000:.4f}",
        clip_score=lambda _: rng.gauss(0.18, 0.04),
    )
    add(
        2 * each,
        stage="select",
        step="aligned",
        reason="top",
        value=lambda n: f"{0.1 + n / 1000:.4f} < 0.2000",
        clip_score=lambda n: 0.1 + n / 1000,
    )
    return rows
