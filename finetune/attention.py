"""Attention whose projections are linear layers that really run, so that LoRA can reach each of them.

`nn.MultiheadAttention` keeps query, key and value in one packed parameter and never calls its own `out_proj`: peft on
it either gets no gradient or counts the output twice (huggingface/peft#3774). open_clip's `AttentionPool2d` has four
linear layers and only reads their weights; timm's ViT has q, k and v in one layer, so that an update of rank r would be
shared by all three. `split_attention` puts modules in their place that call four plain `nn.Linear`; `join_attention`
packs them again, so that the state dict has open_clip's keys.

Axes: B batch, T positions of the query, S positions of key and value, D width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init


class SplitAttention(nn.Module):
    """Multi-head attention on four linear layers; called as open_clip calls `nn.MultiheadAttention`.

    Args:
        packed: the attention whose weights it takes over.

    Raises:
        ValueError: `packed` has extra keys (bias_k, add_zero_attn), which no CLIP has.
    """

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        if packed.bias_k is not None or packed.add_zero_attn:
            raise ValueError("attention with bias_k or add_zero_attn has no split form")
        self.num_heads, self.batch_first, self.dropout = packed.num_heads, packed.batch_first, packed.dropout
        if packed.in_proj_weight is not None:
            weights = packed.in_proj_weight.chunk(3)
        else:
            weights = (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
        biases = (None,) * 3 if packed.in_proj_bias is None else packed.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(packed.out_proj.weight, packed.out_proj.bias)
        self.train(packed.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = True, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What is attended to, shaped like the query, and the weights (B, T, S), mean over the heads, or None.

        Args:
            query: (B, T, D), or (T, B, D) where `batch_first` is false; key and value likewise with S.
            key: what is compared with the query.
            value: what is mixed.
            need_weights: give the weights too (slower).
            attn_mask: (T, S) or (B·H, T, S): True where a key is hidden, or numbers added to the logits.
        """
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        projected = self.project(query, key, value)
        out = self.mix(*projected, attn_mask)
        weights = self._weights(*projected[:2], attn_mask) if need_weights else None
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B, …, D), before they are split into heads."""
        return self.q_proj(query), self.k_proj(key), self.v_proj(value)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        """What is attended to (B, T, D), of what `project` gives."""
        q, k, v = (_heads(x, self.num_heads) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        mixed = _attend(q, k, v, _additive(attn_mask, q), dropout)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _weights(self, query: Tensor, key: Tensor, attn_mask: Tensor | None) -> Tensor:
        q, k = _heads(query, self.num_heads), _heads(key, self.num_heads)
        return _attention_weights(q, k, _additive(attn_mask, q)).mean(dim=1)

    def join(self) -> nn.MultiheadAttention:
        """The same attention as one packed module."""
        q, k, v, out = self.q_proj, self.k_proj, self.v_proj, self.out_proj
        packed = nn.MultiheadAttention(
            q.in_features,
            self.num_heads,
            dropout=self.dropout,
            bias=q.bias is not None,
            kdim=k.in_features,
            vdim=v.in_features,
            batch_first=self.batch_first,
            device=q.weight.device,
            dtype=q.weight.dtype,
        )
        if packed.in_proj_weight is not None:
            packed.in_proj_weight = _cat(q.weight, k.weight, v.weight)
        else:
            packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight = q.weight, k.weight, v.weight
        packed.out_proj.weight = out.weight
        if q.bias is not None:
            packed.in_proj_bias = _cat(q.bias, k.bias, v.bias)
            packed.out_proj.bias = out.bias
        return packed.train(self.training)


class SplitTrunkAttention(nn.Module):
    """timm's `Attention` (of `VisionTransformer`) on four linear layers; norms of q and k and the like stay.

    Args:
        packed: the attention whose weights it takes over; without a gate.
    """

    def __init__(self, packed: Any) -> None:
        super().__init__()
        self.num_heads: int = packed.num_heads
        biases = (None,) * 3 if packed.qkv.bias is None else packed.qkv.bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, packed.qkv.weight.chunk(3), biases)
        self.out_proj = packed.proj
        self.q_norm, self.k_norm, self.norm = packed.q_norm, packed.k_norm, packed.norm
        self.attn_drop, self.proj_drop = packed.attn_drop, packed.proj_drop
        self.train(packed.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        q = self.q_norm(_heads(self.q_proj(x), self.num_heads))
        k = self.k_norm(_heads(self.k_proj(x), self.num_heads))
        v = _heads(self.v_proj(x), self.num_heads)
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = (
            functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
            if is_causal
            else _attend(q, k, v, attn_mask, dropout)
        )
        return self.proj_drop(self.out_proj(self.norm(mixed.transpose(1, 2).flatten(2))))

    def join(self) -> nn.Module:
        """The same attention as timm's module."""
        from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]  # where all versions have it

        q, k, v, out = self.q_proj, self.k_proj, self.v_proj, self.out_proj
        packed: Any = Attention(
            q.in_features,
            self.num_heads,
            attn_head_dim=q.out_features // self.num_heads,
            dim_out=out.out_features,
            qkv_bias=q.bias is not None,
            proj_bias=out.bias is not None,
            device=q.weight.device,
            dtype=q.weight.dtype,
        )
        packed.qkv.weight = _cat(q.weight, k.weight, v.weight)
        if q.bias is not None:
            packed.qkv.bias = _cat(q.bias, k.bias, v.bias)
        packed.proj = out
        packed.q_norm, packed.k_norm, packed.norm = self.q_norm, self.k_norm, self.norm
        packed.attn_drop, packed.proj_drop = self.attn_drop, self.proj_drop
        return packed.train(self.training)


class SplitAttentionPool(nn.Module):
    """open_clip's `AttentionPool2d` (the ResNets' pooling, whose query is the mean), calling its linear layers.

    Its state-dict keys are those of the original, so there is nothing to join.

    Args:
        pool: the module it takes the place of; parameters and layers are shared with it.
    """

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.positional_embedding = pool.positional_embedding
        self.k_proj, self.q_proj, self.v_proj, self.c_proj = pool.k_proj, pool.q_proj, pool.v_proj, pool.c_proj
        self.num_heads: int = pool.num_heads
        self.train(pool.training)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Pooled features (B, D) of a feature map (B, C, h, w)."""
        x = feature_map.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        # Upstream lets every position ask and keeps the first; only the first asks here.
        q = _heads(self.q_proj(x[:, :1]), self.num_heads)
        k, v = _heads(self.k_proj(x), self.num_heads), _heads(self.v_proj(x), self.num_heads)
        mixed = _attend(q, k, v)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))[:, 0]


def split_attention(model: nn.Module) -> None:
    """Give an open_clip model, in place, attention and attention pools that LoRA can reach; outputs stay equal."""
    from open_clip.modified_resnet import AttentionPool2d
    from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]  # where all versions have it

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            model.set_submodule(name, SplitAttention(module))
        elif isinstance(module, AttentionPool2d):
            model.set_submodule(name, SplitAttentionPool(module))
        elif type(module) is Attention and module.gate is None:
            model.set_submodule(name, SplitTrunkAttention(module))
        elif getattr(module, "qkv_bias_separate", None) is False:
            module.qkv_bias_separate = True  # EVA's and BEiT's only read the layer's weight otherwise


def join_attention(model: nn.Module) -> None:
    """Pack, in place, each split attention again: state-dict keys are then open_clip's. Merge LoRA before."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitAttention | SplitTrunkAttention):
            model.set_submodule(name, module.join())


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, D) → (B, H, T, D/H)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Any mask that `nn.MultiheadAttention` takes, as numbers to add to the logits (…, T, S)."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
    mask = mask.to(q.dtype)
    return mask.unflatten(0, (q.shape[0], q.shape[1])) if mask.ndim == 3 else mask


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """What is attended to, (B, H, T, D/H)."""
    is_rounded = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    if is_rounded and (mask is None or mask.is_floating_point()):
        # torch's fused kernel takes three times as long there, most of it backward.
        return functional.dropout(_attention_weights(q, k, mask).to(v.dtype), dropout) @ v
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (logits if mask is None else logits + mask).softmax(dim=-1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def _cat(*parts: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.detach() for part in parts]))
