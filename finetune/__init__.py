"""A CLIP adapted to a domain: by `finetune fit --config domain.yaml`, or in a Lightning script of one's own.

It is also what OpenAI's own users know as `clip`, with one changed line (finetune/hands_on.py):

    import finetune as clip

    model, preprocess = clip.load("ViT-B/32", device="cpu")
    tokens = clip.tokenize(["a photo of a cat", "a photo of a dog"])

Each name is imported when first asked for: `import finetune` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.data import CLIPDataModule
    from finetune.hands_on import available_models, load, tokenize
    from finetune.module import CLIPModule

__all__ = ["CLIPDataModule", "CLIPModule", "available_models", "load", "tokenize"]
_HOMES = {
    "CLIPDataModule": "finetune.data",
    "CLIPModule": "finetune.module",
    "available_models": "finetune.hands_on",
    "load": "finetune.hands_on",
    "tokenize": "finetune.hands_on",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
