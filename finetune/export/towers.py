"""A tower of a CLIP as a module of its own: what ONNX makes a graph of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize


class Tower(nn.Module):
    """pixels (B, 3, H, W) or tokens (B, L) → embeddings (B, D), L2-normalised.

    Args:
        model: a plain open_clip model.
        tower: image or text.
    """

    def __init__(self, model: Any, tower: str) -> None:
        super().__init__()
        self.model, self.tower = model, tower
        self.eval()

    def forward(self, given: Tensor) -> Tensor:
        """Embed."""
        encode = self.model.encode_image if self.tower == "image" else self.model.encode_text
        return normalize(encode(given), dim=-1)
