"""A fitted temperature, against logits whose temperature is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from finetune.calibration import calibrated, fit_temperature
from finetune.metrics import calibration_error


def drawn(samples: int = 4000, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn with the probabilities that they say."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(samples, classes)) * 1.5)
    labels = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    return logits, labels


@pytest.mark.parametrize("factor", [0.2, 1.0, 30.0])
def test_the_temperature_is_found_that_logits_were_scaled_by(factor: float):
    logits, labels = drawn()
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.06)


def test_the_temperature_is_that_of_the_least_cross_entropy():
    logits, labels = drawn(300)

    def loss(log_factor: float) -> float:
        return float(torch.nn.functional.cross_entropy(np.exp(log_factor) * 7 * logits, labels))

    expected = np.exp(-minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-8}).x)
    assert fit_temperature(7 * logits, labels) == pytest.approx(expected, rel=1e-3)


def test_calibration_mends_an_error_of_scale_and_no_sample_fits_its_own_temperature():
    logits, labels = drawn()

    def error(probability: torch.Tensor) -> float:
        confidence, predicted = probability.max(1)
        return calibration_error(confidence.tolist(), (predicted == labels).tolist()).value

    assert error((20 * logits).softmax(1)) > 0.2
    assert error(calibrated(20 * logits, labels)) < 0.03
    assert torch.equal(calibrated(20 * logits, labels).argmax(1), logits.argmax(1))
    other = labels.clone()
    other[0] = (labels[0] + 1) % 5  # of an even sample: the temperature of the odd ones alone changes
    changed = (calibrated(logits, other) != calibrated(logits, labels)).any(1)
    assert changed[1::2].all()
    assert not changed[0::2].any()


def test_one_sample_is_left_as_it_is():
    logits = torch.tensor([[1.0, 2.0]])
    assert torch.equal(calibrated(logits, torch.tensor([0])), logits.double().softmax(1))
