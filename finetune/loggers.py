"""`metrics.csv` of a run, in the columns of Lightning's CSVLogger, going on where the run does; lines for log files."""

from __future__ import annotations

import csv
import io
import logging
import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from curate.files import write_text

LOG_EVERY_S = 30.0
logger = logging.getLogger("cliptailor")


class MetricsFile(Logger):
    """One row a logged step: epoch, step, and every metric seen so far, empty where it was not measured.

    Lightning's deletes the rows of the interrupted run. Here they stay, but for those from the step on where this run
    takes up again. What is logged twice, before and after a checkpoint (finetune/checkpoints.py), is one row.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.columns = ["epoch", "step"]
        self._continued = False

    @property
    def name(self) -> str:
        """Nothing: the file has its own place."""
        return ""

    @property
    def version(self) -> str:
        """Nothing: there is one."""
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row."""
        step = step or 0
        if not self._continued:
            self._read_until(step)
        given = dict(metrics)  # which goes to the other loggers too
        row = {"epoch": int(given.pop("epoch", 0)), "step": step, **{name: float(v) for name, v in given.items()}}
        if self.rows and self.rows[-1] == row:
            return
        self.rows.append(row)
        new = [name for name in row if name not in self.columns]
        self.columns[2:] = sorted([*self.columns[2:], *new])
        if new:
            self._write()
        else:
            self._append(row)

    def _read_until(self, step: int) -> None:
        self._continued = True
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                lines = csv.DictReader(file)
                self.columns = list(lines.fieldnames or self.columns)
                self.rows = [row for row in lines if int(row["step"]) < step]
            self._write()

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _write(self) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, self.columns)
        table.writeheader()
        table.writerows(self.rows)
        write_text(self.path, text.getvalue())


class ProgressLines(lightning.Callback):
    """A line of progress every half minute, for where there is no terminal."""

    def on_train_start(self, *_: Any) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    @rank_zero_only
    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Log, if it is time."""
        if time.monotonic() - self._last >= LOG_EVERY_S:
            self._last = time.monotonic()
            loss = float(trainer.callback_metrics["train/loss"])
            logger.info("epoch %d, step %d: train/loss %.4f", trainer.current_epoch, trainer.global_step, loss)
