"""LoRA's linear layer in as few passes over its input and output as it takes.

peft's own makes the update as a tensor of its own, scales it, and adds it, and autograd does as much on the way back:
with a low rank most of that time is reading and writing. Here both are added into the product as they are made, and
nothing but the input and the input's low-rank image is kept for the backward pass. Numbers are those of peft, up to the
order of sums.

Axes: M positions of all samples, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn


class LoraLinear(Linear):
    """peft's LoRA of a linear layer; what is not plain (dropout, DoRA, merged) is left to peft."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, I) → (…, O)."""
        if self.disable_adapters or self.merged or args or kwargs or (self.training and self._drops()):
            whole: Tensor = super().forward(x, *args, **kwargs)
            return whole
        base = self.base_layer
        given: tuple[Any, ...] = (
            x,
            base.weight,
            base.bias,
            self.lora_A["default"].weight,
            self.lora_B["default"].weight,
        )
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            given = tuple(tensor if tensor is None else tensor.to(kind) for tensor in given)
        flat_MI, *weights = given[0].flatten(0, -2), *given[1:]
        out_MO: Tensor = _Update.apply(flat_MI, *weights, self.scaling["default"])
        return out_MO.view(*x.shape[:-1], -1)

    def _drops(self) -> bool:
        return not isinstance(self.lora_dropout["default"], nn.Identity)


class _Update(torch.autograd.Function):
    """x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ, with gradients to x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_rI: Tensor, b_Or: Tensor, scale: float
    ) -> Tensor:
        out_MO = x_MI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, x_MI, weight_OI.T)
        low_Mr = x_MI @ a_rI.T
        ctx.save_for_backward(x_MI, weight_OI, a_rI, b_Or, low_Mr)
        ctx.scale = scale
        return out_MO.addmm_(low_Mr, b_Or.T, alpha=scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_MO: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, weight_OI, a_rI, b_Or, low_Mr = ctx.saved_tensors
        back_Mr = gradient_MO @ b_Or
        to_x = (gradient_MO @ weight_OI).addmm_(back_Mr, a_rI, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        to_a = (back_Mr.T @ x_MI).mul_(ctx.scale) if ctx.needs_input_grad[3] else None
        to_b = (gradient_MO.T @ low_Mr).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        return to_x, None, None, to_a, to_b, None


def quicken(model: nn.Module) -> None:
    """Let the plain LoRA layers of a model, in place, compute so; their names and weights stay."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and not is_variant(module):
            module.__class__ = LoraLinear


def is_variant(layer: LoraLayer) -> bool:
    """Whether it is another sum than W + s·B·A: DoRA."""
    return bool(layer.lora_variant) or any(layer.use_dora.values())
