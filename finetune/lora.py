"""LoRA's linear layers in few passes over their inputs and outputs, keeping little for the backward pass.

peft's own makes the update as a tensor of its own, scales it, and adds it, and autograd does as much on the way back:
with a low rank most of that time is reading and writing. Here

- the update is added to the frozen weight, which is small, and not to the output, which is large: one product forward
  and one back to the input, as without LoRA. Where numbers are rounded to less than float32 (half precision, TF32) the
  weight would round the update away, so there it is added to the output as it is made.
- layers that read the same input (query, key, value) are one operation, whose gradients to it are summed as they come.
- of an MLP the activation's output, four times as wide as the block, is not kept but computed again from its input,
  which the activation's own gradient needs anyway.

Low-rank products lie as rank × positions: a BLAS that walks along the positions is up to twenty times as fast as one
that jumps between a handful of columns.

Numbers are those of peft, up to the order of sums.

Axes: M positions of all samples, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from finetune.attention import SplitAttention


class Factors(NamedTuple):
    """The tensors of a layer: what is frozen, weight (O, I) and bias (O,), and what is trained, a (r, I), b (O, r)."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor

    def merged(self, scale: float) -> Tensor:
        """W + s·B·A."""
        return torch.add(self.weight, self.b @ self.a, alpha=scale)


class LoraLinear(Linear):
    """peft's LoRA of a linear layer; what is not plain (dropout, DoRA, merged) is left to peft."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, I) → (…, O)."""
        if args or kwargs or not self.is_plain():
            whole: Tensor = super().forward(x, *args, **kwargs)
            return whole
        return updated(x, [self])[0]

    def is_plain(self) -> bool:
        """Whether it is W + s·B·A at this moment."""
        drops = self.training and not isinstance(self.lora_dropout["default"], nn.Identity)
        return not (self.disable_adapters or self.merged or drops)


class LoraAttention(SplitAttention):
    """Attention that projects to query, key and value in one operation, as far as they are of the same."""

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As always."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if key is not value or not all(isinstance(layer, LoraLinear) and layer.is_plain() for layer in layers):
            return super().project(query, key, value)
        q_proj, *others = cast("list[LoraLinear]", [*layers])
        if query is key:
            q, k, v = updated(query, [q_proj, *others])
        else:
            (q,), (k, v) = updated(query, [q_proj]), updated(key, others)
        return q, k, v


class LoraMlp(nn.Sequential):
    """open_clip's MLP, which does not keep the output of its activation."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        c_fc, activation, c_proj = self
        if not (isinstance(c_proj, LoraLinear) and c_proj.is_plain()):
            whole: Tensor = super().forward(x)
            return whole
        return updated(c_fc(x), [c_proj], _name_of(activation))[0]


def updated(x: Tensor, layers: Sequence[LoraLinear], activation: str | None = None) -> tuple[Tensor, ...]:
    """What plain LoRA layers make of the same input, after an activation: (…, I) → (…, O) each.

    Args:
        x: their input, or that of the activation.
        layers: on one input.
        activation: as `_name_of` tells it.
    """
    given: list[Tensor | None] = [x]
    for layer in layers:
        base = layer.base_layer
        given += (base.weight, base.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    flat_MI, *factors = [tensor if tensor is None or kind is None else tensor.to(kind) for tensor in given]
    assert flat_MI is not None
    scales = tuple(layer.scaling["default"] for layer in layers)
    outs: tuple[Tensor, ...] = _Update.apply(flat_MI.flatten(0, -2), activation, scales, *factors)
    return tuple(out_MO.view(*x.shape[:-1], -1) for out_MO in outs)


class _Update(torch.autograd.Function):
    """f(x)·Wᵀ + b + s·(f(x)·Aᵀ)·Bᵀ of each layer, with gradients to x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, activation: str | None, scales: tuple[float, ...], *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        read_MI = _activate(x_MI, activation)
        ctx.activation, ctx.scales, ctx.is_exact = activation, scales, _is_exact(x_MI)
        outs, lows = [], []
        for layer, scale in zip(_by_layer(factors), scales, strict=True):
            weight_OI = layer.merged(scale) if ctx.is_exact else layer.weight
            out_MO = read_MI @ weight_OI.T if layer.bias is None else torch.addmm(layer.bias, read_MI, weight_OI.T)
            if not ctx.is_exact:
                lows.append(layer.a @ read_MI.T)
                out_MO.addmm_(lows[-1].T, layer.b.T, alpha=scale)
            outs.append(out_MO)
        ctx.save_for_backward(x_MI, *factors, *lows)
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, *saved = ctx.saved_tensors
        count = len(ctx.scales) * len(Factors._fields)
        layers, lows = _by_layer(saved[:count]), saved[count:]
        read_MI = _activate(x_MI, ctx.activation)
        if ctx.is_exact:
            # Of all layers at once: they read the same.
            lows = (torch.cat([each.a for each in layers]) @ read_MI.T).split([len(each.a) for each in layers])
        to_x: Tensor | None = None
        to_factors: list[Tensor | None] = []
        for gradient_MO, layer, low_rM, scale in zip(gradients, layers, lows, ctx.scales, strict=True):
            back_rM = layer.b.T @ gradient_MO.T
            to_factors += (None, None, (back_rM @ read_MI).mul_(scale), (low_rM @ gradient_MO).mul_(scale).T)
            if ctx.needs_input_grad[0]:
                weight_OI = layer.merged(scale) if ctx.is_exact else layer.weight
                to_x = gradient_MO @ weight_OI if to_x is None else to_x.addmm_(gradient_MO, weight_OI)
                if not ctx.is_exact:
                    to_x.addmm_(back_rM.T, layer.a, alpha=scale)
        if to_x is not None:
            to_x = _through(to_x, x_MI, ctx.activation)
        return to_x, None, None, *to_factors


def _by_layer(factors: Sequence[Any]) -> list[Factors]:
    size = len(Factors._fields)
    return [Factors(*factors[start : start + size]) for start in range(0, len(factors), size)]


def _is_exact(x: Tensor) -> bool:
    """Whether products are rounded to float32 or finer; a GPU may be told to round them to TF32."""
    return x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"


# --- activations ------------------------------------------------------------------------------------------------------

QUICK = 1.702  # QuickGELU's x·σ(1.702·x)


def _name_of(activation: nn.Module) -> str | None:
    """`quick`, or what `approximate` of torch's GELU is; None of any other."""
    from open_clip.transformer import QuickGELU

    if type(activation) is QuickGELU:
        return "quick"
    return activation.approximate if type(activation) is nn.GELU else None


def _activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    return x * torch.sigmoid(QUICK * x) if activation == "quick" else functional.gelu(x, approximate=activation)


def _through(gradient: Tensor, x: Tensor, activation: str | None) -> Tensor:
    """The gradient to an activation's input, from that to its output."""
    if activation is None:
        return gradient
    if activation == "quick":
        share = torch.sigmoid(QUICK * x)
        return gradient * (share * (1 + QUICK * x * (1 - share)))
    through: Tensor = torch.ops.aten.gelu_backward(gradient, x, approximate=activation)
    return through


# --- which layers -----------------------------------------------------------------------------------------------------


def quicken(model: nn.Module) -> None:
    """Let the plain LoRA layers of a model, in place, compute so; their names and weights stay."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and not is_variant(module):
            module.__class__ = LoraLinear
    for module in model.modules():
        if type(module) is SplitAttention:
            module.__class__ = LoraAttention
        elif type(module) is nn.Sequential and _is_mlp(module):
            module.__class__ = LoraMlp


def unquicken(model: nn.Module) -> None:
    """Give a model, whose LoRA layers have been merged, its own MLPs back, in place."""
    quick: list[nn.Module] = [module for module in model.modules() if type(module) is LoraMlp]
    for module in quick:
        module.__class__ = nn.Sequential


def _is_mlp(module: nn.Sequential) -> bool:
    names = [name for name, _ in module.named_children()]
    return names == ["c_fc", "gelu", "c_proj"] and isinstance(module[2], LoraLinear) and _name_of(module[1]) is not None


def is_variant(layer: LoraLayer) -> bool:
    """Whether it is another sum than W + s·B·A: DoRA."""
    return bool(layer.lora_variant) or any(layer.use_dora.values())
