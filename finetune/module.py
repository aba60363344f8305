"""The LightningModule: a CLIP, what of it is trained, the loss, the optimiser. It reads no data.

The towers (`embed`), the loss of what they make (`losses`) and the start that it may be held to (`embed_start`) are
apart from each other: whoever wants to embed a batch in parts replaces the first alone.

A checkpoint holds all weights, and in its hyperparameters the architecture and preprocessing:
`CLIPModule.load_from_checkpoint(path)` needs nothing else, neither the hub nor the file that training started from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any, TypeVar

import lightning
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional

from curate.clip import Clip, load_clip, rebuild
from curate.clip.tokens import tokenizer_as_files, tokenizer_from_files
from curate.errors import ConfigError, ModelError
from finetune.adapters import adapt, hold_still, is_locked
from finetune.compute import has_trained_statistics, in_parts, one_by_one, packed_encoder, prepare
from finetune.config import AdapterConfig, ClipConfig, ComputeConfig, LossConfig, ModelConfig, OptimizerConfig
from finetune.losses import (
    contrastive_loss,
    feature_distance,
    gather_embeddings,
    gather_fixed,
    local_rows,
    logit_divergence,
    positives,
    sigmoid_loss,
)
from finetune.optim import adamw, clamp_logit_scale, schedule, total_steps
from finetune.packing import Packed, packer_of
from finetune.pixels import normalised
from finetune.start import Start, evaluating
from finetune.trimming import encode_text

Batch = dict[str, Any]
"""finetune/reading.py; `packed`: its captions in rows (finetune/packing.py)."""
Pair = tuple[Tensor, Tensor]
"""Embeddings (B, D) of images and of their captions, L2-normalised."""
Config = TypeVar("Config", ClipConfig, AdapterConfig, LossConfig, OptimizerConfig, ComputeConfig)
# Where SigLIP begins (arXiv 2303.15343, algorithm 1): at these, random embeddings make few yeses, as is right.
SIGMOID_FACTOR, SIGMOID_BIAS = 10.0, -10.0


class CLIPModule(lightning.LightningModule):
    """A CLIP being adapted.

    Args:
        clip: what to start from; ClipConfig or its fields as a dict, as for the others.
        adapter: what of it is trained.
        loss: of the batch.
        optimizer: AdamW and its schedule.
        compute: how a step is computed.
        architecture: how to build the model without weights, for a checkpoint to bring them: name, `model_cfg` and
            `preprocess_cfg`. Checkpoints have it among their hyperparameters; do not give it otherwise.

    Attributes:
        clip: the CLIP with its preprocessing and tokenizer.
        model: `clip.model`, adapted.
        start: its trained weights as they were, where the loss holds it to them; else None.
        is_sharded: whether each process has a part of the weights only (finetune/sharded.py).

    Raises:
        ConfigError: the loss holds it to random weights.
        ModelError: the CLIP cannot be had, has no layer that the adapter names, or cannot be computed so.
    """

    is_sharded = False

    def __init__(
        self,
        clip: ClipConfig | dict[str, Any] | None = None,
        adapter: AdapterConfig | dict[str, Any] | None = None,
        loss: LossConfig | dict[str, Any] | None = None,
        optimizer: OptimizerConfig | dict[str, Any] | None = None,
        compute: ComputeConfig | dict[str, Any] | None = None,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        config = ModelConfig(
            clip=_config(ClipConfig, clip),
            adapter=_config(AdapterConfig, adapter),
            loss=_config(LossConfig, loss),
            optimizer=_config(OptimizerConfig, optimizer),
            compute=_config(ComputeConfig, compute),
        )
        self.clip_config, self.adapter = config.clip, config.adapter
        self.loss, self.optimizer = config.loss, config.optimizer
        # What a checkpoint brings back is mostly evaluated or exported: not worth minutes of compiling.
        self.compute = replace(config.compute, compile=False) if architecture else config.compute
        self.clip = _rebuild(architecture) if architecture else _start(self.clip_config)
        self.model: Any = self.clip.model
        self._prepare()
        self.save_hyperparameters(asdict(config) | {"architecture": architecture or _architecture(self.clip)})
        self.train()
        if self.compute.micro_batch_size and has_trained_statistics(self.model):
            raise ModelError(
                "model.compute.micro_batch_size: from random weights this CLIP's BatchNorm learns the statistics of "
                "whole batches; set it to null, or start from pretrained weights, whose statistics stay"
            )

    def _prepare(self) -> None:
        """Make of the CLIP what is trained, and keep what it is held to."""
        factor = self.loss.logit_scale
        if self.loss.kind == "siglip" and self.model.logit_bias is None:
            factor = factor or SIGMOID_FACTOR
        make_trainable(self.clip, self.adapter, self.loss)
        prepare(self.model, self.compute)
        self._encode_packed = packed_encoder(self.compute)
        self.start = Start(self.model) if self.loss.holds_to_start else None
        if factor:
            self.model.logit_scale.data.fill_(math.log(factor))

    @property
    def is_sigmoid(self) -> bool:
        """Whether the contrast is SigLIP's."""
        return _is_sigmoid(self.model, self.loss)

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
        return self.clip_config.is_random

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) of pixels (B, 3, H, W), uint8 or preprocessed; L2-normalised, at least float32."""
        with self._gradient("image"):
            return in_parts(self._encode_pixels, pixels, self.compute.micro_batch_size)

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.uint8:  # others are in the weights' precision already: Lightning sees to it
            pixels = normalised(pixels, self.clip.preprocess_cfg).to(self.model.logit_scale.dtype)
        return _normalised(self.model.encode_image(pixels))

    def encode_text(self, tokens: Tensor | list[Packed]) -> Tensor:
        """Embeddings (B, D) of captions, L2-normalised, at least float32.

        Args:
            tokens: ids (B, L), where L may be less than the context's; or the captions in rows.
        """
        with self._gradient("text"):
            if not isinstance(tokens, Tensor):
                return one_by_one(lambda part: _normalised(self._encode_packed(self.model, part)), tokens)
            return in_parts(
                lambda part: _normalised(encode_text(self.model, part)), tokens, self.compute.micro_batch_size
            )

    def _gradient(self, tower: str) -> AbstractContextManager[None]:
        return torch.set_grad_enabled(torch.is_grad_enabled() and not is_locked(self.model, tower))

    def forward(
        self, pixels: Tensor | None, tokens: Tensor | list[Packed] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Embeddings of images and of captions; None of what is not given."""
        image = None if pixels is None else self.encode_image(pixels)
        return image, None if tokens is None else self.encode_text(tokens)

    # --- training ---

    def _packed(self, batch: Batch) -> Tensor | list[Packed] | None:
        """The captions of a batch in rows: as its maker packed them, or packed here while they are on the CPU."""
        tokens: Tensor | None = batch.get("tokens")
        packed: list[Packed] | None = batch.get("packed")
        if packed is None and tokens is not None and tokens.device.type == "cpu":
            packer = packer_of(self.model, self.compute.micro_batch_size)
            packed = packer(tokens) if packer else None
        return tokens if packed is None else packed

    def embed(self, batch: Batch) -> Pair:
        """Embeddings of a batch (finetune/reading.py), with gradient."""
        return _whole(self(batch.get("pixels"), self._packed(batch)), batch)

    @torch.no_grad()
    def embed_start(self, batch: Batch) -> Pair:
        """Embeddings that the starting CLIP makes of the same batch, without dropout of any kind."""
        assert self.start is not None
        given = (batch.get("pixels"), self._packed(batch))
        with evaluating(self):
            return _whole(functional_call(self, self.start.named("model."), given), batch)

    def embed_locked(self, tower: str, seen: Batch) -> Tensor:
        """Embeddings that a locked tower makes of pixels, or of tokens, on any device."""
        seen = move_data_to_device(seen, self.device)
        if tower == "image":
            return self.encode_image(seen["pixels"])
        return self.encode_text(seen.get("packed") or seen["tokens"])

    @property
    def width(self) -> int:
        """Of embeddings."""
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            return int(encode_text(self.model, self.clip.tokenizer([""])).shape[-1])

    def losses(
        self, embeddings: Pair, group: Tensor | None, *, start: Pair | None = None, gather: bool = True
    ) -> dict[str, Tensor]:
        """What a batch's embeddings cost: `contrastive` and, with those of the start, `distill_…`, each weighted.

        They are computed in float32 at least, whatever the precision of the towers.

        Args:
            embeddings: of this process's batch.
            group: ids (B, G) for several positives; None: only what is a pair is positive.
            start: what the starting CLIP makes of the same batch.
            gather: contrast with the batches of all processes, not only with this one's.
        """
        image, text = embeddings
        rows = slice(None)
        if gather:
            rows = local_rows(len(image))
            image, text = gather_embeddings(image), gather_embeddings(text)
            group = None if group is None else gather_fixed(group)
            start = start and (gather_fixed(start[0]), gather_fixed(start[1]))
        with torch.autocast(image.device.type, enabled=False):
            parts = {"contrastive": self._contrast(image, text, None if group is None else positives(group), rows)}
            return parts | (self._distillation((image, text), start, rows) if start else {})

    def _contrast(self, image: Tensor, text: Tensor, positives_BB: Tensor | None, rows: slice) -> Tensor:
        given: Any = {"positives_BB": positives_BB, "label_smoothing": self.loss.label_smoothing, "rows": rows}
        scale = self.model.logit_scale.to(image.dtype)
        if self.is_sigmoid:
            return sigmoid_loss(image, text, scale, self.model.logit_bias.to(image.dtype), **given)
        return contrastive_loss(image, text, scale, **given)

    def _distillation(self, now: Pair, start: Pair, rows: slice) -> dict[str, Tensor]:
        parts = {}
        if weight := self.loss.distill_feature:
            image, text = (feature_distance(a[rows], b[rows]) for a, b in zip(now, start, strict=True))
            parts["distill_feature"] = weight * (image + text) / 2
        if weight := self.loss.distill_logit:
            assert self.start is not None
            scale, start_scale = self.model.logit_scale, self.start.of("logit_scale")
            kind = now[0].dtype
            parts["distill_logit"] = weight * logit_divergence(
                *now, scale.to(kind), *start, start_scale.to(kind), rows=rows
            )
        return parts

    def _group(self, batch: Batch) -> Tensor | None:
        return batch["group"] if self.loss.multi_positive else None

    def batch_loss(self, batch: Batch, *, gather: bool) -> Tensor:
        """The contrast of a batch alone, without what holds the CLIP to its start.

        Args:
            batch: pixels, tokens and, for several positives, group (finetune/reading.py).
            gather: as for `losses`.
        """
        return self.losses(self.embed(batch), self._group(batch), gather=gather)["contrastive"]

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The `loss` of one step, logged with its parts, the factor of the logits and the learning rate.

        Callbacks get the step's `embeddings` too, those of images and those of captions.
        """
        del batch_idx
        start = self.embed_start(batch) if self.loss.distills else None
        embeddings = self.embed(batch)
        parts = self.losses(embeddings, self._group(batch), start=start)
        if self.start is not None and self.loss.l2_start:
            parts["l2_start"] = self.loss.l2_start / 2 * self._squared_distance_to(self.start)
        loss = torch.stack([*parts.values()]).sum()
        size = len(embeddings[0])
        self.log("train/loss", loss, prog_bar=True, batch_size=size, sync_dist=True)
        if len(parts) > 1:
            shown = {f"train/{name}": part.detach() for name, part in parts.items()}
            self.log_dict(shown, batch_size=size, sync_dist=True)
        self.log("train/logit_scale", self.model.logit_scale.detach().exp())
        if self.is_sigmoid:
            self.log("train/logit_bias", self.model.logit_bias.detach())
        self.log("lr-AdamW", max(group["lr"] for group in self.trainer.optimizers[0].param_groups))
        return {"loss": loss, "embeddings": tuple(each.detach() for each in embeddings)}

    def _squared_distance_to(self, start: Start) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return start.squared_distance(self.model)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log val/loss: the contrast alone, its mean over batches, which depends on their size."""
        del batch_idx
        loss = self.batch_loss(batch, gather=False)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["group"]), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, with warm-up and cosine over the steps of this run."""
        optimizer = adamw(self.model, self.optimizer)
        scheduler = schedule(optimizer, self.total_steps, self.optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimiser steps of the whole run.

        Raises:
            ConfigError: the data is no CLIPDataModule and the trainer has no max_steps.
        """
        trainer = self.trainer
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "steps"):
            if trainer.max_steps < 0:
                raise ConfigError("trainer.max_steps: needed for the learning rate where the data is no CLIPDataModule")
            return trainer.max_steps
        epochs = trainer.max_epochs
        if epochs is None or epochs < 0:
            return trainer.max_steps
        return total_steps(trainer.max_steps, 1, data.steps(epochs, trainer.accumulate_grad_batches))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step, after which the temperature of a softmax is brought back into its bounds.

        SigLIP's has none: the paper's models end above 100 (112 in ViT-SO400M-14-SigLIP-384, open_clip#746), and to
        pull it down without the bias, which grew with it, would spoil them at the first step.
        """
        super().optimizer_step(*args, **kwargs)
        if not self.is_sigmoid:
            clamp_logit_scale(self.model)


def _whole(computed: tuple[Tensor | None, Tensor | None], batch: Batch) -> Pair:
    """Both embeddings: what a locked tower makes may be in the batch already."""
    image, text = computed
    return (batch["image"] if image is None else image), (batch["text"] if text is None else text)


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


def make_trainable(clip: Clip, adapter: AdapterConfig, loss: LossConfig) -> None:
    """Make a CLIP, in place, ready to be trained as configured; with a `logit_bias` where SigLIP's loss needs one.

    Raises:
        ModelError: as `adapt`.
    """
    if loss.kind == "siglip" and clip.model.logit_bias is None:
        _give_bias(clip)
    adapt(clip.model, adapter)
    if _is_sigmoid(clip.model, loss):
        clip.model.logit_bias.requires_grad_(adapter.train_logit_scale)


def _is_sigmoid(model: Any, loss: LossConfig) -> bool:
    return model.logit_bias is not None if loss.kind == "auto" else loss.kind == "siglip"


def _give_bias(clip: Clip) -> None:
    """Make it a CLIP with a `logit_bias` as open_clip has them: its configuration says so, so exports have it too."""
    model: Any = clip.model
    model.logit_bias = torch.nn.Parameter(torch.full_like(model.logit_scale, SIGMOID_BIAS))
    if clip.architecture:
        clip.architecture = clip.architecture | {"init_logit_bias": SIGMOID_BIAS}


def _architecture(clip: Clip) -> dict[str, Any]:
    from open_clip.tokenizer import HFTokenizer

    told = {"name": clip.name, "model_cfg": clip.architecture, "preprocess_cfg": dict(clip.preprocess_cfg)}
    # CLIP's own BPE is built into open_clip; any other would have to be there again, or downloaded.
    return told | ({"tokenizer": tokenizer_as_files(clip.tokenizer)} if isinstance(clip.tokenizer, HFTokenizer) else {})


def _rebuild(architecture: dict[str, Any]) -> Clip:
    """The CLIP that `_architecture` describes, with random weights."""
    model_cfg, files = architecture["model_cfg"], architecture.get("tokenizer")
    tokenizer = tokenizer_from_files(files, model_cfg["text_cfg"]) if files else None
    return rebuild(architecture["name"], model_cfg, architecture["preprocess_cfg"], tokenizer)
