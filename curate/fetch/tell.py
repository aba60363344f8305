"""What a run of fetch tells while it is at work: how fast, how much arrives, what does not, and who is slowed down."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.fetch.rows import SUCCESS
from curate.progress import progress

if TYPE_CHECKING:
    from curate.fetch.task import ShardTask

logger = logging.getLogger("cliptailor")

# After so many rows a low share of images is said at once: it is seldom what was meant, and a night is long.
ENOUGH_ROWS = 1_000
LOW_SHARE = 0.5
MOST_HOSTS_SHOWN = 3


class Teller:
    """Adds up what the workers report; a context manager that shows it."""

    def __init__(self, tasks: list[ShardTask]) -> None:
        import pyarrow.parquet as pq

        self._rows = {task.stem: pq.read_metadata(task.plan).num_rows for task in tasks}
        self._total = sum(self._rows.values())
        self._seen: dict[Path, Counter[str]] = {task.stem: Counter() for task in tasks}
        self._bytes: dict[Path, int] = {task.stem: 0 for task in tasks}
        self._counts: Counter[str] = Counter()
        self._kept_seen: dict[Path, Counter[str]] = {task.stem: Counter() for task in tasks}
        self._kept: Counter[str] = Counter()
        self._at_work: dict[Path, Mapping[str, Any]] = {}
        self._warned = False

    def __enter__(self) -> Teller:
        self._stack = ExitStack()
        self._advance = self._stack.enter_context(progress("fetch", self._total))
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self._kept:
            asked = (self._counts - self._kept).total()
            logger.info(
                "fetch   %s rows were there from before, %s were asked for", f"{self._kept.total():,}", f"{asked:,}"
            )

    def report(self, task: ShardTask, said: Mapping[str, Any]) -> None:
        """Take in what a worker says of a shard.

        Args:
            task: the shard.
            said: counts so far, and those of them that were kept; bytes; hosts slowed down; seconds paused.
        """
        # A shard that is tried again begins at 0: only what is beyond the first try's count is news.
        news = Counter(said["counts"]) - self._seen[task.stem]
        self._seen[task.stem] |= Counter(said["counts"])
        self._kept += Counter(said["kept"]) - self._kept_seen[task.stem]
        self._kept_seen[task.stem] |= Counter(said["kept"])
        self._bytes[task.stem] = max(self._bytes[task.stem], said["bytes"])
        self._counts += news
        self._at_work[task.stem] = said
        if sum(said["counts"].values()) == self._rows[task.stem]:
            del self._at_work[task.stem]  # says no more
        self._advance.say(self._line(said))
        self._advance(news.total())
        self._warn_of_low_share()

    def _line(self, said: Mapping[str, Any]) -> str:
        done = self._counts.total()
        parts = [f"{sum(self._bytes.values()) / 1e6 / max(time.monotonic() - self._started, 1e-9):.1f} MB/s"]
        if done:
            parts.append(f"{self._counts[SUCCESS] / done:.0%} ok")
        failed = Counter({reason: number for reason, number in self._counts.items() if reason != SUCCESS})
        parts += [f"{reason} {number:,}" for reason, number in failed.most_common(3)]
        all_say = [*self._at_work.values(), said]  # each worker knows only the hosts that it asked
        if hosts := sorted({host for one in all_say for host in one["throttled"]}):
            more = f" and {len(hosts) - MOST_HOSTS_SHOWN} more" if len(hosts) > MOST_HOSTS_SHOWN else ""
            parts.append(f"slowed down: {', '.join(hosts[:MOST_HOSTS_SHOWN])}{more}")
        if paused_s := max(one["paused"] for one in all_say):
            parts.append(f"paused: no network for {paused_s:.0f} s")
        return " · ".join(parts)

    def _warn_of_low_share(self) -> None:
        if self._warned or self._counts.total() < ENOUGH_ROWS:
            return
        asked = self._counts - self._kept
        done = asked.total()
        if done < ENOUGH_ROWS:
            return
        self._warned = True
        share = asked[SUCCESS] / done
        if share < LOW_SHARE:
            failed = [(reason, n) for reason, n in asked.most_common(4) if reason != SUCCESS]
            logger.warning(
                "fetch   only %.0f %% of the first %s rows are images: %s; stop (Ctrl-C) and look, if that is not what "
                "this list should give: what is done is kept",
                100 * share,
                f"{done:,}",
                ", ".join(f"{reason} {number:,}" for reason, number in failed),
            )
