"""The moving average of the weights: what it is, that it is saved and evaluated, that a run goes on with it."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from finetune.averaging import MovingAverage
from finetune.callback import EvaluationCallback
from finetune.config import AdapterConfig, FitConfig, OptimizerConfig
from finetune.data import CLIPDataModule
from finetune.evaluate import Evaluation
from finetune.export import export
from finetune.fit import fit
from finetune.module import CLIPModule
from finetune.runs import load_module
from tests.finetune.fitted import tiny_config

DECAY = 0.5


def averaged(out: Path, dataset: Path, architecture: str, adapter: AdapterConfig | None = None) -> FitConfig:
    config = tiny_config(out, dataset, architecture, adapter or AdapterConfig(kind="full"))
    optimizer = OptimizerConfig(lr=1e-2, ema=DECAY)
    keep = replace(config.keep, interpolate=0)
    return replace(config, model=replace(config.model, optimizer=optimizer), keep=keep, checkpoint_every_n_steps=2)


def saved(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)  # noqa: TID251 - of a run
    return found


class Weights(lightning.Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        self.seen.append({name: weight.detach().clone() for name, weight in arguments[0].named_parameters()})


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning", "ignore:.*does not have many workers")
def test_the_average_is_the_recursion_over_all_steps(dataset, architectures, tmp_path):
    torch.manual_seed(0)
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None}, {"rank": 2})
    watch = Weights()
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", callbacks=[watch, MovingAverage(DECAY)], logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, CLIPDataModule(dataset=dataset, batch_size=8, num_workers=0))
    expected = watch.seen[0]
    for latest in watch.seen[1:]:
        expected = {name: DECAY * weight + (1 - DECAY) * latest[name] for name, weight in expected.items()}
    assert not any(buffer.isnan().any() for buffer in module.buffers())
    for name, weight in module.named_parameters():  # at the end the weights are the average
        torch.testing.assert_close(weight.detach(), expected[name], msg=name)
        if not weight.requires_grad:
            assert torch.equal(weight, watch.seen[0][name]), name


def test_the_average_is_what_is_saved_evaluated_and_exported(dataset, architectures, tmp_path):
    config = averaged(tmp_path / "run", dataset, architectures["tiny-vit"])
    fit(config)
    checkpoint = saved(config.out)
    latest, average = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert any(not torch.equal(latest[name], weight) for name, weight in average.items())
    with (config.out / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert len(rows) == 2
    assert all(math.isfinite(float(row["val/loss"])) for row in rows)
    module = load_module(config.out / "checkpoints" / "last.ckpt")
    assert all(torch.equal(weight, average[name]) for name, weight in module.state_dict().items())
    evaluation = EvaluationCallback(config.evaluate, config.data, config.out)
    logged = {name: pytest.approx(float(rows[-1][name])) for name in evaluation.metrics}
    assert evaluation.evaluate(module, torch.device("cpu")).values() == logged
    module.load_state_dict(latest)
    assert evaluation.evaluate(module, torch.device("cpu")).values() != logged
    export(config.out, tmp_path / "clip")
    assert isinstance(Evaluation.from_json((config.out / "before.json").read_text()), Evaluation)


def test_a_run_that_was_stopped_goes_on_with_its_average(dataset, architectures, tmp_path, monkeypatch):
    whole = averaged(tmp_path / "whole", dataset, architectures["tiny-vit"])
    fit(whole)
    parts = averaged(tmp_path / "parts", dataset, architectures["tiny-vit"])
    step = CLIPModule.training_step
    calls = []

    def stops(self: CLIPModule, batch: Any, batch_idx: int) -> Any:
        calls.append(batch_idx)
        if len(calls) == 4:
            raise RuntimeError("as if killed")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(CLIPModule, "training_step", stops)
    with pytest.raises(RuntimeError, match="as if killed"):
        fit(parts)
    monkeypatch.undo()
    assert saved(parts.out)["global_step"] < 4
    fit(parts)
    first, second = saved(whole.out), saved(parts.out)
    for key in ("state_dict", "current_model_state"):
        for name, weight in first[key].items():
            assert torch.equal(second[key][name], weight), (key, name)
