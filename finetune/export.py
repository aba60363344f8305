"""Write a trained CLIP where others can use it: a folder of open_clip's or transformers', or the LoRA in peft's format.

    TO/open_clip_config.json         architecture (QuickGELU with it) and preprocessing
    TO/open_clip_model.safetensors   float32 weights, LoRA merged
    TO/tokenizer…                    where the CLIP has a Hugging Face tokenizer; open_clip has OpenAI's built in

`open_clip.create_model_and_transforms("local-dir:TO")` and `open_clip.get_tokenizer("local-dir:TO")` need nothing else.
`--to transformers` writes config.json, preprocessor_config.json and model.safetensors for `CLIPModel.from_pretrained`.
The folder is read back before `export` returns, and its embeddings compared with those of the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from curate.errors import ModelError
from curate.shards import atomic, write_text
from finetune.runs import INTERPOLATED, checkpoint_of, load_module, load_trained_clip

if TYPE_CHECKING:
    import torch

    from curate.clip import Clip

Format = Literal["open_clip", "transformers", "adapter"]
TOLERANCE = 1e-5


def export(
    run: Path,
    to: Path,
    format: Format = "open_clip",  # noqa: A002 - the word users know
    *,
    checkpoint: str = "best",
) -> Path:
    """Export a run's CLIP and return the checkpoint that was taken.

    Args:
        run: folder of a run, or a checkpoint file.
        to: folder to write.
        format: open_clip or transformers (LoRA merged), or adapter: the LoRA alone, as peft writes it.
        checkpoint: best, last, or the path of one.

    Raises:
        InputError: no such run or checkpoint.
        ModelError: the run has no adapter; or what was written does not give the same embeddings.
    """
    path = checkpoint_of(run, checkpoint)
    if format == "adapter":
        from finetune.adapters import save_adapter

        save_adapter(_adapted(path), to)
        return path
    clip = load_trained_clip(path, "cpu")
    write = write_transformers if format == "transformers" else write_open_clip
    write(clip, to)
    check_export(clip, to)
    return path


def _adapted(checkpoint: Path) -> Any:
    """The model with its LoRA; of an interpolated checkpoint the end's, scaled."""
    if checkpoint.name != INTERPOLATED:
        return load_module(checkpoint).model
    from finetune.adapters import scale_lora
    from finetune.interpolate import alpha_of

    model = load_module(checkpoint.with_name("last.ckpt")).model
    between = load_module(checkpoint).model
    scale_lora(model, alpha_of(checkpoint.parent.parent).of)
    model.logit_scale.data.copy_(between.logit_scale)
    return model


def write_open_clip(clip: Clip, to: Path) -> None:
    """Write a plain CLIP as a folder that open_clip loads; the configuration last, so that a folder with it is whole.

    Raises:
        ModelError: its architecture is not known.
    """
    import safetensors.torch
    from open_clip.tokenizer import HFTokenizer

    if not clip.architecture:
        raise ModelError(f"{clip.name}: open_clip has no configuration of its architecture; it cannot be exported")
    if isinstance(clip.tokenizer, HFTokenizer):
        clip.tokenizer.save_pretrained(to)
    # Cloned: safetensors refuses tensors that share memory.
    weights = {name: value.detach().float().clone() for name, value in clip.model.state_dict().items()}
    (to / "open_clip_config.json").unlink(missing_ok=True)  # an earlier export's, which these weights may not fit
    with atomic(to / "open_clip_model.safetensors") as temporary:
        safetensors.torch.save_file(weights, temporary, {"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes it its owner's alone
    config = {"model_cfg": clip.architecture, "preprocess_cfg": clip.preprocess_cfg}
    write_text(to / "open_clip_config.json", json.dumps(config, indent=2))


def write_transformers(clip: Clip, to: Path) -> None:
    """Write a plain CLIP as transformers' `CLIPModel.save_pretrained` would; config.json last.

    Raises:
        ModelError: transformers has no model of this architecture; or the folder holds an open_clip export.
    """
    import safetensors.torch

    from curate.clip import huggingface

    if (to / "open_clip_config.json").is_file():
        raise ModelError(f"{to}: holds an open_clip export; give another folder")
    configs = huggingface.transformers_configs(clip.architecture, clip.preprocess_cfg)
    weights = huggingface.to_transformers(clip.model.state_dict(), clip.architecture)
    to.mkdir(parents=True, exist_ok=True)
    (to / "config.json").unlink(missing_ok=True)  # an earlier export's, which these weights may not fit
    with atomic(to / "model.safetensors") as temporary:
        safetensors.torch.save_file(weights, temporary, {"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes it its owner's alone
    for name in ("preprocessor_config.json", "config.json"):
        write_text(to / name, json.dumps(configs[name], indent=2))


def check_export(clip: Clip, folder: Path) -> None:
    """Load the folder as any user would and compare.

    Raises:
        ModelError: embeddings, preprocessing or tokens differ from those of `clip`.
    """
    from curate.clip import load_clip

    written = load_clip(f"local-dir:{folder}", device="cpu")
    for what, expected, got in zip(("image", "text"), _probe(clip), _probe(written), strict=True):
        difference = float((expected - got).abs().max())
        if not difference <= TOLERANCE:
            raise ModelError(f"{folder}: {what} embeddings are {difference:.1g} off the checkpoint's; do not use it")


def _probe(clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of a fixed picture and of fixed captions."""
    from PIL import Image

    down = Image.linear_gradient("L")
    picture = Image.merge("RGB", (down, down.rotate(90), Image.radial_gradient("L"))).resize((320, 200))
    return clip.embed_images([picture]), clip.embed_captions(["a photo of a cat.", "Größe: 12 × 3 — ¿qué?"])
