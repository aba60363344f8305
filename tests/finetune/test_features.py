"""Embeddings of a locked tower, kept: the same losses, nothing decoded again, nothing taken that is not the same."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pyarrow as pa
import pytest
import torch

from curate.clip import load_clip
from curate.errors import InputError
from curate.index import read_index
from finetune import features
from finetune.config import AdapterConfig, DataConfig, FitConfig, LossConfig, SourceConfig, TrainerConfig
from finetune.data import CLIPDataModule
from finetune.features import Features, compute, key_of
from finetune.fit import FEATURES, _prepare, fit, plan
from finetune.module import CLIPModule
from finetune.pixels import EvaluationView
from finetune.plan import rows
from finetune.sources import split_pairs
from tests.finetune import tiny
from tests.finetune.fitted import tiny_config

FIXED = (1.0, 1.0)


@pytest.fixture(scope="module")
def plain_dataset(tmp_path_factory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("features"), train=24, val=0, retain=8)


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    """How many images training decodes."""
    seen = [0]
    plain = EvaluationView.prepare

    def counted(self: EvaluationView, content: bytes, seed: Any) -> Any:
        seen[0] += 1
        return plain(self, content, seed)

    monkeypatch.setattr(EvaluationView, "prepare", counted)
    return seen


def config_of(out: Path, dataset: Path, architecture: str, lock: str = "image", **data: Any) -> FitConfig:
    """Three epochs of three batches."""
    made = tiny_config(out, dataset, architecture, AdapterConfig(kind="full", lock=[lock]))
    given = DataConfig(**{"dataset": dataset, "batch_size": 8, "num_workers": 0, "crop_scale": FIXED} | data)
    trainer = TrainerConfig(max_epochs=3, accelerator="cpu", enable_progress_bar=False, log_every_n_steps=1)
    return replace(made, data=given, trainer=trainer, keep=replace(made.keep, interpolate=0))


def losses(config: FitConfig) -> list[float]:
    fit(config)
    with (config.out / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def facts(config: FitConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.out / "evaluation.json").read_text())["facts"]["features"]
    return found


@pytest.mark.parametrize("lock", ["image", "text"])
def test_losses_are_those_of_a_run_that_computes_them_in_each_step(
    lock, plain_dataset, architectures, tmp_path, opened
):
    architecture = architectures["tiny-vit"]
    more = {"replay": 0.25}
    off = config_of(tmp_path / "off" / "run", plain_dataset, architecture, lock, cache_features="never", **more)
    kept = config_of(tmp_path / "kept" / "run", plain_dataset, architecture, lock, **more)
    expected, decoded = losses(off), opened[0]
    found, opened[0] = losses(kept), opened[0] - decoded
    assert len(expected) == 12  # of 6 and 2 replayed
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)  # other rows, other rounding, a large rate
    assert expected[0] != expected[-1]
    assert not (off.out.parent / FEATURES).exists()
    assert {name: facts(kept)[name] for name in ("tower", "embeddings", "computed", "spared")} == {
        "tower": lock, "embeddings": 32, "computed": 32, "spared": 96 - 32,
    }  # fmt: skip
    assert decoded == 96
    assert opened[0] == (32 if lock == "image" else 96)


def test_later_runs_take_what_is_there_and_nothing_that_is_not_the_same(plain_dataset, architectures, tmp_path, opened):
    """The untouched weights are those of the seed."""
    architecture = architectures["tiny-vit"]
    first = config_of(tmp_path / "first", plain_dataset, architecture)
    (told,) = [text for label, text in rows(plan(first)) if label == "locked"]
    assert "24 of them computed once, before the first step" in told
    expected = losses(first)
    opened[0] = 0
    second = replace(first, out=tmp_path / "second")
    (told,) = [text for label, text in rows(plan(second)) if label == "locked"]
    assert told.endswith("all there already")
    assert losses(second) == expected
    assert facts(second)["computed"] == opened[0] == 0

    def computed(config: FitConfig) -> int:
        (told,) = [text for label, text in rows(plan(config)) if label == "locked"]
        assert told.startswith("image tower, 24 embeddings kept in ")
        return int(told.rpartition(": ")[2].split()[0].replace("all", "0"))

    assert computed(replace(first, seed_everything=5)) == 24  # other weights
    other = tmp_path / "tiny-vit.json"
    told = json.loads(Path(architecture).read_text())
    other.write_text(json.dumps(told | {"quick_gelu": not told.get("quick_gelu", False)}))
    clip = replace(first.model.clip, name=str(other))
    assert computed(replace(first, model=replace(first.model, clip=clip))) == 24  # the same weights
    assert computed(replace(first, trainer=replace(first.trainer, precision="bf16-mixed"))) == 24
    assert computed(first) == 0
    tar = plain_dataset / "shards" / "train-00000.tar"
    status = tar.stat()
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert computed(first) == 24  # a file that was written anew


def test_what_is_said_in_another_template_is_computed_again(plain_dataset, architectures, tmp_path):
    def config(template: str, **data: Any) -> FitConfig:
        source = SourceConfig(path=plain_dataset, templates=[template])
        out = tmp_path / f"{template[:2]}{len(data)}"
        return config_of(out, plain_dataset, architectures["tiny-vit"], "text", sources=[source], **data)

    losses(config("a {}"))
    (told,) = [text for label, text in rows(plan(config("the {}"))) if label == "locked"]
    assert "24 of them computed once" in told
    in_each_step = losses(config("the {}", cache_features="never"))
    assert losses(config("the {}")) == pytest.approx(in_each_step, abs=1e-5)


def test_embeddings_of_text_are_those_of_these_captions(plain_dataset, architectures):
    """One that is written over by another of its length leaves the file as long, and maybe as old, as it was."""
    model = load_clip(architectures["tiny-vit"], device="cpu").model
    index = split_pairs(plain_dataset, "train")
    said, names = index.table["captions"].to_pylist(), index.table.column_names
    said[3] = [said[3][0].replace("circle", "square")]
    column = pa.array(said, index.table.schema.field("captions").type)
    other = replace(index, table=index.table.set_column(names.index("captions"), "captions", column))
    assert key_of("text", model, other) != key_of("text", model, index)
    assert key_of("image", model, other) == key_of("image", model, index)


@pytest.mark.parametrize("other", [{"mean": (0.5, 0.5, 0.5)}, {"std": (0.3, 0.3, 0.3)}, {"interpolation": "bilinear"}])
def test_what_is_preprocessed_in_another_way_is_computed_again(plain_dataset, architectures, tmp_path, other):
    config = config_of(tmp_path / "run", plain_dataset, architectures["tiny-vit"])
    module, data, trainer = _prepare(config)
    data.trainer = trainer
    data.setup()
    kept = data.features(module, trainer)
    assert kept == data.features(module, trainer)
    module.clip.preprocess_cfg |= other
    assert data.features(module, trainer).folder != kept.folder


@pytest.mark.parametrize(
    ("lock", "data", "told"),
    [
        ("image", {"crop_scale": (0.9, 1.0)}, "data.crop_scale: [0.9, 1.0] shows it another crop each time"),
        ("text", {"templates": ["a {}", "the {}"]}, "one of several templates each time"),
        ("image", {"cache_features": "never"}, "data.cache_features is never"),
    ],
)
def test_what_is_random_or_not_wanted_is_not_kept_and_told(
    lock, data, told, plain_dataset, architectures, tmp_path, monkeypatch
):
    if templates := data.pop("templates", None):
        data["sources"] = [SourceConfig(path=plain_dataset, templates=templates)]
    config = config_of(tmp_path / "run", plain_dataset, architectures["tiny-vit"], lock, **data)
    (text,) = [text for label, text in rows(plan(config)) if label == "locked"]
    assert text.startswith(f"{lock} tower, computed in each step: ")
    assert told in text


def test_one_sample_with_several_captions_is_enough_for_none_to_be_kept(plain_dataset, architectures, tmp_path):
    for colour in ("red", "blue", "green"):
        (tmp_path / f"{colour}.png").write_bytes(tiny.picture(colour, "circle", 0))
    table = tmp_path / "pairs.csv"
    one_each = "image,caption\nred.png,a red disc\nblue.png,a blue disc\ngreen.png,a green disc\n"
    sources = [SourceConfig(path=table)]
    config = config_of(tmp_path / "run", plain_dataset, architectures["tiny-vit"], "text", sources=sources)
    table.write_text(one_each)
    assert dict(rows(plan(config)))["locked"].startswith("text tower, 3 embeddings kept in ")
    table.write_text(f"{one_each}red.png,fire\n")
    told = "text tower, computed in each step: a sample has several captions, of which one is drawn"
    assert dict(rows(plan(config)))["locked"].startswith(told)


def test_a_short_run_and_a_full_disk_keep_nothing(plain_dataset, architectures, tmp_path, monkeypatch):
    config = config_of(tmp_path / "run", plain_dataset, architectures["tiny-vit"])
    short = replace(config, trainer=replace(config.trainer, max_steps=2))
    assert "the run ends before it has seen them all" in dict(rows(plan(short)))["locked"]
    monkeypatch.setattr(features, "LARGEST_SHARE", 0)
    assert "no room" in dict(rows(plan(config)))["locked"]


def test_devices_see_a_set_together(plain_dataset, architectures, tmp_path):
    config = config_of(tmp_path / "run", plain_dataset, architectures["tiny-vit"])
    module = CLIPModule(config.model.clip, config.model.adapter)
    trainer = lightning.Trainer(
        accelerator="cpu", strategy="ddp", devices=2, max_epochs=1, logger=False, enable_checkpointing=False
    )
    for rank in (0, 1):  # each sees half of it
        data = CLIPDataModule(config.data, features=tmp_path / "features")
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, num_nodes=1, lightning_module=module)
        data.setup()
        assert data.locked_tower(module, trainer) == ("image", None)


def test_the_start_of_a_distillation_takes_them_too(plain_dataset, architectures, tmp_path):
    torch.manual_seed(0)
    torch.save(load_clip(architectures["tiny-vit"], device="cpu").model.state_dict(), tmp_path / "w.pt")

    def held(name: str, keep: str) -> FitConfig:
        made = config_of(tmp_path / name / "run", plain_dataset, architectures["tiny-vit"], cache_features=keep)
        clip = replace(made.model.clip, pretrained=str(tmp_path / "w.pt"))
        loss = LossConfig(distill_feature=1.0, distill_logit=0.5)
        return replace(made, model=replace(made.model, clip=clip, loss=loss))

    np.testing.assert_allclose(losses(held("a", "auto")), losses(held("b", "off")), rtol=0, atol=2e-6)


def test_processes_share_the_files_and_a_killed_run_computes_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "ROWS", 10)
    store = Features(tmp_path / "key", "image", 34, 3)
    asked: list[int] = []

    def batches(rows: range) -> Any:
        for row in rows:
            asked.append(row)
            if row == 25:
                raise KeyboardInterrupt
            yield torch.full((1, 3), float(row)), [-row]

    compute(store, batches, rank=1, world_size=2)  # files 1 and 3
    assert asked == [*range(10, 20), *range(30, 34)]
    with pytest.raises(KeyboardInterrupt):
        compute(store, batches)
    assert store.missing == [range(20, 30)]
    assert [path.name for path in sorted(store.folder.iterdir())] == ["00000.npy", "00001.npy", "00003.npy"]
    compute(store, lambda rows: iter([(torch.arange(20.0, 30.0)[:, None].expand(-1, 3), range(-20, -30, -1))]))
    embeddings, ids = store.read([33, 0, 25, 9])
    assert embeddings.tolist() == [[33.0] * 3, [0.0] * 3, [25.0] * 3, [9.0] * 3]
    assert ids == [-33, 0, -25, -9]


def test_of_an_image_that_cannot_be_read_another_sample_s_embedding_is_taken(architectures, tmp_path, caplog):
    dataset = tiny.write_dataset(tmp_path / "dataset", train=24, val=0, retain=0)
    index = read_index(dataset, "train")
    tar, offset, size, key = (index.table[name][5].as_py() for name in ("tar", "image_offset", "image_size", "key"))
    with index.tars[tar].open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    for name in ("first", "second"):  # the second takes what the first has kept
        config = config_of(tmp_path / name, dataset, architectures["tiny-vit"], max_broken=0.1)
        caplog.clear()
        assert np.isfinite(losses(config)).all()
        assert facts(config)["computed"] == (24 if name == "first" else 0)
        told = [record.getMessage() for record in caplog.records if "stands in" in record.getMessage()]
        assert told
        assert all(f"{index.tars[tar]}: sample {key}" in line for line in told)
    with pytest.raises(InputError, match=r"data\.max_broken allows"):
        fit(config_of(tmp_path / "third", dataset, architectures["tiny-vit"], max_broken=0.01))
    fresh = config_of(tmp_path / "fresh" / "run", dataset, architectures["tiny-vit"], max_broken=0.01)
    with pytest.raises(InputError, match=r"data\.max_broken allows"):
        fit(fresh)
    assert not list(fresh.out.parent.rglob("*.npy"))  # while they were computed
