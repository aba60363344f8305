"""A tiny SigLIP in transformers' own format: real `SiglipModel`, real SentencePiece file, random weights."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path

import torch
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

WORDS = "a photo of red green blue yellow white purple orange cyan circle square cat dog größe σοφος tree"
LENGTH = 16


def write_spiece(path: Path) -> int:
    """A unigram model as sentencepiece writes it: pieces with log probabilities, words and letters; how many."""
    letters = Counter("abcdefghijklmnopqrstuvwxyzöüßσοφς0123456789▁")
    pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)]
    pieces += [(f"▁{word}", -3.0 - number / 10, 1) for number, word in enumerate(WORDS.split())]
    pieces += [("at", -5.5, 1), ("sq", -5.6, 1), ("▁c", -5.7, 1)]
    pieces += [(letter, -8.0 - number / 100, 1) for number, letter in enumerate(letters)]
    given = [field(1, field(1, piece.encode()) + field(2, score) + field(3, kind)) for piece, score, kind in pieces]
    trainer = field(3, 1) + field(40, 2) + field(42, 1)  # unigram; ids of unknown and end
    path.write_bytes(b"".join(given) + field(2, trainer) + field(3, field(1, b"identity")))
    return len(pieces)


def field(number: int, value: float | bytes) -> bytes:
    """A field of a protocol buffer: a small whole number, a float32, or bytes."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def write_siglip(folder: Path, activation: str = "gelu_pytorch_tanh", **vision: int) -> SiglipModel:
    """Write a `SiglipModel` with its processor and tokenizer, as google's repositories are; and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_spiece(folder / "spiece.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": vocabulary}
    text = {"hidden_size": 40, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 4}
    image = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 3}
    image |= {"image_size": 32, "patch_size": 8} | vision
    text |= {"max_position_embeddings": LENGTH, "projection_size": image["hidden_size"]}
    config = SiglipConfig(
        text_config=ids | text | {"hidden_act": activation}, vision_config=image | {"hidden_act": activation}
    )
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # zeros would hide a mistake
    model.logit_scale.data.fill_(math.log(112))  # above 100, as published ones are
    model.logit_bias.data.fill_(-16.5)
    model.save_pretrained(folder)
    size = {"height": image["image_size"], "width": image["image_size"]}
    SiglipImageProcessor(size=size, resample=2).save_pretrained(folder)
    return model
