"""Measure: raw shards → `signals/GROUP/`, what is found out about every image and caption, once for all filters.

    text     the caption by itself
    safety   not safe for work?
    clip     embeddings, and how well image and caption fit
    own      the user's functions

A group is made shard by shard, and a shard made anew only when its images, or what measures them, changed. What pixels
tell is computed by `fetch`, while it holds them. `nodes` does the same on a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.config import ClipConfig, MeasureConfig
from curate.errors import ConfigError
from curate.files import digest, fingerprint, made_from, sweep, write_parquet
from curate.progress import progress
from curate.shards import shards_of
from curate.signals import OwnSignal, asked, own_signals

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 3  # raise it when the same inputs would give other signals
Advance = Callable[..., None]
# A raw shard, and what to tell of each image done → its signals.
Measure = Callable[[Path, Advance], "pa.Table"]


@dataclass(frozen=True)
class MeasureResult:
    """Files of signals made now, files that were there already, and images measured now."""

    made: int = 0
    reused: int = 0
    images: int = 0


@dataclass(frozen=True)
class Group:
    """A group of signals to make.

    Attributes:
        name: of its folder.
        identity: what its values depend on, beside the raw shards.
        open: gives what measures a shard; models are loaded here, and only if there is something to measure.
        device: of its model, as the configuration names it; None: it has none that runs on an accelerator.
    """

    name: str
    identity: object
    open: Callable[[], Measure]
    device: str | None = None


@dataclass(frozen=True)
class ShardTask:
    """One file to make.

    Attributes:
        raw: stem of the raw shard.
        signals: path of the file.
        made_from: its fingerprint.
    """

    raw: Path
    signals: Path
    made_from: str


def run(out: Path, config: MeasureConfig, *, executor: str = "local") -> MeasureResult:
    """Write `signals/GROUP/N.parquet` for each raw shard whose signals are not what they would be today.

    Args:
        out: the dataset's folder.
        config: which signals.
        executor: local, or ray: on all nodes of a cluster.

    Raises:
        ModelError: the CLIP cannot be loaded.
        ConfigError: a package is missing, or a signal of the user's own does not do what it says.
    """
    if executor != "local":
        out = out.absolute()  # nodes need not share the current folder
    folder, raw = out / "signals", shards_of(out / "raw")
    check(config)
    if raw:
        _check_names(raw[0], config)
    _remove_stale(folder, set(asked(config)), {stem.name for stem in raw})
    made = reused = images = 0
    for group in _groups(config) if raw else ():
        wanted = {stem: _fingerprint(group, stem) for stem in raw}
        due = [stem for stem in raw if made_from(folder / group.name / f"{stem.name}.parquet") != wanted[stem]]
        made, reused = made + len(due), reused + len(raw) - len(due)
        if due:
            tasks = [ShardTask(stem, folder / group.name / f"{stem.name}.parquet", wanted[stem]) for stem in due]
            images += _make(group, tasks, executor)
    return MeasureResult(made, reused, images)


def check(config: MeasureConfig) -> None:
    """Tell at once what would fail after an hour of download: a missing package, a function that is not there.

    Raises:
        ConfigError: that.
    """
    _check_columns(config)
    for signal in own_signals(config):
        from curate.measure.own import load

        load(signal)
    if config.safety:
        from curate.measure.safety import check_installed

        check_installed()


def _check_columns(config: MeasureConfig) -> None:
    """Check that no own signal's column has a name that is one of ours in some stage's tables.

    Raises:
        ConfigError: one has; it says which.
    """
    from curate.expressions import RESERVED

    for number, signal in enumerate(own_signals(config)):
        if taken := next((column for column in signal.columns if column.lower() in RESERVED), None):
            where = f"measure.signals[{number}] '{signal.name}'"
            raise ConfigError(f"{where}: column '{taken}' is one of our own; choose another name")


def _groups(config: MeasureConfig) -> Iterator[Group]:
    if config.text:
        yield Group("text", None, _open_text)
    if config.safety:
        from curate.measure import safety

        yield Group("safety", safety.identity(), _open_safety)
    if config.clip:
        from curate.clip import weights_fingerprint

        weights = weights_fingerprint(config.clip.name, config.clip.pretrained)
        yield Group("clip", weights, partial(_open_clip, config.clip), config.clip.device)
    for signal in own_signals(config):
        from curate.measure import own

        yield Group(signal.name, own.identity(signal), partial(_open_own, signal))


def _make(group: Group, tasks: list[ShardTask], executor: str) -> int:
    """Make the files of a group; how many images they are of."""
    from curate.measure.images import count_images

    images = sum(count_images(task.raw) for task in tasks)
    with progress(f"measure {group.name}", images) as advance:
        if executor == "ray":
            from curate.measure import nodes

            nodes.make(group, tasks, advance)
        else:
            measure = group.open()
            for task in tasks:
                make_one(measure, task, advance)
    return images


def make_one(measure: Measure, task: ShardTask, advance: Advance) -> None:
    """Make one file of signals."""
    write_parquet(measure(task.raw, advance), task.signals, made_from=task.made_from)


def _fingerprint(group: Group, stem: Path) -> str:
    return fingerprint("measure", group.name, VERSION, digest(stem.with_suffix(".parquet")), group.identity)


def _check_names(raw: Path, config: MeasureConfig) -> None:
    import pyarrow.parquet as pq

    there = {name.lower() for name in pq.read_schema(raw.with_suffix(".parquet")).names}
    for signal in own_signals(config):
        if clash := sorted(column for column in signal.columns if column.lower() in there):
            raise ConfigError(f"measure.signals '{signal.name}': there is a column '{clash[0]}' already; rename it")


def _remove_stale(folder: Path, groups: set[str], names: set[str]) -> None:
    for path in folder.rglob("*.parquet"):
        if path.parent.name not in groups or path.parent == folder or path.stem not in names:
            path.unlink()
    for path in folder.glob("*"):
        if path.is_dir():
            sweep(path)


# --- the groups ------------------------------------------------------------------------------------------------------


def _open_text() -> Measure:
    return _text


def _text(stem: Path, advance: Advance) -> pa.Table:
    import pyarrow as pa

    from curate.measure.images import fetched_rows
    from curate.measure.own import ARROW
    from curate.measure.text import text_signals
    from curate.signals import GROUPS

    rows = fetched_rows(stem)
    found = text_signals([caption or "" for caption in rows["caption"].to_pylist()])
    advance(rows.num_rows)
    columns = {name: pa.array(found[name], ARROW[kind]) for name, kind in GROUPS["text"].items()}
    return pa.table({"key": rows["key"], **columns})


def _open_safety() -> Measure:
    import pyarrow as pa

    from curate.measure.images import batches
    from curate.measure.safety import BATCH, open_classifier

    classify = open_classifier()

    def measure(stem: Path, advance: Advance) -> pa.Table:
        keys, found = [], []
        for batch in batches(stem, BATCH):
            keys += batch["key"].to_pylist()
            found += classify(batch["image"].to_pylist())
            advance(batch.num_rows)
        return pa.table({"key": pa.array(keys, pa.string()), "nsfw": pa.array(found, pa.float32())})

    return measure


def _open_clip(config: ClipConfig) -> Measure:
    # torch and open_clip take seconds to import: only when there is something to measure.
    from curate.clip import load_clip
    from curate.measure.clip import embed_shard
    from curate.measure.images import fetched_rows

    clip = load_clip(config.name, config.pretrained, device=config.device)

    def measure(stem: Path, advance: Advance) -> pa.Table:
        return embed_shard(clip, stem.with_suffix(".tar"), fetched_rows(stem, None), config.batch_size, advance)

    return measure


def _open_own(signal: OwnSignal) -> Measure:
    import pyarrow as pa

    from curate.measure import own
    from curate.measure.images import batches

    function = own.load(signal)

    def measure(stem: Path, advance: Advance) -> pa.Table:
        tables: list[Any] = []
        for batch in batches(stem, own.BATCH):
            tables.append(own.columns_of(signal, function, batch))
            advance(batch.num_rows)
        types = {"key": pa.string(), **{name: own.ARROW[kind] for name, kind in signal.columns.items()}}
        return pa.concat_tables([pa.schema(types).empty_table(), *tables])

    return measure
