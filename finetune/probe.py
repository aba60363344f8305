"""Linear probes: how much of a classification an image tower's features hold, by logistic regression on them.

As the paper does it (Radford et al. 2021, appendix A.3): L-BFGS, at most 1,000 iterations, an L2 penalty that is
chosen on a validation split, from 96 strengths between 1e-6 and 1e6; instead of all of them, every second decade first
and then both sides of the best, in ever smaller steps, down to eight a decade. The classifier of the best strength is
fitted again on train and validation together.

With `shots`, that many images of each class are drawn, by seed, and the penalty is chosen by four-fold cross-validation
within them: a k-shot probe may look at no other label.

Letters: N samples · D width of the features · C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

MOST_ITERATIONS = 1_000
# log10 of the penalty's strength, scikit-learn's 1 / C.
COARSE = tuple(float(power) for power in range(-6, 7, 2))
STEPS_A_DECADE = 8
FOLDS = 4


@dataclass(frozen=True, slots=True, eq=False)
class LinearProbe:
    """A fitted classifier.

    Attributes:
        weight: float64 (C, D).
        bias: float64 (C,).
        penalty: strength of the L2 penalty that it was fitted with; scikit-learn's 1 / C.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    penalty: float

    def scores(self, feature_ND: torch.Tensor) -> torch.Tensor:
        """Logits (N, C)."""
        return feature_ND.to(self.weight.dtype) @ self.weight.T + self.bias


def fit_probe(
    feature_ND: torch.Tensor, label_N: torch.Tensor, classes: int, penalty: float, start: LinearProbe | None = None
) -> LinearProbe:
    """Multinomial logistic regression: the least of Σ cross-entropy + penalty / 2 · |W|², the bias free.

    Args:
        feature_ND: of any float type; the arithmetic is float64.
        label_N: int64, 0 to C-1.
        classes: C.
        penalty: strength, above 0.
        start: where to start; the optimum is the same from anywhere.
    """
    feature_ND = feature_ND.double()
    weight = torch.zeros(classes, feature_ND.shape[1], dtype=torch.float64, device=feature_ND.device)
    bias = torch.zeros(classes, dtype=torch.float64, device=feature_ND.device)
    if start is not None:
        weight, bias = start.weight.clone(), start.bias.clone()
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MOST_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        # Over N, so that the tolerances mean the same for any number of samples.
        loss = functional.cross_entropy(feature_ND @ weight.T + bias, label_N)
        loss = loss + penalty / (2 * len(label_N)) * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearProbe(weight.detach(), bias.detach(), penalty)


def best_penalty(score: Callable[[float], float]) -> float:
    """The strength with the highest score, among eight a decade from 1e-6 to 1e6; of equals the strongest.

    Args:
        score: of a strength; asked once for each that is looked at, about 13 of the 97.
    """
    scores: dict[int, float] = {}

    def look(steps: int) -> None:
        if steps not in scores and abs(steps) <= 6 * STEPS_A_DECADE:
            scores[steps] = score(10 ** (steps / STEPS_A_DECADE))

    def best() -> int:
        return max(scores, key=lambda steps: (scores[steps], steps))

    for power in COARSE:
        look(round(power * STEPS_A_DECADE))
    width = STEPS_A_DECADE  # half of what lies between the coarse ones
    while width >= 1:
        middle = best()
        look(middle - width)
        look(middle + width)
        width //= 2
    return float(10 ** (best() / STEPS_A_DECADE))


def probe(
    train: tuple[torch.Tensor, torch.Tensor], validation: tuple[torch.Tensor, torch.Tensor] | None, classes: int
) -> LinearProbe:
    """A probe with the penalty that does best on the validation split, fitted on both.

    Args:
        train: features (N, D) and labels (N,).
        validation: the same; None: four folds of train.
        classes: C.
    """
    # Each split starts where it ended itself: the others' classifiers have seen what it holds out.
    starts: dict[int, LinearProbe] = {}

    def accuracy(penalty: float) -> float:
        hits = total = 0
        for split, ((feature_ND, label_N), (held_feature_ND, held_label_N)) in enumerate(_splits(train, validation)):
            starts[split] = fit_probe(feature_ND, label_N, classes, penalty, starts.get(split))
            hits += int((starts[split].scores(held_feature_ND).argmax(1) == held_label_N).sum())
            total += len(held_label_N)
        return hits / total

    penalty = best_penalty(accuracy)
    feature_ND, label_N = train
    if validation is not None:
        feature_ND, label_N = torch.cat([feature_ND, validation[0]]), torch.cat([label_N, validation[1]])
    return fit_probe(feature_ND, label_N, classes, penalty)


def _splits(
    train: tuple[torch.Tensor, torch.Tensor], validation: tuple[torch.Tensor, torch.Tensor] | None
) -> list[tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    if validation is not None:
        return [(train, validation)]
    feature_ND, label_N = train
    fold_N = folds(label_N)
    return [
        ((feature_ND[fold_N != fold], label_N[fold_N != fold]), (feature_ND[fold_N == fold], label_N[fold_N == fold]))
        for fold in range(FOLDS)
        if bool((fold_N == fold).any()) and bool((fold_N != fold).any())
    ]


def folds(label_N: torch.Tensor) -> torch.Tensor:
    """The fold (0 to 3) of each sample: each class is dealt out evenly, in the order given."""
    fold_N = torch.zeros_like(label_N)
    dealt = 0
    for label in label_N.unique().tolist():
        (places,) = torch.nonzero(label_N == label, as_tuple=True)
        fold_N[places] = (torch.arange(len(places), device=label_N.device) + dealt) % FOLDS
        dealt += len(places)  # else classes of one sample would all lie in the first
    return fold_N


def draw_shots(label_N: torch.Tensor, shots: int, seed: int) -> torch.Tensor:
    """The numbers of `shots` samples of each class (all of a class that has fewer), drawn by seed, sorted."""
    random = np.random.default_rng([seed, shots])
    labels = label_N.cpu().numpy()
    drawn = [
        random.choice(places, min(shots, len(places)), replace=False)
        for label in np.unique(labels)
        for places in [np.flatnonzero(labels == label)]
    ]
    return torch.from_numpy(np.sort(np.concatenate(drawn)))
