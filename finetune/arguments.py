"""What the commands take besides `fit`'s configuration. Nothing here may import, even for type checking, what is heavy.

(jsonargparse runs the `if TYPE_CHECKING:` imports of a dataclass's module to resolve its types.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finetune.config import ClipConfig, EvaluateConfig


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
    batch_size: int = 256
    """Images and captions encoded at once."""
    device: str = "auto"
    """auto (the best there is), cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """A CLIP, images and queries."""

    run: Path | None = None
    """Folder of a run, or a checkpoint file."""
    checkpoint: str = "best"
    """Of the run: best (the interpolated one, if there is), last, or the path of a checkpoint."""
    clip: ClipConfig | None = None
    """Or a CLIP as it is."""
    top: int = 3
    """Queries shown for each image in the table."""
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
