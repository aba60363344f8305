"""Captions cut behind their ends: the same embeddings and gradients, and towers for which that would not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from curate.clip import load_clip
from finetune.data import CLIPDataModule
from finetune.module import CLIPModule
from finetune.trimming import Trim, encode_text, trim_of
from tests.finetune import tiny

CAPTIONS = ["a cat", "two dogs and one bird on a wire", "", "snow"]


def made(folder: Path, text: dict[str, Any], **given: Any) -> str:
    config = {**tiny.ARCHITECTURES["tiny-vit"], **given}
    config["text_cfg"] = {**tiny.TEXT, "context_length": 77, **text}
    path = folder / "clip.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ({}, {}),
        ({}, {"custom_text": True}),
        ({"pool_type": "eos", "eos_id": 49407}, {"custom_text": True}),
        ({}, {"quick_gelu": True}),
    ],
    ids=["clip", "custom text", "eos", "quick gelu"],
)
def test_embeddings_and_gradients_are_those_of_the_full_length(text, given, tmp_path):
    torch.manual_seed(0)
    clip = load_clip(made(tmp_path, text, **given), device="cpu")
    model: Any = clip.model.double().train()
    trim = trim_of(model)
    assert trim is not None
    whole = clip.tokenizer(CAPTIONS)
    cut = trim(whole)
    assert cut.shape == (4, 16)  # nine tokens and their two ends
    found = []
    for tokens in (whole, cut):
        model.zero_grad()
        features = encode_text(model, tokens)
        features.square().sum().backward()
        named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"": features.detach(), **named})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 10
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(found[1][""], model.encode_text(whole), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "text", [{"no_causal_mask": True}, {"pool_type": "last"}, {"pool_type": "first"}, {"embed_cls": True}]
)
def test_towers_that_see_what_is_behind_are_left_alone(text, tmp_path):
    model: Any = load_clip(made(tmp_path, text, custom_text=True), device="cpu").model
    assert trim_of(model) is None


def test_a_text_without_an_end_before_the_context_is_whole():
    full = torch.full((2, 77), 5)
    full[:, -1] = 49407
    assert Trim()(full).shape == (2, 77)
    assert Trim(49407)(full).shape == (2, 77)
    full[:, 7] = 49407  # and more after it, which argmax and eos pooling do not reach
    assert Trim()(full).shape == (2, 8)


def test_the_starting_clip_and_parts_of_a_batch_see_the_same(architectures, dataset, tmp_path):
    clip = load_clip(made(tmp_path, {}), device="cpu")
    torch.save(clip.model.state_dict(), tmp_path / "w.pt")
    module = CLIPModule(
        {"name": str(tmp_path / "clip.json"), "pretrained": str(tmp_path / "w.pt")},
        {"rank": 2},
        {"distill_feature": 1.0},
        compute={"micro_batch_size": 3},
    ).double()
    tokens, pixels = clip.tokenizer(CAPTIONS), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    whole, cut = ({"pixels": pixels, "tokens": each} for each in (tokens, Trim()(tokens)))
    assert cut["tokens"].shape[1] < whole["tokens"].shape[1]
    for embed in (module.embed, module.embed_start):
        for first, second in zip(embed(whole), embed(cut), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning", "ignore:.*does not have many workers")
def test_training_batches_are_cut(dataset, tmp_path):
    import lightning

    seen: list[int] = []

    class Watched(CLIPModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch["tokens"].shape[1])
            return super().training_step(batch, batch_idx)

    module = Watched({"name": made(tmp_path, {}), "pretrained": None}, {"rank": 2})
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, CLIPDataModule(dataset=dataset, batch_size=8, num_workers=0))
    assert seen == [8, 8]  # "a red circle" and both ends are five
