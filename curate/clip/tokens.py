"""Hugging Face tokenizers around a CLIP: from its folder, and as files that a checkpoint can hold.

open_clip's `HFTokenizer` calls them: captions are cleaned of mojibake, HTML entities and runs of white space, cut at
the context length, and padded to it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.clip.unigram import cleaning, fast_tokenizer
from curate.errors import ModelError

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model", "spiece.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face tokenizer."""
    return any((folder / name).is_file() for name in _FILES)


def read_tokenizer(source: Path | str, text_cfg: Mapping[str, Any]) -> HFTokenizer:
    """The tokenizer in a folder, or of an id of the hub, as open_clip calls it.

    Args:
        source: a folder or an id.
        text_cfg: of open_clip's model configuration: `context_length`, `tokenizer_mode`, `tokenizer_kwargs`.

    Raises:
        ModelError: it needs a package that is not installed.
    """
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer

    try:
        return HFTokenizer(
            str(source),
            context_length=text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH),
            tokenizer_mode=text_cfg.get("tokenizer_mode"),
            **(text_cfg.get("tokenizer_kwargs") or {}),
        )
    except ImportError as error:
        raise ModelError(f"{source}: its tokenizer needs a package: {' '.join(str(error).split())[:200]}") from error


def read_siglip_tokenizer(folder: Path, text_cfg: Mapping[str, Any]) -> HFTokenizer:
    """The tokenizer of a transformers SigLIP's folder; of one that is sentencepiece's a fast form, with the same ids.

    Raises:
        ModelError: there is none.
    """
    if (folder / "spiece.model").is_file():
        with tempfile.TemporaryDirectory() as written:
            fast_tokenizer(folder / "spiece.model", text_cfg["context_length"]).save_pretrained(written)
            return read_tokenizer(written, text_cfg)
    if not has_tokenizer(folder):
        raise ModelError("no tokenizer: neither spiece.model nor tokenizer.json")
    return read_tokenizer(folder, text_cfg)


def tokenizer_as_files(tokenizer: HFTokenizer) -> dict[str, str]:
    """What `save_pretrained` writes, by file name; bytes as the characters of Latin-1, so that any file is text."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes().decode("latin-1") for path in sorted(Path(folder).iterdir())}


def tokenizer_from_files(files: Mapping[str, str], text_cfg: Mapping[str, Any]) -> HFTokenizer:
    """The tokenizer that `tokenizer_as_files` was given."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content.encode("latin-1"))
        return read_tokenizer(folder, text_cfg)


def files_for_transformers(tokenizer: HFTokenizer, text_cfg: Mapping[str, Any]) -> dict[str, str]:
    """The files of a tokenizer that gives transformers the ids that open_clip's gives, cleaning of captions included.

    Raises:
        ModelError: it is none of the `tokenizers` library, or its cleaning has no form there.
    """
    clean = (text_cfg.get("tokenizer_kwargs") or {}).get("clean", "whitespace")
    backend = getattr(getattr(tokenizer, "tokenizer", None), "backend_tokenizer", None)
    if backend is None or clean not in ("whitespace", "lower", "canonicalize") or text_cfg.get("tokenizer_mode"):
        raise ModelError("this CLIP's tokenizer has no form that transformers could load; export to open_clip instead")
    files = tokenizer_as_files(tokenizer)
    files["tokenizer.json"] = json.dumps(_cleaned(backend, clean), ensure_ascii=False)
    config = json.loads(files["tokenizer_config.json"])
    # transformers 5 writes a name that version 4 does not know; both know this one.
    files["tokenizer_config.json"] = json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
    return {name: files[name] for name in ("tokenizer.json", "tokenizer_config.json")}


def _cleaned(backend: Any, clean: str) -> Any:
    """tokenizer.json with open_clip's cleaning before its own normalizer."""
    from tokenizers import Regex, Tokenizer, normalizers

    before: dict[str, list[Any]] = {
        "whitespace": [],
        "lower": [normalizers.Lowercase()],
        "canonicalize": [
            normalizers.Replace("_", " "), *cleaning(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()
        ],
    }  # fmt: skip
    copied = Tokenizer.from_str(backend.to_str())
    own = [copied.normalizer] if copied.normalizer is not None else []
    if before[clean]:
        copied.normalizer = normalizers.Sequence([*before[clean], *own])
    copied.no_padding()
    copied.no_truncation()
    return json.loads(copied.to_str())
