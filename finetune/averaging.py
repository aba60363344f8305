"""An exponential moving average of the weights (EMA), as Lightning keeps it."""

from __future__ import annotations

from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage(WeightAveraging):
    """Averages after each step; evaluated and saved as the weights, with the latest beside them in a checkpoint.

    Put it after the callback that evaluates: at the end of a validation it takes the average out again.

    Args:
        decay: share of the past that stays at a step; the average begins as the weights after the first step.
    """

    def __init__(self, decay: float) -> None:
        # In one go, and exact for what does not move: a frozen weight stays what it is, to the bit.
        # Buffers are copied: the -inf of a causal mask has no average.
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))
