from __future__ import annotations

import json

import pytest

from finetune.cli import main
from finetune.config import AdapterConfig, ClipConfig, ModelConfig
from finetune.summary import summarise


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
