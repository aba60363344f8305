"""transformers' CLIPModel and open_clip give the same embeddings, in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from curate.clip import Clip, load_clip
from curate.errors import ModelError
from finetune.export import check_export, write_transformers

CAPTIONS = ["a red circle", "ein Größentest: 12 × 3", "a very " + "long " * 90 + "caption"]


def config(activation: str = "quick_gelu", eos: int = 49407, *, full: bool = False, eps: float = 1e-5) -> CLIPConfig:
    """ViT-B/32, full-size or a small one with heads that are not 64 wide."""
    shared = {"hidden_act": activation, "layer_norm_eps": eps}
    vision = (
        {"image_size": 224, "patch_size": 32}
        if full
        else {
            "image_size": 64,
            "patch_size": 16,
            "hidden_size": 96,
            "intermediate_size": 200,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        }
    )
    text = (
        {}
        if full
        else {
            "hidden_size": 80,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 20,
        }
    )
    return CLIPConfig(
        text_config=shared | text | {"eos_token_id": eos},
        vision_config=shared | vision,
        projection_dim=512 if full else 48,
    )


def save(folder: Path, given: CLIPConfig, **how) -> CLIPModel:
    torch.manual_seed(0)
    model = CLIPModel(given).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # zeros would hide a mistake
    model.save_pretrained(folder, **how)
    size = given.vision_config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor.save_pretrained(folder)
    return model


def embeddings(model: CLIPModel, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        got = model(input_ids=tokens, pixel_values=pixels)
    return got.image_embeds, got.text_embeds


def check(clip: Clip, model: CLIPModel) -> None:
    size = model.config.vision_config.image_size
    pixels, tokens = torch.randn(2, 3, size, size), clip.tokenizer(CAPTIONS)
    image, text = embeddings(model, pixels, tokens)
    torch.testing.assert_close(clip.embed_images(pixels), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.embed_captions(tokens), text, atol=1e-5, rtol=0)
    assert torch.equal(clip.model.logit_scale, model.logit_scale)


@pytest.mark.parametrize(
    ("given", "how"),
    [
        (config(), {}),
        (config("gelu", eos=2, eps=1e-6), {"max_shard_size": "1MB"}),
        (config(full=True), {}),
    ],
    ids=["quick_gelu", "gelu-sharded", "ViT-B-32"],
)
def test_a_transformers_folder_is_loaded_exactly(tmp_path, given, how):
    model = save(tmp_path, given, **how)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(how)
    check(load_clip(str(tmp_path), device="cpu"), model)


def test_pytorch_model_bin_is_read_too(tmp_path):
    model = save(tmp_path, config())
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    check(load_clip(f"local-dir:{tmp_path}", device="cpu"), model)


def test_pixels_and_tokens_are_those_of_transformers(tmp_path):
    save(tmp_path, config())
    clip = load_clip(str(tmp_path), device="cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    expected = CLIPImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(clip.preprocess(picture), expected, atol=1e-5, rtol=0)
    assert clip.tokenizer(["a"]).shape == (1, 20)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_an_export_is_loaded_by_transformers_and_by_us(tmp_path, activation):
    save(tmp_path / "before", config(activation))
    clip = load_clip(str(tmp_path / "before"), device="cpu")
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    write_transformers(clip, tmp_path / "after")
    check_export(clip, tmp_path / "after", "transformers")
    model, info = CLIPModel.from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not any(info.values()), info
    check(clip, model.eval())
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "after")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(clip.preprocess(picture), expected, atol=1e-5, rtol=0)


def test_a_resnet_cannot_be_a_clipmodel_and_says_so(tmp_path, architectures):
    clip = load_clip(architectures["tiny-resnet"], device="cpu")
    with pytest.raises(ModelError, match="its CLIPModel has a ViT"):
        write_transformers(clip, tmp_path / "out")


def break_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content["text_config"][key] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act quick_gelu and relu: expected the same of quick_gelu, gelu"),
        ({"eos_token_id": 5}, "eos_token_id 5: expected 2 or the last id"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, changes, message):
    save(tmp_path, config())
    break_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        load_clip(str(tmp_path))


def test_another_vocabulary_is_refused(tmp_path):
    save(tmp_path, config())
    (tmp_path / "vocab.json").write_text(json.dumps({"hello": 0}))
    with pytest.raises(ModelError, match="vocabulary is not that of CLIP's BPE"):
        load_clip(str(tmp_path))


def test_another_kind_of_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(ModelError, match="model_type is 'blip'; of transformers' models only CLIP"):
        load_clip(str(tmp_path))
