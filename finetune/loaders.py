"""Loaders of whole batches: exact epochs in a schedule's order, resumable at any batch; what is broken is counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from curate.cache import ReadAhead
from curate.errors import CliptailorError, InputError
from finetune.reading import Batch, OneTower, PairDataset
from finetune.schedule import Draw, Origin, Schedule

logger = logging.getLogger("cliptailor")


def _same(batch: Any) -> Any:
    return batch


def load(
    dataset: PairDataset | OneTower, batches: Iterable[Sequence[Draw]], num_workers: int, most_broken: float = 0
) -> Iterator[Any]:
    """Yield each batch, decoded in worker processes.

    Raises:
        InputError: more images than `most_broken` cannot be read.
        Outage: a file far away cannot be fetched.
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
        if isinstance(read, CliptailorError):
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
        needs: the files far away that are needed at a place of an epoch, or soon after; None: none is far away.
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
        needs: Callable[[int, int], Sequence[Path]] | None = None,
        passes_over: bool = False,
    ) -> None:
        self.dataset, self.schedule, self.num_workers, self.made_from = dataset, schedule, num_workers, made_from
        self.max_broken, self.needs, self.passes_over = max_broken, needs, passes_over
        self.epoch = self.next_batch = 0

    def __len__(self) -> int:
        return self.schedule.batches(self.epoch)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.epoch, self.next_batch
        draws = self._draws(epoch, first)
        most_broken = self.max_broken * self.schedule.batch_size * len(self)
        for number, batch in enumerate(load(self.dataset, draws, self.num_workers, most_broken), start=first + 1):
            # Before it is handed out: a checkpoint taken while it is in use counts it as seen.
            self.epoch, self.next_batch = self.schedule.after(epoch, number)
            yield batch

    def _draws(self, epoch: int, first: int) -> Iterator[list[Draw]]:
        """The batches of the rest of an epoch, as they are asked for; what is far away is fetched ahead of them."""
        if self.needs is None:
            yield from (self.schedule.batch(epoch, number) for number in range(first, len(self)))
            return
        ahead = ReadAhead()  # its threads begin when the processes of the loader are there
        try:
            for number in range(first, len(self)):
                ahead.want(self.needs(epoch, self.schedule.seen(epoch, number)))
                yield self.schedule.batch(epoch, number)
        finally:
            ahead.close()

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
        return load(self.dataset, self.batches, self.num_workers)
