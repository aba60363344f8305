from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import finetune.schedule
from curate.clip import Clip, load_clip
from curate.errors import ConfigError, InputError
from curate.index import read_index
from curate.shards import ShardWriter
from finetune.config import DataConfig, SourceConfig
from finetune.data import (
    CLIPDataModule,
    data_fingerprint,
    has_split,
)
from finetune.features import key_of
from finetune.pixels import EvaluationView
from finetune.reading import _AT_ONCE, PairDataset
from finetune.schedule import KEPT, Draw, Schedule, permutation, shuffled
from finetune.sources import concatenate, split_pairs
from tests.finetune import tiny


@pytest.fixture(scope="module")
def clip(architectures) -> Clip:
    return load_clip(architectures["tiny-vit"], device="cpu")


class WithClip(CLIPDataModule):
    """The data module without a trainer; the CLIP is given."""

    def __init__(self, clip: Clip, config: DataConfig, seed: int = 0, world: tuple[int, int] = (1, 0)) -> None:
        super().__init__(config, seed=seed)
        self._clip = lambda: clip
        self._world = lambda: world
        self.setup()


def config(dataset: Path, **fields) -> DataConfig:
    return DataConfig(**({"dataset": dataset, "batch_size": 8, "num_workers": 0} | fields))


# --- the schedule -----------------------------------------------------------------------------------------------------


def schedule(
    num_samples: int, num_replay: int = 0, batch_size: int = 8, replay: float = 0.0, world: int = 1, rank: int = 0
):
    return Schedule(num_samples, num_replay, batch_size, replay, 7, world, rank)


def epoch_rows(plan: Schedule, epoch: int = 0) -> list[list[int]]:
    return [[draw.row for draw in plan.batch(epoch, number)] for number in range(len(plan))]


@settings(deadline=None, max_examples=60)
@given(num_samples=st.integers(2, 200), batch_size=st.integers(2, 40), epoch=st.integers(0, 3))
def test_an_epoch_is_every_sample_once_in_batches_that_have_a_contrast(num_samples, batch_size, epoch):
    batches = epoch_rows(schedule(num_samples, batch_size=batch_size), epoch)
    assert sorted(row for rows in batches for row in rows) == list(range(num_samples))
    assert all(2 <= len(rows) <= batch_size + 1 for rows in batches)
    assert all(len(rows) == batch_size for rows in batches[:-1])


@settings(deadline=None, max_examples=60)
@given(num_samples=st.integers(8, 200), batch_size=st.integers(2, 20), world=st.integers(2, 4))
def test_ranks_share_each_global_batch_equally_and_no_sample_twice(num_samples, batch_size, world):
    ranks = [epoch_rows(schedule(num_samples, batch_size=batch_size, world=world, rank=rank)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    for parts in zip(*ranks, strict=True):
        assert len({len(part) for part in parts}) == 1
    rows = [row for batches in ranks for part in batches for row in part]
    assert len(set(rows)) == len(rows) > num_samples - world


def test_a_replayed_dataset_without_an_image_is_refused(dataset, tmp_path):
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    with ShardWriter(tmp_path / "shards" / "train-00000", schema, made_from="test") as shard:
        shard.add({"key": "a", "caption": "a dog"}, None, "")
    data = CLIPDataModule(DataConfig(dataset=dataset, batch_size=8, replay=0.5, replay_dataset=tmp_path))
    with pytest.raises(InputError, match=r"data\.replay: there is no image in what is to be replayed; set it to 0"):
        data.setup()


def test_the_ranks_together_see_the_batches_of_one_large_one():
    large = epoch_rows(schedule(40, batch_size=16))
    halves = [epoch_rows(schedule(40, batch_size=8, world=2, rank=rank)) for rank in (0, 1)]
    assert large == [first + second for first, second in zip(*halves, strict=True)]


def test_the_order_changes_with_epoch_and_seed_and_not_otherwise():
    plan = schedule(40)
    assert epoch_rows(plan, 0) == epoch_rows(schedule(40), 0)
    assert epoch_rows(plan, 0) != epoch_rows(plan, 1)
    assert permutation(40, 7, 0).tolist() != permutation(40, 8, 0).tolist()


def test_of_the_orders_of_many_sources_none_is_made_twice_and_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(finetune.schedule, "_kept", {})
    orders = [permutation(100, 7, source) for source in range(100)]
    assert all(permutation(100, 7, source) is order for source, order in enumerate(orders))
    monkeypatch.setattr(finetune.schedule, "KEPT_BYTES", 40_000)  # those hundred
    permutation(100, 7, 100)
    assert permutation(100, 7, 1) is orders[1]
    assert permutation(100, 7, 0) is not orders[0]


def test_the_orders_of_a_small_sources_many_turns_cost_each_draw_nothing(monkeypatch):
    class Kept(dict):
        looks = 0

        def values(self):
            self.looks += 1
            return super().values()

    monkeypatch.setattr(finetune.schedule, "_kept", kept := Kept())
    monkeypatch.setattr(finetune.schedule, "KEPT_MOST", 50)
    for turn in range(200):
        for _ in range(10):
            permutation(10, 7, turn)
    assert len(kept) == 50
    assert kept.looks <= 200


def test_a_large_order_is_calculated_place_by_place_and_as_good_as_a_shuffled_one():
    size = KEPT + 12_345
    places = np.arange(size)
    order, other = (shuffled(places, size, 7, epoch).astype(np.int64) for epoch in (0, 1))
    assert np.array_equal(np.sort(order), places)
    some = np.array([size - 1, 5, 1 << 20])
    assert np.array_equal(shuffled(some, size, 7, 0), order[some])  # whatever is asked for beside it
    for one, two in ((order, places), (order, other), (order[1:], order[:-1])):
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.004  # four standard deviations
    assert (order == places).sum() < 8  # one is expected
    assert (np.diff(order) == 1).sum() < 8
    # Where a place goes says nothing of it: 32 x 32 cells as full as chance has it.
    cells = np.histogram2d(places, order, bins=32)[0]
    expected = size / 32**2
    assert ((cells - expected) ** 2 / expected).sum() / 31**2 == pytest.approx(1, abs=0.2)


def test_a_small_order_is_numpys(monkeypatch):
    assert np.array_equal(shuffled(np.array([3, 0]), 9, 4, 2), np.random.default_rng((4, 2)).permutation(9)[[3, 0]])


@pytest.mark.parametrize(("replay", "each"), [(0.25, 2), (0.01, 1), (0.9, 7), (0.99, 7)])
def test_replay_takes_its_share_of_each_batch(replay, each):
    batches = epoch_rows(schedule(70, num_replay=5, replay=replay))
    for rows in batches[:-1]:
        assert [row >= 70 for row in rows].count(True) == each
        assert len(rows) == 8
    assert sorted(row for rows in batches for row in rows if row < 70) == list(range(70))


@settings(deadline=None, max_examples=40)
@given(st.integers(6, 60), st.integers(1, 30), st.integers(2, 10), st.floats(0.05, 0.9), st.integers(1, 3))
def test_replayed_samples_go_round_their_split_evenly(num_samples, num_replay, batch_size, replay, world):
    seen = Counter()
    draws = []
    for rank in range(world):
        plan = schedule(num_samples, num_replay, batch_size, replay, world, rank)
        for epoch in range(3):
            for number in range(len(plan)):
                draws += [draw for draw in plan.batch(epoch, number) if draw.row >= num_samples]
    seen.update(draw.row for draw in draws)
    assert len(set(draws)) == len(draws)  # no sample twice in one turn
    assert max(seen.values()) - min(seen[num_samples + n] for n in range(num_replay)) <= 1


def test_replayed_samples_come_in_another_order_in_each_turn_and_by_the_seed():
    def turns(seed: int) -> list[list[int]]:
        plan = Schedule(40, 20, 8, 0.5, seed)
        drawn = [draw for epoch in range(2) for number in range(10) for draw in plan.batch(epoch, number)[4:]]
        assert [draw.turn for draw in drawn] == [0] * 20 + [1] * 20 + [2] * 20 + [3] * 20
        return [[draw.row for draw in drawn[start : start + 20]] for start in range(0, 80, 20)]

    orders = [*turns(7), *turns(8)]
    assert len({tuple(order) for order in orders}) == 8
    # Nor are they those in which as many fresh samples would come.
    fresh = [[40 + draw.row for draw in Schedule(20, 0, 20, 0.0, 7).batch(epoch, 0)] for epoch in range(4)]
    assert not any(order in fresh for order in orders[:4])


@settings(deadline=None, max_examples=80)
@given(st.integers(8, 120), st.integers(0, 9), st.data())
def test_cut_into_other_batches_the_rest_of_an_epoch_is_what_was_not_seen(num_samples, num_replay, data):
    manners = st.tuples(
        st.integers(2, 12), st.integers(1, 3), st.sampled_from([0.0, 0.3, 0.8] if num_replay else [0.0])
    )
    plan = schedule(num_samples, num_replay, *data.draw(st.tuples(st.integers(2, 12), st.sampled_from([0.0]))))
    epoch = number = 0
    seen: list[list[Draw]] = [[], [], []]
    cuts = 0
    while epoch < 3:
        if data.draw(st.booleans()) and cuts < 3:  # saved, and taken up in another manner
            size, world, replay = data.draw(manners)
            new = schedule(num_samples, num_replay, size, replay, world)
            plan, cuts = new.going_on(plan.since, plan.manner, epoch, number), cuts + 1
            assert plan.after(epoch, number) == (epoch, number)  # there is always a batch
        ranks = [replace(plan, rank=rank).batch(epoch, number) for rank in range(plan.world_size)]
        assert len({len(draws) for draws in ranks}) == 1
        assert all(any(draw.row < num_samples for draw in draws) for draws in ranks)
        seen[epoch] += [draw for draws in ranks for draw in draws]
        epoch, number = plan.after(epoch, number + 1)
    for draws in seen:
        fresh = Counter(draw.row for draw in draws if draw.row < num_samples)
        assert num_samples - len(fresh) <= 2 * cuts  # what ranks could not share out
        assert fresh.total() - len(fresh) <= 6 * cuts  # and what filled a rest too small for a contrast
    replayed = [draw for draws in seen for draw in draws if draw.row >= num_samples]
    assert len(set(replayed)) == len(replayed)
    if replayed:
        assert max(replayed, key=lambda draw: draw.turn).turn == (len(replayed) - 1) // num_replay


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_has_pixels_tokens_ids_and_rows(clip, dataset):
    pairs = PairDataset(
        split_pairs(dataset, "train"), EvaluationView(clip.preprocess, clip.preprocess_cfg), clip.tokenizer
    )
    batch = pairs.__getitems__([Draw(3, 0), Draw(20, 0)]).batch
    assert batch["pixels"].shape == (2, 3, 32, 32)
    assert batch["pixels"].dtype == torch.float32
    index = read_index(dataset, "train")
    captions = [index.table["caption"][row].as_py() for row in (3, 20)]
    assert torch.equal(batch["tokens"], clip.tokenizer(captions))
    assert batch["row"].tolist() == [3, 20]
    tar, offset, size = (index.table[name][20].as_py() for name in ("tar", "image_offset", "image_size"))
    stored = Image.open(io.BytesIO(index.tars[tar].read_bytes()[offset : offset + size])).convert("RGB")
    assert torch.equal(batch["pixels"][1], clip.preprocess(stored))


def test_crops_are_bytes_of_the_way_that_was_asked_for(clip, dataset):
    for decode in ("fast", "exact"):
        loader = WithClip(clip, config(dataset, decode=decode)).train_dataloader()
        assert loader.dataset.view.fast == (decode == "fast")
        pixels = next(iter(loader))["pixels"]
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (8, 3, 32, 32))
        assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_the_process_of_a_loader_sends_its_batches_uncopied(clip, dataset, monkeypatch):
    monkeypatch.setattr("finetune.pixels.get_worker_info", lambda: "of a worker")
    pairs = WithClip(clip, config(dataset)).train_dataloader().dataset
    seen = pairs.__getitems__([Draw(row, 0) for row in range(5)]).batch["pixels"]
    assert seen.is_shared()
    monkeypatch.undo()
    here = pairs.__getitems__([Draw(row, 0) for row in range(5)]).batch["pixels"]
    assert not here.is_shared()
    assert torch.equal(seen, here)
    assert seen.stride() == here.stride()


@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_a_sample_looks_the_same_alone_and_in_a_batch_of_many(clip, dataset, decode):
    """More than are decoded at a time."""
    pairs = WithClip(clip, config(dataset, crop_scale=(0.4, 1.0), decode=decode)).train_dataloader().dataset
    draws = [Draw(number % 40, number // 40) for number in range(_AT_ONCE + 6)]
    together = pairs.__getitems__(draws).batch["pixels"]
    for draw, pixels in zip(draws, together, strict=True):
        assert torch.equal(pairs.__getitems__([draw]).batch["pixels"][0], pixels)


def test_captions_that_read_alike_duplicates_and_equal_images_share_an_id(clip, tmp_path):
    schema = pa.schema([("key", pa.string()), ("caption", pa.string()), ("duplicate_group", pa.string())])
    rows = [("A  Red circle", "g1"), ("a red circle", None), ("a dog", "g1"), ("a cat", None)]
    with ShardWriter(tmp_path / "train-00000", schema, made_from="test") as shard:
        for number, (caption, group) in enumerate(rows):
            row = {"key": f"{number}", "caption": caption, "duplicate_group": group}
            shard.add(row, tiny.picture("red", "circle", min(number, 2)), "png")
    pairs = PairDataset(
        split_pairs(tmp_path, "train"), EvaluationView(clip.preprocess, clip.preprocess_cfg), clip.tokenizer
    )
    caption, duplicate, image = pairs.__getitems__([Draw(row, 0) for row in range(4)]).batch["group"].T
    assert caption[0] == caption[1]
    assert len(set(caption.tolist())) == 3
    assert duplicate[0] == duplicate[2]
    assert len(set(duplicate.tolist())) == 3
    assert image[2] == image[3]
    assert len(set(image.tolist())) == 3


@pytest.mark.parametrize("side", [32, 400])
def test_flat_images_of_two_colours_have_two_ids(clip, tmp_path, side):
    """Their files are of one size, and differ in a few bytes, or, uncompressed, in many."""
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    with ShardWriter(tmp_path / "train-00000", schema, made_from="test") as shard:
        for number, colour in enumerate(((200, 10, 10), (10, 10, 200), (10, 10, 201), (10, 10, 201))):
            file = io.BytesIO()
            Image.new("RGB", (side, side), colour).save(file, "PNG", compress_level=0 if side > 100 else 6)
            shard.add({"key": f"{number}", "caption": f"{number}"}, file.getvalue(), "png")
    pairs = WithClip(clip, config(tmp_path)).train_dataloader().dataset
    ids = pairs.__getitems__([Draw(row, 0) for row in range(4)]).batch["group"][:, 2].tolist()
    assert len(set(ids)) == 3
    assert ids[2] == ids[3]


def test_a_dataset_without_duplicate_groups_is_read_too(clip, tmp_path):
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    with ShardWriter(tmp_path / "00000", schema, made_from="test") as shard:
        for number in range(4):
            shard.add({"key": f"{number}", "caption": "x"}, tiny.picture("red", "circle", number), "png")
    data = WithClip(clip, config(tmp_path))
    (batch,) = data.train_dataloader()
    assert len(set(batch["group"][:, 1].tolist())) == 4
    assert data.val_dataloader() == []


def test_replayed_rows_come_from_the_retain_split_or_from_another_dataset(clip, dataset, tmp_path):
    retained = WithClip(clip, config(dataset, replay=0.5)).train_dataloader()
    assert [key[:5] for key in retained.dataset.index.table["key"].to_pylist()] == ["train"] * 40 + ["retai"] * 8
    other = tiny.write_dataset(tmp_path, train=6, val=0, retain=0)
    replayed = WithClip(clip, config(dataset, replay=0.5, replay_dataset=other)).train_dataloader()
    assert len(replayed.dataset) == 46
    for batch in replayed:
        assert (batch["row"] >= 40).sum() == 4


def test_of_a_very_large_dataset_only_places_are_kept_and_the_batches_are_the_same(
    clip, dataset, tmp_path, monkeypatch
):
    schema = pa.schema([("key", pa.string()), ("caption", pa.string()), ("duplicate_group", pa.string())])
    said = ["a\u00e9 caption", None, " ", "x" * 700, "five"]
    for split, size in (("train", 5), ("retain", 2)):
        with ShardWriter(tmp_path / "shards" / f"{split}-00000", schema, made_from="test") as shard:
            for number in range(size):
                row = {"key": f"{split}{number}", "caption": said[number], "duplicate_group": [None, "g"][number % 2]}
                shard.add(row, tiny.picture("red", "circle", number), "png")

    def loader():
        return WithClip(clip, config(tmp_path, batch_size=7, replay=0.3)).train_dataloader()

    expected = batches(loader())
    monkeypatch.setattr("curate.index.MANY_SAMPLES", 3)
    large = loader()
    table = large.dataset.index.table
    assert table["captions"].null_count == table["key"].null_count == 5  # retain is small
    assert_same(batches(large), expected)
    assert [large.dataset._facts.key(row) for row in (0, 4, 6)] == ["train0", "train4", "retain1"]
    # Beside a small one it is as large as it is alone.
    both = [SourceConfig(path=tmp_path), SourceConfig(path=dataset, where="key < 'train000002'")]
    with pytest.raises(ConfigError, match=r"data\.batches: by_length looks at all .* of 5 the captions"):
        WithClip(clip, config(tmp_path, sources=both, batches="by_length")).train_dataloader()
    index = large.dataset.index
    before = key_of("text", clip.model, index)
    os.utime(index.tars[0], ns=(1, 1))  # written anew
    assert key_of("text", clip.model, index) != before


def test_concatenated_indices_read_from_the_right_tars(dataset):
    train, retain = split_pairs(dataset, "train"), split_pairs(dataset, "retain")
    both = concatenate(train, retain)
    row = {name: both.table[name][41].as_py() for name in both.table.column_names}
    assert row["key"] == retain.table["key"][1].as_py()
    assert both.tars[row["tar"]] == retain.tars[0]


def batches(loader) -> list[dict[str, torch.Tensor]]:
    return list(loader)


def assert_same(first, second) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_number_of_workers_changes_nothing(clip, dataset):
    alone, helped = (
        WithClip(clip, config(dataset, replay=0.25, crop_scale=(0.4, 1.0), num_workers=n)).train_dataloader()
        for n in (0, 2)
    )
    for _ in range(2):
        assert_same(batches(alone), batches(helped))


def test_augmentation_differs_between_epochs_and_is_off_at_full_scale(clip, dataset):
    loader = WithClip(clip, config(dataset, crop_scale=(0.4, 1.0))).train_dataloader()
    seen = [
        {int(row): pixels for batch in loader for row, pixels in zip(batch["row"], batch["pixels"], strict=True)}
        for _ in range(2)
    ]
    assert any(not torch.equal(seen[0][row], seen[1][row]) for row in range(40))
    plain = WithClip(clip, config(dataset, crop_scale=(1.0, 1.0))).train_dataloader()
    assert isinstance(plain.dataset.view, EvaluationView)


def test_of_equal_images_each_has_a_crop_of_its_own_and_of_the_seed(clip, tmp_path):
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    with ShardWriter(tmp_path / "00000", schema, made_from="test") as shard:
        for number in range(8):
            shard.add({"key": f"{number}", "caption": "x"}, tiny.picture("red", "circle", 0), "png")
    seen = []
    for seed in (0, 0, 1):
        pairs = WithClip(clip, config(tmp_path, crop_scale=(0.1, 1.0)), seed).train_dataloader().dataset
        pixels = pairs.__getitems__([Draw(row, 0) for row in range(8)]).batch["pixels"]
        seen.append([each.numpy().tobytes() for each in pixels])
        assert len(set(seen[-1])) == 8
    assert seen[0] == seen[1]
    assert all(one != other for one, other in zip(seen[0], seen[2], strict=True))


def test_saved_and_restored_at_every_batch_a_loader_gives_what_an_unbroken_one_does(clip, dataset):
    def loader():
        return WithClip(clip, config(dataset, replay=0.25, crop_scale=(0.4, 1.0))).train_dataloader()

    unbroken, taken, state = loader(), [], loader().state_dict()
    expected = [batch for _ in range(2) for batch in unbroken]
    for _ in expected:
        resumed = loader()
        resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
        taken.append(next(iter(resumed)))
        state = resumed.state_dict()
    assert_same(taken, expected)
    assert state == unbroken.state_dict()


@pytest.mark.parametrize(("consumed", "num_workers"), [(7, 0), (5, 2)])
def test_a_loader_goes_on_from_its_state_to_the_end(clip, dataset, consumed, num_workers):
    def loader():
        return WithClip(clip, config(dataset, replay=0.25, num_workers=num_workers)).train_dataloader()

    unbroken, broken, resumed = loader(), loader(), loader()
    expected = [batch for _ in range(2) for batch in unbroken]
    for _ in zip(range(consumed), broken, strict=False):
        pass
    resumed.load_state_dict(broken.state_dict())
    rest = batches(resumed)
    while len(rest) < len(expected) - consumed:
        rest += batches(resumed)
    assert_same(rest, expected[consumed:])


def test_a_loader_goes_on_at_the_same_sample_in_batches_of_another_size_and_for_other_ranks(clip, dataset):
    first = WithClip(clip, config(dataset, batch_size=8, num_workers=2)).train_dataloader()
    iterator = iter(first)  # decodes ahead of what it has handed out
    seen = [row for _ in range(2) for row in next(iterator)["row"].tolist()]
    state = first.state_dict()
    del iterator
    ranks = []
    for rank in range(2):
        loader = WithClip(clip, config(dataset, batch_size=3), world=(2, rank)).train_dataloader()
        loader.load_state_dict(state)
        assert len(loader) == 2 + 4
        ranks.append([row for batch in loader for row in batch["row"].tolist()])
        assert len(loader) == 7  # the next epoch is whole again
    assert len(ranks[0]) == len(ranks[1])
    assert sorted(seen + ranks[0] + ranks[1]) == list(range(40))


def test_starting_a_loader_draws_no_global_random_number(clip, dataset):
    loader = WithClip(clip, config(dataset)).train_dataloader()
    before = torch.get_rng_state()
    batches(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_over_other_samples_or_of_another_seed_is_refused_and_with_a_word_its_epoch_begins_anew(
    clip, dataset, tmp_path
):
    first = WithClip(clip, config(dataset))
    loader = first.train_dataloader()
    for _ in zip(range(3), loader, strict=False):
        pass
    other = tiny.write_dataset(tmp_path, train=24)
    for where, seed in ((other, 0), (dataset, 1)):
        with pytest.raises(InputError, match="its position means nothing here"):
            WithClip(clip, config(where), seed).train_dataloader().load_state_dict(loader.state_dict())
        told = WithClip(clip, config(where), seed)
        told.anew = True
        told.load_state_dict(first.state_dict())
        resumed = told.train_dataloader()
        size = len(told.train_index)
        assert len(resumed) == 3 + size // 8
        assert sorted(row for batch in resumed for row in batch["row"].tolist()) == list(range(size))
        assert (resumed.epoch, resumed.next_batch, len(resumed)) == (1, 0, size // 8)


@pytest.mark.parametrize(
    ("epochs", "accumulated", "batch_size", "steps"),
    # Of 5 batches an epoch 7 were made: 24 samples are left of the second of 3 epochs.
    [(3, 1, 8, 15), (3, 1, 4, 7 + 6 + 10), (3, 1, 40, 7 + 1 + 1), (1, 1, 4, 7), (3, 2, 8, 4 + 2 + 3)],
)
def test_the_steps_of_a_continued_run_are_those_made_and_those_that_are_left(
    clip, dataset, epochs, accumulated, batch_size, steps
):
    first = WithClip(clip, config(dataset))
    loader = first.train_dataloader()
    list(loader)
    next(iterator := iter(loader))
    next(iterator)
    position = first.state_dict()["position"] | {"steps": 7 if accumulated == 1 else 4}
    resumed = WithClip(clip, config(dataset, batch_size=batch_size))
    resumed.load_state_dict({"position": position})
    assert resumed.steps(epochs, accumulated) == steps


def test_the_fingerprint_follows_the_content_and_not_the_place(dataset, tmp_path):
    import shutil

    moved = shutil.copytree(dataset, tmp_path / "moved")
    assert data_fingerprint(config(moved)) == data_fingerprint(config(dataset, num_workers=3))
    other = tiny.write_dataset(tmp_path / "other", train=41)
    assert data_fingerprint(config(other)) != data_fingerprint(config(dataset))


# --- samples that cannot be read --------------------------------------------------------------------------------------


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(tiny.picture(tiny.COLOURS[number % 8], "circle", number))).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """40 JPEGs, of which three are broken, each in its way, and a retain split of 6 without fault."""
    folder = tmp_path_factory.mktemp("damaged")
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    ways = {
        5: lambda content: content[:200],
        17: lambda content: b"<html>not found</html>",
        30: lambda content: content[: len(content) // 2] + bytes(len(content) // 2),
    }
    for split, size in (("train", 40), ("retain", 6)):
        with ShardWriter(folder / f"{split}-00000", schema, made_from="test") as shard:
            for number in range(size):
                content = ways.get(number, bytes)(jpeg(number)) if split == "train" else jpeg(number)
                shard.add({"key": f"k{number}", "caption": f"picture {number}"}, content, "jpg")
    return folder


def lossy(clip: Clip, damaged: Path, **fields):
    return WithClip(clip, config(damaged, **({"max_broken": 0.1} | fields))).train_dataloader()


@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_another_sample_stands_in_for_one_that_cannot_be_read(clip, damaged, decode):
    loader = lossy(clip, damaged, decode=decode)
    for epoch in range(3):
        drawn = [loader.schedule.batch(epoch, number) for number in range(5)]
        read = batches(loader)
        stood_in = []
        for draws, batch in zip(drawn, read, strict=True):
            rows = batch["row"].tolist()
            assert [row for row, draw in zip(rows, draws, strict=True) if draw.row not in (5, 17, 30)] == [
                draw.row for draw in draws if draw.row not in (5, 17, 30)
            ]
            stood_in += [row for row, draw in zip(rows, draws, strict=True) if draw.row in (5, 17, 30)]
            said = clip.tokenizer([f"picture {row}" for row in rows])
            assert torch.equal(batch["tokens"], said[:, : batch["tokens"].shape[1]])
        assert len(stood_in) == 3
        assert {5, 17, 30}.isdisjoint(stood_in)


def test_a_broken_sample_is_named_once_with_its_file_and_key(clip, damaged, caplog):
    loader = lossy(clip, damaged, num_workers=2)
    for _ in range(2):
        batches(loader)
    told = [record.getMessage() for record in caplog.records if "stands in" in record.getMessage()]
    assert len(told) == 3
    assert all("\n" not in line and f"{damaged}/train-00000.tar: sample k" in line for line in told)
    assert {line.split("sample ")[1].split(":")[0] for line in told} == {"k5", "k17", "k30"}
    assert told[-1].endswith("(3 so far)")


def test_stand_ins_are_the_same_with_workers_and_after_a_resume(clip, damaged):
    expected = batches(lossy(clip, damaged))
    assert_same(batches(lossy(clip, damaged, num_workers=2)), expected)
    for taken in (1, 3):
        resumed = lossy(clip, damaged)
        resumed.load_state_dict(resumed.state_dict() | {"next_batch": taken})
        assert_same(batches(resumed), expected[taken:])


def test_stand_ins_are_drawn_anew_for_each_sample_pass_and_seed_until_one_can_be_read(clip, tmp_path):
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    with ShardWriter(tmp_path / "00000", schema, made_from="test") as shard:
        for number in range(40):  # every other one is broken
            shard.add({"key": f"k{number}", "caption": "x"}, jpeg(number) if number % 2 else b"", "jpg")
    seen = []
    for seed, turn in ((0, 0), (0, 1), (1, 0)):
        pairs = WithClip(clip, config(tmp_path), seed).train_dataloader().dataset
        read = pairs.__getitems__([Draw(row, turn) for row in range(0, 40, 2)])
        seen.append(read.batch["row"].tolist())
        assert all(row % 2 for row in seen[-1])
        assert len(set(seen[-1])) > 8  # of 20 drawn from 20
        assert len(read.broken) > 20  # what was to stand in and is broken counts, too
        assert {each.row for each in read.broken} == set(range(0, 40, 2))
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_for_the_first_sample_of_a_source_one_of_the_same_stands_in(clip, tmp_path):
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name / "00000", schema, made_from="test") as shard:
            for number in range(3):
                shard.add({"key": f"{name}{number}", "caption": "x"}, jpeg(number) if number else b"", "jpg")
    sources = [SourceConfig(path=tmp_path / name) for name in ("a", "b")]
    pairs = lossy(clip, tmp_path, sources=sources).dataset
    for turn in range(4):
        first, second = pairs.__getitems__([Draw(0, turn), Draw(3, turn)]).batch["row"].tolist()
        assert first in (1, 2)
        assert second in (4, 5)


def test_a_stand_in_is_of_the_same_source(clip, damaged, tmp_path):
    loader = lossy(clip, damaged, replay=0.25)
    drawn = [loader.schedule.batch(0, number) for number in range(len(loader))]
    for draws, batch in zip(drawn, batches(loader), strict=True):
        assert [row >= 40 for row in batch["row"].tolist()] == [draw.row >= 40 for draw in draws]
    other = tmp_path / "one"
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    with ShardWriter(other / "00000", schema, made_from="test") as shard:
        shard.add({"key": "sound", "caption": "x"}, jpeg(0), "jpg")
        shard.add({"key": "broken", "caption": "x"}, b"", "jpg")
    sources = [SourceConfig(path=damaged), SourceConfig(path=other)]
    rows = [row for _ in range(2) for batch in lossy(clip, damaged, sources=sources) for row in batch["row"].tolist()]
    assert rows.count(40) == 4
    assert 41 not in rows


def test_damage_in_the_text_of_a_very_large_dataset_costs_its_samples_alone(clip, tmp_path, monkeypatch, caplog):
    """Their captions stay in the tars, where a disk may have lost a block."""
    monkeypatch.setattr("curate.index.MANY_SAMPLES", 3)
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    with ShardWriter(tmp_path / "shards" / "train-00000", schema, made_from="test") as shard:
        for number in range(40):
            shard.add({"key": f"k{number}", "caption": f"picture {number}"}, jpeg(number), "jpg")
    tar = tmp_path / "shards" / "train-00000.tar"
    with tarfile.open(tar) as members:
        at = {member.name: member for member in members}
    content = bytearray(tar.read_bytes())
    content[at["k5.txt"].offset : at["k5.txt"].offset_data] = bytes(512)
    content[at["k9.json"].offset_data] = 0
    content[at["k12.txt"].offset_data] = 0xFF
    # The image, too, and the header that has the key.
    content[at["k20.jpg"].offset : at["k20.jpg"].offset_data + 100] = bytes(612)
    tar.write_bytes(content)
    loader = lossy(clip, tmp_path, max_broken=0.1)
    read = batches(loader)
    rows = [row for batch in read for row in batch["row"].tolist()]
    assert len(rows) == 40
    assert set(rows) <= set(range(40)) - {5, 9, 12, 20}
    for batch in read:
        said = clip.tokenizer([f"picture {row}" for row in batch["row"].tolist()])
        assert torch.equal(batch["tokens"], said[:, : batch["tokens"].shape[1]])
    told = sorted(record.getMessage() for record in caplog.records if "stands in" in record.getMessage())
    assert len(told) == 4
    assert sum(f"{tar}: the text at byte" in line and "is damaged" in line for line in told) == 3
    assert f"{tar}: sample at byte {at['k20.jpg'].offset_data:,}: the image cannot be decoded" in told[0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("allowed", [0.01, 0.05])
def test_more_broken_samples_than_allowed_stop_the_run(clip, damaged, num_workers, allowed):
    loader = lossy(clip, damaged, num_workers=num_workers, max_broken=allowed)
    words = rf"train-00000\.tar: sample k\d+: .* number {int(allowed * 40) + 1} in an epoch, more than data\.max_broken"
    with pytest.raises(InputError, match=words) as caught:
        batches(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_was_broken_before_a_resume_counts_in_the_rest_of_its_epoch_alone(clip, damaged, num_workers):
    whole = lossy(clip, damaged, num_workers=num_workers, max_broken=0.08)  # three of forty
    states = [whole.state_dict()]
    states += [whole.state_dict() for epoch in range(2) for _ in whole]
    broken = [number for state in states for number in state["num_broken"]]  # of one rank
    first = [broken[number] for number in range(5)]
    assert first == sorted(first)
    assert first[-1] > 0
    assert broken[5] == broken[10] == 0  # the next epoch begins
    for state in states[:5]:
        resumed = lossy(clip, damaged, num_workers=num_workers, max_broken=0.05)  # two
        resumed.load_state_dict(state)
        with pytest.raises(InputError, match="number 3 in an epoch, more than"):
            batches(resumed)
        assert (resumed.epoch, resumed.num_broken) == (0, 2)
    smaller = lossy(clip, damaged, num_workers=num_workers, max_broken=0.05, batch_size=4)
    smaller.load_state_dict(states[4])
    assert smaller.num_broken == 0  # of batches of that size another number was allowed
    second = lossy(clip, damaged, num_workers=num_workers)
    second.schedule = replace(second.schedule, world_size=2, rank=1)
    second.load_state_dict(second.state_dict() | {"num_broken": [0, 3]})
    assert second.num_broken == 3


def test_where_nothing_can_be_read_there_is_an_end(clip, tmp_path):
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    with ShardWriter(tmp_path / "00000", schema, made_from="test") as shard:
        for number in range(4):
            shard.add({"key": f"k{number}", "caption": "x"}, b"", "jpg")
    with pytest.raises(InputError, match=r"00000\.tar: sample k\d: .*of no known format.*nor can any other"):
        batches(lossy(clip, tmp_path, max_broken=0.99))


def test_validation_stops_at_an_image_that_cannot_be_read(clip, tmp_path):
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    for split in ("train", "val"):
        with ShardWriter(tmp_path / f"{split}-00000", schema, made_from="test") as shard:
            for number in range(4):
                content = jpeg(number)[:90] if (split, number) == ("val", 2) else jpeg(number)
                shard.add({"key": f"k{number}", "caption": "x"}, content, "jpg")
    loader = WithClip(clip, config(tmp_path, max_broken=0.9)).val_dataloader()
    with pytest.raises(InputError, match=r"val-00000\.tar: sample k2: .*; build or copy the dataset again"):
        batches(loader)


# --- validation, and what is missing ----------------------------------------------------------------------------------


def test_validation_is_the_val_split_in_order_shared_between_ranks(clip, dataset):
    loader = WithClip(clip, config(dataset, eval_batch_size=3)).val_dataloader()
    assert [batch["row"].tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert len(loader) == 3
    ranks = [WithClip(clip, config(dataset), world=(3, rank)).val_dataloader() for rank in range(3)]
    assert [[batch["row"].tolist() for batch in rank] for rank in ranks] == [[[0, 3]], [[1, 4]], [[2, 5]]]


def test_validation_sees_whole_images_as_the_clip_does_each_time(clip, dataset):
    loader = WithClip(clip, config(dataset, crop_scale=(0.3, 0.5))).val_dataloader()
    index = read_index(dataset, "val")
    places = index.table.select(["tar", "image_offset", "image_size"]).to_pylist()
    stored = [index.tars[p["tar"]].read_bytes()[p["image_offset"] :][: p["image_size"]] for p in places]
    seen = [clip.preprocess(Image.open(io.BytesIO(content)).convert("RGB")) for content in stored]
    for _ in range(2):
        (batch,) = loader
        assert torch.equal(batch["pixels"], torch.stack(seen))


def test_errors_say_what_is_missing(clip, dataset, tmp_path):
    with pytest.raises(InputError, match="no list there"):
        WithClip(clip, config(tmp_path))
    bare = tiny.write_dataset(tmp_path / "bare", train=1, val=0, retain=0)
    assert not has_split(bare, "retain")
    with pytest.raises(InputError, match="1 training pairs; needs at least 2"):
        WithClip(clip, config(bare))
    with pytest.raises(
        ConfigError, match=r"has no retain split; set data\.replay to 0, or name a data\.replay_dataset"
    ):
        WithClip(clip, config(bare, replay=0.1))


def test_fields_can_be_given_by_name():
    data = CLIPDataModule(dataset="somewhere", batch_size=4)
    assert data.config == DataConfig(dataset=Path("somewhere"), batch_size=4)
