"""LoRA's linear layer: peft's own numbers and gradients, in any precision and wherever it is copied to."""

from __future__ import annotations

import copy

import pytest
import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn

from finetune.attention import split_attention
from finetune.lora import LoraAttention, LoraBlock, LoraLinear, LoraMlp, quicken, unquicken
from finetune.pooling import LastBlock


def model_of(**more) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8, bias=False)).double()
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], **more), made)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return made.double()


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
    return {"out": out.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)])
def test_numbers_and_gradients_are_pefts(shape):
    theirs, ours = model_of(), model_of()
    quicken(ours)
    assert [type(ours[0]), type(ours[2])] == [LoraLinear] * 2
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(shape, dtype=torch.float64)
    expected, found = gradients(theirs, x), gradients(copy.deepcopy(ours), x)
    assert len(expected) == 6
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_under_autocast_it_computes_in_bfloat16():
    theirs, ours = model_of().float(), model_of().float()
    quicken(ours)
    x = torch.randn(6, 12)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = gradients(theirs, x), gradients(ours, x)
    assert found["out"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert (found[name].float() - value.float()).norm() <= 0.03 * value.float().norm(), name


def test_merged_or_dropped_it_is_pefts():
    ours = model_of()
    quicken(ours)
    x = torch.randn(4, 12, dtype=torch.float64)
    before = ours(x)
    ours[0].merge()
    torch.testing.assert_close(ours(x), before)
    dropping = model_of(lora_dropout=0.5)
    quicken(dropping)
    assert not torch.equal(dropping(x), dropping(x))
    dropping.eval()
    torch.testing.assert_close(dropping(x), before)


def test_dora_is_left_to_peft():
    dora = model_of(use_dora=True)
    quicken(dora)
    assert [type(dora[0]), type(dora[2])] == [Linear] * 2


def block_of(activation=nn.GELU, *, last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(ResidualAttentionBlock(8, 2, act_layer=activation))
    split_attention(made)
    if last:
        made[0] = LastBlock(made[0], first=True)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), made)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return made.double()


@pytest.mark.parametrize("activation", [nn.GELU, lambda: nn.GELU("tanh"), QuickGELU, nn.ReLU])
@pytest.mark.parametrize("last", [False, True])
def test_a_whole_block_is_pefts(activation, last):
    theirs, ours = block_of(activation, last=last), block_of(activation, last=last)
    quicken(ours)
    assert type(ours[0].attn) is LoraAttention
    assert (type(ours[0].mlp) is LoraMlp) == (activation is not nn.ReLU)
    assert (type(ours[0]) is LoraBlock) == (activation is not nn.ReLU and not last)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    expected, found = gradients(theirs, x), gradients(copy.deepcopy(ours), x)
    assert len(expected) == 14
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


def kept(model: nn.Module, x: torch.Tensor) -> int:
    """Numbers that autograd keeps, but for the weights."""
    found: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes() // 8
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(x)
    assert out.requires_grad
    return sum(numbers for place, numbers in found.items() if place not in own)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_block_under_autocast_is_as_near_to_exact_as_pefts(kind):
    """Given float32, or bfloat16 as a ViT's residual stream is."""
    theirs, ours = block_of().float(), block_of().float()
    quicken(ours)
    x = torch.randn(3, 5, 8).to(kind)
    exact = gradients(theirs, x.float())
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = gradients(theirs, x), gradients(ours, x)
    for name, value in exact.items():
        assert found[name].dtype == expected[name].dtype
        theirs_off, ours_off = ((each[name].float() - value).norm() / value.norm() for each in (expected, found))
        assert ours_off <= 1.5 * theirs_off + 0.005, name


@pytest.mark.parametrize(("activation", "spared"), [(nn.GELU, 4), (QuickGELU, 8)])
def test_of_a_block_the_outputs_of_norms_and_activation_are_not_kept(activation, spared):
    x = torch.randn(3, 50, 8, dtype=torch.float64, requires_grad=True)
    theirs, ours = block_of(activation), block_of(activation)
    quicken(ours)
    low = 6 * 150 * 2  # peft keeps each layer's low-rank image too
    norms = 2 * x.numel() + 2 * 2 * 150  # their outputs, means and deviations
    assert kept(theirs, x) - kept(ours, x) == pytest.approx(spared * x.numel() + low + norms, abs=20)


@pytest.mark.parametrize("freed", ["before", "after"])
def test_norms_that_are_trained_get_their_gradients(freed):
    theirs, ours = block_of(), block_of()
    theirs[0].ln_1.requires_grad_()
    ours[0].ln_1.requires_grad_(freed == "before")
    quicken(ours)
    assert (type(ours[0]) is LoraBlock) == (freed == "after")
    ours[0].ln_1.requires_grad_()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    expected, found = gradients(theirs, x), gradients(ours, x)
    assert expected.keys() == found.keys()
    assert "0.ln_1.weight" in found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_what_is_computed_quicker_becomes_open_clips_own_again():
    ours = block_of()
    quicken(ours)
    unquicken(ours)
    assert [type(ours[0]), type(ours[0].mlp)] == [ResidualAttentionBlock, nn.Sequential]


def test_an_update_that_half_precision_would_round_away_in_the_weight_is_there():
    made = nn.Sequential(nn.Linear(4, 2))
    inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, target_modules=["0"]), made)
    nn.init.ones_(made[0].base_layer.weight)
    nn.init.constant_(made[0].base_layer.bias, -4)
    nn.init.ones_(made[0].lora_A["default"].weight)
    nn.init.constant_(made[0].lora_B["default"].weight, 1e-3)
    quicken(made)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(torch.ones(1, 4)).flatten().tolist() == pytest.approx([4e-3] * 2, rel=0.01)


def test_after_merging_the_block_still_runs():
    ours = block_of()
    quicken(ours)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    before = ours(x)
    for name, module in list(ours.named_modules()):
        if isinstance(module, LoraLinear):
            module.merge()
            ours.set_submodule(name, module.get_base_layer())
    torch.testing.assert_close(ours(x), before)
