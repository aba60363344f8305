"""Run a function over shards in worker processes, results as they finish.

A worker that dies costs one try of one shard. Each worker is a process of its own (spawn: no lock, thread or socket
of ours is copied into it) at the end of a two-way pipe. What the parent waits for is the pipes alone: a worker that
dies, by whatever signal, closes its end, and that is noticed at once. The other way round, a thread in each worker
reads its pipe, and ends the process when the parent is gone: killed with -9, too, it leaves no orphan at work. Ctrl-C
is the parent's affair: workers never see it, they are killed. Files are written atomically, so that is safe at any
moment.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Report = Callable[[Any], None]
TRIES = 2


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T, R]):
    """How one item ended.

    Attributes:
        item: what the function was run over.
        result: what it gave back; None if the worker died.
        died: whether a worker died in every try.
    """

    item: T
    result: R | None = None
    died: bool = False


class WorkerError(Exception):
    """The traceback of an exception in a worker, as its cause here."""


def run_over(
    function: Callable[[T, Report], R],
    items: Sequence[T],
    *,
    processes: int,
    on_report: Callable[[T, Any], None] = lambda _item, _message: None,
) -> Generator[Outcome[T, R], None, None]:
    """Run `function(item, report)` over the items; one outcome for each, in the order they end.

    Close the iterator (`contextlib.closing`) to stop the workers at once.

    Args:
        function: picklable; what it hands to `report` arrives at `on_report` in this process.
        items: picklable.
        processes: workers at once; at least one is used, so that a crash never takes this process along.
        on_report: called with an item and a message about it.

    Raises:
        Exception: what the function raised, with its traceback there as the cause; the other workers are stopped.
    """
    waiting, tries = deque(range(len(items))), [0] * len(items)
    busy: dict[Connection, _Worker] = {}
    idle: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < max(1, processes):
                worker = idle.pop() if idle else _Worker.start(function)
                busy[worker.pipe] = worker
                number = waiting.popleft()
                tries[number] += 1
                worker.give(number, items[number])
            for worker in [busy[pipe] for pipe in wait(list(busy)) if isinstance(pipe, Connection)]:
                item = items[worker.number]
                match worker.receive():
                    case ("report", message):
                        on_report(item, message)
                    case ("result", result):
                        idle.append(busy.pop(worker.pipe))
                        yield Outcome(item, result)
                    case ("error", error, trace):
                        raise error from WorkerError(trace)
                    case None:
                        busy.pop(worker.pipe).stop()
                        if tries[worker.number] < TRIES:
                            waiting.append(worker.number)
                        else:
                            yield Outcome(item, died=True)
    finally:
        for worker in (*idle, *busy.values()):
            worker.stop()


@dataclass(slots=True)
class _Worker:
    """A worker process as its parent sees it."""

    process: BaseProcess
    pipe: Connection
    number: int = -1

    @classmethod
    def start(cls, function: Callable[..., Any]) -> _Worker:
        context = get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(function, there), daemon=True)
        # Started by the first worker otherwise, it would lift the mask under which that worker is to start.
        resource_tracker.ensure_running()
        # A worker inherits the mask: no Ctrl-C reaches it, from its first moment. Ours comes when the mask is lifted.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()  # the worker's is the only one left, so that its death closes the pipe
        return cls(process, here)

    def give(self, number: int, item: Any) -> None:
        """Hand over the next item. If the worker is dead already, its closed pipe tells so next."""
        self.number = number
        with suppress(OSError):
            self.pipe.send(item)

    def receive(self) -> tuple[Any, ...] | None:
        """The next message; None if the worker is dead, in the middle of one perhaps."""
        try:
            message: tuple[Any, ...] = self.pipe.recv()
        except (EOFError, OSError):
            return None
        return message

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


# --- in the worker ---------------------------------------------------------------------------------------------------


def _work(function: Callable[[Any, Report], Any], pipe: Connection) -> None:
    items: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, items), daemon=True).start()

    def report(message: Any) -> None:
        pipe.send(("report", message))

    while True:
        item = items.get()
        try:
            pipe.send(("result", function(item, report)))
        except Exception as error:  # noqa: BLE001 - handed over to the parent, which raises it
            pipe.send(("error", _picklable(error), traceback.format_exc()))


def _listen(pipe: Connection, items: SimpleQueue[Any]) -> None:
    """Take items from the parent, and die with it: even a worker deep in a C function goes at once."""
    try:
        while True:
            items.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(1)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes: does it come through a pipe whole?
    except Exception:  # noqa: BLE001 - __reduce__ of any exception class
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
