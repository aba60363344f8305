"""Run plan, select and pack on a folder in a process that kills itself (SIGKILL) at its n-th sync or rename.

usage: killing.py FOLDER KILL_AT SHARD_SIZE      prints how many syncs and renames there were if it lived
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def dying(call: Callable[..., Any], seen: list[str], kill_at: int) -> Callable[..., Any]:
    """`call`, but the process dies instead of its `kill_at`-th of all counted calls."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(call.__name__)
        if len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return counted


def main() -> None:
    """The stages of `curate build` that need no network."""
    folder, kill_at, shard_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    from curate import pack, plan, select
    from curate.config import MeasureConfig, PackConfig, PlanConfig, SelectConfig
    from curate.filters import parse_steps

    seen: list[str] = []
    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
        setattr(owner, name, dying(getattr(owner, name), seen, kill_at))
    steps = parse_steps([{"name": "words", "where": "caption_words > 1"}, {"name": "exact", "dedup": {}}])
    config = PackConfig(shard_size=shard_size, val=0.2, test=0.2)
    plan.run(str(folder.parent / "list.csv"), folder, PlanConfig(shard_size=8), steps)
    select.run(folder, steps, SelectConfig(memory_limit="300MB", threads=1), config, MeasureConfig(text=False), 0)
    pack.run(folder, config, 0)
    sys.stdout.write(str(len(seen)))


if __name__ == "__main__":
    main()
