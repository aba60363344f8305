"""LoRA's linear layer: peft's own numbers and gradients, in any precision and wherever it is copied to."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn

from finetune.lora import LoraLinear, quicken


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
