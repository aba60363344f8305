"""A real, short training run on the tiny dataset."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from curate.errors import Busy
from finetune.config import (
    AdapterConfig,
    ClipConfig,
    DataConfig,
    EvaluateConfig,
    FitConfig,
    ModelConfig,
    OptimizerConfig,
    TrainerConfig,
    ZeroShotConfig,
)
from finetune.fit import fit
from finetune.folder import only_process
from tests.finetune import tiny


def fit_tiny(out: Path, dataset: Path, architecture: str, adapter: AdapterConfig, *, steps: int = 6) -> FitConfig:
    """Train `tiny_config` into `out/run`; evaluate on val, retain and colours."""
    config = tiny_config(out / "run", dataset, architecture, adapter, steps=steps)
    colours = ZeroShotConfig(images=labelled_folder(out / "colours"))
    config = replace(config, evaluate=EvaluateConfig(zero_shot={"colours": colours}))
    fit(config)
    return config


def tiny_config(out: Path, dataset: Path, architecture: str, adapter: AdapterConfig, *, steps: int = 6) -> FitConfig:
    """A few steps at a rate that changes the weights for all to see, evaluated every three."""
    return FitConfig(
        out=out,
        trainer=TrainerConfig(
            max_steps=steps,
            accelerator="cpu",
            enable_progress_bar=False,
            val_check_interval=3,
        ),
        model=ModelConfig(
            clip=ClipConfig(name=architecture, pretrained=None),
            adapter=adapter,
            optimizer=OptimizerConfig(lr=1e-2),
        ),
        data=DataConfig(dataset=dataset, batch_size=8, eval_batch_size=8, num_workers=0),
    )


def labelled_folder(folder: Path, each: int = 2) -> Path:
    """A folder of coloured circles, a sub-folder a colour."""
    for place, colour in enumerate(tiny.COLOURS):
        (folder / colour).mkdir(parents=True)
        for number in range(each):
            (folder / colour / f"{number}.png").write_bytes(tiny.picture(colour, "circle", 1000 + 10 * place + number))
    return folder


def wait_until_free(run: Path) -> None:
    """Wait for the last of a killed run's processes to be gone: the lock is its ranks' and its workers' too."""
    until = time.monotonic() + 60
    while not _is_free(run):
        assert time.monotonic() < until, f"{run} is still locked"
        time.sleep(0.01)


def _is_free(run: Path) -> bool:
    try:
        with only_process(run):
            return True
    except Busy:
        return False
