"""What `finetune fit` trains on: a dataset's splits and sources, as loaders for the CLIP that is trained.

Which samples are in which batch is decided in finetune/schedule.py and batches.py; finetune/reading.py reads them.

Axes: B samples, N rows of an index.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from curate.cache import cache_bytes
from curate.clip import Clip
from curate.errors import ConfigError, InputError
from curate.files import digest, fingerprint
from curate.index import SampleIndex
from curate.remote import address, far, shown, stamp
from curate.shards import shard_folder, shards_of
from finetune.adapters import is_locked
from finetune.batches import Arrangement, caption_sizes, clusters, stored_embeddings, twin_groups
from finetune.checks import count_pairs
from finetune.config import SHARDED, TOWERS, DataConfig
from finetune.features import Features, Saved, compute, key_of, room_for, why_not
from finetune.loaders import BrokenCount, TrainingLoader, ValidationLoader, going_on, load
from finetune.optim import total_steps
from finetune.packing import Packer, packer_of
from finetune.pixels import EvaluationView, TrainingView
from finetune.reading import OneTower, PairDataset
from finetune.schedule import Draw, Origin, Schedule
from finetune.sources import (
    CaptionLengths,
    caption_lengths,
    concatenate,
    sources_fingerprint,
    split_pairs,
    training_set,
)
from finetune.start import evaluating
from finetune.trimming import Trim, trim_of
from finetune.windows import Windows

logger = logging.getLogger("cliptailor")


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
            f"data.replay is {config.replay}, but {shown(config.dataset)} has no retain split; "
            "set data.replay to 0, or name a data.replay_dataset"
        )
    return config.dataset, "retain"


def data_fingerprint(config: DataConfig) -> str:
    """Changes with the samples that are trained on and replayed, and their weights; not with paths or batches.

    Raises:
        ConfigError: replay is asked for, but there is nothing to replay.
        InputError: there is nothing to train on.
    """
    replayed = replayed_split(config)
    digests: list[Any] = [split_digests(*source) for source in ((config.dataset, "train"), replayed) if source]
    if config.sources or not digests[0]:
        digests[0] = sources_fingerprint(config)
    order: list[str] = [config.batches] if config.batches != "shuffled" else []
    if samples_far_away(config) > config.window:
        order.append(f"window {config.window}")
    return fingerprint(digests, *order)


def samples_far_away(config: DataConfig) -> int:
    """Rows of the sources that are far away; where they are more than `data.window`, they are read in windows."""
    return sum(count_pairs(source.path, "train") or 0 for source in config.trained_on if address(source.path))


class CLIPDataModule(lightning.LightningDataModule):
    """A dataset's train and val splits as batches for the CLIP that is trained (its preprocessing, its tokenizer).

    Args:
        config: what and how; or give its fields by name: `CLIPDataModule(dataset=Path("dataset"), batch_size=64)`.
        seed: of the order and the augmentation.
        features: folder where embeddings of locked towers are kept; None: they are not.
        anew: where a checkpoint was made over other samples, begin its epoch again with these; without it that is an
            error.
        **fields: of DataConfig.
    """

    def __init__(
        self,
        config: DataConfig | None = None,
        *,
        seed: int = 0,
        features: Path | None = None,
        anew: bool = False,
        **fields: Any,
    ) -> None:
        super().__init__()
        if "dataset" in fields:
            fields["dataset"] = Path(fields["dataset"])
        self.config = config or DataConfig(**fields)
        self.seed, self.features_folder, self.anew = seed, features, anew
        self.saved: Saved | None = None
        self._loader: TrainingLoader | None = None
        self._position: dict[str, Any] | None = None
        self._lengths: CaptionLengths | None = None
        self._arranged: Arrangement | None = None
        self._agreed = False  # on it, all ranks

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
        if self.replay_index is not None and not len(self.replay_index):
            raise InputError("data.replay: there is no image in what is to be replayed; set it to 0")
        least, passes = 2 * self._world()[0], self._training.passes
        draws = sum(source.draws for source in passes) if passes else len(self.train_index)
        if draws < least:
            epoch = "" if draws == len(self.train_index) else " an epoch (data.sources: their weights)"
            raise InputError(f"{self._where}: {draws} training pairs{epoch}; needs at least {least}")
        self._check_room()

    @property
    def _where(self) -> str:
        return ", ".join(shown(source.path) for source in self.config.trained_on)

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
            order=self._windows,
            machines=self.trainer.num_nodes if self.trainer else 1,
        )

    # --- what is far away ---

    @cached_property
    def _windows(self) -> Windows | None:
        """The order of samples that are far away; None: they are here, or few enough to be shuffled as a whole."""
        config, count = self.config, samples_far_away(self.config)
        if count <= config.window:
            return None
        either = f"or give a data.window of {count:,}, if the cache has room for all its tars"
        if config.batches != "shuffled":
            raise ConfigError(
                f"data.batches: {config.batches} rearranges a whole epoch, and {self._where} is read shard after "
                f"shard; set it to shuffled, {either}"
            )
        for number, source in enumerate(config.sources):
            if source.weight != 1:
                raise ConfigError(
                    f"data.sources[{number}].weight: {source.weight:g}, and {self._where} is read shard after shard, "
                    f"each once; set it to 1, {either}"
                )
        return Windows.of(self.train_index.table["tar"], config.window)

    @cached_property
    def _far(self) -> tuple[dict[int, Path], list[Path]]:
        """The tars of training samples that are far away, by number, and those of replayed samples."""
        replayed = self.replay_index.tars if self.replay_index else []
        return {n: tar for n, tar in enumerate(self.train_index.tars) if far(tar)}, [
            tar for tar in replayed if far(tar)
        ]

    def needs(self, schedule: Schedule, epoch: int, number: int) -> list[Path]:
        """The tars far away that are needed for a batch, or soon after; those of replayed samples always."""
        (tars, replayed), windows, numbers = self._far, self._windows, [*self._far[0]]
        if windows:
            places = schedule.places_of_machine(epoch, number)
            numbers = windows.needed(places, schedule.machines_of(epoch), self.seed, epoch).tolist()
        return [*replayed, *dict.fromkeys(tars[number] for number in numbers if number in tars)]

    def far_bytes(self) -> tuple[int, int]:
        """Size of the tars that are far away, and about the most of it that must be here at once."""
        sizes, replayed = ([stamp(tar)[0] for tar in tars] for tars in (self._far[0].values(), self._far[1]))
        needed = sum(sizes)
        if self._windows:
            # Two windows, each larger than it is to be by less than a shard.
            share = self.config.window / len(self.train_index)
            needed = min(needed, round(2 * (share * needed + max(sizes, default=0))))
        return sum(sizes) + sum(replayed), needed + sum(replayed)

    def _check_room(self) -> None:
        _, needed = self.far_bytes()
        if needed > cache_bytes():
            raise ConfigError(
                f"data.window: {self.config.window:,} samples and as many ahead take about {needed / 1e9:.3g} GB of "
                f"{self._where}, replayed ones included, and the cache may have {cache_bytes() / 1e9:.3g} "
                "(CLIPTAILOR_CACHE_GB); make either fit"
            )

    def _arrangement(self) -> Arrangement | None:
        """Which samples come together; the same for all ranks."""
        kind = self.config.batches
        if kind == "shuffled":
            return None
        if self._arranged is None:
            self._arranged = Arrangement(kind, self._arranged_by())
        if kind == "hard_negatives" and self.trainer and not self._agreed:
            # Sums may come out otherwise on another machine. (The plan has made them too, but on rank 0 alone.)
            self._arranged = Arrangement(kind, self.trainer.strategy.broadcast(self._arranged.value))
            self._agreed = True
        return self._arranged

    def _arranged_by(self) -> np.ndarray:
        """A value (N,) of each training sample, by which it comes together with others."""
        kind, table = self.config.batches, self.train_index.table
        if many := table["captions"].null_count:
            raise ConfigError(
                f"data.batches: {kind} looks at all samples before the first batch, and of {many:,} the "
                "captions and keys stay in the tars; set it to shuffled, or train on a part of them"
            )
        if kind == "without_twins":
            return twin_groups(table)
        return caption_sizes(table) if kind == "by_length" else self._clusters()

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
        return clusters(np.concatenate(found), self.config.batch_size, self.seed)

    def caption_lengths(self, clip: Clip) -> CaptionLengths:
        """How many captions this CLIP's context cuts, over a seeded sample of a large set; after `setup`."""
        if self._lengths is None:
            self._lengths = caption_lengths(self._training, clip.tokenizer, self.seed)
        return self._lengths

    def steps(self, epochs: int, accumulated: int = 1) -> int:
        """Optimiser steps after so many epochs; of a run that is continued, those that it has made included.

        Args:
            epochs: since the beginning of the run.
            accumulated: batches a step; the last of an epoch may have fewer.
        """
        schedule, made, first, begun = self.schedule, 0, 0, 0
        if position := self._position:
            schedule, made, first = going_on(schedule, position), position["steps"], position["epoch"]
            begun = position["next_batch"] // accumulated  # steps of that epoch
        numbers = range(first, max(first, epochs))
        if len(numbers) > 1:  # only the first may be cut otherwise
            made += (len(numbers) - 1) * -(-len(schedule) // accumulated)
        return made + (-(-schedule.batches(first) // accumulated) - begun if numbers else 0)

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
        self._loader = TrainingLoader(
            dataset,
            self.schedule,
            self.config.num_workers,
            self._made_from,
            self.config.max_broken,
            needs=self.needs if any(self._far) and not dataset.keeps("image") else None,
            passes_over=self.anew,  # what Lightning has kept of the loader beside our own position
        )
        if self._position:
            self._loader.load_state_dict(self._position)
        return self._loader

    @cached_property
    def _made_from(self) -> str:
        arranged = self._arrangement()
        return fingerprint(data_fingerprint(self.config), self.seed, *([arranged.digest] if arranged else []))

    def _train_dataset(self, clip: Clip) -> PairDataset:
        augmented = self.config.crop_scale != (1.0, 1.0)
        view = (
            TrainingView(clip.preprocess_cfg, self.config.crop_scale, fast=self.config.decode == "fast")
            if augmented
            else EvaluationView(clip.preprocess, clip.preprocess_cfg)
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
        if self.config.cache_features == "never":
            return tower, "data.cache_features is never"
        if self.features_folder is None:
            return tower, "there is no folder for them"
        if module.is_sharded:
            return tower, f"trainer.strategy {SHARDED}"
        devices = trainer.num_devices * trainer.num_nodes
        batches = len(replace(self.schedule, world_size=devices, rank=0))
        steps = total_steps(trainer.max_steps, trainer.max_epochs, batches or 1)
        if steps * self.config.batch_size * devices * trainer.accumulate_grad_batches < len(index):
            return tower, "the run ends before it has seen them all"
        return tower, why_not(self.config, tower, index, self._training.templates)

    def features(self, module: Any, trainer: lightning.Trainer) -> Features | None:
        """Where the embeddings of a locked tower are, or will be, kept; None: nowhere. After `setup`."""
        tower, reason = self.locked_tower(module, trainer) or (None, None)
        if tower is None or reason or self.features_folder is None:
            return None
        index, clip = self._whole_index(), module.clip
        shown = clip.preprocess_cfg if tower == "image" else self._training.templates
        how = (clip.name, clip.architecture, shown, trainer.precision, trainer.strategy.root_device.type)
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
            seen: Any = OneTower(dataset, features.tower)
            with torch.no_grad(), evaluating(module), trainer.precision_plugin.forward_context():
                broken = BrokenCount(self.config.max_broken * len(dataset))
                for batch, ids in load(seen, draws, self.config.num_workers, broken):
                    yield module.embed_locked(features.tower, batch), ids

        world_size, rank = self._world()
        self.saved = compute(features, batches, rank=rank, world_size=world_size)
        trainer.strategy.barrier("features")
        return features

    # Lightning restores the loader's own state in most cases, but not from a checkpoint taken at the end of an epoch.

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch, and the steps before it, for a checkpoint."""
        if self._loader is None:
            return {"position": None}
        steps = self.trainer.global_step if self.trainer else 0
        return {"position": self._loader.state_dict() | {"steps": steps}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next training loader where the checkpoint was taken."""
        self._position = state_dict["position"]
        if self._position and self.anew and self._position["made_from"] != self._made_from:
            # The batches that were made stay counted; of these samples none has been seen in this epoch.
            place = self._position["epoch"], self._position["next_batch"]
            new = {"since": list(Origin(*place)), "manner": self.schedule.manner, "made_from": self._made_from}
            self._position |= new
            self._position.pop("num_broken", None)

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
            index,
            EvaluationView(clip.preprocess, clip.preprocess_cfg),
            clip.tokenizer,
            trim=self._trim(),
            pack=self._packer(),
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
