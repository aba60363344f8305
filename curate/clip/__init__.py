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

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from curate.clip import huggingface, openai, timm_towers, tokens
from curate.clip.folders import Source, read_json
from curate.clip.hub import architectures, cached_folder, is_hub_id, reached
from curate.clip.openai import is_openai_archive
from curate.errors import ConfigError, ModelError, did_you_mean
from curate.files import file_sha256

if TYPE_CHECKING:
    import torch
    from open_clip.tokenizer import HFTokenizer
    from PIL import Image

__all__ = [
    "OPENAI_NAMES",
    "Clip",
    "architectures",
    "brings_weights",
    "choose_device",
    "first_line",
    "is_openai_archive",
    "load",
    "load_clip",
    "rebuild",
    "weights_fingerprint",
]
logger = logging.getLogger("cliptailor")
_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
_IN_FOLDERS = ("open_clip_model.safetensors", "*.safetensors", "*.bin", "*.pth")

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

        if not len(images):
            return torch.empty(0, self.embed_captions([]).shape[-1], device=self.device)
        if not isinstance(images, torch.Tensor):
            images = torch.stack([self.preprocess(image.convert("RGB")) for image in images])
        with torch.inference_mode():
            features = self.model.encode_image(images.to(self.device))  # type: ignore[operator]
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def embed_captions(self, captions: str | Sequence[str] | torch.Tensor) -> torch.Tensor:
        """Embeddings of captions (one alone is a batch of it), or of token ids (B, L).

        Returns:
            float32 (B, D), L2-normalised, without gradient.
        """
        import torch

        captions = [captions] if isinstance(captions, str) else captions
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
    if pretrained is None and not brings_weights(name):
        names = ", ".join(OPENAI_NAMES)
        raise ModelError(f"load('{name}'): which weights? Give pretrained=, or one of OpenAI's names: {names}")
    return load_clip(name, pretrained, device=device)


def load_clip(name: str, pretrained: str | None = None, *, device: str = "auto") -> Clip:
    """Load a CLIP, ready for inference.

    Args:
        name: an open_clip architecture (`ViT-B-32`), OpenAI's name (`ViT-B/32`), a folder of open_clip's, of a
            transformers `CLIPModel` or `SiglipModel` (`local-dir:` before it or not), such a repository of the hub
            (`ORG/NAME`, `hf-hub:ORG/NAME`; `@REVISION` after it), a file of OpenAI's (`ViT-B-32.pt`: archive or state
            dict; the architecture is read from its shapes), or the path of an open_clip model configuration
            (`tiny.json`).
        pretrained: an open_clip tag (`openai`, `laion2b_s34b_b79k`), the path of a weights file (OpenAI's, too; they
            get the QuickGELU that they were trained with), or None: random weights from torch's global seed, unless
            the name brings its own.
        device: `auto` is cuda, else mps, else cpu.

    Raises:
        ModelError: unknown name or tag, weights that cannot be had or do not fit.
    """
    import torch
    from safetensors import SafetensorError

    try:
        clip = _read(name, pretrained)
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
    if bad := next((key for key, weight in clip.model.named_parameters() if not torch.isfinite(weight).all()), None):
        raise ModelError(f"clip {name}, pretrained {pretrained}: {bad} has values that are no numbers, or infinite")
    clip.model.eval().to(choose_device(device))
    return clip


def brings_weights(name: str) -> bool:
    """Whether a name alone says which weights: a folder, a hub's id, a file other than a model configuration."""
    return name.startswith("local-dir:") or Path(name).is_dir() or _is_weights_file(name) or is_hub_id(name)


def _is_weights_file(path: str | None) -> bool:
    return path is not None and Path(path).suffix in _WEIGHTS and Path(path).is_file()


def _read(name: str, pretrained: str | None) -> Clip:
    """The CLIP on the CPU, from wherever its name and weights point."""
    if name.startswith("local-dir:") or Path(name).is_dir():
        return _from_folder(name, Path(name.removeprefix("local-dir:")))
    if is_hub_id(name):
        return _from_folder(name, cached_folder(name))
    if _is_weights_file(name):
        state = _openai_state(name)
        if state is None:
            logger.warning(
                "clip %s: does not say its activation; taken for OpenAI's: QuickGELU. Was it trained with GELU? Then "
                "say its architecture, too: ViT-B-32/%s",
                name,
                name,
            )
            state = _plain_state(name)
        return _assembled(name, Source(openai.architecture(state), {}, state))
    if name.endswith(".json"):
        return _from_configuration(name, pretrained)
    architecture, weights = _resolve(name, pretrained)
    with reached(architecture, weights):
        return _from_open_clip(name, architecture, weights)


def _from_folder(name: str, folder: Path) -> Clip:
    """What transformers, open_clip or `finetune export` wrote."""
    if huggingface.is_transformers_folder(folder):
        return _assembled(name, huggingface.read_folder(folder))
    if not (folder / "open_clip_config.json").is_file():
        raise ModelError(
            f"{folder}: no open_clip_config.json and no config.json; expected a folder that `finetune export`, "
            "open_clip or transformers wrote"
        )
    weights = next((path for pattern in _IN_FOLDERS for path in sorted(folder.glob(pattern))), None)
    if weights is None:  # open_clip would leave random ones, with a word in its log
        raise ModelError(f"{folder}: no weights; expected open_clip_model.safetensors beside open_clip_config.json")
    config = read_json(folder / "open_clip_config.json")
    text_cfg = config.get("model_cfg", {}).get("text_cfg", {})
    source = folder if tokens.has_tokenizer(folder) else text_cfg.get("hf_tokenizer_name")
    tokenizer = tokens.read_tokenizer(source, text_cfg) if text_cfg.get("hf_tokenizer_name") else None
    if timm_towers.is_beyond_open_clip(config["model_cfg"]):
        return _assembled(
            name, Source(config["model_cfg"], config.get("preprocess_cfg", {}), _plain_state(str(weights)), tokenizer)
        )
    return _from_open_clip(name, f"local-dir:{folder}", None, tokenizer)


def _from_configuration(name: str, pretrained: str | None) -> Clip:
    """A CLIP of a model configuration of open_clip's form, with the weights of a file, or random ones."""
    import open_clip

    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"clip name {name}: no such file; expected an open_clip model configuration")
    model_cfg = read_json(path)
    if model_cfg.get("vision_cfg") and timm_towers.is_beyond_open_clip(model_cfg):
        return _assembled(name, Source(model_cfg, {}, _plain_state(pretrained) if pretrained else None))
    open_clip.add_model_config(path)
    with reached(path.stem, pretrained):
        return _from_open_clip(name, path.stem, pretrained)


def _from_open_clip(name: str, architecture: str, weights: str | None, tokenizer: HFTokenizer | None = None) -> Clip:
    """What open_clip loads by itself, and OpenAI's weights in an architecture that was named."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    state = _openai_state(weights) if weights and _is_weights_file(weights) else None
    model_cfg = open_clip.get_model_config(architecture) or {}
    if state is not None:
        _check_same(name, str(weights), model_cfg, openai.architecture(state))
        model = open_clip.create_model(architecture, force_quick_gelu=True)
        model.load_state_dict(state)
        model_cfg |= {"quick_gelu": True}
    else:
        _warn_of_activation(architecture, weights)
        model = open_clip.create_model(architecture, pretrained=weights, weights_only=True)
    preprocess_cfg = open_clip.get_model_preprocess_cfg(model)
    return Clip(
        model=model,
        preprocess=image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False),
        tokenizer=tokenizer or open_clip.get_tokenizer(architecture),
        name=name,
        architecture=model_cfg,
        preprocess_cfg=preprocess_cfg,
    )


def rebuild(
    name: str, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any], tokenizer: HFTokenizer | None = None
) -> Clip:
    """A CLIP from what `Clip.architecture` and `Clip.preprocess_cfg` said of it, with random weights, on the CPU.

    Args:
        name: what it is called.
        model_cfg: open_clip's model configuration.
        preprocess_cfg: open_clip's preprocessing configuration.
        tokenizer: None: the one that the configuration names; without one CLIP's own BPE.
    """
    text_cfg = model_cfg["text_cfg"]
    if tokenizer is None and text_cfg.get("hf_tokenizer_name"):
        tokenizer = tokens.read_tokenizer(text_cfg["hf_tokenizer_name"], text_cfg)
    return _assembled(name, Source(model_cfg, preprocess_cfg, None, tokenizer))


def _assembled(name: str, source: Source) -> Clip:
    """A CLIP of a configuration that open_clip has no name for; OpenAI's preprocessing where none is given."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = _built(timm_towers.named(source.model_cfg))
    if source.state is not None:
        model.load_state_dict(source.state)
    preprocess = PreprocessCfg(**({"size": model.visual.image_size} | source.preprocess_cfg))
    open_clip.set_model_preprocess_cfg(model, asdict(preprocess))
    text_cfg = {"context_length": 77} | source.model_cfg["text_cfg"]
    return Clip(
        model=model,
        preprocess=image_transform_v2(preprocess, is_train=False),
        tokenizer=source.tokenizer
        or open_clip.SimpleTokenizer(
            context_length=text_cfg["context_length"], **(text_cfg.get("tokenizer_kwargs") or {})
        ),
        name=name,
        architecture=source.model_cfg,
        preprocess_cfg=asdict(preprocess),
    )


def _built(model_cfg: dict[str, Any]) -> Any:
    """open_clip's model of a configuration, as `open_clip.create_model` chooses it, without anybody's weights."""
    import open_clip

    text_cfg, vision_cfg = dict(model_cfg["text_cfg"]), dict(model_cfg["vision_cfg"])
    is_custom = model_cfg.get("custom_text") or "hf_model_name" in text_cfg
    if "hf_model_name" in text_cfg:
        text_cfg["hf_model_pretrained"] = False
    if "timm_model_name" in vision_cfg:
        vision_cfg["timm_model_pretrained"] = False
    kind = (
        open_clip.CoCa if "multimodal_cfg" in model_cfg else open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    )
    given = model_cfg | {"text_cfg": text_cfg, "vision_cfg": vision_cfg}
    return kind(**{key: value for key, value in given.items() if key != "custom_text"})


def _openai_state(path: str) -> dict[str, torch.Tensor] | None:
    """The float32 weights of a file of OpenAI's, archive or state dict; None if nothing says that it is one."""
    if is_openai_archive(path):
        state = openai.read_archive(path)
    else:
        state = _plain_state(path)
        if not all(number in state for number in openai.NUMBERS):
            return None
    skipped = (*openai.NUMBERS, "attn_mask")
    return {key: value.float() for key, value in state.items() if key.rpartition(".")[2] not in skipped}


def _plain_state(path: str) -> dict[str, torch.Tensor]:
    from open_clip.factory import load_state_dict

    state = load_state_dict(path, weights_only=True)
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _check_same(name: str, path: str, named: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise ModelError where the named architecture contradicts the shapes in a file."""
    for part in ("vision_cfg", "text_cfg"):
        for key, value in found[part].items():
            if key not in ("head_width", "heads") and named.get(part, {}).get(key, value) != value:
                raise ModelError(
                    f"clip {name}: its {part.removesuffix('_cfg')} {key} is {named[part][key]}, but that of {path} is "
                    f"{value}; name the architecture of the file, or give the file itself as the name"
                )


def _warn_of_activation(architecture: str, weights: str | None) -> None:
    """Say which activation a file without a configuration gets, where it could be the other one."""
    import open_clip

    if _is_weights_file(weights) and f"{architecture}-quickgelu" in open_clip.list_models():
        logger.warning(
            "clip pretrained %s: does not say its activation; %s has GELU. If it was trained from OpenAI's weights, "
            "its name is %s-quickgelu",
            weights,
            architecture,
            architecture,
        )


def first_line(error: BaseException) -> str:
    """What an error says, in one line; of weights that do not fit, which one is the first."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch writes some words in bold
    lines = [line.strip() for line in plain.splitlines() if line.strip()] or [type(error).__name__]
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
    patterns = (
        "open_clip_*", "config.json", "*processor_config.json", "model*.safetensors", "pytorch_model*.bin",
        "tokenizer*", "spiece.model",
    )  # fmt: skip
    found = {path for path in paths if path.is_file()} | {
        file for path in paths if path.is_dir() for pattern in patterns for file in path.glob(pattern)
    }
    files = sorted(file for file in found if file.is_file())
    return "|".join([name, str(pretrained), *(file_sha256(file) for file in files)])


def _resolve(name: str, pretrained: str | None) -> tuple[str, str | None]:
    """open_clip's architecture name and weights for what the user wrote."""
    import open_clip

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
