"""`finetune fit` on several sources, as a user runs it: the plan, a kill and going on, mistakes with their lines."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from finetune.cli import main
from finetune.export import export
from tests.finetune import tiny
from tests.finetune.fitted import wait_until_free
from tests.finetune.test_batches import with_embeddings
from tests.finetune.warm import Warm, warm

LONG = " ".join(["word"] * 30)


@pytest.fixture(scope="module")
def folder(dataset, architectures, tmp_path_factory) -> Path:
    """A dataset, a CSV of paths with two captions of each image, and class folders; a configuration over all three."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(dataset, folder / "dataset")
    lines = ["image,title,height"]
    for number, colour in enumerate(tiny.COLOURS):
        for path in (folder / f"{colour}.png", folder / "classes" / colour / "1.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tiny.picture(colour, "circle", 100 + number))
        lines += [f"{colour}.png,a {colour} thing,40", f"{colour}.png,{LONG},40", f"{colour}.png,small,4"]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    sources = [
        {"path": "dataset", "where": "caption != 'a red circle'"},
        {"path": "pairs.csv", "caption": "title", "weight": 2.0, "where": "CAST(height AS INT) > 9"},
        {"path": "classes", "weight": 0.5, "templates": ["a photo of a {}.", "one {} thing"]},
    ]
    config = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
        "model": {"clip": {"name": architectures["tiny-vit"], "pretrained": None}, "adapter": {"kind": "full"}},
        "data": {"dataset": "dataset", "sources": sources, "batch_size": 8, "num_workers": 1},
        "checkpoint_every_n_steps": 1,
    }
    (folder / "domain.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def command() -> Iterator[Warm]:
    with warm("lightning", "open_clip", "finetune.fit") as started:
        yield started


def test_a_killed_run_on_several_sources_ends_with_the_same_weights(folder, command):
    fit = ["fit", "--config", "domain.yaml", "--out"]
    whole = command(folder, [*fit, "whole"])
    assert whole.status == 0, whole.error
    # 37 of 40 are not red circles, 8 images twice, 8 classes of which half are drawn: 57 an epoch.
    assert "dataset, pairs.csv, classes: 53 pairs" in whole.error
    assert "steps   14 (2 epochs of 7 batches)" in whole.error
    assert "texts   8 of 69 captions (11.6%) are over 16 tokens and are cut" in whole.error
    running, last = command.start(folder, [*fit, "killed"]), folder / "killed" / "checkpoints" / "last.ckpt"
    until = time.monotonic() + 100
    while not last.exists() and time.monotonic() < until:
        time.sleep(0.005)
    running.kill()
    wait_until_free(folder / "killed")
    assert not (folder / "killed" / "finished.json").exists()
    again = command(folder, [*fit, "killed"])
    assert "going on from" in again.error
    first, second = (
        torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]  # noqa: TID251 - ours
        for name in ("whole", "killed")
    )
    assert all(torch.equal(second[name], weight) for name, weight in first.items())
    export(folder / "whole", folder / "clip")
    assert "dataset, pairs.csv, classes (53 pairs)" in (folder / "clip" / "README.md").read_text()


@pytest.mark.parametrize(
    ("number", "key", "value", "told"),
    [
        (1, "path", "paris.csv", "data.sources[1].path: paris.csv: no such file"),
        (2, "weight", 0, "data.sources[2].weight: expected above 0"),
        (2, "templates", ["a photo"], "data.sources[2].templates: 'a photo' needs exactly one {}"),
        (0, "wher", "true", "no key 'data.sources[0].wher'. Did you mean 'data.sources[0].where'?"),
        (1, "caption", "titel", "data.sources[1].caption: pairs.csv has no column 'titel'. Did you mean 'title'?"),
        (0, "where", "captoin = 'x'", "data.sources[0].where: no column 'captoin'"),
    ],
)
def test_a_mistake_in_a_source_is_one_line(folder, tmp_path, monkeypatch, capsys, number, key, value, told):
    config = yaml.safe_load((folder / "domain.yaml").read_text())
    config["data"]["sources"][number][key] = value
    (folder / "wrong.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(folder)
    assert main(["fit", "--config", "wrong.yaml", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("finetune: wrong.yaml:")
    assert told in said[-1]
    assert len(said) <= 3


def test_ranks_agree_on_hard_negatives_of_which_the_first_has_planned(tmp_path, architectures, command):
    dataset = tiny.write_dataset(tmp_path / "dataset", train=32, val=8, retain=0)
    with_embeddings(dataset, [f"train{number:06d}" for number in range(32)])
    clip = f"--model.clip.name {architectures['tiny-vit']} --model.clip.pretrained null"
    data = f"--data.dataset {dataset} --data.batches hard_negatives --data.batch_size 4 --data.num_workers 0"
    trainer = "--trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp --trainer.max_steps 2"
    done = command(tmp_path, f"fit --out run {clip} {data} {trainer}".split(), ranks=2)
    assert done.status == 0, done.error
