"""What is trained: everything, low-rank updates (LoRA, Hu et al. 2021), a few of the weights, or one tower (LiT).

Before training starts, `adapt` turns an open_clip model, in place, into what training needs. From then on the state is
in the parameters themselves: a tower is locked when none of its parameters wants a gradient. `merge` gives back a plain
open_clip state dict.

Sources: LoRA W + alpha/r · B·A (arXiv 2106.09685, eq. 3); DoRA (2402.09353, eq. 5); rsLoRA, alpha/√r (2312.03732);
PiSSA (2404.02948, eq. 2 and 3); biases alone: BitFit (2106.10199); norms alone: Frankle et al. (2003.00152);
a locked tower: LiT (2111.07991).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from curate.errors import ModelError
from finetune.attention import join_attention, split_attention
from finetune.config import TOWERS, AdapterConfig
from finetune.layers import Depths, tower_of
from finetune.pooling import pool_in_last_blocks, whole_last_blocks

logger = logging.getLogger("cliptailor")
# Last part of a module's name → the target users name: open_clip's transformers (after the attention is split), then
# timm's MLP, then the linear map behind a timm trunk.
LINEARS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out", "c_fc": "fc", "c_proj": "proj",
    "fc1": "fc", "fc2": "proj",
}  # fmt: skip
# The same of Hugging Face's text encoders of BERT's kind; the first end of a name that fits.
ENCODER = {
    ".attention.self.query": "q", ".attention.self.key": "k", ".attention.self.value": "v",
    ".attention.output.dense": "out", ".intermediate.dense": "fc", ".output.dense": "proj",
}  # fmt: skip
KEY_BIASES = (".k_proj.bias", ".attention.self.key.bias")
PACKED = {"q", "k", "v"}  # the `qkv` of timm's other towers is all three in one layer
# The last linear map of a tower: a matrix or layer of open_clip's, a ResNet's attention pool's, a timm trunk's; SigLIP
# has nothing behind its attention pool, whose own last layer it is.
PROBED = (
    r"(visual\.proj|(text\.)?text_projection|text\.proj|visual\.attnpool\.c_proj|visual\.head\.(proj|mlp)"
    r"|visual\.trunk\.attn_pool\.mlp\.fc2|visual\.trunk\.head(\.fc)?)\b"
)
OPENED = {
    "visual.proj.linear", "text_projection.linear", "text.text_projection.linear", "text.proj", "visual.head.proj",
    "visual.trunk.head", "visual.trunk.head.fc",
}  # fmt: skip


class Projection(nn.Module):
    """A linear layer in the place of a matrix that open_clip multiplies with: `pooled @ projection`.

    The bare parameters `visual.proj` and `text_projection` (D, E) are no layers, so no adapter could be put on them.
    Tensors leave `@` to their right operand when they do not know it, which Python then calls as `__rmatmul__`.

    Args:
        given: the parameter; or the linear layer that some text towers have there, which open_clip would no longer
            know for one when it has an adapter.
    """

    def __init__(self, given: nn.Parameter | nn.Linear) -> None:
        super().__init__()
        self.is_matrix = isinstance(given, nn.Parameter)
        if isinstance(given, nn.Linear):
            self.linear = given
        else:
            width, embed_dim = given.shape
            self.linear = nn.Linear(width, embed_dim, bias=False, device=given.device, dtype=given.dtype)
            self.linear.weight = nn.Parameter(given.detach().T.contiguous())

    def __rmatmul__(self, pooled: Tensor) -> Tensor:
        """(B, D) → (B, E)."""
        return self.linear(pooled)

    def plain(self) -> nn.Parameter | nn.Linear:
        """What was given, with today's weights."""
        return nn.Parameter(self.linear.weight.detach().T.contiguous()) if self.is_matrix else self.linear


def adapt(model: nn.Module, config: AdapterConfig) -> None:
    """Make an open_clip model, in place, ready to be trained as configured; its outputs stay as they are.

    Raises:
        ModelError: a LoRA target names nothing in the towers that are trained; or they have nothing of the kind.
    """
    split_attention(model)
    pool_in_last_blocks(model)
    if config.kind == "lora":
        _inject_lora(model, config)
    elif config.kind != "full":
        _train_only(model, chosen_parameters(model, config))
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            parameter.requires_grad_(config.train_logit_scale)
        elif tower_of(name) in config.lock or name == "logit_bias":  # for the sigmoid loss: module.py
            parameter.requires_grad_(False)
    for tower in TOWERS:
        # LoRA may be meant for one tower's layers alone (a ResNet's convolutions); its targets were checked above.
        if config.kind != "lora" and tower not in config.lock and is_locked(model, tower):
            raise ModelError(
                f"model.adapter.kind: {config.kind} finds nothing to train in this CLIP's {tower} tower; "
                f"choose another kind, or lock: [{tower}]"
            )


def chosen_parameters(model: nn.Module, config: AdapterConfig) -> set[str]:
    """Names of the parameters that layernorm, bias, last and probe train in a split model, locked towers or not."""
    names = [name for name, _ in model.named_parameters()]
    if config.kind == "layernorm":
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm | _BatchNorm)]
        return {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")} & set(names)
    if config.kind == "bias":
        # Softmax does not see a key's bias (it adds the same to every logit of a query): it would never move.
        return {name for name in names if name.endswith(".bias") and not name.endswith(KEY_BIASES)}
    if config.kind == "probe":
        return {name for name in names if re.match(PROBED, name)}
    depths = Depths(names)
    return {name for name in names if tower_of(name) and depths.from_head(name) <= config.last_blocks}


def _train_only(model: nn.Module, chosen: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def is_locked(model: nn.Module, tower: str) -> bool:
    """Whether no parameter of a tower is trained."""
    return not any(p.requires_grad for name, p in model.named_parameters() if tower_of(name) == tower)


def hold_still(model: nn.Module, *, statistics: bool) -> None:
    """Put into eval mode what training must not change: locked towers and, if asked for, BatchNorm.

    Call it after each `model.train()`.

    Args:
        model: what `adapt` made.
        statistics: keep the statistics that pretraining gathered: small batches of another domain would ruin them.
    """
    locked = [tower for tower in TOWERS if is_locked(model, tower)]
    for name, module in model.named_modules():
        if tower_of(name) in locked or (statistics and isinstance(module, _BatchNorm)):
            module.eval()


def lora_target(name: str, module: nn.Module) -> str | None:
    """The target (q, k, v, …; qkv: three in one) of a module of a split open_clip model; None if it has none."""
    parent, _, last = name.rpartition(".")
    if isinstance(module, nn.Conv2d):
        # A ViT's only convolution embeds its patches: no projection of the kind that LoRA is for. MobileCLIP's MLPs are
        # linear maps of each pixel, written as convolutions.
        if parent.startswith("visual.trunk.") and last in ("fc1", "fc2") and module.kernel_size == (1, 1):
            return LINEARS[last]
        return "conv" if re.fullmatch(r"visual\.(layer\d\.\d+\.)?(conv\d|downsample\.0)", name) else None
    if not isinstance(module, nn.Linear):
        return None
    if name in OPENED:
        return "projection"
    if parent.endswith((".attnpool", ".attn_pool")):
        return "pool"
    if parent.endswith((".attn", ".token_mixer")) and last in ("qkv", "proj"):  # timm's
        return {"qkv": "qkv", "proj": "out"}[last]
    if name.startswith("text.transformer.encoder."):
        return next((target for end, target in ENCODER.items() if name.endswith(end)), None)
    return LINEARS.get(last)


def _inject_lora(model: nn.Module, config: AdapterConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    from finetune.lora import quicken

    if "projection" in config.targets:
        open_projections(model, config.lock)
    targets = _target_modules(model, config)
    _check_variant(model, config, targets)
    image = r"visual\..*"  # peft matches patterns against whole names; all else is the text tower's
    lora = LoraConfig(
        r=config.rank_of("text"),
        lora_alpha=config.alpha_of("text"),
        rank_pattern={image: config.rank_of("image")} if isinstance(config.rank, dict) else {},
        alpha_pattern={image: config.alpha_of("image")} if isinstance(config.alpha, dict) else {},
        lora_dropout=config.dropout,
        use_dora=config.variant == "dora",
        use_rslora=config.variant == "rslora",
        init_lora_weights="pissa" if config.variant == "pissa" else True,
        target_modules="|".join(re.escape(name) for name in targets),
    )
    inject_adapter_in_model(lora, model)
    quicken(model)


def _check_variant(model: nn.Module, config: AdapterConfig, targets: Sequence[str]) -> None:
    """Say which trained tower gets no adapter at all, and which layer a variant has no form for."""
    for tower in TOWERS:
        if tower not in config.lock and not any(tower_of(name) == tower for name in targets):
            logger.warning(
                "model.adapter.targets: none of %s is in this CLIP's %s tower, which stays as it is%s",
                ", ".join(config.targets),
                tower,
                "; a ResNet's are conv and pool" if hasattr(model.visual, "attnpool") else "",
            )
    kernels = [name for name in targets if isinstance(model.get_submodule(name), nn.Conv2d)]
    if config.variant == "pissa" and kernels:
        raise ModelError(
            f"model.adapter.variant: pissa needs matrices, and {kernels[0]} is a convolution; take another variant, or "
            f"'{lora_target(kernels[0], model.get_submodule(kernels[0]))}' out of model.adapter.targets"
        )


def open_projections(model: nn.Module, locked: Sequence[str] = ()) -> None:
    """Give the bare projections of the towers that are not locked, in place, a layer that an adapter can be put on."""
    text = model if hasattr(model, "text_projection") else model.text
    for tower, owner, name in (("image", model.visual, "proj"), ("text", text, "text_projection")):
        bare = getattr(owner, name, None)
        if tower not in locked and isinstance(bare, nn.Parameter | nn.Linear):
            _exchange(owner, name, Projection(bare))


def _exchange(owner: Any, name: str, new: nn.Parameter | nn.Module) -> None:
    delattr(owner, name)  # else a module would not go where a parameter was
    setattr(owner, name, new)


def _target_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    is_resnet = hasattr(model.visual, "attnpool")
    found: dict[str, list[str]] = {target: [] for target in config.targets}
    for name, module in model.named_modules():
        target = lora_target(name, module) if tower_of(name) not in config.lock else None
        if target == "qkv":
            _add_packed(name, found)
        elif target in found and (target != "conv" or is_resnet):
            found[target].append(name)
    if absent := [target for target, names in found.items() if not names]:
        raise ModelError(
            f"model.adapter.targets: '{absent[0]}' names no layer of this CLIP's trained towers; leave it out"
            + ("" if is_resnet else " (conv is a ResNet's, pool a ResNet's or SigLIP's)")
        )
    return list(dict.fromkeys(name for names in found.values() for name in names))


def _add_packed(name: str, found: dict[str, list[str]]) -> None:
    """A layer that is q, k and v at once gets an adapter for all three, or none."""
    asked = PACKED & found.keys()
    if asked and asked != PACKED:
        raise ModelError(
            f"model.adapter.targets: {name} is q, k and v in one layer; name all three of them, or none "
            f"(named: {', '.join(sorted(asked))})"
        )
    for target in asked:
        found[target].append(name)


def merge(model: nn.Module) -> None:
    """Turn an adapted model, in place, back into a plain open_clip model with its LoRA, of any variant, merged."""
    from peft.tuners.lora import LoraLayer

    from finetune.lora import unquicken

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    unquicken(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Projection):
            owner, _, attribute = name.rpartition(".")
            _exchange(model.get_submodule(owner), attribute, module.plain())
    whole_last_blocks(model)
    join_attention(model)


def scale_lora(model: nn.Module, alpha: Callable[[str], float]) -> None:
    """Multiply the update of each LoRA layer, given its name, by a share: a CLIP between the start and this one.

    Raises:
        ModelError: the variant's update is not linear in its factors.
    """
    from peft.tuners.lora import LoraLayer

    config = lora_config(model)
    if config is None or config.use_dora or config.init_lora_weights == "pissa":
        raise ModelError(
            "the interpolated CLIP is no LoRA of this kind: export it --to open_clip, or the end with --checkpoint last"
        )
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            module.lora_B["default"].weight.data.mul_(alpha(name))


def lora_config(model: nn.Module) -> Any:
    """Peft's configuration of the LoRA in an adapted model; None without one."""
    return getattr(model, "peft_config", {}).get("default")


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the LoRA alone, in peft's format: `adapter_model.safetensors` and `adapter_config.json`.

    It applies to the split form of the same CLIP (`split_attention`; with the target projection `open_projections`
    too). The temperature and SigLIP's bias, which are no part of peft's format, are in the file's metadata as
    `logit_scale` and `logit_bias`. PiSSA's applies to the weights that training started from: peft takes their largest
    singular values off again when it loads it.

    Raises:
        ModelError: the model has no LoRA.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = lora_config(model)
    if config is None:
        raise ModelError("there is no adapter to save: this CLIP was trained without LoRA")
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model)
    scales = {name: p for name, p in model.named_parameters() if name in ("logit_scale", "logit_bias")}
    metadata = {"format": "pt"} | {name: repr(float(p.detach())) for name, p in scales.items()}
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "adapter_model.safetensors", metadata
    )
    config.save_pretrained(folder)
