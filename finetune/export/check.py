"""Load what was written in a fresh process, as its users would, and compare with the checkpoint on real images.

The scripts `use_….py` beside this are those users: they import open_clip, transformers, onnxruntime or peft, and
nothing of the training. So a folder that only works where it was made is never called done.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from curate.clip import Clip
from curate.errors import CliptailorError, ModelError
from finetune.adapters import Projection
from finetune.export.formats import Format
from finetune.runs import run_config

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("cliptailor")
TOLERANCE = {"open_clip": 1e-5, "transformers": 1e-5, "adapter": 1e-5, "onnx": 1e-4}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
MOST = 8  # images
# Plain ones: open_clip mends mojibake and HTML entities in captions first, which transformers does not.
CAPTIONS = ("a photo of a cat.", "two dogs and one bird, 12 × 3", "Größe: ¿qué?")


def samples_of(checkpoint: Path) -> list[Image.Image]:
    """Some images of the run's own val or train split; a drawn one where the dataset is not there any more."""
    from curate.index import MemberReader
    from finetune.data import has_split
    from finetune.sources import split_pairs, training_set

    try:
        data = run_config(checkpoint).data
        index = split_pairs(data.dataset, "val") if has_split(data.dataset, "val") else training_set(data).index
        reader = MemberReader(index.tars)
        rows = index.table.slice(0, MOST).to_pylist()
        stored = [reader.read(row["tar"], row["image_offset"], row["image_size"]) for row in rows]
        return [Image.open(io.BytesIO(content)).convert("RGB") for content in stored]
    except (CliptailorError, OSError):
        logger.info("%s: its dataset is not there; compared on a drawn picture", checkpoint)
        return drawn()


def drawn() -> list[Image.Image]:
    """A picture with edges and gradients, not square."""
    down = Image.linear_gradient("L")
    return [Image.merge("RGB", (down, down.rotate(90), Image.radial_gradient("L"))).resize((320, 200))]


def check_export(
    clip: Clip,
    folder: Path,
    format: Format = "open_clip",  # noqa: A002 - the word users know
    images: Sequence[Image.Image] = (),
) -> None:
    """Compare a folder with the plain CLIP that it was written from.

    Raises:
        ModelError: it cannot be loaded, or embeddings differ by more than `TOLERANCE`.
    """
    images = images or drawn()
    pixels, tokens = torch.stack([clip.preprocess(image) for image in images]), clip.tokenizer(list(CAPTIONS))
    expected = clip.embed_images(pixels), clip.embed_captions(tokens)
    with tempfile.TemporaryDirectory() as given:
        _write(Path(given), pixels, tokens)
        (Path(given) / "captions.json").write_text(json.dumps(CAPTIONS), "utf-8")
        for number, image in enumerate(images):
            image.save(Path(given) / f"{number:03}.png")
        _compare(folder, format, Path(given), expected)


def check_adapter(module: Any, folder: Path, images: Sequence[Image.Image]) -> None:
    """Compare an adapter, put by plain peft on the CLIP that training started from, with the CLIPModule it is of.

    Raises:
        ModelError: it cannot be loaded, or embeddings differ by more than `TOLERANCE`.
    """
    config, model = module.clip_config, module.model
    if config.is_random:
        logger.warning("training started from random weights, which nobody else has to put this adapter on")
        return
    pixels = torch.stack([module.clip.preprocess(image) for image in images])
    tokens = module.clip.tokenizer(list(CAPTIONS))
    with torch.no_grad():
        expected = normalize(model.encode_image(pixels), dim=-1), normalize(model.encode_text(tokens), dim=-1)
    projections = any(isinstance(part, Projection) for part in model.modules())
    start = {"name": config.name, "pretrained": config.weights, "projections": projections}
    with tempfile.TemporaryDirectory() as given:
        _write(Path(given), pixels, tokens)
        (Path(given) / "start.json").write_text(json.dumps(start), "utf-8")
        _compare(folder, "adapter", Path(given), expected)


def _write(given: Path, pixels: torch.Tensor, tokens: torch.Tensor) -> None:
    np.save(given / "pixels.npy", pixels.numpy())
    np.save(given / "tokens.npy", tokens.numpy())


def _in_fresh_process(script: Path, *arguments: Path) -> str | None:
    """Run a script; None, or when it failed the last line that it said, or how it ended."""
    done = subprocess.run(  # noqa: S603 - this Python, a script of ours
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, **OFFLINE},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stderr.strip().splitlines()
    if done.returncode < 0 or (done.returncode and not said):  # by a signal: its last line is of something else
        killed = " (killed: out of memory?)" if done.returncode == -signal.SIGKILL else ""
        return f"its process ended with status {done.returncode}{killed}"
    return said[-1] if done.returncode else None


def _compare(folder: Path, form: str, given: Path, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    out = given / "out.npz"
    script = Path(__file__).with_name(f"use_{form}.py")
    if fault := _in_fresh_process(script, folder.resolve(), given, out):
        raise ModelError(f"--to {form}: what was written cannot be loaded: {fault}")
    with np.load(out) as got:
        for what, embeddings in zip(("image", "text"), expected, strict=True):
            difference = float(np.abs(embeddings.numpy() - got[what]).max())
            if not difference <= TOLERANCE[form]:
                raise ModelError(
                    f"--to {form}: {what} embeddings are {difference:.1g} off the checkpoint's; nothing was exported"
                )
