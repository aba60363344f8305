"""Where the time of a training step goes: `finetune fit --profile` looks at a few steps with torch's profiler.

    RUN/profile/trace.json     every operation on its time line, for https://ui.perfetto.dev or chrome://tracing
    RUN/profile/steps.txt      how long a step takes, and waits for its batch; the operations that take longest

The steps are looked at after the first few, which warm up. The run itself stays what it is, but slower meanwhile.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from curate.files import atomic, write_text

logger = logging.getLogger("cliptailor")

SKIPPED, STEPS, ROWS = 3, 5, 30


class Profile(lightning.Callback):
    """Profiles some steps of this process.

    Args:
        folder: what is written goes here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.in_step: list[float] = []
        self.waited: list[float] = []
        self._mark: float | None = None
        self._profile: Any = None

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Begin to count steps."""
        if not trainer.is_global_zero:
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "3")  # else it tells that there is no GPU
        on_gpu = trainer.strategy.root_device.type == "cuda"
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
            schedule=schedule(wait=SKIPPED - 1, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,
        )
        self._profile.start()

    def on_train_batch_start(self, *_: Any) -> None:
        """The batch is there."""
        now = time.perf_counter()
        if self._mark is not None:
            self.waited.append(now - self._mark)
        self._mark = now

    def on_train_batch_end(self, *_: Any) -> None:
        """The step is made."""
        if self._profile is None:
            return
        now = time.perf_counter()
        if self._mark is not None:
            self.in_step.append(now - self._mark)
        self._profile.step()
        self._mark = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        """A run that is over by now has had fewer steps."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            if not (self.folder / "steps.txt").is_file():
                logger.warning("--profile: the run ended before step %d; nothing was profiled", SKIPPED + 1)

    def _write(self, found: Any) -> None:
        if len(self.in_step) <= SKIPPED:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic(self.folder / "trace.json") as temporary:
            found.export_chrome_trace(str(temporary))
        on_gpu = torch.cuda.is_available()
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=60)
        step, waited = (1000 * _mean(times[SKIPPED:]) for times in (self.in_step, self.waited))
        head = f"steps {SKIPPED + 1} to {len(self.in_step)}: {step:.1f} ms a step, {waited:.1f} ms between two"
        write_text(self.folder / "steps.txt", f"{head} (the next batch, logging, checkpoints)\n\n{table}\n")
        logger.info("%s: where the time of a step goes", self.folder / "steps.txt")


def _mean(times: list[float]) -> float:
    return sum(times) / len(times) if times else 0.0
