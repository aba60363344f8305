"""Batches of pixels and tokens from a dataset's shards: exact epochs in a seeded order, resumable at any batch.

What a batch holds is decided in finetune/schedule.py; here it is read, decoded and augmented, seeded by (seed, pass,
sample), so that nothing depends on how many processes decode.

Axes: B samples, H W pixels, L tokens, G ids per sample.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from curate.clip import Clip
from curate.errors import ConfigError, InputError
from curate.shards import MemberReader, SampleIndex, digest, fingerprint, shard_folder, shards_of
from finetune.captions import CachedTokenizer, content_hash
from finetune.config import DataConfig
from finetune.pixels import UNREADABLE, EvaluationView, TrainingView
from finetune.schedule import Draw, Schedule
from finetune.sources import (
    CaptionLengths,
    caption_lengths,
    concatenate,
    drawn_caption,
    sources_fingerprint,
    split_pairs,
    training_set,
)
from finetune.trimming import Trim, trim_of

logger = logging.getLogger("cliptailor")

Batch = dict[str, Tensor]
"""pixels (B, 3, H, W), uint8, or float32 if normalised; tokens (B, L) int64; group (B, G) int64, for
`losses.positives`; row (B,) of the index."""

# The stream of random numbers of what stands in for a sample is apart from those of its crop and caption.
_OF_STAND_INS = 3
_ATTEMPTS = 20  # to find one that can be read


# --- one batch --------------------------------------------------------------------------------------------------------


class Broken(NamedTuple):
    """A sample that could not be read, and why: names its file and key."""

    row: int
    reason: str


class Read(NamedTuple):
    """A batch, and the samples that should have been in it."""

    batch: Batch
    broken: list[Broken]


def _stacked(pixels: Sequence[Tensor]) -> Tensor:
    """(B, 3, H, W), with the channels last in memory where they are last in what is stacked."""
    if pixels[0].is_contiguous():
        return torch.stack([*pixels])
    return torch.stack([each.permute(1, 2, 0) for each in pixels]).permute(0, 3, 1, 2)


@dataclass
class PairDataset(Dataset[Read]):
    """Whole batches by `Draw`s.

    For a sample that cannot be read another of its source stands in, chosen by (seed, pass, row): batches keep their
    size, which ranks must have in common, and are the same in every process and after a resume.
    """

    index: SampleIndex
    view: TrainingView | EvaluationView
    tokenizer: Callable[[Sequence[str]], Tensor]
    seed: int = 0
    templates: Sequence[Sequence[str]] = ()
    """Of each source: for captions that are labels."""
    trim: Trim | None = None
    """What cuts captions behind their ends."""
    reader: MemberReader = field(init=False)
    named: set[int] = field(init=False, default_factory=set)
    """Rows of broken samples that have been told of."""

    def __post_init__(self) -> None:
        self.reader = MemberReader(self.index.tars)
        table = self.index.table.combine_chunks()
        self._places = np.stack([table[name].to_numpy() for name in ("tar", "image_offset", "image_size")], axis=1)
        names = ("key", "captions", "source", "duplicate_group")
        self._keys, self._captions, self._sources, self._groups = (table[name] for name in names)
        phrasings = max((len(each) for each in self.templates), default=0) or 1
        num_captions = len(self._captions.combine_chunks().flatten())
        self._tokenize = CachedTokenizer(self.tokenizer, num_captions * phrasings)
        source = self._sources.fill_null(-1).to_numpy()
        # Where each source begins, and the last ends: their rows lie side by side.
        self._borders = np.flatnonzero(np.diff(source, prepend=-2, append=-2))

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, draws: Sequence[Draw]) -> Read | InputError:
        """The batch of these samples; an error if nothing readable is found to stand in for one."""
        broken: list[Broken] = []
        try:
            read, pixels, images = zip(*(self._readable(draw, broken) for draw in draws), strict=True)
        except InputError as error:
            return error
        tokens, said = self._tokenize([self._caption(draw) for draw in read])
        rows = [draw.row for draw in read]
        group = torch.tensor([*zip(said, map(self._duplicates, rows), images, strict=True)])
        seen = self.trim(tokens) if self.trim else tokens
        return Read({"pixels": _stacked(pixels), "tokens": seen, "group": group, "row": torch.tensor(rows)}, broken)

    def _caption(self, draw: Draw) -> str:
        source = self._sources[draw.row].as_py()
        templates = self.templates[source] if source is not None and self.templates else ()
        return drawn_caption(self._captions[draw.row].as_py(), templates, (self.seed, draw.turn, draw.row))

    def _readable(self, draw: Draw, broken: list[Broken]) -> tuple[Draw, Tensor, int]:
        """This sample or one that stands in for it, its pixels and the id of its image; adds what is broken."""
        stand_ins = (self._stand_in(draw, attempt) for attempt in range(_ATTEMPTS))
        for row in itertools.chain([draw.row], stand_ins):
            stand_in = Draw(row, draw.turn)
            found = self._pixels(stand_in)
            if not isinstance(found, Broken):
                return stand_in, *found
            broken.append(found)
        raise InputError(f"{broken[-1].reason}; nor can any other of {_ATTEMPTS}; build or copy the dataset again")

    def _stand_in(self, draw: Draw, attempt: int) -> int:
        """Any row of the same source."""
        source = int(np.searchsorted(self._borders, draw.row, side="right"))
        random = np.random.default_rng((self.seed, draw.turn, draw.row, _OF_STAND_INS, attempt))
        return int(random.integers(*self._borders[source - 1 : source + 1]))

    def _pixels(self, draw: Draw) -> tuple[Tensor, int] | Broken:
        """What the CLIP sees, and an id of the stored image: one that is there twice is a positive of both captions."""
        tar, offset, size = self._places[draw.row]
        try:
            content = self.reader.read(int(tar), int(offset), int(size))
            pixels = self.view(content, (self.seed, draw.turn, draw.row))
        except (*UNREADABLE, InputError) as error:
            # PIL's own words for bytes of no format are the address of our buffer.
            why = "of no known format" if isinstance(error, UnidentifiedImageError) else error
            sample = f"{self.index.tars[tar]}: sample {self._keys[draw.row]}"
            return Broken(draw.row, f"{sample}: the image cannot be decoded ({why})")
        return pixels, len(content) << 32 | zlib.crc32(content)

    def _duplicates(self, row: int) -> int:
        """An id of the duplicates that a sample belongs to."""
        return content_hash((self._groups[row].as_py() or f"row {row}").encode())


# --- loaders ----------------------------------------------------------------------------------------------------------


def _same(batch: Any) -> Any:
    return batch


def _load(
    dataset: PairDataset, batches: Iterable[Sequence[Draw]], num_workers: int, most_broken: float = 0
) -> Iterator[Batch]:
    """Yield each batch, decoded in worker processes.

    Raises:
        InputError: more images than `most_broken` cannot be read.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of index lists will do
        num_workers=num_workers,
        collate_fn=_same,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each start of the loader would draw from the global one
    )
    num_broken = 0
    for read in loader:
        if isinstance(read, InputError):
            raise read
        for row, reason in read.broken:
            num_broken += 1
            if num_broken > most_broken:
                more = (
                    f"; it is number {num_broken:,} in an epoch, more than data.max_broken allows"
                    if most_broken
                    else ""
                )
                raise InputError(f"{reason}{more}; build or copy the dataset again")
            if row not in dataset.named:
                dataset.named.add(row)
                logger.warning("data    %s; another sample stands in for it (%s so far)", reason, f"{num_broken:,}")
        yield read.batch


class TrainingLoader:
    """Iterating gives the rest of the current epoch; the state is the place of the next batch.

    The length is that of a whole epoch; without one Lightning would fetch, and count, a batch ahead.
    """

    def __init__(
        self, dataset: PairDataset, schedule: Schedule, num_workers: int, made_from: str, max_broken: float = 0.0
    ) -> None:
        self.dataset, self.schedule, self.num_workers, self.made_from = dataset, schedule, num_workers, made_from
        self.max_broken = max_broken
        self.epoch = self.next_batch = 0

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.epoch, self.next_batch
        draws = (self.schedule.batch(epoch, number) for number in range(first, len(self)))
        most_broken = self.max_broken * self.schedule.batch_size * len(self)
        for number, batch in enumerate(_load(self.dataset, draws, self.num_workers, most_broken), start=first + 1):
            # Before it is handed out: a checkpoint taken while it is in use counts it as seen.
            self.epoch, self.next_batch = divmod(epoch * len(self) + number, len(self))
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where to go on, and in which data."""
        return {"epoch": self.epoch, "next_batch": self.next_batch, "made_from": self.made_from}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken.

        Raises:
            InputError: it was taken over other data or batches.
        """
        if state["made_from"] != self.made_from:
            raise InputError(
                "the checkpoint was made with another dataset, batch size, replay, seed or number of devices: "
                "its position means nothing here"
            )
        self.epoch, self.next_batch = state["epoch"], state["next_batch"]


class ValidationLoader:
    """The same batches, in the order of the index, each time."""

    def __init__(self, dataset: PairDataset, batches: list[list[Draw]], num_workers: int) -> None:
        self.dataset, self.batches, self.num_workers = dataset, batches, num_workers

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return _load(self.dataset, self.batches, self.num_workers)


# --- datasets ---------------------------------------------------------------------------------------------------------


def has_split(dataset: Path, split: str) -> bool:
    """Whether a dataset has shards of that split."""
    return bool(shards_of(shard_folder(dataset), split))


def split_digests(dataset: Path, split: str) -> list[str]:
    """What identifies the content of a split, shard by shard; of a dataset without splits, all of it is `train`."""
    folder = shard_folder(dataset)
    stems = shards_of(folder, split) or (shards_of(folder) if split == "train" else [])
    return [digest(stem.with_suffix(".parquet")) for stem in stems]


def replayed_split(config: DataConfig) -> tuple[Path, str] | None:
    """The dataset and its split that are replayed; None without replay.

    Raises:
        ConfigError: replay is asked for, but there is nothing to replay.
    """
    if not config.replay:
        return None
    if config.replay_dataset:
        return config.replay_dataset, "train"
    if not has_split(config.dataset, "retain"):
        raise ConfigError(
            f"data.replay is {config.replay}, but {config.dataset} has no retain split; "
            "set data.replay to 0, or name a data.replay_dataset"
        )
    return config.dataset, "retain"


def data_fingerprint(config: DataConfig) -> str:
    """Changes with the content of what is trained on and with how batches are made of it; not with paths or speeds.

    Raises:
        ConfigError: replay is asked for, but there is nothing to replay.
        InputError: there is nothing to train on.
    """
    replayed = replayed_split(config)
    digests: list[Any] = [split_digests(*source) for source in ((config.dataset, "train"), replayed) if source]
    if config.sources or not digests[0]:
        digests[0] = sources_fingerprint(config)
    return fingerprint(digests, config.batch_size, config.replay, config.crop_scale, config.decode)


class CLIPDataModule(lightning.LightningDataModule):
    """A dataset's train and val splits as batches for the CLIP that is trained (its preprocessing, its tokenizer).

    Args:
        config: what and how; or give its fields by name: `CLIPDataModule(dataset=Path("dataset"), batch_size=64)`.
        seed: of the order and the augmentation.
        **fields: of DataConfig.
    """

    def __init__(self, config: DataConfig | None = None, *, seed: int = 0, **fields: Any) -> None:
        super().__init__()
        if "dataset" in fields:
            fields["dataset"] = Path(fields["dataset"])
        self.config = config or DataConfig(**fields)
        self.seed = seed
        self._loader: TrainingLoader | None = None
        self._position: dict[str, Any] | None = None
        self._lengths: CaptionLengths | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the indices.

        Raises:
            InputError: a dataset that cannot be read, or too small for a contrast.
            ConfigError: replay is asked for, but there is nothing to replay.
        """
        del stage
        self._training = training_set(self.config)
        self.train_index = self._training.index
        replayed = replayed_split(self.config)
        self.replay_index = split_pairs(*replayed) if replayed else None
        least = 2 * self._world()[0]
        if len(self.train_index) < least:
            where = ", ".join(str(source.path) for source in self.config.trained_on)
            raise InputError(f"{where}: {len(self.train_index)} training pairs; needs at least {least}")

    @property
    def schedule(self) -> Schedule:
        """Which samples come when, on this rank."""
        world_size, rank = self._world()
        return Schedule(
            num_samples=len(self.train_index),
            num_replay=len(self.replay_index or ()),
            batch_size=self.config.batch_size,
            replay=self.config.replay,
            seed=self.seed,
            world_size=world_size,
            rank=rank,
            sources=self._training.passes,
        )

    def caption_lengths(self, clip: Clip) -> CaptionLengths:
        """How many captions this CLIP's context cuts, over a seeded sample of a large set; after `setup`."""
        if self._lengths is None:
            self._lengths = caption_lengths(self._training, clip.tokenizer, self.seed)
        return self._lengths

    @property
    def batches_per_epoch(self) -> int:
        """Optimiser steps that one pass over the training samples takes."""
        return len(self.schedule)

    def train_dataloader(self) -> TrainingLoader:
        """The stateful loader of the train split, with replay."""
        index = concatenate(self.train_index, self.replay_index) if self.replay_index else self.train_index
        augmented = self.config.crop_scale != (1.0, 1.0)
        clip = self._clip()
        # The plan of `finetune fit` has counted them, and told.
        if self._lengths is None and self.schedule.rank == 0 and self.caption_lengths(clip).too_long:
            logger.warning("data    %s and are cut", self._lengths)
        view = (
            TrainingView(clip.preprocess_cfg, self.config.crop_scale, fast=self.config.decode == "fast")
            if augmented
            else EvaluationView(clip.preprocess)
        )
        dataset = PairDataset(index, view, clip.tokenizer, self.seed, self._training.templates, self._trim())
        made_from = fingerprint(data_fingerprint(self.config), self.seed, self.schedule.world_size)
        self._loader = TrainingLoader(
            dataset, self.schedule, self.config.num_workers, made_from, self.config.max_broken
        )
        if self._position:
            self._loader.load_state_dict(self._position)
        return self._loader

    # Lightning restores the loader's own state in most cases, but not from a checkpoint taken at the end of an epoch.

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch, for a checkpoint."""
        return {"position": self._loader.state_dict() if self._loader else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next training loader where the checkpoint was taken."""
        self._position = state_dict["position"]

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        """The val split, each rank an equal part of it; nothing where the dataset has none."""
        if not has_split(self.config.dataset, "val"):
            return []
        index = split_pairs(self.config.dataset, "val")
        world_size, rank = self._world()
        draws = [Draw(row, 0) for row in range(rank, len(index) - len(index) % world_size, world_size)]
        size = self.config.eval_batch_size
        batches = [draws[start : start + size] for start in range(0, len(draws), size)]
        clip = self._clip()
        dataset = PairDataset(index, EvaluationView(clip.preprocess), clip.tokenizer, trim=self._trim())
        return ValidationLoader(dataset, batches, self.config.num_workers)

    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _clip(self) -> Clip:
        clip: Clip = self.trainer.lightning_module.clip  # type: ignore[union-attr, assignment]
        return clip

    def _trim(self) -> Trim | None:
        return trim_of(self._clip().model)
