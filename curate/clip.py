"""Load any CLIP that open_clip knows, and embed images and captions with it, L2-normalised.

    from PIL import Image
    from curate.clip import load

    clip = load("ViT-B/32")                                              # as CLIP's own users write it
    images = clip.embed_images([Image.open("photo.jpg")])                # (1, 512)
    captions = clip.embed_captions(["a photo of a cat", "a photo of a dog"])   # (2, 512)
    scale = clip.model.logit_scale.exp().item()                          # 100 for OpenAI's
    probabilities = (scale * images @ captions.T).softmax(dim=-1)        # (1, 2)

`curate` scores with it and `finetune` trains it, so both see the same preprocessing and tokenizer.
"""

from __future__ import annotations

import os
import socket
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from curate.errors import ConfigError, ModelError, did_you_mean
from curate.shards import file_sha256

if TYPE_CHECKING:
    import torch
    from PIL import Image

# The paper's five ResNets and its ViTs, as openai/CLIP names them, and open_clip's names for the architectures their
# weights need: QuickGELU throughout.
OPENAI_NAMES = {
    "RN50": "RN50-quickgelu",
    "RN101": "RN101-quickgelu",
    "RN50x4": "RN50x4-quickgelu",
    "RN50x16": "RN50x16-quickgelu",
    "RN50x64": "RN50x64-quickgelu",
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}


@dataclass
class Clip:
    """A CLIP with all that its weights need around them.

    Attributes:
        model: open_clip model, in eval mode, float32.
        preprocess: PIL image → float32 pixels (3, H, W), as in evaluation.
        tokenizer: captions → int64 token ids (B, L).
        name: the name it was asked for by.
        architecture: open_clip's model configuration (`embed_dim`, `vision_cfg`, `text_cfg`, …).
        preprocess_cfg: open_clip's preprocessing configuration (`size`, `mean`, `std`, `interpolation`, …).
    """

    model: torch.nn.Module
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenizer: Callable[[Sequence[str]], torch.Tensor]
    name: str
    architecture: dict[str, Any] = field(default_factory=dict)
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def embed_images(self, images: Sequence[Image.Image] | torch.Tensor) -> torch.Tensor:
        """Embeddings of PIL images, or of preprocessed pixels (B, 3, H, W).

        Returns:
            float32 (B, D), L2-normalised, without gradient.
        """
        import torch

        if not isinstance(images, torch.Tensor):
            images = torch.stack([self.preprocess(image.convert("RGB")) for image in images])
        with torch.inference_mode():
            features = self.model.encode_image(images.to(self.device))  # type: ignore[operator]
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def embed_captions(self, captions: Sequence[str] | torch.Tensor) -> torch.Tensor:
        """Embeddings of captions, or of token ids (B, L): float32 (B, D), L2-normalised, no gradient."""
        import torch

        tokens = captions if isinstance(captions, torch.Tensor) else self.tokenizer(list(captions))
        with torch.inference_mode():
            features = self.model.encode_text(tokens.to(self.device))  # type: ignore[operator]
        return torch.nn.functional.normalize(features.float(), dim=-1)


def load(name: str, pretrained: str | None = None, *, device: str = "auto") -> Clip:
    """Load a trained CLIP: OpenAI's by the name its users write (`ViT-B/32`), any other as `load_clip` does.

    Raises:
        ModelError: as `load_clip`; or no weights are named: random ones are not what anybody means here.
    """
    if pretrained is None and name in OPENAI_NAMES:
        pretrained = "openai"
    if pretrained is None and not name.startswith(("local-dir:", "hf-hub:")):
        names = ", ".join(OPENAI_NAMES)
        raise ModelError(f"load('{name}'): which weights? Give pretrained=, or one of OpenAI's names: {names}")
    return load_clip(name, pretrained, device=device)


def load_clip(name: str, pretrained: str | None = None, *, device: str = "auto") -> Clip:
    """Load a CLIP, ready for inference.

    Args:
        name: an open_clip architecture (`ViT-B-32`), OpenAI's name (`ViT-B/32`), `local-dir:FOLDER` or `hf-hub:ID` with
            architecture and weights, or the path of an open_clip model configuration (`tiny.json`).
        pretrained: an open_clip tag (`openai`, `laion2b_s34b_b79k`), the path of a weights file (OpenAI's TorchScript
            archives too: `ViT-B-32.pt`; they get the QuickGELU that they were trained with), or None: random
            weights from torch's global seed, unless the name brings its own.
        device: `auto` is cuda, else mps, else cpu.

    Raises:
        ModelError: unknown name or tag, weights that cannot be had or do not fit.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from safetensors import SafetensorError

    architecture, weights = _resolve(name, pretrained)
    _check_reachable(architecture, weights)
    archive = weights is not None and is_openai_archive(weights)
    try:
        if archive:
            model = open_clip.create_model(architecture, force_quick_gelu=True)
            model.load_state_dict(_openai_state(str(weights)))
        else:
            model = open_clip.create_model(architecture, pretrained=weights, weights_only=True)
    # AssertionError: open_clip's own, for weights of another width.
    except (
        RuntimeError,
        ValueError,
        OSError,
        LookupError,
        EOFError,
        AssertionError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        raise ModelError(f"clip {name}, pretrained {pretrained}: cannot be loaded: {first_line(error)}") from error
    preprocess_cfg = open_clip.get_model_preprocess_cfg(model)
    return Clip(
        model=model.eval().to(choose_device(device)),
        preprocess=image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False),
        tokenizer=open_clip.get_tokenizer(architecture),
        name=name,
        architecture=(open_clip.get_model_config(architecture) or {}) | ({"quick_gelu": True} if archive else {}),
        preprocess_cfg=preprocess_cfg,
    )


def is_openai_archive(path: str) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI published CLIP, and not a state dict."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _openai_state(path: str) -> dict[str, torch.Tensor]:
    """The float32 weights of OpenAI's archive, without the three numbers that it keeps among them."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; these archives stay as they are
        state = torch.jit.load(path, map_location="cpu").state_dict()
    numbers = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    return {name: value.float() for name, value in state.items() if name not in numbers}


def first_line(error: BaseException) -> str:
    """What an error says, in one line; of weights that do not fit, which one is the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def choose_device(device: str = "auto") -> str:
    """`auto` → the best device there is; anything else as it is."""
    import torch

    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def weights_fingerprint(name: str, pretrained: str | None) -> str:
    """What identifies a CLIP for resuming: names of published weights, the sha256 of local files."""
    paths = [Path(text) for text in (name.removeprefix("local-dir:"), pretrained or "") if text]
    files = sorted(
        file for path in paths for file in ([path] if path.is_file() else path.glob("open_clip_*")) if file.is_file()
    )
    return "|".join([name, str(pretrained), *(file_sha256(file) for file in files)])


def _resolve(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """open_clip's architecture name and weights for what the user wrote."""
    import open_clip

    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"clip name {name}: no such file; expected an open_clip model configuration")
        open_clip.add_model_config(path)
        return path.stem, pretrained
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise ModelError(
                f"{folder}: no open_clip_config.json; expected a folder that `finetune export` or open_clip wrote"
            )
        return name, None
    if name.startswith("hf-hub:"):
        return name, None
    known = open_clip.list_models()
    if pretrained == "openai":
        name = OPENAI_NAMES.get(name, name)
        # OpenAI's weights need QuickGELU; open_clip loads them into the plain architecture without a word.
        name = f"{name}-quickgelu" if f"{name}-quickgelu" in known else name
    name = name.replace("/", "-")
    if name not in known:
        raise ModelError(f"clip name '{name}': open_clip has no such architecture.{did_you_mean(name, known)}")
    if pretrained and not Path(pretrained).exists():
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            raise ModelError(
                f"clip pretrained '{pretrained}': neither a file nor a tag of {name}.{did_you_mean(pretrained, tags)}"
            )
    return name, pretrained


def _check_reachable(architecture: str, weights: str | None) -> None:
    """Say at once, instead of after a minute of retries, that weights are neither cached nor to be had."""
    import open_clip
    from huggingface_hub import constants, try_to_load_from_cache

    if weights is None or Path(weights).exists():
        return
    source = open_clip.get_pretrained_cfg(architecture, weights) or {}
    repository = str(source.get("hf_hub") or "").rstrip("/")
    if not repository:
        return
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in names):
        return
    if constants.HF_HUB_OFFLINE or not (
        _resolves("huggingface.co") or os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    ):
        raise ModelError(
            f"clip {architecture}, pretrained {weights}: not in the cache ({constants.HF_HUB_CACHE}) and the hub "
            f"cannot be reached; run `hf download {repository}` where it can and copy the cache, or give a local file"
        )


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
