"""The CLIP that training started from: what holds the one in training to it, without a second model.

Whatever is trained (all weights, LoRA of any variant, norms alone), what is not trained has not moved. So the start is
today's model with the trained weights as they were, and they are all that is kept: of LoRA a few MB. `Start` is part of
the module, hence of its checkpoints: a run goes on towards the same start, wherever the weights have gone since.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SCALES = ("logit_scale", "logit_bias")  # of the logits; no weights of a tower
LORA = (".lora_A.default.weight", ".lora_B.default.weight")  # the end of the names of a pair's factors, in peft


class Start(nn.Module):
    """The trained weights of a CLIP, and its temperature, as they are when this is made. They are never trained.

    Args:
        model: an adapted open_clip model. Statistics of a BatchNorm are not kept: those of a pretrained one stay.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # A frozen parameter rather than a buffer, which DDP would send to all processes before each step.
        self.weights = nn.ParameterDict(
            {
                _key(name): nn.Parameter(parameter.detach().clone(), requires_grad=False)
                for name, parameter in model.named_parameters()
                if parameter.requires_grad or name == "logit_scale"
            }
        )

    def of(self, name: str) -> Tensor:
        """What a trained weight was."""
        weight: Tensor = self.weights[_key(name)]
        return weight

    def named(self, prefix: str = "") -> dict[str, Tensor]:
        """What each was, by its name in the model behind a prefix: for `torch.func.functional_call`."""
        return {prefix + key.replace("/", "."): weight for key, weight in self.weights.items()}

    def squared_distance(self, model: nn.Module) -> Tensor:
        """Σ (w - w₀)² over the trained weights of the towers: a scalar, with gradient, in float32 at least.

        Twice the first term of L2-SP (arXiv 1802.01483, equation 3, without its α). Of LoRA w is the update that it
        makes, (alpha / rank) · B·A, not A and B: what matters is where the weights are, not how they are made up. Of
        DoRA that is its direction before it is normalised, and its magnitude apart from it. The temperature and
        SigLIP's bias are left out.
        """
        now = {name: weight for name, weight in model.named_parameters() if weight.requires_grad and name not in SCALES}
        terms = [
            self._update_distance(model, name.removesuffix(LORA[0]))
            if name.endswith(LORA[0])
            else (_wide(weight) - _wide(self.of(name))).square().sum()
            for name, weight in now.items()
            if not name.endswith(LORA[1])
        ]
        return torch.stack(terms).sum()

    def _update_distance(self, model: nn.Module, layer: str) -> Tensor:
        """‖s·(B·A - B₀·A₀)‖² of one layer, from matrices of rank × rank.

        B·A - B₀·A₀ is (B - B₀)·A + B₀·(A - A₀): one product U·V of twice the rank, whose factors vanish at the start,
        so that nothing large cancels; and ‖U·V‖² = Σ (UᵀU) ∘ (VVᵀ).
        """
        a, b = (_wide(model.get_parameter(layer + end)).flatten(1) for end in LORA)
        a0, b0 = (_wide(self.of(layer + end)).flatten(1) for end in LORA)
        left, right = torch.cat([b - b0, b0], dim=1), torch.cat([a, a - a0])
        scaling: Any = model.get_submodule(layer).scaling
        squares: Tensor = (left.T @ left) * (right @ right.T)
        return scaling["default"] ** 2 * squares.sum()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every part is in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _key(name: str) -> str:
    return name.replace(".", "/")  # which a ParameterDict does not take


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
