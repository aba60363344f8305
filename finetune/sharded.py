"""Weights, gradients and AdamW's moments spread over the devices (FSDP2), for towers that do not fit on one.

Lightning's ModelParallelStrategy makes the processes and writes the checkpoints: whole ones, in the form of every other
run's, so that a run can be exported, evaluated and even continued without it. What is left is here: which modules are
units of their own (each block of a tower, and all the rest as one), and the temperature, a number of no axis, which
FSDP2 cannot take apart: every process has it whole, and its gradient is averaged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from finetune.layers import blocks
from finetune.module import CLIPModule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ENCODERS = ("encode_image", "encode_text")


class Sharding(ModelParallelStrategy):
    """Lightning's strategy with data in parallel and weights sharded over all processes, and whole checkpoints."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Join the other processes; how many they are is known by now."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Give each process its part of a whole checkpoint.

        Lightning's own way takes no module of which some parameters are sharded and others not.
        """
        checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)
        model: Any = self.model
        named = dict(model.named_parameters())
        weights = checkpoint.pop("state_dict")
        model.load_state_dict({name: _part(weight, named.get(name)) for name, weight in weights.items()})
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            groups = optimizer.state_dict()["param_groups"]
            # By its place in its group: other strategies number parameters, this one names them.
            was = [old for group in saved["param_groups"] for old in group["params"]]
            order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {key: _part(value, parameter) for key, value in saved["state"][old].items()}
                for number, (old, parameter) in enumerate(zip(was, order, strict=True))
            }
            groups = [old | {"params": new["params"]} for old, new in zip(saved["param_groups"], groups, strict=True)]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        return checkpoint


class ShardedCLIPModule(CLIPModule):
    """A CLIPModule under `Sharding`. Its checkpoints are a CLIPModule's."""

    is_sharded = True

    def configure_model(self) -> None:
        """Shard the model, once there are processes."""
        mesh = self.device_mesh
        if mesh is not None and not any(map(_is_part, self.model.parameters())):
            shard(self.model, mesh["data_parallel"])

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Average what FSDP2 leaves to each process, as it averages the rest."""
        for parameter in self.parameters():
            if parameter.grad is not None and not _is_part(parameter):
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    def configure_gradient_clipping(self, *given: Any, **named: Any) -> None:
        """Clip to a norm of the whole gradient; torch's own does not take sharded and whole tensors together."""
        most = named.get("gradient_clip_val", given[1] if len(given) > 1 else None)
        if most:
            clip_to_norm([p.grad for p in self.parameters() if p.grad is not None], float(most))


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Shard an adapted open_clip model, in place, over the processes of a mesh."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Tensors of no axis cannot be sharded.
    whole = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for block in blocks(name for name, _ in model.named_parameters()):
        fully_shard(model.get_submodule(block), mesh=mesh)
    # The rest too is given back after use: whatever comes next (a checkpoint) finds all parts in their place.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for name in ENCODERS:
        register_fsdp_forward_method(model, name)


def clip_to_norm(gradients: Sequence[Tensor], most: float) -> Tensor:
    """Scale gradients, in place, so that their common norm is at most `most`; its value before.

    As `torch.nn.utils.clip_grad_norm_`, but some may be sharded over the processes and others whole on each.
    """
    zero = torch.zeros((), device=gradients[0].device)
    parts = [gradient.to_local() for gradient in gradients if _is_part(gradient)]  # type: ignore[attr-defined]
    squares = torch.stack([zero, *(part.square().sum().float() for part in parts)]).sum()
    dist.all_reduce(squares)
    whole = [gradient.square().sum().float() for gradient in gradients if not _is_part(gradient)]
    norm = torch.stack([squares, *whole]).sum().sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local: Tensor = gradient.to_local() if _is_part(gradient) else gradient  # type: ignore[attr-defined]
        local.mul_(factor.to(local.dtype))
    return norm


def _part(whole: Any, like: Tensor | None) -> Any:
    """This process's part of a tensor that belongs to a sharded parameter; anything else as it is."""
    if like is None or not _is_part(like) or not isinstance(whole, Tensor) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(whole.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def _is_part(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
