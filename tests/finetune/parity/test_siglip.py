"""transformers' SiglipModel and open_clip give the same embeddings, in both directions; and the same tokens."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, SiglipImageProcessorPil, SiglipModel, SiglipProcessor

from curate.clip import Clip, load_clip, siglip, timm_towers
from curate.clip.unigram import fast_tokenizer
from curate.errors import ModelError
from finetune.export import write_open_clip, write_transformers
from tests.finetune.siglip import LENGTH, WORDS, write_siglip

CAPTIONS = ["A red circle.", "ein Größentest: 12 × 3", "a very " + "long " * 40 + "caption", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    write_siglip(folder)
    return folder


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 50, 3), dtype=np.uint8))


def check(clip: Clip, model: SiglipModel) -> None:
    """Embeddings, and what makes logits of them, are those of transformers."""
    pixels, tokens = torch.randn(2, 3, 32, 32), clip.tokenizer(CAPTIONS)
    with torch.no_grad():
        expected = model(input_ids=tokens, pixel_values=pixels)
    torch.testing.assert_close(clip.embed_images(pixels), expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.embed_captions(tokens), expected.text_embeds, atol=1e-5, rtol=0)
    assert clip.model.logit_scale.item() == model.logit_scale.item()
    assert clip.model.logit_bias.item() == model.logit_bias.item()


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu"])
def test_a_siglip_folder_is_loaded_exactly(tmp_path, activation):
    model = write_siglip(tmp_path, activation)
    check(load_clip(str(tmp_path), device="cpu"), model)


def test_pixels_are_those_of_transformers(folder):
    clip = load_clip(str(folder), device="cpu")
    expected = SiglipImageProcessorPil.from_pretrained(folder)(picture(), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(clip.preprocess(picture()), expected, atol=1e-5, rtol=0)
    assert clip.preprocess_cfg["interpolation"] == "bilinear"


def test_tokens_are_those_of_sentencepiece(tmp_path):
    """With a model that the library trains here, as SigLIP's was: ids 0 to 2 for padding, end and unknown."""
    spm = pytest.importorskip("sentencepiece", reason="transformers' own SiglipTokenizer is made of it")
    from transformers.models.siglip import SiglipTokenizer

    draw = random.Random(0)
    corpus = [" ".join(draw.choices(WORDS.split(), k=8)) for _ in range(500)]
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    prefix = tmp_path / "spiece"
    given = {"model_prefix": str(prefix), "vocab_size": 46, "normalization_rule_name": "nmt_nfkc"}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(corpus), minloglevel=2, **given, **ids)
    path = tmp_path / "spiece.model"
    slow, fast = SiglipTokenizer(str(path)), fast_tokenizer(path, LENGTH)
    alphabet = [*WORDS.split(), *"ΣσΟΦabc12 .,!?'\"-_()", "ΣΟΦΟΣ", "Circle-Square", "SQ", "café", "  ", "½", "ﬁ", "🎉"]
    captions = ["", "...", *("".join(draw.choices(alphabet, k=9)) for _ in range(300))]
    captions += [" ".join(draw.choices(alphabet, k=9)) for _ in range(300)]
    captions = [" ".join(caption.split()) for caption in captions]  # as open_clip cleans them
    how = {"padding": "max_length", "truncation": True, "max_length": 32}
    expected, got = slow(captions, **how)["input_ids"], fast(captions, **how)["input_ids"]
    assert [pair for pair in zip(captions, expected, got, strict=True) if pair[1] != pair[2]] == []
    assert len({tuple(each) for each in got}) > 400


def test_a_folder_that_transformers_5_wrote_whole_is_read_too(folder, tmp_path):
    """It puts the pixels into processor_config.json, and the tokenizer into tokenizer.json."""
    model = SiglipModel.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path)
    processor = SiglipImageProcessorPil.from_pretrained(folder)
    tokenizer = fast_tokenizer(folder / "spiece.model", LENGTH)
    SiglipProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    clip, before = load_clip(str(tmp_path), device="cpu"), load_clip(str(folder), device="cpu")
    check(clip, model)
    assert clip.preprocess_cfg == before.preprocess_cfg
    assert torch.equal(clip.tokenizer(CAPTIONS), before.tokenizer(CAPTIONS))


def test_an_export_is_loaded_by_transformers_and_by_us(folder, tmp_path):
    clip = load_clip(str(folder), device="cpu")
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    write_transformers(clip, tmp_path)
    model, info = SiglipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    check(clip, model.eval())
    processor = AutoProcessor.from_pretrained(tmp_path)
    how = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    assert torch.equal(processor(text=CAPTIONS, **how)["input_ids"], clip.tokenizer(CAPTIONS))
    again = load_clip(str(tmp_path), device="cpu")
    check(again, model)
    assert again.preprocess_cfg == clip.preprocess_cfg
    assert torch.equal(again.tokenizer(CAPTIONS), clip.tokenizer(CAPTIONS))


def test_what_open_clip_cleans_transformers_cleans_after_the_export(folder, tmp_path):
    """open_clip's own SigLIPs take punctuation out before the tokenizer; underscores are spaces to them."""
    clip = load_clip(str(folder), device="cpu")
    clip.architecture["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    clip.tokenizer.clean_fn = open_clip.tokenizer.get_clean_fn("canonicalize")
    write_transformers(clip, tmp_path)
    captions = [*CAPTIONS, "under_score, with (brackets)"]
    how = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    got = AutoTokenizer.from_pretrained(tmp_path)(captions, **how)["input_ids"]
    assert torch.equal(got, clip.tokenizer(captions))


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-B-32-SigLIP2-256", "ViT-SO400M-14-SigLIP-384"])
def test_a_tower_that_timm_has_goes_by_its_name_so_that_open_clip_reads_it(name):
    """timm computes some with exact GELU, some with tanh: the other one is another function."""
    timm_name = open_clip.get_model_config(name)["vision_cfg"]["timm_model_name"]
    with torch.device("meta"):
        trunk = timm.create_model(timm_name, num_classes=0, global_pool="map")
    found = siglip.trunk_of(nn.ModuleDict({"visual": nn.ModuleDict({"trunk": trunk})}))
    assert siglip.timm_cfg(found) == {"timm_model_name": timm_name}
    other = {"none": "tanh", "tanh": "none"}[found.approximate]
    assert "timm_model_kwargs" in siglip.timm_cfg(replace(found, approximate=other))


def test_a_tower_that_open_clip_has_no_word_for_yet_is_not_exported_to_it(folder, tmp_path):
    clip = load_clip(str(folder), device="cpu")
    assert timm_towers.is_beyond_open_clip(clip.architecture)
    with pytest.raises(ModelError, match="timm_model_kwargs, which open_clip reads from version 4 on"):
        write_open_clip(clip, tmp_path)


def change(folder: Path, part: str | None, **changes) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    (content[part] if part else content).update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"hidden_act": "relu"}, r"vision_config\.hidden_act relu: expected one of"),
        ("vision_config", {"vision_use_head": False}, "without its attention pool is no CLIP"),
        ("vision_config", {"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05: timm's towers have 1e-06"),
        ("vision_config", {"num_hidden_layers": 3}, r"not a whole siglip model: no vision_model\.encoder\.layers\.2"),
        ("text_config", {"projection_size": 24}, "projection_size 24: the image tower's width is 48"),
        (None, {"model_type": "siglip2"}, "model_type is 'siglip2'; of transformers' models only CLIP"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, part, changes, message):
    write_siglip(tmp_path)
    change(tmp_path, part, **changes)
    with pytest.raises(ModelError, match=message):
        load_clip(str(tmp_path))


def test_a_folder_without_tokenizer_or_with_cropped_pixels_is_named(tmp_path):
    write_siglip(tmp_path)
    (tmp_path / "spiece.model").rename(tmp_path / "kept")
    with pytest.raises(ModelError, match=r"no tokenizer: neither spiece\.model nor tokenizer\.json"):
        load_clip(str(tmp_path))
    (tmp_path / "spiece.model").write_bytes(b"garbage")
    with pytest.raises(ModelError, match=r"spiece\.model: no model of SentencePiece"):
        load_clip(str(tmp_path))
    (tmp_path / "kept").rename(tmp_path / "spiece.model")
    path = tmp_path / "preprocessor_config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps(given | {"do_normalize": False}))
    with pytest.raises(ModelError, match="do_normalize False: only 1 is converted"):
        load_clip(str(tmp_path))
    path.write_text(json.dumps(given | {"size": {"shortest_edge": 32}}))
    with pytest.raises(ModelError, match="expected height and width, and no cropping"):
        load_clip(str(tmp_path))
