"""SigLIP's SentencePiece file (`spiece.model`) as a fast tokenizer, cleaning of captions included.

transformers' own `SiglipTokenizer` is written in Python around the sentencepiece library: it lowers captions, takes
ASCII punctuation out, and lets the library cut them into the pieces of its unigram model (arXiv 1804.10959). The same
steps stand here in one `tokenizers.Tokenizer`, which needs no sentencepiece, is many times faster, and travels as one
text file, tokenizer.json. That both give the same ids is tested (tests/finetune/parity/test_siglip.py).
"""

from __future__ import annotations

import re
import string
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
    end, unknown = (spec.pieces[number].piece for number in (spec.trainer_spec.eos_id, spec.trainer_spec.unk_id))
    tokenizer = Tokenizer(
        models.Unigram([(piece.piece, piece.score) for piece in spec.pieces], unk_id=spec.trainer_spec.unk_id)
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (end, unknown)])
    charsmap = spec.normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = normalizers.Sequence(
        [
            *cleaning(),
            *([normalizers.Precompiled(charsmap)] if charsmap else []),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    space: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**space)
    tokenizer.decoder = decoders.Metaspace(**space)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", end], special_tokens=[(end, spec.trainer_spec.eos_id)]
    )
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


def _parsed(path: Path) -> Any:
    """The file as the ModelProto of sentencepiece_model.proto."""
    from google.protobuf.message import DecodeError
    from transformers.utils.sentencepiece_model_pb2_new import ModelProto

    try:
        spec = ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise ModelError(f"{path}: no model of SentencePiece") from error
    if not spec.pieces or spec.trainer_spec.model_type != _UNIGRAM:
        raise ModelError(f"{path}: expected SentencePiece's unigram model, as SigLIP has it")
    return spec
