"""Progress of a stage, on stderr: a rich bar on a terminal, a log line every half minute in a file or cluster log."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_EVERY_S = 30.0
logger = logging.getLogger("cliptailor")


class Advance:
    """Call it with how many are done, and what they were: `advance(1, kept=1)`, `advance(1, http_status=1)`."""

    def __init__(self, stage: str, total: int, bar: Progress | None) -> None:
        self.stage, self.total, self.bar = stage, total, bar
        self.done, self.counts, self.said = 0, Counter[str](), ""
        self.started = self.logged = time.monotonic()
        self.task = bar.add_task(stage, total=total, counts="", rate="") if bar else None

    def __call__(self, done: int = 1, **counts: int) -> None:
        """Move on by `done`, and add to the named counts."""
        self.done += done
        self.counts.update(counts)
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, counts=escape(self._counts()), rate=f"{rate:,.0f}/s")
        elif time.monotonic() - self.logged >= LOG_EVERY_S:
            self.logged = time.monotonic()
            left = (self.total - self.done) / rate if rate else 0.0
            eta = f", {left / 60:,.0f} min left" if rate else ""
            logger.info("%s: %d of %d (%.1f/s%s) %s", self.stage, self.done, self.total, rate, eta, self._counts())

    def say(self, text: str) -> None:
        """Show this beside the bar from the next call on, in place of the counts."""
        self.said = text

    def _counts(self) -> str:
        return self.said or " · ".join(f"{name} {count:,}" for name, count in self.counts.most_common(4))


@contextmanager
def progress(stage: str, total: int) -> Iterator[Advance]:
    """Show the progress of one stage over `total` things."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Advance(stage, total, None)
        return
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[counts]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Advance(stage, total, bar)
