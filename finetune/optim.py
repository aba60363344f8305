"""What the optimiser does: parameter groups, AdamW, the learning rate of each step, the bounds of the temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune.config import OptimizerConfig
from finetune.layers import Depths, tower_of

MAX_LOGIT_SCALE = math.log(100)
# Embeddings (of tokens, positions and class; timm's names too), the query of an attention pool, DoRA's lengths.
NOT_DECAYED = ("embedding", "pos_embed", "cls_token", "reg_token", "latent", "lora_magnitude")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that the optimiser treats alike, in numbers."""

    name: str
    tensors: int
    parameters: int
    lr: float
    weight_decay: float


def groups(model: nn.Module, config: OptimizerConfig) -> list[Group]:
    """What each group of trainable parameters will get."""
    return [
        Group(
            name=group["name"],
            tensors=len(group["params"]),
            parameters=sum(parameter.numel() for parameter in group["params"]),
            lr=group["lr"],
            weight_decay=group["weight_decay"],
        )
        for group in parameter_groups(model, config)
    ]


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters in groups of one learning rate and one weight decay, each with the name of what it is.

    Weight decay: matrices and kernels. None: gains, biases and logit_scale (all of one or no axis), as in the paper;
    and the embeddings of tokens, positions and class, which open_clip's own optimiser decays: for adaptation they are
    better left where they are; the query of SigLIP's attention pool; and DoRA's lengths, which are gains.

    Learning rate: the tower's (logit_scale: lr), times layer_decay for every step down from the head of the tower, as
    in BEiT (arXiv 2106.08254, appendix): the head has all of it, the last block `layer_decay`, the stem
    `layer_decay ** (blocks + 1)`.
    """
    depths = Depths(name for name, _ in model.named_parameters())
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower, decayed = tower_of(name), _is_decayed(name, parameter)
        down = depths.from_head(name) if config.layer_decay < 1 else 0
        group = groups.setdefault(
            _group_name(tower, depths.depth(name) if config.layer_decay < 1 else None, decayed),
            {
                "params": [],
                "lr": _tower_rate(tower, config) * config.layer_decay**down,
                "weight_decay": config.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items()]


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(part in name for part in NOT_DECAYED)


def _group_name(tower: str | None, depth: int | None, decayed: bool) -> str:
    if tower is None:
        return "logit_scale"
    return tower + ("" if depth is None else f" {depth:02d}") + ("" if decayed else ", no decay")


def _tower_rate(tower: str | None, config: OptimizerConfig) -> float:
    own = {"image": config.image_lr, "text": config.text_lr}.get(tower or "")
    return config.lr if own is None else own


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in its fused form, which is several times faster on CPU and GPU alike."""
    fused = all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in model.parameters())
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )
    # Fused, it offers to undo a loss scale inside its step. Lightning then refuses to clip in any mixed precision,
    # because gradients would be clipped while still scaled; without the offer it undoes the scale before.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Learning rate of a step: a straight rise to lr over the warm-up, then the schedule.

    That is half a cosine or a straight line towards min_lr, or no change. Warm-up and cosine as in open_clip.

    Args:
        step: from 0; min_lr from `total` on.
        total: number of steps of the whole run.
        config: lr, min_lr, schedule, and the share of the steps that is warm-up.
    """
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


def schedule(
    optimizer: torch.optim.Optimizer, total: Callable[[], int], config: OptimizerConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """`learning_rate` as a scheduler that is stepped after each optimiser step.

    It is one factor for all groups, each of which started with a learning rate of its own.

    Args:
        optimizer: whose groups.
        total: gives the steps of the whole run; asked at each step, since where a run goes on is known only when all
            is restored, which of sharded weights is after this.
        config: peak, warm-up and decay.
    """
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, total(), config) / config.lr)


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
