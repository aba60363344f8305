"""Towers that open_clip takes from others, in small, every way to adapt them.

timm's image towers that are no plain ViT (MobileCLIP's FastViT, EVA), and Hugging Face's text encoders.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import RobertaConfig

from curate.clip import rebuild
from curate.errors import ModelError
from finetune.adapters import adapt, open_projections, save_adapter
from finetune.attention import split_attention
from finetune.compute import prepare
from finetune.config import AdapterConfig, ComputeConfig
from finetune.summary import gflops
from finetune.trimming import trim_of
from tests.finetune.tiny import TEXT, plain_state_dict

# As open_clip's MobileCLIP2-S0, EVA01-g-14 and MobileCLIP-B are, but for their sizes.
TOWERS = {
    "fastvit": {
        "timm_model_name": "fastvit_mci0",
        "timm_pool": "avg",
        "timm_proj": None,
        "timm_model_kwargs": {"layers": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32]},
    },
    "eva": {
        "timm_model_name": "eva_giant_patch14_clip_224",
        "timm_pool": "token",
        "timm_proj": None,
        "timm_model_kwargs": {"img_size": 64, "patch_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2},
    },
    "vit": {
        "timm_model_name": "vit_base_patch16_224",
        "timm_pool": "token",
        "timm_proj": None,
        "timm_model_kwargs": {"img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2},
    },
}
LAYERS = {  # in the image tower, of the targets that it has
    "fastvit": {"qkv", "proj", "fc1", "fc2", "fc"},
    "eva": {"qkv", "proj", "fc1", "fc2", "head"},
    "vit": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "head"},
}


def build(tower: str) -> nn.Module:
    torch.manual_seed(0)
    vision = copy.deepcopy(TOWERS[tower]) | {"image_size": 64}
    model_cfg = {"embed_dim": 16, "custom_text": True, "vision_cfg": vision}
    model_cfg["text_cfg"] = TEXT | {"layers": 1, "no_causal_mask": True}
    return rebuild(tower, model_cfg, {}).model.eval()


def see_and_read(model: nn.Module) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 64, 64, generator=random)
    return model.encode_image(pixels), model.encode_text(torch.randint(1, 1000, (2, 16), generator=random))


@pytest.mark.parametrize("tower", TOWERS)
def test_lora_reaches_every_layer_that_a_target_names_and_is_merged(tower):
    plain, model = build(tower), build(tower)
    targets = ["q", "k", "v", "out", "fc", "proj", "projection"]
    adapt(model, AdapterConfig(rank=2, targets=targets))
    for ours, theirs in zip(see_and_read(model), see_and_read(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    random = torch.Generator().manual_seed(2)
    factors = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    for factor in factors.values():
        factor.data.copy_(0.05 * torch.randn(factor.shape, generator=random))
    image, text = see_and_read(model)
    ((image * text).sum() + image.square().sum()).backward()
    assert [name for name, factor in factors.items() if not factor.grad.any()] == []
    assert {name.split(".lora_B")[0].rpartition(".")[2] for name in factors if "visual" in name} == LAYERS[tower]
    plain.load_state_dict(plain_state_dict(model))
    for merged, ours in zip(see_and_read(plain), (image, text), strict=True):
        torch.testing.assert_close(merged, ours, rtol=0, atol=1e-5)


def loaded_by_peft(fresh: nn.Module, folder: Path) -> nn.Module:
    """A CLIP as training started from it, with an adapter put on it by peft alone."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    split_attention(fresh)
    open_projections(fresh)
    inject_adapter_in_model(LoraConfig.from_pretrained(str(folder)), fresh)
    set_peft_model_state_dict(fresh, load_file(folder / "adapter_model.safetensors"))
    return fresh.eval()


def moved(model: nn.Module) -> nn.Module:
    """As after some training."""
    random = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=random))
    return model


@pytest.mark.parametrize("tower", TOWERS)
def test_a_saved_adapter_loads_in_plain_peft(tower, tmp_path):
    model = build(tower)
    adapt(model, AdapterConfig(rank=2, targets=["q", "k", "v", "out", "fc", "proj", "projection"]))
    save_adapter(moved(model), tmp_path)
    for theirs, ours in zip(see_and_read(loaded_by_peft(build(tower), tmp_path)), see_and_read(model), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def build_multilingual(folder: Path) -> nn.Module:
    """open_clip's roberta-ViT-B-32 in small."""
    encoder = {"vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    RobertaConfig(**encoder, intermediate_size=48, max_position_embeddings=20).save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
    vision = {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32}
    torch.manual_seed(0)
    return rebuild("roberta", {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, {}).model.eval()


def test_lora_reaches_a_text_encoder_of_hugging_face(tmp_path, caplog):
    plain, model = build_multilingual(tmp_path), build_multilingual(tmp_path)
    before = see_and_read(model)
    with caplog.at_level(logging.WARNING, "cliptailor"):
        adapt(model, AdapterConfig(rank=2, targets=["q", "k", "v", "out", "fc", "proj", "projection"]))
    assert not caplog.records
    for ours, theirs in zip(see_and_read(model), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    image, text = see_and_read(moved(model))
    (image * text).square().sum().backward()
    factors = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert [name for name, factor in factors.items() if not factor.grad.any()] == []
    layers = {"self.query", "self.key", "self.value", "attention.output.dense", "intermediate.dense", "text.proj"}
    reached = {name.split(".lora_B")[0] for name in factors if name.startswith("text.")}
    assert len(reached) == 2 * 6 + 1
    assert all(any(name.endswith(layer) for name in reached) for layer in layers)
    save_adapter(model, tmp_path / "adapter")
    for theirs, ours in zip(see_and_read(loaded_by_peft(plain, tmp_path / "adapter")), (image, text), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    merged = build_multilingual(tmp_path)
    merged.load_state_dict(plain_state_dict(model))
    for theirs, ours in zip(see_and_read(merged), (image, text), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["layernorm", "bias", "last", "probe"])
def test_each_kind_finds_its_weights_in_a_text_encoder_of_hugging_face(kind, tmp_path):
    model = build_multilingual(tmp_path)
    adapt(model, AdapterConfig(kind=kind))
    image, text = see_and_read(model)
    (model.logit_scale.exp() * (image * text).square().sum()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("text.") for name in trained)
    still = {name for name, p in trained.items() if p.grad is None or p.grad.abs().max() < 1e-12}
    assert [name for name in still if "k_proj.bias" not in name and "self.key.bias" not in name] == []
    if kind == "last":
        assert {name.split(".")[4] for name in trained if ".encoder.layer." in name} == {"1"}
    if kind == "bias":
        assert not any(name.endswith("self.key.bias") for name in trained)


@pytest.mark.parametrize(
    ("tower", "kind"),
    [("fastvit", "full"), ("fastvit", "layernorm"), ("fastvit", "probe"), ("eva", "bias"), ("vit", "probe")],
)
def test_each_kind_finds_its_weights(tower, kind):
    model = build(tower)
    adapt(model, AdapterConfig(kind=kind))
    image, text = see_and_read(model)
    (model.logit_scale.exp() * ((image * text).sum() + image.square().sum())).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("visual.") for name in trained)
    unmoved = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert [name for name in unmoved if "k_proj.bias" not in name] == []
    if kind == "probe":
        assert {name for name in trained if name.startswith("visual.")} <= {
            *(f"visual.trunk.head.{part}" for part in ("weight", "bias", "fc.weight", "fc.bias"))
        }


def test_a_summary_counts_them_and_captions_are_left_whole():
    clip = rebuild("fastvit", {"embed_dim": 16, "custom_text": True, "text_cfg": TEXT | {"no_causal_mask": True},
                               "vision_cfg": TOWERS["fastvit"] | {"image_size": 64}}, {})  # fmt: skip
    image, caption = gflops(clip)
    assert image > caption > 0
    assert trim_of(clip.model) is None  # no causal mask: every position sees what is behind it


def test_fewer_patches_cost_less_in_timms_vit_too():
    model = build("vit")
    adapt(model, AdapterConfig(kind="full"))
    prepare(model, ComputeConfig(patch_dropout=0.5))
    seen = []
    model.visual.trunk.blocks[0].register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    model.train()
    see_and_read(model)
    see_and_read(model.eval())
    assert seen == [1 + 8, 1 + 16]  # of 16 patches; the class token stays


def test_what_does_not_go_together_is_told(caplog):
    with pytest.raises(ModelError, match=r"pissa needs matrices, and visual\.trunk\.\S+fc1 is a convolution"):
        adapt(build("fastvit"), AdapterConfig(variant="pissa"))
    with pytest.raises(ModelError, match="is q, k and v in one layer; name all three of them, or none"):
        adapt(build("eva"), AdapterConfig(targets=["q", "v"]))
    with caplog.at_level(logging.WARNING, "cliptailor"):
        adapt(build("fastvit"), AdapterConfig(targets=["projection"], lock=["image"]))
    assert not caplog.records
