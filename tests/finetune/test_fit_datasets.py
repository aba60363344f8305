"""A run on a dataset that img2dataset made; what happens where a dataset lacks what is asked of it; the last step."""

from __future__ import annotations

import csv
import json
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
import torch

from curate.errors import ConfigError, InputError
from finetune.cli import main
from finetune.config import AdapterConfig, DataConfig
from finetune.fit import fit
from tests.finetune import tiny
from tests.finetune.fitted import tiny_config


@pytest.fixture
def config(dataset, architectures, tmp_path):
    return tiny_config(tmp_path / "run", dataset, architectures["tiny-vit"], AdapterConfig(kind="full"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """Shards in img2dataset's layout and columns: no offsets, failed rows in the Parquet alone, keys with zeros."""
    folder = tmp_path_factory.mktemp("img2dataset")
    for shard in range(2):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(12):
                key, colour = f"{shard:05d}{number:04d}", tiny.COLOURS[number % 8]
                failed = number == 5
                row = {"url": f"http://a/{key}.jpg", "key": key, "caption": f"a {colour} circle {shard}"}
                row["caption"] = None if number == 7 else row["caption"]
                row["status"] = "failed_to_download" if failed else "success"
                row |= {"error_message": "404" if failed else None, "width": 48, "height": 40, "sha256": "0"}
                rows.append(row)
                if failed:
                    continue
                content = {
                    "jpg": tiny.picture(colour, "circle", 100 * shard + number),
                    "json": json.dumps(row).encode(),
                }
                content |= {"txt": row["caption"].encode()} if row["caption"] else {}
                for extension, value in content.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(value)
                    tar.addfile(member, BytesIO(value))
        pd.DataFrame(rows).to_parquet(folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def test_a_dataset_of_img2dataset_trains_and_evaluates(config, foreign, capsys):
    config = replace(config, data=replace(config.data, dataset=foreign, num_workers=1))
    result = fit(config)
    assert result.best is None
    assert json.loads(result.evaluation.read_text())["facts"]["train_samples"] == 22
    sets = ["--evaluate.retrieval.theirs", str(foreign)]
    assert main(["evaluate", "--run", str(config.out), *sets, "--json", "--device", "cpu"]) == 0
    figures = next(iter(json.loads(capsys.readouterr().out).values()))
    assert figures["theirs/image_to_text/recall@1"]["n"] == 22
    assert main(["test", "--run", str(config.out)]) == 2
    assert (
        "no test split to evaluate on; splits there: none. All of a folder without splits:" in capsys.readouterr().err
    )


def test_replay_without_a_retain_split_says_what_to_set_and_leaves_the_folder_free(config, foreign):
    asked = replace(config, data=replace(config.data, dataset=foreign, replay=0.2))
    with pytest.raises(
        ConfigError, match=r"has no retain split; set data\.replay to 0, or name a data\.replay_dataset"
    ):
        fit(asked)
    assert not fit(replace(config, data=replace(config.data, dataset=foreign))).resumed


def test_a_run_that_never_took_a_step_does_not_hold_its_folder(config, tmp_path):
    wrong = replace(config.model, adapter=AdapterConfig(targets=["conv"]))
    with pytest.raises(Exception, match="'conv' names no layer"):
        fit(replace(config, model=wrong))
    assert (config.out / "config.yaml").is_file()
    assert fit(config).last.is_file()


def test_a_dataset_that_is_not_there_is_told_before_anything_is_loaded(config, tmp_path):
    clip = replace(config.model.clip, name="no-such-clip")
    nowhere = replace(config, model=replace(config.model, clip=clip), data=DataConfig(dataset=tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"nowhere: no such file or folder; expected a dataset"):
        fit(nowhere)


@pytest.mark.parametrize(
    ("trainer", "validated"),
    [
        ({"max_steps": 7, "val_check_interval": 3}, [2, 5, 6]),  # 5 batches an epoch: counted over epochs
        ({"max_steps": 4, "val_check_interval": 500}, [3]),
        ({"max_steps": -1, "max_epochs": 2, "val_check_interval": None, "check_val_every_n_epoch": 1000}, [9]),
        ({"max_steps": -1, "max_epochs": 1, "val_check_interval": 0.4}, [1, 3, 4]),
    ],
)
def test_the_last_step_is_validated_whatever_the_interval(config, trainer, validated):
    config = replace(config, trainer=replace(config.trainer, log_every_n_steps=1, **trainer))
    fit(config)
    with (config.out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == validated
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(validated[-1] + 1))
    recalls = {int(row["step"]): float(row["val/image_to_text/recall@1"]) for row in rows if row["val/loss"]}
    best = torch.load(config.out / "checkpoints/best.ckpt", weights_only=True)  # noqa: TID251 - written by this test
    assert recalls[best["global_step"] - 1] == max(recalls.values())
    last = torch.load(config.out / "checkpoints/last.ckpt", weights_only=True)  # noqa: TID251 - written by this test
    assert last["global_step"] == validated[-1] + 1


def test_a_clip_that_brings_its_weights_is_named_without_the_tag_of_others(dataset, architectures, tmp_path):
    from curate.clip import load_clip
    from finetune.export import write_open_clip

    write_open_clip(load_clip(architectures["tiny-vit"], device="cpu"), tmp_path / "clip")
    start = tiny_config(
        tmp_path / "run", dataset, f"local-dir:{tmp_path / 'clip'}", AdapterConfig(kind="full"), steps=2
    )
    start = replace(start, model=replace(start.model, clip=replace(start.model.clip, pretrained="openai")))
    facts = json.loads(fit(start).evaluation.read_text())["facts"]
    assert facts["model"] == f"local-dir:{tmp_path / 'clip'}"
