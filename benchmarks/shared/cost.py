"""What a command takes: CPU time and memory of its whole process tree, and wall time."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        cpu_s: of its process tree.
        wall_s: from start to end.
        tree_mb: most memory of the tree at one time, what is shared counted once (PSS).
        worker_mb: most memory of any one process below the first (resident).
    """

    cpu_s: float
    wall_s: float
    tree_mb: float
    worker_mb: float

    @classmethod
    def median(cls, costs: list[Cost]) -> Cost:
        """The median of each figure."""
        return cls(*(statistics.median(getattr(cost, field.name) for cost in costs) for field in fields(cls)))


def spend(command: list[str]) -> Cost:
    """Run a command on one thread and say what it took.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    settled = {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONWARNINGS": "ignore"}
    environment = {**os.environ, **settled, "PYTHONPATH": str(REPOSITORY)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        memory = Memory(process.pid)
        status = process.wait()
        wall_s = time.monotonic() - started
        memory.stop()
        if status:
            said.seek(0)
            sys.stderr.write(said.read().decode(errors="replace")[-3000:])
            raise subprocess.CalledProcessError(status, command[:2])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu_s, wall_s, memory.tree_kb / 1024, memory.worker_kb / 1024)


class Memory:
    """Watches the memory of a process tree, twice a second, in a thread."""

    def __init__(self, root: int) -> None:
        self.root, self.tree_kb, self.worker_kb = root, 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            below = descendants(self.root)
            self.tree_kb = max(self.tree_kb, sum(figure(pid, "smaps_rollup", "Pss:") for pid in (self.root, *below)))
            self.worker_kb = max(self.worker_kb, *(figure(pid, "status", "VmHWM:") for pid in below), 0)


def descendants(root: int) -> list[int]:
    """Processes below another, at any depth."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(path.name))
    found, new = [], [root]
    while new:
        new = [child for pid in new for child in parents.get(pid, [])]
        found += new
    return found


def figure(pid: int, file: str, name: str) -> int:
    """A line of /proc/PID/FILE in kB; 0 when the process is gone."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1])
    return 0
