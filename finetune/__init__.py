"""A CLIP adapted to a domain: by `finetune fit --config domain.yaml`, or in a Lightning script of one's own.

`CLIPModule` and `CLIPDataModule` are imported when first asked for: `import finetune` loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.data import CLIPDataModule
    from finetune.module import CLIPModule

__all__ = ["CLIPDataModule", "CLIPModule"]


def __getattr__(name: str) -> Any:
    if name == "CLIPModule":
        from finetune.module import CLIPModule

        return CLIPModule
    if name == "CLIPDataModule":
        from finetune.data import CLIPDataModule

        return CLIPDataModule
    raise AttributeError(f"module 'finetune' has no attribute '{name}'")
