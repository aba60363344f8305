"""Is a probability what it says? The temperature that would make it so.

Of all images whose best class has probability 0.8, eight in ten should be right; how far they are from that is the
expected calibration error (Guo et al. 2017, equation 3; `metrics.calibration_error`). The softmax of a zero-shot
classifier has one free number, the temperature; fitted on other samples it says how much of the error is one of scale.

Letters: N samples · C classes.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

# Bounds of what is searched: the natural logarithm of a factor of the logits.
_LEAST, _MOST = -6.0, 6.0


def fit_temperature(logit_NC: torch.Tensor, label_N: torch.Tensor) -> float:
    """The temperature T for which the cross-entropy of softmax(logits / T) is least.

    In log(1 / T) the loss has one valley: it is found by golden section, to four digits.
    """
    logit_NC = logit_NC.double()

    def loss(log_factor: float) -> float:
        return float(functional.cross_entropy(math.exp(log_factor) * logit_NC, label_N))

    golden = (math.sqrt(5) - 1) / 2
    low, high = _LEAST, _MOST
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = loss(left), loss(right)
    while high - low > 1e-4:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = loss(right)
    return math.exp(-(low + high) / 2)


def calibrated(logit_NC: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, C), float64, with a temperature that the sample itself did not help to find.

    It is fitted on the even samples for the odd ones, and the other way round.
    """
    if logit_NC.device.type == "mps":  # which has no float64
        logit_NC, label_N = logit_NC.cpu(), label_N.cpu()
    even_N = torch.arange(len(label_N), device=label_N.device) % 2 == 0
    if len(label_N) < 2:
        return logit_NC.double().softmax(1)
    for_odd = fit_temperature(logit_NC[even_N], label_N[even_N])
    for_even = fit_temperature(logit_NC[~even_N], label_N[~even_N])
    temperature_N = torch.where(even_N, for_even, for_odd).double()
    return (logit_NC.double() / temperature_N[:, None]).softmax(1)
