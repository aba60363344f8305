"""Measure on the nodes of a Ray cluster: a worker for each GPU, or one a node, that loads the model once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import TYPE_CHECKING

from curate.errors import ConfigError, UnwantedResult
from curate.executor import Do, Report, cluster, run_over
from curate.files import made_from

if TYPE_CHECKING:
    from curate.measure import Advance, Group, ShardTask


def make(group: Group, tasks: list[ShardTask], advance: Advance) -> None:
    """Make these files; `advance` is told of each image once, whoever measured it how often.

    Raises:
        ConfigError: as `cluster.connected` and `cluster.nodes_for` do; or one GPU is named by its number.
        UnwantedResult: workers died at the same shard in each try.
    """
    done: Counter[str] = Counter()

    def tell(task: ShardTask, images: int) -> None:
        if images > done[task.raw.name]:
            advance(images - done[task.raw.name])
            done[task.raw.name] = images

    with cluster.connected():
        crew = cluster.Actors(_places(cluster.nodes_for(tasks[0].raw.parent), group.device))
        with closing(run_over(partial(_open_worker, group=group), tasks, crew, on_report=tell)) as outcomes:
            died = [outcome.item for outcome in outcomes if outcome.died]
    if left := sorted(task.raw.name for task in died if made_from(task.signals) != task.made_from):
        raise UnwantedResult(
            f"measure {group.name}: workers died at {', '.join(left)} in each try, for want of memory perhaps; "
            "what is done is kept, the same command tries the rest again"
        )


def _places(nodes: Sequence[cluster.Node], device: str | None) -> list[cluster.Place]:
    """One for each GPU that the device may be; else one a node, that has all of its CPUs."""
    if device and device.startswith("cuda:"):
        raise ConfigError(f"measure.clip.device {device}: Ray gives each worker a GPU; with --executor ray say cuda")
    found: list[cluster.Place] = []
    for node in nodes:
        gpus = node.gpus if device in ("auto", "cuda") else 0
        count = max(1, gpus)
        cpus = max(1, node.cpus // count)
        found += [cluster.Place(node, number, cpus, min(1, gpus)) for number in range(count)]
    return found


@asynccontextmanager
async def _open_worker(_number: int, *, group: Group) -> AsyncIterator[Do]:
    """Measures one shard at a time, in a thread; the next one is here already."""
    from curate.measure import make_one

    measure, turn = await asyncio.to_thread(group.open), asyncio.Lock()

    async def do(task: ShardTask, report: Report) -> None:
        images = 0

        def advance(done: int = 1, **_: int) -> None:
            nonlocal images
            images += done
            report(images)

        async with turn:
            await asyncio.to_thread(make_one, measure, task, advance)

    yield do
