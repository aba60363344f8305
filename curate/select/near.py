"""64-bit hashes within a Hamming distance, exactly: the nearest of each, and the groups they link into. numpy alone.

Cut the 64 bits into b blocks. Two hashes that differ in at most d bits agree in all bits of at least b − d blocks. So
for each choice of b − d blocks, sort the hashes by these blocks' bits, and count the bits between those that agree in
them (Manku, Jain & Das Sarma, "Detecting near-duplicates for web crawling", 2007). More blocks: more sorts, and fewer
pairs to look at in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from math import comb

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

BITS = 64
# Pairs looked at in one go: what bounds the memory.
_BLOCK = 1 << 22
# What sorting one hash costs, in pairs looked at.
_SORT = 12.0


def nearest(queries: Hashes, base: Hashes, distance: int) -> tuple[Ints, Ints]:
    """Of each query, the nearest of the base within `distance` bits: how many bits, and which; −1 where none is.

    Of equally near ones, the first. Memory is a few times that of the hashes, however many pairs there are.
    """
    none = np.iinfo(np.int64).max
    best = np.full(len(queries), none)  # bits · base + place: the least is the nearest, and the first of them
    for i, j in _near_blocks(queries, base, distance):
        np.minimum.at(best, i, _popcount(queries[i] ^ base[j]).astype(np.int64) * len(base) + j)
    found = best != none
    bits, place = np.divmod(best, max(1, len(base)))
    return np.where(found, bits, -1), np.where(found, place, -1)


def near_groups(hashes: Hashes, distance: int) -> Ints:
    """The smallest member of each hash's group: all that is linked, directly or through others, by near pairs.

    Memory is a few times that of the hashes, however many pairs there are.
    """
    label = np.arange(len(hashes), dtype=np.int64)
    for key in _keys(len(hashes), len(hashes), distance):
        if key is None:
            for i, j in _all_pairs(hashes, hashes):
                near = _popcount(hashes[i] ^ hashes[j]) <= distance
                label = link(label, i[near], j[near])
            continue
        keys = key(hashes)
        order = np.argsort(keys)
        keys, sorted_hashes = keys[order], hashes[order]
        for place, step in _neighbours(keys):
            near = _popcount(sorted_hashes[place] ^ sorted_hashes[place + step]) <= distance
            label = link(label, order[place[near]], order[place[near] + step])
    return label


def link(label: Ints, a: Ints, b: Ints) -> Ints:
    """Labels in which a[n] and b[n] are of one group; each label is the smallest member of its group.

    Args:
        label: of the groups so far, such that label[label] = label.
        a: one end of each new link.
        b: the other.
    """
    a, b = label[a], label[b]
    apart = a != b
    if not apart.any():
        return label
    nodes, ends = np.unique(np.concatenate([a[apart], b[apart]]), return_inverse=True)
    half = len(ends) // 2
    label[nodes] = nodes[connected_components(ends[:half], ends[half:], len(nodes))]
    return label[label]


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


def _near_blocks(queries: Hashes, base: Hashes, distance: int) -> Iterator[tuple[Ints, Ints]]:
    """The near pairs, a block at a time; a pair may come several times."""
    for key in _keys(len(queries), len(base), distance):
        candidates = _all_pairs(queries, base) if key is None else _matches(key(queries), key(base))
        for i, j in candidates:
            near = _popcount(queries[i] ^ base[j]) <= distance
            yield i[near], j[near]


Key = Callable[[Hashes], Hashes]


def _keys(num_queries: int, num_base: int, distance: int) -> Iterator[Key | None]:
    """Functions under one of which any two near hashes are equal; None alone where comparing all with all is less."""
    costs = []
    for num_blocks in range(distance + 1, min(BITS, distance + 8) + 1):
        bits = BITS * (num_blocks - distance) / num_blocks
        pairs = num_queries * num_base / 2**bits
        costs.append((comb(num_blocks, distance) * (_SORT * (num_queries + num_base) + pairs), num_blocks))
    cost, num_blocks = min(costs, default=(float("inf"), 0))
    if cost >= num_queries * num_base:
        yield None
        return
    edges = [BITS * block // num_blocks for block in range(num_blocks + 1)]
    for chosen in combinations(list(pairwise(edges)), num_blocks - distance):
        mask = sum(((1 << (high - low)) - 1) << low for low, high in chosen)
        yield lambda hashes, mask=mask: hashes & np.uint64(mask)  # type: ignore[misc]


def _all_pairs(queries: Hashes, base: Hashes) -> Iterator[tuple[Ints, Ints]]:
    step = max(1, _BLOCK // max(1, len(base)))
    for start in range(0, len(queries), step):
        part = np.arange(start, min(start + step, len(queries)), dtype=np.int64)
        yield np.repeat(part, len(base)), np.tile(np.arange(len(base), dtype=np.int64), len(part))


def _neighbours(keys: Hashes) -> Iterator[tuple[Ints, int]]:
    """Every pair of places with equal keys, of sorted keys: the first places, and how much further the second ones are.

    The k-th step pairs each place with the k-th after it; what is equal there was equal in all steps before.
    """
    place, step = np.flatnonzero(keys[1:] == keys[:-1]), 1
    while len(place):
        for start in range(0, len(place), _BLOCK):
            yield place[start : start + _BLOCK], step
        step += 1
        place = place[: np.searchsorted(place, len(keys) - step)]
        place = place[keys[place + step] == keys[place]]


def _matches(queries: Hashes, base: Hashes) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of each query and every base key that is equal, about _BLOCK at a time."""
    order = np.argsort(base)
    sorted_base = base[order]
    starts = np.searchsorted(sorted_base, queries, side="left")
    counts = np.searchsorted(sorted_base, queries, side="right") - starts
    ends = np.cumsum(counts)
    num_pairs = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(_BLOCK, num_pairs + _BLOCK, _BLOCK), side="right")
    for first, last in zip([0, *cuts[:-1]], [*cuts[:-1], len(queries)], strict=True):
        here = counts[first:last]
        i = np.repeat(np.arange(first, last, dtype=np.int64), here)
        within = np.arange(len(i), dtype=np.int64) - np.repeat(np.cumsum(here) - here, here)
        yield i, order[starts[i] + within]


def _bits_by_fields(words: Hashes) -> Hashes:
    """Ones in each word, by adding neighbouring fields of 1, 2, 4 and then 8 bits."""
    u = np.uint64
    words = words - ((words >> u(1)) & u(0x5555555555555555))
    words = (words & u(0x3333333333333333)) + ((words >> u(2)) & u(0x3333333333333333))
    words = (words + (words >> u(4))) & u(0x0F0F0F0F0F0F0F0F)
    return (words * u(0x0101010101010101)) >> u(56)


# NumPy 2 has it in C.
_popcount: Callable[[Hashes], npt.NDArray[np.unsignedinteger]] = getattr(np, "bitwise_count", _bits_by_fields)
