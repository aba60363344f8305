"""The LightningModule: a CLIP, what of it is trained, the loss, the optimiser. It reads no data.

A checkpoint holds all weights, and in its hyperparameters the architecture and preprocessing:
`CLIPModule.load_from_checkpoint(path)` needs nothing else, neither the hub nor the file that training started from.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional

from curate.clip import Clip, load_clip
from curate.errors import ConfigError
from finetune.adapters import adapt, hold_still, is_locked
from finetune.config import AdapterConfig, ClipConfig, LossConfig, OptimizerConfig
from finetune.losses import contrastive_loss, gather_embeddings, gather_ids, local_rows, positives
from finetune.optim import adamw, clamp_logit_scale, schedule, total_steps

Batch = dict[str, Tensor]
Config = TypeVar("Config", ClipConfig, AdapterConfig, LossConfig, OptimizerConfig)


class CLIPModule(lightning.LightningModule):
    """A CLIP being adapted.

    Args:
        clip: what to start from; ClipConfig or its fields as a dict, as for the others.
        adapter: what of it is trained.
        loss: of the batch.
        optimizer: AdamW and its schedule.
        architecture: how to build the model without weights, for a checkpoint to bring them: name, `model_cfg` and
            `preprocess_cfg`. Checkpoints have it among their hyperparameters; do not give it otherwise.

    Attributes:
        clip: the CLIP with its preprocessing and tokenizer.
        model: `clip.model`, adapted.

    Raises:
        ModelError: the CLIP cannot be had, or has no layer that the adapter names.
    """

    def __init__(
        self,
        clip: ClipConfig | dict[str, Any] | None = None,
        adapter: AdapterConfig | dict[str, Any] | None = None,
        loss: LossConfig | dict[str, Any] | None = None,
        optimizer: OptimizerConfig | dict[str, Any] | None = None,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.clip_config = _config(ClipConfig, clip)
        self.adapter = _config(AdapterConfig, adapter)
        self.loss = _config(LossConfig, loss)
        self.optimizer = _config(OptimizerConfig, optimizer)
        self.clip = _rebuild(architecture) if architecture else _start(self.clip_config)
        self.model: Any = self.clip.model
        adapt(self.model, self.adapter)
        self.save_hyperparameters(
            {
                "clip": asdict(self.clip_config),
                "adapter": asdict(self.adapter),
                "loss": asdict(self.loss),
                "optimizer": asdict(self.optimizer),
                "architecture": architecture or _architecture(self.clip),
            }
        )
        self.train()

    # --- towers ---

    def train(self, mode: bool = True) -> CLIPModule:
        """As always, but locked towers stay in eval mode, and so do a pretrained ResNet's BatchNorm statistics."""
        super().train(mode)
        if mode:
            hold_still(self.model, statistics=not self.from_scratch)
        return self

    @property
    def from_scratch(self) -> bool:
        """Whether training started from random weights."""
        return self.clip_config.weights is None and not self.clip_config.brings_weights

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) of pixels (B, 3, H, W), L2-normalised, at least float32."""
        with self._gradient("image"):
            return _normalised(self.model.encode_image(pixels))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, D) of token ids (B, L), L2-normalised, at least float32."""
        with self._gradient("text"):
            return _normalised(self.model.encode_text(tokens))

    def _gradient(self, tower: str) -> AbstractContextManager[None]:
        return torch.set_grad_enabled(torch.is_grad_enabled() and not is_locked(self.model, tower))

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of images and of captions."""
        return self.encode_image(pixels), self.encode_text(tokens)

    # --- training ---

    def batch_loss(self, batch: Batch, *, gather: bool) -> Tensor:
        """The contrastive loss of a batch (finetune/data.py), in float32 whatever the precision of the towers.

        Args:
            batch: pixels, tokens and, for several positives, group.
            gather: contrast with the batches of all processes, not only with this one's.
        """
        image, text = self(batch["pixels"], batch["tokens"])
        group = batch["group"] if self.loss.multi_positive else None
        rows = slice(None)
        if gather:
            rows = local_rows(len(image))
            image, text = gather_embeddings(image), gather_embeddings(text)
            group = None if group is None else gather_ids(group)
        with torch.autocast(image.device.type, enabled=False):
            return contrastive_loss(
                image,
                text,
                self.model.logit_scale.to(image.dtype),
                positives_BB=None if group is None else positives(group),
                label_smoothing=self.loss.label_smoothing,
                rows=rows,
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one step, logged as train/loss with the factor of the logits and the learning rate."""
        del batch_idx
        loss = self.batch_loss(batch, gather=True)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["pixels"]), sync_dist=True)
        self.log("train/logit_scale", self.model.logit_scale.detach().exp())
        self.log("lr-AdamW", max(group["lr"] for group in self.trainer.optimizers[0].param_groups))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log val/loss: the mean over batches, which depends on their size."""
        del batch_idx
        size = len(batch["pixels"])
        self.log("val/loss", self.batch_loss(batch, gather=False), prog_bar=True, batch_size=size, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, with warm-up and cosine over the steps of this run."""
        optimizer = adamw(self.model, self.optimizer)
        scheduler = schedule(optimizer, self.total_steps(), self.optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimiser steps of the whole run.

        Raises:
            ConfigError: the data is no CLIPDataModule and the trainer has no max_steps.
        """
        trainer = self.trainer
        batches = getattr(trainer.datamodule, "batches_per_epoch", None)  # type: ignore[attr-defined]
        if batches is None:
            if trainer.max_steps < 0:
                raise ConfigError("trainer.max_steps: needed for the learning rate where the data is no CLIPDataModule")
            return trainer.max_steps
        return total_steps(trainer.max_steps, trainer.max_epochs, -(-batches // trainer.accumulate_grad_batches))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step, after which the temperature is brought back into its bounds."""
        super().optimizer_step(*args, **kwargs)
        clamp_logit_scale(self.model)


def _normalised(features: Tensor) -> Tensor:
    # Half precision ends here: cosines near 1 need more than eight bits.
    return functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _config(kind: type[Config], given: Config | dict[str, Any] | None) -> Config:
    return given if isinstance(given, kind) else kind(**(given or {}))  # type: ignore[arg-type]


def _start(config: ClipConfig) -> Clip:
    with _random_is_meant() if config.pretrained is None else nullcontext():
        return load_clip(config.name, config.pretrained, device="cpu")


@contextmanager
def _random_is_meant() -> Iterator[None]:
    """Without open_clip's warning that weights are random."""

    def other(record: logging.LogRecord) -> bool:
        return "initialized randomly" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)


def _architecture(clip: Clip) -> dict[str, Any]:
    return {"name": clip.name, "model_cfg": clip.architecture, "preprocess_cfg": dict(clip.preprocess_cfg)}


def _rebuild(architecture: dict[str, Any]) -> Clip:
    """The CLIP that `_architecture` describes, with random weights."""
    from open_clip import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, image_transform_v2

    with tempfile.TemporaryDirectory() as folder:
        # A name of its own: open_clip keeps it, and must not take it for its architecture of that name.
        path = Path(folder) / f"checkpoint-{architecture['name'].replace('/', '-').replace(':', '-')}.json"
        path.write_text(json.dumps(architecture["model_cfg"]), encoding="utf-8")
        with _random_is_meant():
            clip = load_clip(str(path), device="cpu")
    preprocess_cfg = architecture["preprocess_cfg"]
    set_model_preprocess_cfg(clip.model, preprocess_cfg)
    clip.preprocess = image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)
    clip.name, clip.preprocess_cfg = architecture["name"], preprocess_cfg
    return clip
