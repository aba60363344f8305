"""The folder of a finished or interrupted run: its configuration, its checkpoints, its CLIP."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from curate.errors import InputError, ModelError
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
