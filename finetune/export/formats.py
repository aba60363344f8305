"""The forms of an export.

    open_clip     open_clip_config.json (architecture and preprocessing), open_clip_model.safetensors
    transformers  config.json, preprocessor_config.json, model.safetensors, the tokenizer
    onnx          image.onnx (pixels → image_embedding), text.onnx (tokens → text_embedding), open_clip_config.json
    adapter       adapter_config.json, adapter_model.safetensors

Weights are float32, LoRA merged but for `adapter`. A Hugging Face tokenizer that the CLIP has goes with it; OpenAI's is
built into open_clip, and written out for transformers.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from curate.errors import ConfigError, ModelError
from curate.files import atomic, write_text
from finetune.pixels import sides
from finetune.runs import INTERPOLATED, load_module

if TYPE_CHECKING:
    import torch

    from curate.clip import Clip

Format = Literal["open_clip", "transformers", "onnx", "adapter"]
LARGE = 1_500_000_000  # bytes of weights beyond which an ONNX file (2 GB at most) keeps them in a file of their own


def adapted(checkpoint: Path) -> Any:
    """The CLIPModule with its LoRA; of an interpolated checkpoint the end's, scaled."""
    if checkpoint.name != INTERPOLATED:
        return load_module(checkpoint)
    from finetune.adapters import scale_lora
    from finetune.interpolate import alpha_of

    module = load_module(checkpoint.with_name("last.ckpt"))
    scale_lora(module.model, alpha_of(checkpoint.parent.parent).of)
    module.model.logit_scale.data.copy_(load_module(checkpoint).model.logit_scale)
    return module


def write_adapter(model: Any, to: Path) -> None:
    """Write the LoRA of an adapted model in peft's format.

    Raises:
        ModelError: it has none.
    """
    from finetune.adapters import save_adapter

    save_adapter(model, to)


def write_open_clip(clip: Clip, to: Path) -> None:
    """Write a plain CLIP as a folder that open_clip loads.

    Raises:
        ModelError: its architecture is not known.
    """
    _write_architecture(clip, to)
    # Cloned: safetensors refuses tensors that share memory.
    weights = {name: value.detach().float().clone() for name, value in clip.model.state_dict().items()}
    _write_safetensors(weights, to / "open_clip_model.safetensors")


def _write_architecture(clip: Clip, to: Path) -> None:
    """open_clip's configuration, and the tokenizer if it is none of open_clip's own."""
    from open_clip.tokenizer import HFTokenizer

    from curate.clip import timm_towers

    if not clip.architecture:
        raise ModelError(f"{clip.name}: open_clip has no configuration of its architecture; it cannot be exported")
    if timm_towers.is_beyond_open_clip(clip.architecture):
        raise ModelError(
            f"--to open_clip: this CLIP's image tower is {clip.architecture['vision_cfg']['timm_model_name']} with "
            "timm_model_kwargs, which open_clip reads from version 4 on, and the installed one is older; export --to "
            "transformers"
        )
    if isinstance(clip.tokenizer, HFTokenizer):
        clip.tokenizer.save_pretrained(to)
    config = {"model_cfg": clip.architecture, "preprocess_cfg": clip.preprocess_cfg}
    write_text(to / "open_clip_config.json", json.dumps(config, indent=2))


def _write_safetensors(weights: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        save_file(weights, temporary, {"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes it its owner's alone


def write_transformers(clip: Clip, to: Path) -> None:
    """Write a plain CLIP as a folder that transformers loads: `CLIPModel` or `SiglipModel`, and their processors.

    Raises:
        ModelError: transformers has no model of this architecture.
    """
    from curate.clip import huggingface, siglip
    from curate.clip.tokens import files_for_transformers

    if siglip.is_siglip(clip.architecture):
        configs = siglip.transformers_configs(clip.model, clip.architecture, clip.preprocess_cfg)
        weights = siglip.to_transformers(clip.model, clip.architecture)
        tokenizer = files_for_transformers(clip.tokenizer, clip.architecture["text_cfg"])
    else:
        configs = huggingface.transformers_configs(clip.architecture, clip.preprocess_cfg)
        weights = huggingface.to_transformers(clip.model.state_dict(), clip.architecture)
        tokenizer = huggingface.tokenizer_files(clip.architecture["text_cfg"].get("context_length", 77))
    _write_safetensors(weights, to / "model.safetensors")
    for name, config in configs.items():
        write_text(to / name, json.dumps(config, indent=2))
    for name, text in tokenizer.items():
        write_text(to / name, text)


def write_onnx(clip: Clip, to: Path) -> None:
    """Write both towers of a plain CLIP for onnxruntime: L2-normalised embeddings of batches of any size.

    Raises:
        ConfigError: the extra is not installed.
        ModelError: the architecture is not known.
    """
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]:
        raise ConfigError(f"--to onnx: needs {', '.join(missing)}; install cliptailor[onnx]")
    import torch

    from finetune.export.towers import Tower

    _write_architecture(clip, to)
    tokens = clip.tokenizer(["a photo of a cat.", "a photo of a dog."])
    given = {"image": ("pixels", torch.zeros(2, 3, *sides(clip.preprocess_cfg))), "text": ("tokens", tokens)}
    for tower, (name, example) in given.items():
        bytes_ = sum(p.numel() * p.element_size() for p in clip.model.parameters())
        with warnings.catch_warnings(), _unheard("onnxscript", "torch.onnx"):
            warnings.simplefilter("ignore")  # of the exporter, on its own code
            torch.onnx.export(
                Tower(clip.model, tower),
                (example,),
                str(to / f"{tower}.onnx"),
                input_names=[name],
                output_names=[f"{tower}_embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                external_data=bytes_ > LARGE,
                dynamo=True,
                verbose=False,
            )


@contextmanager
def _unheard(*names: str) -> Iterator[None]:
    """Without the hints of these loggers."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
