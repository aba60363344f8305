"""Shards → worker processes, each with an event loop that is at up to two shards at a time; results as they end.

A worker that dies costs one try of the shards it was at. Each worker is a process of its own (spawn: no lock, thread or
socket of ours is copied into it) at the end of a two-way pipe. What the parent waits for is the pipes alone: a worker
that dies, by whatever signal, closes its end, and that is noticed at once. The other way round, a thread in each worker
reads its pipe, and ends the process when the parent is gone: killed with -9, too, it leaves no orphan at work. Ctrl-C
is the parent's affair: workers never see it, they are killed. Files are written atomically, so that is safe at any
moment.

A second shard is handed to a worker when each has one: so the last slow rows of one leave no worker idle.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Report = Callable[[Any], None]
Do = Callable[[Any, Report], Awaitable[Any]]
Work = Callable[[int], AbstractAsyncContextManager[Do]]
TRIES = 2
AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T, R]):
    """How one item ended.

    Attributes:
        item: what was to be done.
        result: what came of it; None if the worker died.
        died: whether a worker died in every try.
    """

    item: T
    result: R | None = None
    died: bool = False


class WorkerError(Exception):
    """The traceback of an exception in a worker, as its cause here."""


def run_over(
    work: Work,
    items: Sequence[T],
    *,
    processes: int,
    on_report: Callable[[T, Any], None] = lambda _item, _message: None,
    on_death: Callable[[int], None] = lambda _number: None,
) -> Generator[Outcome[T, Any], None, None]:
    """Do something with each item in worker processes; one outcome for each, in the order they end.

    Close the iterator (`contextlib.closing`) to stop the workers at once.

    Args:
        work: picklable; called in each worker with its number, from 0, it gives an async context manager of the
            coroutine function `do(item, report)`. What `do` hands to `report` arrives at `on_report` here.
        items: picklable.
        processes: workers at once; at least one is used, so that a crash never takes this process along.
        on_report: called with an item and a message about it.
        on_death: called with the number of a worker that died, before another gets that number.

    Raises:
        Exception: what `work` or `do` raised, with its traceback there as the cause; the workers are stopped.
    """
    waiting, tries = deque(range(len(items))), [0] * len(items)
    free = list(range(max(1, processes)))[::-1]
    workers: dict[Connection, _Worker] = {}
    try:
        while waiting or any(worker.items for worker in workers.values()):
            while waiting and (worker := _least_busy(workers, work, free)):
                workers[worker.pipe] = worker
                number = waiting.popleft()
                tries[number] += 1
                worker.give(number, items[number])
            for worker in [workers[pipe] for pipe in wait(list(workers)) if isinstance(pipe, Connection)]:
                match worker.receive():
                    case ("report", number, message):
                        on_report(items[number], message)
                    case ("result", number, result):
                        worker.items.discard(number)
                        yield Outcome(items[number], result)
                    case ("error", error, trace):
                        raise error from WorkerError(trace)
                    case None:
                        del workers[worker.pipe]
                        worker.stop()
                        on_death(worker.number)
                        free.append(worker.number)
                        lost = sorted(worker.items)
                        waiting.extend(number for number in lost if tries[number] < TRIES)
                        yield from (Outcome(items[number], died=True) for number in lost if tries[number] >= TRIES)
    finally:
        for worker in workers.values():
            worker.stop()


def _least_busy(workers: dict[Connection, _Worker], work: Work, free: list[int]) -> _Worker | None:
    """The worker to hand the next item to: an idle one, a new one, one that can take another, or None."""
    least = min(workers.values(), key=lambda worker: (len(worker.items), worker.number), default=None)
    if free and (least is None or least.items):
        return _Worker.start(work, free.pop())
    return least if least is not None and len(least.items) < AT_ONCE else None


@dataclass(slots=True)
class _Worker:
    """A worker process as its parent sees it."""

    number: int
    process: BaseProcess
    pipe: Connection
    items: set[int] = field(default_factory=set)

    @classmethod
    def start(cls, work: Work, number: int) -> _Worker:
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
        return cls(number, process, here)

    def give(self, number: int, item: Any) -> None:
        """Hand over an item. If the worker is dead already, its closed pipe tells so next."""
        self.items.add(number)
        with suppress(OSError):
            self.pipe.send((number, item))

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


class _NoPandas:
    """A finder that finds no pandas: pyarrow imports it where it can, 36 MB and 0.3 s that no worker has a use for."""

    def find_spec(self, name: str, *_: Any) -> None:
        """Find nothing, and see that nobody else does."""
        if name == "pandas":
            raise ImportError("a worker does without pandas")


def _work(work: Work, number: int, pipe: Connection) -> None:
    sys.meta_path.insert(0, _NoPandas())
    try:
        asyncio.run(_serve(work, number, pipe))
    except Exception as error:  # noqa: BLE001 - handed over to the parent, which raises it
        pipe.send(("error", _picklable(error), traceback.format_exc()))
        threading.Event().wait()  # the parent stops this process when it has read that


async def _serve(work: Work, number: int, pipe: Connection) -> None:
    """Do what comes, each item in a task of its own, until one fails or the parent stops this process."""
    items: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    threading.Thread(target=_listen, args=(pipe, loop, items), daemon=True).start()
    failed: asyncio.Future[None] = loop.create_future()

    async def do_one(do: Do, which: int, item: Any) -> None:
        result = await do(item, lambda message: pipe.send(("report", which, message)))
        pipe.send(("result", which, result))

    def ended(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not failed.done():
            failed.set_exception(error)

    async def take(do: Do) -> None:
        while True:
            task = asyncio.create_task(do_one(do, *await items.get()))
            tasks.add(task)
            task.add_done_callback(ended)

    tasks: set[asyncio.Task[None]] = set()
    async with work(number) as do:
        taking = asyncio.create_task(take(do))
        try:
            await failed
        finally:
            for task in (taking, *tasks):
                task.cancel()
            await asyncio.gather(taking, *tasks, return_exceptions=True)


def _listen(pipe: Connection, loop: asyncio.AbstractEventLoop, items: asyncio.Queue[tuple[int, Any]]) -> None:
    """Take items from the parent, and die with it: even a worker deep in a C function goes at once."""
    try:
        while True:
            loop.call_soon_threadsafe(items.put_nowait, pipe.recv())
    except (EOFError, OSError, RuntimeError):  # RuntimeError: the loop has ended, by an error that the parent knows
        os._exit(1)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes: does it come through a pipe whole?
    except Exception:  # noqa: BLE001 - __reduce__ of any exception class
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
