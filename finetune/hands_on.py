"""The hands-on of OpenAI's `clip`, for any CLIP: what its README shows runs with `import finetune as clip`.

    model, preprocess = clip.load("ViT-B/32", device=device)
    image = preprocess(Image.open("photo.jpg")).unsqueeze(0).to(device)       # (1, 3, 224, 224)
    text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)          # (3, 77)

    with torch.no_grad():
        image_features = model.encode_image(image)                            # (1, 512), not normalised
        text_features = model.encode_text(text)                               # (3, 512), not normalised
        logits_per_image, logits_per_text = model(image, text)                # (1, 3), (3, 1)
        probs = logits_per_image.softmax(dim=-1)

Names, shapes and errors are those of openai/CLIP's clip.py and model.py. Different on purpose: weights are float32 on
every device, where OpenAI's are float16 on a GPU (`model.half()` makes them so); archives are read without running
them; and any CLIP loads, not only OpenAI's nine.

The model is open_clip's, with its own state dict: `load` gives the object a subclass that answers as OpenAI's does. A
wrapper around it would prefix every key.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from curate.clip import OPENAI_NAMES
from curate.errors import ConfigError, ModelError
from finetune.runs import load_named

OPENAI_CACHE = Path("~/.cache/clip")  # where OpenAI's package keeps what it has fetched
CONTEXT_LENGTH = 77  # of all of OpenAI's


# --- the module's functions -------------------------------------------------------------------------------------------


def available_models() -> list[str]:
    """OpenAI's own CLIPs, by the names that `load` takes; it takes others, too."""
    return list(OPENAI_NAMES)


def load(
    name: str | Path,
    device: str | torch.device = "auto",
    jit: bool = False,
    download_root: str | Path | None = None,
) -> tuple[Any, Any]:
    """A CLIP in eval mode, and what makes pixels for it.

    Args:
        name: one of `available_models()`; an open_clip architecture and tag, `ViT-B-32/laion2b_s34b_b79k`; a file of
            OpenAI's (`ViT-B-32.pt`); a folder of open_clip, of transformers or of `finetune export`; a run of
            `finetune fit` (its best checkpoint), or one of its checkpoints; `hf-hub:ID`.
        device: `auto` is cuda, else mps, else cpu.
        jit: there for OpenAI's signature; only False.
        download_root: folder in which OpenAI's package has left its files, `~/.cache/clip` if None. One of them that is
            there is taken from there; any other weights come from open_clip's cache, or are fetched into it.

    Returns:
        (model, preprocess): `CLIP` or `CustomTextCLIP` of this module; PIL image → float32 pixels (3, H, W).

    Raises:
        ConfigError: `jit` is asked for.
        ModelError: there is no such CLIP, or its weights cannot be had.
    """
    if jit:
        raise ConfigError("load: jit=True is not offered; leave it out, and use torch.compile(model) for speed")
    if name in OPENAI_NAMES:
        name = _fetched_by_openai(str(name), Path(download_root or OPENAI_CACHE).expanduser()) or name
    clip = load_named(str(name), str(device))
    return as_openai(clip.model, clip.tokenizer), clip.preprocess


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False) -> Tensor:
    """Token ids of CLIP's BPE, int32 (n, context_length): start, text, end, zeros.

    A CLIP with another context length or tokenizer has a `model.tokenize(texts)` that knows them.

    Args:
        texts: several, or one.
        context_length: 77 for all of OpenAI's.
        truncate: cut what is too long, keeping the end token.

    Raises:
        RuntimeError: a text is too long, and `truncate` is False; the class and words are OpenAI's.
    """
    return _tokens(_bpe(), texts, context_length, truncate)


# --- the model --------------------------------------------------------------------------------------------------------


class OpenAIForm(nn.Module):
    """What OpenAI's CLIP answers and open_clip's does not, or does otherwise.

    Attributes:
        visual: the image tower; `visual.input_resolution` is the side of its images in pixels.
        context_length: tokens of a text.
        vocab_size: number of token ids.
        logit_scale: ln of what cosines are multiplied by.
        tokenizer: open_clip's, for `tokenize`.
    """

    visual: nn.Module
    context_length: int
    vocab_size: int
    tokenizer: Any

    @property
    def dtype(self) -> torch.dtype:
        """Of the first convolution's weights, as in OpenAI's."""
        return next(weight.dtype for weight in self.visual.parameters() if weight.ndim == 4)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings (B, D) of pixels (B, 3, H, W); OpenAI's are not normalised."""
        features: Tensor = super().encode_image(image.to(self.dtype), normalize)  # type: ignore[misc]
        return features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings (B, D) of token ids (B, context_length); OpenAI's are not normalised.

        Raises:
            ModelError: the ids were made for another context length.
        """
        if text.ndim != 2 or text.shape[1] != self.context_length:
            raise ModelError(
                f"encode_text: expected token ids of shape [n, {self.context_length}], got {list(text.shape)}; "
                "model.tokenize(texts) makes them as this CLIP needs them"
            )
        features: Tensor = super().encode_text(text, normalize)  # type: ignore[misc]
        return features

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_per_image (B, n), logits_per_text (n, B)): exp(logit_scale) · cosine, plus SigLIP's bias."""
        per_image, per_text = self.get_logits(image, text)  # type: ignore[operator]
        return per_image, per_text

    def tokenize(self, texts: str | Sequence[str], truncate: bool = False) -> Tensor:
        """As the module's `tokenize`, with this CLIP's tokenizer and context length.

        A tokenizer other than CLIP's BPE (SigLIP's) always cuts what is too long, as it did in training.

        Raises:
            RuntimeError: a text is too long, and `truncate` is False.
        """
        tokenizer = self.tokenizer
        if isinstance(tokenizer, open_clip.SimpleTokenizer) and tokenizer.reduction_fn is None:
            return _tokens(tokenizer, texts, self.context_length, truncate)
        tokens: Tensor = tokenizer([texts] if isinstance(texts, str) else list(texts), self.context_length)
        return tokens


class CLIP(OpenAIForm, open_clip.CLIP):
    """open_clip's CLIP, answering as OpenAI's."""


class CustomTextCLIP(OpenAIForm, open_clip.CustomTextCLIP):
    """open_clip's CLIP with a text tower of another kind (SigLIP's, transformers'), answering as OpenAI's."""


def as_openai(model: nn.Module, tokenizer: Any) -> OpenAIForm:
    """The same model, weights and keys, answering as OpenAI's does from now on.

    Raises:
        ModelError: more than two towers (CoCa).
    """
    forms = {open_clip.CLIP: CLIP, open_clip.CustomTextCLIP: CustomTextCLIP}
    if type(model) not in forms:
        raise ModelError(f"{type(model).__name__}: not a CLIP of an image and a text tower, which OpenAI's hands-on is")
    changed: Any = model
    changed.__class__ = forms[type(model)]
    size = changed.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    changed.visual.input_resolution = height if height == width else (height, width)
    changed.tokenizer = tokenizer
    form: OpenAIForm = changed
    return form


# --- parts ------------------------------------------------------------------------------------------------------------


def _fetched_by_openai(name: str, cache: Path) -> Path | None:
    file = cache / f"{name.replace('/', '-').replace('@', '-')}.pt"
    return file if file.is_file() else None


@lru_cache(maxsize=1)
def _bpe() -> Any:
    return open_clip.SimpleTokenizer()


def _tokens(bpe: Any, texts: str | Sequence[str], context_length: int, truncate: bool) -> Tensor:
    """As openai/CLIP's `clip.tokenize`; open_clip's own tokenizer cuts without a word."""
    texts = [texts] if isinstance(texts, str) else texts
    ids = torch.zeros(len(texts), context_length, dtype=torch.int)
    for row, text in zip(ids, texts, strict=True):
        tokens = [bpe.sot_token_id, *bpe.encode(text), bpe.eot_token_id]
        if len(tokens) > context_length:
            if not truncate:
                raise RuntimeError(f"Input {text} is too long for context length {context_length}")
            tokens = [*tokens[: context_length - 1], bpe.eot_token_id]
        row[: len(tokens)] = torch.tensor(tokens)
    return ids
