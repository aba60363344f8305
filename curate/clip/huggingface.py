"""A transformers `CLIPModel` as an open_clip model, and back: the same function under other names.

transformers keeps q, k and v apart where open_clip packs them, and its two projections are `nn.Linear`, so transposed.
Its folder says the rest: activation and norms in config.json, pixels in preprocessor_config.json. Only CLIP's own BPE
is read as a tokenizer; it is built into open_clip, and a folder whose vocabulary differs from it is refused.
A `SiglipModel` is siglip.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.clip import siglip
from curate.clip.folders import (
    Source,
    mlp_ratio,
    preprocess_cfg,
    processor_config,
    read_json,
    read_processor,
    read_weights,
    square,
)
from curate.errors import ModelError

if TYPE_CHECKING:
    import torch

_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_EPS = 1e-5  # of LayerNorm in torch and open_clip
_SOT, _EOT = 49406, 49407  # of CLIP's BPE: <start_of_text>, <end_of_text>
_PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def is_transformers_folder(folder: Path) -> bool:
    """Whether a folder is one that transformers' `save_pretrained` wrote."""
    return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()


def read_folder(folder: Path) -> Source:
    """A `CLIPModel`'s or `SiglipModel`'s folder in open_clip's terms.

    Raises:
        ModelError: another kind of model; a file is missing; something that open_clip cannot express.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise ModelError(
            f"{folder / 'config.json'}: model_type is {kind!r}; of transformers' models only CLIP ('clip') and SigLIP "
            "('siglip') are converted; give others as an open_clip folder"
        )
    try:
        return siglip.read_folder(folder, config) if kind == "siglip" else _read_clip(folder, config)
    except KeyError as error:
        raise ModelError(f"{folder}: not a whole {kind} model: no {error.args[0]}") from error
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def _read_clip(folder: Path, config: dict[str, Any]) -> Source:
    model_cfg = _model_cfg(config)
    _check_vocabulary(folder)
    pixels = _pixels(folder, model_cfg["vision_cfg"]["image_size"])
    return Source(model_cfg, pixels, from_transformers(read_weights(folder), model_cfg))


def from_transformers(state: Mapping[str, torch.Tensor], model_cfg: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a `CLIPModel` under open_clip's names."""
    import torch

    converted = {ours: state[theirs].float() for ours, theirs in _names(model_cfg).items()}
    converted |= {ours: state[theirs].float().T.contiguous() for ours, theirs in _PROJECTIONS.items()}
    for ours, theirs in _attentions(model_cfg).items():
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}.{part}_proj.{kind}"].float() for part in "qkv"]
            converted[f"{ours}.in_proj_{kind}"] = torch.cat(parts)
    return converted


def to_transformers(state: Mapping[str, torch.Tensor], model_cfg: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of an open_clip CLIP with a ViT under transformers' names.

    Raises:
        ModelError: transformers has no `CLIPModel` of this architecture.
    """
    check_expressible(model_cfg)
    converted = {theirs: state[ours].float().clone() for ours, theirs in _names(model_cfg).items()}
    converted |= {theirs: state[ours].float().T.contiguous() for ours, theirs in _PROJECTIONS.items()}
    for ours, theirs in _attentions(model_cfg).items():
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", state[f"{ours}.in_proj_{kind}"].float().chunk(3), strict=True):
                converted[f"{theirs}.{part}_proj.{kind}"] = value.clone()
    return converted


def check_expressible(model_cfg: Mapping[str, Any]) -> None:
    """Raise ModelError where transformers' `CLIPModel` has no word for what an architecture has."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    allowed_vision = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "norm_kwargs"}
    allowed_text = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"}
    strange = sorted({*vision} - allowed_vision) + sorted({*text} - allowed_text)
    strange += sorted({*model_cfg} - {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"})
    if not isinstance(vision.get("layers", 12), int):
        raise ModelError("a CLIP with a ResNet cannot be exported to transformers: its CLIPModel has a ViT")
    if strange:
        raise ModelError(f"transformers' CLIPModel cannot express {', '.join(strange)}; export to open_clip instead")


def transformers_configs(model_cfg: Mapping[str, Any], preprocess: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json and preprocessor_config.json of an open_clip CLIP, by file name."""
    check_expressible(model_cfg)
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    activation = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    size = square(vision.get("image_size", 224))
    if preprocess.get("resize_mode", "shortest") != "shortest":
        raise ModelError(f"resize_mode {preprocess['resize_mode']}: transformers' CLIP resizes the shortest side")
    width, text_width = vision.get("width", 768), text.get("width", 512)
    shared = {"hidden_act": activation, "projection_dim": model_cfg["embed_dim"]}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model_cfg["embed_dim"],
        "text_config": shared
        | {
            "model_type": "clip_text_model",
            "vocab_size": text.get("vocab_size", 49408),
            "max_position_embeddings": text.get("context_length", 77),
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", 4)),
            "num_attention_heads": text.get("heads", 8),
            "num_hidden_layers": text.get("layers", 12),
            "layer_norm_eps": (text.get("norm_kwargs") or {}).get("eps", _EPS),
            "bos_token_id": _SOT,
            "eos_token_id": _EOT,
            "pad_token_id": _EOT,
        },
        "vision_config": shared
        | {
            "model_type": "clip_vision_model",
            "image_size": size,
            "patch_size": vision.get("patch_size", 16),
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4)),
            "num_attention_heads": width // vision.get("head_width", 64),
            "num_hidden_layers": vision.get("layers", 12),
            "layer_norm_eps": (vision.get("norm_kwargs") or {}).get("eps", _EPS),
        },
    }
    processor = processor_config(
        "CLIPImageProcessor",
        dict(preprocess),
        size={"shortest_edge": size},
        do_center_crop=True,
        crop_size={"height": size, "width": size},
    )
    return {"config.json": config, "preprocessor_config.json": processor}


def tokenizer_files(context_length: int) -> dict[str, str]:
    """CLIP's BPE, built into open_clip, as the files of transformers' `CLIPTokenizer`: contents by name."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    vocabulary = {token: number for token, number in tokenizer.encoder.items() if number not in (_SOT, _EOT)}
    vocabulary |= {"<|startoftext|>": _SOT, "<|endoftext|>": _EOT}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
        "model_max_length": context_length,
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(merges) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2),
    }


# --- names ------------------------------------------------------------------------------------------------------------


def _names(model_cfg: Mapping[str, Any]) -> dict[str, str]:
    """Names in transformers by those in open_clip, of all weights that are the same tensors."""
    names = {
        "logit_scale": "logit_scale",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    }
    modules = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",  # their spelling
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for ours, theirs in _attentions(model_cfg).items():
        block, layer = ours.removesuffix(".attn"), theirs.removesuffix(".self_attn")
        modules |= {f"{block}.{a}": f"{layer}.{b}" for a, b in _BLOCK.items()}
    return names | {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}


def _attentions(model_cfg: Mapping[str, Any]) -> dict[str, str]:
    vision, text = model_cfg["vision_cfg"].get("layers", 12), model_cfg["text_cfg"].get("layers", 12)
    return {
        f"visual.transformer.resblocks.{n}.attn": f"vision_model.encoder.layers.{n}.self_attn" for n in range(vision)
    } | {f"transformer.resblocks.{n}.attn": f"text_model.encoder.layers.{n}.self_attn" for n in range(text)}


# --- their folder -----------------------------------------------------------------------------------------------------


def _model_cfg(config: dict[str, Any]) -> dict[str, Any]:
    """open_clip's configuration; where config.json is silent, transformers' defaults hold."""
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    activations = {part.get("hidden_act", "quick_gelu") for part in (vision, text)}
    if len(activations) != 1 or not activations <= {*_ACTIVATIONS}:
        raise ModelError(
            f"hidden_act {' and '.join(sorted(activations))}: expected the same of {', '.join(_ACTIVATIONS)} in "
            "both towers"
        )
    vocabulary = text.get("vocab_size", 49408)
    # 2 is how older files say "the highest id": transformers#24773.
    if text.get("eos_token_id", _EOT) not in (2, vocabulary - 1):
        raise ModelError(
            f"text_config.eos_token_id {text['eos_token_id']}: expected 2 or the last id of the vocabulary"
        )
    width, text_width = vision.get("hidden_size", 768), text.get("hidden_size", 512)
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": _ACTIVATIONS[activations.pop()],
        "vision_cfg": {
            "image_size": square(vision.get("image_size", 224)),
            "patch_size": square(vision.get("patch_size", 32)),
            "width": width,
            "head_width": width // vision.get("num_attention_heads", 12),
            "layers": vision.get("num_hidden_layers", 12),
            "mlp_ratio": mlp_ratio(vision.get("intermediate_size", 3072), width),
            "norm_kwargs": {"eps": vision.get("layer_norm_eps", _EPS)},
        },
        "text_cfg": {
            "context_length": text.get("max_position_embeddings", 77),
            "vocab_size": vocabulary,
            "width": text_width,
            "heads": text.get("num_attention_heads", 8),
            "layers": text.get("num_hidden_layers", 12),
            "mlp_ratio": mlp_ratio(text.get("intermediate_size", 2048), text_width),
            "norm_kwargs": {"eps": text.get("layer_norm_eps", _EPS)},
        },
    }


def _pixels(folder: Path, image_size: int) -> dict[str, Any]:
    given = read_processor(folder)
    resized, cropped = given.get("size", 224), given.get("crop_size", 224)
    resized = resized.get("shortest_edge") if isinstance(resized, dict) else resized
    cropped = square([cropped.get("height"), cropped.get("width")]) if isinstance(cropped, dict) else cropped
    if not resized == cropped == image_size:
        raise ModelError(
            f"preprocessor_config.json: size {resized} and crop_size {cropped}; the model takes {image_size}"
        )
    return preprocess_cfg(given, image_size, "shortest")


def _check_vocabulary(folder: Path) -> None:
    """Refuse a folder with a tokenizer that is not CLIP's BPE, the one built into open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    if (folder / "vocab.json").is_file():
        vocabulary = read_json(folder / "vocab.json")
    elif (folder / "tokenizer.json").is_file():
        vocabulary = read_json(folder / "tokenizer.json")["model"]["vocab"]
    else:
        return
    ours = SimpleTokenizer().encoder
    special = {"<|startoftext|>", "<|endoftext|>"}
    if any(ours.get(token) != number for token, number in vocabulary.items() if token not in special):
        raise ModelError("its vocabulary is not that of CLIP's BPE; only that one is read")
