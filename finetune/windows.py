"""The order of samples that are far away: shard after shard, shuffled within windows, dealt out to machines.

Only the shards of one window need be here at once, and the next ones on their way. The shards come in an order that is
drawn for each epoch; as many as hold a window's samples are put together, and those samples shuffled among themselves.
So an epoch is every sample once, and what comes where is a pure function of (seed, epoch, place), as in
finetune/schedule.py.

Several machines go through the order in as many parts at once, so that each fetches the shards of its own part alone.
Places take turns: place p of M machines is the next one of part p mod M. A batch is so the same share of each part.

Axes: S shards, W windows, P places in an epoch's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from finetune.schedule import permutation, shuffled

if TYPE_CHECKING:
    import pyarrow as pa

# Streams of random numbers beside those of the schedule. (Of seeds zeros at the end do not count.)
_OF_SHARDS, _OF_WINDOWS = 4, 5


@dataclass(frozen=True, eq=False)
class Windows:
    """The shards of an index, and how many samples are shuffled together.

    Attributes:
        borders: (S + 1,) the row at which each shard begins, and the number of rows.
        files: (S,) the number of its file.
        size: samples of a window at least, but for the last.
    """

    borders: np.ndarray
    files: np.ndarray
    size: int

    @classmethod
    def of(cls, files: pa.ChunkedArray, size: int) -> Windows:
        """Of an index with these numbers of files (N,), in which the rows of a file stand together."""
        borders = run_borders(files)
        return cls(borders, files.take(borders[:-1]).to_numpy(), size)

    def rows(self, place_P: np.ndarray, machines: int, *seed: int) -> np.ndarray:
        """The row (P,) that comes at each of these places of the epoch with this seed."""
        cut = _cut(self, machines, *seed)
        at_P = self._in_parts(place_P, machines)
        window_P = np.searchsorted(cut.start_of_window, at_P, side="right") - 1
        moved_P = np.empty(len(place_P), np.int64)
        for window in np.unique(window_P):
            here = window_P == window
            first, end = (int(each) for each in cut.start_of_window[window : window + 2])
            within = shuffled(at_P[here] - first, end - first, *seed, _OF_WINDOWS, int(window))
            moved_P[here] = first + within.astype(np.int64)
        shard_P = np.searchsorted(cut.start, moved_P, side="right") - 1
        rows: np.ndarray = self.borders[cut.shard[shard_P]] + moved_P - cut.start[shard_P]
        return rows

    def by_machine(self, place_P: np.ndarray, machines: int) -> np.ndarray:
        """The same places, those of the first machine's part first."""
        part_P = self._in_parts(place_P, machines) // max(1, self._part(machines))
        return place_P[np.argsort(np.minimum(part_P, machines - 1), kind="stable")]

    def needed(self, place_P: np.ndarray, machines: int, *seed: int) -> np.ndarray:
        """Numbers of the files of the windows that have these places, and behind them of the next windows.

        Where the places of a part are in two windows, the second is the next one of the first.
        """
        cut = _cut(self, machines, *seed)
        at_P = self._in_parts(place_P, machines)
        here = np.unique(np.searchsorted(cut.start_of_window, at_P, side="right") - 1)
        starts_part, ends_part = (np.isin(cut.start_of_window[each], cut.end_of_part) for each in (here, here + 1))
        first = starts_part | ~np.isin(here - 1, here)
        following = here[first & ~ends_part] + 1
        spans = [cut.start_of_window[window : window + 2] for window in dict.fromkeys([*here, *following])]
        shards = [
            cut.shard[np.searchsorted(cut.start, first, side="right") - 1 : np.searchsorted(cut.start, end)]
            for first, end in spans
        ]
        return self.files[np.concatenate(shards)]

    def _part(self, machines: int) -> int:
        """Samples of each machine's part; of the last, which has what is left over, at least."""
        return int(self.borders[-1]) // machines

    def _in_parts(self, place_P: np.ndarray, machines: int) -> np.ndarray:
        """Where these places are, where one part comes after the other."""
        size = self._part(machines)
        turn_P, part_P = np.divmod(place_P, machines)
        return np.where(turn_P < size, part_P * size + turn_P, place_P)


def run_borders(values_N: pa.ChunkedArray) -> np.ndarray:
    """Where each run of equal values begins, and the last ends."""
    import pyarrow.compute as pc

    runs = pc.run_end_encode(values_N.combine_chunks())
    return np.concatenate([[0], runs.run_ends.to_numpy().astype(np.int64)])


class _Cut(NamedTuple):
    """An epoch's shards in their order (S,), the places at which they and the windows begin and end, and parts end."""

    shard: np.ndarray
    start: np.ndarray
    start_of_window: np.ndarray
    end_of_part: np.ndarray


@lru_cache(maxsize=4)
def _cut(windows: Windows, machines: int, *seed: int) -> _Cut:
    shard = permutation(len(windows.borders) - 1, *seed, _OF_SHARDS)
    start = np.concatenate([[0], np.cumsum(np.diff(windows.borders)[shard])])
    end_of_part = np.append(np.arange(1, machines) * windows._part(machines), start[-1])
    starts = [0]
    for end in end_of_part:
        while starts[-1] < end:
            whole = np.searchsorted(start, starts[-1] + windows.size)
            starts.append(min(int(end), int(start[min(int(whole), len(start) - 1)])))
    return _Cut(shard, start, np.array(starts), end_of_part)
