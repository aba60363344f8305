"""What a configuration trains, told before anything is trained: parts, parameters, GFLOPs, learning rates.

It is made from the architecture alone, with random weights, so that no checkpoint has to be there; a name that brings
its weights (local-dir:, hf-hub:) loads them. Nothing is written.

GFLOPs are those of one forward pass of open_clip's own model, counted as open_clip's table does (docs/model_profile.csv
there): a multiplication and an addition are two, attention included, norms and activations not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from curate.clip import OPENAI_NAMES, Clip, load_clip
from finetune.config import AdapterConfig, ClipConfig, ModelConfig
from finetune.layers import Depths, block_of, tower_of
from finetune.module import make_trainable
from finetune.optim import Group, groups
from finetune.pixels import sides


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tower's stem, one of its blocks, its head; or the temperature (tower: none)."""

    tower: str
    part: str
    parameters: int
    """Of the CLIP as it was, without adapters."""
    adapter: int
    """Of the adapters put beside them."""
    trained: int
    """Of both, how many are trained."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `finetune summary` shows."""

    clip: str
    adapter: str
    parameters: int
    adapter_parameters: int
    trained: int
    trained_share: float
    """Of all parameters, adapters included."""
    image_gflops: float
    """Of one image, forward."""
    caption_gflops: float
    """Of one caption, padded to the context length, forward."""
    parts: list[Part]
    groups: list[Group]


def summarise(config: ModelConfig) -> Summary:
    """What training as configured would change, and at which rates.

    Raises:
        ModelError: the architecture is not known, or the adapter names no layer of it.
    """
    clip = _untrained(config.clip)
    image, caption = gflops(clip)
    make_trainable(clip, _quick(config.adapter), config.loss)
    parts = _parts(clip.model)
    parameters = sum(part.parameters for part in parts)
    added, trained = sum(part.adapter for part in parts), sum(part.trained for part in parts)
    return Summary(
        clip=config.clip.label,
        adapter=config.adapter.variant if config.adapter.kind == "lora" else config.adapter.kind,
        parameters=parameters,
        adapter_parameters=added,
        trained=trained,
        trained_share=trained / (parameters + added),
        image_gflops=image,
        caption_gflops=caption,
        parts=parts,
        groups=groups(clip.model, config.optimizer),
    )


def _untrained(config: ClipConfig) -> Clip:
    name = config.name
    if config.weights == "openai":  # its weights' architecture, which has QuickGELU
        name = OPENAI_NAMES.get(name, name)
    return load_clip(name, None, device="cpu")


def _quick(config: AdapterConfig) -> AdapterConfig:
    """PiSSA has LoRA's shapes, and costs a decomposition of every weight."""
    return replace(config, variant="lora") if config.variant == "pissa" else config


def gflops(clip: Clip) -> tuple[float, float]:
    """GFLOPs of one image and of one caption of a plain CLIP, two a multiply-add."""
    weight = next(p for p in clip.model.parameters() if p.is_floating_point())
    pixels = torch.zeros(1, 3, *sides(clip.preprocess_cfg), device=weight.device, dtype=weight.dtype)
    tokens = clip.tokenizer(["a photo"]).to(weight.device)
    return _count(clip.model.encode_image, pixels), _count(clip.model.encode_text, tokens)  # type: ignore[arg-type]


def _count(encode: Callable[[Tensor], Tensor], given: Tensor) -> float:
    # With gradients on, torch's attention takes no fused path of its own; and of the kernels, the plain one is made
    # of matrix products, which are counted on every device.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encode(given)
    return counter.get_total_flops() / 1e9


def _parts(model: nn.Module) -> list[Part]:
    named = dict(model.named_parameters())
    depths = Depths(named)
    counts: dict[tuple[str, str], list[int]] = {}
    for name, parameter in named.items():
        tower = tower_of(name)
        count = counts.setdefault((tower or "none", _part_name(name, tower, depths)), [0, 0, 0])
        count["lora_" in name] += parameter.numel()
        count[2] += parameter.numel() if parameter.requires_grad else 0
    return [
        Part(tower=tower, part=part, parameters=own, adapter=added, trained=trained)
        for (tower, part), (own, added, trained) in sorted(counts.items(), key=lambda item: _place(item[0], depths))
    ]


def _place(tower_and_part: tuple[str, str], depths: Depths) -> tuple[int, int]:
    """Image before text before neither; each from its stem to its head."""
    tower, part = tower_and_part
    blocks = depths.blocks.get(tower, [])
    depth = {"stem": -1, "head": len(blocks)}.get(part)
    if depth is None:
        depth = blocks.index(part) if part in blocks else 0
    return ("image", "text", "none").index(tower), depth


def _part_name(name: str, tower: str | None, depths: Depths) -> str:
    if tower is None:
        return name
    return block_of(name) or ("head" if depths.from_head(name) == 0 else "stem")


def tables(summary: Summary) -> list[Table]:
    """The summary as two tables: the CLIP's parts, and the optimiser's groups."""
    title = (
        f"{summary.clip}, {summary.adapter}: {summary.trained:,} of "
        f"{summary.parameters + summary.adapter_parameters:,} parameters trained ({summary.trained_share:.2%}); "
        f"GFLOPs (2 a multiply-add): {summary.image_gflops:.2f} an image, {summary.caption_gflops:.2f} a caption"
    )
    parts = Table(title=title, title_justify="left")
    for column in ("tower", "part", "parameters", "adapter", "trained", "share"):
        parts.add_column(column, justify="left" if column in ("tower", "part") else "right", no_wrap=True)
    for part in summary.parts:
        share = part.trained / (part.parameters + part.adapter)
        numbers = (f"{number:,}" for number in (part.parameters, part.adapter, part.trained))
        parts.add_row(part.tower, part.part, *numbers, f"{share:.1%}")
    rates = Table(title="what the optimiser gives to each group", title_justify="left")
    for column in ("group", "tensors", "parameters", "peak lr", "weight decay"):
        rates.add_column(column, justify="left" if column == "group" else "right", no_wrap=True)
    for group in summary.groups:
        rate, decay = f"{group.lr:.3g}", f"{group.weight_decay:g}"
        rates.add_row(group.name, f"{group.tensors}", f"{group.parameters:,}", rate, decay)
    return [parts, rates]
