"""Items → workers → outcomes: who is given what, and what a death costs."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from curate.errors import UnwantedResult
from curate.executor.worker import Message, Work

T = TypeVar("T")
R = TypeVar("R")
W = TypeVar("W", bound="Worker")
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


class Worker(Protocol):
    """A worker as the one who hands out the items sees it.

    Attributes:
        number: from 0; no other has it at the same time.
        items: the numbers of those it is at.
        is_ready: whether it has come up.
    """

    number: int
    items: set[int]
    is_ready: bool

    def give(self, number: int, item: Any) -> None:
        """Hand over an item. If the worker is dead, what is heard of it next says so."""


class Crew(Protocol[W]):
    """Where workers run.

    Attributes:
        count: of workers at once, at least 1.
    """

    count: int

    def start(self, work: Work, number: int) -> W:
        """Start a worker, without waiting until it has come up."""

    def hear(self, workers: Sequence[W]) -> list[tuple[W, Message | None]]:
        """Wait until one has something to say; None after what a worker said: it is dead."""

    def stop(self, workers: Sequence[W]) -> None:
        """End these workers, dead or alive, at once."""


def run_over(
    work: Work,
    items: Sequence[T],
    crew: Crew[Any],
    *,
    on_report: Callable[[T, Any], None] = lambda _item, _message: None,
) -> Generator[Outcome[T, Any], None, None]:
    """Do something with each item in the workers of a crew; one outcome for each, in the order they end.

    Close the iterator (`contextlib.closing`) to stop the workers at once.

    Args:
        work: picklable; called in each worker with its number, from 0, it gives an async context manager of the
            coroutine function `do(item, report)`. What `do` hands to `report` arrives at `on_report` here.
        items: picklable.
        crew: where.
        on_report: called with an item and a message about it.

    Raises:
        UnwantedResult: there are items left, and no worker comes up any more.
        Exception: what `work` or `do` raised, with its traceback there as the cause; the workers are stopped.
    """
    books, workers = _Books.of(len(items), crew.count), list[Worker]()
    try:
        while books.waiting or any(worker.items for worker in workers):
            books.hand_out(items, workers)
            while books.wants_another(workers):
                workers.append(crew.start(work, books.free.pop()))
            if not workers:
                raise UnwantedResult("no worker is left to work; what is done is kept, the same command continues")
            for worker, message in crew.hear(workers):
                match message:
                    case ("ready",):
                        worker.is_ready = True
                    case ("report", number, said):
                        on_report(items[number], said)
                    case ("result", number, result):
                        worker.items.discard(number)
                        yield Outcome(items[number], result)
                    case ("error", error, trace):
                        raise error from WorkerError(trace)
                    case None:
                        workers.remove(worker)
                        crew.stop([worker])
                        yield from (Outcome(items[number], died=True) for number in books.bury(worker))
    finally:
        crew.stop(workers)


@dataclass(slots=True)
class _Books:
    """What is known beside what each worker is at.

    Attributes:
        waiting: numbers of items nobody is at.
        tries: of each item, how many workers were given it.
        free: numbers for new workers.
        failed: of each number, how many workers in a row died before they came up.
    """

    waiting: deque[int]
    tries: list[int]
    free: list[int]
    failed: Counter[int]

    @classmethod
    def of(cls, items: int, workers: int) -> _Books:
        return cls(deque(range(items)), [0] * items, list(range(workers))[::-1], Counter())

    def hand_out(self, items: Sequence[Any], workers: Sequence[Worker]) -> None:
        """Give the workers what they can take."""
        while self.waiting and (worker := _least_busy(workers, has_free=bool(self.free))):
            number = self.waiting.popleft()
            self.tries[number] += 1
            worker.items.add(number)
            worker.give(number, items[number])

    def wants_another(self, workers: Sequence[Worker]) -> bool:
        """Whether a worker is to be started: for each item that nobody can take as it is."""
        return bool(self.free) and sum(not worker.is_ready for worker in workers) < len(self.waiting)

    def bury(self, worker: Worker) -> list[int]:
        """A worker is dead: free its number and let its items wait again; those which that was the last try of."""
        # One that never came up has had nothing. What it was started on may be gone, or too small: try not forever.
        self.failed[worker.number] = 0 if worker.is_ready else self.failed[worker.number] + 1
        if self.failed[worker.number] < TRIES:
            self.free.append(worker.number)
        lost = sorted(worker.items)
        self.waiting.extend(number for number in lost if self.tries[number] < TRIES)
        return [number for number in lost if self.tries[number] >= TRIES]


def _least_busy(workers: Sequence[Worker], *, has_free: bool) -> Worker | None:
    """The worker to hand the next item to: an idle one; when each has one, one that can take another; or None."""
    least = min(
        (worker for worker in workers if worker.is_ready),
        key=lambda worker: (len(worker.items), worker.number),
        default=None,
    )
    each_has_come_up = not has_free and all(worker.is_ready for worker in workers)
    return least if least and len(least.items) < (AT_ONCE if each_has_come_up else 1) else None
