"""CLIP embeddings of one raw shard: decoding in threads ahead of the encoder, equal captions and images encoded once.

An image that Pillow cannot decode, whatever another decoder made of it, has no embedding and no score.
"""

from __future__ import annotations

import io
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from curate.clip import Clip
from curate.index import MemberReader

logger = logging.getLogger("cliptailor")
BATCHES_AHEAD = 2  # decoded and waiting: enough to keep the encoder busy, and a ceiling for memory


def embed_shard(clip: Clip, tar: Path, rows: pa.Table, batch_size: int, advance: Callable[..., None]) -> pa.Table:
    """Embed the images and captions of one shard.

    Args:
        clip: the scorer.
        tar: where the images lie.
        rows: as `images.fetched_rows` gives them; images of one `sha256`, if there is such a column, are embedded once.
        batch_size: images, or captions, encoded at once.
        advance: called with the number of images done.

    Returns:
        key, clip_score (cosine, float32), image_embedding and text_embedding (float16, D), one row a sample; the first
        two are null where the image cannot be decoded.
    """
    with autocast(clip.device):
        text_ND = embed_captions(clip, [caption or "" for caption in rows["caption"].to_pylist()], batch_size)
        first_M, place_N = _distinct_images(rows)
        image_MD, decoded_M = np.zeros((len(first_M), text_ND.shape[1]), np.float32), np.zeros(len(first_M), bool)
        done = 0
        for batch in _decoded(clip, tar, rows.take(first_M), batch_size):
            there = [done + place for place, pixels in enumerate(batch) if pixels is not None]
            if there:
                pixels_BCHW = torch.stack([pixels for pixels in batch if pixels is not None])
                image_MD[there], decoded_M[there] = _embed(clip.embed_images, pixels_BCHW), True
            done += len(batch)
            advance(len(batch))
    advance(rows.num_rows - done)
    image_ND, decoded_N = image_MD[place_N], decoded_M[place_N]
    if lost := int((~decoded_N).sum()):
        logger.warning("%s: %d images cannot be decoded, and have no clip_score", tar, lost)
    return pa.table(
        {
            "key": rows["key"],
            "clip_score": pa.array((image_ND * text_ND).sum(1), pa.float32(), mask=~decoded_N),
            "image_embedding": _vectors(image_ND, ~decoded_N),
            "text_embedding": _vectors(text_ND),
        }
    )


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 (or float16) arithmetic on a GPU; float32 on a CPU, where the scores are to be repeatable."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)


def embed_captions(clip: Clip, captions: Sequence[str], batch_size: int) -> np.ndarray:
    """Embeddings (N, D) float32 of captions; equal ones are encoded once."""
    if not captions:
        return np.zeros((0, 1), np.float32)
    distinct = sorted(set(captions))
    place = {caption: number for number, caption in enumerate(distinct)}
    batches = [distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size)]
    embeddings = [_embed(clip.embed_captions, batch) for batch in batches]
    return np.concatenate(embeddings)[[place[caption] for caption in captions]]


def _distinct_images(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Rows (M,) that hold an image for the first time, and for each row (N,) which of those M images is its own."""
    names = rows["sha256" if "sha256" in rows.column_names else "key"].to_pylist()
    place: dict[str, int] = {}
    place_N = np.array([place.setdefault(name, len(place)) for name in names], np.int64)
    return np.unique(place_N, return_index=True)[1], place_N


def _embed(encode: Callable[[Any], torch.Tensor], batch: Any) -> np.ndarray:
    return np.asarray(encode(batch).cpu().numpy(), dtype=np.float32)


def _decoded(clip: Clip, tar: Path, rows: pa.Table, batch_size: int) -> Iterator[list[torch.Tensor | None]]:
    """Preprocessed pixels (3, H, W) in the order of the rows, a batch at a time; None for what cannot be decoded."""
    places = list(zip(rows["image_offset"].to_pylist(), rows["image_size"].to_pylist(), strict=True))
    waiting: deque[list[Future[torch.Tensor | None]]] = deque()
    with closing(MemberReader([tar])) as reader, ThreadPoolExecutor(os.cpu_count()) as pool:
        reader.read(0, 0, 0)  # opens the tar, once, before the threads could each do so
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            waiting.append([pool.submit(lambda place: _pixels(clip, reader.read(0, *place)), place) for place in batch])
            if len(waiting) > BATCHES_AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]


def _pixels(clip: Clip, content: bytes) -> torch.Tensor | None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            rgb = image.convert("RGB")
    except Exception:  # noqa: BLE001 - decoders fail in any way on hostile bytes; each costs its row only
        return None
    return clip.preprocess(rgb)


def _vectors(values_ND: np.ndarray, missing_N: np.ndarray | None = None) -> pa.Array:
    """Float16 lists, null where missing. Not of fixed size: pyarrow 25 cannot read those back where one is null."""
    missing_N = np.zeros(len(values_ND), bool) if missing_N is None else missing_N
    flat = pa.array(values_ND[~missing_N].astype(np.float16).ravel(), pa.float16())
    ends = np.cumsum(np.where(missing_N, 0, values_ND.shape[1]))
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    return pa.ListArray.from_arrays(offsets, flat, mask=pa.array(missing_N))
