"""Fetch on the nodes of a Ray cluster: what each node has of its own, and which part of a host's limits.

The table of the hosts' turns and the cache of robots.txt are files that the workers of one machine share through memory
and locks, which no network file system keeps to. So each node has its own, on its own disk, and a part of each limit:
the parts add up to what one machine would be allowed. What one node is told by a host, the others learn by themselves:
each reads robots.txt once, and each is told 429 before it slows down.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from curate.config import FetchConfig
from curate.executor import Do, Work, cluster
from curate.fetch import hosts, origins
from curate.fetch.hosts import Share
from curate.files import fingerprint

logger = logging.getLogger("cliptailor")


@contextmanager
def on_nodes(
    out: Path, config: FetchConfig, shards: int, work: Callable[[Path, Share], Work]
) -> Iterator[tuple[cluster.Actors, Work]]:
    """The crew of a fetch on all nodes, and its work; each node is prepared.

    Args:
        out: the dataset's folder.
        config: how to fetch.
        shards: how many there are to fetch; no more nodes than that are used.
        work: gives the work of one machine for its folder of state and its share of the limits.

    Raises:
        ConfigError: as `cluster.connected` and `cluster.nodes_for` do.
    """
    with cluster.connected():
        nodes = _sharing(cluster.nodes_for(out)[:shards], config.per_host)
        dataset = fingerprint(str(out.absolute()))
        arguments = [(f"cliptailor-{dataset}-{node.id[:16]}", config.processes or node.cpus) for node in nodes]
        states = cluster.on_nodes(nodes, _prepare, arguments)
        parts = {node: (state, Share(index, len(states))) for index, (node, state) in enumerate(states.items())}
        places = cluster.places(list(parts), config.processes)
        logger.info("fetch   %d workers on %d nodes", len(places), len(parts))
        yield cluster.Actors(places), _Work(work, [(place.number, *parts[place.node]) for place in places])


class _Work:
    """The work of the workers of all nodes: that of one machine, by the worker's number there."""

    def __init__(self, work: Callable[[Path, Share], Work], desks: Sequence[tuple[int, Path, Share]]) -> None:
        self._work, self._desks = work, desks

    @asynccontextmanager
    async def __call__(self, number: int) -> AsyncIterator[Do]:
        here, state, share = self._desks[number]
        async with self._work(state, share)(here) as do:
            yield do


def _sharing(nodes: list[cluster.Node], per_host: int) -> list[cluster.Node]:
    """The nodes that can have a part of a limit: no more than it has turns."""
    if len(nodes) > per_host:
        logger.warning(
            "fetch   on %d of %d nodes: fetch.per_host %d cannot be shared by more; raise it to use all",
            per_host,
            len(nodes),
            per_host,
        )
    return nodes[:per_host]


def _prepare(name: str, workers: int) -> Path:
    """On a node: the folder of its table, empty, and of its cache, which later runs on the same cluster find again."""
    state = Path(tempfile.gettempdir()) / name
    state.mkdir(mode=0o700, exist_ok=True)
    hosts.create(state / "hosts", workers)
    origins.prepare(state / "robots.sqlite")
    return state
