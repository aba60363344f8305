"""How the towers are computed: a batch in parts (cached gradients), blocks twice, compiled, without some patches.

Cached gradients (GradCache, arXiv 2101.06983) let a contrast see more pairs than fit through the towers at once. All
parts are embedded without keeping what their backward pass would need, the loss is taken over all embeddings, and then
each part is embedded again and its share of the gradient sent back. Torch's own checkpointing does it here, a part at a
time: it replays random numbers and autocast; and because a parameter's gradient is complete only after all parts, DDP
exchanges it once, and clipping and a loss scaler see it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from curate.errors import ModelError
from finetune.adapters import is_locked
from finetune.config import ComputeConfig
from finetune.packing import Packed, encode_packed

Part = TypeVar("Part")


def in_parts(encode: Callable[[Tensor], Tensor], inputs: Tensor, size: int | None) -> Tensor:
    """`encode(inputs)` (B, …) → (B, D), its backward pass with the memory of `size` rows; None: of all.

    Each row must be encoded independently of the others, but for random numbers: they are drawn part by part, and
    drawn again alike for the backward pass.
    """
    if size is None or len(inputs) <= size:
        return encode(inputs)
    return one_by_one(encode, inputs.split(size))


def one_by_one(encode: Callable[[Part], Tensor], parts: Sequence[Part]) -> Tensor:
    """`encode` of each part, one after the other (B, D), its backward pass with the memory of one."""
    if len(parts) == 1:
        return encode(parts[0])
    if not torch.is_grad_enabled():
        return torch.cat([encode(part) for part in parts])
    return torch.cat([_twice(encode, part) for part in parts])


def _twice(encode: Callable[[Part], Tensor], part: Part) -> Tensor:
    """`encode(part)`, computed again for its gradient."""
    # Random numbers are drawn again alike on the devices of the tensors that are handed over, and no others.
    seen = part.token_RW if isinstance(part, Packed) else part
    return checkpoint(lambda _: encode(part), seen, use_reentrant=False)


def prepare(model: nn.Module, config: ComputeConfig) -> None:
    """Make an adapted open_clip model, in place, compute as configured.

    Raises:
        ModelError: a tower cannot be computed so.
    """
    towers: dict[str, Any] = {"image": model.visual, "text": getattr(model, "text", model)}
    trained = {name: tower for name, tower in towers.items() if not is_locked(model, name)}
    if config.gradient_checkpointing:
        for name, tower in trained.items():
            _checkpoint_blocks(name, tower)
    if config.patch_dropout:
        _drop_patches(trained.get("image"), config.patch_dropout)
    if config.compile:
        for tower in towers.values():
            # A CLIP whose text tower is not a module of its own embeds tokens itself: its transformer alone then.
            part: Any = tower.transformer if tower is model else tower
            part.compile()


def packed_encoder(config: ComputeConfig) -> Callable[[Any, Packed], Tensor]:
    """`encode_packed`, which goes through the text tower's blocks itself, compiled where the towers are."""
    compiled: Callable[[Any, Packed], Tensor] = torch.compile(encode_packed) if config.compile else encode_packed
    return compiled


def has_trained_statistics(model: nn.Module) -> bool:
    """Whether a BatchNorm is in training mode: its statistics are those of whatever goes through it at once."""
    return any(isinstance(module, _BatchNorm) and module.training for module in model.modules())


def _checkpoint_blocks(name: str, tower: Any) -> None:
    blocks: Any = getattr(tower, "transformer", None)
    if hasattr(blocks, "grad_checkpointing"):
        blocks.grad_checkpointing = True
    elif hasattr(getattr(tower, "trunk", None), "set_grad_checkpointing"):
        tower.set_grad_checkpointing(True)
    else:
        raise ModelError(
            f"model.compute.gradient_checkpointing: the {name} tower has no transformer blocks; "
            "model.compute.micro_batch_size saves memory with every tower"
        )


def _drop_patches(visual: Any, share: float) -> None:
    from open_clip.transformer import PatchDropout
    from timm.layers.patch_dropout import PatchDropout as TimmPatchDropout

    if visual is None:
        raise ModelError(
            "model.compute.patch_dropout: the image tower is not trained, and sees all patches; set it to 0"
        )
    trunk: Any = getattr(visual, "trunk", None)
    if hasattr(visual, "patch_dropout"):
        visual.patch_dropout = PatchDropout(share)
    elif isinstance(getattr(trunk, "patch_drop", None), nn.Identity):
        trunk.patch_drop = TimmPatchDropout(share, num_prefix_tokens=trunk.num_prefix_tokens)
    else:
        raise ModelError(
            "model.compute.patch_dropout: this CLIP's image tower is no ViT of open_clip's or timm's; set it to 0"
        )
