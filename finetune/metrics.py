"""The arithmetic of evaluation: ranks, the metrics read off them, and their intervals. No model, no file.

Every metric here is read off *ranks*: for each query, the place (from 1) that its best-placed true match takes among
all candidates; average precision off the places of all of its true matches.

    recall@k      share of queries with at least one true match in the top k: CLIP_benchmark's meaning, not found / true
    median_rank   median of the ranks
    map           mean over the queries of average precision: over a query's true matches, the mean of the share of true
                  ones among the candidates down to that one
    top-k         share of images whose true class is among the k highest scores
    per-class     mean over the classes of each class's top-1
    ece           expected calibration error (finetune/calibration.py)

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

Statistic = Literal["mean", "median", "gap"]
RESAMPLES = 1_000
BINS = 15
SCORES_AT_ONCE = 1 << 24  # scores held at a time: 64 MB in float32
INDICES_AT_ONCE = 1 << 22


# --- ranks -----------------------------------------------------------------------------------------------------------


def retrieve(
    query_ND: torch.Tensor, candidate_MD: torch.Tensor, pairs_P2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank (int64, 1 to M) of the best-placed true match of each query, and its average precision (float64).

    Exact, in chunks of bounded memory.

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
    score_NM = torch.empty(min(rows, num_queries), num_candidates, dtype=query_ND.dtype, device=query_ND.device)
    ranks = [torch.zeros(0, dtype=torch.int64)]
    precisions = [torch.zeros(0, dtype=torch.float64)]
    for first in range(0, num_queries, rows):
        chunk_ND = query_ND[first : first + rows]
        # One buffer for all chunks: a new one for each costs a third of the time in page faults.
        scores = torch.matmul(chunk_ND, candidate_MD.T, out=score_NM[: len(chunk_ND)])
        pairs = pairs_P2[starts[first] : starts[first + len(chunk_ND)]]
        place_NK = _true_places(scores, pairs - torch.tensor([first, 0], device=pairs.device))
        ranks.append(place_NK[:, 0].cpu())
        precisions.append(_average_precision(place_NK.cpu()))  # in float64, which MPS has not
    return torch.cat(ranks), torch.cat(precisions)


def _true_places(score_NM: torch.Tensor, pairs_P2: torch.Tensor) -> torch.Tensor:
    """The places (N, K) of each query's true matches among all candidates, best first; 0 where it has fewer than K.

    The j-th best (from 1) stands behind j - 1 true ones and all others that score no less: it is at j, plus the number
    of candidates not below it, less that of the true ones not below it. `score_NM` is changed.

    Args:
        score_NM: scores.
        pairs_P2: (query, candidate), sorted by query; each query has one at least.
    """
    score_NM.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    query_P, candidate_P = pairs_P2.unbind(1)
    count_N = torch.bincount(query_P, minlength=len(score_NM))
    place_in_query_P = torch.arange(len(query_P), device=query_P.device) - (count_N.cumsum(0) - count_N)[query_P]
    most = int(count_N.max()) if len(count_N) else 0
    true_NK = score_NM.new_full((len(score_NM), most), -torch.inf)
    true_NK[query_P, place_in_query_P] = score_NM[query_P, candidate_P]
    true_NK = true_NK.sort(dim=1, descending=True).values
    there_NK = torch.arange(most, device=count_N.device) < count_N[:, None]
    place_NK = torch.zeros_like(there_NK, dtype=torch.int64)
    for k in range(most):
        (rows,) = torch.nonzero(there_NK[:, k], as_tuple=True)
        whole = len(rows) == len(score_NM)
        threshold = true_NK[rows, k, None]
        not_below = ((score_NM if whole else score_NM[rows]) >= threshold).sum(1)
        true_not_below = ((true_NK[rows] >= threshold) & there_NK[rows]).sum(1)
        place_NK[rows, k] = k + 1 + not_below - true_not_below
    return place_NK


def _average_precision(place_NK: torch.Tensor) -> torch.Tensor:
    """Mean over a query's true matches, the j-th best at place p, of j / p."""
    number_K = torch.arange(1, place_NK.shape[1] + 1, device=place_NK.device, dtype=torch.float64)
    there_NK = place_NK > 0
    precision_NK = torch.where(there_NK, number_K / place_NK.clamp(min=1), 0.0)
    return precision_NK.sum(1) / there_NK.sum(1).clamp(min=1)


def class_ranks(score_NC: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    """Rank (int64, 1 to C) of each image's true class among all classes."""
    pairs_P2 = torch.stack([torch.arange(len(label_N), device=label_N.device), label_N], dim=1).to(score_NC.device)
    return _true_places(score_NC.clone(), pairs_P2)[:, 0]


# --- outcomes and metrics --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """What a metric is made of: one number a sample, and how they are put together.

    Attributes:
        values: float64 (N,).
        classes: int64 (N,), from 0; with them the mean is that over the classes that occur of each class's mean.
        statistic: mean, median, or gap: the sum over the classes of their sums' distances from 0, over N.
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
            of_classes = _gap if self.statistic == "gap" else _mean_of_class_means
            return of_classes(value_SN, self.classes[drawn_SN])
        return np.median(value_SN, axis=1) if self.statistic == "median" else value_SN.mean(axis=1)


def _counts_and_sums(
    value_SN: NDArray[np.float64], class_SN: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    rows, classes = len(value_SN), int(class_SN.max()) + 1
    cell = (class_SN + classes * np.arange(rows)[:, None]).ravel()
    count_SC = np.bincount(cell, minlength=rows * classes).reshape(rows, classes)
    sum_SC = np.bincount(cell, value_SN.ravel(), minlength=rows * classes).reshape(rows, classes)
    return count_SC.astype(np.int64), sum_SC.astype(np.float64)


def _gap(value_SN: NDArray[np.float64], class_SN: NDArray[np.int64]) -> NDArray[np.float64]:
    _, sum_SC = _counts_and_sums(value_SN, class_SN)
    return np.abs(sum_SC).sum(1) / value_SN.shape[1]


def _mean_of_class_means(value_SN: NDArray[np.float64], class_SN: NDArray[np.int64]) -> NDArray[np.float64]:
    count_SC, sum_SC = _counts_and_sums(value_SN, class_SN)
    occurs_SC = count_SC > 0
    return np.divide(sum_SC, count_SC, where=occurs_SC, out=np.zeros_like(sum_SC)).sum(1) / occurs_SC.sum(1)


def recall_at(ranks_N: Sequence[int], k: int) -> Outcomes:
    """recall@k (or top-k accuracy) of these ranks."""
    return Outcomes((np.asarray(ranks_N) <= k).astype(np.float64))


def median_rank(ranks_N: Sequence[int]) -> Outcomes:
    """Median of the ranks; 1 is best."""
    return Outcomes(np.asarray(ranks_N, dtype=np.float64), statistic="median")


def mean_average_precision(precision_N: Sequence[float]) -> Outcomes:
    """Mean of the queries' average precisions (scikit-learn's `average_precision_score`, but for ties)."""
    return Outcomes(np.asarray(precision_N, dtype=np.float64))


def per_class_mean(ranks_N: Sequence[int], label_N: Sequence[int]) -> Outcomes:
    """Mean over the classes that occur of each class's top-1 accuracy (scikit-learn's `balanced_accuracy_score`)."""
    return Outcomes((np.asarray(ranks_N) <= 1).astype(np.float64), np.asarray(label_N, dtype=np.int64))


def bins(confidence_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of 15 equal bins a confidence lies in, open on the left (Guo et al. 2017)."""
    return np.clip(np.ceil(confidence_N * BINS), 1, BINS).astype(np.int64) - 1


def calibration_error(confidence_N: Sequence[float], right_N: Sequence[bool]) -> Outcomes:
    """Expected calibration error: over bins of confidence, how far accuracy is from mean confidence (see calibration).

    Args:
        confidence_N: probability of the best class.
        right_N: whether that is the true one.
    """
    confidence = np.asarray(confidence_N, dtype=np.float64)
    return Outcomes(np.asarray(right_N, dtype=np.float64) - confidence, bins(confidence), "gap")


# --- intervals -------------------------------------------------------------------------------------------------------


def bootstrap_interval(outcomes: Outcomes, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of a metric over its samples (Efron 1979), seeded."""
    return percentiles(resampled(outcomes, seed), level)


def resampled(outcomes: Outcomes, seed: int = 0) -> NDArray[np.float64]:
    """The metric of each bootstrap resample (S,)."""
    return np.concatenate([outcomes.of(drawn_SN) for drawn_SN in _draws(len(outcomes.values), seed)])


def paired_bootstrap(before: Outcomes, after: Outcomes, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of `after - before`: a sample's two outcomes are drawn together.

    Raises:
        ValueError: not the same number of samples.
    """
    if len(before.values) != len(after.values):
        raise ValueError(f"not the same samples: {len(before.values)} before, {len(after.values)} after")
    changes = [after.of(drawn_SN) - before.of(drawn_SN) for drawn_SN in _draws(len(after.values), seed)]
    return percentiles(np.concatenate(changes), level)


def _draws(samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """RESAMPLES rows of `samples` numbers below `samples`, in chunks of bounded memory; the same for the same seed."""
    rng = np.random.default_rng(seed)
    rows = max(1, INDICES_AT_ONCE // max(1, samples))
    for first in range(0, RESAMPLES, rows):
        yield rng.integers(0, samples, (min(rows, RESAMPLES - first), samples))


def percentiles(value_S: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The interval (low, high) that holds this share of the values, as many below it as above."""
    low, high = np.quantile(value_S, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
