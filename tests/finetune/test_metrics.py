"""The metrics against matrices worked by hand, brute force in float64 and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error

from finetune import metrics
from finetune.metrics import (
    Outcomes,
    bootstrap_interval,
    calibration_error,
    class_ranks,
    mean_average_precision,
    median_rank,
    paired_bootstrap,
    per_class_mean,
    recall_at,
    retrieve,
)


def brute_force_ranks(query: np.ndarray, candidate: np.ndarray, match: np.ndarray) -> list[int]:
    """Rank by rank in float64 and plain loops: the pessimistic place of the best true match."""
    score = query.astype(np.float64) @ candidate.astype(np.float64).T
    ranks = []
    for row, true in zip(score, match, strict=True):
        best = row[true].max()
        ranks.append(1 + sum(1 for value, is_true in zip(row, true, strict=True) if value >= best and not is_true))
    return ranks


def retrieval_ranks(*arguments: torch.Tensor) -> torch.Tensor:
    return retrieve(*arguments)[0]


def random_task(seed: int, queries: int, candidates: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    match = rng.random((queries, candidates)) < 0.08
    match[np.arange(queries), rng.integers(0, candidates, queries)] = True
    unit = torch.nn.functional.normalize
    query = unit(torch.from_numpy(rng.normal(size=(queries, 16))), dim=-1)
    return query, unit(torch.from_numpy(rng.normal(size=(candidates, 16))), dim=-1), match


def test_ranks_of_a_matrix_worked_by_hand():
    # Query 0: its match is 2nd. Query 1: matches at 1st and 3rd: the best counts. Query 2: last of four.
    score = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.3, 0.9, 0.5, 0.4], [0.4, 0.3, 0.2, 0.1]])
    pairs = torch.tensor([[2, 3], [0, 1], [1, 1], [1, 3]])
    assert retrieval_ranks(score, torch.eye(4), pairs).tolist() == [2, 1, 4]
    assert [recall_at([2, 1, 4], k).value for k in (1, 2, 3, 4)] == [1 / 3, 2 / 3, 2 / 3, 1.0]
    assert median_rank([2, 1, 4]).value == 2


def test_true_matches_do_not_stand_in_each_others_way():
    score = torch.tensor([[0.9, 0.9, 0.9, 0.1]])
    assert retrieval_ranks(score, torch.eye(4), torch.tensor([[0, 0], [0, 1], [0, 2]])).tolist() == [1]


def test_ties_are_counted_pessimistically():
    score = torch.tensor([[0.5, 0.5, 0.5, 0.1]])
    assert retrieval_ranks(score, torch.eye(4), torch.tensor([[0, 0]])).tolist() == [3]
    assert class_ranks(score, torch.tensor([1])).tolist() == [3]


def test_a_collapsed_model_has_recall_0():
    alike = torch.nn.functional.normalize(torch.ones(20, 8), dim=-1)
    pairs = torch.arange(20)[:, None].expand(-1, 2)
    assert recall_at(retrieval_ranks(alike, alike, pairs).tolist(), 10).value == 0


def test_a_model_that_gives_nan_has_recall_0():
    broken = torch.full((20, 8), torch.nan)
    pairs = torch.arange(20)[:, None].expand(-1, 2)
    assert retrieval_ranks(broken, broken, pairs).tolist() == [20] * 20
    assert class_ranks(torch.full((2, 5), torch.nan), torch.tensor([0, 3])).tolist() == [5, 5]


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_brute_force_in_float64_many_to_many(seed: int):
    query, candidate, match = random_task(seed, 60, 45)
    pairs = torch.from_numpy(np.argwhere(match))
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))]
    expected = brute_force_ranks(query.numpy(), candidate.numpy(), match)
    assert retrieval_ranks(query, candidate, pairs).tolist() == expected


def test_chunks_give_the_ranks_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    query, candidate, match = random_task(7, 50, 40)
    pairs = torch.from_numpy(np.argwhere(match))
    whole = retrieval_ranks(query, candidate, pairs)
    monkeypatch.setattr(metrics, "SCORES_AT_ONCE", 120)  # three queries at a time, the last two alone
    assert torch.equal(retrieval_ranks(query, candidate, pairs), whole)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_scikit_learns(seed: int):
    query, candidate, match = random_task(seed, 60, 45)
    precision = retrieve(query, candidate, torch.from_numpy(np.argwhere(match)))[1]
    score = (query @ candidate.T).numpy()
    expected = [average_precision_score(true, row) for true, row in zip(match, score, strict=True)]
    assert precision.tolist() == pytest.approx(expected, abs=1e-12)
    assert mean_average_precision(precision.tolist()).value == pytest.approx(np.mean(expected))


def test_average_precision_counts_ties_pessimistically():
    score = torch.tensor([[0.5, 0.5, 0.5, 0.1]])
    # The two true ones are at 2 and 3, behind the wrong one that ties with them.
    precision = retrieve(score, torch.eye(4), torch.tensor([[0, 0], [0, 1]]))[1]
    assert precision.tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2])


def test_calibration_error_equals_its_definition_and_torchmetrics():
    rng = np.random.default_rng(2)
    probability = torch.from_numpy(rng.normal(size=(500, 6)) * 2).softmax(1)
    label = torch.from_numpy(rng.integers(0, 6, 500))
    confidence, predicted = probability.max(1)
    found = calibration_error(confidence.tolist(), (predicted == label).tolist()).value
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = ((confidence > low) & (confidence <= low + 1 / 15)).numpy()
        if inside.any():
            right = (predicted == label).numpy()[inside].mean()
            expected += inside.mean() * abs(right - confidence.numpy()[inside].mean())
    assert found == pytest.approx(expected, abs=1e-12)
    assert found == pytest.approx(
        float(multiclass_calibration_error(probability, label, num_classes=6, n_bins=15)), abs=1e-6
    )


def test_a_query_without_a_true_match_is_an_error():
    with pytest.raises(ValueError, match="query 1 has no true match"):
        retrieval_ranks(torch.eye(3), torch.eye(3), torch.tensor([[0, 0], [2, 2]]))


def test_recall_grows_with_k_and_is_1_for_the_identity():
    ranks = retrieval_ranks(*random_task(3, 80, 80)[:2], torch.arange(80)[:, None].expand(-1, 2)).tolist()
    recalls = [recall_at(ranks, k).value for k in range(1, 81)]
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1
    assert retrieval_ranks(torch.eye(9), torch.eye(9), torch.arange(9)[:, None].expand(-1, 2)).tolist() == [1] * 9


def test_top_k_and_per_class_mean_equal_scikit_learns():
    rng = np.random.default_rng(1)
    label = rng.choice(7, 300, p=[0.5, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05])
    score = rng.normal(size=(300, 7)) + 1.2 * np.eye(7)[label]
    ranks = class_ranks(torch.from_numpy(score), torch.from_numpy(label)).tolist()
    for k in (1, 3, 5):
        assert recall_at(ranks, k).value == pytest.approx(top_k_accuracy_score(label, score, k=k, labels=range(7)))
    assert per_class_mean(ranks, label.tolist()).value == pytest.approx(
        balanced_accuracy_score(label, score.argmax(1)), abs=1e-12
    )


def test_the_interval_of_a_share_is_the_binomials():
    outcomes = recall_at([1] * 300 + [2] * 100, 1)
    low, high = bootstrap_interval(outcomes)
    # Resampling a 0/1 sample is drawing from Binomial(n, p): sd = sqrt(p (1 - p) / n).
    deviation = np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - 1.96 * deviation, abs=0.005)
    assert high == pytest.approx(0.75 + 1.96 * deviation, abs=0.005)


def test_intervals_are_the_same_each_time_and_do_not_touch_the_global_random_state():
    outcomes = recall_at(list(range(1, 50)), 10)
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 - the global state is what must stay
    assert bootstrap_interval(outcomes) == bootstrap_interval(outcomes)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    spread = Outcomes(np.random.default_rng(0).random(50))
    assert bootstrap_interval(spread, seed=1) != bootstrap_interval(spread, seed=2)


def test_intervals_do_not_depend_on_how_many_resamples_are_held_at_once(monkeypatch: pytest.MonkeyPatch):
    outcomes = recall_at(list(range(1, 50)), 10)
    whole = bootstrap_interval(outcomes)
    monkeypatch.setattr(metrics, "INDICES_AT_ONCE", 500)
    assert bootstrap_interval(outcomes) == whole


def test_the_interval_of_a_per_class_mean_is_that_of_a_plain_loop():
    rng = np.random.default_rng(5)
    label, ranks = rng.choice(6, 200, p=[0.5, 0.3, 0.1, 0.06, 0.03, 0.01]), rng.integers(1, 3, 200)
    draws = np.random.default_rng(0).integers(0, 200, (metrics.RESAMPLES, 200))
    means = [np.mean([(ranks[d][label[d] == c] == 1).mean() for c in np.unique(label[d])]) for d in draws]
    assert bootstrap_interval(per_class_mean(ranks.tolist(), label.tolist())) == pytest.approx(
        tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12
    )


def test_classes_that_are_all_right_or_all_wrong_still_leave_a_doubt():
    # Resampled within classes, this interval would have no width.
    low, high = bootstrap_interval(per_class_mean([1] * 3 + [2] * 21, [c for c in range(8) for _ in range(3)]))
    assert low < 0.125 < high


def test_the_paired_interval_knows_that_the_samples_are_the_same():
    rng = np.random.default_rng(0)
    hard = rng.random(400) < 0.5  # both models fail on the same half; the second gains 5 % of the rest
    before = Outcomes((~hard).astype(float))
    after = Outcomes((~hard | (rng.random(400) < 0.05)).astype(float))
    low, high = paired_bootstrap(before, after)
    assert 0 < low < after.value - before.value < high
    alone = [bootstrap_interval(outcomes) for outcomes in (before, after)]
    assert alone[0][1] > alone[1][0]  # the intervals of each overlap; the paired one excludes 0


def test_no_change_has_a_paired_interval_of_zero_width():
    outcomes = recall_at([1, 5, 3, 1, 2, 9], 3)
    assert paired_bootstrap(outcomes, outcomes) == (0, 0)


def test_pairing_different_samples_is_an_error():
    with pytest.raises(ValueError, match="not the same samples: 2 before, 3 after"):
        paired_bootstrap(recall_at([1, 2], 1), recall_at([1, 2, 3], 1))


def test_the_median_and_its_interval():
    low, high = bootstrap_interval(median_rank([1] * 48 + [7] * 52))
    assert median_rank([1] * 48 + [7] * 52).value == 7
    assert (low, high) == (1, 7)
