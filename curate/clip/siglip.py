"""A transformers `SiglipModel` as an open_clip model with a timm image tower, and back: the same function, other names.

SigLIP (arXiv 2303.15343) has no class token: an attention pool ("MAP head") with one learned query reads the patches.
timm's `VisionTransformer` with `global_pool: map` is that tower, and open_clip's `TextTransformer` without a causal
mask, read at its last position, is the other one. SigLIP 2's models of fixed resolution are the same with a larger
vocabulary. transformers keeps q, k and v apart, timm in one layer, and the pool's k and v in one.

Both towers compute GELU by its tanh approximation, as they were trained. timm has that for some of SigLIP's
architectures and exact GELU for the others, so where no architecture of timm's is the same function, the configuration
says what to change in one (`timm_model_kwargs`; timm_towers.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.clip.folders import (
    Source,
    mlp_ratio,
    preprocess_cfg,
    processor_config,
    read_processor,
    read_weights,
    square,
)
from curate.clip.tokens import read_siglip_tokenizer
from curate.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

_ACTIVATIONS = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu": "none"}  # as nn.GELU's `approximate`
_EPS = 1e-6  # of LayerNorm in SigLIP; timm's own
_BASE = "vit_base_patch16_siglip_224"  # what is changed where timm has no such architecture
_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
    "text_projection": "head",
}
_TEXT_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IMAGE = {
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "attn_pool.latent": "head.probe",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}
_IMAGE_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PARAMETERS = ("weight", "embedding", "latent")  # endings of what is a parameter itself, not a layer
_ALLOWED = {
    "model_cfg": {"embed_dim", "init_logit_scale", "init_logit_bias", "custom_text", "vision_cfg", "text_cfg"},
    "vision_cfg": {
        "image_size", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_model_kwargs",
    },
    "text_cfg": {
        "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "width", "heads", "layers",
        "mlp_ratio", "no_causal_mask", "proj_bias", "pool_type", "norm_kwargs", "act_kwargs",
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """An image tower of SigLIP's kind, in numbers."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    hidden: int
    """Width of the MLPs."""
    approximate: str
    """Of GELU: none or tanh."""
    eps: float
    """Of LayerNorm."""


def is_siglip(model_cfg: Mapping[str, Any]) -> bool:
    """Whether an open_clip model configuration is of SigLIP's kind: a timm trunk with an attention pool."""
    return model_cfg.get("vision_cfg", {}).get("timm_pool") == "map"


def read_folder(folder: Path, config: Mapping[str, Any]) -> Source:
    """A `SiglipModel`'s folder in open_clip's terms.

    Args:
        folder: it.
        config: its config.json; where that is silent, transformers' defaults hold.

    Raises:
        KeyError: a weight is missing.
        ModelError: a file is missing; something that open_clip's SigLIP cannot express.
    """
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    trunk = Trunk(
        image_size=square(vision.get("image_size", 224)),
        patch_size=square(vision.get("patch_size", 16)),
        width=vision.get("hidden_size", 768),
        layers=vision.get("num_hidden_layers", 12),
        heads=vision.get("num_attention_heads", 12),
        hidden=vision.get("intermediate_size", 3072),
        approximate=_approximate("vision_config", vision),
        eps=vision.get("layer_norm_eps", _EPS),
    )
    _check_readable(vision, trunk)
    state = read_weights(folder)
    model_cfg: dict[str, Any] = {
        "embed_dim": trunk.width,
        "init_logit_bias": float(state["logit_bias"].float().item()),
        "custom_text": True,
        "vision_cfg": {"image_size": trunk.image_size, "timm_pool": "map", "timm_proj": "none"} | timm_cfg(trunk),
        "text_cfg": _text_cfg(text, folder.name, trunk.width),
    }
    return Source(
        model_cfg,
        _pixels(folder, trunk.image_size),
        _from_transformers(state, model_cfg, trunk.layers),
        read_siglip_tokenizer(folder, model_cfg["text_cfg"]),
    )


def to_transformers(model: nn.Module, model_cfg: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of an open_clip SigLIP under transformers' names, float32.

    Raises:
        ModelError: transformers has no `SiglipModel` of this architecture.
    """
    trunk = trunk_of(model)
    state = {name: value.detach().float() for name, value in model.state_dict().items()}
    names = _names(model_cfg["text_cfg"].get("layers", 12), trunk.layers)
    packed = _packed(model_cfg["text_cfg"].get("layers", 12), trunk.layers)
    known = {*names, *packed, "logit_scale", "logit_bias", "visual.trunk.pos_embed"}
    if strange := sorted(known ^ {*state}):
        raise ModelError(f"transformers' SiglipModel has no place for {strange[0]}; export to open_clip instead")
    converted = {theirs: state[ours].clone() for ours, theirs in names.items()}
    converted |= {name: state[name].reshape(1).clone() for name in ("logit_scale", "logit_bias")}
    converted["vision_model.embeddings.position_embedding.weight"] = state["visual.trunk.pos_embed"][0].clone()
    for ours, theirs in packed.items():
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            converted[name] = part.clone()
    return _pool_packed(converted)


def check_expressible(model_cfg: Mapping[str, Any]) -> None:
    """Raise ModelError where transformers' `SiglipModel` has no word for what an architecture has."""
    strange = sorted({*model_cfg} - _ALLOWED["model_cfg"])
    strange += sorted({*model_cfg["vision_cfg"]} - _ALLOWED["vision_cfg"])
    text = model_cfg["text_cfg"]
    strange += sorted({*text} - _ALLOWED["text_cfg"])
    needed = {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}
    strange += [f"a text tower with {key} {text.get(key)}" for key, value in needed.items() if text.get(key) != value]
    if model_cfg.get("init_logit_bias") is None:
        strange.append("a SigLIP without logit_bias")
    if model_cfg["vision_cfg"].get("timm_proj") != "none":
        strange.append("a projection behind the attention pool")
    if strange:
        raise ModelError(f"transformers' SiglipModel cannot express {', '.join(strange)}; export to open_clip instead")


def transformers_configs(
    model: nn.Module, model_cfg: Mapping[str, Any], preprocess: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """config.json and preprocessor_config.json of an open_clip SigLIP, by file name."""
    check_expressible(model_cfg)
    trunk, text = trunk_of(model), model_cfg["text_cfg"]
    if preprocess.get("resize_mode") != "squash":
        raise ModelError(
            f"resize_mode {preprocess.get('resize_mode', 'shortest')}: transformers' SigLIP resizes both sides to its "
            "size (squash)"
        )
    activations = {approximate: name for name, approximate in reversed(_ACTIVATIONS.items())}
    width = text.get("width", 512)
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {
            "model_type": "siglip_text_model",
            "vocab_size": text.get("vocab_size", 49408),
            "max_position_embeddings": text.get("context_length", 77),
            "hidden_size": width,
            "intermediate_size": int(width * text.get("mlp_ratio", 4)),
            "num_attention_heads": text.get("heads", 8),
            "num_hidden_layers": text.get("layers", 12),
            "projection_size": model_cfg["embed_dim"],
            "hidden_act": activations[(text.get("act_kwargs") or {}).get("approximate", "none")],
            "layer_norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5),
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": trunk.image_size,
            "patch_size": trunk.patch_size,
            "hidden_size": trunk.width,
            "intermediate_size": trunk.hidden,
            "num_attention_heads": trunk.heads,
            "num_hidden_layers": trunk.layers,
            "hidden_act": activations[trunk.approximate],
            "layer_norm_eps": trunk.eps,
        },
    }
    size = {"height": trunk.image_size, "width": trunk.image_size}
    processor = processor_config("SiglipImageProcessor", dict(preprocess), size=size)
    return {"config.json": config, "preprocessor_config.json": processor | {"processor_class": "SiglipProcessor"}}


def trunk_of(model: nn.Module) -> Trunk:
    """The image tower of an open_clip model with a timm trunk.

    Raises:
        ModelError: it is not of SigLIP's kind.
    """
    trunk: Any = model.get_submodule("visual.trunk")
    mlps = [*(block.mlp for block in trunk.blocks), getattr(trunk.attn_pool, "mlp", None)]
    alike = {(mlp.fc1.out_features, _approximation(mlp.act)) for mlp in mlps if mlp}
    if len(alike) != 1 or None in mlps or trunk.attn_pool.num_heads != trunk.blocks[0].attn.num_heads:
        raise ModelError("transformers' SiglipModel cannot express this timm tower; export to open_clip instead")
    hidden, approximate = alike.pop()
    return Trunk(
        image_size=square(trunk.patch_embed.img_size),
        patch_size=square(trunk.patch_embed.patch_size),
        width=trunk.embed_dim,
        layers=len(trunk.blocks),
        heads=trunk.blocks[0].attn.num_heads,
        hidden=hidden,
        approximate=approximate,
        eps=trunk.norm.eps,
    )


def timm_cfg(trunk: Trunk) -> dict[str, Any]:
    """Which of timm's architectures a tower is, or which one with what changed: keys of open_clip's `vision_cfg`."""
    import timm
    import torch

    for name in timm.list_models(f"vit_*_patch{trunk.patch_size}_siglip_{trunk.image_size}"):
        with torch.device("meta"):
            built = torch.nn.ModuleDict({"trunk": timm.create_model(name, num_classes=0, global_pool="map")})
        if trunk_of(torch.nn.ModuleDict({"visual": built})) == trunk:
            return {"timm_model_name": name}
    changed = {
        "img_size": trunk.image_size,
        "patch_size": trunk.patch_size,
        "embed_dim": trunk.width,
        "depth": trunk.layers,
        "num_heads": trunk.heads,
        "mlp_ratio": mlp_ratio(trunk.hidden, trunk.width),
        "act_layer": "gelu_tanh" if trunk.approximate == "tanh" else "gelu",
    }
    return {"timm_model_name": _BASE, "timm_model_kwargs": changed}


def _approximation(activation: nn.Module) -> str:
    from torch import nn

    if isinstance(activation, nn.GELU):
        return activation.approximate
    if type(activation).__name__ == "GELUTanh":  # timm's
        return "tanh"
    raise ModelError(f"transformers' SiglipModel has no {type(activation).__name__}; export to open_clip instead")


# --- their folder -----------------------------------------------------------------------------------------------------


def _approximate(part: str, config: Mapping[str, Any]) -> str:
    activation = config.get("hidden_act", "gelu_pytorch_tanh")
    if activation not in _ACTIVATIONS:
        raise ModelError(f"{part}.hidden_act {activation}: expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[activation]


def _check_readable(vision: Mapping[str, Any], trunk: Trunk) -> None:
    if not vision.get("vision_use_head", True):
        raise ModelError("vision_config.vision_use_head false: a SigLIP without its attention pool is no CLIP")
    if vision.get("num_channels", 3) != 3:
        raise ModelError(f"vision_config.num_channels {vision['num_channels']}: expected 3")
    if trunk.eps != _EPS:
        raise ModelError(f"vision_config.layer_norm_eps {trunk.eps}: timm's towers have {_EPS}")


def _text_cfg(text: Mapping[str, Any], name: str, embed_dim: int) -> dict[str, Any]:
    width = text.get("hidden_size", 768)
    if (projected := text.get("projection_size") or width) != embed_dim:
        raise ModelError(f"text_config.projection_size {projected}: the image tower's width is {embed_dim}")
    return {
        "context_length": text.get("max_position_embeddings", 64),
        "vocab_size": text.get("vocab_size", 32000),
        "hf_tokenizer_name": name,  # open_clip takes what is in the folder, if anything is named
        "width": width,
        "heads": text.get("num_attention_heads", 12),
        "layers": text.get("num_hidden_layers", 12),
        "mlp_ratio": mlp_ratio(text.get("intermediate_size", 3072), width),
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": text.get("layer_norm_eps", _EPS)},
        "act_kwargs": {"approximate": _approximate("text_config", text)},
    }


def _pixels(folder: Path, image_size: int) -> dict[str, Any]:
    processor = read_processor(folder)
    size = processor.get("size") or {}
    if processor.get("do_center_crop") or not {"height", "width"} <= {*size}:
        raise ModelError(f"preprocessor_config.json: size {size}: expected height and width, and no cropping")
    if (taken := square([size["height"], size["width"]])) != image_size:
        raise ModelError(f"preprocessor_config.json: size {taken}; the model takes {image_size}")
    return preprocess_cfg(processor, image_size, "squash")


# --- names ------------------------------------------------------------------------------------------------------------


def _from_transformers(
    state: Mapping[str, torch.Tensor], model_cfg: Mapping[str, Any], layers: int
) -> dict[str, torch.Tensor]:
    import torch

    state = _pool_unpacked(state)
    text_layers = model_cfg["text_cfg"]["layers"]
    converted = {ours: state[theirs].float() for ours, theirs in _names(text_layers, layers).items()}
    converted |= {name: state[name].float().reshape(()) for name in ("logit_scale", "logit_bias")}
    converted["visual.trunk.pos_embed"] = state["vision_model.embeddings.position_embedding.weight"].float()[None]
    for ours, theirs in _packed(text_layers, layers).items():
        converted[ours] = torch.cat([state[name].float() for name in theirs])
    return converted


def _names(text_layers: int, layers: int) -> dict[str, str]:
    """Names in transformers by those in open_clip, of all weights that are the same tensors."""
    modules = {f"text.{a}": f"text_model.{b}" for a, b in _TEXT.items()}
    modules |= {f"visual.trunk.{a}": f"vision_model.{b}" for a, b in _IMAGE.items()}
    for n in range(text_layers):
        block, layer = f"text.transformer.resblocks.{n}", f"text_model.encoder.layers.{n}"
        modules |= {f"{block}.{a}": f"{layer}.{b}" for a, b in _TEXT_BLOCK.items()}
    for n in range(layers):
        block, layer = f"visual.trunk.blocks.{n}", f"vision_model.encoder.layers.{n}"
        modules |= {f"{block}.{a}": f"{layer}.{b}" for a, b in _IMAGE_BLOCK.items()}
    return {
        f"{a}{kind}": f"{b}{kind}"
        for a, b in modules.items()
        for kind in ([""] if a.endswith(_PARAMETERS) else [".weight", ".bias"])
    }


def _packed(text_layers: int, layers: int) -> dict[str, list[str]]:
    """Names in open_clip of what is several layers in one, and theirs in transformers; the pool's: `_pool_unpacked`."""
    towers = {
        **{f"text.transformer.resblocks.{n}.attn.in_proj_": ("text_model", n) for n in range(text_layers)},
        **{f"visual.trunk.blocks.{n}.attn.qkv.": ("vision_model", n) for n in range(layers)},
    }
    packed = {
        f"{ours}{kind}": [f"{tower}.encoder.layers.{n}.self_attn.{part}_proj.{kind}" for part in "qkv"]
        for ours, (tower, n) in towers.items()
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        packed[f"visual.trunk.attn_pool.q.{kind}"] = [f"head.q.{kind}"]
        packed[f"visual.trunk.attn_pool.kv.{kind}"] = [f"head.k.{kind}", f"head.v.{kind}"]
    return packed


def _pool_unpacked(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their pool's `nn.MultiheadAttention` as q, k and v under names of their own."""
    unpacked = dict(state)
    for kind in ("weight", "bias"):
        whole = unpacked.pop(f"vision_model.head.attention.in_proj_{kind}", None)
        if whole is None:
            raise KeyError(f"vision_model.head.attention.in_proj_{kind}")
        unpacked |= {f"head.{part}.{kind}": value for part, value in zip("qkv", whole.chunk(3), strict=True)}
    return unpacked


def _pool_packed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch

    for kind in ("weight", "bias"):
        parts = [state.pop(f"head.{part}.{kind}") for part in "qkv"]
        state[f"vision_model.head.attention.in_proj_{kind}"] = torch.cat(parts)
    return state
