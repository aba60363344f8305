"""A crew of processes on this machine.

Each worker is a process of its own (spawn: no lock, thread or socket of ours is copied into it) at the end of a two-way
pipe. What the parent waits for is the pipes alone: a worker that dies, by whatever signal, closes its end, and that is
noticed at once. The other way round, a thread in each worker reads its pipe, and ends the process when the parent is
gone: killed with -9, too, it leaves no orphan at work. Ctrl-C is the parent's affair: workers never see it, they are
killed. Files are written atomically, so that is safe at any moment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from curate.executor.worker import Message, Put, Work, work_until_stopped


@dataclass(slots=True, eq=False)
class Process:
    """A worker process as its parent sees it; see `Worker`."""

    number: int
    process: BaseProcess
    pipe: Connection
    items: set[int] = field(default_factory=set)
    is_ready: bool = False

    def give(self, number: int, item: Any) -> None:
        """Hand over an item. If the worker is dead already, its closed pipe tells so next."""
        with suppress(OSError):
            self.pipe.send((number, item))

    def receive(self) -> Message | None:
        """The next message; None if the worker is dead, in the middle of one perhaps."""
        try:
            message: Message = self.pipe.recv()
        except (EOFError, OSError):
            return None
        return message


class Processes:
    """So many worker processes; at least one, so that a crash never takes this process along. See `Crew`."""

    def __init__(self, count: int) -> None:
        self.count = max(1, count)

    def start(self, work: Work, number: int) -> Process:
        """Start a worker."""
        context = get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(work, number, there), daemon=True)
        # Started by the first worker otherwise, it would lift the mask under which that worker is to start.
        resource_tracker.ensure_running()
        # A worker inherits the mask: no Ctrl-C reaches it, from its first moment. Ours comes when the mask is lifted.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()  # the worker's is the only one left, so that its death closes the pipe
        return Process(number, process, here)

    def hear(self, workers: Sequence[Process]) -> list[tuple[Process, Message | None]]:
        """Wait until a worker says something, or dies."""
        by_pipe = {worker.pipe: worker for worker in workers}
        speaking = [by_pipe[pipe] for pipe in wait(list(by_pipe)) if isinstance(pipe, Connection)]
        return [(worker, worker.receive()) for worker in speaking]

    def stop(self, workers: Sequence[Process]) -> None:
        """Kill these workers, and wait until they are gone."""
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.process.close()
            worker.pipe.close()


# --- in the worker ---------------------------------------------------------------------------------------------------


class _NoPandas:
    """A finder that finds no pandas: pyarrow imports it where it can, 36 MB and 0.3 s that no worker has a use for."""

    def find_spec(self, name: str, *_: Any) -> None:
        """Find nothing, and see that nobody else does."""
        if name == "pandas":
            raise ImportError("a worker does without pandas")


def _work(work: Work, number: int, pipe: Connection) -> None:
    sys.meta_path.insert(0, _NoPandas())
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's would spin, one on each core, for sums of 256

    def listen(put: Put) -> None:
        threading.Thread(target=_listen, args=(pipe, put), daemon=True).start()

    work_until_stopped(work, number, pipe.send, listen)
    threading.Event().wait()  # the parent stops this process when it has read what failed


def _listen(pipe: Connection, put: Put) -> None:
    """Take items from the parent, and die with it: even a worker deep in a C function goes at once."""
    try:
        while True:
            put(*pipe.recv())
    except (EOFError, OSError, RuntimeError):  # RuntimeError: the loop has ended, by an error that the parent knows
        os._exit(1)
