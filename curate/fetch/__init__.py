"""Candidates → raw shards: `run` fetches every plan file whose raw shard is not already what it would be today.

    engine     one process: plan files → raw shards
    frontier   which request may go next
    hosts      the turn of a host, over all processes
    robots     robots.txt, read once an origin by all processes
    origins    what they say, in a database
    transfer   one request → one body
    coding     Content-Encoding, undone
    failures   why there is no body
    guard      which addresses a request may go to
    manners    opt-outs, Retry-After, back-off
    outage     is the network gone?
    decoding   bodies → pictures, in threads
    local      images that are here already
    task       one shard to make
    reuse      what of an old raw shard still holds
    nodes      on several machines: what each has of its own
    tell       what a run tells while it is at work
    img2dataset, img2dataset_process, img2dataset_errors       the other engine
    rows       the columns of a raw shard, and what each row says

Nothing heavy is imported before `run` is called.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.config import FetchConfig
from curate.errors import InputError
from curate.fetch.rows import RAW_COLUMNS, SUCCESS
from curate.files import digest, fingerprint, made_from, read_rows, sweep, write_text

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from curate.executor import Crew, Do, Work
    from curate.fetch.hosts import Share
    from curate.fetch.task import ShardTask

__all__ = ["RAW_COLUMNS", "SUCCESS", "FetchResult", "run"]

logger = logging.getLogger("cliptailor")

# Raise it when the same responses would be stored otherwise than before.
FORMAT_VERSION = 5
# Keys of FetchConfig that decide how fast and how patiently, not what is stored.
MANNER_OF_FETCHING = frozenset(
    {
        "engine",
        "processes",
        "connections",
        "per_host",
        "per_host_rate",
        "contact",
        "connect_timeout_s",
        "read_timeout_s",
        "total_timeout_s",
        "max_wait_s",
        "retries",
        "backoff_s",
        "max_retry_after_s",
        "outage_s",
        "min_yield",
    }
)


STATE = ".fetch"
SETTINGS = "settings.json"
# Appended to the fingerprint of a shard with rows that a worker took along when it died: the next run asks for them.
DIED = "-died"


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What the raw shards hold after a run.

    Attributes:
        counts: rows by reason, and `success`, over all shards.
        made: shards made by this run.
        reused: shards that were right already.
    """

    counts: Mapping[str, int]
    made: int
    reused: int

    @property
    def rows(self) -> int:
        """Candidates in all shards."""
        return sum(self.counts.values())

    @property
    def images(self) -> int:
        """Candidates that arrived as images."""
        return self.counts.get(SUCCESS, 0)


def run(out: Path, config: FetchConfig, *, retry_failed: bool = False, executor: str = "local") -> FetchResult:
    """Make `out/raw` what `out/plan` and the configuration ask for; call it while holding the folder's lock.

    What an old shard has of a plan file's rows, fetched under the same settings, is kept; the rest is asked for. A
    shard whose workers died in each try is written with the missing rows failed as `worker_died`, and under a
    fingerprint that the next run does not take for its own: it asks for those again.

    Args:
        out: the dataset's folder.
        config: how.
        retry_failed: ask again for rows that failed for a reason that may pass.
        executor: local, or ray: on all nodes of a cluster.

    Raises:
        InputError: `out` has no plan.
        Outage: nothing could be reached for too long; shards at work were not written.
    """
    if executor != "local":
        out = out.absolute()  # nodes need not share the current folder
    plan, raw = out / "plan", out / "raw"
    if not plan.is_dir():
        raise InputError(f"{plan}: no such folder; run `curate plan` first, or `curate build`, which does")
    raw.mkdir(parents=True, exist_ok=True)
    _tidy(raw)
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in MANNER_OF_FETCHING}
    tasks = list(_tasks(plan, raw, config, fingerprint("fetch", FORMAT_VERSION, settings), retry_failed))
    _remove_strays(raw, {task.stem.name for task in tasks})
    todo = [task for task in tasks if not _is_made(task)]
    _tell_changes(raw / SETTINGS, settings, [task for task in todo if task.known is None])
    if todo:
        try:
            _fetch(todo, out, config, executor)
        finally:
            _tidy(raw)  # what killed workers left
    return FetchResult(_count([task.stem for task in tasks]), made=len(todo), reused=len(tasks) - len(todo))


def _tidy(raw: Path) -> None:
    sweep(raw)
    for journal in raw.glob(".*.decoding"):
        journal.unlink()


def _tasks(plan: Path, raw: Path, config: FetchConfig, settings: str, retry: bool) -> Iterator[ShardTask]:
    from curate.fetch.task import ShardTask

    root = _root(plan)
    for path in sorted(plan.glob("*.parquet")):
        if path.stem.isdigit():
            stem = raw / path.stem
            there = stem.with_suffix(".tar").exists() and (made_from(stem.with_suffix(".parquet")) or "")
            known = stem if there and there.startswith(f"{settings}-") else None
            yield ShardTask(path, stem, f"{settings}-{digest(path)}", config, known, root, retry)


def _root(plan: Path) -> Path | None:
    """The folder of a local source, which plan.json names."""
    done = plan / "plan.json"
    root = json.loads(done.read_text()).get("root") if done.exists() else None
    return Path(root) if root else None


def _is_made(task: ShardTask) -> bool:
    if task.known is None or made_from(task.stem.with_suffix(".parquet")) != task.made_from:
        return False
    return not (task.retry and _has_passing(task.stem))


def _has_passing(stem: Path) -> bool:
    from curate.fetch.reuse import may_pass

    ends = read_rows(stem.with_suffix(".parquet"), ["reason", "http_status"])
    unique = ends.group_by(ends.column_names).aggregate([]).to_pylist()
    return any(may_pass(end["reason"], end["http_status"]) for end in unique)


def _tell_changes(path: Path, settings: Mapping[str, Any], again: list[ShardTask]) -> None:
    """Say which settings changed since the shards that are made again were made; remember those of today."""
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    again = [task for task in again if task.stem.with_suffix(".parquet").exists()]
    changed = [
        f"fetch.{name} was {json.dumps(before[name])}, is {json.dumps(value)}"
        for name, value in settings.items()
        if name in before and before[name] != value
    ]
    if again and changed:
        logger.info("fetch   %d shards are fetched again: %s", len(again), "; ".join(changed))
    if before != settings:
        write_text(path, json.dumps(settings, indent=2) + "\n")


def _remove_strays(raw: Path, names: set[str]) -> None:
    """Remove shards whose plan file is gone; the Parquet first, without which a shard is none."""
    for pattern in ("*.parquet", "*.tar", "*_stats.json"):
        for path in raw.glob(pattern):
            name = path.stem.removesuffix("_stats")
            if name.isdigit() and name not in names:
                path.unlink()


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fetch(todo: list[ShardTask], out: Path, config: FetchConfig, executor: str) -> None:
    from curate.executor import run_over
    from curate.fetch.tell import Teller

    with (
        _crew(todo, out, config, executor) as (crew, work),
        Teller(todo) as teller,
        closing(run_over(work, todo, crew, on_report=teller.report)) as outcomes,
    ):
        for outcome in outcomes:
            if outcome.died and not _is_whole(outcome.item):
                from curate.fetch.engine import write_dead_shard

                counts = write_dead_shard(outcome.item, outcome.item.made_from + DIED)
                teller.report(outcome.item, {"counts": counts, "kept": {}, "bytes": 0, "throttled": [], "paused": 0.0})


@contextmanager
def _crew(todo: list[ShardTask], out: Path, config: FetchConfig, executor: str) -> Iterator[tuple[Crew[Any], Work]]:
    """The workers, and what they are to do."""
    has_urls = todo[0].root is None
    if executor == "ray":
        from curate.fetch import nodes

        with nodes.on_nodes(out, config, len(todo), partial(_work, config, has_urls=has_urls)) as crew_and_work:
            yield crew_and_work
        return
    from curate.executor import Processes
    from curate.fetch import hosts, origins

    state, processes = out / STATE, min(config.processes or _cores(), len(todo))
    hosts.create(state / "hosts", processes)
    origins.prepare(state / "robots.sqlite")
    yield Processes(processes), _work(config, state, has_urls=has_urls)


def _is_whole(task: ShardTask) -> bool:
    """Whether the shard is there although its workers died: before they could say so, or in asking again."""
    return made_from(task.stem.with_suffix(".parquet")) == task.made_from and task.stem.with_suffix(".tar").exists()


def _work(config: FetchConfig, state: Path, share: Share | None = None, *, has_urls: bool) -> Work:
    if config.engine == "img2dataset" and has_urls:
        from curate.fetch import img2dataset

        img2dataset.prepare()
        return partial(img2dataset.open_worker, state=state, config=config)
    return partial(_native, state=state, config=config, share=share)


def _native(number: int, *, state: Path, config: FetchConfig, share: Share | None) -> AbstractAsyncContextManager[Do]:
    """The worker of the native engine, whose modules only it imports, and not this process."""
    from curate.fetch import engine, hosts

    return engine.open_worker(number, state=state, config=config, share=share or hosts.WHOLE)


def _count(stems: list[Path]) -> dict[str, int]:
    """Rows by reason over finished shards, from the shards themselves; most frequent first."""
    import pyarrow.compute as pc

    counts: Counter[str] = Counter()
    for stem in stems:
        reasons = read_rows(stem.with_suffix(".parquet"), ["reason"])["reason"]
        tally: list[dict[str, Any]] = pc.value_counts(reasons).to_pylist()
        counts.update({entry["values"] or SUCCESS: entry["counts"] for entry in tally})
    return dict(counts.most_common())
