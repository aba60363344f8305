"""Linear probes against scikit-learn's logistic regression, and the search for the penalty against all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

from finetune.probe import best_penalty, draw_shots, fit_probe, folds, probe


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images / 16).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("penalty", [1e-2, 1.0, 100.0])
def test_the_classifier_is_scikit_learns(penalty: float):
    features, labels = digits()
    theirs = LogisticRegression(C=1 / penalty, max_iter=5_000, tol=1e-9).fit(features[:600].double(), labels[:600])
    ours = fit_probe(features[:600], labels[:600], 10, penalty)

    def objective(weight: torch.Tensor, bias: torch.Tensor) -> float:
        logits = features[:600].double() @ weight.T + bias
        loss = torch.nn.functional.cross_entropy(logits, labels[:600], reduction="sum")
        return float(loss + penalty / 2 * weight.square().sum())

    # With a weak penalty the valley is flat: what both must reach is its floor.
    found = objective(ours.weight, ours.bias)
    assert found == pytest.approx(objective(*map(torch.from_numpy, (theirs.coef_, theirs.intercept_))), rel=1e-4)
    agree = ours.scores(features[600:]).argmax(1) == torch.from_numpy(theirs.predict(features[600:]))
    assert agree.double().mean() > 0.998


@pytest.mark.parametrize("peak", [-6.0, -5.2, -0.375, 0.0, 1.3, 6.0])
def test_the_search_finds_the_peak_of_all_97_penalties(peak: float):
    asked = []

    def score(penalty: float) -> float:
        asked.append(penalty)
        return -abs(np.log10(penalty) - peak)

    every = [10 ** (steps / 8) for steps in range(-48, 49)]
    expected = max(every, key=lambda penalty: -abs(np.log10(penalty) - peak))
    assert best_penalty(score) == pytest.approx(expected)
    assert len(asked) <= 7 + 8
    assert len(set(asked)) == len(asked)


def test_of_penalties_that_do_equally_well_the_strongest_is_taken():
    assert best_penalty(lambda _: 0.5) == pytest.approx(1e6)
    assert best_penalty(lambda penalty: float(penalty < 15)) == pytest.approx(10 ** (9 / 8))


def test_the_penalty_is_chosen_on_the_validation_split_alone():
    features, labels = digits()
    train, held = (features[:80], labels[:80]), (features[80:400], labels[80:400])
    chosen = probe(train, held, 10)

    def accuracy(penalty: float) -> float:
        return float((fit_probe(*train, 10, penalty).scores(held[0]).argmax(1) == held[1]).double().mean())

    assert accuracy(chosen.penalty) >= max(accuracy(10.0**power) for power in range(-6, 7)) - 0.01
    again = fit_probe(features[:400], labels[:400], 10, chosen.penalty)
    assert chosen.weight.numpy() == pytest.approx(again.weight.numpy(), abs=1e-3)


def test_a_few_shot_probe_uses_folds_of_its_shots():
    features, labels = digits()
    shots = draw_shots(labels[:1000], 4, seed=1)
    found = probe((features[shots], labels[shots]), None, 10)
    right = found.scores(features[1000:]).argmax(1) == labels[1000:]
    grid = {"C": [10.0**-power for power in range(-6, 7)]}
    theirs = GridSearchCV(LogisticRegression(max_iter=2_000), grid, cv=4).fit(features[shots], labels[shots])
    assert right.double().mean() >= theirs.score(features[1000:], labels[1000:]) - 0.03


def test_without_a_validation_split_each_sample_is_held_out_once():
    features, labels = digits()
    few = torch.nonzero(labels < 3).flatten()[:24]
    labels, fold = labels[few], folds(labels[few])
    features = features[few] + torch.randn(24, 64, generator=torch.Generator().manual_seed(0))

    def accuracy(penalty: float) -> float:
        hits = 0
        for held in (fold == number for number in range(4)):
            fitted = fit_probe(features[~held], labels[~held], 3, penalty)
            hits += int((fitted.scores(features[held]).argmax(1) == labels[held]).sum())
        return hits / 24

    assert probe((features, labels), None, 3).penalty == best_penalty(accuracy)


def test_no_fold_starts_from_a_classifier_that_has_seen_what_it_holds_out(monkeypatch):
    random = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 64, generator=random), torch.randint(0, 2, (40,), generator=random)
    scores = []

    def look(score) -> float:
        scores.extend(score(penalty) for penalty in (1e-6, 1e-4, 1.0))
        return 1.0

    monkeypatch.setattr("finetune.probe.best_penalty", look)
    probe((features, labels), None, 2)
    assert max(scores) < 0.75  # of labels that nothing foretells


def test_shots_are_drawn_by_class_and_seed():
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    shots = draw_shots(labels, 2, seed=3)
    assert torch.bincount(labels[shots]).tolist() == [2, 1, 2]
    assert draw_shots(labels, 4, seed=3).tolist() == list(range(8))  # none twice
    assert torch.equal(shots, draw_shots(labels, 2, seed=3))
    assert len({tuple(draw_shots(labels, 2, seed=seed).tolist()) for seed in range(20)}) > 3


def test_folds_deal_each_class_out_evenly():
    labels = torch.tensor([0] * 8 + [1] * 5 + [2, 3, 4, 5])
    fold = folds(labels)
    for label in (0, 1):
        sizes = torch.bincount(fold[labels == label], minlength=4)
        assert int(sizes.max() - sizes.min()) <= 1
    assert sorted(fold[-4:].tolist()) == [0, 1, 2, 3]
