"""What is wrong with a training run while it is: numbers that are none any more, embeddings that fall together.

Both are looked at every few steps, since to look makes a GPU wait, the weights before each checkpoint too; it therefore
never holds weights that are no numbers, and what went wrong did so at most `every_n_steps` steps before it is told.

Letters: B pairs of the batch, D width of the embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from curate.errors import Diverged
from finetune.layers import tower_of

logger = logging.getLogger("cliptailor")

FALLEN = 0.25  # share of the effective rank at the start, below which embeddings have collapsed
LEAST_CONTRAST = 0.01  # mean difference between logits, below which a softmax sees all the same
MOST = 256  # pairs that are looked at


@dataclass(frozen=True, slots=True)
class Spread:
    """How far apart the embeddings of a batch are.

    Attributes:
        distance: 1 - mean cosine of two of them: 0 where all are the same, about 1 where they point anywhere.
        rank: effective rank (Roy and Vetterli 2007): exp of the entropy of the singular values' shares; 1 to min(B, D).
    """

    distance: float
    rank: float


def spread(embedding_BD: Tensor) -> Spread:
    """The spread of L2-normalised embeddings."""
    x = embedding_BD[:MOST].detach().float()
    pairs = len(x) * (len(x) - 1)
    distance = 1 - (x.sum(0).square().sum() - len(x)) / max(1, pairs)
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=1e-12)
    rank = torch.special.entr(share).sum().exp()
    return Spread(distance.item(), rank.item())


class Alarms(lightning.Callback):
    """Stops a run whose loss or weights are no numbers; warns once when embeddings collapse; logs their spread.

    They have collapsed where the logits of a batch hardly differ (mean cosine distance × logit factor below 0.01), or
    where their effective rank has fallen to a quarter of a pretrained CLIP's at the first look.

    Put it before the callbacks that save.

    Args:
        every_n_steps: how often it looks.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.start: dict[str, float] = {}  # effective ranks
        self.warned: list[str] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        """Look, if it is time.

        Raises:
            Diverged: a loss or weight is no number.
        """
        module, outputs, _, _ = arguments
        step = trainer.global_step
        if step % self.every_n_steps and not trainer.is_last_batch:
            return
        check_finite(module, trainer, outputs["loss"])
        if step % self.every_n_steps == 0:
            for tower, embeddings in zip(("image", "text"), outputs["embeddings"], strict=True):
                found = spread(embeddings)
                module.log_dict(
                    {f"train/{tower}_spread": found.distance, f"train/{tower}_rank": found.rank},
                    batch_size=len(embeddings),
                    sync_dist=trainer.world_size > 1,
                )
                self._compare(module, tower, found, len(embeddings), step)

    def _compare(self, module: Any, tower: str, found: Spread, pairs: int, step: int) -> None:
        began = self.start.setdefault(tower, found.rank)
        contrast = found.distance * float(module.model.logit_scale.detach().exp())
        # The rank of random weights means nothing yet, and falls first as they learn where the data lies.
        # An epoch's last batch may hold fewer pairs than the rank was at the start, and has no higher rank than that.
        fell = found.rank < FALLEN * min(began, pairs) and not module.from_scratch
        if tower in self.warned or (contrast >= LEAST_CONTRAST and not fell):
            return
        self.warned.append(tower)
        logger.warning(
            "step %d: the %s embeddings are collapsing: mean cosine distance %.2g, effective rank %.3g (%.3g at the "
            "start). A smaller learning rate, a larger batch or fewer equal captions in it usually help",
            *(step, tower, found.distance, found.rank, began),
        )

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Look at the weights, whoever saves them, and when.

        Raises:
            Diverged: one is no number.
        """
        del checkpoint
        check_finite(pl_module, trainer)

    def state_dict(self) -> dict[str, Any]:
        """Kept in each checkpoint."""
        return {"start": self.start, "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the beginning of the run."""
        self.start, self.warned = state_dict["start"], state_dict["warned"]


def check_finite(module: Any, trainer: lightning.Trainer, loss: Tensor | None = None) -> None:
    """Check the weights that the last step left, and its loss.

    Raises:
        Diverged: one is no number; says which, and why that may be.
    """
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    norms = torch.stack([*map(_whole, torch._foreach_norm(weights))])
    sound = torch.isfinite(norms).all()
    if loss is not None:
        sound &= torch.isfinite(loss)
    if trainer.strategy.reduce_boolean_decision(bool(sound), all=True):
        return
    lost = [name for name, _ in _not_finite(module.model)]
    towers, step = sorted({tower_of(name) or name for name in lost}), trainer.global_step
    what = f"weights ({', '.join(towers)})" if lost else "train/loss"
    raise Diverged(
        f"step {step}: no numbers any more: {what}. {_cause(trainer, module)}; then start with --restart (such weights "
        "are never saved, so a checkpoint of this run is sound)"
    )


def _not_finite(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(_whole(parameter.detach())).all():
            yield name, parameter


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _cause(trainer: lightning.Trainer, module: Any) -> str:
    if str(trainer.precision).startswith("16"):
        return f"{trainer.precision} overflows above 65,504; try trainer.precision bf16-mixed or 32-true"
    rates = sorted({group["lr"] for group in trainer.optimizers[0].param_groups})
    clipped = trainer.gradient_clip_val
    text = f"The learning rate of {rates[-1]:.3g} is probably too large for {module.adapter.kind}; try a tenth of it"
    return text if clipped else f"{text}, and trainer.gradient_clip_val: 1.0"
