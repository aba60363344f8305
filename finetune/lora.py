"""LoRA's linear layers in few passes over their inputs and outputs, keeping little for the backward pass.

peft's own makes the update as a tensor of its own, scales it, and adds it, and autograd does as much on the way back:
with a low rank most of that time is reading and writing. Here

- the update is added to the frozen weight, which is small, and not to the output, which is large: one product forward
  and one back to the input, as without LoRA. Where numbers are rounded to less than float32 (half precision, TF32) the
  weight would round the update away, so there it is added to the output as it is made.
- layers that read the same input (query, key, value) are one operation, whose gradients to it are summed as they come.
- what a LayerNorm and an activation make of their input is not kept but computed again: their own gradients need the
  input anyway. Of an MLP the activation's output is four times as wide as the block.

Low-rank products lie as rank × positions: a BLAS that walks along the positions is up to twenty times as fast as one
that jumps between a handful of columns.

Numbers are those of peft, up to the order of sums.

Axes: M positions of all samples, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from open_clip.transformer import LayerNorm, QuickGELU, ResidualAttentionBlock
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
        return updated(c_fc(x), [c_proj], _activation_of(activation))[0]


class LoraBlock(ResidualAttentionBlock):
    """open_clip's block, which does not keep the outputs of its LayerNorms."""

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        c_fc, activation, c_proj = self.mlp
        layers = (self.attn.q_proj, self.attn.k_proj, self.attn.v_proj, c_fc, c_proj)
        norm_1, norm_2 = _norm_of(self.ln_1), _norm_of(self.ln_2)  # None, where it has been set free since
        is_cross = k_x is not None or v_x is not None
        is_plain = all(isinstance(layer, LoraLinear) and layer.is_plain() for layer in layers)
        if is_cross or not is_plain or norm_1 is None or norm_2 is None:
            whole: Tensor = super().forward(q_x, k_x, v_x, attn_mask)
            return whole
        q, k, v = updated(q_x, layers[:3], norm_1)
        x = q_x + self.ls_1(self.attn.mix(q, k, v, attn_mask))
        wide = updated(x, [c_fc], norm_2)[0]
        found: Tensor = x + self.ls_2(updated(wide, [c_proj], _activation_of(activation))[0])
        return found


def updated(x: Tensor, layers: Sequence[LoraLinear], before: Before | None = None) -> tuple[Tensor, ...]:
    """What plain LoRA layers make of the same input: (…, I) → (…, O) each.

    Args:
        x: their input, or that of what is before them.
        layers: on one input.
        before: what they read, as made of `x`; None: `x` itself.
    """
    given: list[Tensor | None] = []
    for layer in layers:
        base = layer.base_layer
        given += (base.weight, base.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    factors = [tensor if tensor is None else tensor.to(kind) for tensor in given]
    if before is None:
        x, before = x.to(kind), Before()
    scales = tuple(layer.scaling["default"] for layer in layers)
    outs: tuple[Tensor, ...] = _Update.apply(x.flatten(0, -2), before, scales, *factors)
    return tuple(out_MO.view(*x.shape[:-1], -1) for out_MO in outs)


class _Update(torch.autograd.Function):
    """f(x)·Wᵀ + b + s·(f(x)·Aᵀ)·Bᵀ of each layer, with gradients to x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, before: Before, scales: tuple[float, ...], *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        layers = _by_layer(factors)
        read_MI = before.of(x_MI).to(layers[0].weight.dtype)
        ctx.before, ctx.scales, ctx.is_exact = before, scales, _is_exact(read_MI)
        outs, lows = [], []
        for layer, scale in zip(layers, scales, strict=True):
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
        read_MI, back = ctx.before.again(x_MI)
        read_MI = read_MI.to(layers[0].weight.dtype)
        if ctx.is_exact:
            # Of all layers at once: they read the same.
            lows = (torch.cat([each.a for each in layers]) @ read_MI.T).split([len(each.a) for each in layers])
        to_read: Tensor | None = None
        to_factors: list[Tensor | None] = []
        for gradient_MO, layer, low_rM, scale in zip(gradients, layers, lows, ctx.scales, strict=True):
            back_rM = layer.b.T @ gradient_MO.T
            to_factors += (None, None, (back_rM @ read_MI).mul_(scale), (low_rM @ gradient_MO).mul_(scale).T)
            if ctx.needs_input_grad[0]:
                weight_OI = layer.merged(scale) if ctx.is_exact else layer.weight
                to_read = gradient_MO @ weight_OI if to_read is None else to_read.addmm_(gradient_MO, weight_OI)
                if not ctx.is_exact:
                    to_read.addmm_(back_rM.T, layer.a, alpha=scale)
        to_x = None if to_read is None else back(to_read.to(x_MI.dtype))
        return to_x, None, None, *to_factors


def _by_layer(factors: Sequence[Any]) -> list[Factors]:
    size = len(Factors._fields)
    return [Factors(*factors[start : start + size]) for start in range(0, len(factors), size)]


def _is_exact(x: Tensor) -> bool:
    """Whether products are rounded to float32 or finer; a GPU may be told to round them to TF32."""
    return x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"


# --- what layers read -------------------------------------------------------------------------------------------------


Back = Callable[[Tensor], Tensor]
"""The gradient to an input, from that to what is made of it."""


class Before:
    """What layers read, as made of what is kept; here, what is kept itself."""

    def of(self, x: Tensor) -> Tensor:
        """What they read, shaped like `x`."""
        return x

    def again(self, x: Tensor) -> tuple[Tensor, Back]:
        """The same, and the way back to `x`."""
        return x, lambda gradient: gradient


@dataclass(frozen=True, slots=True)
class Gelu(Before):
    """torch's GELU, exact or by tanh."""

    approximate: str

    def of(self, x: Tensor) -> Tensor:
        """As always."""
        return functional.gelu(x, approximate=self.approximate)

    def again(self, x: Tensor) -> tuple[Tensor, Back]:
        """As always."""
        return self.of(x), lambda gradient: torch.ops.aten.gelu_backward(gradient, x, approximate=self.approximate)


class QuickGelu(Before):
    """x·σ(1.702·x)."""

    def of(self, x: Tensor) -> Tensor:
        """As always."""
        return x * torch.sigmoid(QUICK * x)

    def again(self, x: Tensor) -> tuple[Tensor, Back]:
        """As always."""
        share = torch.sigmoid(QUICK * x)
        return x * share, lambda gradient: gradient * (share * (1 + QUICK * x * (1 - share)))


@dataclass(frozen=True, slots=True)
class Norm(Before):
    """A LayerNorm that is not trained, in the precision of its weights, as autocast has it."""

    weight: Tensor
    bias: Tensor
    eps: float

    def of(self, x: Tensor) -> Tensor:
        """As always."""
        return self._whole(x.to(self.weight.dtype))[0]

    def again(self, x: Tensor) -> tuple[Tensor, Back]:
        """As always."""
        given = x.to(self.weight.dtype)
        read, mean, rstd = self._whole(given)

        def back(gradient: Tensor) -> Tensor:
            shape, wanted = [x.shape[-1]], [True, False, False]
            to_given: Tensor = torch.ops.aten.native_layer_norm_backward(
                gradient.to(given.dtype), given, shape, mean, rstd, self.weight, self.bias, wanted
            )[0]
            return to_given.to(x.dtype)

        return read, back

    def _whole(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, [x.shape[-1]], self.weight, self.bias, self.eps)


QUICK = 1.702


def _activation_of(module: nn.Module) -> Before | None:
    """None of a kind that is not known here."""
    if type(module) is QuickGELU:
        return QuickGelu()
    return Gelu(module.approximate) if type(module) is nn.GELU else None


def _norm_of(module: Any) -> Norm | None:
    """None of a kind that is not known here, or of one that is trained."""
    if type(module) not in (nn.LayerNorm, LayerNorm) or not module.elementwise_affine or module.bias is None:
        return None
    is_trained = module.weight.requires_grad or module.bias.requires_grad
    return None if is_trained else Norm(module.weight, module.bias, module.eps)


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
    for module in model.modules():
        if type(module) is ResidualAttentionBlock and _is_quick(module):
            module.__class__ = LoraBlock


def unquicken(model: nn.Module) -> None:
    """Give a model, whose LoRA layers have been merged, its own blocks and MLPs back, in place."""
    own: dict[type, type[nn.Module]] = {LoraBlock: ResidualAttentionBlock, LoraMlp: nn.Sequential}
    modules: list[nn.Module] = [module for module in model.modules() if type(module) in own]
    for module in modules:
        module.__class__ = own[type(module)]


def _is_mlp(module: nn.Sequential) -> bool:
    names = [name for name, _ in module.named_children()]
    return (
        names == ["c_fc", "gelu", "c_proj"]
        and isinstance(module[2], LoraLinear)
        and _activation_of(module[1]) is not None
    )


def _is_quick(block: ResidualAttentionBlock) -> bool:
    """Whether a block can be computed without the outputs of its norms."""
    attn = block.attn
    return (
        type(attn) is LoraAttention
        and attn.batch_first
        and type(block.mlp) is LoraMlp
        and all(isinstance(each, LoraLinear) for each in (attn.q_proj, attn.k_proj, attn.v_proj, block.mlp[0]))
        and all(_norm_of(norm) is not None for norm in (block.ln_1, block.ln_2))
    )


def is_variant(layer: LoraLayer) -> bool:
    """Whether it is another sum than W + s·B·A: DoRA."""
    return bool(layer.lora_variant) or any(layer.use_dora.values())
