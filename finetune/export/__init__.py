"""Write a trained CLIP where others can use it: `finetune export --to open_clip|transformers|onnx|adapter`.

A folder is written beside its final name, loaded in a fresh process as its users would load it, compared with the
checkpoint on real images, and only then renamed: what lies under `--out` is whole and right. README.md is its card.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from curate.errors import ConfigError
from curate.files import check_writable
from finetune.export.card import write_card
from finetune.export.check import check_adapter, check_export, samples_of
from finetune.export.formats import (
    Format,
    adapted,
    write_adapter,
    write_onnx,
    write_open_clip,
    write_transformers,
)
from finetune.runs import checkpoint_of, load_trained_clip, model_fingerprint

__all__ = ["Format", "check_export", "export", "write_onnx", "write_open_clip", "write_transformers"]
WRITE = {"open_clip": write_open_clip, "transformers": write_transformers, "onnx": write_onnx}


def export(
    run: Path,
    to: Path,
    format: Format = "open_clip",  # noqa: A002 - the word users know
    *,
    checkpoint: str = "best",
    license: str | None = None,  # noqa: A002 - the card's word
    overwrite: bool = False,
) -> Path:
    """Export a run's CLIP and return the checkpoint that was taken.

    Args:
        run: folder of a run, or a checkpoint file.
        to: folder to write.
        format: open_clip, transformers, onnx (LoRA merged), or adapter: the LoRA alone, as peft writes it.
        checkpoint: best, last, or the path of one.
        license: of the model, an SPDX name, for its card.
        overwrite: replace what is in `to`.

    Raises:
        ConfigError: `to` is there already; or it holds the run, its checkpoint or the folder one works in.
        InputError: no such run or checkpoint.
        ModelError: the run has no adapter; the format has no word for this CLIP; or what was written does not give the
            same embeddings.
    """
    assert format in get_args(Format)
    path = checkpoint_of(run, checkpoint)
    _check_holds_nothing_needed(to, run, path)
    check_writable("--out", to.parent)
    with _new_folder(to, overwrite=overwrite) as folder:
        samples, weights = samples_of(path), None
        if format == "adapter":
            module = adapted(path)
            write_adapter(module.model, folder)
            check_adapter(module, folder, samples)
        else:
            clip = load_trained_clip(path, "cpu")
            weights = model_fingerprint(clip.model)
            WRITE[format](clip, folder)
            check_export(clip, folder, format, samples)
        write_card(folder, path, format, license, weights)
    return path


def _check_holds_nothing_needed(to: Path, run: Path, checkpoint: Path) -> None:
    """What lies in `to` is deleted.

    Raises:
        ConfigError: the run, the checkpoint or the working directory does.
    """
    needed = {"the checkpoint that is exported": checkpoint, "the run": run, "the folder you are in": Path()}
    for what, path in needed.items():
        if path.resolve().is_relative_to(to.resolve()):
            raise ConfigError(f"--out {to}: holds {what}; give another folder")


@contextmanager
def _new_folder(to: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside `to` that takes its place in the end; after an error `to` is as it was."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())) and not overwrite:
        raise ConfigError(f"--out {to}: is there already; give another folder, or --overwrite")
    to.parent.mkdir(parents=True, exist_ok=True)
    new, old = (to.with_name(f".{to.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir()
        yield new
        try:
            if to.exists():
                to.replace(old)
            new.replace(to)
        except BaseException:  # a Ctrl-C too
            if old.exists() and not to.exists():
                old.replace(to)
            raise
    finally:
        for leftover in (new, old) if to.exists() else (new,):
            if leftover.is_file():
                leftover.unlink()
            shutil.rmtree(leftover, ignore_errors=True)
