"""A real, short training run on the tiny dataset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
