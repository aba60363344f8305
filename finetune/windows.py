"""The order of samples that are far away: shard after shard, shuffled within windows.

Only the shards of one window need be here at once, and the next ones on their way. The shards come in an order that is
drawn for each epoch; as many as hold a window's samples are put together, and those samples shuffled among themselves.
So an epoch is every sample once, and what comes where is a pure function of (seed, epoch, place), as in
finetune/schedule.py.

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
        import pyarrow.compute as pc

        runs = pc.run_end_encode(files.combine_chunks())
        ends = runs.run_ends.to_numpy().astype(np.int64)
        return cls(np.concatenate([[0], ends]), runs.values.to_numpy(), size)

    def rows(self, place_P: np.ndarray, *seed: int) -> np.ndarray:
        """The row (P,) that comes at each of these places of the epoch with this seed."""
        cut = _cut(self, *seed)
        window_P = np.searchsorted(cut.start_of_window, place_P, side="right") - 1
        moved_P = np.empty(len(place_P), np.int64)
        for window in np.unique(window_P):
            here = window_P == window
            first, end = (int(each) for each in cut.start_of_window[window : window + 2])
            within = shuffled(place_P[here] - first, end - first, *seed, _OF_WINDOWS, int(window))
            moved_P[here] = first + within.astype(np.int64)
        at_P = np.searchsorted(cut.start, moved_P, side="right") - 1
        rows: np.ndarray = self.borders[cut.shard[at_P]] + moved_P - cut.start[at_P]
        return rows

    def needed(self, place: int, *seed: int) -> np.ndarray:
        """Numbers of the files of the window that has this place, then of the next window."""
        cut = _cut(self, *seed)
        window = int(np.searchsorted(cut.start_of_window, place, side="right")) - 1
        ends = cut.start_of_window[window : window + 3]
        first, end = np.searchsorted(cut.start, ends[[0, -1]])
        return self.files[cut.shard[first:end]]


class _Cut(NamedTuple):
    """The shards of an epoch in their order (S,), and the places at which they and the windows begin and end."""

    shard: np.ndarray
    start: np.ndarray
    start_of_window: np.ndarray


@lru_cache(maxsize=4)
def _cut(windows: Windows, *seed: int) -> _Cut:
    shard = permutation(len(windows.borders) - 1, *seed, _OF_SHARDS)
    start = np.concatenate([[0], np.cumsum(np.diff(windows.borders)[shard])])
    starts = [0]
    while starts[-1] < start[-1]:
        end = int(np.searchsorted(start, starts[-1] + windows.size))
        starts.append(int(start[min(end, len(start) - 1)]))
    return _Cut(shard, start, np.array(starts))
