"""Evaluation as part of a training run: the untouched model, every validation, and the checkpoint that is kept.

It writes into the folder of the run:

    before.json       ranks of the untouched model, written before the first step; a resumed run compares with the same
    evaluation.json   {"before": {METRIC: {value, low, high, n}}, "after": …, "delta": {METRIC: {value, low, high}},
                      "facts": {…}}
    interpolation.json  checkpoints/interpolated.ckpt  (finetune/interpolate.py)
    examples.json     what was won, lost and confused, before and after, with its pictures (finetune/examples.py)
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from curate.clip import load_clip
from curate.errors import InputError
from curate.files import write_text
from curate.remote import shown
from finetune import interpolate
from finetune.config import DataConfig, EvaluateConfig, KeepConfig
from finetune.evaluate import Evaluation, compare, evaluate_clip, metric_names
from finetune.examples import examples
from finetune.keep import TRADE_OFF, Goal
from finetune.module import CLIPModule
from finetune.runs import INTERPOLATED, checkpoint_of, load_trained_clip, model_fingerprint
from finetune.sets import evaluation_sets

logger = logging.getLogger("cliptailor")


class EvaluationCallback(lightning.Callback):
    """Evaluates the untouched model, the model at each validation, and the best (else last) checkpoint in the end.

    The metrics are logged by their names, so that a checkpoint callback can monitor them. Rank 0 evaluates, the others
    wait for its figures.

    Args:
        config: the sets.
        data: whose val and retain splits are always among them.
        out: folder of the run.
        keep: how a CLIP is looked for that gained and has not forgotten; plays no part without `goal`.
        goal: what is gained and kept; set before training. With it `trade_off`, its score, is logged too.
    """

    def __init__(self, config: EvaluateConfig, data: DataConfig, out: Path, keep: KeepConfig | None = None) -> None:
        self.data, self.out = data, out
        self.keep = keep or KeepConfig()
        self.goal: Goal | None = None
        self.sets = evaluation_sets(config, data.dataset)
        self.seconds, self.samples, self.evaluation_seconds = 0.0, 0, 0.0
        self._peak_bytes, self._device = 0, torch.device("cpu")
        self._mark = 0.0

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that will be logged; `monitor` must be one of them."""
        return metric_names(self.sets)

    def evaluate(self, module: Any, device: torch.device) -> Evaluation:
        """Evaluate a CLIPModule as it is."""
        return evaluate_clip(
            module.model,
            module.clip.preprocess,
            module.clip.tokenizer,
            self.sets,
            device=device,
            batch_size=self.data.eval_batch_size,
        )

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Evaluate the untouched model into before.json; a resumed run has it already."""
        self._device = trainer.strategy.root_device
        # Sharded weights are restored later than this; then the file tells that there is something to restore.
        resumed = trainer.ckpt_path or (pl_module.is_sharded and (self.out / "before.json").is_file())
        if not resumed:
            if before := self._evaluate_together(trainer, pl_module):
                write_text(self.out / "before.json", before.to_json())
        elif trainer.is_global_zero and self._before().sets != self.sets.fingerprint:
            raise InputError(
                f"{self.out / 'before.json'}: made on other evaluation samples than there are now; "
                "restore them, or start again in another `out`"
            )
        trainer.strategy.barrier("before")

    def _evaluate_together(self, trainer: lightning.Trainer, module: Any) -> Evaluation | None:
        """Rank 0's evaluation; the others get None, and take part only where each has but a part of the weights."""
        if not (trainer.is_global_zero or module.is_sharded):
            return None
        began = time.monotonic()
        found = self.evaluate(module, module.device)
        self.evaluation_seconds += time.monotonic() - began
        return found if trainer.is_global_zero else None

    def _before(self) -> Evaluation:
        path = self.out / "before.json"
        if not path.is_file():
            raise InputError(f"{path}: gone, and the untouched model cannot be measured now; start in another `out`")
        return Evaluation.from_json(path.read_text(encoding="utf-8"))

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Evaluate and log."""
        if trainer.sanity_checking:
            return
        found = self._evaluate_together(trainer, pl_module)
        values = found.values() if found else {}
        if values and self.goal:
            values[TRADE_OFF] = self.goal.score(self._before().values(), values)
        # Every rank logs the same figure; their mean is that figure.
        pl_module.log_dict(trainer.strategy.broadcast(values), sync_dist=trainer.world_size > 1)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Evaluate the checkpoint that will be exported, and write evaluation.json and examples.json."""
        if not trainer.is_global_zero:
            return
        best = best_checkpoint(trainer)
        end: Any = pl_module
        if end.is_sharded:
            end = CLIPModule.load_from_checkpoint(self.out / "checkpoints" / "last.ckpt", map_location="cpu")
        module: Any = CLIPModule.load_from_checkpoint(best, map_location="cpu") if best else end
        # Lightning has moved the model to the CPU by now.
        device = trainer.strategy.root_device
        after = self.evaluate(module.to(device), device)
        module.to("cpu")
        before = self._before()
        facts = self._facts(trainer, pl_module) | {"checkpoint": Path(best).name if best else "last"}
        goal = self.goal if self.keep.interpolate else None
        if goal and (chosen := self._interpolate(end, goal, device, before, after)):
            after, facts["checkpoint"] = chosen.evaluation, f"{INTERPOLATED} (α = {chosen.alpha})"
        # Of what `finetune export` will take; an export that gives another is another model.
        facts["fingerprint"] = model_fingerprint(load_trained_clip(checkpoint_of(self.out), "cpu").model)
        write_text(self.out / "evaluation.json", json.dumps(compare(before, after, facts), indent=1))
        write_text(self.out / "examples.json", json.dumps(examples(self.sets, before, after)))

    def _interpolate(
        self,
        module: Any,
        goal: Goal,
        device: torch.device,
        before: Evaluation,
        best: Evaluation,
    ) -> interpolate.Point | None:
        """Look between start and end for a CLIP with a better score than the best checkpoint's; save it if there is."""
        start = load_clip(module.clip_config.name, module.clip_config.weights, device="cpu")
        end = interpolate.plain_copy(module.clip)
        end.model.to(device)
        alphas = interpolate.grid(self.keep.interpolate, apart=self.keep.towers_apart)
        logger.info("evaluating %d CLIPs from start to end", len(alphas) - 1)
        size, known = self.data.eval_batch_size, {interpolate.START: before}
        points = interpolate.sweep(start, end, alphas, self.sets, batch_size=size, known=known)
        found, values = interpolate.choose(points, goal), before.values()
        better = goal.score(values, found.evaluation.values()) > goal.score(values, best.values())
        chosen = found if better and found.alpha != interpolate.END else None
        if chosen:
            path = self.out / "checkpoints" / INTERPOLATED
            interpolate.save(path, start, end, chosen.alpha, dict(module.hparams))
            if chosen.alpha == interpolate.START:
                logger.warning(
                    "every CLIP of this run lost more than keep.budget (%g) of %s, or gained nothing: what is exported "
                    "is the one it started from. Try a smaller learning rate, data.replay, or --config retain",
                    goal.budget,
                    ", ".join(goal.keep),
                )
        told = interpolate.as_json(goal, points, chosen.alpha if chosen else None)
        write_text(self.out / "interpolation.json", json.dumps(told, indent=1))
        return chosen

    def _facts(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> dict[str, Any]:
        trained: Any = module  # a CLIPModule
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]  # a CLIPDataModule
        saved = datamodule.saved
        return {
            "model": trained.clip_config.label,
            "adapter": trained.adapter.kind,
            "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "total_parameters": sum(p.numel() for p in module.parameters()),
            "train_samples": len(datamodule.train_index),
            "steps": trainer.global_step,
            "seconds": round(self.seconds, 1),
            "samples_per_second": round(self.samples / self.seconds, 1) if self.seconds else None,
            "evaluation_seconds": round(self.evaluation_seconds, 1),
            "samples_seen": self.samples,
            "device": _device_name(trainer),
            "peak_memory_bytes": self._peak_bytes or None,  # as the last checkpoint has it
            "dataset": ", ".join(shown(source.path) for source in self.data.trained_on),
            "features": asdict(saved) | {"spared": self.samples - saved.computed} if saved else None,
        }

    # Time and samples of the training steps alone, kept over interruptions.

    def on_train_start(self, *_: Any) -> None:
        """Start the clock."""
        self._mark = time.monotonic()

    def on_validation_end(self, *_: Any) -> None:
        """Start it again: evaluation is no training time."""
        self._mark = time.monotonic()

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        """Count the step just made; after the last one of the run, let a validation follow whatever the interval."""
        module, outputs, _, _ = arguments
        now = time.monotonic()
        self.seconds, self._mark = self.seconds + now - self._mark, now
        self.samples += len(outputs["embeddings"][0]) * trainer.world_size
        if trainer.global_step >= module.total_steps():
            # Else the final weights could never become the best checkpoint. Lightning validates before it stops.
            trainer.check_val_every_n_epoch = None
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Kept in each checkpoint."""
        on_cuda = self._device.type == "cuda"
        now = torch.cuda.max_memory_allocated(self._device) if on_cuda else peak_memory()
        self._peak_bytes = max(self._peak_bytes, now or 0)
        told = {"seconds": self.seconds, "samples": self.samples, "evaluation_seconds": self.evaluation_seconds}
        return {**told, "peak_bytes": self._peak_bytes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.seconds, self.samples = state_dict["seconds"], state_dict["samples"]
        # An earlier version's checkpoint has neither.
        self.evaluation_seconds = state_dict.get("evaluation_seconds", 0.0)
        self._peak_bytes = state_dict.get("peak_bytes", 0)


def peak_memory() -> int | None:
    """Bytes of memory that this process held at most; None where the system does not say.

    Linux counts from the program's start; `ru_maxrss`, elsewhere, may be that of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(found[1]) * 1024 if found else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_name(trainer: lightning.Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return name if trainer.world_size == 1 else f"{trainer.world_size} × {name}"


def best_checkpoint(trainer: lightning.Trainer) -> str | None:
    """Path of the best checkpoint by the monitored metric; None if nothing is monitored."""
    keepers = [keeper for keeper in trainer.checkpoint_callbacks if isinstance(keeper, ModelCheckpoint)]
    return next((keeper.best_model_path for keeper in keepers if keeper.monitor and keeper.best_model_path), None)
