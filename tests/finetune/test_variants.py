"""Each variant of LoRA on every target against its formula, written out on plain weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from curate.clip import rebuild
from finetune.adapters import adapt, merge, open_projections, save_adapter
from finetune.attention import split_attention
from finetune.config import AdapterConfig
from tests.finetune.test_attention import build, embed
from tests.finetune.tiny import plain_state_dict

RANK, ALPHA = 3, 6.0
TARGETS = {
    "tiny-vit": ["q", "k", "v", "out", "fc", "proj", "projection"],
    "tiny-resnet": ["q", "k", "v", "out", "fc", "proj", "projection", "conv", "pool"],
}
# peft decomposes no convolution for PiSSA.
CASES = [
    *((name, variant) for name in TARGETS for variant in ("lora", "dora", "rslora")),
    ("tiny-vit", "pissa"),
]
OPENED = {"visual.proj.linear": "visual.proj", "text_projection.linear": "text_projection"}
# Where the bare projection is a layer already: its opened name, and its own.
RENAMED = {"text.text_projection.linear": "text.text_projection"}


def adapted(name: str, variant: str, *, moved: bool = True) -> nn.Module:
    """A tiny CLIP in float64 with an adapter, as it starts or as after some training."""
    model = build(name, torch.float32)  # peft decomposes no float64 for PiSSA
    adapt(model, AdapterConfig(rank=RANK, alpha=ALPHA, targets=TARGETS[name], variant=variant))
    model.double()
    random = torch.Generator().manual_seed(5)
    for key, parameter in model.named_parameters():
        if moved and ("lora_B" in key or "lora_magnitude" in key):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
    return model


def layers_of(model: nn.Module) -> list[str]:
    return [key.split(".lora_A")[0] for key, _ in model.named_parameters() if "lora_A" in key]


def by_hand(model: nn.Module, variant: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a split open_clip model as the variant's paper has them, and the leaves they are made from.

    lora: W + α/r·BA. rslora: W + α/√r·BA. dora: m·(W + α/r·BA) / ‖W + α/r·BA‖, a norm a row that no gradient goes
    through (section 4.3 there). pissa: as lora, on what its start left of W.
    """
    given = dict(model.named_parameters())
    weights: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    for layer in layers_of(model):
        a, b = (given[f"{layer}.lora_{x}.default.weight"].detach().clone().requires_grad_() for x in "AB")
        leaves |= {f"{layer}.lora_A.default.weight": a, f"{layer}.lora_B.default.weight": b}
        scale = ALPHA / math.sqrt(RANK) if variant == "rslora" else ALPHA / RANK
        weight = given[f"{layer}.base_layer.weight"].detach() + scale * torch.einsum("or,ri...->oi...", b.flatten(1), a)
        if variant == "dora":
            name = f"{layer}.lora_magnitude_vector.default.weight"
            leaves[name] = given[name].detach().clone().requires_grad_()
            rows = weight.detach().flatten(1).norm(dim=1)
            weight = weight * (leaves[name].flatten() / rows).view(-1, *[1] * (weight.ndim - 1))
        if layer in OPENED:
            weights[OPENED[layer]] = weight.T
        else:
            weights[f"{RENAMED.get(layer, layer)}.weight"] = weight
    return weights, leaves


def embed_by_hand(name: str, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings of a fresh split CLIP with some of its weights exchanged."""
    plain = build(name, torch.float32).double()
    split_attention(plain)

    return functional_call(Both(plain, embed), {f"clip.{key}": weight for key, weight in weights.items()}, ())


class Both(nn.Module):
    """Both towers in one forward pass, as `functional_call` wants it."""

    def __init__(self, clip: nn.Module, both: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.clip, self.both = clip, both

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.both(self.clip)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_each_variant_starts_as_the_identity(name, variant):
    plain = build(name, torch.float32).double()
    # What PiSSA takes off and puts beside it, and the lengths that DoRA starts with, were rounded to float32 once.
    atol = 1e-6 if variant in ("pissa", "dora") else 1e-10
    for ours, theirs in zip(embed(adapted(name, variant, moved=False)), embed(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_forward_gradients_and_merge_equal_the_formula_on_every_target(name, variant):
    model = adapted(name, variant)
    weights, leaves = by_hand(model, variant)
    ours, theirs = embed(model), embed_by_hand(name, weights)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    for image, text in (ours, theirs):
        (model.logit_scale.exp() * (image * text).square().sum()).backward()
    trained = {key: p.grad for key, p in model.named_parameters() if p.requires_grad and key != "logit_scale"}
    assert trained.keys() == leaves.keys()
    for key, gradient in trained.items():
        assert gradient.abs().max() > 0, f"dead: {key}"
        torch.testing.assert_close(gradient, leaves[key].grad, rtol=1e-7, atol=1e-11)
    merged = plain_state_dict(model)
    plain = build(name, torch.float32).double()
    assert set(merged) == set(plain.state_dict())
    plain.load_state_dict(merged)
    split_attention(plain)
    found = dict(plain.named_parameters())
    for key, weight in weights.items():
        torch.testing.assert_close(found[key], weight.detach(), rtol=0, atol=1e-10)


def test_pissa_starts_with_the_largest_singular_values():
    model = adapted("tiny-vit", "pissa", moved=False)
    plain = build("tiny-vit", torch.float32).double()
    split_attention(plain)
    given = dict(model.named_parameters())
    layer = "transformer.resblocks.0.mlp.c_fc"
    a, b = (given[f"{layer}.lora_{x}.default.weight"] for x in "AB")
    u, s, v = torch.linalg.svd(plain.get_submodule(layer).weight.detach())
    principal = u[:, :RANK] @ torch.diag(s[:RANK]) @ v[:RANK]
    error = torch.linalg.norm((ALPHA / RANK * b @ a).detach() - principal) / torch.linalg.norm(principal)
    assert error < 1e-4  # peft decomposes in float32, and the third and fourth singular values are near each other


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_saved_adapter_loads_in_plain_peft(name, variant, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    model = adapted(name, variant)
    save_adapter(model, tmp_path)
    # PiSSA's start is computed anew, in the float32 that peft can decompose.
    dtype, atol = (torch.float32, 1e-5) if variant == "pissa" else (torch.float64, 1e-10)
    fresh = build(name, torch.float32).to(dtype)
    split_attention(fresh)
    open_projections(fresh)
    inject_adapter_in_model(LoraConfig.from_pretrained(str(tmp_path)), fresh)
    set_peft_model_state_dict(fresh, load_file(tmp_path / "adapter_model.safetensors"))
    fresh.double().eval()
    for x, y in zip(embed(fresh), embed(model), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize("name", TARGETS)
def test_merging_takes_every_adapter_and_projection_away(name):
    model = adapted(name, "lora")
    merge(model)
    assert set(model.state_dict()) == set(build(name).state_dict())


def siglip() -> nn.Module:
    """SigLIP in small: a timm trunk (q, k and v in one layer) with an attention pool, no causal mask, a biased
    projection."""
    torch.manual_seed(0)
    timm = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3, "act_layer": "gelu_tanh"}
    vision = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
    text = {"context_length": 16, "vocab_size": 1000, "width": 32, "heads": 2, "layers": 1}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    model_cfg = {"embed_dim": 24, "custom_text": True, "init_logit_bias": -10, "text_cfg": text}
    model_cfg |= {"vision_cfg": vision | {"image_size": 32, "timm_model_kwargs": timm}}
    return rebuild("siglip", model_cfg, {}).model.double().eval()


def see_and_read(model: nn.Module) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 32, 32, generator=random, dtype=torch.float64)
    return model.encode_image(pixels), model.encode_text(torch.randint(1, 1000, (2, 16), generator=random))


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora"])
def test_a_timm_trunk_its_attention_pool_and_a_projection_with_a_bias_follow_the_formula_too(variant):
    plain, model = siglip(), siglip()
    split_attention(plain)
    targets = [*TARGETS["tiny-vit"], "pool"]
    adapt(model, AdapterConfig(rank=RANK, alpha=ALPHA, targets=targets, variant=variant))
    for x, y in zip(see_and_read(model), see_and_read(plain), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    random = torch.Generator().manual_seed(5)
    for key, parameter in model.named_parameters():
        if "lora_B" in key or "lora_magnitude" in key:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
    layers = layers_of(model)
    pool = {f"visual.trunk.attn_pool.{part}" for part in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")}
    assert {"visual.trunk.blocks.1.attn.q_proj", "text.text_projection.linear", *pool} <= set(layers)
    assert len(layers) == 2 * 6 + 5 + 6 + 1  # blocks, pool, text block, projection
    weights, leaves = by_hand(model, variant)
    replaced = {f"clip.{key}": weight for key, weight in weights.items()}

    ours, theirs = see_and_read(model), functional_call(Both(plain, see_and_read), replaced, ())
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
    for image, text in (ours, theirs):
        (image * text).square().sum().backward()
    for key, leaf in leaves.items():
        gradient = dict(model.named_parameters())[key].grad
        assert gradient.abs().max() > 0, f"dead: {key}"
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-7, atol=1e-10)
    merged = plain_state_dict(model)
    fresh = siglip()
    fresh.load_state_dict(merged)
    for x, y in zip(see_and_read(fresh), ours, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


def test_some_of_q_k_and_v_can_be_chosen_in_a_timm_trunk():
    model = siglip()
    adapt(model, AdapterConfig(targets=["q", "v"]))
    image = {name for name in layers_of(model) if name.startswith("visual.")}
    assert image == {f"visual.trunk.blocks.{n}.attn.{part}_proj" for n in (0, 1) for part in "qv"}


@pytest.mark.parametrize("kind", ["full", "layernorm", "bias", "last", "probe"])
def test_each_kind_finds_its_weights_in_a_timm_trunk(kind):
    model = siglip()
    adapt(model, AdapterConfig(kind=kind))
    image, text = see_and_read(model)
    (model.logit_scale.exp() * (image * text).square().sum()).backward()
    moved = {key for key, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    unmoved = {key for key in trained - moved if "k_proj.bias" not in key and "embedding" not in key}
    assert not unmoved
    assert moved <= trained
    if kind == "probe":
        assert trained == {
            "logit_scale",
            "visual.trunk.attn_pool.mlp.fc2.weight",
            "visual.trunk.attn_pool.mlp.fc2.bias",
            "text.text_projection.weight",
            "text.text_projection.bias",
        }
    if kind == "last":
        assert "visual.trunk.blocks.1.attn.q_proj.weight" in trained
        assert "visual.trunk.blocks.0.attn.q_proj.weight" not in trained
