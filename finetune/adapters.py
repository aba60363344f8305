"""What is trained: everything, low-rank updates (LoRA, Hu et al. 2021) or one tower (LiT, Zhai et al. 2022).

Before training starts, `adapt` turns an open_clip model, in place, into what training needs. From then on the state is
in the parameters
themselves: a tower is locked when none of its parameters wants a gradient. `merge` gives back a plain open_clip state
dict.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from curate.errors import ModelError
from finetune.attention import join_attention, split_attention
from finetune.config import AdapterConfig

# Last part of a module's name in open_clip's transformers (after the attention is split) → the target users name.
LINEARS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out", "c_fc": "fc", "c_proj": "proj"}
TOWERS = ("image", "text")


def adapt(model: nn.Module, config: AdapterConfig) -> None:
    """Make an open_clip model, in place, ready to be trained as configured; its outputs stay as they are.

    Raises:
        ModelError: a LoRA target names nothing in the towers that are trained.
    """
    split_attention(model)
    if config.kind == "lora":
        _inject_lora(model, config)
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            parameter.requires_grad_(config.train_logit_scale)
        elif tower_of(name) in config.lock or name == "logit_bias":  # for the sigmoid loss: module.py
            parameter.requires_grad_(False)


def tower_of(name: str) -> str | None:
    """Image or text, for the name of a parameter or module of an open_clip model; None for what belongs to neither."""
    if name in ("", "logit_scale", "logit_bias"):
        return None
    return "image" if name == "visual" or name.startswith("visual.") else "text"


def is_locked(model: nn.Module, tower: str) -> bool:
    """Whether no parameter of a tower is trained."""
    return not any(p.requires_grad for name, p in model.named_parameters() if tower_of(name) == tower)


def hold_still(model: nn.Module, *, statistics: bool) -> None:
    """Put into eval mode what training must not change: locked towers and, if asked for, BatchNorm.

    Call it after each `model.train()`.

    Args:
        model: what `adapt` made.
        statistics: keep the statistics that pretraining gathered: small batches of another domain would ruin them.
    """
    locked = [tower for tower in TOWERS if is_locked(model, tower)]
    for name, module in model.named_modules():
        if tower_of(name) in locked or (statistics and isinstance(module, _BatchNorm)):
            module.eval()


def lora_target(name: str, module: nn.Module) -> str | None:
    """The target (q, k, v, …) that a module of a split open_clip model belongs to; None if it belongs to none."""
    if isinstance(module, nn.Conv2d):
        # A ViT's only convolution embeds its patches: no projection of the kind that LoRA is for.
        return "conv" if re.fullmatch(r"visual\.(layer\d\.\d+\.)?(conv\d|downsample\.0)", name) else None
    if not isinstance(module, nn.Linear):
        return None
    parent, _, last = name.rpartition(".")
    return "pool" if parent.endswith("attnpool") else LINEARS.get(last)


def _inject_lora(model: nn.Module, config: AdapterConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="|".join(re.escape(name) for name in _target_modules(model, config)),
    )
    inject_adapter_in_model(lora, model)


def _target_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    is_resnet = hasattr(model.visual, "attnpool")
    found: dict[str, list[str]] = {target: [] for target in config.targets}
    for name, module in model.named_modules():
        target = lora_target(name, module) if tower_of(name) not in config.lock else None
        if target in found and (target != "conv" or is_resnet):
            found[target].append(name)
    if absent := [target for target, names in found.items() if not names]:
        raise ModelError(
            f"model.adapter.targets: '{absent[0]}' names no layer of this CLIP's trained towers; leave it out"
            + ("" if is_resnet else " (conv and pool are a ResNet's)")
        )
    return [name for names in found.values() for name in names]


def merge(model: nn.Module) -> None:
    """Turn an adapted model, in place, back into a plain open_clip model with LoRA merged (W + alpha/r · B·A)."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    join_attention(model)


def lora_config(model: nn.Module) -> Any:
    """Peft's configuration of the LoRA in an adapted model; None without one."""
    return getattr(model, "peft_config", {}).get("default")


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the LoRA alone, in peft's format: `adapter_model.safetensors` and `adapter_config.json`.

    It applies to the split form of the same CLIP (`split_attention`). The temperature and SigLIP's bias, which are no
    part of peft's format, are in the file's metadata as `logit_scale` and `logit_bias`.

    Raises:
        ModelError: the model has no LoRA.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = lora_config(model)
    if config is None:
        raise ModelError("there is no adapter to save: this CLIP was trained in full")
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model)
    scales = {name: p for name, p in model.named_parameters() if name in ("logit_scale", "logit_bias")}
    metadata = {"format": "pt"} | {name: repr(float(p.detach())) for name, p in scales.items()}
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "adapter_model.safetensors", metadata
    )
    config.save_pretrained(folder)
