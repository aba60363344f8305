"""What the commands take besides `fit`'s configuration. Nothing here may import, even for type checking, what is heavy.

(jsonargparse runs the `if TYPE_CHECKING:` imports of a dataclass's module to resolve its types.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from curate.errors import ConfigError
from curate.files import check_writable
from curate.keys import shown
from finetune.config import ClipConfig, EvaluateConfig, ProbeConfig, RobustnessConfig


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A run, and which of its checkpoints."""

    run: Path
    """Folder of a run (`out` of `finetune fit`), or a checkpoint file."""
    checkpoint: str = "best"
    """best (the interpolated one, if there is), last, or the path of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class FiguresOptions(RunOptions):
    """Figures of a run's CLIP."""

    device: str = "auto"
    """auto (the best there is), cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """CLIPs, and what they are evaluated on."""

    clip: ClipConfig | None = None
    """A CLIP as it is."""
    checkpoint: str = "best"
    """Of the runs: best (the interpolated one, if there is), last, or the path of a checkpoint."""
    dataset: Path | None = None
    """A dataset whose split (and retain split) is a retrieval set."""
    split: Literal["train", "val", "test"] = "test"
    """Which split of it."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Named sets; the first run's own where none is given."""
    probe: dict[str, ProbeConfig] = field(default_factory=dict)
    """Named linear probes, each with the zero-shot classification of its test images beside it."""
    robustness: dict[str, RobustnessConfig] = field(default_factory=dict)
    """By the name of a zero-shot set: another, whose classes it has."""
    out: Path | None = None
    """Write the figures here: a table to FILE.md or FILE.csv, everything (changes against the first CLIP with paired
    intervals, confusion, robustness) to FILE.json."""
    plot: Path | None = None
    """Write the plots of the paper to this FILE.html: score against GFLOPs an image, zero-shot against probes."""
    batch_size: int = 256
    """Images and captions encoded at once."""
    device: str = "auto"
    """auto (the best there is), cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """A CLIP, and what is asked of it; images, texts and templates are further flags."""

    model: str
    """OpenAI's name (ViT-B/32), ARCHITECTURE/TAG of open_clip or ARCHITECTURE/FILE, a file of OpenAI's, a folder of
    open_clip or transformers, an id of the hub (ORG/NAME), a run, or one of its checkpoints."""
    dataset: Path | None = None
    """Search in this dataset, or folder of images, by --text or by --images."""
    out: Path | None = None
    """Write here: predictions to FILE.csv or FILE.parquet, a search to FILE.html, a page of thumbnails."""
    embeddings: Path | None = None
    """Write the embeddings of the images to this FILE.parquet, and predict nothing."""
    top: int = 3
    """Queries shown for each image in the table."""
    best: int = 20
    """Images found for each query of a search."""
    batch_size: int = 64
    """Images encoded at once."""
    device: str = "auto"
    """auto (the best there is), cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(RunOptions):
    """Where to, and in which form."""

    to: Literal["open_clip", "transformers", "onnx", "adapter"] = "open_clip"
    """open_clip, transformers (CLIPModel), onnx (both towers): all weights, LoRA merged; adapter: the LoRA alone, in
    peft's format."""
    out: Path
    """Folder to write."""
    license: str | None = None
    """Of the model, as an SPDX name, for its card."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """A run."""

    run: Path
    """Folder of a run (`out` of `finetune fit`)."""


def check_files(options: EvaluateOptions) -> None:
    """Check the files that `finetune evaluate` is to write.

    Raises:
        ConfigError: one line, beginning with the key.
    """
    if options.batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {options.batch_size}")
    if options.evaluate.max_retrieval < 2:
        raise ConfigError(f"evaluate.max_retrieval: expected at least 2, got {options.evaluate.max_retrieval}")
    _check_file("out", options.out, (".md", ".csv", ".json"))
    _check_file("plot", options.plot, (".html",))


def check_predict(
    options: PredictOptions, images: Sequence[Path], texts: Sequence[str], templates: Sequence[str]
) -> None:
    """Check what `finetune predict` is asked for.

    Raises:
        ConfigError: one line, beginning with the key.
    """
    for key in ("top", "best", "batch_size"):
        if getattr(options, key) < 1:
            raise ConfigError(f"{key}: expected at least 1, got {getattr(options, key)}")
    if options.dataset and bool(images) == bool(texts):
        raise ConfigError("dataset: search in it either by --text, or by --images")
    if not options.dataset and not images:
        raise ConfigError("predict: nothing to look at; give --images, or --dataset to search in")
    if not options.dataset and bool(options.embeddings) == bool(texts):
        raise ConfigError("predict: give either --text to choose among, or --embeddings FILE.parquet")
    if options.embeddings and (options.dataset or options.out):
        raise ConfigError(
            "embeddings: they are written alone; leave out --dataset and --out (--images takes a dataset)"
        )
    if len(set(texts)) < len(texts):
        raise ConfigError(f"text: {shown(next(text for text in texts if texts.count(text) > 1))} is there twice")
    if templates and not texts:
        raise ConfigError("templates: there is no --text to put into them")
    if list(templates) != ["imagenet"] and (wrong := [text for text in templates if text.count("{}") != 1]):
        raise ConfigError(
            f"templates: {shown(wrong[0])} needs exactly one {{}}, where the text goes; or `imagenet` alone"
        )
    _check_file("embeddings", options.embeddings, (".parquet",))
    _check_file("out", options.out, (".html",) if options.dataset else (".csv", ".parquet"))


def _check_file(key: str, path: Path | None, endings: tuple[str, ...]) -> None:
    if not path:
        return
    if path.suffix not in endings:
        raise ConfigError(f"{key}: expected a file that ends in {' or '.join(endings)}, got {path}")
    if path.is_dir():
        raise ConfigError(f"{key}: {path} is a folder; expected a file")
    check_writable(key, path.parent)
