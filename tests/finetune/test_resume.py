"""Runs that are killed at random moments, again and again, end with the weights of one that was not.

The soak (`pytest -m slow tests/finetune/test_resume.py`): 20 kills in each of {full, LoRA} x {0, 2 workers} x {1, 2
ranks}. CLIPTAILOR_KILLS sets another number.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.config import (
    AdapterConfig,
    ClipConfig,
    DataConfig,
    FitConfig,
    KeepConfig,
    ModelConfig,
    OptimizerConfig,
    TrainerConfig,
)

KILLS = int(os.environ.get("CLIPTAILOR_KILLS", "20"))


def configured(
    dataset: Path, architecture: str, out: Path, kind: str, workers: int, ranks: int, steps: int
) -> FitConfig:
    """Everything that draws random numbers, a checkpoint every other step, validations between and at the ends."""
    return FitConfig(
        out=out,
        seed_everything=5,
        checkpoint_every_n_steps=2,
        trainer=TrainerConfig(
            max_steps=steps,
            accelerator="cpu",
            devices=ranks,
            strategy="ddp" if ranks > 1 else "auto",
            log_every_n_steps=1,
            val_check_interval=9,
        ),
        model=ModelConfig(
            clip=ClipConfig(name=architecture, pretrained=None),
            adapter=AdapterConfig(rank=2, dropout=0.3) if kind == "lora" else AdapterConfig(kind="full"),
            optimizer=OptimizerConfig(lr=1e-2 if kind == "lora" else 1e-3),
        ),
        data=DataConfig(dataset=dataset, batch_size=5, replay=0.2, num_workers=workers, crop_scale=(0.5, 1.0)),
        keep=KeepConfig(interpolate=0),
    )


def weights(config: FitConfig) -> dict[str, torch.Tensor]:
    path = config.out / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]  # noqa: TID251 - written by the test


def check(config: FitConfig, tmp_path: Path, kills: int, seed: int) -> None:
    unbroken, broken = (replace(config, out=tmp_path / name) for name in ("unbroken", "broken"))
    files = []
    for each in (unbroken, broken):
        files.append(tmp_path / f"{each.out.name}.pickle")
        files[-1].write_bytes(pickle.dumps(each))
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), *map(str, files), str(kills), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    ours, expected = weights(broken), weights(unbroken)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert (broken.out / "metrics.csv").read_text() == (unbroken.out / "metrics.csv").read_text()


def test_killed_at_random_moments_a_run_ends_with_the_same_weights(dataset, architectures, tmp_path):
    check(configured(dataset, architectures["tiny-vit"], tmp_path, "lora", 0, 1, 36), tmp_path, 2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_soak(dataset, architectures, tmp_path, kind, workers, ranks):
    config = configured(dataset, architectures["tiny-vit"], tmp_path, kind, workers, ranks, 15 * KILLS)
    check(config, tmp_path, KILLS, seed=hash((kind == "full", workers, ranks)))
