"""Where a parameter of an open_clip model stands: in which tower, and how deep.

Training the last blocks and layer-wise learning rates ask the same question, so one function answers it. A tower is a
stem (embeddings, first convolutions), blocks in their order, and a head (the last norm, pooling, the projection into
the common space). open_clip's transformers and ResNets, timm's trunks and Hugging Face's text encoders name these
parts differently; the names are all that is looked at, so adapters inside a block stand where the block does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

BLOCK = re.compile(r"([\w.]*?\b(?:resblocks\.\d+|stages\.\d+\.blocks\.\d+|blocks\.\d+|layers?\.\d+|layer\d\.\d+))\.")
HEAD = re.compile(
    r"(visual\.|text\.)?(trunk\.)?(ln_post|ln_final|proj|text_projection|attnpool|attn_pool|norm|fc_norm|head|pooler)\b"
)


def tower_of(name: str) -> str | None:
    """Image or text, for the name of a parameter or module of an open_clip model; None for what belongs to neither."""
    if name in ("", "logit_scale", "logit_bias"):
        return None
    return "image" if name == "visual" or name.startswith("visual.") else "text"


def block_of(name: str) -> str | None:
    """The block that a parameter is in, such as `visual.transformer.resblocks.3`; None for stem and head."""
    found = BLOCK.match(name)
    return found[1] if found else None


class Depths:
    """How deep each parameter of a model stands in its tower.

    Args:
        names: of all parameters, in the model's order, which is the order of the blocks.

    Attributes:
        blocks: the blocks of each tower, first to last.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.blocks: dict[str | None, list[str]] = {"image": [], "text": []}
        for name in names:
            block, blocks = block_of(name), self.blocks.get(tower_of(name), [])
            if block and block not in blocks:
                blocks.append(block)

    def depth(self, name: str) -> int:
        """0 in the stem, 1 to n in the blocks, n + 1 in the head. What no tower owns (the temperature): 0."""
        blocks = self.blocks.get(tower_of(name), [])
        if block := block_of(name):
            return 1 + blocks.index(block)
        return len(blocks) + 1 if HEAD.match(name) else 0

    def from_head(self, name: str) -> int:
        """Steps down from the head: 0 in the head, 1 in the last block, n + 1 in the stem; 0 for the temperature."""
        tower = tower_of(name)
        return 0 if tower is None else len(self.blocks[tower]) + 1 - self.depth(name)


def blocks(names: Iterable[str]) -> list[str]:
    """The blocks that these parameters are in, in the order of their names' first."""
    return list(dict.fromkeys(block for name in names if (block := block_of(name))))
