"""CLIP embeddings of one raw shard: decoding runs in threads ahead of the encoder, equal captions are encoded once."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from curate.clip import Clip
from curate.shards import MemberReader

BATCHES_AHEAD = 2  # decoded and waiting: enough to keep the encoder busy, and a ceiling for memory


def fetched_rows(stem: Path) -> pa.Table:
    """key, caption and place of the images that a raw shard holds, by key."""
    table = pq.read_table(stem.with_suffix(".parquet"), columns=["key", "caption", "image_offset", "image_size"])
    return table.filter(pc.is_valid(table["image_offset"])).sort_by("key")


def embed_shard(clip: Clip, tar: Path, rows: pa.Table, batch_size: int, advance: Callable[..., None]) -> pa.Table:
    """Embed the images and captions of one shard.

    Args:
        clip: the scorer.
        tar: where the images lie.
        rows: as `fetched_rows` gives them.
        batch_size: images, or captions, encoded at once.
        advance: called with the number of images done.

    Returns:
        key, clip_score (cosine, float32), image_embedding and text_embedding (float16, D), one row a sample.
    """
    images: list[np.ndarray] = []
    with autocast(clip.device):
        for pixels in _decoded(clip, tar, rows, batch_size):
            images.append(_embed(clip.embed_images, pixels))
            advance(len(pixels))
        texts = embed_captions(clip, [caption or "" for caption in rows["caption"].to_pylist()], batch_size)
    image_ND = np.concatenate(images) if images else np.zeros((0, 1), np.float32)
    return pa.table(
        {
            "key": rows["key"],
            "clip_score": pa.array((image_ND * texts).sum(1) if len(images) else [], pa.float32()),
            "image_embedding": _vectors(image_ND),
            "text_embedding": _vectors(texts if len(images) else image_ND),
        }
    )


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 (or float16) arithmetic on a GPU; float32 on a CPU, where the scores are to be repeatable."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)


def embed_captions(clip: Clip, captions: Sequence[str], batch_size: int) -> np.ndarray:
    """Embeddings (N, D) float32 of captions; equal ones are encoded once."""
    distinct = sorted(set(captions))
    place = {caption: number for number, caption in enumerate(distinct)}
    batches = [distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size)]
    embeddings = [_embed(clip.embed_captions, batch) for batch in batches]
    return np.concatenate(embeddings)[[place[caption] for caption in captions]] if captions else np.zeros((0, 1))


def _embed(encode: Callable[[Any], torch.Tensor], batch: Any) -> np.ndarray:
    return np.asarray(encode(batch).cpu().numpy(), dtype=np.float32)


def _decoded(clip: Clip, tar: Path, rows: pa.Table, batch_size: int) -> Iterator[torch.Tensor]:
    """Preprocessed pixels, (B, 3, H, W) at a time, in the order of the rows."""
    reader = MemberReader([tar])
    places = list(zip(rows["image_offset"].to_pylist(), rows["image_size"].to_pylist(), strict=True))

    def pixels(place: tuple[int, int]) -> torch.Tensor:
        with Image.open(io.BytesIO(reader.read(0, *place))) as image:
            return clip.preprocess(image.convert("RGB"))

    waiting: deque[list[Future[torch.Tensor]]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(places), batch_size):
            waiting.append([pool.submit(pixels, place) for place in places[start : start + batch_size]])
            if len(waiting) > BATCHES_AHEAD:
                yield torch.stack([future.result() for future in waiting.popleft()])
        while waiting:
            yield torch.stack([future.result() for future in waiting.popleft()])
    reader.close()


def _vectors(values_ND: np.ndarray) -> pa.Array:
    flat = pa.array(values_ND.astype(np.float16).ravel(), pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, values_ND.shape[1])
