"""Which loss a CLIP gets, and a CLIP that gets SigLIP's: its bias, in training, checkpoints and exports."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipModel

from curate.clip import load_clip
from curate.errors import ModelError
from finetune.config import AdapterConfig, FitConfig, LossConfig
from finetune.export import export
from finetune.fit import fit
from finetune.losses import contrastive_loss, positives, sigmoid_loss
from finetune.module import CLIPModule
from tests.finetune import tiny
from tests.finetune.fitted import tiny_config
from tests.finetune.siglip import write_siglip


@pytest.fixture(scope="module")
def with_bias(tmp_path_factory) -> str:
    """The configuration of a CLIP that has a bias, as open_clip's SigLIP models."""
    path = (
        tmp_path_factory.mktemp("architecture") / "with-bias.json"
    )  # open_clip takes another tokenizer where the name says SigLIP
    path.write_text(json.dumps(tiny.ARCHITECTURES["tiny-vit"] | {"init_logit_bias": -10, "init_logit_scale": 4.7215}))
    return str(path)


def batch(size: int = 6) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 1000, (size, 16), generator=random)
    tokens[:, 8] = 49407
    group = torch.arange(size)[:, None] // 2
    return {"pixels": torch.randn(size, 3, 32, 32, generator=random), "tokens": tokens, "group": group}


def test_auto_is_what_the_clip_was_made_with(architectures, with_bias):
    assert not CLIPModule({"name": architectures["tiny-vit"], "pretrained": None}).is_sigmoid
    assert CLIPModule({"name": with_bias, "pretrained": None}).is_sigmoid


@pytest.mark.parametrize("multi_positive", [True, False])
def test_the_loss_of_a_batch_is_the_sigmoid_loss_of_its_embeddings(with_bias, multi_positive):
    module = CLIPModule({"name": with_bias, "pretrained": None}, loss=LossConfig(multi_positive=multi_positive))
    given = batch()
    matches = positives(given["group"]) if multi_positive else None
    scales = module.model.logit_scale, module.model.logit_bias
    expected = sigmoid_loss(*module.embed(given), *scales, positives_BB=matches)
    torch.testing.assert_close(module.batch_loss(given, gather=True), expected)


def test_a_clip_without_a_bias_begins_where_the_paper_does(architectures):
    clip = {"name": architectures["tiny-vit"], "pretrained": None}
    model = CLIPModule(clip, None, {"kind": "siglip"}).model
    assert model.logit_bias.item() == -10
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias.requires_grad
    asked = CLIPModule(clip, {"train_logit_scale": False}, {"kind": "siglip", "logit_scale": 30.0}).model
    assert asked.logit_scale.exp().item() == pytest.approx(30)
    assert not asked.logit_bias.requires_grad


def test_a_clip_with_a_bias_keeps_its_scale_and_bias(with_bias):
    model = CLIPModule({"name": with_bias, "pretrained": None}, None, {"kind": "siglip"}).model
    assert (model.logit_scale.item(), model.logit_bias.item()) == (pytest.approx(4.7215), -10)


def test_under_the_softmax_the_bias_is_left_alone(with_bias):
    module = CLIPModule({"name": with_bias, "pretrained": None}, None, {"kind": "clip", "multi_positive": False})
    given = batch()
    expected = contrastive_loss(*module.embed(given), module.model.logit_scale)
    torch.testing.assert_close(module.batch_loss(given, gather=False), expected)
    assert not module.model.logit_bias.requires_grad


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, dataset, architectures, tmp_path_factory):
    """A run that made a SigLIP of a CLIP."""
    out = tmp_path_factory.mktemp("siglip") / "run"
    config = tiny_config(out, dataset, architectures["tiny-vit"], AdapterConfig(kind=request.param, rank=4))
    config = replace(
        config,
        trainer=replace(config.trainer, log_every_n_steps=1),
        model=replace(config.model, loss=LossConfig(kind="siglip")),
    )
    fit(config)
    return out


def test_the_bias_is_trained_logged_and_comes_back_from_the_checkpoint(run):
    module = CLIPModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True)
    trained = module.model.logit_bias.item()
    assert trained != -10
    assert trained == pytest.approx(-10, abs=0.1)  # six steps of 0.01 at most
    assert "train/logit_bias" in (run / "metrics.csv").read_text().splitlines()[0]


def test_the_bias_is_exported(run, tmp_path):
    path = export(run, tmp_path / "open_clip", checkpoint="last")
    trained = CLIPModule.load_from_checkpoint(path, weights_only=True).model
    read = load_clip(f"local-dir:{tmp_path / 'open_clip'}", device="cpu").model
    assert read.logit_bias.item() == trained.logit_bias.item()
    again = CLIPModule({"name": f"local-dir:{tmp_path / 'open_clip'}"})
    assert again.is_sigmoid
    assert again.model.logit_bias.item() == trained.logit_bias.item()


def test_transformers_clip_has_no_word_for_it(run, tmp_path):
    with pytest.raises(ModelError, match="cannot express init_logit_bias"):
        export(run, tmp_path / "transformers", "transformers", checkpoint="last")


def test_the_bias_is_in_the_metadata_of_an_adapter(run, tmp_path):
    from safetensors import safe_open

    module = CLIPModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True)
    if module.adapter.kind == "full":
        with pytest.raises(ModelError, match="no adapter"):
            export(run, tmp_path / "adapter", "adapter", checkpoint="last")
        return
    export(run, tmp_path / "adapter", "adapter", checkpoint="last")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert float(metadata["logit_bias"]) == module.model.logit_bias.item()
    assert float(metadata["logit_scale"]) == module.model.logit_scale.item()


def test_a_siglip_above_100_is_not_pulled_down(with_bias, dataset, tmp_path):
    config = tiny_config(tmp_path / "run", dataset, with_bias, AdapterConfig(kind="full"), steps=2)
    fit(config)
    module = CLIPModule.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert module.model.logit_scale.item() == pytest.approx(4.7215, abs=0.03)


# --- from a folder of transformers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    write_siglip(folder)
    return folder


def config_of(out: Path, dataset: Path, folder: Path, adapter: AdapterConfig) -> FitConfig:
    config = tiny_config(out, dataset, str(folder), adapter, steps=4)
    return replace(config, checkpoint_every_n_steps=1, trainer=replace(config.trainer, val_check_interval=4))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]  # noqa: TID251


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_siglip_of_transformers_is_trained_goes_on_and_is_exported(kind, folder, dataset, tmp_path, monkeypatch):
    """Killed and gone on to the same bits; its checkpoint needs the folder no more, tokenizer included."""
    targets = ["q", "k", "v", "out", "fc", "proj", "projection", "pool"]
    adapter = AdapterConfig(kind=kind, rank=2, targets=targets)
    start = tmp_path / "start"
    shutil.copytree(folder, start)
    whole, parts = (config_of(tmp_path / name, dataset, start, adapter) for name in ("whole", "parts"))
    fit(whole)
    step, calls = CLIPModule.training_step, []

    def stops(self: CLIPModule, batch: Any, batch_idx: int) -> Any:
        calls.append(batch_idx)
        if len(calls) == 3:
            raise RuntimeError("as if killed")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(CLIPModule, "training_step", stops)
    with pytest.raises(RuntimeError, match="as if killed"):
        fit(parts)
    monkeypatch.undo()
    fit(parts)
    first, second = weights_of(whole.out), weights_of(parts.out)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())

    module = CLIPModule({"name": str(start)}, adapter)
    fresh = module.state_dict()
    if kind == "full":  # of a key's bias only rounding
        still = [name for name, weight in first.items() if torch.equal(weight, fresh[name]) and "k_proj" not in name]
        assert still == []
    else:
        dead = [name for name, weight in first.items() if "lora_B" in name and not weight.any()]
        assert dead == []
        assert sum("lora_B" in name for name in first) == 2 * 6 + 5 + 2 * 6 + 1

    captions = ["A red circle.", "square"]
    tokens = module.clip.tokenizer(captions)
    shutil.rmtree(start)
    again = CLIPModule.load_from_checkpoint(whole.out / "checkpoints" / "last.ckpt", weights_only=True)
    assert again.is_sigmoid
    assert torch.equal(again.clip.tokenizer(captions), tokens)
    if kind == "lora":
        export(whole.out, tmp_path / "exported", "transformers", checkpoint="last")  # compared by transformers itself
        model = SiglipModel.from_pretrained(tmp_path / "exported")
        assert model.logit_bias.item() == again.model.logit_bias.item() != -16.5
        assert model.logit_scale.item() == again.model.logit_scale.item()
