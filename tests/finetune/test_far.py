"""Datasets far away: on a real S3 server on loopback, read through a bounded cache, window after window."""

from __future__ import annotations

import csv
import errno
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate import cache, remote
from curate.cache import fetch
from curate.clip import load_clip
from curate.errors import ConfigError, InputError, Outage, UnwritableDisk
from curate.index import MemberReader, iter_images, read_index
from curate.remote import cache_folder, far, locked, mirror
from curate.shards import ShardWriter, shard_folder
from finetune.cli import main
from finetune.config import AdapterConfig, DataConfig, KeepConfig, OptimizerConfig, SourceConfig
from finetune.data import data_fingerprint
from finetune.embedding import find_pictures
from finetune.features import key_of
from finetune.fit import fit
from finetune.schedule import Schedule
from finetune.windows import Windows
from tests.buckets import s3_server
from tests.finetune import tiny
from tests.finetune.fitted import tiny_config, wait_until_free
from tests.finetune.test_data import WithClip, assert_same, batches
from tests.finetune.test_fit_datasets import foreign  # noqa: F401 - a fixture
from tests.finetune.warm import warm

FAR = Path("s3://far/dataset")
SHARD = 61_440  # bytes of a tar of eight samples


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """Six shards of eight samples and one of five, a val and a retain split."""
    folder = tmp_path_factory.mktemp("here")
    for first, (split, size) in enumerate({"train": 53, "val": 8, "retain": 8}.items()):
        tiny.write_split(folder, split, size, shard_size=8, first=1000 * first)
    return folder


@pytest.fixture(scope="module")
def server(here):
    with s3_server("far") as found:
        found.system.put(str(here), "far/dataset", recursive=True)
        yield found


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPTAILOR_CACHE", str(tmp_path / "cache"))
    mirror.cache_clear()


@pytest.fixture(scope="module")
def clip(architectures):
    return load_clip(architectures["tiny-vit"], device="cpu")


def config(dataset: Path = FAR, **fields) -> DataConfig:
    return DataConfig(**({"dataset": dataset, "batch_size": 6, "num_workers": 0, "window": 16} | fields))


def loader(clip, dataset: Path = FAR, **fields):
    return WithClip(clip, config(dataset, **fields)).train_dataloader()


def without_groups(seen):
    """Batches without the ids of duplicates, which say what is equal in one place and nothing more."""
    return [{name: value for name, value in batch.items() if name != "group"} for batch in seen]


def tars() -> list[Path]:
    return sorted(cache_folder().glob("*/*/*.tar"))


def wait_until(ready: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.01)


def in_cache() -> int:
    """Bytes of all tars, whole or not yet, at a moment when none takes its room."""
    with locked(cache_folder() / ".lock"):
        # By name: a part may become a tar between two looks.
        held = {each.path.name.strip(".").removesuffix(".part"): each.size for each in cache._in_cache()}
    return sum(held.values())


# --- the order -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=120)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(0, 3),
    st.integers(1, 4),
    st.data(),
)
def test_window_after_window_an_epoch_is_every_sample_once_from_the_shards_that_are_needed(
    sizes, window, epoch, machines, data
):
    num_samples, files = sum(sizes), np.repeat(np.arange(len(sizes)) * 2, sizes)
    windows = Windows.of(pa.chunked_array([pa.array(files[:5]), pa.array(files[5:])]), window)
    seed = (machines, 7, epoch)
    rows = windows.rows(np.arange(num_samples), *seed)
    assert sorted(rows) == list(range(num_samples))
    places = data.draw(st.lists(st.integers(0, num_samples - 1), max_size=9))
    assert windows.rows(np.array(places, int), *seed).tolist() == rows[places].tolist()
    needed = [windows.needed(np.array([place]), *seed).tolist() for place in range(num_samples)]
    shared = num_samples // machines * machines
    for place, row in enumerate(rows):
        assert files[row] in needed[place]
        ahead = place - window * machines  # a window ahead it is on its way
        assert ahead < 0 or place >= shared or files[row] in needed[ahead]
    for some in needed:
        # Of a part the first and the last shard may belong to two.
        largest = max(sizes) * (1 if machines == 1 else 2)
        assert sum(sizes[number // 2] for number in some) <= 2 * (window + largest - 1)
    if num_samples <= window and machines == 1:
        assert sorted(needed[0]) == sorted(set(files.tolist()))


def test_windows_are_shuffled_and_each_epoch_has_another_order():
    windows = Windows.of(pa.chunked_array([pa.array(np.repeat(np.arange(50), 20))]), 200)
    first, second = (windows.rows(np.arange(1000), 1, 7, epoch) for epoch in range(2))
    assert (first != second).mean() > 0.9
    assert len(set((first[:200] // 20).tolist())) == 10
    assert set((first[:200] // 20).tolist()) != set((second[:200] // 20).tolist())
    steps = np.diff(first[:200])
    assert (steps == 1).mean() < 0.05  # neighbours in a shard come apart
    again = Windows.of(pa.chunked_array([pa.array(np.repeat(np.arange(50), 20))]), 200)
    assert np.array_equal(again.rows(np.arange(1000), 1, 7, 0), first)


def test_each_window_is_shuffled_in_its_own_way_and_in_each_epoch_anew():
    windows = Windows.of(pa.chunked_array([pa.array(np.repeat(np.arange(50), 20))]), 20)  # a shard each
    orders = windows.rows(np.arange(1000), 1, 7, 0).reshape(50, 20) % 20
    assert len(np.unique(orders, axis=0)) == 50
    whole = Windows.of(pa.chunked_array([pa.array(np.zeros(100, int))]), 100)
    first, second = (whole.rows(np.arange(100), 1, 7, epoch) for epoch in range(2))
    assert (first != second).mean() > 0.9


def test_a_windowed_epoch_has_another_order_by_the_seed():
    windows = Windows.of(pa.chunked_array([pa.array(np.repeat(np.arange(10), 10))]), 20)

    def order(seed: int) -> np.ndarray:
        return np.array([draw.row for draw in Schedule(100, 0, 100, 0.0, seed, order=windows).batch(0, 0)])

    first, second = order(7), order(8)
    assert np.array_equal(first, windows.rows(np.arange(100), 1, 7, 0))
    shards = [[set(part) for part in (rows // 10).reshape(5, 20).tolist()] for rows in (first, second)]
    assert shards[0] != shards[1]
    whole = Windows.of(pa.chunked_array([pa.array(np.zeros(100, int))]), 100)  # a window of one shard
    assert not np.array_equal(*(whole.rows(np.arange(100), 1, seed, 0) for seed in (7, 8)))


@pytest.mark.parametrize("machines", [1, 2])
def test_a_batch_in_two_windows_needs_no_third(machines):
    windows = Windows.of(pa.chunked_array([pa.array(np.repeat(np.arange(50), 20))]), 60)
    start = 50 * machines
    batch = np.arange(start, start + 20 * machines)
    first = windows.needed(batch[:machines], machines, 7, 0)
    assert sorted(windows.needed(batch, machines, 7, 0)) == sorted(first)
    assert {row // 20 for row in windows.rows(batch, machines, 7, 0)} <= set(first.tolist())
    assert len(first) == 6 * machines


@pytest.mark.parametrize("machines", [1, 2, 4])
@pytest.mark.parametrize("ranks_each", [1, 2])
def test_each_machine_reads_its_part_of_the_shards_and_all_together_an_epoch(machines, ranks_each):
    order = Windows.of(pa.chunked_array([pa.array(np.repeat(np.arange(50), 20))]), 60)
    world = machines * ranks_each
    plan = Schedule(1000, 0, 5, 0.0, 7, world, order=order, machines=machines)
    read = [
        [draw.row for number in range(plan.batches(0)) for draw in replace(plan, rank=rank).batch(0, number)]
        for rank in range(world)
    ]
    assert sorted(row for rows in read for row in rows) == list(range(1000))
    shards = [
        {row // 20 for rank in range(ranks_each) for row in read[machine * ranks_each + rank]}
        for machine in range(machines)
    ]
    # Where two parts meet within a shard, both machines have it.
    assert 50 <= sum(map(len, shards)) <= 50 + machines - 1
    for rank in range(world):
        mine = replace(plan, rank=rank)
        for number in range(mine.batches(0)):
            beside = [replace(plan, rank=rank // ranks_each * ranks_each + each) for each in range(ranks_each)]
            together = np.concatenate([each.places(0, number) for each in beside])
            assert sorted(mine.places_of_machine(0, number)) == sorted(together)
            needed = set(order.needed(mine.places(0, number), machines, 7, 0).tolist())
            assert {draw.row // 20 for draw in mine.batch(0, number)} <= needed <= shards[rank // ranks_each]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(6, 12), min_size=2, max_size=8), st.integers(2, 20), st.data())
def test_cut_into_other_batches_a_windowed_epoch_goes_on_at_its_sample(sizes, window, data):
    order = Windows.of(pa.chunked_array([pa.array(np.repeat(np.arange(len(sizes)), sizes))]), window)

    def drawn() -> tuple[int, int, int]:
        size, machines = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 3))
        return size, machines * data.draw(st.integers(1, 2)), machines

    (size, world, machines), (other_size, other_world, other_machines) = drawn(), drawn()
    plan = Schedule(sum(sizes), 0, size, 0.0, 7, world, order=order, machines=machines)
    stopped = data.draw(st.integers(0, len(plan) - 1))
    seen = [
        draw.row
        for number in range(stopped)
        for rank in range(world)
        for draw in replace(plan, rank=rank).batch(0, number)
    ]
    new = Schedule(sum(sizes), 0, other_size + 1, 0.0, 7, other_world, order=order, machines=other_machines)
    new = new.going_on(plan.since, plan.manner, 0, stopped)
    for number in range(stopped, new.batches(0)):
        mine = [[draw.row for draw in replace(new, rank=rank).batch(0, number)] for rank in range(other_world)]
        assert all(mine)
        seen += [row for rows in mine for row in rows]
    # A rest too small for a contrast begins a few samples earlier; ranks leave out what cannot be shared.
    assert len(set(seen)) > sum(sizes) - other_world
    assert len(seen) - len(set(seen)) <= 2 * other_world
    assert new.machines_of(0) == (machines if stopped else other_machines)
    assert new.machines_of(1) == other_machines


def test_a_checkpoint_that_names_no_machines_is_of_one():
    order = Windows.of(pa.chunked_array([pa.array(np.repeat(np.arange(10), 10))]), 20)
    one, two = (Schedule(100, 0, 5, 0.0, 7, 2, order=order, machines=machines) for machines in (1, 2))
    manner = {name: value for name, value in one.manner.items() if name != "machines"}
    rest = two.going_on(one.since, manner, 0, 4)
    seen = [
        draw.row
        for plan, numbers in ((one, range(4)), (rest, range(4, 10)))
        for number in numbers
        for rank in range(2)
        for draw in replace(plan, rank=rank).batch(0, number)
    ]
    assert sorted(seen) == list(range(100))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_far_away_and_small_a_dataset_gives_the_batches_that_it_gives_here(clip, here, server):
    fields = {"replay": 0.3, "crop_scale": (0.4, 1.0), "window": 53}
    near, away = loader(clip, here, **fields), loader(clip, **fields)
    for _ in range(2):
        assert_same(*(without_groups(batches(each)) for each in (away, near)))
    assert data_fingerprint(config(**fields)) == data_fingerprint(config(here, **fields))  # it may move during a run
    assert data_fingerprint(config()) != data_fingerprint(config(here))  # in windows it has another order


def test_window_after_window_each_sample_comes_once_and_each_tar_is_fetched_once(clip, server):
    alone = loader(clip)
    expected = [batches(alone) for _ in range(2)]
    rows = [[int(row) for batch in epoch for row in batch["row"]] for epoch in expected]
    assert rows[0] != rows[1]
    assert sorted(rows[0]) == sorted(rows[1]) == list(range(53))
    assert len({row // 8 for row in rows[0][:12]}) <= 3
    shutil.rmtree(cache_folder())
    mirror.cache_clear()
    del server.requests[:]
    together = loader(clip, num_workers=2)
    for epoch in expected:
        assert_same(batches(together), epoch)
    fetched = Counter(name for name in server.downloads() if name.endswith(".tar"))
    assert fetched == {f"train-{number:05d}.tar": 1 for number in range(7)}


def test_the_next_window_is_fetched_ahead_and_behind_an_epoch_nobody_fetches(clip, server):
    before = set(threading.enumerate())
    data = WithClip(clip, config())
    read = data.train_dataloader()
    needed = data.needs(read.schedule, 0, 0)
    rows = iter(read)
    first = next(rows)
    assert {f"train-{row // 8:05d}.tar" for row in first["row"].tolist()} < {tar.name for tar in needed}
    wait_until(lambda: all(tar.exists() for tar in needed))
    assert len(list(rows)) == 8
    wait_until(lambda: not any("_work" in thread.name for thread in set(threading.enumerate()) - before))


def test_saved_and_restored_in_an_epoch_a_windowed_loader_goes_on_the_same(clip, server):
    whole = loader(clip)
    expected = batches(whole) + batches(whole)
    for stop in (1, 4, 8):
        first, rest = loader(clip), loader(clip)
        seen = [batch for _, batch in zip(range(stop), first, strict=False)]
        rest.load_state_dict(first.state_dict())
        assert_same([*seen, *rest, *rest], expected)


def test_the_cache_stays_within_its_bound_and_what_was_removed_is_fetched_again(clip, server, monkeypatch):
    bound = 5 * SHARD
    monkeypatch.setenv("CLIPTAILOR_CACHE_GB", str(bound / 1e9))
    del server.requests[:]
    most, done = [0], threading.Event()

    def look():
        while not done.is_set():
            most.append(in_cache())

    watch = threading.Thread(target=look)
    read = loader(clip, num_workers=2, window=8)
    watch.start()
    rows = [int(row) for _ in range(2) for batch in read for row in batch["row"]]
    done.set()
    watch.join()
    assert Counter(rows) == dict.fromkeys(range(53), 2)
    assert 3 * SHARD < max(most) <= bound
    fetched = Counter(name for name in server.downloads() if name.endswith(".tar"))
    assert 7 < sum(fetched.values()) <= 14  # not all could stay for the second epoch; no window was fetched twice


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_validation_far_away_is_fetched_ahead_of_its_batches(clip, tmp_path, server, num_workers):
    tiny.write_split(tmp_path / "v", "train", 8, shard_size=8)
    tiny.write_split(tmp_path / "v", "val", 6 * 8, shard_size=8, first=1000)
    server.system.put(str(tmp_path / "v"), "far/validated", recursive=True)
    far_away = Path("s3://far/validated")
    expected = batches(WithClip(clip, config(tmp_path / "v", eval_batch_size=8)).val_dataloader())
    loader = WithClip(clip, config(far_away, eval_batch_size=8, num_workers=num_workers)).val_dataloader()
    del server.requests[:]
    read = iter(loader)
    seen = [next(read)]
    asked = 1 + 2 * num_workers  # batches that have been asked for: each process is two ahead
    waited = time.monotonic() + 30
    while len(tars()) < asked + 3 and time.monotonic() < waited:
        time.sleep(0.02)
    assert [tar.name for tar in tars()] == [f"val-{number:05d}.tar" for number in range(asked + 3)]
    seen += read
    assert_same(*(without_groups(each) for each in (seen, expected)))
    assert Counter(server.downloads()) == {f"val-{number:05d}.tar": 1 for number in range(6)}


@pytest.mark.parametrize("how", ["read", "wanted"])
def test_what_nobody_has_needed_for_the_longest_time_makes_room(server, monkeypatch, how):
    first, second, third = read_index(FAR, "train").tars[:3]
    monkeypatch.setenv("CLIPTAILOR_CACHE_GB", str(2.5 * SHARD / 1e9))
    for age, tar in enumerate((first, second)):
        fetch(tar)
        os.utime(tar, ns=(age, age))
    if how == "read":
        cache.read_far(first, 0, 8)
    else:
        ahead = cache.ReadAhead()
        ahead.want([first])
        ahead.close()
    fetch(third)
    assert tars() == [first, third]


def test_what_is_wanted_first_is_fetched_first_and_stays_the_longest(server, monkeypatch):
    monkeypatch.setattr(cache, "_AT_ONCE", 1)
    last, middle, first = read_index(FAR, "train").tars[:3]
    del server.requests[:]
    ahead = cache.ReadAhead()
    try:
        ahead.want([first, middle, last])
        wait_until(last.exists)
        assert server.downloads() == [first.name, middle.name, last.name]
        ahead.want([first, middle, last])
    finally:
        ahead.close()
    monkeypatch.setenv("CLIPTAILOR_CACHE_GB", str(3.5 * SHARD / 1e9))
    fetch(read_index(FAR, "train").tars[3])
    assert first in tars()
    assert last not in tars()


def test_behind_its_end_nothing_is_fetched_ahead(server, monkeypatch):
    monkeypatch.setattr(cache, "_AT_ONCE", 1)
    index = read_index(FAR, "train")
    ahead = cache.ReadAhead()
    with cache._alone(index.tars[0].with_name(f".{index.tars[0].name}.part")):  # as if another process fetched it
        ahead.want(index.tars[:3])
        wait_until(lambda: bool(ahead._under_way))
        ahead.close()
    wait_until(index.tars[0].exists)
    assert ahead._waiting == []
    wait_until(lambda: not ahead._under_way)
    assert tars() == index.tars[:1]


def test_what_is_wanted_no_more_is_not_fetched_ahead(server, monkeypatch):
    monkeypatch.setattr(cache, "_AT_ONCE", 0)  # nobody begins
    tars = read_index(FAR, "train").tars
    ahead = cache.ReadAhead()
    ahead.want(tars[:2])
    ahead.want(tars[1:4])
    assert ahead._waiting == tars[1:4]


def test_what_was_removed_and_is_wanted_still_is_fetched_ahead_again(server):
    tars = read_index(FAR, "train").tars[:2]
    ahead = cache.ReadAhead()

    def comes() -> bool:
        ahead.want(tars)
        until = time.monotonic() + 20
        while time.monotonic() < until and not all(tar.exists() for tar in tars):
            time.sleep(0.01)
        return all(tar.exists() for tar in tars)

    try:
        assert comes()
        tars[1].unlink()
        assert comes()
    finally:
        ahead.close()


def test_the_part_of_a_killed_process_is_removed_for_room_and_not_taken_for_a_tar(server, monkeypatch):
    index = read_index(FAR, "train")
    part = index.tars[0].with_name(f".{index.tars[0].name}.part")
    part.write_bytes(bytes(SHARD))  # by nobody, now
    monkeypatch.setenv("CLIPTAILOR_CACHE_GB", str(2 * SHARD / 1e9))
    fetch(index.tars[1])
    fetch(index.tars[2])
    assert not part.exists()
    part.write_bytes(b"half a tar")
    reader = MemberReader(index.tars)
    place = index.table.slice(0, 1).to_pylist()[0]
    assert reader.read(0, place["image_offset"], place["image_size"]) == tiny.picture("red", "circle", 0)
    assert not part.exists()
    monkeypatch.setenv("CLIPTAILOR_CACHE_GB", "0.00001")
    with pytest.raises(
        ConfigError, match=r"CLIPTAILOR_CACHE_GB: 1e-05, but s3://far/dataset/shards/train-00003\.tar alone"
    ):
        fetch(index.tars[3])


@pytest.mark.timeout(60)
def test_a_cache_of_one_tar_has_room_for_it_again_and_again(server, monkeypatch):
    """Where a kill has left its part, too: that is not in its own way."""
    index = read_index(FAR, "train")
    monkeypatch.setenv("CLIPTAILOR_CACHE_GB", str(SHARD / 1e9))
    fetch(index.tars[0])
    fetch(index.tars[1])
    assert tars() == [index.tars[1]]
    index.tars[2].with_name(f".{index.tars[2].name}.part").write_bytes(bytes(SHARD))
    fetch(index.tars[2])
    assert tars() == [index.tars[2]]
    assert in_cache() == SHARD


def test_what_another_is_fetching_is_waited_for_and_never_removed(server, monkeypatch):
    index = read_index(FAR, "train")
    monkeypatch.setenv("CLIPTAILOR_CACHE_GB", str(2 * SHARD / 1e9))
    part = index.tars[0].with_name(f".{index.tars[0].name}.part")
    with cache._alone(part) as file:
        file.truncate(SHARD)
        os.utime(part, ns=(0, 0))
        fetch(index.tars[1])
        fetch(index.tars[2])
        assert part.stat().st_size == SHARD
        assert tars() == [index.tars[2]]
        waiting = threading.Thread(target=fetch, args=(index.tars[0],))
        waiting.start()
        index.tars[0].write_bytes(b"from another process")
        del server.requests[:]
    waiting.join(60)
    assert index.tars[0].read_bytes() == b"from another process"
    assert not part.exists()
    assert server.downloads() == []


def test_a_full_disk_is_told_with_the_folder_and_not_tried_again(server, monkeypatch):
    tried = []

    def copy_to(*_) -> None:
        tried.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "copy_to", copy_to)
    with pytest.raises(
        UnwritableDisk, match=r"train-00000\.tar: No space left on device; CLIPTAILOR_CACHE names another"
    ):
        fetch(read_index(FAR, "train").tars[0])
    assert tried == [1]
    assert tars() == []


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "5 GB"])
def test_the_room_of_the_cache_is_a_number_above_0(given, monkeypatch):
    monkeypatch.setenv("CLIPTAILOR_CACHE_GB", given)
    with pytest.raises(ConfigError, match=rf"CLIPTAILOR_CACHE_GB: expected gigabytes, above 0, got '{given}'"):
        cache.cache_bytes()
    monkeypatch.setenv("CLIPTAILOR_CACHE_GB", "")
    assert cache.cache_bytes() == 50_000_000_000


def test_captions_that_stay_in_tars_far_away_are_read_from_there(clip, here, server, monkeypatch):
    expected = batches(loader(clip, here, window=53, replay=0.3))
    monkeypatch.setattr("curate.index.MANY_SAMPLES", 9)
    module = WithClip(clip, config(window=53, replay=0.3))
    assert module.train_index.table["captions"].null_count == 53
    del server.requests[:]
    assert module.caption_lengths(clip).counted == 8  # of one tar
    assert server.downloads() == ["train-00000.tar"]
    assert_same(*(without_groups(each) for each in (batches(module.train_dataloader()), expected)))
    # A small source beside it changes nothing of that.
    shutil.rmtree(cache_folder())
    mirror.cache_clear()
    del server.requests[:]
    both = [SourceConfig(path=here, where="key < 'train000004'"), SourceConfig(path=FAR)]
    module = WithClip(clip, config(window=100, sources=both))
    small = len(module.train_index) - 53
    assert 0 < small < 9
    assert module.caption_lengths(clip).counted == small + 8
    assert [name for name in server.downloads() if name.endswith(".tar")] == ["train-00000.tar"]


def test_a_folder_of_img2dataset_far_away_is_indexed_once(foreign, server):  # noqa: F811
    server.system.put(str(foreign), "far/foreign", recursive=True)
    index = read_index(Path("s3://far/foreign"))
    expected = list(iter_images(read_index(foreign)))
    assert list(iter_images(index)) == expected
    for tar in tars():
        tar.unlink()
    del server.requests[:]
    assert len(read_index(Path("s3://far/foreign"))) == len(expected)
    assert server.downloads() == []


def test_what_is_kept_of_an_image_does_not_depend_on_whether_its_tar_is_here(clip, server):
    index = read_index(FAR, "train")
    table = index.table.append_column("captions", pa.array([["a"]] * 53)).append_column("source", pa.array([0] * 53))
    index = replace(index, table=table)
    before = key_of("image", clip.model, index)
    fetch(index.tars[0])
    assert key_of("image", clip.model, index) == before


def test_the_pictures_of_a_dataset_far_away_can_be_searched(server):
    found = find_pictures([FAR])
    assert len(found) == 69
    assert found.caption(0) == "a red circle"
    assert found.open(0).size == (48, 40)


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path, server) -> Path:
    """16 samples, of which one is no image."""
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    for shard in range(2):
        with ShardWriter(tmp_path / "d" / "shards" / f"train-{shard:05d}", schema, made_from="test") as writer:
            for number in range(8):
                content = b"no image" if (shard, number) == (1, 3) else tiny.picture("red", "circle", number)
                writer.add({"key": f"k{shard}{number}", "caption": f"{shard} {number}"}, content, "png")
    server.system.put(str(tmp_path / "d"), "far/damaged", recursive=True)
    yield Path("s3://far/damaged")
    server.system.rm("far/damaged", recursive=True)


def test_a_corrupt_member_costs_that_sample_is_named_and_beyond_a_share_stops_the_run(clip, damaged, caplog):
    read = batches(loader(clip, damaged, window=8, max_broken=0.1))
    assert sum(len(batch["row"]) for batch in read) == 16
    named = [record.getMessage() for record in caplog.records if "stands in" in record.getMessage()]
    assert len(named) == 1
    assert "train-00001.tar: sample k13: the image cannot be decoded" in named[0]
    with pytest.raises(
        InputError, match=r"sample k13: .* more than data\.max_broken allows|sample k13: .*build or copy"
    ):
        batches(loader(clip, damaged, window=8, max_broken=0.0))
    seen = loader(clip, damaged, window=8, max_broken=0.1)
    for _ in range(4):  # what stands in for it is of the same tar, which is here
        assert Counter(row // 8 for batch in batches(seen) for row in batch["row"].tolist()) == {0: 8, 1: 8}


def test_a_changed_dataset_is_another_one_and_its_old_mirror_goes(damaged, server, tmp_path):
    before, folder = data_fingerprint(config(damaged)), shard_folder(damaged)
    index = read_index(damaged)
    fetch(index.tars[0])
    tiny.write_split(tmp_path / "new", "train", 16, shard_size=8)
    server.system.put(str(tmp_path / "new" / "shards"), "far/damaged/", recursive=True)
    with pytest.raises(Outage, match=r"s3://far/damaged/shards/train-00001\.tar: is no longer what it was"):
        fetch(index.tars[1])
    # The next command; in a process of its own, since this one holds on to the first.
    held = subprocess.run(
        [sys.executable, "-c", LOOK, str(damaged)], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert held[0] != str(folder)
    assert held[1] != before
    assert folder.is_dir()
    os.close(remote._held.pop(folder))
    subprocess.run([sys.executable, "-c", LOOK, str(damaged)], capture_output=True, check=True, timeout=60)
    assert not folder.exists()


LOOK = """
import sys
from pathlib import Path
from curate.files import digest
from curate.shards import shard_folder
folder = shard_folder(Path(sys.argv[1]))
print(folder, digest(folder / "train-00000.parquet"))
"""


def test_a_tar_that_is_cut_short_is_named(damaged, server):
    name = "far/damaged/shards/train-00001.tar"
    content = server.system.cat(name)
    server.system.pipe(name, content[:-12_000])
    with pytest.raises(InputError, match=r"s3://far/damaged/shards/train-00001\.tar: .* it is cut short"):
        read_index(damaged)


def test_a_transfer_that_ends_early_is_made_again_and_then_named(server, monkeypatch):
    from s3fs import S3File

    monkeypatch.setattr(cache, "PAUSES_S", (0.0,))
    whole, broken = S3File.read, []

    def read(file, length=-1):
        content = whole(file, length)
        if broken:
            broken.pop()
            return content[:100]
        return content

    monkeypatch.setattr(S3File, "read", read)
    tar = read_index(FAR, "train").tars[2]
    broken[:] = [1]
    fetch(tar)
    assert tar.stat().st_size == far(tar).size
    tar.unlink()
    broken[:] = [1, 1, 1, 1]
    with pytest.raises(Outage, match=r"train-00002\.tar: cannot be read: 100 of [\d,]+ bytes came; when it can be"):
        fetch(tar)


def test_a_lost_server_is_told_in_a_line_and_the_run_goes_on_when_it_is_back(clip, server, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "PAUSES_S", (0.0,))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    expected = batches(loader(clip, window=8))
    shutil.rmtree(cache_folder())
    mirror.cache_clear()
    server.system.clear_instance_cache()
    # Without processes: they would have the server's socket, which so stays open.
    read, seen = loader(clip, window=8), []
    for_a_while = iter(read)
    seen.append(next(for_a_while))
    server.stop()
    try:
        with pytest.raises(Outage, match=r"s3://far/dataset/shards/train-\d+\.tar: cannot be read: Could not connect"):
            seen += for_a_while
    finally:
        server.start()
    assert len(seen) < len(expected)
    assert_same([*seen, *read], expected)


def test_a_tar_that_is_gone_is_told_by_whatever_process_needs_it(clip, damaged, server):
    read = loader(clip, damaged, window=8, max_broken=0.5, num_workers=1)
    server.system.rm("far/damaged/shards/train-00001.tar")
    with pytest.raises(Outage, match=r"s3://far/damaged/shards/train-00001\.tar: cannot be read any more: "):
        batches(read)


def test_what_is_not_there_is_told_in_one_line(server, monkeypatch, capsys, architectures, tmp_path):
    def said(dataset: str) -> str:
        assert main(["fit", "--data.dataset", dataset, "--out", str(tmp_path / "run")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    assert (
        said("s3://nowhere/dataset")
        == "finetune: s3://nowhere/dataset: cannot be read: The specified bucket does not exist"
    )
    assert "s3://far/nothing: cannot be read: " in said("s3://far/nothing")
    assert "gs://far/dataset: gs:// needs gcsfs: pip install 'cliptailor[gcs]'" in said("gs://far/dataset")
    server.system.pipe("far/empty/x.txt", b"")
    assert "s3://far/empty: no shard (STEM.tar with STEM.parquet)" in said("s3://far/empty")
    monkeypatch.setenv("CLIPTAILOR_CACHE_GB", "much")
    with pytest.raises(ConfigError, match=r"CLIPTAILOR_CACHE_GB: expected gigabytes, above 0, got 'much'"):
        cache.cache_bytes()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    server.system.clear_instance_cache()
    assert said("s3://far/dataset") == "finetune: s3://far/dataset: cannot be read: Unable to locate credentials"
    server.system.clear_instance_cache()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batches": "by_length"}, r"data\.batches: by_length rearranges a whole epoch, and s3://far/dataset is read"),
        (
            {"sources": [SourceConfig(path=FAR), SourceConfig(path=FAR, weight=0.5)]},
            r"data\.sources\[1\]\.weight: 0\.5, and s3://far/dataset, s3://far/dataset is read shard after shard",
        ),
    ],
)
def test_what_needs_the_whole_epoch_is_refused_where_it_is_read_in_windows(clip, server, fields, said):
    with pytest.raises(ConfigError, match=said):
        WithClip(clip, config(**fields))
    WithClip(clip, config(**fields, window=1000))


def test_a_window_that_does_not_fit_into_the_cache_is_refused(clip, server, monkeypatch):
    monkeypatch.setenv("CLIPTAILOR_CACHE_GB", str(3 * SHARD / 1e9))
    with pytest.raises(
        ConfigError, match=r"data\.window: 16 samples and as many ahead take about .* \(CLIPTAILOR_CACHE_GB\)"
    ):
        WithClip(clip, config())
    monkeypatch.setenv("CLIPTAILOR_CACHE_GB", str(5 * SHARD / 1e9))
    WithClip(clip, config(window=8))


# --- a run -----------------------------------------------------------------------------------------------------------


FIT = "import pickle, sys; from finetune.fit import fit; fit(pickle.loads(open(sys.argv[1], 'rb').read()))"


def test_killed_in_the_middle_of_an_epoch_a_run_ends_with_the_same_weights(server, architectures, tmp_path, capsys):
    unbroken = tiny_config(tmp_path / "unbroken", FAR, architectures["tiny-vit"], AdapterConfig(kind="full"), steps=14)
    data = replace(unbroken.data, batch_size=6, window=16, num_workers=1, replay=0.2, crop_scale=(0.5, 1.0))
    unbroken = replace(
        unbroken,
        trainer=replace(unbroken.trainer, val_check_interval=14, log_every_n_steps=1),
        data=data,
        keep=KeepConfig(interpolate=0),
        checkpoint_every_n_steps=2,
    )
    killed = replace(unbroken, out=tmp_path / "killed")
    (tmp_path / "config").write_bytes(pickle.dumps(killed))
    process = subprocess.Popen([sys.executable, "-c", FIT, str(tmp_path / "config")], start_new_session=True)
    last, until = killed.out / "checkpoints" / "last.ckpt", time.monotonic() + 120
    while not last.exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until_free(killed.out)
    assert not (killed.out / "finished.json").exists()
    assert fit(killed).resumed
    fit(unbroken)
    ours, expected = (
        torch.load(run.out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]  # noqa: TID251 - our own
        for run in (killed, unbroken)
    )
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert "dataset: s3://far/dataset\n" in (killed.out / "config.yaml").read_text()
    # The commands that look at a run find its splits there too.
    shutil.rmtree(cache_folder())
    mirror.cache_clear()
    assert main(["validate", "--run", str(killed.out), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "val/image_to_text/recall@1" in out
    assert "of tars far away, shuffled within 16 samples" in err  # the plan


def test_two_ranks_see_the_batches_of_one_window_after_window(server, architectures, tmp_path):
    one = tiny_config(tmp_path / "one", FAR, architectures["tiny-vit"], AdapterConfig(kind="full"), steps=4)
    one = replace(
        one,
        trainer=replace(one.trainer, val_check_interval=4, log_every_n_steps=1),
        model=replace(one.model, optimizer=OptimizerConfig(lr=1e-3)),
        data=replace(one.data, batch_size=12, window=16, crop_scale=(0.5, 1.0)),
        keep=KeepConfig(interpolate=0),
    )
    fit(one)
    two = ["--out", str(tmp_path / "two"), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    with warm("lightning", "open_clip", "finetune.fit") as command:
        words = ["fit", "--config", str(one.out / "config.yaml"), *two, "--data.batch_size", "6"]
        done = command(tmp_path, words, ranks=2)
    assert done.status == 0, done.error[-3000:]
    losses = []
    for run in (one.out, tmp_path / "two"):
        with (run / "metrics.csv").open() as file:
            losses.append([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)  # of other batches they differ in the first digit


def test_two_machines_fetch_each_tar_of_an_epoch_once(server, architectures, tmp_path):
    config = tiny_config(tmp_path / "run", FAR, architectures["tiny-vit"], AdapterConfig(kind="full"), steps=4)
    config = replace(
        config,
        trainer=replace(config.trainer, strategy="ddp", devices=1, num_nodes=2, val_check_interval=4),
        data=replace(config.data, batch_size=6, window=16),
        keep=KeepConfig(interpolate=0),
    )
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    del server.requests[:]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    caches = [tmp_path / "first", tmp_path / "second"]
    machines = [
        subprocess.Popen(
            [sys.executable, "-c", FIT, str(tmp_path / "config")],
            env=os.environ
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": str(number)}
            | {"CLIPTAILOR_CACHE": str(folder)},
        )
        for number, folder in enumerate(caches)
    ]
    assert [machine.wait(120) for machine in machines] == [0, 0]
    assert (config.out / "finished.json").is_file()
    trained = [{tar.name for tar in folder.rglob("train-*.tar")} for folder in caches]
    assert set.union(*trained) == {f"train-{number:05d}.tar" for number in range(7)}
    assert len(set.intersection(*trained)) <= 1  # the one in which their parts meet
    fetched = [name for name in server.downloads() if name.startswith("train-") and name.endswith(".tar")]
    assert len(fetched) == sum(map(len, trained))
