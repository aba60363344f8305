"""Which samples come together: every sample once, no twins where that can be, the same for all ranks and resumed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import ConfigError
from finetune.batches import Arrangement, caption_sizes, clusters, stored_embeddings, twin_groups
from finetune.config import AdapterConfig, DataConfig, SourceConfig
from finetune.data import CLIPDataModule, data_fingerprint
from finetune.fit import plan
from finetune.plan import rows
from finetune.schedule import Passes, Schedule
from tests.finetune import tiny
from tests.finetune.fitted import tiny_config

KINDS = ["without_twins", "by_length", "hard_negatives"]


def schedule(kind: str, values: list[int], batch_size: int = 8, world: int = 1, **more) -> Schedule:
    return Schedule(len(values), 0, batch_size, 0.0, 7, world, arrangement=Arrangement(kind, np.array(values)), **more)


def global_batches(made: Schedule, epoch: int) -> list[list[int]]:
    ranks = [replace(made, rank=rank) for rank in range(made.world_size)]
    return [[draw.row for rank in ranks for draw in rank.batch(epoch, number)] for number in range(len(made))]


@given(st.sampled_from(KINDS), st.lists(st.integers(0, 12), min_size=4, max_size=90), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_an_epoch_is_every_sample_once_and_the_same_each_time(kind, values, world):
    made = schedule(kind, values, 4, world)
    for epoch in (0, 3):
        batches = global_batches(made, epoch)
        seen = Counter(row for batch in batches for row in batch)
        assert set(seen.values()) == {1}
        assert len(values) - len(seen) < world
        assert batches == global_batches(schedule(kind, values, 4, world), epoch)
        assert [len(batch) for batch in batches] == [
            len(batch) for batch in global_batches(replace(made, arrangement=None), epoch)
        ]


@given(st.lists(st.integers(0, 30), min_size=4, max_size=120), st.integers(2, 9), st.integers(1, 2))
@settings(max_examples=100, deadline=None)
def test_no_batch_has_twins_unless_there_are_more_of_them_than_batches(values, batch_size, world):
    made = schedule("without_twins", values, batch_size, world)
    counts = Counter(values)
    met = 0
    for batch in global_batches(made, 1):
        found = Counter(values[row] for row in batch)
        met += sum(count - 1 for count in found.values())
        for value, count in found.items():
            # A batch that is smaller or larger than the others has one turn less, or more.
            assert count <= -(-counts[value] // max(1, len(made) - 1))
            assert count == 1 or counts[value] >= len(made)
    assert made.meetings(1) == met


def test_epochs_and_seeds_put_other_samples_together():
    made = schedule("without_twins", list(range(64)))
    first, second = (sorted(map(tuple, map(sorted, global_batches(made, epoch)))) for epoch in (0, 1))
    assert first != second
    assert first != sorted(map(tuple, map(sorted, global_batches(replace(made, seed=8), 0))))
    # Chance alone decides who meets whom where there are no twins: each pair in 7 of 63 epochs, about.
    met = Counter()
    for epoch in range(600):
        met.update(row for batch in global_batches(made, epoch) if 0 in batch for row in batch if row)
    assert 600 * 7 / 63 * 0.5 < min(met.values()) < max(met.values()) < 600 * 7 / 63 * 1.6


def test_captions_of_like_length_come_together():
    lengths = np.random.default_rng(0).integers(5, 200, 400).tolist()
    made = schedule("by_length", lengths)
    spread = [np.ptp([lengths[row] for row in batch]) for batch in global_batches(made, 0)]
    assert np.mean(spread) < 0.1 * np.mean(
        [np.ptp([lengths[row] for row in b]) for b in global_batches(replace(made, arrangement=None), 0)]
    )
    means = [np.mean([lengths[row] for row in batch]) for batch in global_batches(made, 0)]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.5  # the batches themselves in no order


def test_a_batch_of_hard_negatives_is_of_few_clusters():
    labels = np.repeat(np.arange(20), 4)
    made = schedule("hard_negatives", labels.tolist())
    assert max(len({labels[row] for row in batch}) for batch in global_batches(made, 0)) <= 3
    assert global_batches(made, 0) != global_batches(made, 1)


@pytest.mark.parametrize(("kind", "values"), [("by_length", [1] * 64), ("hard_negatives", list(range(64)))])
def test_batches_come_in_another_order_in_each_epoch(kind, values):
    """Captions of one length, and clusters of one, leave the batches to chance, which are then shuffled."""
    made = schedule(kind, values)
    orders = []
    for epoch in (0, 1):
        plain = global_batches(replace(made, arrangement=None), epoch)
        orders.append([plain.index(batch) for batch in global_batches(made, epoch)])
    assert [sorted(order) for order in orders] == [list(range(8))] * 2
    assert orders[0] != orders[1]


def test_samples_drawn_twice_an_epoch_are_their_own_twins():
    made = schedule("without_twins", list(range(30)), 6, sources=(Passes(20, 2.0), Passes(10, 0.5)))
    for epoch in (0, 1):
        batches = global_batches(made, epoch)
        assert Counter(row < 20 for batch in batches for row in batch) == {True: 40, False: 5}
        assert max(Counter(batch).most_common(1)[0][1] for batch in batches) == 1
        plain = [draw for number in range(len(made)) for draw in replace(made, arrangement=None).batch(epoch, number)]
        ours = [draw for number in range(len(made)) for draw in made.batch(epoch, number)]
        assert sorted(plain) == sorted(ours)


def table(captions: list[list[str]], groups: list[str | None]) -> pa.Table:
    return pa.table({"captions": captions, "duplicate_group": pa.array(groups, pa.string())})


def test_twins_share_a_caption_or_a_group_directly_or_by_others():
    found = twin_groups(
        table([["A cat"], ["a cat "], ["dog", "bird"], ["Bird"], ["x"], [], []], [None, "g", None, "h", "g", None, "h"])
    )
    assert found.tolist() == [0, 0, 2, 2, 0, 5, 2]
    assert caption_sizes(table([["abc", "a"], [], ["äö"]], [None] * 3)).tolist() == [2, 0, 2]


def test_clusters_are_neighbours_and_the_same_each_time():
    random = np.random.default_rng(0)
    centres = np.linalg.qr(random.normal(size=(16, 16)))[0][:8]
    truth = np.repeat(np.arange(8), 10)
    embedding = centres[truth] + 0.02 * random.normal(size=(80, 16))
    found = clusters(embedding, 40, 0)
    assert np.array_equal(found, clusters(embedding, 40, 0))
    assert len({*zip(found, truth, strict=True)}) <= 9  # k-means may split one and join two


def with_embeddings(dataset: Path, keys: list[str]) -> None:
    folder = dataset / "signals" / "clip"
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).normal(size=(len(keys), 4)).astype(np.float16)
    column = pa.array([*values], pa.list_(pa.float16()))
    pq.write_table(pa.table({"key": keys[::-1], "image_embedding": column}), folder / "00000.parquet")


def test_embeddings_are_found_by_key_and_missing_ones_told(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.batches: hard_negatives takes stored embeddings, and data.dataset"):
        stored_embeddings(tmp_path, "data.dataset", ["a"])
    with_embeddings(tmp_path, ["a", "b", "c"])
    found = stored_embeddings(tmp_path, "data.dataset", ["c", "a"])
    whole = stored_embeddings(tmp_path, "data.dataset", ["a", "b", "c"])
    assert np.array_equal(found, whole[[2, 0]])
    with pytest.raises(ConfigError, match="no embedding of sample d"):
        stored_embeddings(tmp_path, "data.dataset", ["a", "d"])
    file = tmp_path / "signals" / "clip" / "00000.parquet"
    read = pq.read_table(file)
    values = [*read["image_embedding"].to_pylist()[:2], None]  # of a, whose image could not be embedded
    pq.write_table(read.set_column(1, "image_embedding", pa.array(values, pa.list_(pa.float16()))), file)
    assert len(stored_embeddings(tmp_path, "data.dataset", ["c", "b"])) == 2
    with pytest.raises(ConfigError, match="no embedding of sample a"):
        stored_embeddings(tmp_path, "data.dataset", ["c", "a"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_data_module_arranges_what_it_is_configured_to(kind, tmp_path, monkeypatch):
    dataset = tiny.write_dataset(tmp_path, train=32, val=0, retain=0)  # 16 captions, twice each
    keys = [f"train{number:06d}" for number in range(32)]
    with_embeddings(dataset, keys)
    config = DataConfig(dataset=dataset, batch_size=8, batches=kind)
    data = CLIPDataModule(config)
    data.setup()
    batches = global_batches(data.schedule, 0)
    assert sorted(row for batch in batches for row in batch) == list(range(32))
    said = data.train_index.table["captions"].to_pylist()
    if kind == "without_twins":
        assert all(len({said[row][0] for row in batch}) == 8 for batch in batches)
    assert data_fingerprint(config) != data_fingerprint(replace(config, batches="shuffled"))
    other = CLIPDataModule(replace(config, sources=[SourceConfig(path=dataset), SourceConfig(path=dataset)]))
    other.setup()
    assert len(other.schedule.rows(0)) == 64
    assert len(global_batches(other.schedule, 0)) == 8


def test_the_plan_tells_who_meets_a_twin_all_the_same(tmp_path, architectures):
    dataset = tiny.write_dataset(tmp_path / "data", train=40, val=0, retain=0)  # 16 captions, two or three times each
    config = tiny_config(tmp_path / "run", dataset, architectures["tiny-vit"], AdapterConfig(rank=2))
    small = replace(config, data=replace(config.data, batches="without_twins"))
    assert dict(rows(plan(small)))["batch"] == "8 pairs, without_twins"
    large = replace(config, data=replace(config.data, batches="without_twins", batch_size=20))
    assert dict(rows(plan(large)))["batch"].startswith("20 pairs, without_twins but for 8: their groups have more")


def test_arranged_batches_go_on_in_their_own_size_alone():
    plan = Schedule(20, 0, 4, 0.0, 7, arrangement=Arrangement("by_length", np.arange(20)))
    assert plan.going_on(plan.since, plan.manner, 0, 2).batch(0, 2) == plan.batch(0, 2)
    with pytest.raises(ConfigError, match="by_length: which samples come together hangs on the size of batches"):
        replace(plan, batch_size=5).going_on(plan.since, plan.manner, 0, 2)
