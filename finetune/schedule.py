"""Which samples are in which batch: a pure function of (seed, epoch, number of the batch).

So the position is all the state that a loader has, and a resumed run reads nothing twice.

An epoch is every sample once, or, of sources with weights, `weight` passes over each source: an exact number of draws,
taken one after the other from an endless stream of permutations of that source. So half a pass is another half in the
next epoch, and two passes are each sample twice; all draws of an epoch are then shuffled together. Each global batch is
cut into equal slices, one a rank; with several ranks the last batch loses the few samples (fewer than ranks) that
cannot be shared out equally. A last batch too small for a contrast joins the one before it. Replayed samples come on
top, from an endless stream of permutations of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from finetune.batches import Arrangement, meetings


class Draw(NamedTuple):
    """One sample of a batch: its row in the index, and which pass over its split this is."""

    row: int
    turn: int


@lru_cache(maxsize=32)
def permutation(size: int, *seed: int) -> np.ndarray:
    """The numbers below `size` in an order that depends on the seeds alone."""
    return np.random.default_rng(seed).permutation(size)


@dataclass(frozen=True)
class Passes:
    """How often the samples of one source are drawn: `weight` times an epoch, on average over epochs."""

    num_samples: int
    weight: float = 1.0

    @property
    def draws(self) -> int:
        """Draws an epoch, at least one."""
        return max(1, round(self.num_samples * self.weight))

    def rows(self, epoch: int, *seed: int) -> np.ndarray:
        """The row of each draw of an epoch."""
        if self.weight == 1:
            return np.arange(self.draws)
        turn, place = np.divmod(epoch * self.draws + np.arange(self.draws), self.num_samples)
        parts = [permutation(self.num_samples, *seed, int(each))[place[turn == each]] for each in np.unique(turn)]
        return np.concatenate(parts)

    def draw(self, epoch: int, place: int, *seed: int) -> Draw:
        """Draw number `place` of an epoch."""
        if self.weight == 1:
            return Draw(place, epoch)  # the shuffle of the epoch is order enough
        turn, place_in_turn = divmod(epoch * self.draws + place, self.num_samples)
        return Draw(int(permutation(self.num_samples, *seed, turn)[place_in_turn]), turn)


@dataclass(frozen=True)
class Schedule:
    """Which samples are in which batch of which epoch, for one rank.

    Attributes:
        num_samples: rows 0 … num_samples-1 of the index are seen once an epoch.
        num_replay: the rows after them are replayed.
        batch_size: samples of a batch and rank, replayed ones included.
        replay: share of each batch that is replayed.
        seed: of the order.
        world_size: number of ranks.
        rank: whose slice.
        sources: sizes and weights of the sources that make up num_samples, in the order of the index; none: all once.
        arrangement: which samples come together; None: it is chance.
    """

    num_samples: int
    num_replay: int
    batch_size: int
    replay: float
    seed: int
    world_size: int = 1
    rank: int = 0
    sources: tuple[Passes, ...] = ()
    arrangement: Arrangement | None = None

    @property
    def replayed(self) -> int:
        """Samples of a whole batch and rank that are replayed: at least one where any are asked for."""
        return min(max(1, round(self.batch_size * self.replay)), self.batch_size - 1) if self.replay else 0

    @property
    def fresh(self) -> int:
        """Samples of a whole batch and rank that are not replayed."""
        return self.batch_size - self.replayed

    @property
    def draws(self) -> int:
        """Draws of fresh samples an epoch, of all ranks together."""
        return sum(source.draws for source in self.sources) if self.sources else self.num_samples

    @cached_property
    def _ends(self) -> tuple[int, int]:
        """Batches an epoch, and the fresh samples of the last."""
        whole, rest = divmod(self.draws, self.fresh * self.world_size)
        last = rest // self.world_size
        if last * self.world_size >= 2 or not whole:
            return whole + 1, last
        return whole, self.fresh + last

    def __len__(self) -> int:
        """Batches an epoch."""
        return self._ends[0]

    def batch(self, epoch: int, number: int) -> list[Draw]:
        """The samples of one batch, fresh ones first."""
        size = self._ends[1] if number == len(self) - 1 else self.fresh
        start = self.fresh * self.world_size * number + size * self.rank
        order = _order(self, epoch) if self.arrangement else permutation(self.draws, self.seed, epoch)
        draws = [self._fresh(int(place), epoch) for place in order[start : start + size]]
        return draws + (self._replay(epoch, number) if self.replay else [])

    @property
    def sizes(self) -> list[int]:
        """Fresh samples of each batch of an epoch, of all ranks together."""
        return [*[self.fresh * self.world_size] * (len(self) - 1), self._ends[1] * self.world_size]

    def meetings(self, epoch: int) -> int:
        """Samples that are in a batch with one that has an equal value of the arrangement."""
        assert self.arrangement is not None
        return meetings(self.arrangement.value[self.rows(epoch)[_order(self, epoch)]], self.sizes)

    def rows(self, epoch: int) -> np.ndarray:
        """The row of each draw of fresh samples of an epoch, before it is shuffled."""
        if not self.sources:
            return np.arange(self.num_samples)
        first = np.cumsum([0, *(source.num_samples for source in self.sources)])
        return np.concatenate(
            [first[number] + source.rows(epoch, self.seed, 2, number) for number, source in enumerate(self.sources)]
        )

    def _fresh(self, place: int, epoch: int) -> Draw:
        """Draw number `place` of an epoch before it is shuffled."""
        first_row = 0
        for number, source in enumerate(self.sources):
            if place < source.draws:
                row, turn = source.draw(epoch, place, self.seed, 2, number)
                return Draw(first_row + row, turn)
            place, first_row = place - source.draws, first_row + source.num_samples
        return Draw(place, epoch)

    def _replay(self, epoch: int, number: int) -> list[Draw]:
        """The next samples of the endless replay stream, in every batch the same share."""
        last = max(1, round(self._ends[1] * self.replayed / self.fresh))
        count = last if number == len(self) - 1 else self.replayed
        an_epoch = (len(self) - 1) * self.replayed + last
        start = (epoch * an_epoch + number * self.replayed) * self.world_size + self.rank * count
        draws = []
        for place in range(start, start + count):
            turn, place_in_turn = divmod(place, self.num_replay)
            row = permutation(self.num_replay, self.seed, turn, 1)[place_in_turn]
            draws.append(Draw(self.num_samples + int(row), turn))
        return draws


@lru_cache(maxsize=2)
def _order(schedule: Schedule, epoch: int) -> np.ndarray:
    """The draws of an epoch, shuffled and then arranged."""
    assert schedule.arrangement is not None
    order = permutation(schedule.draws, schedule.seed, epoch)
    return order[schedule.arrangement(schedule.rows(epoch)[order], schedule.sizes, (schedule.seed, epoch, 3))]
