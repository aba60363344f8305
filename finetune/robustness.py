"""Effective robustness: how much better a model does on shifted images than its accuracy elsewhere foretells.

Taori et al. 2020 (arXiv 2007.00644, section 2): models that were trained alike lie on a line, accuracy on the shifted
set against accuracy on the reference, once both axes are on the logit scale. β is that line, fitted by least squares;
the effective robustness of a model is acc_shifted - β(acc_reference).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetune.metrics import Outcomes, percentiles, resampled

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST = 1e-4  # accuracies of 0 and 1, whose logits are infinite, are taken to be this far from them


@dataclass(frozen=True, slots=True)
class Line:
    """β: logit(shifted) = slope · logit(reference) + intercept."""

    slope: float
    intercept: float

    def predicted(self, reference: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Accuracy on the shifted set that goes with this one on the reference."""
        return np.asarray(1 / (1 + np.exp(-(self.slope * _logit(reference) + self.intercept))))


@dataclass(frozen=True, slots=True)
class Robustness:
    """A row of the table; without a baseline nothing is predicted.

    Attributes:
        reference: top-1 there.
        shifted: top-1 here.
        predicted: β(reference).
        effective: shifted - predicted.
        low: of its 95 % bootstrap interval, both sets drawn anew, the baseline as it is.
        high: of the same.
    """

    reference: float
    shifted: float
    predicted: float | None = None
    effective: float | None = None
    low: float | None = None
    high: float | None = None


def _logit(share: NDArray[np.float64] | float) -> NDArray[np.float64]:
    inside = np.clip(np.asarray(share, dtype=np.float64), LEAST, 1 - LEAST)
    return np.asarray(np.log(inside / (1 - inside)))


def fit_line(baseline: Sequence[tuple[float, float]]) -> Line:
    """The line through the accuracies (reference, shifted) of other models, two of them at least."""
    reference, shifted = (_logit(np.array(column)) for column in zip(*baseline, strict=True))
    slope, intercept = np.polyfit(reference, shifted, 1)
    return Line(float(slope), float(intercept))


def robustness(reference: Outcomes, shifted: Outcomes, baseline: Sequence[tuple[float, float]]) -> Robustness:
    """Both accuracies, and with a baseline the effective robustness.

    Args:
        reference: top-1 of each image of the reference.
        shifted: the same of the shifted set.
        baseline: accuracies (reference, shifted) of other models; none, or at least two.
    """
    if not baseline:
        return Robustness(reference.value, shifted.value)
    line = fit_line(baseline)
    predicted = float(line.predicted(reference.value))
    # Two samples, drawn independently of each other.
    drawn = resampled(shifted, seed=1) - line.predicted(resampled(reference, seed=0))
    return Robustness(reference.value, shifted.value, predicted, shifted.value - predicted, *percentiles(drawn))
