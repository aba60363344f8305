"""Captions in rows and last blocks of what is pooled alone: the same embeddings and gradients, fewer tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.clip import load_clip
from finetune.adapters import adapt
from finetune.config import AdapterConfig, ComputeConfig
from finetune.module import CLIPModule
from finetune.packing import encode_packed, packer_of, rows_of
from finetune.pooling import LastBlock, pool_in_last_blocks, whole_last_blocks
from tests.finetune.test_trimming import made

CAPTIONS = ["a cat", "two dogs and one bird on a wire", "", "snow " * 60, "snow", "a cat", "one more of a few words"]


@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_every_caption_is_in_one_row_that_has_room_for_it(lengths):
    rows = rows_of(lengths, 32)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in row) <= 32 for row in rows)
    assert len(rows) <= 2 * -(-sum(lengths) // 32)  # two half-empty ones would have been one


def features_and_gradients(model: Any, encode: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    found = encode()
    (found * torch.arange(1, found.numel() + 1).view(found.shape)).sum().backward()
    return {"": found.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ({}, {}),
        ({"ls_init_value": 0.3}, {"custom_text": True, "quick_gelu": True}),
        ({"pool_type": "eos", "eos_id": 49407, "proj_bias": True}, {"custom_text": True}),
        ({"layers": 1}, {"custom_text": True}),
    ],
    ids=["clip", "layer scale", "eos", "one block"],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_captions_have_open_clips_features_and_gradients(text, more, checkpointed, tmp_path):
    torch.manual_seed(0)
    clip = load_clip(made(tmp_path, text, **more), device="cpu")
    plain: Any = clip.model.double()
    tokens = clip.tokenizer(CAPTIONS)
    ours = copy.deepcopy(plain)
    adapt(ours, AdapterConfig(kind="full"))
    getattr(ours, "text", ours).transformer.grad_checkpointing = checkpointed
    packer = packer_of(ours)
    assert packer is not None
    (packed,) = packer(tokens)
    assert packed.token_RW.shape == (2, 64)  # 62 tokens of snow, and all others in the second row
    expected = features_and_gradients(plain, lambda: plain.encode_text(tokens))
    found = features_and_gradients(ours, lambda: encode_packed(ours, packed))
    whole_last_blocks(ours)
    assert len(found) > 10
    torch.testing.assert_close(found.pop(""), expected.pop(""), rtol=1e-9, atol=1e-12)
    for name, gradient in found.items():
        if ".attn." not in name:  # split here, packed there
            torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-11, msg=name)


def test_captions_that_packing_does_not_shorten_stay_as_they_are(tmp_path):
    clip = load_clip(made(tmp_path, {}), device="cpu")
    adapt(clip.model, AdapterConfig(kind="full"))
    packer = packer_of(clip.model)
    assert packer(clip.tokenizer(["snow " * 80] * 3)) is None
    assert packer(clip.tokenizer(["a cat"])[:, :8]) is None
    assert packer(torch.zeros(0, 8, dtype=torch.int64)) is None


@pytest.mark.parametrize(
    "text", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}, {"qk_norm": True}]
)
def test_towers_of_another_kind_are_not_packed(text, tmp_path):
    clip = load_clip(made(tmp_path, text, custom_text=True), device="cpu")
    adapt(clip.model, AdapterConfig(kind="full"))
    assert packer_of(clip.model) is None


@pytest.mark.parametrize("vision", [{}, {"ls_init_value": 0.2}, {"pool_type": "avg"}, {"attentional_pool": True}])
def test_last_blocks_keep_embeddings_gradients_and_keys(vision, tmp_path):
    from tests.finetune import tiny

    torch.manual_seed(0)
    config = tiny.ARCHITECTURES["tiny-vit"]["vision_cfg"] | vision
    clip = load_clip(made(tmp_path, {}, vision_cfg=config), device="cpu")
    whole: Any = clip.model.double()
    adapt(whole, AdapterConfig(kind="full"))
    whole_last_blocks(whole)
    last = copy.deepcopy(whole)
    pool_in_last_blocks(last)
    assert isinstance(last.visual.transformer.resblocks[-1], LastBlock) == ("pool" not in "".join(vision))
    assert last.state_dict().keys() == whole.state_dict().keys()
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    tokens = clip.tokenizer(CAPTIONS)
    for encode, inputs in (("encode_image", pixels), ("encode_text", tokens)):
        first, second = (
            features_and_gradients(m, lambda m=m, e=encode, x=inputs: getattr(m, e)(x)) for m in (whole, last)
        )
        assert first.keys() == second.keys()
        for name, expected in first.items():
            torch.testing.assert_close(second[name], expected, rtol=1e-8, atol=1e-11, msg=name)
    again = copy.deepcopy(last)
    whole_last_blocks(again)
    assert [type(m) for m in again.modules()] == [type(m) for m in whole.modules()]
    assert torch.equal(again.encode_image(pixels), whole.encode_image(pixels))


@pytest.mark.parametrize("adapter", [{"kind": "full"}, {"rank": 2}], ids=["full", "lora"])
def test_a_batch_in_parts_is_packed_in_parts(adapter, tmp_path):
    torch.manual_seed(0)
    architecture = {"name": made(tmp_path, {}), "pretrained": None}
    module = CLIPModule(architecture, adapter).double()
    for name, parameter in module.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tokens = module.clip.tokenizer([*CAPTIONS, *CAPTIONS])
    batch = {"pixels": torch.randn(14, 3, 32, 32, dtype=torch.float64), "tokens": tokens}
    batch["group"] = torch.arange(14)
    found = []
    for size, tokens_too in ((None, True), (None, False), (5, True)):
        module.compute = ComputeConfig(micro_batch_size=size)
        packed = packer_of(module.model, size)(tokens)
        assert len(packed) == (3 if size else 1)
        more = {"packed": packed} if tokens_too else {}
        module.zero_grad()
        module.batch_loss(batch | more, gather=False).backward()
        found.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    for other in found[1:]:
        for name, expected in found[0].items():
            torch.testing.assert_close(other[name], expected, rtol=1e-8, atol=1e-11, msg=name)


def test_rows_move_with_their_batch():
    from lightning.fabric.utilities import move_data_to_device

    from finetune.packing import pack
    from finetune.trimming import Trim

    tokens = torch.tensor([[5, 9, 0, 0]] * 40)
    batch = {"packed": [pack(torch.nn.functional.pad(tokens, (0, 28)), Trim())]}
    moved = move_data_to_device(batch, torch.device("meta"))["packed"][0]
    assert {getattr(moved, name).device.type for name in moved.__slots__} == {"meta"}
