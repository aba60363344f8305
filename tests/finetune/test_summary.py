from __future__ import annotations

import json

import pytest

from finetune.cli import main
from finetune.config import AdapterConfig, ClipConfig, LossConfig, ModelConfig
from finetune.module import CLIPModule
from finetune.summary import summarise
from tests.finetune.siglip import LENGTH, write_siglip


@pytest.mark.parametrize(("name", "image", "caption"), [("ViT-B/32", 8.8, 5.96), ("RN50", 12.2, 6.0)])
def test_gflops_are_those_of_open_clips_table(name, image, caption):
    found = summarise(ModelConfig(clip=ClipConfig(name=name, pretrained="openai"), adapter=AdapterConfig(kind="full")))
    assert found.image_gflops == pytest.approx(image, rel=0.01)
    assert found.caption_gflops == pytest.approx(caption, rel=0.01)
    assert found.trained_share == 1


def test_the_command_tells_parts_and_groups_as_json(capsys, architectures):
    clip = [f"--model.clip.name={architectures['tiny-vit']}", "--model.clip.pretrained=null"]
    assert main(["summary", *clip, "--model.adapter.rank=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(part["trained"] for part in found["parts"]) == found["trained"] == found["adapter_parameters"] + 1
    assert sum(group["parameters"] for group in found["groups"]) == found["trained"]


def multiply_adds(tokens: int, width: int, inner: int) -> int:
    """Of a transformer's block: four projections, scores and their mix, the MLP."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * inner


def test_of_a_siglip_its_attention_pool_and_its_bias_are_counted(tmp_path):
    write_siglip(tmp_path)
    targets = ["q", "k", "v", "out", "fc", "proj", "projection", "pool"]
    clip, adapter = ClipConfig(name=str(tmp_path), pretrained=None), AdapterConfig(rank=2, targets=targets)
    found = summarise(ModelConfig(clip=clip, adapter=adapter))
    patches, width, inner = 16, 48, 100
    pool = width**2 + 2 * patches * width**2 + 2 * patches * width + width**2 + 2 * width * inner
    image = patches * 3 * 8 * 8 * width + 2 * multiply_adds(patches, width, inner) + pool
    assert found.image_gflops == pytest.approx(2 * image / 1e9)
    assert found.caption_gflops == pytest.approx(2 * (2 * multiply_adds(LENGTH, 40, 90) + 40 * width) / 1e9)
    assert sum(part.trained for part in found.parts) == found.trained == found.adapter_parameters + 2
    assert [part.trained for part in found.parts if part.part in ("logit_scale", "logit_bias")] == [1, 1]
    assert next(part.adapter for part in found.parts if (part.tower, part.part) == ("image", "head")) > 0


@pytest.mark.parametrize("kind", ["auto", "siglip"])
def test_it_counts_what_training_trains(kind, architectures):
    clip = {"name": architectures["tiny-vit"], "pretrained": None}
    module = CLIPModule(clip, {"rank": 2}, {"kind": kind})
    adapter, loss = AdapterConfig(rank=2), LossConfig(kind=kind)
    found = summarise(ModelConfig(clip=ClipConfig(**clip), adapter=adapter, loss=loss))
    assert found.trained == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert sum(group.parameters for group in found.groups) == found.trained
