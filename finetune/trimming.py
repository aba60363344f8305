"""Captions no longer than the longest of their batch: web captions have about 15 tokens, text towers compute 77.

Under a causal mask no position sees a later one, and the embedding is read at the end of the text; so whatever stands
behind it can be left out, and the embeddings stay what they are. A tower that looks both ways, pools otherwise or adds
a class token at the end is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

MULTIPLE = 8  # of which lengths are: few shapes, for kernels and compilers that like the same again


@dataclass(frozen=True, slots=True)
class Trim:
    """Cuts token ids (B, L) behind the last end of a text, at a multiple of 8.

    Attributes:
        end: id of the end of a text; None: the highest id of each, as in OpenAI's vocabulary.
    """

    end: int | None = None

    def __call__(self, token_BL: Tensor) -> Tensor:
        """(B, L) → (B, L' ≤ L); the tokens themselves are looked at, so call it before they are on a GPU."""
        if not len(token_BL):
            return token_BL
        needed = int(self.lengths(token_BL).max())
        return token_BL[:, : -(-needed // MULTIPLE) * MULTIPLE]

    def lengths(self, token_BL: Tensor) -> Tensor:
        """Tokens (B,) of each text, its end included."""
        return (token_BL if self.end is None else (token_BL == self.end).int()).argmax(dim=1) + 1


def trim_of(model: Any) -> Trim | None:
    """How captions may be cut for an open_clip model; None: not at all."""
    text = getattr(model, "text", model)
    mask = getattr(text, "attn_mask", None)
    if hasattr(getattr(text, "positional_embedding", None), "full_tensor"):
        return None  # sharded (finetune/sharded.py): the embeddings of positions are in parts, too
    if not isinstance(mask, Tensor) or getattr(text, "cls_emb", None) is not None or not _is_causal(mask):
        return None
    pool = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)
    if pool == "eos":
        return Trim(int(getattr(text, "eos_id", None) or model.text_eos_id))
    return Trim() if pool == "argmax" else None


def _is_causal(mask_LL: Tensor) -> bool:
    later_LL = torch.ones_like(mask_LL, dtype=torch.bool).triu(1)
    return bool((mask_LL[later_LL] == -torch.inf).all())


class _Text(nn.Module):
    """The text tower as a module of its own, which is what `functional_call` takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, token_BL: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(token_BL)
        return features


def encode_text(model: Any, token_BL: Tensor) -> Tensor:
    """`model.encode_text`, of captions that `Trim` may have cut."""
    text = getattr(model, "text", model)
    length, whole = token_BL.shape[1], getattr(text, "positional_embedding", None)
    if whole is None or length >= len(whole):
        features: Tensor = model.encode_text(token_BL)
        return features
    name = "model." if text is model else "model.text."
    shorter = {
        f"{name}positional_embedding": whole[:length],
        f"{name}attn_mask": text.attn_mask[:length, :length],
    }
    found: Tensor = functional_call(_Text(model), shorter, (token_BL,))
    return found
