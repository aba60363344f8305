"""All pairs of 64-bit hashes within a Hamming distance, exactly, and the groups they link into. numpy alone.

Multi-index hashing (Norouzi, Punjani & Fleet 2012): cut the 64 bits into m bands; two hashes that differ in at most d
bits differ in at most ⌊d / m⌋ bits of some band. So look each hash up in m tables, under every value that near its
own band, and count the bits of what is found there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from math import comb

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

BITS = 64
# Pairs looked at in one go: what bounds the memory.
_BLOCK = 1 << 21
# A band's table has 2^width places.
_WIDEST_BAND = 22


def near_pairs(queries: Hashes, base: Hashes, distance: int) -> tuple[Ints, Ints, Ints]:
    """Every pair (i, j) with at most `distance` bits between queries[i] and base[j].

    Returns:
        i, j and the distance, sorted by (i, j).
    """
    num_bands, cost = _best_bands(len(base), distance)
    find = _all_pairs(queries, base) if cost >= len(base) else _band_pairs(queries, base, num_bands, distance)
    found = [np.zeros(0, np.int64)]
    for i, j in find:
        near = _popcount(queries[i] ^ base[j]) <= distance
        found.append(i[near] * len(base) + j[near])
    pairs = np.unique(np.concatenate(found))
    i, j = np.divmod(pairs, max(1, len(base)))
    return i, j, _popcount(queries[i] ^ base[j])


def connected_components(a: Ints, b: Ints, size: int) -> Ints:
    """The smallest member of each node's component, in the graph over 0 … size-1 with the edges (a[i], b[i])."""
    label = np.arange(size, dtype=np.int64)
    while not np.array_equal(label[a], label[b]):
        lower = np.minimum(label[a], label[b])
        np.minimum.at(label, label[a], lower)
        np.minimum.at(label, label[b], lower)
        while not np.array_equal(label, label[label]):
            label = label[label]
    return label


def _best_bands(num_base: int, distance: int) -> tuple[int, float]:
    """How many bands give the least work for one query, and how many base hashes that work is like comparing."""
    costs = []
    for num_bands in range(-(-BITS // _WIDEST_BAND), BITS // 8 + 1):
        width, radius = BITS // num_bands, distance // num_bands
        probes = sum(comb(width, flips) for flips in range(radius + 1))
        costs.append((num_bands * probes * (1 + num_base / 2**width), num_bands))
    cost, num_bands = min(costs)
    return num_bands, cost


def _all_pairs(queries: Hashes, base: Hashes) -> Iterator[tuple[Ints, Ints]]:
    step = max(1, _BLOCK // max(1, len(base)))
    for start in range(0, len(queries), step):
        part = np.arange(start, min(start + step, len(queries)), dtype=np.int64)
        yield np.repeat(part, len(base)), np.tile(np.arange(len(base), dtype=np.int64), len(part))


def _band_pairs(queries: Hashes, base: Hashes, num_bands: int, distance: int) -> Iterator[tuple[Ints, Ints]]:
    edges = [BITS * band // num_bands for band in range(num_bands + 1)]
    for low, high in pairwise(edges):
        width = high - low
        band_of_base, band_of_query = _band(base, low, width), _band(queries, low, width)
        order = np.argsort(band_of_base, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(band_of_base, minlength=1 << width))])
        for mask in _masks(width, distance // num_bands):
            yield from _lookups(band_of_query ^ mask, order, starts)


def _band(hashes: Hashes, low: int, width: int) -> Ints:
    return ((hashes >> np.uint64(low)) & np.uint64((1 << width) - 1)).astype(np.int64)


def _masks(width: int, radius: int) -> Iterator[int]:
    """Every number of `width` bits with at most `radius` ones."""
    for flips in range(radius + 1):
        for bits in combinations(range(width), flips):
            yield sum(1 << bit for bit in bits)


def _lookups(values: Ints, order: Ints, starts: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of each query and every base hash that stands under its value, at most about _BLOCK at a time."""
    counts = starts[values + 1] - starts[values]
    ends = np.cumsum(counts)
    num_pairs = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(_BLOCK, num_pairs + _BLOCK, _BLOCK), side="right")
    for first, last in zip([0, *cuts[:-1]], [*cuts[:-1], len(values)], strict=True):
        here = counts[first:last]
        i = np.repeat(np.arange(first, last, dtype=np.int64), here)
        within = np.arange(len(i), dtype=np.int64) - np.repeat(np.cumsum(here) - here, here)
        yield i, order[starts[values[i]] + within]


def _popcount(words: Hashes) -> Ints:
    """Ones in each word, by adding neighbouring fields of 1, 2, 4 and then 8 bits."""
    u = np.uint64
    words = words - ((words >> u(1)) & u(0x5555555555555555))
    words = (words & u(0x3333333333333333)) + ((words >> u(2)) & u(0x3333333333333333))
    words = (words + (words >> u(4))) & u(0x0F0F0F0F0F0F0F0F)
    return ((words * u(0x0101010101010101)) >> u(56)).astype(np.int64)
