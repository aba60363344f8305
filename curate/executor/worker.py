"""The inside of a worker: an event loop that does the items that come, each in a task of its own."""

from __future__ import annotations

import asyncio
import gc
import pickle
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

Report = Callable[[Any], None]
Do = Callable[[Any, Report], Awaitable[Any]]
Work = Callable[[int], AbstractAsyncContextManager[Do]]
# What a worker says: that it is ready, what is to be reported of an item, an item's result, or an error and its trace.
Message = tuple[Any, ...]
# Called from any thread with the number of an item and the item.
Put = Callable[[int, Any], None]


def work_until_stopped(work: Work, number: int, send: Callable[[Message], None], listen: Callable[[Put], None]) -> None:
    """Do what comes until something fails, which is told; nothing else ends it but the end of its process.

    Args:
        work: what to do; see `run_over`.
        number: of this worker.
        send: tells something to the one who handed out the items.
        listen: called once, with what each item that comes is to be put into.
    """
    try:
        asyncio.run(_serve(work, number, send, listen))
    except Exception as error:  # noqa: BLE001 - handed over to the parent, which raises it
        send(("error", _picklable(error), traceback.format_exc()))


async def _serve(work: Work, number: int, send: Callable[[Message], None], listen: Callable[[Put], None]) -> None:
    items: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()

    def put(which: int, item: Any) -> None:
        loop.call_soon_threadsafe(items.put_nowait, (which, item))

    async def do_one(do: Do, which: int, item: Any) -> None:
        result = await do(item, lambda said: send(("report", which, said)))
        send(("result", which, result))

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
    listen(put)
    async with work(number) as do:
        gc.freeze()  # modules and what they hold stay for good: not to be walked through again and again
        send(("ready",))
        taking = asyncio.create_task(take(do))
        try:
            await failed
        finally:
            for task in (taking, *tasks):
                task.cancel()
            await asyncio.gather(taking, *tasks, return_exceptions=True)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes: does it come through a pipe whole?
    except Exception:  # noqa: BLE001 - __reduce__ of any exception class
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
