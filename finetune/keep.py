"""What is gained against what is forgotten: the one number that CLIPs of a run are chosen by.

Of two CLIPs within the forgetting budget the one better on the domain is better; one within the budget is better than
any beyond it; of two beyond it the one nearer to it. The loss takes no part: it goes on falling while retrieval does
not, and knows nothing of what is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from curate.errors import ConfigError, did_you_mean
from finetune.config import KeepConfig

LOWER_IS_BETTER = ("val/loss", "median_rank", "ece", "ece_fitted")
USUAL_GAIN = "val/image_to_text/recall@1"
RETAINED = "retain/image_to_text/recall@1"
TRADE_OFF = "trade_off"  # the name that the score is logged by
ROUNDING = 1e-9  # figures of one evaluation and of another of the same CLIP


@dataclass(frozen=True, slots=True)
class Goal:
    """What a run is for.

    Attributes:
        gain: metric that is to be best.
        keep: metrics whose mean is to stay.
        budget: by how much it may fall.
    """

    gain: str
    keep: tuple[str, ...]
    budget: float

    def score(self, start: Mapping[str, float], now: Mapping[str, float]) -> float:
        """Within the budget the gain as it is (as 1 / (1 + x) where lower is better), so 0 or more; else below 0.

        Args:
            start: every metric of the CLIP that training started from.
            now: of the one that is judged.
        """
        beyond = self.forgotten(start, now) - self.budget
        if beyond > ROUNDING:
            return -beyond
        gain = now[self.gain]
        return 1 / (1 + gain) if self.gain.endswith(LOWER_IS_BETTER) else gain

    def forgotten(self, start: Mapping[str, float], now: Mapping[str, float]) -> float:
        """By how much the mean of what is kept has fallen; below 0 where it has risen."""
        return sum(start[metric] - now[metric] for metric in self.keep) / len(self.keep)


def goal(config: KeepConfig, gain: str | None, metrics: Sequence[str]) -> Goal | None:
    """The goal of a run that starts from trained weights; None where there is nothing to weigh against each other.

    Args:
        config: what is kept.
        gain: metric that picks the best checkpoint; None: nothing does.
        metrics: names of all that evaluation gives.

    Raises:
        ConfigError: a metric that evaluation does not give, or for which lower is better.
    """
    if config.metrics is None:
        kept: tuple[str, ...] = (RETAINED,) if RETAINED in metrics else ()
    else:
        kept = tuple(config.metrics)
    for metric in kept:
        if metric not in metrics:
            raise ConfigError(f"keep.metrics: nothing measures '{metric}'.{did_you_mean(metric, metrics)}")
        if metric.endswith(LOWER_IS_BETTER):
            raise ConfigError(f"keep.metrics: {metric} is better when it is lower; name metrics that fall")
    if gain is None or gain not in metrics:  # val/loss, or nothing
        if config.metrics:
            raise ConfigError("keep.metrics: needs an evaluate.monitor other than val/loss to weigh them against")
        return None
    return Goal(gain, kept, config.budget) if kept else None
