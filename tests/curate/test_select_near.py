import time

import numpy as np
import pytest

from curate.select.near import connected_components, link, near_groups, nearest


def hashes_with_neighbours(seed, size, flips):
    """Random hashes, and copies of half of them with up to `flips` bits flipped."""
    random = np.random.default_rng(seed)
    fresh = random.integers(0, 2**64, size, dtype=np.uint64)
    copies = fresh[: size // 2].copy()
    for _ in range(flips):
        copies ^= np.where(random.random(len(copies)) < 0.7, 1, 0).astype(np.uint64) << random.integers(
            0, 64, len(copies), dtype=np.uint64
        )
    return np.concatenate([fresh, copies])


def brute_force(queries, base, distance):
    differing = np.array([[(int(a) ^ int(b)).bit_count() for b in base] for a in queries]).reshape(
        len(queries), len(base)
    )
    i, j = np.nonzero(differing <= distance)
    return i, j, differing[i, j]


def nearest_of(pairs, size):
    """Bits and place of each query's nearest, the first of equals; −1 where there is none."""
    expected = [(-1, -1)] * size
    for i, j, bits in sorted(zip(*(part.tolist() for part in pairs), strict=True), key=lambda pair: (pair[2], pair[1])):
        if expected[i] == (-1, -1):
            expected[i] = (bits, j)
    return expected


@pytest.mark.parametrize("distance", [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 31, 64])
@pytest.mark.parametrize("size", [40, 400])
def test_the_nearest_within_a_distance_is_that_of_comparing_all_with_all(distance, size):
    base = hashes_with_neighbours(distance, size, flips=9)
    base = np.concatenate([base, base[:7]])  # equally near: the first is meant
    queries = base[::3] ^ np.uint64(1)
    found = nearest(queries, base, distance)
    expected = nearest_of(brute_force(queries, base, distance), len(queries))
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected


@pytest.mark.parametrize("distance", [0, 4, 6])
def test_the_nearest_is_found_where_many_hashes_share_their_bands(distance):
    random = np.random.default_rng(1)
    base = random.integers(0, 2**14, 3_000, dtype=np.uint64)  # 50 equal bits: all in one bucket of most bands
    found = nearest(base[:200], base, distance)
    expected = nearest_of(brute_force(base[:200], base, distance), 200)
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_nothing_is_near_nothing(sizes):
    queries, base = (np.arange(size, dtype=np.uint64) for size in sizes)
    assert [part.tolist() for part in nearest(queries, base, 6)] == [[-1] * len(queries)] * 2


def slow_components(edges, size):
    label = list(range(size))
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(label[a], label[b])
            changed |= label[a] != low or label[b] != low
            label[a] = label[b] = low
    return label


@pytest.mark.parametrize("seed", range(8))
def test_components_are_those_of_spreading_the_smallest_label(seed):
    random = np.random.default_rng(seed)
    a, b = random.integers(0, 120, (2, 20 * seed))
    assert connected_components(a, b, 120).tolist() == slow_components(list(zip(a, b, strict=True)), 120)


def test_a_long_chain_is_one_component():
    order = np.random.default_rng(0).permutation(20_000)
    assert not connected_components(order[:-1], order[1:], 20_000).any()


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 6, 9, 20])
@pytest.mark.parametrize("kind", ["spread", "crowded"])
def test_groups_are_the_components_of_all_near_pairs(distance, kind):
    crowded = np.random.default_rng(2).integers(0, 2**12, 500, dtype=np.uint64) << np.uint64(30)
    hashes = np.unique(hashes_with_neighbours(distance, 300, flips=6) if kind == "spread" else crowded)
    i, j, _ = brute_force(hashes, hashes, distance)
    expected = slow_components(list(zip(i.tolist(), j.tolist(), strict=True)), len(hashes))
    assert near_groups(hashes, distance).tolist() == expected


def test_links_come_bit_by_bit_and_the_smallest_member_names_the_group():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 500, (2, 300))
    label = np.arange(500)
    for part in range(0, 300, 7):
        label = link(label, a[part : part + 7], b[part : part + 7])
    assert label.tolist() == slow_components(list(zip(a, b, strict=True)), 500)


def test_a_crowd_of_a_million_pairs_and_many_more_strangers_take_bounded_memory():
    import tracemalloc

    random = np.random.default_rng(0)
    crowd = random.integers(0, 2**11, 2_000, dtype=np.uint64)  # 53 equal bits
    hashes = np.unique(np.concatenate([random.integers(2**63, 2**64, 200_000, dtype=np.uint64), crowd]))
    tracemalloc.start()
    label = near_groups(hashes, 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(label[hashes < 2**11])) == 1
    assert peak < 300e6, f"{peak / 1e6:.0f} MB"


def test_the_nearest_of_two_hundred_thousand_hashes_in_bounded_memory():
    import tracemalloc

    every = hashes_with_neighbours(0, 133_334, flips=2)
    fresh, copies = every[:133_334], every[133_334:]
    crowd = np.random.default_rng(0).integers(0, 2**9, 300, dtype=np.uint64)  # most of its 90,000 pairs are near
    tracemalloc.start()
    started = time.process_time()
    bits, place = nearest(np.concatenate([copies, crowd]), np.concatenate([fresh, crowd]), 6)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(place[:66_667], np.arange(66_667))
    assert bits[:66_667].max() <= 2
    first = {int(word): number for number, word in reversed(list(enumerate(crowd)))}
    assert place[66_667:].tolist() == [133_334 + first[int(word)] for word in crowd]
    assert peak < 300e6, f"{peak / 1e6:.0f} MB"
    assert seconds < 60
