"""Weights sharded over two processes (FSDP2 on gloo): what DDP gives, through `finetune fit` itself."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
import yaml

from finetune.export import export
from tests.finetune.fitted import wait_until_free
from tests.finetune.warm import Warm, warm

STEPS = 6
Weights = dict[str, torch.Tensor]


def fit(folder: Path, name: str, dataset: Path, architecture: str, *options: str) -> str:
    """Run `finetune fit` on two devices to its end; Lightning starts the second process."""
    command = [sys.executable, "-m", "finetune", *words_of(folder, name, dataset, architecture, *options)]
    environment = {**os.environ, "PYTHONWARNINGS": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def words_of(folder: Path, name: str, dataset: Path, architecture: str, *options: str) -> list[str]:
    config = {
        "out": str(folder / name),
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "devices": 2, "val_check_interval": 3},
        "model": {"clip": {"name": architecture, "pretrained": None}, "optimizer": {"lr": 1e-2}},
        "data": {"dataset": str(dataset), "batch_size": 8, "num_workers": 0},
        "keep": {"interpolate": 2},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(path), *options]


def weights(run: Path, name: str = "last") -> Weights:
    found: Weights = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]  # noqa: TID251
    return found


def assert_close(found: Weights, expected: Weights, atol: float) -> None:
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        if not key.endswith("k_proj.bias"):  # its gradient is nothing but rounding, which Adam makes whole steps of
            torch.testing.assert_close(found[key], weight, rtol=0, atol=atol, msg=key)


@pytest.fixture(scope="module")
def command() -> Iterator[Warm]:
    with warm("lightning", "open_clip", "finetune.fit") as started:
        yield started


@pytest.fixture(scope="module")
def runs(dataset, architectures, tmp_path_factory, command) -> Path:
    """The same run under both strategies, all weights trained."""
    folder = tmp_path_factory.mktemp("sharded")
    options = ["--model.adapter.kind", "full", "--trainer.strategy"]
    fit(folder, "ddp", dataset, architectures["tiny-vit"], *options, "ddp")
    done = command(folder, words_of(folder, "fsdp2", dataset, architectures["tiny-vit"], *options, "fsdp2"), ranks=2)
    assert done.status == 0, done.error[-3000:]
    return folder


def test_sharded_weights_end_where_those_of_ddp_do(runs):
    # DDP's captions are cut behind their ends: sums in another order, which Adam's first steps make larger.
    assert_close(weights(runs / "fsdp2"), weights(runs / "ddp"), atol=1e-4)


def test_figures_before_and_after_are_those_of_ddp(runs):
    found, expected = (json.loads((runs / run / "evaluation.json").read_text()) for run in ("fsdp2", "ddp"))
    assert found["before"] == expected["before"]
    assert found["after"].keys() == expected["after"].keys()
    assert found["facts"]["trainable_parameters"] == expected["facts"]["trainable_parameters"]


def test_a_killed_sharded_run_goes_on_from_its_checkpoint(runs, dataset, architectures, command):
    options = ["--model.adapter.kind", "full", "--trainer.strategy", "fsdp2", "--checkpoint_every_n_steps", "2"]
    words = words_of(runs, "again", dataset, architectures["tiny-vit"], *options)
    running, last = command.start(runs, words, ranks=2), runs / "again" / "checkpoints" / "last.ckpt"
    until = time.monotonic() + 100
    while not last.exists() and time.monotonic() < until:
        time.sleep(0.01)
    running.kill()
    wait_until_free(runs / "again")
    assert not (runs / "again" / "finished.json").exists()
    assert torch.load(last, weights_only=True)["global_step"] < STEPS  # noqa: TID251 - written above
    done = command(runs, words, ranks=2)
    assert done.status == 0, done.error[-3000:]
    assert "going on from" in done.error
    assert_close(weights(runs / "again"), weights(runs / "fsdp2"), atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_another_strategys_checkpoint_is_gone_on_with(dataset, architectures, command, tmp_path, kind):
    """Its moments belong to the same weights, and the rate falls over the steps left, of any size."""
    given = [dataset, architectures["tiny-vit"], "--model.adapter.kind", kind, "--trainer.devices", "1"]
    epochs = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--checkpoint_every_n_steps", "4"]

    def run(name: str, *options: str) -> list[str]:
        done = command(tmp_path, [*words_of(tmp_path, name, *given), *epochs, *options])
        assert done.status == 0, done.error[-3000:]
        with (tmp_path / name / "metrics.csv").open() as file:
            return [row["lr-AdamW"] for row in csv.DictReader(file) if row["lr-AdamW"]]

    often = ["--trainer.log_every_n_steps", "1"]
    run("whole", *often)
    previous = tmp_path / "whole" / "checkpoints" / "previous.ckpt"
    taken = ["--ckpt_path", str(previous), *often]
    assert 0 < torch.load(previous, weights_only=True)["global_step"] < 10  # noqa: TID251 - our own
    run("sharded", *taken, "--trainer.strategy", "fsdp2")
    assert_close(weights(tmp_path / "sharded"), weights(tmp_path / "whole"), atol=1e-4)
    rates = [
        run(f"{strategy}-smaller", *taken, "--data.batch_size", "4", "--trainer.strategy", strategy)
        for strategy in ("auto", "fsdp2")
    ]
    assert rates[0] == rates[1]
    assert 0 < float(rates[0][-1]) < float(rates[0][-4])


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_sharded_lora_trains_and_is_exported(runs, dataset, architectures, command, variant):
    """LoRA, in few passes over its layers; and DoRA, of whose weights' lengths each process has a part."""
    given = (dataset, architectures["tiny-vit"], "--model.adapter.rank", "2", "--model.adapter.variant", variant)
    options = ["--trainer.strategy", "fsdp2", "--model.compute.micro_batch_size", "3"]
    assert command(runs, words_of(runs, variant, *given, *options), ranks=2).status == 0
    whole = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--data.batch_size", "16"]
    assert command(runs, words_of(runs, f"{variant}-alone", *given, *whole)).status == 0
    assert_close(weights(runs / variant), weights(runs / f"{variant}-alone"), atol=1e-4)
    export(runs / variant, runs / f"{variant}-exported")
    open_clip.create_model(f"local-dir:{runs / f'{variant}-exported'}")


@pytest.mark.parametrize(
    ("option", "value"),
    [("model.optimizer.ema", "0.9"), ("model.compute.compile", "true"), ("trainer.gradient_clip_algorithm", "value")],
)
def test_what_needs_all_weights_is_refused(dataset, architectures, tmp_path, command, option, value):
    options = [f"--{option}", value, "--trainer.strategy", "fsdp2"]
    told = command(tmp_path, words_of(tmp_path, "run", dataset, architectures["tiny-vit"], *options))
    assert told.status == 2
    assert f"{option}: not with trainer.strategy fsdp2" in told.error
