"""Embeddings of a locked tower, kept: the same losses, nothing decoded again, nothing taken that is not the same."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from curate.errors import InputError
from curate.index import read_index
from finetune import features
from finetune.config import AdapterConfig, DataConfig, FitConfig, LossConfig, SourceConfig, TrainerConfig
from finetune.features import Features, compute
from finetune.fit import FEATURES, fit, plan
from finetune.pixels import EvaluationView
from finetune.plan import rows
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
    plain = EvaluationView.__call__

    def counted(self: EvaluationView, image: Any, seed: Any) -> torch.Tensor:
        seen[0] += 1
        return plain(self, image, seed)

    monkeypatch.setattr(EvaluationView, "__call__", counted)
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
    assert computed(replace(first, trainer=replace(first.trainer, precision="bf16-mixed"))) == 24
    assert computed(first) == 0
    tar = plain_dataset / "shards" / "train-00000.tar"
    status = tar.stat()
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert computed(first) == 24  # a file that was written anew


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


def test_a_short_run_and_a_full_disk_keep_nothing(plain_dataset, architectures, tmp_path, monkeypatch):
    config = config_of(tmp_path / "run", plain_dataset, architectures["tiny-vit"])
    short = replace(config, trainer=replace(config.trainer, max_steps=2))
    assert "the run ends before it has seen them all" in dict(rows(plan(short)))["locked"]
    monkeypatch.setattr(features, "LARGEST_SHARE", 0)
    assert "no room" in dict(rows(plan(config)))["locked"]


def test_the_start_of_a_distillation_takes_them_too(plain_dataset, architectures, tmp_path):
    torch.manual_seed(0)
    from curate.clip import load_clip

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
