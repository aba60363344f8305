"""The folder of a finished or interrupted run: its configuration, its checkpoints, its CLIP; any CLIP by one word."""

from __future__ import annotations

import hashlib
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from curate.errors import InputError, ModelError, did_you_mean
from curate.options import read_config
from finetune.config import FitConfig

if TYPE_CHECKING:
    from curate.clip import Clip

INTERPOLATED = "interpolated.ckpt"  # written by finetune/interpolate.py


def run_config(run: Path) -> FitConfig:
    """What the run was started with.

    Args:
        run: its folder, or one of its checkpoints.

    Raises:
        InputError: not the folder of a run.
    """
    path = (run.parent.parent if run.is_file() else run) / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run}: no config.yaml; expected the folder of a run (`out` of `finetune fit`)")
    return read_config(path, FitConfig)


def checkpoint_of(run: Path, which: str = "best") -> Path:
    """The checkpoint to use.

    Args:
        run: folder of a run, or a checkpoint file itself.
        which: `best` (what interpolation chose; else the best by the monitored metric; else the last), `last`, or the
            path of a checkpoint.

    Raises:
        InputError: there is none.
    """
    if run.is_file():
        return run
    if run.suffix == ".ckpt" and not run.exists():
        raise InputError(f"{run}: no such file; expected a checkpoint, or the folder of a run")
    if which not in ("best", "last"):
        path = Path(which)
        if not path.is_file():
            raise InputError(f"--checkpoint {which}: no such file; expected best, last or the path of a checkpoint")
        return path
    folder = run / "checkpoints"
    names = (INTERPOLATED, "best.ckpt", "last.ckpt") if which == "best" else ("last.ckpt",)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: no {names[-1]}; expected the folder of a run (`out` of `finetune fit`)")


def load_module(checkpoint: Path) -> Any:
    """The CLIPModule in a checkpoint, on the CPU, in eval mode.

    Raises:
        ModelError: it cannot be read as one.
    """
    from curate.clip import first_line
    from finetune.module import CLIPModule

    try:
        return CLIPModule.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    except (RuntimeError, KeyError, TypeError, EOFError, OSError, ValueError, UnpicklingError) as error:
        raise ModelError(f"{checkpoint}: not a checkpoint of `finetune fit`: {first_line(error)}") from error


def load_trained_clip(checkpoint: Path, device: str = "auto") -> Clip:
    """The CLIP in a checkpoint as a plain open_clip model: LoRA merged, attention as open_clip has it."""
    from curate.clip import choose_device
    from finetune.adapters import merge

    module = load_module(checkpoint)
    merge(module.model)
    clip: Clip = module.clip
    clip.model = module.model.eval().to(choose_device(device))
    clip.name = str(checkpoint)
    return clip


def model_fingerprint(model: Any) -> str:
    """64 hex digits that the same weights give, whatever file or format they came from: of names, types and numbers.

    Args:
        model: a plain open_clip model: LoRA merged, attention as open_clip has it.
    """
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # As bytes: numpy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder, or a checkpoint of one."""
    return path.suffix == ".ckpt" or (path / "config.yaml").is_file()


def load_named(name: str, device: str = "auto") -> Clip:
    """Any trained CLIP by one word, as a plain open_clip model in eval mode.

    Args:
        name: the folder of a run (its best checkpoint) or a checkpoint; OpenAI's name (`ViT-B/32`); an architecture and
            a tag of open_clip (`ViT-B-32/laion2b_s34b_b79k`) or a file of weights (`ViT-B-32/epoch_3.pt`); a file of
            OpenAI's; a folder of open_clip or transformers (`local-dir:` before it or not); an id of the hub
            (`ORG/NAME`, `hf-hub:ORG/NAME`).
        device: `auto` is cuda, else mps, else cpu.

    Raises:
        InputError: a run without a checkpoint.
        ModelError: there is no such CLIP, or its weights cannot be had.
    """
    from curate.clip import OPENAI_NAMES, brings_weights, load, load_clip

    path = Path(name)
    if is_run(path):
        return load_trained_clip(checkpoint_of(path), device)
    if name in OPENAI_NAMES or brings_weights(name):
        return load(name, device=device)
    import open_clip

    architecture, _, tag = name.partition("/")
    known = open_clip.list_models()
    if tag and architecture in known:
        return load_clip(architecture, tag, device=device)
    if name in known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none is published"
        raise ModelError(f"{name}: which weights? Expected {name}/TAG; its tags: {tags}")
    raise ModelError(
        f"{name}: no such file, folder or CLIP with weights; expected a run, a file of OpenAI's, a folder of open_clip "
        "or transformers, ARCHITECTURE/TAG of open_clip, ARCHITECTURE/FILE, or one of OpenAI's names."
        f"{did_you_mean(name, OPENAI_NAMES)}"
    )
