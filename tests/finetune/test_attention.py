from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.attention import SplitAttention, SplitAttentionPool, join_attention, split_attention
from tests.finetune.tiny import ARCHITECTURES


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    from open_clip import CLIP

    torch.manual_seed(0)
    model = CLIP(**ARCHITECTURES[name]).to(dtype).eval()
    for parameter in model.parameters():  # open_clip starts biases and the ResNet's last norms at zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 1000, (3, 16), generator=random)
    tokens[:, 9] = 49407
    return torch.randn(3, 3, 32, 32, generator=random, dtype=dtype), tokens


def embed(model: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, tokens = inputs(dtype)
    return model.encode_image(pixels), model.encode_text(tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_split_clip_embeds_like_the_packed_one(name, dtype, tolerance):
    model = build(name, dtype)
    with torch.no_grad():
        before = embed(model, dtype)
        split_attention(model)
        after = embed(model, dtype)
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_joining_gives_back_open_clips_keys_and_values(name):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    split_attention(model)
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    join_attention(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(isinstance(module, SplitAttention) for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_projection_is_called_in_the_forward_pass(name):
    model = build(name)
    split_attention(model)
    called = set()
    for path, module in model.named_modules():
        if path.endswith("_proj") and isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, path=path: called.add(path))
    embed(model)
    expected = {path for path, m in model.named_modules() if path.endswith("_proj") and isinstance(m, nn.Linear)}
    assert called == expected
    assert any("attnpool" in path for path in called) == (name == "tiny-resnet")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(None, None), (12, 20)])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per_head"])
def test_split_attention_equals_torchs_in_every_form(batch_first, bias, widths, mask):
    torch.manual_seed(0)
    kdim, vdim = widths
    packed = nn.MultiheadAttention(16, 4, bias=bias, kdim=kdim, vdim=vdim, batch_first=batch_first).double()
    for parameter in packed.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    shape = (lambda b, t: (b, t)) if batch_first else (lambda b, t: (t, b))
    query = torch.randn(*shape(2, 5), 16).double()
    key = torch.randn(*shape(2, 7), kdim or 16).double()
    value = torch.randn(*shape(2, 7), vdim or 16).double()
    masks = {
        "none": None,
        "bool": torch.ones(5, 7, dtype=torch.bool).triu(3),
        "float": torch.randn(5, 7).double(),
        "per_head": torch.randn(8, 5, 7).double(),
    }
    split = SplitAttention(packed)
    for x, y in zip(
        packed(query, key, value, attn_mask=masks[mask]), split(query, key, value, attn_mask=masks[mask]), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    assert split(query, key, value, need_weights=False)[1] is None
    joined = split.join()
    assert list(joined.state_dict()) == list(packed.state_dict())
    torch.testing.assert_close(joined(query, key, value)[0], packed(query, key, value)[0], rtol=0, atol=1e-10)


def test_attention_with_extra_keys_is_refused():
    with pytest.raises(ValueError, match="bias_k"):
        SplitAttention(nn.MultiheadAttention(8, 2, add_bias_kv=True))


def test_dropout_of_attention_stays_and_is_off_in_evaluation():
    torch.manual_seed(0)
    split = SplitAttention(nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True))
    x = torch.randn(2, 5, 16)
    assert not torch.equal(split(x, x, x)[0], split(x, x, x)[0])
    split.eval()
    assert torch.equal(split(x, x, x)[0], split(x, x, x)[0])


def test_gradients_of_the_attention_pool_equal_upstreams():
    from open_clip.modified_resnet import AttentionPool2d

    torch.manual_seed(0)
    pool = AttentionPool2d(2, 32, 4, 8).double()
    x = torch.randn(3, 32, 2, 2).double()
    pool(x).square().sum().backward()
    upstream = {name: p.grad.clone() for name, p in pool.named_parameters()}
    pool.zero_grad()
    split = SplitAttentionPool(pool)
    assert list(split.state_dict()) == list(pool.state_dict())
    split(x).square().sum().backward()
    for name, parameter in split.named_parameters():
        torch.testing.assert_close(parameter.grad, upstream[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", [None, torch.full((6, 6), -torch.inf).triu(1)])
def test_in_bfloat16_outputs_and_gradients_are_as_near_as_its_rounding(mask):
    torch.manual_seed(0)
    split = SplitAttention(nn.MultiheadAttention(32, 4, batch_first=True)).eval()
    x, toward, found = torch.randn(3, 6, 32), torch.randn(3, 6, 32), []
    for autocast in (False, True):
        given = x.clone().requires_grad_()
        split.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, _ = split(given, given, given, need_weights=False, attn_mask=mask)
        (out * toward).sum().backward()
        found.append((out, given.grad, split.q_proj.weight.grad.clone(), split.v_proj.weight.grad.clone()))
    assert found[1][0].dtype == torch.bfloat16
    for rounded, exact in zip(found[1], found[0], strict=True):
        assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


def test_in_bfloat16_attention_is_dropped_in_training_alone():
    torch.manual_seed(0)
    split = SplitAttention(nn.MultiheadAttention(32, 4, batch_first=True, dropout=0.5)).bfloat16()
    x = torch.randn(3, 6, 32).bfloat16()
    first, second = (split(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    split.eval()
    first, second = (split(x, x, x, need_weights=False)[0] for _ in range(2))
    assert torch.equal(first, second)
