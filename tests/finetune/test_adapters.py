from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from curate.errors import ModelError
from finetune.adapters import (
    adapt,
    hold_still,
    is_locked,
    lora_config,
    lora_target,
    merge,
    save_adapter,
)
from finetune.attention import split_attention
from finetune.config import AdapterConfig
from tests.finetune.test_attention import build, embed
from tests.finetune.tiny import plain_state_dict

TARGETS = {
    "tiny-vit": ["q", "k", "v", "out", "fc", "proj"],
    "tiny-resnet": ["q", "k", "v", "out", "fc", "proj", "conv", "pool"],
}
RANK, ALPHA = 3, 6.0


def lora(name: str, **fields) -> AdapterConfig:
    return AdapterConfig(**({"rank": RANK, "alpha": ALPHA, "targets": TARGETS[name]} | fields))


def adapted(name: str, **fields) -> nn.Module:
    """A tiny CLIP with LoRA whose B is not zero, as after some training."""
    model = build(name)
    adapt(model, lora(name, **fields))
    random = torch.Generator().manual_seed(5)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
    return model


def wanted(name: str, model: nn.Module) -> set[str]:
    """Every layer of a split model that the targets name, written out."""
    layers = {f"transformer.resblocks.{n}.{x}" for n in (0, 1) for x in ("attn.q_proj", "attn.k_proj", "attn.v_proj")}
    layers |= {f"transformer.resblocks.{n}.{x}" for n in (0, 1) for x in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")}
    if name == "tiny-vit":
        return layers | {f"visual.{layer}" for layer in layers}
    blocks = ["conv1", "conv2", "conv3", "downsample.0"]
    layers |= {f"visual.layer{n}.0.{x}" for n in (1, 2, 3, 4) for x in blocks} | {f"visual.conv{n}" for n in (1, 2, 3)}
    return layers | {f"visual.attnpool.{x}_proj" for x in "qkvc"}


class ByHand(nn.Module):
    """W + alpha/r · B·A, written out for a linear layer or a convolution; W is fixed."""

    def __init__(self, layer: nn.Module, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.a, self.b = layer, nn.Parameter(a.clone()), nn.Parameter(b.clone())

    @property
    def weight(self) -> torch.Tensor:
        update = torch.einsum("or,ri...->oi...", self.b.flatten(1), self.a)
        return self.layer.weight.detach() + ALPHA / RANK * update

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.layer, nn.Linear):
            return functional.linear(x, self.weight, self.layer.bias)
        return functional.conv2d(x, self.weight, stride=self.layer.stride, padding=self.layer.padding)


def reference(name: str, model: nn.Module) -> nn.Module:
    """The same CLIP with its LoRA by hand."""
    plain = build(name)
    split_attention(plain)
    plain.requires_grad_(False)
    weights = dict(model.named_parameters())
    for layer in wanted(name, plain):
        a, b = (weights[f"{layer}.lora_{x}.default.weight"].detach() for x in "AB")
        plain.set_submodule(layer, ByHand(plain.get_submodule(layer), a, b))
    return plain


@pytest.mark.parametrize("name", TARGETS)
def test_lora_starts_as_the_identity(name):
    model = build(name)
    before = embed(model)
    adapt(model, lora(name))
    for x, y in zip(embed(model), before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", TARGETS)
def test_lora_is_on_exactly_the_layers_that_are_named(name):
    model = adapted(name)
    layers = {key.split(".lora_A")[0] for key, _ in model.named_parameters() if "lora_A" in key}
    assert layers == wanted(name, model)


@pytest.mark.parametrize("name", TARGETS)
def test_forward_and_gradients_equal_the_reference_by_hand(name):
    model = adapted(name)
    by_hand = reference(name, model)
    for ours, theirs in zip(embed(model), embed(by_hand), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    for clip in (model, by_hand):
        image, text = embed(clip)
        (image * text).square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    for layer in wanted(name, model):
        hand = by_hand.get_submodule(layer)
        for x, expected in (("A", hand.a.grad), ("B", hand.b.grad)):
            ours = gradients[f"{layer}.lora_{x}.default.weight"]
            torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", TARGETS)
def test_every_adapter_gets_a_gradient_and_no_base_weight_does(name):
    model = adapted(name)
    image, text = embed(model)
    (model.logit_scale.exp() * (image * text).square().sum()).backward()
    for key, parameter in model.named_parameters():
        if "lora_" in key or key == "logit_scale":
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key
        else:
            assert not parameter.requires_grad, key
            assert parameter.grad is None, key


@pytest.mark.parametrize("name", TARGETS)
def test_merging_gives_a_plain_open_clip_with_the_same_embeddings(name):
    model = adapted(name)
    adapted_embeddings = embed(model)
    weights = plain_state_dict(model)
    plain = build(name)
    assert list(weights) == list(plain.state_dict())
    plain.load_state_dict(weights)
    for x, y in zip(embed(plain), adapted_embeddings, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    for x, y in zip(embed(model), adapted_embeddings, strict=True):  # the model itself is as it was
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", TARGETS)
def test_merged_weights_equal_the_reference_by_hand(name):
    model = adapted(name)
    by_hand = reference(name, model)
    merge(model)
    split_attention(model)
    for layer in wanted(name, model):
        expected = by_hand.get_submodule(layer).weight
        torch.testing.assert_close(model.get_submodule(layer).weight, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TARGETS)
def test_full_training_trains_all_and_merges_to_the_same(name):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapt(model, AdapterConfig(kind="full"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert lora_config(model) is None
    after = plain_state_dict(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("locked", "free"), [("image", "text"), ("text", "image")])
def test_a_locked_tower_is_not_trained(kind, locked, free):
    model = build("tiny-vit")
    adapt(model, AdapterConfig(kind=kind, lock=[locked]))
    assert is_locked(model, locked)
    assert not is_locked(model, free)
    assert model.logit_scale.requires_grad
    assert not any(
        "lora_" in key for key, _ in model.named_parameters() if key.startswith("visual.") == (locked == "image")
    )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_temperature_is_trained_or_not(kind):
    for trained in (True, False):
        model = build("tiny-vit")
        adapt(model, AdapterConfig(kind=kind, train_logit_scale=trained))
        assert model.logit_scale.requires_grad == trained


def test_locked_towers_and_pretrained_statistics_stay_in_eval_mode():
    model = build("tiny-resnet")
    adapt(model, AdapterConfig(kind="full", lock=["text"]))
    model.train()
    hold_still(model, statistics=True)
    assert not model.transformer.training
    assert not model.ln_final.training
    assert model.visual.training
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    model.train()
    hold_still(model, statistics=False)
    assert all(norm.training for norm in norms)


def test_a_target_without_layers_says_so():
    with pytest.raises(ModelError, match=r"'conv' names no layer.*\(conv is a ResNet's, pool a ResNet's or SigLIP's\)"):
        adapt(build("tiny-vit"), lora("tiny-vit", targets=["q", "conv"]))
    with pytest.raises(ModelError, match="'q' names no layer of this CLIP's trained towers"):
        adapt(build("tiny-resnet"), lora("tiny-resnet", targets=["q"], lock=["text"]))


def test_targets_are_told_by_name_and_kind():
    assert lora_target("visual.transformer.resblocks.0.mlp.c_proj", nn.Linear(2, 2)) == "proj"
    assert lora_target("visual.attnpool.c_proj", nn.Linear(2, 2)) == "pool"
    assert lora_target("visual.layer3.5.downsample.0", nn.Conv2d(2, 2, 1)) == "conv"
    assert lora_target("visual.trunk.stem", nn.Conv2d(2, 2, 1)) is None
    assert lora_target("ln_final", nn.LayerNorm(2)) is None


@pytest.mark.parametrize("name", TARGETS)
def test_the_saved_adapter_is_peft_s_and_gives_the_same_embeddings(name, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    model = adapted(name)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == RANK
    fresh = build(name)
    split_attention(fresh)
    inject_adapter_in_model(LoraConfig.from_pretrained(str(tmp_path)), fresh)
    set_peft_model_state_dict(fresh, load_file(tmp_path / "adapter_model.safetensors"))
    fresh.eval()
    for x, y in zip(embed(fresh), embed(model), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_there_is_no_adapter_to_save_after_full_training(tmp_path):
    model = build("tiny-vit")
    adapt(model, AdapterConfig(kind="full"))
    with pytest.raises(ModelError, match="trained without LoRA"):
        save_adapter(model, tmp_path)


def test_a_copy_of_an_adapted_model_is_its_own():
    model = adapted("tiny-vit")
    twin = copy.deepcopy(model)
    merge(twin)
    assert lora_config(model) is not None
    assert any("lora_" in key for key, _ in model.named_parameters())


TRAINED = {  # of tiny-vit, written out: what each kind trains of the image tower
    "probe": {"visual.proj"},
    "last": {"visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"},
}


@pytest.mark.parametrize("kind", ["layernorm", "bias", "last", "probe"])
@pytest.mark.parametrize("name", TARGETS)
def test_a_kind_trains_what_it_names_all_of_it_moves_and_nothing_else(name, kind):
    model = build(name)
    before = embed(model)
    adapt(model, AdapterConfig(kind=kind))
    after = embed(model)
    for x, y in zip(after, before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    image, text = after
    (model.logit_scale.exp() * (image * text).square().sum()).backward()
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, key
        elif not key.endswith("k_proj.bias"):  # softmax does not see it
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained >= {"logit_scale"}
    if name == "tiny-vit" and kind in TRAINED:
        block = {key for key in trained if key.startswith("visual.transformer.resblocks.")}
        assert {key for key in trained if key.startswith("visual.")} - block == TRAINED[kind]
        assert {key.split(".")[3] for key in block} == ({"1"} if kind == "last" else set())


def test_rank_and_alpha_are_each_tower_s_own():
    model = build("tiny-vit")
    adapt(model, lora("tiny-vit", rank={"image": 4, "text": 2}, alpha={"image": 8, "text": 1}))
    image = model.visual.transformer.resblocks[0].attn.q_proj
    text = model.transformer.resblocks[0].attn.q_proj
    assert (image.r["default"], image.scaling["default"]) == (4, 2.0)
    assert (text.r["default"], text.scaling["default"]) == (2, 0.5)
