"""What OpenAI's CLIP computes, in plain torch functions over a state dict; written from the paper, for the tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def norm(x: Tensor, state: State, name: str) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def heads(x: Tensor, number: int) -> Tensor:
    return x.unflatten(-1, (number, -1)).transpose(-3, -2)


def attend(q: Tensor, k: Tensor, v: Tensor, number: int, mask: Tensor | None) -> Tensor:
    """(B, L, D) each: scaled dot products, head by head."""
    q, k, v = (heads(x, number) for x in (q, k, v))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


def transformer(x: Tensor, state: State, prefix: str, number: int, mask: Tensor | None) -> Tensor:
    layer = 0
    while f"{prefix}.{layer}.ln_1.weight" in state:
        at = f"{prefix}.{layer}"
        packed = norm(x, state, f"{at}.ln_1") @ state[f"{at}.attn.in_proj_weight"].T + state[f"{at}.attn.in_proj_bias"]
        x = x + linear(attend(*packed.chunk(3, -1), number, mask), state, f"{at}.attn.out_proj")
        hidden = quick_gelu(linear(norm(x, state, f"{at}.ln_2"), state, f"{at}.mlp.c_fc"))
        x = x + linear(hidden, state, f"{at}.mlp.c_proj")
        layer += 1
    return x


def text(tokens: Tensor, state: State) -> Tensor:
    """Token ids (B, L) → embeddings (B, D), L2-normalised: causal, read at the end-of-text token, the highest id."""
    length = tokens.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    x = norm(transformer(x, state, "transformer.resblocks", x.shape[-1] // 64, mask), state, "ln_final")
    x = x[torch.arange(len(x)), tokens.argmax(-1)] @ state["text_projection"]
    return functional.normalize(x, dim=-1)


def image(pixels: Tensor, state: State) -> Tensor:
    """Pixels (B, 3, H, W) → embeddings (B, D), L2-normalised."""
    x = vit(pixels, state) if "visual.proj" in state else resnet(pixels, state)
    return functional.normalize(x, dim=-1)


def vit(pixels: Tensor, state: State) -> Tensor:
    kernel = state["visual.conv1.weight"]
    x = functional.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = transformer(norm(x, state, "visual.ln_pre"), state, "visual.transformer.resblocks", x.shape[-1] // 64, None)
    return norm(x[:, 0], state, "visual.ln_post") @ state["visual.proj"]


def conv_norm(x: Tensor, state: State, conv: str, bn: str, stride: int = 1) -> Tensor:
    kernel = state[f"{conv}.weight"]
    x = functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    statistics = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
    return functional.batch_norm(x, *statistics, state[f"{bn}.weight"], state[f"{bn}.bias"], False, 0.0, 1e-5)


def resnet(pixels: Tensor, state: State) -> Tensor:
    """ResNet with the paper's changes: three-convolution stem, anti-aliased strides, attention pool."""
    x = pixels
    for number, stride in ((1, 2), (2, 1), (3, 1)):
        x = conv_norm(x, state, f"visual.conv{number}", f"visual.bn{number}", stride).relu()
    x = functional.avg_pool2d(x, 2)
    for stage in (1, 2, 3, 4):
        block = 0
        while f"visual.layer{stage}.{block}.conv1.weight" in state:
            x = bottleneck(x, state, f"visual.layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1)
            block += 1
    return attention_pool(x, state, "visual.attnpool")


def bottleneck(x: Tensor, state: State, at: str, stride: int) -> Tensor:
    out = conv_norm(x, state, f"{at}.conv1", f"{at}.bn1").relu()
    out = conv_norm(out, state, f"{at}.conv2", f"{at}.bn2").relu()
    out = conv_norm(functional.avg_pool2d(out, stride), state, f"{at}.conv3", f"{at}.bn3")
    if f"{at}.downsample.0.weight" in state:
        x = conv_norm(functional.avg_pool2d(x, stride), state, f"{at}.downsample.0", f"{at}.downsample.1")
    return (out + x).relu()


def attention_pool(x: Tensor, state: State, at: str) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + state[f"{at}.positional_embedding"]
    q, k, v = (linear(each, state, f"{at}.{part}_proj") for each, part in ((x[:, :1], "q"), (x, "k"), (x, "v")))
    return linear(attend(q, k, v, x.shape[-1] // 64, None), state, f"{at}.c_proj")[:, 0]
