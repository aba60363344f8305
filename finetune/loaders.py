"""Loaders of whole batches: exact epochs in a schedule's order, resumable at any batch; what is broken is counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from curate.cache import ReadAhead
from curate.errors import CliptailorError, InputError
from curate.remote import far
from finetune.checkpoints import of_all_ranks
from finetune.reading import Batch, OneTower, PairDataset
from finetune.schedule import Draw, Origin, Schedule

logger = logging.getLogger("cliptailor")

_AHEAD = 4  # tars of a validation that are here or on their way


def _same(batch: Any) -> Any:
    return batch


@dataclass
class BrokenCount:
    """Samples that could not be read.

    Attributes:
        most: as many may be; one more ends the run.
        number: so far.
    """

    most: float = 0
    number: int = 0

    def add(self, reason: str) -> None:
        """Count one more.

        Raises:
            InputError: it is one too many.
        """
        self.number += 1
        if self.number > self.most:
            more = f"; it is number {self.number:,} in an epoch, more than data.max_broken allows" if self.most else ""
            raise InputError(f"{reason}{more}; build or copy the dataset again")


def load(
    dataset: PairDataset | OneTower,
    batches: Iterable[Sequence[Draw]],
    num_workers: int,
    broken: BrokenCount | None = None,
) -> Iterator[Any]:
    """Yield each batch, decoded in worker processes.

    Args:
        dataset: gives them.
        batches: of which samples.
        num_workers: processes that decode; 0: this one does.
        broken: counts what cannot be read; None: nothing may be.

    Raises:
        InputError: more images than may be cannot be read.
        Outage: a file far away cannot be fetched.
    """
    broken = broken or BrokenCount()
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of index lists will do
        num_workers=num_workers,
        collate_fn=_same,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each start of the loader would draw from the global one
    )
    for read in loader:
        if isinstance(read, CliptailorError):
            raise read
        for row, reason in read.broken:
            broken.add(reason)
            if row not in dataset.named:
                dataset.named.add(row)
                logger.warning("data    %s; another sample stands in for it (%s so far)", reason, f"{broken.number:,}")
        yield read.batch


def _fetched_ahead(batches: Iterable[tuple[Sequence[Path], Sequence[Draw]]]) -> Iterator[Sequence[Draw]]:
    """The batches, as they are asked for; the files beside each are fetched meanwhile, for it and those behind it."""
    ahead = ReadAhead()  # its threads begin when the processes of the loader are there
    try:
        for files, batch in batches:
            ahead.want(files)
            yield batch
    finally:
        ahead.close()


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
        needs: the files far away that are needed for a batch of an epoch, or soon after; None: none is far away.
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
        needs: Callable[[Schedule, int, int], Sequence[Path]] | None = None,
        passes_over: bool = False,
    ) -> None:
        self.dataset, self.schedule, self.num_workers, self.made_from = dataset, schedule, num_workers, made_from
        self.max_broken, self.needs, self.passes_over = max_broken, needs, passes_over
        self.epoch = self.next_batch = self.num_broken = 0

    def __len__(self) -> int:
        return self.schedule.batches(self.epoch)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.epoch, self.next_batch
        broken = BrokenCount(self.max_broken * self.schedule.batch_size * len(self), self.num_broken)
        batches = load(self.dataset, self._draws(epoch, first), self.num_workers, broken)
        for number, batch in enumerate(batches, start=first + 1):
            # Before it is handed out: a checkpoint taken while it is in use counts it as seen.
            self.epoch, self.next_batch = self.schedule.after(epoch, number)
            self.num_broken = broken.number if self.epoch == epoch else 0
            yield batch

    def _draws(self, epoch: int, first: int) -> Iterator[Sequence[Draw]]:
        """The batches of the rest of an epoch, as they are asked for; what is far away is fetched ahead of them."""
        schedule, needs, numbers = self.schedule, self.needs, range(first, len(self))
        if needs is None:
            return (schedule.batch(epoch, number) for number in numbers)
        return _fetched_ahead((needs(schedule, epoch, number), schedule.batch(epoch, number)) for number in numbers)

    def state_dict(self) -> dict[str, Any]:
        """Where to go on, in which data, and in batches of what size the place is told; what each rank found broken."""
        return {
            "epoch": self.epoch,
            "next_batch": self.next_batch,
            "num_broken": of_all_ranks(self.num_broken),
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
        is_as_it_was = state["manner"] == self.schedule.manner
        self.schedule = going_on(self.schedule, state)
        self.epoch, self.next_batch = state["epoch"], state["next_batch"]
        # In other batches, or on other ranks, what may be broken is counted anew. Older checkpoints have no count.
        self.num_broken = state["num_broken"][self.schedule.rank] if is_as_it_was and "num_broken" in state else 0


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
        index = self.dataset.index
        if not any(map(far, index.tars)):
            return load(self.dataset, self.batches, self.num_workers)
        number_N = index.table["tar"].to_numpy()
        needed = (index.tars[number_N[batch[0].row] :][:_AHEAD] for batch in self.batches)
        return load(self.dataset, _fetched_ahead(zip(needed, self.batches, strict=True)), self.num_workers)
