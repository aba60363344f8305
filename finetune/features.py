"""Embeddings of a locked tower, computed once and kept on disk, where nothing random touches what it sees.

A locked tower (LiT, LoRA on the other one) gives a sample the same embedding in every epoch and in every run. They lie
in one folder a set of them, named after what they are made of: the tower's weights, the preprocessing, precision and
device, and the samples (place, size and time of their files; captions). In it are NumPy files of 65,536 rows each,
written whole or not at all, so that a killed run computes what is missing, and several processes share the work.

Axes: B samples, D width.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from curate.files import atomic, fingerprint
from curate.index import SampleIndex
from curate.remote import stamp
from finetune.config import DataConfig
from finetune.layers import tower_of

ROWS = 65_536  # of a file
UNREAD = -1  # in place of the id of an image that cannot be read; no image has it
LARGEST_SHARE = 0.5  # of the free space


@dataclass(frozen=True)
class Features:
    """The embeddings of one tower for all rows of an index.

    Attributes:
        folder: of its files.
        tower: image or text.
        num_rows: of the index.
        width: D.
    """

    folder: Path
    tower: str
    num_rows: int
    width: int

    @property
    def kind(self) -> np.dtype:
        """Of a row: the id that the sample's image or text has in `losses.positives`, and its embedding."""
        return np.dtype([("id", "<i8"), ("embedding", "<f4", (self.width,))])

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.num_rows * self.kind.itemsize

    @property
    def missing(self) -> list[range]:
        """Rows of the files that are not there."""
        starts = range(0, self.num_rows, ROWS)
        rows = (range(start, min(start + ROWS, self.num_rows)) for start in starts)
        return [each for each in rows if not self._file(each.start).is_file()]

    def _file(self, row: int) -> Path:
        return self.folder / f"{row // ROWS:05d}.npy"

    def write(self, rows: range, ids: Sequence[np.ndarray], embeddings: Sequence[np.ndarray]) -> None:
        """Keep the rows of one file, handed over in batches."""
        found = np.empty(len(rows), self.kind)
        found["id"], found["embedding"] = np.concatenate(ids), np.concatenate(embeddings)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic(self._file(rows.start)) as temporary, temporary.open("wb") as file:
            np.save(file, found)

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [np.load(self._file(start), mmap_mode="r") for start in range(0, self.num_rows, ROWS)]

    def read(self, rows: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Embeddings (B, D), float32, and ids of samples."""
        found = np.empty(len(rows), self.kind)
        for place, row in enumerate(rows):
            found[place] = self._maps[row // ROWS][row % ROWS]
        return torch.from_numpy(found["embedding"].copy()), found["id"].tolist()

    def __getstate__(self) -> dict[str, Any]:
        """Without its open files, which each worker opens for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_maps"}


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What the report says of it.

    Attributes:
        tower: whose embeddings are kept.
        embeddings: how many there are.
        computed: how many of them this call computed.
        seconds: that it took.
        bytes: on disk.
    """

    tower: str
    embeddings: int
    computed: int
    seconds: float
    bytes: int


def why_not(config: DataConfig, tower: str, index: SampleIndex, templates: Sequence[Sequence[str]]) -> str | None:
    """What makes a locked tower see something else each time; None: nothing."""
    if tower == "image":
        low, high = config.crop_scale
        return None if low == high == 1 else f"data.crop_scale: [{low}, {high}] shows it another crop each time"
    if any(len(each) > 1 for each in templates):
        return "its captions are put into one of several templates each time"
    captions = index.table["captions"].drop_null()  # of the others there is one each, in the tars
    several = len(captions) > 0 and pc.max(pc.list_value_length(captions)).as_py() > 1
    return "a sample has several captions, of which one is drawn each time" if several else None


def room_for(features: Features) -> bool:
    """Whether they take no more than half of what is free on the disk."""
    there = next(folder for folder in features.folder.absolute().parents if folder.exists())
    return features.bytes <= LARGEST_SHARE * shutil.disk_usage(there).free


def key_of(tower: str, model: torch.nn.Module, index: SampleIndex, *how: Any) -> str:
    """Changes with the tower's weights, with the samples, and with `how` they are shown to it and computed."""
    weights = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        if tower_of(name) == tower:
            weights.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    samples = hashlib.blake2b(digest_size=16)
    said = index.table.select(["captions", "source"])
    if tower == "image" or said["captions"].null_count:  # what is said stands beside the image
        for name in ("tar", "image_offset", "image_size"):
            samples.update(np.ascontiguousarray(index.table[name].to_numpy()).tobytes())
        samples.update(json.dumps([_stamp(path) for path in index.tars]).encode())
    if tower == "text":
        for batch in said.filter(pc.is_valid(said["captions"])).to_batches(max_chunksize=10_000):
            samples.update(repr(batch.to_pylist()).encode())
    return fingerprint(tower, weights.hexdigest(), samples.hexdigest(), torch.__version__, [repr(each) for each in how])


def _stamp(path: Path) -> list[Any]:
    """What changes with a file's content, but not with the folder it lies in."""
    try:
        return [Path(path).name, *stamp(Path(path))]
    except OSError:
        return [str(path)]


def compute(
    features: Features,
    batches: Callable[[range], Iterator[tuple[Tensor, Sequence[int]]]],
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Saved:
    """Compute the files that are missing, this process its share of them.

    Args:
        features: where to.
        batches: embeddings (B, D) and ids of some rows, in order.
        rank: of this process.
        world_size: number of processes.
    """
    began, missing = time.monotonic(), features.missing
    # By their numbers: another run may write some of them between two processes' looks.
    for rows in (rows for rows in missing if rows.start // ROWS % world_size == rank):
        embeddings, ids = [], []
        for embedding, some in batches(rows):
            embeddings.append(embedding.float().cpu().numpy())
            ids.append(np.array(some, np.int64))
        features.write(rows, ids, embeddings)
    return Saved(
        tower=features.tower,
        embeddings=features.num_rows,
        computed=sum(map(len, missing)),
        seconds=round(time.monotonic() - began, 1),
        bytes=features.bytes,
    )
