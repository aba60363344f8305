"""Between the CLIP that training started from and the one it ended with (WiSE-FT, Wortsman et al. 2022, equation 1).

    weights(α) = (1 - α) · start + α · end

On the way from one to the other what is gained on the domain often comes before what was known is lost: an α inside can
have most of the gain at little of the loss, or more gain than the end itself. LoRA is merged before, so that α scales
its update. The towers may have an α each; what lies in neither, the temperature, goes with their mean.

    RUN/interpolation.json             the goal, every point of the curve, and the one chosen
    RUN/checkpoints/interpolated.ckpt  the chosen CLIP, where it is better than every checkpoint
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from curate.errors import ModelError
from curate.files import atomic
from finetune.adapters import merge
from finetune.attention import split_attention
from finetune.checkpoints import write_checkpoint
from finetune.config import AdapterConfig, ComputeConfig
from finetune.evaluate import Evaluation, evaluate_clip
from finetune.keep import Goal
from finetune.layers import tower_of
from finetune.metrics import bootstrap_interval, percentiles, resampled

if TYPE_CHECKING:
    from curate.clip import Clip
    from finetune.sets import EvaluationSets

logger = logging.getLogger("cliptailor")
State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Alpha:
    """How far towards the end each tower is: 0 the start, 1 the end."""

    image: float
    text: float

    def of(self, name: str) -> float:
        """That of the weight with this name in an open_clip state dict."""
        tower = tower_of(name)
        if tower is None:
            return (self.image + self.text) / 2
        return self.image if tower == "image" else self.text

    def __str__(self) -> str:
        same = self.image == self.text
        return f"{self.image:g}" if same else f"{self.image:g} (image), {self.text:g} (text)"


START, END = Alpha(0, 0), Alpha(1, 1)


@dataclass(frozen=True, slots=True)
class Point:
    """One α of the curve, and what the CLIP there does."""

    alpha: Alpha
    evaluation: Evaluation


def grid(steps: int, *, apart: bool = False) -> list[Alpha]:
    """α from 0 to 1 in equal steps, the towers together; or apart, each with each."""
    parts = [step / steps for step in range(steps + 1)]
    if not apart:
        return [Alpha(part, part) for part in parts]
    return [Alpha(image, text) for image in parts for text in parts]


def interpolated(start: State, end: State, alpha: Alpha) -> dict[str, torch.Tensor]:
    """The weights at α; counters, and what only the end has (a bias for the sigmoid loss), are the end's.

    Raises:
        ModelError: not the same weights.
    """
    start = {"logit_bias": end["logit_bias"], **start} if "logit_bias" in end else start
    if different := sorted(start.keys() ^ end.keys()):
        raise ModelError(f"start and end are no CLIPs of one architecture: only one of them has {different[0]}")
    return {
        name: torch.lerp(start[name].to(value), value, alpha.of(name)) if value.is_floating_point() else value
        for name, value in end.items()
    }


def sweep(
    start: Clip,
    end: Clip,
    alphas: Sequence[Alpha],
    sets: EvaluationSets,
    *,
    batch_size: int,
    known: Mapping[Alpha, Evaluation] | None = None,
) -> list[Point]:
    """Evaluate the CLIP at each α; `end` is the one that is changed meanwhile, and comes back as it was.

    Args:
        start: plain CLIP.
        end: plain CLIP of the same architecture, on the device to use.
        alphas: where to look.
        sets: what to evaluate on.
        batch_size: images and captions encoded at once.
        known: evaluations on these sets that are there already.
    """
    known = known or {}
    first, last = start.model.state_dict(), copy.deepcopy(end.model.state_dict())
    points = []
    with _restored(end.model, last):
        for alpha in alphas:
            found = known.get(alpha)
            if found is None:
                logger.info("α = %s", alpha)
                end.model.load_state_dict(interpolated(first, last, alpha))
                found = evaluate_clip(
                    end.model, end.preprocess, end.tokenizer, sets, device=end.device, batch_size=batch_size
                )
            points.append(Point(alpha, found))
    return points


@contextmanager
def _restored(model: nn.Module, state: State) -> Iterator[None]:
    try:
        yield
    finally:
        model.load_state_dict(state)


def choose(points: Sequence[Point], goal: Goal) -> Point:
    """The point with the best score; of equals, the one that keeps more.

    The start is always within the budget: there is always one that is.

    Args:
        points: of one sweep, the start among them.
        goal: what counts.
    """
    start = next(point for point in points if point.alpha == START).evaluation.values()

    def merit(point: Point) -> tuple[float, float]:
        values = point.evaluation.values()
        return goal.score(start, values), -goal.forgotten(start, values)

    return max(points, key=merit)


def plain_copy(clip: Clip) -> Clip:
    """A CLIP in training as a plain one: a copy, LoRA merged, attention as open_clip has it."""
    plain = copy.copy(clip)
    plain.model = copy.deepcopy(clip.model).eval()
    merge(plain.model)
    return plain


def save(path: Path, start: Clip, end: Clip, alpha: Alpha, hyper_parameters: Mapping[str, Any]) -> None:
    """Write the CLIP at α as a checkpoint that `CLIPModule.load_from_checkpoint` reads: one that was trained in full.

    Args:
        path: of the checkpoint.
        start: plain CLIP.
        end: plain CLIP; it is changed.
        alpha: where.
        hyper_parameters: of the module that was trained.
    """
    import lightning

    end.model.load_state_dict(interpolated(start.model.state_dict(), end.model.state_dict(), alpha))
    split_attention(end.model.to("cpu"))
    held = dict.fromkeys(("distill_feature", "distill_logit", "l2_start"), 0.0)  # nothing is trained any more
    checkpoint = {
        "state_dict": {f"model.{name}": value for name, value in end.model.state_dict().items()},
        "hyper_parameters": {
            **hyper_parameters,
            "adapter": asdict(AdapterConfig(kind="full")),
            "compute": asdict(ComputeConfig()),  # what a locked tower need not be able to do
            "loss": {**hyper_parameters["loss"], **held},
        },
        "pytorch-lightning_version": lightning.__version__,
    }
    with atomic(path) as temporary:
        write_checkpoint(checkpoint, temporary)


def alpha_of(run: Path) -> Alpha:
    """Which α a run's interpolation.json tells as chosen."""
    return Alpha(**json.loads((run / "interpolation.json").read_text(encoding="utf-8"))["chosen"])


def as_json(goal: Goal, points: Sequence[Point], chosen: Alpha | None) -> dict[str, Any]:
    """What interpolation.json holds; `chosen` is null where a checkpoint is better than all points."""
    start = next(point for point in points if point.alpha == START).evaluation.values()
    curve = []
    for point in points:
        outcomes = point.evaluation.outcomes()
        values = {metric: of.value for metric, of in outcomes.items()}
        kept = sum(values[metric] for metric in goal.keep) / len(goal.keep)
        told: dict[str, Any] = {"gain": values[goal.gain], "keep": kept, "within": goal.score(start, values) >= 0}
        told["gain_interval"] = bootstrap_interval(outcomes[goal.gain])
        # Of several metrics: each resampled by itself, as they are of different samples.
        resamples = [resampled(outcomes[metric], seed) for seed, metric in enumerate(goal.keep)]
        told["keep_interval"] = percentiles(np.mean(resamples, axis=0))
        curve.append({**asdict(point.alpha), **told})
    return {"goal": asdict(goal), "chosen": chosen and asdict(chosen), "points": curve}
