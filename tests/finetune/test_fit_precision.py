"""Precisions other than float32, as far as they run without a GPU."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from finetune.callback import EvaluationCallback
from finetune.config import AdapterConfig, EvaluateConfig, OptimizerConfig, TrainerConfig
from finetune.data import CLIPDataModule
from finetune.evaluate import Encoder
from finetune.export import export
from finetune.fit import _precision, fit
from finetune.module import CLIPModule
from finetune.runs import load_module
from finetune.sets import evaluation_sets
from tests.finetune.fitted import tiny_config


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_run_in_bfloat16_trains_evaluates_and_exports(dataset, architectures, tmp_path, precision):
    config = tiny_config(tmp_path / "run", dataset, architectures["tiny-vit"], AdapterConfig(rank=2, dropout=0.1))
    config = replace(config, trainer=replace(config.trainer, precision=precision))
    fit(config)
    weights = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]  # noqa: TID251 - ours
    kept = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {kept}
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses
    assert all(map(math.isfinite, losses))
    export(tmp_path / "run", tmp_path / "clip")
    # The figures are those of the weights in float32, whatever they were trained in.
    after = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]
    module = load_module(tmp_path / "run" / "checkpoints" / "best.ckpt")
    figures = (
        EvaluationCallback(EvaluateConfig(), config.data, tmp_path).evaluate(module, torch.device("cpu")).summary()
    )
    assert figures == after


@pytest.mark.parametrize(
    ("accelerator", "has_gpu", "has_bfloat16", "expected"),
    [
        ("auto", True, True, "bf16-mixed"),
        ("gpu", True, False, "32-true"),
        ("cpu", True, True, "32-true"),
        ("auto", False, False, "32-true"),
    ],
)
def test_auto_is_mixed_bfloat16_on_a_gpu_that_has_it(monkeypatch, accelerator, has_gpu, has_bfloat16, expected):
    """What the device can is put here in place of a GPU: the choice is what is tested."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert _precision(TrainerConfig(max_steps=1, accelerator=accelerator)) == expected
    assert _precision(TrainerConfig(max_steps=1, accelerator=accelerator, precision="16-mixed")) == "16-mixed"


def test_embeddings_of_half_precision_weights_are_normalised_in_float32(dataset, architectures):
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None})
    module.model.to(torch.bfloat16)
    clip = module.clip
    encoder = Encoder(module.model.eval(), clip.preprocess, clip.tokenizer, torch.device("cpu"), 4)
    sets = evaluation_sets(EvaluateConfig(), dataset)
    with torch.no_grad():
        for embeddings in (encoder.images(sets.retrieval[0].images), encoder.captions(sets.retrieval[0].captions)):
            assert embeddings.dtype == torch.float32
            torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(embeddings)), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # Lightning 2.6 on recent torch
def test_clipping_works_with_a_loss_scaler(dataset, architectures, tmp_path):
    """16-mixed: gradients are unscaled before they are clipped, so the first step is that of float32, nearly."""
    module = CLIPModule(
        {"name": architectures["tiny-vit"], "pretrained": None}, {"kind": "full"}, optimizer=OptimizerConfig(lr=1e-3)
    )
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, CLIPDataModule(dataset=dataset, batch_size=8, num_workers=0))
    assert any(not torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
    assert scaler.get_scale() == 1024.0  # no step was skipped


def test_a_strategy_that_shards_the_weights_is_refused():
    from curate.errors import ConfigError

    with pytest.raises(ConfigError, match=r"trainer\.strategy: expected auto, ddp or fsdp2, got 'fsdp'"):
        TrainerConfig(max_steps=1, strategy="fsdp")
