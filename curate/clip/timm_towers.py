"""timm's image towers that open_clip has no name for: an architecture with a name, and some of its arguments changed.

open_clip 4 takes them as `vision_cfg.timm_model_kwargs`. Versions before it take a name alone, so there the changed
architecture is registered with timm, in this process, under a name of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

KEY = "timm_model_kwargs"


def is_beyond_open_clip(model_cfg: Mapping[str, Any]) -> bool:
    """Whether the installed open_clip cannot read a model configuration because of its timm arguments."""
    from open_clip import CLIPVisionCfg

    return KEY in model_cfg["vision_cfg"] and KEY not in {field.name for field in fields(CLIPVisionCfg)}


def named(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """The same model configuration as the installed open_clip takes it, in this process."""
    if not is_beyond_open_clip(model_cfg):
        return model_cfg
    vision = dict(model_cfg["vision_cfg"])
    return model_cfg | {
        "vision_cfg": vision | {"timm_model_name": _registered(vision["timm_model_name"], vision.pop(KEY) or {})}
    }


def _registered(base: str, changed: dict[str, Any]) -> str:
    import timm
    from timm.models import register_model

    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    name = f"{base.replace('.', '_')}_{digest[:12]}"
    if not timm.is_model(name):

        def create(**given: Any) -> Any:
            return timm.create_model(base, **(changed | given))

        create.__name__ = name
        register_model(create)
    return name
