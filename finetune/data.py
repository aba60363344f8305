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
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from curate.clip import Clip
from curate.errors import ConfigError, InputError
from curate.shards import Facts, MemberReader, SampleIndex, digest, fingerprint, shard_folder, shards_of
from finetune.adapters import is_locked
from finetune.batches import Arrangement, caption_sizes, clusters, stored_embeddings, twin_groups
from finetune.captions import CachedTokenizer, content_hash
from finetune.config import SHARDED, TOWERS, DataConfig
from finetune.features import UNREAD, Features, Saved, compute, key_of, room_for, why_not
from finetune.optim import total_steps
from finetune.packing import Packer, packer_of
from finetune.pixels import UNREADABLE, EvaluationView, TrainingView
from finetune.schedule import Draw, Origin, Schedule
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
"""pixels (B, 3, H, W), uint8, or float32 if normalised; tokens (B, L) int64; group (B, G) int64, for
`losses.positives`; row (B,) of the index; packed: the captions in rows (finetune/packing.py), where that is shorter.
In place of pixels, or of tokens, image or text (B, D), the embeddings of a locked tower (finetune/features.py)."""

# The stream of random numbers of what stands in for a sample is apart from those of its crop and caption.
_OF_STAND_INS = 3
_ATTEMPTS = 20  # to find one that can be read


# --- one batch --------------------------------------------------------------------------------------------------------


class Broken(NamedTuple):
    """A sample that could not be read, and why: names its file and key."""

    row: int
    reason: str


class Read(NamedTuple):
    """A batch, or what one tower sees of it with its ids, and the samples that should have been in it."""

    batch: Any
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
    pack: Packer | None = None
    """What puts captions into rows."""
    cached: Features | None = None
    """Embeddings of a locked tower, in place of what it would see."""
    reader: MemberReader = field(init=False)
    named: set[int] = field(init=False, default_factory=set)
    """Rows of broken samples that have been told of."""

    def __post_init__(self) -> None:
        self.reader = MemberReader(self.index.tars)
        self._facts, self._sources = Facts(self.index, self.reader), self.index.table["source"]
        phrasings = max((len(each) for each in self.templates), default=0) or 1
        self._tokenize = CachedTokenizer(self.tokenizer, len(self.index) * phrasings)
        # Where each source begins, and the last ends: their rows lie side by side.
        runs = pc.run_end_encode(self._sources.combine_chunks())
        self._borders = np.concatenate([[0], runs.run_ends.to_numpy()])

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, draws: Sequence[Draw]) -> Read | InputError:
        """The batch of these samples; an error if nothing readable is found to stand in for one."""
        broken: list[Broken] = []
        try:
            read, images, shown = self.images(draws, broken)
        except InputError as error:
            return error
        texts, said = self.texts(read)
        rows = [draw.row for draw in read]
        group = torch.tensor([*zip(said, map(self._duplicates, rows), shown, strict=True)])
        return Read({**images, **texts, "group": group, "row": torch.tensor(rows)}, broken)

    def images(self, draws: Sequence[Draw], broken: list[Broken]) -> tuple[list[Draw], Batch, list[int]]:
        """These samples or those that stand in for them, what the CLIP sees of them, and an id of each stored image.

        Args:
            draws: the samples.
            broken: gets those that cannot be read.

        Raises:
            InputError: nothing readable is found to stand in for one.
        """
        read, seen, ids = zip(*(self._readable(draw, broken) for draw in draws), strict=True)
        return list(read), {"image" if self._keeps("image") else "pixels": _stacked(seen)}, list(ids)

    def texts(self, draws: Sequence[Draw]) -> tuple[Batch, list[int]]:
        """What is said of samples, and an id of each text, as the text tower reads it."""
        if self.cached and self._keeps("text"):
            embeddings, ids = self.cached.read([draw.row for draw in draws])
            return {"text": embeddings}, ids
        tokens, said = self._tokenize([self._caption(draw) for draw in draws])
        seen = self.trim(tokens) if self.trim else tokens
        packed = self.pack(seen) if self.pack else None
        return {"tokens": seen} | ({"packed": packed} if packed else {}), said

    def _keeps(self, tower: str) -> bool:
        return self.cached is not None and self.cached.tower == tower

    def _caption(self, draw: Draw) -> str:
        source = self._sources[draw.row].as_py()
        templates = self.templates[source] if source is not None and self.templates else ()
        return drawn_caption(self._facts.captions(draw.row), templates, (self.seed, draw.turn, draw.row))

    def _readable(self, draw: Draw, broken: list[Broken]) -> tuple[Draw, Tensor, int]:
        """This sample or one that stands in for it, what is seen of it and the id of its image; adds what is broken."""
        stand_ins = (self._stand_in(draw, attempt) for attempt in range(_ATTEMPTS))
        for row in itertools.chain([draw.row], stand_ins):
            stand_in = Draw(row, draw.turn)
            found = self._kept(stand_in) if self._keeps("image") else self._pixels(stand_in)
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
        tar, offset, size = self._facts.place(draw.row)
        try:
            content = self.reader.read(tar, offset, size)
            pixels = self.view(content, (self.seed, draw.turn, draw.row))
        except (*UNREADABLE, InputError) as error:
            # PIL's own words for bytes of no format are the address of our buffer.
            why = "of no known format" if isinstance(error, UnidentifiedImageError) else error
            sample = f"{self.index.tars[tar]}: sample {self._facts.key(draw.row)}"
            return Broken(draw.row, f"{sample}: the image cannot be decoded ({why})")
        return pixels, len(content) << 32 | zlib.crc32(content)

    def _kept(self, draw: Draw) -> tuple[Tensor, int] | Broken:
        """Its embedding in place of its pixels."""
        assert self.cached is not None
        embedding, (image,) = self.cached.read([draw.row])
        if image == UNREAD:
            tar, _, _ = self._facts.place(draw.row)
            return Broken(draw.row, f"{self.index.tars[tar]}: sample {self._facts.key(draw.row)} could not be decoded")
        return embedding[0], image

    def _duplicates(self, row: int) -> int:
        """An id of the duplicates that a sample belongs to."""
        return content_hash((self._facts.group(row) or f"row {row}").encode())


# --- loaders ----------------------------------------------------------------------------------------------------------


@dataclass
class _Seen(Dataset[Any]):
    """What one tower sees of samples, and their ids."""

    dataset: PairDataset
    tower: str

    @property
    def named(self) -> set[int]:
        """As the dataset's."""
        return self.dataset.named

    def __getitems__(self, draws: Sequence[Draw]) -> Read | InputError:
        if self.tower == "text":
            return Read(self.dataset.texts(draws), [])
        broken: list[Broken] = []
        try:
            read, images, ids = self.dataset.images(draws, broken)
        except InputError as error:
            return error
        # What stands in for a sample is drawn anew each time: of one that cannot be read that alone is kept.
        kept = [image if draw == other else UNREAD for draw, other, image in zip(draws, read, ids, strict=True)]
        return Read((images, kept), broken)

    def __len__(self) -> int:
        return len(self.dataset)


def _same(batch: Any) -> Any:
    return batch


def _load(
    dataset: PairDataset | _Seen, batches: Iterable[Sequence[Draw]], num_workers: int, most_broken: float = 0
) -> Iterator[Any]:
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

    The length is that of the current epoch, of which a part may have been seen in batches of another size; without a
    length Lightning would fetch, and count, a batch ahead.

    Args:
        dataset: the samples.
        schedule: which of them come when.
        num_workers: processes that decode.
        made_from: changes with the samples and the seed.
        max_broken: share of an epoch's samples that may be unreadable.
        passes_over: states of other samples, instead of refusing them.
    """

    def __init__(
        self,
        dataset: PairDataset,
        schedule: Schedule,
        num_workers: int,
        made_from: str,
        max_broken: float = 0.0,
        *,
        passes_over: bool = False,
    ) -> None:
        self.dataset, self.schedule, self.num_workers, self.made_from = dataset, schedule, num_workers, made_from
        self.max_broken, self.passes_over = max_broken, passes_over
        self.epoch = self.next_batch = 0

    def __len__(self) -> int:
        return self.schedule.batches(self.epoch)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.epoch, self.next_batch
        draws = (self.schedule.batch(epoch, number) for number in range(first, len(self)))
        most_broken = self.max_broken * self.schedule.batch_size * len(self)
        for number, batch in enumerate(_load(self.dataset, draws, self.num_workers, most_broken), start=first + 1):
            # Before it is handed out: a checkpoint taken while it is in use counts it as seen.
            self.epoch, self.next_batch = self.schedule.after(epoch, number)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where to go on, in which data, and in batches of what size the place is told."""
        return {
            "epoch": self.epoch,
            "next_batch": self.next_batch,
            "since": list(self.schedule.since),
            "manner": self.schedule.manner,
            "made_from": self.made_from,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken; with batches of another size or other ranks, at the same sample.

        Raises:
            InputError: it was taken over other data.
        """
        if state["made_from"] != self.made_from:
            if self.passes_over:
                return
            raise InputError(
                "the checkpoint was made with other training samples or another seed: its position means nothing here"
            )
        self.schedule = going_on(self.schedule, state)
        self.epoch, self.next_batch = state["epoch"], state["next_batch"]


def going_on(schedule: Schedule, state: dict[str, Any]) -> Schedule:
    """A schedule that goes on from the state of a loader."""
    return schedule.going_on(Origin(*state["since"]), state["manner"], state["epoch"], state["next_batch"])


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
    """Changes with the samples that are trained on and replayed, and their weights; not with paths or batches.

    Raises:
        ConfigError: replay is asked for, but there is nothing to replay.
        InputError: there is nothing to train on.
    """
    replayed = replayed_split(config)
    digests: list[Any] = [split_digests(*source) for source in ((config.dataset, "train"), replayed) if source]
    if config.sources or not digests[0]:
        digests[0] = sources_fingerprint(config)
    return fingerprint(digests, *([config.batches] if config.batches != "shuffled" else []))


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
            if pa.types.is_null(table["captions"].type):
                raise ConfigError(
                    f"data.batches: {kind} looks at all samples before the first batch, and of {table.num_rows:,} the "
                    "captions and keys stay in the tars; set it to shuffled, or train on a part of them"
                )
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
            else EvaluationView(clip.preprocess)
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
                for batch, ids in _load(seen, draws, self.config.num_workers, self.config.max_broken * len(dataset)):
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
