"""A crew on the nodes of a Ray cluster.

Each worker is an actor, tied to its node, in a process of its own with the same event loop as a local worker. The
driver has one question open at each, "what is new?": the answer is a worker's messages, and a question that fails is a
death, whether of the actor, its node or the way there. Ray ends the actors of a driver that is gone. Nothing is retried
by Ray: who is given what is decided in `run`.

Nodes are those there at the start; one that comes later is used by the next run. Ray is imported when it is used.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import Any, TypeVar

import curate
from curate.errors import ConfigError
from curate.executor.worker import Message, Put, Work, work_until_stopped

R = TypeVar("R")
logger = logging.getLogger("cliptailor")
MISSING = "--executor ray: Ray is not installed; pip install 'cliptailor[ray]'"
# How long a node may take to answer a short question: a process is started for it.
ANSWER_S = 60.0
SILENCE_S = 5.0
# A worker that was told to end is waited for so long.
END_S = 5.0


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster.

    Attributes:
        id: Ray's.
        address: its IP address.
        cpus: that Ray may use there, as its resources say.
        gpus: likewise.
    """

    id: str
    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs.

    Attributes:
        node: there.
        number: of the worker, from 0 on each node.
        cpus: that it takes of its node's; less than 1 where workers share one.
        gpus: likewise, whole ones.
    """

    node: Node
    number: int
    cpus: float = 1.0
    gpus: int = 0


def places(nodes: Sequence[Node], per_node: int) -> list[Place]:
    """So many workers a node, or one a CPU for 0; first one on each node, so that few items are spread over all."""
    found = []
    for node in nodes:
        count = per_node or node.cpus
        found += [Place(node, number, min(1.0, node.cpus / count)) for number in range(count)]
    return sorted(found, key=lambda place: place.number)


def check_installed() -> None:
    """Tell at once that Ray is missing.

    Raises:
        ConfigError: it is.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(MISSING)


# --- the cluster -----------------------------------------------------------------------------------------------------


@contextmanager
def connected() -> Iterator[None]:
    """Be a driver of the running cluster (RAY_ADDRESS, or this machine's) for the length of the block.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster.
    """
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    with redirect_stdout(sys.stderr):  # Ray prints what happens to its nodes
        _connect(ray)
        try:
            yield
        finally:
            ray.shutdown()


def _connect(ray: ModuleType) -> None:
    # Ray takes SIGTERM for itself; it is to unwind the stack as before.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Ray knocks at an address where nobody is for minutes, and says nothing.
    patience = threading.Timer(
        SILENCE_S, logger.warning, ["executor: no answer from the Ray cluster yet; RAY_ADDRESS?"]
    )
    patience.daemon = True
    patience.start()
    try:
        ray.init(address="auto", configure_logging=False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(
            f"--executor ray: no Ray cluster can be reached ({said}); start one with `ray start --head`, or name one "
            "by RAY_ADDRESS=HOST:PORT; see docs/scale.md"
        ) from error
    finally:
        patience.cancel()
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            signal.signal(number, handler)


def nodes_for(folder: Path) -> list[Node]:
    """The nodes with a CPU for us, by address; all of them share the folder and run this very code.

    Raises:
        ConfigError: one does not, or none is there.
    """
    ray = _ray()
    found = []
    for entry in ray.nodes():
        cpus, gpus = (int(entry["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        if entry["Alive"] and cpus:
            found.append(Node(entry["NodeID"], entry["NodeManagerAddress"], cpus, gpus))
    if not found:
        raise ConfigError("--executor ray: no node of the cluster has a CPU to give; see `ray status`")
    found.sort(key=lambda node: (node.address, node.id))
    token = folder.absolute() / f".{secrets.token_hex(8)}.tmp"
    token.touch()
    try:
        answers = on_nodes(found, _look, [(str(token),)] * len(found))
    finally:
        token.unlink()
    for node, (source, sees_folder) in answers.items():
        if source != source_digest():
            raise ConfigError(
                f"--executor ray: node {node.address} runs another cliptailor than this machine; install the same one "
                "on all nodes"
            )
        if not sees_folder:
            raise ConfigError(
                f"--executor ray: node {node.address} does not see {folder.absolute()}; it must lie on a file system "
                "that all nodes share, under the same path"
            )
    return list(answers)


def on_nodes(nodes: Sequence[Node], function: Callable[..., R], arguments: Sequence[tuple[Any, ...]]) -> dict[Node, R]:
    """What a function of ours gives on each of these nodes, called with its arguments; without those that are gone.

    Raises:
        ConfigError: none answers, or one has no cliptailor.
        Exception: what the function raised.
    """
    ray = _ray()
    remote = ray.remote(function)
    refs = [
        remote.options(num_cpus=0, max_retries=0, scheduling_strategy=_only(node)).remote(*given)
        for node, given in zip(nodes, arguments, strict=True)
    ]
    ray.wait(refs, num_returns=len(refs), timeout=ANSWER_S)
    answers = {node: answer for node, ref in zip(nodes, refs, strict=True) for answer in _answer(node, ref)}
    if not answers:
        raise ConfigError("--executor ray: no node of the cluster answers; see `ray status`")
    return answers


def _answer(node: Node, ref: Any) -> list[Any]:
    """What came of a question; nothing if the node is gone."""
    ray = _ray()
    try:
        return [ray.get(ref, timeout=0)]
    except ray.exceptions.RayTaskError as error:
        raise _cause(error, node) from error
    except ray.exceptions.RayError as error:
        ray.cancel(ref, force=True)
        logger.warning("executor: node %s does not answer (%s); going on without it", node.address, _name(error))
        return []


def source_digest() -> str:
    """A digest of the package's own source files."""
    digest = hashlib.sha256()
    for root in map(Path, curate.__path__):
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _look(token: str) -> tuple[str, bool]:
    return source_digest(), Path(token).exists()


def _cause(error: Any, node: Node) -> Exception:
    """What a function raised on a node; a package that is not there is the user's to install."""
    cause: Exception = error.cause
    text = str(error)
    if "ModuleNotFoundError" in text:
        missing = text.rpartition("ModuleNotFoundError: ")[2].partition("\n")[0]
        return ConfigError(
            f"--executor ray: node {node.address}: {missing}; install cliptailor there as on this machine"
        )
    return cause


def _name(error: Exception) -> str:
    return type(error).__name__


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(MISSING) from error
    return ray


def _only(node: Node) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


# --- the crew --------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Actor:
    """An actor as the driver sees it; see `Worker`.

    Attributes:
        handle: Ray's.
        news: the question that is open.
    """

    number: int
    handle: Any
    news: Any
    items: set[int] = field(default_factory=set)
    is_ready: bool = False

    def give(self, number: int, item: Any) -> None:
        """Hand over an item. If the actor is dead, the open question says so."""
        self.handle.give.remote(number, item)


class Actors:
    """A worker at each of these places; see `Crew`."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places, self.count = places, len(places)

    def start(self, work: Work, number: int) -> Actor:
        """Ask for an actor; Ray starts it when its node has the CPUs free."""
        place = self.places[number]
        options = {"num_cpus": place.cpus, "num_gpus": place.gpus, "scheduling_strategy": _only(place.node)}
        kind = _ray().remote(Loop).options(max_concurrency=4, max_restarts=0, max_task_retries=0, **options)
        handle = kind.remote(work, number, str(Path.cwd()))
        return Actor(number, handle, handle.news.remote())

    def hear(self, workers: Sequence[Actor]) -> list[tuple[Actor, Message | None]]:
        """Wait until an actor says something, or dies."""
        ray = _ray()
        by_news = {worker.news: worker for worker in workers}
        ray.wait(list(by_news), num_returns=1, fetch_local=False)
        speaking, _ = ray.wait(list(by_news), num_returns=len(by_news), timeout=0, fetch_local=False)
        return [(worker, message) for worker in map(by_news.__getitem__, speaking) for message in self._receive(worker)]

    def _receive(self, worker: Actor) -> list[Message | None]:
        """The answer to the open question, and the next one is asked; None if the actor is dead."""
        ray = _ray()
        try:
            messages: list[Message | None] = ray.get(worker.news)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            where = self.places[worker.number].node.address
            logger.warning("executor: a worker on node %s is gone (%s)", where, _name(error))
            return [None]
        worker.news = worker.handle.news.remote()
        return messages

    def stop(self, workers: Sequence[Actor]) -> None:
        """Kill these actors, and wait until they are gone, though not for long for those of a node that is gone."""
        ray = _ray()
        with suppress(ray.exceptions.RayError):
            for worker in workers:
                ray.kill(worker.handle, no_restart=True)
            news = [worker.news for worker in workers]
            if news:
                ray.wait(news, num_returns=len(news), timeout=END_S, fetch_local=False)


class Loop:
    """The actor: an event loop in a thread, what comes in and what goes out."""

    def __init__(self, work: Work, number: int, folder: str) -> None:
        with suppress(OSError):
            os.chdir(folder)  # relative paths mean the same as on the driver, where its folder is shared
        self._out: SimpleQueue[Message] = SimpleQueue()
        self._put: SimpleQueue[Put] = SimpleQueue()
        arguments = (work, number, self._out.put, self._put.put)
        threading.Thread(target=work_until_stopped, args=arguments, daemon=True).start()
        self._take: Put = self._put.get()

    def give(self, number: int, item: Any) -> None:
        """Take an item."""
        with suppress(RuntimeError):  # the loop has ended, by an error that is told
            self._take(number, item)

    def news(self) -> list[Message]:
        """What was said since the last time; waits until there is something."""
        messages = [self._out.get()]
        with suppress(Empty):
            while True:
                messages.append(self._out.get_nowait())
        return messages
