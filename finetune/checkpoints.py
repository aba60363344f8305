"""Checkpoints that a kill cannot spoil, and that continue a run bit for bit.

How they are written, the random state in them, when they are saved, and what a signal does.
"""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from curate.shards import atomic

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the final name, fsyncs and renames.

    Lightning's own goes through the system's temporary folder, from where a rename may be a copy, and does not fsync.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save: afterwards `path` is the old file or the new one, whole, whatever happens."""
        del storage_options
        with atomic(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


class RandomState(lightning.Callback):
    """Keeps every rank's random state (Python, NumPy, torch, CUDA) in checkpoints: dropout goes on as it would have."""

    def __init__(self) -> None:
        self._to_restore: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The random states of all ranks, in plain numbers, which load safely and travel between processes."""
        mine = random_state()
        if not (dist.is_available() and dist.is_initialized()):
            return {"ranks": [mine]}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training really goes on."""
        self._to_restore = state_dict["ranks"]

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Restore before the first step: whatever ran since the start has drawn numbers too."""
        if trainer.global_rank < len(self._to_restore):
            set_random_state(self._to_restore[trainer.global_rank])
        self._to_restore = []


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


class Interrupted(SystemExit):
    """Ctrl-C or SIGTERM: the checkpoint is saved; the exit status is 130 or 143."""


class KeepLast(Checkpoint):
    """Saves `last.ckpt` every so many steps, after each validation and epoch, and when the process is asked to stop.

    It saves after a validation, never between a step and the validation that follows it: a run continued from there
    would skip it. A signal during training lets the step end, so that the saved state is whole. A second one, or one
    during evaluation, stops at once; the last checkpoint continues exactly all the same.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.path, self.every_n_steps = folder / "last.ckpt", every_n_steps
        self._training = False
        self._signal = 0
        self._handlers: dict[int, Any] = {}

    def save(self, trainer: lightning.Trainer) -> None:
        """Save now."""
        trainer.save_checkpoint(self.path)

    def on_train_start(self, *_: Any) -> None:
        """Take the signals over."""
        self._training = True
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._stop) for number in SIGNALS}

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self._signal or not self._training:
            raise Interrupted(128 + number)
        self._signal = number

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save where it is time or the process is to stop."""
        if trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False):
            self._signal = self._signal or signal.SIGTERM  # another rank's
        if (self._signal or trainer.global_step % self.every_n_steps == 0) and not _validation_follows(trainer):
            self.save(trainer)

    def _stop_if_asked(self) -> None:
        if self._signal:
            raise Interrupted(128 + self._signal)

    def on_train_batch_start(self, *_: Any) -> None:
        """Stop here, not after the step: what it measured has been logged by now."""
        self._stop_if_asked()

    def on_validation_start(self, *_: Any) -> None:
        """From here on a signal need not wait."""
        self._training = False
        self._stop_if_asked()

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save in mid-epoch; at its end that comes anyway."""
        self._training = True
        if not trainer.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save."""
        self.save(trainer)
        self._stop_if_asked()

    def on_train_end(self, *_: Any) -> None:
        """From here on a signal need not wait."""
        self._training = False

    def teardown(self, *_: Any, **__: Any) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _validation_follows(trainer: lightning.Trainer) -> bool:
    if trainer.is_last_batch:
        return True
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
