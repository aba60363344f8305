"""The arithmetic of evaluation: ranks, the metrics read off them, and their intervals. No model, no file.

Every metric here is a function of *ranks*: for each query, the place (from 1) that its best-placed true match takes
among all candidates.

    recall@k      share of queries with at least one true match in the top k: CLIP_benchmark's meaning, not found / true
    median_rank   median of the ranks
    top-k         share of images whose true class is among the k highest scores
    per-class     mean over the classes of each class's top-1

Ties are counted pessimistically: a candidate that scores exactly as high as the true match stands before it, and NaN is
the lowest score there is. A collapsed model, for which all candidates are alike, therefore has recall 0, where
optimistic counting would give 1.

Letters: N queries · M candidates · C classes · P true pairs · S bootstrap resamples · D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

Statistic = Literal["mean", "median"]
RESAMPLES = 1_000
SCORES_AT_ONCE = 1 << 24  # scores held at a time: 64 MB in float32
INDICES_AT_ONCE = 1 << 22


# --- ranks -----------------------------------------------------------------------------------------------------------


def retrieval_ranks(query_ND: torch.Tensor, candidate_MD: torch.Tensor, pairs_P2: torch.Tensor) -> torch.Tensor:
    """Rank (int64, 1 to M) of the best-placed true match of each query, exact, in chunks of bounded memory.

    True matches do not stand in each other's way: a query with five of them and all five on top has rank 1. A candidate
    that ties with the best true match and is not true itself stands before it.

    Args:
        query_ND: L2-normalised embeddings of the queries.
        candidate_MD: L2-normalised embeddings of the candidates.
        pairs_P2: int64, each row (query, candidate) that belong together, in any order, each pair once; many to many.

    Raises:
        ValueError: a query has no true match.
    """
    num_queries, num_candidates = len(query_ND), len(candidate_MD)
    pairs_P2 = pairs_P2.to(query_ND.device)
    pairs_P2 = pairs_P2[pairs_P2[:, 0].argsort(stable=True)]
    starts = torch.searchsorted(pairs_P2[:, 0].contiguous(), torch.arange(num_queries + 1, device=query_ND.device))
    if num_queries and int(starts.diff().min()) == 0:
        raise ValueError(f"query {int(starts.diff().argmin())} has no true match among the candidates")
    rows = max(1, SCORES_AT_ONCE // max(1, num_candidates))
    ranks = [
        _chunk_ranks(
            query_ND[first : first + rows] @ candidate_MD.T,
            pairs_P2[starts[first] : starts[min(first + rows, num_queries)]]
            - torch.tensor([first, 0], device=query_ND.device),
        )
        for first in range(0, num_queries, rows)
    ]
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def _chunk_ranks(score_NM: torch.Tensor, pairs_P2: torch.Tensor) -> torch.Tensor:
    score_NM = score_NM.nan_to_num(nan=-torch.inf)
    query_P, candidate_P = pairs_P2.unbind(1)
    true_P = score_NM[query_P, candidate_P]
    best_N = score_NM.new_full((len(score_NM),), -torch.inf).scatter_reduce(0, query_P, true_P, "amax")
    not_below_N = (score_NM >= best_N[:, None]).sum(1)
    true_at_best_N = torch.zeros_like(not_below_N).scatter_add(0, query_P, (true_P >= best_N[query_P]).long())
    return 1 + not_below_N - true_at_best_N


def class_ranks(score_NC: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    """Rank (int64, 1 to C) of each image's true class among all classes."""
    pairs_P2 = torch.stack([torch.arange(len(label_N), device=label_N.device), label_N], dim=1).to(score_NC.device)
    return _chunk_ranks(score_NC, pairs_P2)


# --- outcomes and metrics --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """What a metric is made of: one number a sample, and how they are put together.

    Attributes:
        values: float64 (N,).
        classes: int64 (N,), from 0; with them the metric is the mean over the classes that occur of each class's mean.
        statistic: mean or median.
    """

    values: NDArray[np.float64]
    classes: NDArray[np.int64] | None = None
    statistic: Statistic = "mean"

    @property
    def value(self) -> float:
        """The metric."""
        return float(self.of(np.arange(len(self.values))[None])[0])

    def of(self, drawn_SN: NDArray[np.int64]) -> NDArray[np.float64]:
        """The metric (S,) of each row of samples."""
        value_SN = self.values[drawn_SN]
        if self.classes is not None:
            return _mean_of_class_means(value_SN, self.classes[drawn_SN])
        return np.median(value_SN, axis=1) if self.statistic == "median" else value_SN.mean(axis=1)


def _mean_of_class_means(value_SN: NDArray[np.float64], class_SN: NDArray[np.int64]) -> NDArray[np.float64]:
    rows, classes = len(value_SN), int(class_SN.max()) + 1
    cell = (class_SN + classes * np.arange(rows)[:, None]).ravel()
    count_SC = np.bincount(cell, minlength=rows * classes).reshape(rows, classes)
    sum_SC = np.bincount(cell, value_SN.ravel(), minlength=rows * classes).reshape(rows, classes)
    occurs_SC = count_SC > 0
    return np.divide(sum_SC, count_SC, where=occurs_SC, out=np.zeros_like(sum_SC)).sum(1) / occurs_SC.sum(1)


def recall_at(ranks_N: Sequence[int], k: int) -> Outcomes:
    """recall@k (or top-k accuracy) of these ranks."""
    return Outcomes((np.asarray(ranks_N) <= k).astype(np.float64))


def median_rank(ranks_N: Sequence[int]) -> Outcomes:
    """Median of the ranks; 1 is best."""
    return Outcomes(np.asarray(ranks_N, dtype=np.float64), statistic="median")


def per_class_mean(ranks_N: Sequence[int], label_N: Sequence[int]) -> Outcomes:
    """Mean over the classes that occur of each class's top-1 accuracy (scikit-learn's `balanced_accuracy_score`)."""
    return Outcomes((np.asarray(ranks_N) <= 1).astype(np.float64), np.asarray(label_N, dtype=np.int64))


# --- intervals -------------------------------------------------------------------------------------------------------


def bootstrap_interval(outcomes: Outcomes, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of a metric over its samples (Efron 1979), seeded."""
    return _percentiles(
        np.concatenate([outcomes.of(drawn_SN) for drawn_SN in _draws(len(outcomes.values), seed)]), level
    )


def paired_bootstrap(before: Outcomes, after: Outcomes, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of `after - before`: a sample's two outcomes are drawn together.

    Raises:
        ValueError: not the same number of samples.
    """
    if len(before.values) != len(after.values):
        raise ValueError(f"not the same samples: {len(before.values)} before, {len(after.values)} after")
    changes = [after.of(drawn_SN) - before.of(drawn_SN) for drawn_SN in _draws(len(after.values), seed)]
    return _percentiles(np.concatenate(changes), level)


def _draws(samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """RESAMPLES rows of `samples` numbers below `samples`, in chunks of bounded memory; the same for the same seed."""
    rng = np.random.default_rng(seed)
    rows = max(1, INDICES_AT_ONCE // max(1, samples))
    for first in range(0, RESAMPLES, rows):
        yield rng.integers(0, samples, (min(rows, RESAMPLES - first), samples))


def _percentiles(value_S: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(value_S, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
