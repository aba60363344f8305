"""Batches of pixels and tokens from a dataset's shards: exact epochs in a seeded order, resumable at any batch.

What a batch holds is decided in finetune/schedule.py; here it is read, decoded and augmented, seeded by (seed, pass,
sample), so that nothing depends on how many processes decode.

Axes: B samples, H W pixels, L tokens, G ids per sample.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from curate.clip import Clip
from curate.errors import ConfigError, InputError
from curate.shards import MemberReader, SampleIndex, digest, fingerprint, shard_folder, shards_of
from finetune.adapters import is_locked
from finetune.batches import Arrangement, caption_sizes, clusters, stored_embeddings, twin_groups
from finetune.config import SHARDED, TOWERS, DataConfig
from finetune.features import Features, Saved, compute, key_of, room_for, why_not
from finetune.optim import total_steps
from finetune.packing import Packer, packer_of
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
from finetune.start import evaluating
from finetune.trimming import Trim, trim_of

logger = logging.getLogger("cliptailor")

Batch = dict[str, Any]
"""pixels (B, 3, H, W); tokens (B, L) int64; group (B, G) int64, for `losses.positives`; row (B,) of the index;
packed: the captions in rows (finetune/packing.py), where they are shorter so. In place of pixels, or of tokens, image
or text (B, D), the embeddings of a locked tower (finetune/features.py)."""


# --- one sample -------------------------------------------------------------------------------------------------------


def random_crop(width: int, height: int, scale: tuple[float, float], seed: Sequence[int]) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of a random resized crop.

    The share of the area is uniform in `scale`, the aspect log-uniform in 3/4 … 4/3: as torchvision's
    `RandomResizedCrop`, down to the central crop after ten boxes that do not fit, but seeded.
    """
    random = np.random.default_rng(seed)
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclass(frozen=True)
class TrainingView:
    """PIL image → pixels with a random resized crop, in the size and normalisation of a CLIP's own preprocessing."""

    preprocess_cfg: dict[str, Any]
    scale: tuple[float, float]

    def __call__(self, image: Image.Image, seed: Sequence[int]) -> Tensor:
        """Float32 pixels (3, H, W); equal seeds, equal pixels."""
        size = self.preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        crop = image.crop(random_crop(*image.size, self.scale, seed)).resize((width, height), self._resampling())
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float().div_(255)
        mean, std = (torch.tensor(self.preprocess_cfg[name])[:, None, None] for name in ("mean", "std"))
        return (pixels - mean) / std

    def _resampling(self) -> Image.Resampling:
        bilinear = self.preprocess_cfg.get("interpolation") == "bilinear"
        return Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC


@dataclass(frozen=True)
class EvaluationView:
    """PIL image → pixels as a CLIP sees them in evaluation; the seed plays no part."""

    preprocess: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image, seed: Sequence[int]) -> Tensor:
        """Float32 pixels (3, H, W)."""
        del seed
        return self.preprocess(image)


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


@dataclass
class PairDataset(Dataset[Batch]):
    """Whole batches by `Draw`s.

    A sample that cannot be read makes its batch an error, which the loader raises in the main process.
    """

    index: SampleIndex
    view: TrainingView | EvaluationView
    tokenizer: Callable[[Sequence[str]], Tensor]
    seed: int = 0
    templates: Sequence[Sequence[str]] = ()
    """Of each source: for captions that are labels."""
    trim: Trim | None = None
    """What cuts captions behind their ends."""
    pack: Packer | None = None
    """What puts captions into rows."""
    cached: Features | None = None
    """Embeddings of a locked tower, in place of what it would see."""
    reader: MemberReader = field(init=False)

    def __post_init__(self) -> None:
        self.reader = MemberReader(self.index.tars)
        table = self.index.table.combine_chunks()
        self._places = np.stack([table[name].to_numpy() for name in ("tar", "image_offset", "image_size")], axis=1)
        names = ("key", "captions", "source", "duplicate_group")
        self._keys, self._captions, self._sources, self._groups = (table[name] for name in names)

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, draws: Sequence[Draw]) -> Batch | InputError:
        """The batch of these samples."""
        rows = [draw.row for draw in draws]
        try:
            images, shown = self.images(draws)
        except InputError as error:
            return error
        texts, said = self.texts(draws)
        duplicates = [_hash((self._groups[row].as_py() or f"row {row}").encode()) for row in rows]
        group = torch.tensor([*zip(said, duplicates, shown, strict=True)])
        return {**images, **texts, "group": group, "row": torch.tensor(rows)}

    def images(self, draws: Sequence[Draw]) -> tuple[Batch, list[int]]:
        """What the CLIP sees of samples, and an id of each stored image.

        Raises:
            InputError: an image that cannot be decoded.
        """
        if self.cached and self.cached.tower == "image":
            embeddings, ids = self.cached.read([draw.row for draw in draws])
            return {"image": embeddings}, ids
        pixels, shown = zip(*(self._pixels(draw) for draw in draws), strict=True)
        return {"pixels": torch.stack(pixels)}, list(shown)

    def texts(self, draws: Sequence[Draw]) -> tuple[Batch, list[int]]:
        """What is said of samples, and an id of each text, as the text tower reads it."""
        if self.cached and self.cached.tower == "text":
            embeddings, ids = self.cached.read([draw.row for draw in draws])
            return {"text": embeddings}, ids
        tokens = self.tokenizer([self._caption(draw) for draw in draws])
        seen = self.trim(tokens) if self.trim else tokens
        packed = self.pack(seen) if self.pack else None
        said = [_hash(line.numpy().tobytes()) for line in tokens]
        return {"tokens": seen} | ({"packed": packed} if packed else {}), said

    def _caption(self, draw: Draw) -> str:
        source = self._sources[draw.row].as_py()
        templates = self.templates[source] if source is not None and self.templates else ()
        return drawn_caption(self._captions[draw.row].as_py(), templates, (self.seed, draw.turn, draw.row))

    def _pixels(self, draw: Draw) -> tuple[Tensor, int]:
        """What the CLIP sees, and an id of the stored image: one that is there twice is a positive of both captions."""
        tar, offset, size = self._places[draw.row]
        try:
            content = self.reader.read(int(tar), int(offset), int(size))
            with Image.open(io.BytesIO(content)) as image:
                return self.view(image.convert("RGB"), (self.seed, draw.turn, draw.row)), _hash(content)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(
                f"{self.index.tars[tar]}: sample {self._keys[draw.row]}: the image cannot be decoded ({error}); "
                "build or copy the dataset again"
            ) from error


# --- loaders ----------------------------------------------------------------------------------------------------------


@dataclass
class _Seen(Dataset[Any]):
    """What one tower sees of samples, and their ids."""

    dataset: PairDataset
    tower: str

    def __getitems__(self, draws: Sequence[Draw]) -> tuple[Batch, list[int]] | InputError:
        try:
            return self.dataset.images(draws) if self.tower == "image" else self.dataset.texts(draws)
        except InputError as error:
            return error

    def __len__(self) -> int:
        return len(self.dataset)


def _same(batch: Any) -> Any:
    return batch


def _load(dataset: PairDataset, batches: Iterable[Sequence[Draw]], num_workers: int) -> Iterator[Batch]:
    """Yield each batch, decoded in worker processes.

    Raises:
        InputError: an image that cannot be read.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of index lists will do
        num_workers=num_workers,
        collate_fn=_same,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each start of the loader would draw from the global one
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


class TrainingLoader:
    """Iterating gives the rest of the current epoch; the state is the place of the next batch.

    The length is that of a whole epoch; without one Lightning would fetch, and count, a batch ahead.
    """

    def __init__(self, dataset: PairDataset, schedule: Schedule, num_workers: int, made_from: str) -> None:
        self.dataset, self.schedule, self.num_workers, self.made_from = dataset, schedule, num_workers, made_from
        self.epoch = self.next_batch = 0

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.epoch, self.next_batch
        draws = (self.schedule.batch(epoch, number) for number in range(first, len(self)))
        for number, batch in enumerate(_load(self.dataset, draws, self.num_workers), start=first + 1):
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
    how = [config.batch_size, config.replay, config.crop_scale]
    return fingerprint(digests, *how, *([config.batches] if config.batches != "shuffled" else []))


class CLIPDataModule(lightning.LightningDataModule):
    """A dataset's train and val splits as batches for the CLIP that is trained (its preprocessing, its tokenizer).

    Args:
        config: what and how; or give its fields by name: `CLIPDataModule(dataset=Path("dataset"), batch_size=64)`.
        seed: of the order and the augmentation.
        features: folder where embeddings of locked towers are kept; None: they are not.
        **fields: of DataConfig.
    """

    def __init__(
        self, config: DataConfig | None = None, *, seed: int = 0, features: Path | None = None, **fields: Any
    ) -> None:
        super().__init__()
        if "dataset" in fields:
            fields["dataset"] = Path(fields["dataset"])
        self.config = config or DataConfig(**fields)
        self.seed, self.features_folder = seed, features
        self.saved: Saved | None = None
        self._loader: TrainingLoader | None = None
        self._position: dict[str, Any] | None = None
        self._lengths: CaptionLengths | None = None
        self._arranged: Arrangement | None = None

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
            arrangement=self._arrangement(),
        )

    def _arrangement(self) -> Arrangement | None:
        """Which samples come together; the same for all ranks."""
        kind, table = self.config.batches, self.train_index.table
        if kind != "shuffled" and self._arranged is None:
            if kind == "without_twins":
                value_N = twin_groups(table)
            elif kind == "by_length":
                value_N = caption_sizes(table)
            else:
                value_N = self._clusters()
            self._arranged = Arrangement(kind, value_N)
        return self._arranged

    def _clusters(self) -> np.ndarray:
        sources, table = self.config.trained_on, self.train_index.table
        found = [
            stored_embeddings(
                source.path,
                self.config.source_key(number),
                table.filter(pc.equal(table["source"], number))["key"].to_pylist(),
            )
            for number, source in enumerate(sources)
        ]
        value_N = clusters(np.concatenate(found), self.config.batch_size, self.seed)
        # Sums may come out otherwise on another machine; the ranks must agree.
        return self.trainer.strategy.broadcast(value_N) if self.trainer else value_N

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
        clip = self._clip()
        # The plan of `finetune fit` has counted them, and told.
        if self._lengths is None and self.schedule.rank == 0 and self.caption_lengths(clip).too_long:
            logger.warning("data    %s and are cut", self._lengths)
        dataset = self._train_dataset(clip)
        features = self.features(self.trainer.lightning_module, self.trainer) if self.trainer else None
        if features:
            dataset = replace(dataset, cached=self._filled(features, dataset))
        arranged = [self._arranged.digest] if self._arranged else []
        made_from = fingerprint(data_fingerprint(self.config), self.seed, self.schedule.world_size, *arranged)
        self._loader = TrainingLoader(dataset, self.schedule, self.config.num_workers, made_from)
        if self._position:
            self._loader.load_state_dict(self._position)
        return self._loader

    def _train_dataset(self, clip: Clip) -> PairDataset:
        augmented = self.config.crop_scale != (1.0, 1.0)
        view = (
            TrainingView(clip.preprocess_cfg, self.config.crop_scale) if augmented else EvaluationView(clip.preprocess)
        )
        templates = self._training.templates
        return PairDataset(
            self._whole_index(), view, clip.tokenizer, self.seed, templates, self._trim(), self._packer()
        )

    def _whole_index(self) -> SampleIndex:
        """What is trained on, then what is replayed."""
        return concatenate(self.train_index, self.replay_index) if self.replay_index else self.train_index

    # --- embeddings of locked towers ---

    def locked_tower(self, module: Any, trainer: lightning.Trainer) -> tuple[str, str | None] | None:
        """The tower of a CLIPModule that is locked, and why its embeddings are not kept; None: no tower is."""
        tower = next((tower for tower in TOWERS if is_locked(module.model, tower)), None)
        if tower is None:
            return None
        index = self._whole_index()
        if self.config.cache_features == "off":
            return tower, "data.cache_features is off"
        if self.features_folder is None:
            return tower, "there is no folder for them"
        if module.is_sharded:
            return tower, f"trainer.strategy {SHARDED}"
        batches = total_steps(trainer.max_steps, trainer.max_epochs, len(self.schedule) or 1)
        if batches * self.config.batch_size * trainer.accumulate_grad_batches < len(index):
            return tower, "the run ends before it has seen them all"
        return tower, why_not(self.config, tower, index, self._training.templates)

    def features(self, module: Any, trainer: lightning.Trainer) -> Features | None:
        """Where the embeddings of a locked tower are, or will be, kept; None: nowhere. After `setup`."""
        tower, reason = self.locked_tower(module, trainer) or (None, None)
        if tower is None or reason or self.features_folder is None:
            return None
        index, clip = self._whole_index(), module.clip
        how = (clip.preprocess_cfg, clip.name, trainer.precision, trainer.strategy.root_device.type)
        folder = self.features_folder / key_of(tower, module.model, index, *how)
        features = Features(folder, tower, len(index), module.width)
        if features.missing and not room_for(features):
            logger.warning(
                "data    the embeddings of the %s tower are not kept: their %d MB are more than half of what is free "
                "at %s",
                *(tower, features.bytes // 10**6, self.features_folder),
            )
            return None
        return features

    def _filled(self, features: Features, dataset: PairDataset) -> Features:
        """The same with all embeddings there; each process computes its share of those that are missing."""
        trainer: Any = self.trainer
        module = trainer.lightning_module
        if features.missing and self.schedule.rank == 0:
            logger.info(
                "data    computing the embeddings of the %s tower once, into %s", features.tower, features.folder
            )

        def batches(rows: range) -> Iterator[tuple[Tensor, Sequence[int]]]:
            size = self.config.eval_batch_size
            draws = [[Draw(row, 0) for row in rows[start : start + size]] for start in range(0, len(rows), size)]
            seen: Any = _Seen(dataset, features.tower)
            with torch.no_grad(), evaluating(module), trainer.precision_plugin.forward_context():
                loaded: Any = _load(seen, draws, self.config.num_workers)
                for batch, ids in loaded:
                    yield module.embed_locked(features.tower, batch), ids

        world_size, rank = self._world()
        self.saved = compute(features, batches, rank=rank, world_size=world_size)
        trainer.strategy.barrier("features")
        return features

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
        dataset = PairDataset(
            index, EvaluationView(clip.preprocess), clip.tokenizer, trim=self._trim(), pack=self._packer()
        )
        return ValidationLoader(dataset, batches, self.config.num_workers)

    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _clip(self) -> Clip:
        clip: Clip = self.trainer.lightning_module.clip  # type: ignore[union-attr, assignment]
        return clip

    def _trim(self) -> Trim | None:
        return trim_of(self._clip().model)

    def _packer(self) -> Packer | None:
        module: Any = self.trainer.lightning_module if self.trainer else None
        return packer_of(self._clip().model, module.compute.micro_batch_size if module else None)
