"""Which samples are in which batch: a pure function of (seed, epoch, number of the batch).

So the position is all the state that a loader has, and a resumed run reads nothing twice. The order of an epoch does
not depend on how it is cut into batches: a run that goes on with another batch size or number of ranks does so at the
same sample (`Schedule.since`), and the rest of its epoch are the samples that it had not seen.

An epoch is every sample once, or, of sources with weights, `weight` passes over each source: an exact number of draws,
taken one after the other from an endless stream of permutations of that source. So half a pass is another half in the
next epoch, and two passes are each sample twice; all draws of an epoch are then shuffled together. Each global batch is
cut into equal slices, one a rank; with several ranks the last batch loses the few samples (fewer than ranks) that
cannot be shared out equally. A last batch too small for a contrast joins the one before it. Replayed samples come on
top, from an endless stream of permutations of their own.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from curate.errors import ConfigError
from finetune.batches import Arrangement, meetings


class Draw(NamedTuple):
    """One sample of a batch: its row in the index, and which pass over its split this is."""

    row: int
    turn: int


# Up to so many numbers a permutation is kept as an array; beyond, each place is calculated when it is asked for.
KEPT = 1 << 20
KEPT_BYTES, KEPT_MOST = 256 << 20, 4096
_kept: dict[tuple[int, ...], np.ndarray] = {}
_keeping = threading.Lock()  # a thread fetches ahead
_ROUNDS = 8


def shuffled(places: np.ndarray, size: int, *seed: int) -> np.ndarray:
    """What stands at these places of a permutation of the numbers below `size`, which depends on the seeds alone.

    Of a large one nothing is kept, so that it takes no memory however many epochs, sources and turns there are.
    """
    if size <= KEPT:
        return permutation(size, *seed)[places]
    return _feistel(places, size, _round_keys(*seed))


def permutation(size: int, *seed: int) -> np.ndarray:
    """The numbers below `size` in an order that depends on the seeds alone, as uint32.

    The last ones are kept: as many as an epoch of many sources has, and not more than KEPT_BYTES.
    """
    with _keeping:
        made = _kept.pop((size, *seed), None)
        if made is not None:
            _kept[(size, *seed)] = made
            return made
        made = np.random.default_rng(seed).permutation(np.arange(size, dtype=np.uint32))
        # Here alone: each draw of a small source asks for its permutation.
        while _kept and (len(_kept) == KEPT_MOST or made.nbytes + _num_bytes() > KEPT_BYTES):
            _kept.pop(next(iter(_kept)))
        _kept[(size, *seed)] = made
    return made


def _num_bytes() -> int:
    return sum(each.nbytes for each in _kept.values())


@lru_cache(maxsize=1024)
def _round_keys(*seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 64, _ROUNDS, np.uint64)


def _feistel(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A Feistel network over the numbers below `size`, written in two digits of base about √size.

    In turn each digit is moved by a hash of the other, which can be undone, so that no two places meet (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains", generalised Feistel). There are a few more numbers of two
    such digits than `size`; what falls among those goes through again until it does not (cycle walking).
    """
    base = math.isqrt(size - 1) + 1
    rows = -(-size // base)
    x = np.asarray(places, np.uint64)
    found, walking = x.copy(), np.ones(x.shape, bool)
    while walking.any():
        high, low = np.divmod(found[walking], np.uint64(base))
        for number, key in enumerate(keys):
            if number % 2:
                high = (high + _hashed(low ^ key) % np.uint64(rows)) % np.uint64(rows)
            else:
                low = (low + _hashed(high ^ key) % np.uint64(base)) % np.uint64(base)
        found[walking] = high * np.uint64(base) + low
        walking = found >= size
    return found


def _hashed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): bits that depend on all bits of `x`; wraps around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
        parts = [shuffled(place[turn == each], self.num_samples, *seed, int(each)) for each in np.unique(turn)]
        return np.concatenate(parts)

    def draw(self, epoch: int, place: int, *seed: int) -> Draw:
        """Draw number `place` of an epoch."""
        if self.weight == 1:
            return Draw(place, epoch)  # the shuffle of the epoch is order enough
        turn, place_in_turn = divmod(epoch * self.draws + place, self.num_samples)
        return Draw(int(shuffled(np.array([place_in_turn]), self.num_samples, *seed, turn)[0]), turn)


class Order(Protocol):
    """Another order of the samples of an epoch than one that is shuffled over all of them."""

    def rows(self, place_P: np.ndarray, machines: int, *seed: int) -> np.ndarray:
        """The row that comes at each of these places."""
        ...

    def by_machine(self, place_P: np.ndarray, machines: int) -> np.ndarray:
        """The same places, those that the first machine should have first, in equal shares."""
        ...


class Origin(NamedTuple):
    """Where batches of the present size begin: at the first sample of all, or where a run went on with another size.

    Attributes:
        epoch: of the first of these batches.
        batches: of that epoch, made before, of other sizes.
        seen: draws of fresh samples in them, of all ranks together.
        replayed: draws of the replay stream in all batches before, of all ranks together.
        machines: that the order of that epoch is for; 0: as many as there are.
    """

    epoch: int = 0
    batches: int = 0
    seen: int = 0
    replayed: int = 0
    machines: int = 0


BEGINNING = Origin()


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
        order: of an epoch; None: shuffled over all.
        machines: on which the ranks are, the same number on each.
        since: where batches of this size begin.
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
    order: Order | None = None
    machines: int = 1
    since: Origin = BEGINNING

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
    def _whole(self) -> tuple[int, int]:
        return self._cut(self.draws)

    @cached_property
    def _rest(self) -> tuple[int, int]:
        return self._cut(self.draws - self.since.seen)

    def _cut(self, draws: int) -> tuple[int, int]:
        """Batches that so many draws make, and the fresh samples of the last."""
        whole, rest = divmod(draws, self.fresh * self.world_size)
        last = rest // self.world_size
        if last * self.world_size >= 2 or not whole:
            return whole + 1, last
        return whole, self.fresh + last

    def _ends(self, epoch: int) -> tuple[int, int]:
        """Number of the batch behind the last of an epoch, and the fresh samples of the last."""
        if epoch != self.since.epoch:
            return self._whole
        batches, last = self._rest
        return self.since.batches + batches, last

    def __len__(self) -> int:
        """Batches a whole epoch."""
        return self._whole[0]

    def batches(self, epoch: int) -> int:
        """Batches of one epoch, those of other sizes included."""
        return self._ends(epoch)[0]

    def after(self, epoch: int, number: int) -> tuple[int, int]:
        """Epoch and number of the batch that comes after so many batches of an epoch."""
        return (epoch, number) if number < self.batches(epoch) else (epoch + 1, 0)

    def batch(self, epoch: int, number: int) -> list[Draw]:
        """The samples of one batch, fresh ones first."""
        draws = [self._fresh(int(each), epoch) for each in self._shuffled(self.places(epoch, number), epoch)]
        return draws + (self._replay(epoch, number) if self.replay else [])

    def places(self, epoch: int, number: int) -> np.ndarray:
        """The places in an epoch's order of the fresh samples of one batch."""
        whole = self._places_of_all(epoch, number)
        return whole.reshape(self.world_size, -1)[self.rank]

    def places_of_machine(self, epoch: int, number: int) -> np.ndarray:
        """Those of all ranks that are on the same machine."""
        whole = self._places_of_all(epoch, number)
        return whole.reshape(self.machines, -1)[self.rank * self.machines // self.world_size]

    def _places_of_all(self, epoch: int, number: int) -> np.ndarray:
        size = self._ends(epoch)[1] if number == self.batches(epoch) - 1 else self.fresh
        whole = self.seen(epoch, number) + np.arange(size * self.world_size)
        return self.order.by_machine(whole, self.machines_of(epoch)) if self.order else whole

    def machines_of(self, epoch: int) -> int:
        """Machines that an epoch's order is for: as many as there are when it begins."""
        return (self.since.machines if epoch == self.since.epoch else 0) or self.machines

    def _shuffled(self, places: np.ndarray, epoch: int) -> np.ndarray:
        if self.arrangement:
            return _arranged(self, epoch)[places]
        if self.order:
            return self.order.rows(places, self.machines_of(epoch), self.seed, epoch)
        return shuffled(places, self.draws, self.seed, epoch)

    def seen(self, epoch: int, number: int) -> int:
        """Draws of an epoch before one of its batches, of all ranks together."""
        first = self.since if epoch == self.since.epoch else BEGINNING
        return first.seen + (number - first.batches) * self.fresh * self.world_size

    def origin(self, epoch: int, number: int, rest: int) -> Origin:
        """The place of a batch, for a schedule that goes on from there with other batches of the same samples.

        Args:
            epoch: of the batch.
            number: of the batch.
            rest: draws that are to be left of the epoch at least; for a contrast, it begins a few samples earlier.
        """
        replayed = self._replayed(epoch, number)
        if not number:
            return Origin(epoch, replayed=replayed)
        seen = max(0, min(self.seen(epoch, number), self.draws - rest))
        return Origin(epoch, number, seen, replayed, self.machines_of(epoch))

    @property
    def sizes(self) -> list[int]:
        """Fresh samples of each batch of an epoch, of all ranks together."""
        return [*[self.fresh * self.world_size] * (len(self) - 1), self._whole[1] * self.world_size]

    def meetings(self, epoch: int) -> int:
        """Samples that are in a batch with one that has an equal value of the arrangement."""
        assert self.arrangement is not None
        return meetings(self.arrangement.value[self.rows(epoch)[_arranged(self, epoch)]], self.sizes)

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

    def _replayed(self, epoch: int, number: int) -> int:
        """Draws of the replay stream before a batch, of all ranks together."""
        rest = self.since.batches if epoch == self.since.epoch else 0
        before = 0
        if epoch > self.since.epoch:
            before = self._replay_of(self._rest) + (epoch - self.since.epoch - 1) * self._replay_of(self._whole)
        return self.since.replayed + (before + (number - rest) * self.replayed) * self.world_size

    def _replay_of(self, ends: tuple[int, int]) -> int:
        """Replayed samples a rank in so many batches, of which the last has so many fresh samples."""
        batches, last = ends
        return (batches - 1) * self.replayed + self._last_replay(last) if self.replay else 0

    def _last_replay(self, fresh: int) -> int:
        return max(1, round(fresh * self.replayed / self.fresh))

    def _replay(self, epoch: int, number: int) -> list[Draw]:
        """The next samples of the endless replay stream, in every batch the same share."""
        end, last = self._ends(epoch)
        count = self._last_replay(last) if number == end - 1 else self.replayed
        start = self._replayed(epoch, number) + self.rank * count
        draws = []
        for place in range(start, start + count):
            turn, place_in_turn = divmod(place, self.num_replay)
            row = shuffled(np.array([place_in_turn]), self.num_replay, self.seed, turn, 1)[0]
            draws.append(Draw(self.num_samples + int(row), turn))
        return draws

    # --- going on ---

    @property
    def manner(self) -> dict[str, Any]:
        """What decides how an order of samples is cut into batches."""
        manner = {"batch_size": self.batch_size, "replay": self.replay, "world_size": self.world_size}
        return manner | ({"machines": self.machines} if self.order else {})

    def going_on(self, since: Origin, manner: dict[str, Any], epoch: int, number: int) -> Schedule:
        """This schedule, going on where one over the same samples stood: at its batch, or at that batch's first sample.

        Args:
            since: of the other.
            manner: of the other, which may differ.
            epoch: where it stood.
            number: of the batch that would have come next.

        Raises:
            ConfigError: the manner differs, and what comes together hangs on it.
        """
        if manner == self.manner:
            return replace(self, since=since)
        if self.arrangement:
            told = ", ".join(f"{name} {value}" for name, value in manner.items())
            raise ConfigError(
                f"data.batches: {self.arrangement.kind}: which samples come together hangs on the size of batches, so "
                f"it goes on as it was only ({told}); or shuffled"
            )
        was = {"machines": 1} | manner
        old = replace(self, since=since, rank=0, **was)
        return replace(self, since=old.origin(epoch, number, rest=2 * self.world_size))


@lru_cache(maxsize=2)
def _arranged(schedule: Schedule, epoch: int) -> np.ndarray:
    """The draws of an epoch, shuffled and then arranged."""
    assert schedule.arrangement is not None
    order = shuffled(np.arange(schedule.draws), schedule.draws, schedule.seed, epoch)
    return order[schedule.arrangement(schedule.rows(epoch)[order], schedule.sizes, (schedule.seed, epoch, 3))]
