"""What the optimiser does: parameter groups, AdamW, the learning rate of each step, the bounds of the temperature."""

from __future__ import annotations

import math

import torch
from torch import nn

from finetune.config import OptimizerConfig

MAX_LOGIT_SCALE = math.log(100)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The trainable parameters in two groups: matrices and kernels with weight decay; the rest without.

    Without: gains, biases and logit_scale (all of one or no axis), as in the paper; and the embeddings of tokens,
    positions and class, which open_clip's own optimiser decays: for adaptation they are better left where they are.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    groups = [
        {"name": "decayed", "params": decayed, "weight_decay": weight_decay},
        {"name": "free", "params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in its fused form, which is several times faster on CPU and GPU alike."""
    fused = all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in model.parameters())
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )
    # Fused, it offers to undo a loss scale inside its step. Lightning then refuses to clip in any mixed precision,
    # because gradients would be clipped while still scaled; without the offer it undoes the scale before.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Learning rate of a step: a straight rise to lr over the warm-up, then half a cosine towards min_lr.

    As in open_clip.

    Args:
        step: from 0; min_lr from `total` on.
        total: number of steps of the whole run.
        config: lr, min_lr, and the share of the steps that is warm-up.
    """
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def schedule(
    optimizer: torch.optim.Optimizer, total: int, config: OptimizerConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """`learning_rate` as a scheduler that is stepped after each optimiser step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, total, config) / config.lr)


def total_steps(max_steps: int, max_epochs: int | None, steps_per_epoch: int) -> int:
    """Optimiser steps of a run: the lower of the limits that are set (Lightning's -1 and None: not set).

    Lightning's own estimate is not used: asking for it drops the position of a resumed loader (lightning#20550).
    """
    limits = [max_steps] if max_steps >= 0 else []
    if max_epochs is not None and max_epochs >= 0:
        limits.append(max_epochs * steps_per_epoch)
    return min(limits)


def clamp_logit_scale(model: nn.Module) -> None:
    """Keep logits from being scaled by more than 100, or less than 1 (Radford et al. 2021, section 2.5)."""
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)  # type: ignore[operator]
