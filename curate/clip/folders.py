"""What the folders of transformers' models have in common: JSON, weights, pixels."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.clip.hub import TRANSFORMERS_WEIGHTS
from curate.errors import ModelError

if TYPE_CHECKING:
    import torch
    from open_clip.tokenizer import HFTokenizer

INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}


@dataclass(frozen=True)
class Source:
    """A CLIP in open_clip's terms.

    Attributes:
        model_cfg: open_clip's model configuration.
        preprocess_cfg: open_clip's preprocessing configuration; {}: OpenAI's.
        state: float32 weights under open_clip's names; None: random ones.
        tokenizer: None: CLIP's BPE, which is built into open_clip.
    """

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    state: dict[str, torch.Tensor] | None
    tokenizer: HFTokenizer | None = None


def read_json(path: Path) -> dict[str, Any]:
    """A file that is a JSON object.

    Raises:
        ModelError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return content


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, of one file or of several.

    Raises:
        ModelError: there are none.
    """
    from open_clip.factory import load_state_dict

    for pattern in TRANSFORMERS_WEIGHTS:
        if files := sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name)):
            state: dict[str, torch.Tensor] = {}
            for file in files:
                state |= load_state_dict(str(file), weights_only=True)
            return state
    raise ModelError("no model.safetensors and no pytorch_model.bin")


def read_processor(folder: Path) -> dict[str, Any]:
    """How pixels are made: preprocessor_config.json, or where transformers 5 writes the same, in processor_config.json.

    Raises:
        ModelError: it is not there, or leaves out a step that open_clip always takes.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        given = read_json(folder / name)
        given = given.get("image_processor", given)
        if "image_mean" not in given:
            continue
        for key, needed in _STEPS.items():
            if not math.isclose(given.get(key, needed), needed):
                raise ModelError(f"{name}: {key} {given[key]}: only {needed:.6g} is converted")
        if given.get("resample", 3) not in INTERPOLATIONS:
            raise ModelError(f"{name}: resample {given['resample']}: expected 2 (bilinear) or 3 (bicubic)")
        return given
    raise ModelError("no preprocessor_config.json: mean, standard deviation and size of the pixels are unknown")


def preprocess_cfg(processor: dict[str, Any], size: int, resize_mode: str) -> dict[str, Any]:
    """open_clip's preprocessing configuration of what `read_processor` gives."""
    return {
        "size": (size, size),
        "mode": "RGB",
        "mean": tuple(processor["image_mean"]),
        "std": tuple(processor["image_std"]),
        "interpolation": INTERPOLATIONS[processor.get("resample", 3)],
        "resize_mode": resize_mode,
        "fill_color": 0,
    }


def processor_config(kind: str, preprocess: dict[str, Any], **sizes: Any) -> dict[str, Any]:
    """preprocessor_config.json of an image processor of transformers, of open_clip's preprocessing configuration."""
    numbers = {name: number for number, name in INTERPOLATIONS.items()}
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        **sizes,
        "resample": numbers[preprocess["interpolation"]],
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def square(size: Any) -> int:
    """The one number of a size that is given as one or as two.

    Raises:
        ModelError: they differ.
    """
    if isinstance(size, int):
        return size
    if len({*size}) != 1:
        raise ModelError(f"image or patch size {size}: expected a square")
    return int(size[0])


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio of which `int(width * ratio)`, as open_clip and timm reckon, is `hidden` again."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
