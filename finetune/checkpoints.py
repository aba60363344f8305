"""Checkpoints that a kill cannot spoil, and that continue a run bit for bit.

How they are written and found again, the random state in them, when they are saved, and what a signal does.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import zipfile
import zlib
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from curate.errors import ConfigError, InputError
from curate.files import atomic

logger = logging.getLogger("cliptailor")

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
# SLURM's `--signal=USR1@90` is the first notice that some clusters give; Lightning would save inside its handler.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the final name, fsyncs and renames; of `last.ckpt` the one before is kept as `previous.ckpt`.

    Lightning's own goes through the system's temporary folder, from where a rename may be a copy, and does not fsync.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save: afterwards `path` is the old file or the new one, whole, whatever happens."""
        del storage_options
        path = Path(path)
        with atomic(path) as temporary:
            write_checkpoint(checkpoint, temporary)
            if path.name == LAST and path.exists():
                _keep(path, path.with_name(PREVIOUS))


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """`torch.save` that says what was wrong: after a failed write torch fails to close its archive, and says only that.

    Raises:
        OSError: the disk is full.
    """
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except (RuntimeError, OSError) as error:
        failed = error if isinstance(error, OSError) else error.__context__
        if isinstance(failed, OSError):
            raise OSError(failed.errno, failed.strerror, str(path)) from None
        raise


def _keep(path: Path, kept: Path) -> None:
    """Give a file a second name, without a moment in which it has none."""
    linked = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
    linked.unlink(missing_ok=True)
    try:
        linked.hardlink_to(path)
        linked.replace(kept)
    except OSError:  # a file system without links
        path.replace(kept)


def newest_checkpoint(folder: Path) -> Path | None:
    """Where a run goes on: its last checkpoint, or if that one is damaged the one before; None if there is none.

    Raises:
        InputError: all that are there are damaged.
    """
    there = [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()]
    for path in there:
        if not (damage := damage_of(path)):
            return path
        logger.warning("%s is damaged (%s)", path, damage)
    if there:
        raise InputError(f"{there[0]}: damaged, and there is no whole checkpoint beside it; --restart begins anew")
    return None


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, read from end to end: cut short, or bytes that are others; else None."""
    try:
        with zipfile.ZipFile(path) as file:  # the form that torch.save writes, with a CRC of each tensor
            broken = file.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, zlib.error) as error:
        return str(error) or type(error).__name__
    return f"{broken} is not what was written" if broken else None


class RandomState(lightning.Callback):
    """Keeps every rank's random state (Python, NumPy, torch, CUDA) in checkpoints: dropout goes on as it would have."""

    def __init__(self) -> None:
        self._to_restore: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The random states of all ranks, in plain numbers, which load safely and travel between processes."""
        return {"ranks": of_all_ranks(random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training really goes on."""
        self._to_restore = state_dict["ranks"]

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Restore before the first step: whatever ran since the start has drawn numbers too."""
        if trainer.global_rank < len(self._to_restore):
            set_random_state(self._to_restore[trainer.global_rank])
        self._to_restore = []


def of_all_ranks(mine: Any) -> list[Any]:
    """What each rank keeps in a checkpoint, which is one for all; all must ask."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def random_state() -> dict[str, Any]:
    """The random state of this process, in plain numbers."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global one, which others may draw from
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to what `random_state` gave."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002 - as above
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch.tensor(each, dtype=torch.uint8) for each in state["cuda"]])


class EpochLength(lightning.Callback):
    """Tells Lightning which epoch it is in, and how long that is.

    It asks for the length once; but the epoch in which a run goes on with batches of another size has another number of
    them than the next.
    """

    def setup(self, trainer: lightning.Trainer, *_: Any, **__: Any) -> None:
        """Let a run that `max_steps` ends go on from an epoch's end as one that `max_epochs` ends does.

        Otherwise Lightning takes that epoch for unfinished and ends it once more: all later ones are miscounted.
        """
        trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Look at the loader, which is at the epoch's beginning."""
        loop = trainer.fit_loop
        loader = loop._combined_loader
        assert loader is not None
        length = len(loader.flattened[0])
        if length != loop.max_batches:
            loop.max_batches, loader.limits = length, [length]
            interval = trainer.val_check_interval
            if isinstance(interval, float):
                trainer.val_check_batch = max(1, int(length * interval))


class GivenRates(lightning.Callback):
    """Puts the rates, decay, betas and eps that are asked for in place of those that a checkpoint brought."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Set them; all has been restored by now.

        Raises:
            ConfigError: the optimiser of the checkpoint is made of other groups of parameters.
        """
        (optimizer,), (found,) = trainer.optimizers, trainer.lr_scheduler_configs
        made = pl_module.configure_optimizers()
        meant = made["optimizer"].param_groups
        scheduler: Any = found.scheduler
        if [len(group["params"]) for group in meant] != [len(group["params"]) for group in optimizer.param_groups]:
            raise ConfigError("model.optimizer: groups of parameters other than the checkpoint's; give another `out`")
        scheduler.base_lrs = [group["initial_lr"] for group in meant]
        for group, new, factor in zip(optimizer.param_groups, meant, scheduler.lr_lambdas, strict=True):
            given = {name: value for name, value in new.items() if name != "params"}
            group.update(given | {"lr": new["initial_lr"] * factor(scheduler.last_epoch)})
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


class KeepBest(ModelCheckpoint):
    """Saves `best.ckpt` whenever a validation is better than all before; in a run's folder that may be moved.

    Args:
        folder: of the checkpoints.
        monitor: metric that is compared.
        mode: `min` or `max`: which is better.
    """

    def __init__(self, folder: Path, monitor: str, mode: str) -> None:
        super().__init__(
            folder,
            "best",
            monitor=monitor,
            mode=mode,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best so far, if it is there; Lightning looks for it in the old place."""
        path = str(Path(str(self.dirpath)) / "best.ckpt")
        if state_dict["best_model_path"] and Path(path).is_file():
            here = {"best_model_path": path, "kth_best_model_path": path, "dirpath": self.dirpath}
            scores = {"best_k_models": {path: state_dict["best_model_score"]}, "last_model_path": ""}
            super().load_state_dict(state_dict | here | scores)


class Interrupted(SystemExit):
    """Ctrl-C or a signal: the checkpoint is saved; the exit status is 128 and the signal's number."""


class KeepLast(Checkpoint):
    """Saves `last.ckpt` every so many steps, after each validation and epoch, and when the process is asked to stop.

    It saves after a validation, never between a step and the validation that follows it: a run continued from there
    would skip it; nor between the batches of one step, whose gradients are in no checkpoint.

    A signal sets a flag, which is looked at where batches of training and validation end: training saves and stops, a
    validation stops, and the run goes on before it. A second signal, or one while sets are evaluated, which changes
    nothing of the training, stops at once. Whatever is lost, the last checkpoint continues exactly.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.path, self.every_n_steps = folder / LAST, every_n_steps
        self._waits = False  # for the end of a batch
        self._signal = 0
        self._handlers: dict[int, Any] = {}

    def save(self, trainer: lightning.Trainer) -> None:
        """Save now."""
        trainer.save_checkpoint(self.path)

    def on_train_start(self, *_: Any) -> None:
        """Take the signals over."""
        self._waits = True
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._stop) for number in SIGNALS}

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self._signal or not self._waits:
            raise Interrupted(128 + number)
        self._signal = number

    def _asked(self, trainer: lightning.Trainer) -> bool:
        """Whether this process or another rank has been asked to stop; the same on all."""
        if trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False):
            self._signal = self._signal or signal.SIGTERM  # another rank's
        return bool(self._signal)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save where it is time or the process is to stop, and then stop."""
        asked = self._asked(trainer)
        if _in_mid_step(trainer):
            return
        if (asked or trainer.global_step % self.every_n_steps == 0) and not _validation_follows(trainer):
            # Lightning does it after this, and a run killed in between would go on without the step's row.
            trainer._logger_connector.update_train_step_metrics()
            self.save(trainer)
            if asked:
                raise Interrupted(128 + self._signal)

    def on_validation_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Stop if the process is to; behind the last batch sets are evaluated, and a signal need not wait."""
        if self._asked(trainer):
            raise Interrupted(128 + self._signal)
        self._waits = not trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save in mid-epoch; at its end that comes anyway."""
        self._waits = True
        if not trainer.is_last_batch and not _in_mid_step(trainer):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save."""
        self.save(trainer)
        if self._asked(trainer):
            raise Interrupted(128 + self._signal)

    def on_train_end(self, *_: Any) -> None:
        """From here on a signal need not wait."""
        self._waits = False

    def teardown(self, *_: Any, **__: Any) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _in_mid_step(trainer: lightning.Trainer) -> bool:
    """Whether further batches add to the gradient of the coming step."""
    return trainer.fit_loop._should_accumulate()


def _validation_follows(trainer: lightning.Trainer) -> bool:
    if trainer.is_last_batch:
        return True
    if trainer.val_dataloaders is not None and not sum(trainer.num_val_batches):
        return False  # Lightning says that one is due, and then there is nothing to validate on
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
