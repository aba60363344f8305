"""SigLIP's SentencePiece file (`spiece.model`) as a fast tokenizer, cleaning of captions included.

transformers' own `SiglipTokenizer` is written in Python around the sentencepiece library: it lowers captions, takes
ASCII punctuation out, and lets the library cut them into the pieces of its unigram model (arXiv 1804.10959). The same
steps stand here in one `tokenizers.Tokenizer`, which needs no sentencepiece, is many times faster, and travels as one
text file, tokenizer.json. That both give the same ids is tested (tests/finetune/parity/test_siglip.py).
"""

from __future__ import annotations

import re
import string
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.errors import ModelError

# Unicode's Cased and Case_Ignorable (The Unicode Standard, 3.13), nearly.
_CASED, _IGNORED = r"[\p{Lu}\p{Ll}\p{Lt}]", r"[\p{Mn}\p{Me}\p{Cf}\p{Lm}\p{Sk}'.:·’‘․]*"
_UNIGRAM = 1  # TrainerSpec.ModelType of sentencepiece_model.proto


def fast_tokenizer(path: Path, context_length: int) -> Any:
    """A transformers tokenizer (`PreTrainedTokenizerFast`) of a SigLIP's `spiece.model`.

    Args:
        path: the file; a unigram model.
        context_length: what the tokenizer says is the longest caption.

    Raises:
        ModelError: no unigram model of SentencePiece.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    spec = _parsed(path)
    end, unknown = (spec.pieces[number][0] for number in (spec.end, spec.unknown))
    tokenizer = Tokenizer(models.Unigram(spec.pieces, unk_id=spec.unknown))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (end, unknown)])
    tokenizer.normalizer = normalizers.Sequence(
        [
            *cleaning(),
            *([normalizers.Precompiled(spec.charsmap)] if spec.charsmap else []),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    space: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**space)
    tokenizer.decoder = decoders.Metaspace(**space)
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", end], special_tokens=[(end, spec.end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=end,  # as SigLIP was trained
        unk_token=unknown,
        model_max_length=context_length,
        padding_side="right",
        model_input_names=["input_ids"],  # padding is seen, so there is no mask
    )


def cleaning() -> list[Any]:
    """What SigLIP does to a caption first, as normalizers: lower case, without ASCII punctuation."""
    from tokenizers import Regex, normalizers

    return [
        # Python's lower() knows the sigma that ends a word; this Lowercase, which goes letter by letter, does not.
        normalizers.Replace(Regex(rf"{_CASED}{_IGNORED}\KΣ(?!{_IGNORED}{_CASED})"), "ς"),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
    ]


@dataclass(frozen=True)
class _Spec:
    """What is needed of sentencepiece_model.proto's ModelProto."""

    pieces: list[tuple[str, float]]
    end: int
    unknown: int
    charsmap: bytes


def _parsed(path: Path) -> _Spec:
    """Read the file: protocol buffers, of which two modules for one schema cannot live in one process."""
    try:
        model = _fields(path.read_bytes())
        pieces = [_fields(piece) for piece in model[1]]
        trainer, normalizer = (_fields(model[number][0]) for number in (2, 3))
        spec = _Spec(
            pieces=[(piece[1][0].decode("utf-8"), *struct.unpack("<f", piece[2][0])) for piece in pieces],
            end=trainer.get(42, [2])[0],
            unknown=trainer.get(40, [0])[0],
            charsmap=normalizer.get(2, [b""])[0],
        )
    except (KeyError, IndexError, ValueError, TypeError, struct.error) as error:
        raise ModelError(f"{path}: no model of SentencePiece") from error
    if trainer.get(3, [_UNIGRAM])[0] != _UNIGRAM or max(spec.end, spec.unknown) >= len(pieces):
        raise ModelError(f"{path}: expected SentencePiece's unigram model, as SigLIP has it")
    return spec


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The values of a protocol buffer by field number: whole numbers as int, all else as bytes."""
    found: dict[int, list[Any]] = {}
    value: int | bytes
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, place = _varint(message, place)
        elif kind in (1, 2, 5):
            size, place = _varint(message, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
            value, place = message[place : place + size], place + size
        else:
            raise ValueError(f"wire type {kind}")
        if place > len(message):
            raise ValueError("cut off")
        found.setdefault(number, []).append(value)
    return found


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place
