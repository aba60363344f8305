"""The last block of a tower computes only what is pooled of it.

An embedding is read at one position: a ViT's at the class token, a text's at its end. What the last block makes of the
other positions is thrown away, so it is not made: they are keys and values there, and go neither through its output
projection nor through its MLP. The embeddings, and all gradients, stay what they are.

Axes: B captions or images, L positions, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from finetune.attention import SplitAttention


class Queries(NamedTuple):
    """Which positions of packed rows are pooled (finetune/packing.py).

    Attributes:
        position: (R, Q) of each row, into its L positions; rows with fewer queries repeat some position.
        mask: (R, 1, Q, L), added to their logits.
        place: (B,) of each caption's query, into R · Q.
        end: (B,) of each caption's end, into R · L.
    """

    position: Tensor
    mask: Tensor
    place: Tensor
    end: Tensor


class LastBlock(nn.Module):
    """open_clip's ResidualAttentionBlock, of which some positions alone are computed to the end.

    Its state-dict keys are those of the original.

    Args:
        block: the module it takes the place of; its parts are shared with it.
        first: compute the first position, where nothing else is said; else all.
    """

    ln_1: nn.Module
    attn: nn.Module
    ls_1: nn.Module
    ln_2: nn.Module
    mlp: nn.Module
    ls_2: nn.Module

    def __init__(self, block: Any, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.kind: type[nn.Module] = type(block)
        for name, part in block.named_children():
            self.add_module(name, part)
        self.train(block.training)

    def get_weight_dtype(self) -> Any:
        """As open_clip's block has it, for towers of a single one."""
        return self.mlp.c_fc.weight.dtype  # type: ignore[union-attr]

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        queries: Queries | None = None,
    ) -> Tensor:
        """(B, L, D) → (B, 1, D) of the first positions; (B, L, D); or of packed rows (R, L, D) → (B, D).

        Args:
            q_x: (B, L, D).
            k_x: None; open_clip's blocks have them, for cross-attention.
            v_x: None.
            attn_mask: (L, L), as in every block.
            queries: of packed rows.
        """
        del k_x, v_x
        given = self.ln_1(q_x)
        if queries is not None:
            rows = queries.position.unsqueeze(-1).expand(-1, -1, q_x.shape[-1])
            mixed = self._attend(given.gather(1, rows), given, queries.mask)
            mixed = mixed.flatten(0, 1).index_select(0, queries.place)
            x = q_x.flatten(0, 1).index_select(0, queries.end) + self.ls_1(mixed)
        elif self.first:
            x = q_x[:, :1] + self.ls_1(self._attend(given[:, :1], given, None))
        else:
            x = q_x + self.ls_1(self._attend(given, given, attn_mask))
        found: Tensor = x + self.ls_2(self.mlp(self.ln_2(x)))
        return found

    def _attend(self, query: Tensor, given: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.to(query.dtype)
        mixed: Tensor = self.attn(query, given, given, need_weights=False, attn_mask=mask)[0]
        return mixed

    def whole(self) -> nn.Module:
        """open_clip's own block again, with today's parts."""
        block: nn.Module = object.__new__(self.kind)
        nn.Module.__init__(block)
        for name, part in self.named_children():
            block.add_module(name, part)
        return block.train(self.training)


def pool_in_last_blocks(model: Any) -> None:
    """Give the towers of a split open_clip model, in place, last blocks that compute what is pooled alone.

    A tower of another kind (ResNet, timm), or one that pools otherwise, is left as it is.
    """
    visual, text = model.visual, getattr(model, "text", model)
    pools_first = (
        getattr(visual, "pool_type", None) == "tok"
        and getattr(visual, "attn_pool", None) is None
        and not getattr(visual, "output_tokens", False)
    )
    if pools_first and _last_is_plain(visual):
        visual.transformer.resblocks[-1] = LastBlock(visual.transformer.resblocks[-1], first=True)
    if _last_is_plain(text):
        text.transformer.resblocks[-1] = LastBlock(text.transformer.resblocks[-1], first=False)


def whole_last_blocks(model: nn.Module) -> None:
    """Take back, in place, what `pool_in_last_blocks` did."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LastBlock):
            model.set_submodule(name, module.whole())


def _last_is_plain(tower: Any) -> bool:
    from open_clip.transformer import ResidualAttentionBlock

    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    return blocks is not None and type(blocks[-1]) is ResidualAttentionBlock and has_split_attention(blocks[-1])


def has_split_attention(block: Any) -> bool:
    """Whether a block attends batch first, with masks of any shape."""
    return isinstance(block.attn, SplitAttention) and block.attn.batch_first
