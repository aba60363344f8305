"""How the samples of an epoch are put into batches, where that is not by chance alone (data.batches).

    without_twins     samples that say the same, or are duplicates, come into different batches: none is another's
                      negative, and no batch is smaller than it seems
    by_length         captions of like length together: less padding where they are not packed
    hard_negatives    neighbours by stored embeddings together: what is hard to tell apart is contrasted more

Each is a rearrangement of the epoch's own shuffled order, every sample once, and a pure function of it: so it depends
on (seed, epoch) alone, is the same for all ranks, and can be gone on with from any batch.

Axes: N rows of the index, P places in an epoch's order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curate.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

POOL = 64  # batches whose samples are sorted together by length
CLUSTERS_A_BATCH, MOST_CLUSTERS = 4, 1024


@dataclass(frozen=True, eq=False)
class Arrangement:
    """What decides which samples come together.

    Attributes:
        kind: as data.batches.
        value: (N,) of each row: its group of twins, its length, or its cluster.
    """

    kind: str
    value: np.ndarray

    def __call__(self, row_P: np.ndarray, sizes: Sequence[int], seed: Sequence[int]) -> np.ndarray:
        """Places in their new order, so that each batch is a slice of it.

        Args:
            row_P: the rows of an epoch, shuffled.
            sizes: of its batches; all are alike but the last. What is left over stays at the end.
            seed: of the order of batches.
        """
        return RULES[self.kind](self.value[row_P], np.asarray(sizes), np.random.default_rng(seed))

    @property
    def digest(self) -> str:
        """Changes with the values."""
        return hashlib.blake2b(np.ascontiguousarray(self.value).tobytes(), digest_size=16).hexdigest()


def deal_out(value_P: np.ndarray, sizes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Equal values into different batches, as far as there are as many batches as they are samples.

    The samples are dealt out like cards, equal ones in a row, to the batches in turn. Any run of fewer samples than
    there are batches so falls into different ones; a longer one is spread evenly.
    """
    number, total = len(sizes), int(sizes.sum())
    turn = np.append(random.permutation(number - 1), number - 1)  # the last batch, of another size, has the last turn
    batch = np.repeat(np.arange(number), sizes)
    start = np.cumsum(sizes) - sizes
    place_in_batch = np.arange(total) - start[batch]
    # A smaller last batch comes in later, a larger one has begun before: all end together.
    slots = np.lexsort((turn[batch], place_in_batch - sizes[batch]))
    dealt = _together(value_P)
    found = dealt.copy()
    found[slots] = dealt[:total]
    return found


def sort_in_pools(value_P: np.ndarray, sizes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Like values into one batch, of those in the same 64 batches of the shuffled order."""
    pool = np.arange(len(value_P)) // max(1, POOL * int(sizes[0]))
    return _shuffle_batches(np.lexsort((value_P, pool)), sizes, random)


def keep_together(value_P: np.ndarray, sizes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Equal values into one batch, and on into the next where they are too many."""
    return _shuffle_batches(_together(value_P), sizes, random)


RULES: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "without_twins": deal_out,
    "by_length": sort_in_pools,
    "hard_negatives": keep_together,
}


def _together(value_P: np.ndarray) -> np.ndarray:
    """Places by value, the values in the order in which they first come."""
    _, first, inverse = np.unique(value_P, return_index=True, return_inverse=True)
    return np.argsort(first[inverse], kind="stable")


def _shuffle_batches(order: np.ndarray, sizes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The batches in another order, but for the last, which has a size of its own."""
    size, number = int(sizes[0]), len(sizes) - 1
    whole = order[: size * number].reshape(number, size)
    return np.concatenate([whole[random.permutation(number)].ravel(), order[size * number :]])


def meetings(value_P: np.ndarray, sizes: Sequence[int]) -> int:
    """Samples that come into a batch in which an equal value is already."""
    batch = np.repeat(np.arange(len(sizes)), sizes)
    pairs = np.stack([batch, value_P[: len(batch)]])
    return len(batch) - np.unique(pairs, axis=1).shape[1]


# --- values ----------------------------------------------------------------------------------------------------------


def twin_groups(table: pa.Table) -> np.ndarray:
    """A number (N,) that samples have in common which share a caption or a duplicate group, directly or by others."""
    import pyarrow.compute as pc

    captions = table["captions"].combine_chunks()
    said = pc.utf8_lower(pc.utf8_trim_whitespace(captions.flatten()))
    edges = [(pc.list_parent_indices(captions).to_numpy(), _codes(said))]
    groups = table["duplicate_group"].combine_chunks()
    known = np.flatnonzero(groups.is_valid().to_numpy(zero_copy_only=False))
    edges.append((known, _codes(groups.drop_null())))
    label_N = np.arange(table.num_rows)
    while True:
        before = label_N.copy()
        for row, code in edges:
            if len(row):
                lowest = np.full(code.max() + 1, table.num_rows)
                np.minimum.at(lowest, code, label_N[row])
                np.minimum.at(label_N, row, lowest[code])
        if np.array_equal(before, label_N):
            return label_N


def _codes(values: pa.Array) -> np.ndarray:
    return np.asarray(values.dictionary_encode().indices)


def caption_sizes(table: pa.Table) -> np.ndarray:
    """Letters (N,) of each sample's captions, of several their mean: what needs no tokenizer to be known."""
    import pyarrow.compute as pc

    captions = table["captions"].combine_chunks()
    letters = pc.utf8_length(captions.flatten()).to_numpy(zero_copy_only=False)
    parents = pc.list_parent_indices(captions).to_numpy()
    total = np.bincount(parents, weights=letters, minlength=table.num_rows)
    counts = np.bincount(parents, minlength=table.num_rows)
    return np.round(total / np.maximum(counts, 1)).astype(np.int64)


def clusters(embedding_ND: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
    """Number (N,) of the cluster of each embedding: k-means on the sphere, about four clusters a batch."""
    import faiss

    count, width = embedding_ND.shape
    wanted = min(-(-count * CLUSTERS_A_BATCH // batch_size), MOST_CLUSTERS, count)
    given = np.ascontiguousarray(embedding_ND, np.float32)
    means = faiss.Kmeans(width, wanted, niter=10, seed=seed, spherical=True, min_points_per_centroid=1)
    means.train(given)
    nearest: np.ndarray = means.index.search(given, 1)[1][:, 0]
    return nearest


def stored_embeddings(dataset: Path, key: str, keys: Sequence[str]) -> np.ndarray:
    """Image embeddings (N, D) of samples, from the signals of a dataset that `curate build` made.

    Args:
        dataset: its folder.
        key: what it is called in the configuration.
        keys: of the samples.

    Raises:
        ConfigError: it has none, or not of every sample.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted((dataset / "signals" / "clip").glob("[0-9]*.parquet"))
    if not files:
        raise ConfigError(
            f"data.batches: hard_negatives takes stored embeddings, and {key} ({dataset}) has none in signals/clip; "
            "build it with a step that embeds its images, or choose another kind of batches"
        )
    table = pa.concat_tables([pq.read_table(file, columns=["key", "image_embedding"]) for file in files])
    place = {each: number for number, each in enumerate(table["key"].to_pylist())}
    places = np.array([place.get(each, -1) for each in keys])
    found = table.take(np.maximum(places, 0))["image_embedding"].combine_chunks()
    if (places < 0).any() or found.null_count:
        at = int(np.flatnonzero((places < 0) | np.asarray(found.is_null()))[0])
        raise ConfigError(
            f"data.batches: hard_negatives: {dataset / 'signals' / 'clip'} has no embedding of sample {keys[at]}; "
            "build the dataset again"
        )
    return found.flatten().to_numpy(zero_copy_only=False).reshape(len(keys), -1).astype(np.float32)
