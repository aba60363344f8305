"""Two processes of 16 pairs give every parameter the gradient of one process of 32: real processes, a real CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn

from curate.clip import load_clip
from finetune.losses import local_rows
from finetune.module import CLIPModule

PAIRS, WORLD = 32, 2
REGULARISED = {"distill_feature": 0.7, "distill_logit": 0.4, "l2_start": 1e-2}
LOSSES: dict[str, dict[str, Any]] = {
    "clip": {"kind": "clip", "label_smoothing": 0.1},
    "siglip": {"kind": "siglip", "label_smoothing": 0.1},
    "clip held to its start": {"kind": "clip", **REGULARISED},
    "siglip held to its start": {"kind": "siglip", **REGULARISED},
}


class Step(nn.Module):
    """The loss of a batch as a forward pass, which is what DDP wants."""

    def __init__(self, architecture: str, weights: str, loss: dict[str, Any]) -> None:
        super().__init__()
        self.clip = CLIPModule({"name": architecture, "pretrained": weights}, {"kind": "full"}, loss).double()
        random = torch.Generator().manual_seed(1)
        for parameter in self.clip.model.parameters():  # some way from the start
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=random, dtype=torch.float64)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        start = self.clip.embed_start(batch) if self.clip.loss.distills else None
        parts = self.clip.losses(self.clip.embed(batch), batch["group"], start=start)
        total = torch.stack([*parts.values()]).sum()
        if self.clip.start is not None:
            total = total + self.clip.loss.l2_start / 2 * self.clip.start.squared_distance(self.clip.model)
        return total


def batch() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 1000, (PAIRS, 16), generator=random)
    tokens[:, 8] = 49407
    # Positives of each other within a process, and across both.
    group = torch.stack([torch.arange(PAIRS) % 11, torch.arange(PAIRS)], dim=1)
    pixels = torch.randn(PAIRS, 3, 32, 32, generator=random, dtype=torch.float64)
    return {"pixels": pixels, "tokens": tokens, "group": group}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}


def one_rank(rank: int, folder: str, architecture: str, weights: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = {}
    for name, loss in LOSSES.items():
        model = nn.parallel.DistributedDataParallel(Step(architecture, weights, loss))
        mine = {key: value[local_rows(PAIRS // WORLD)] for key, value in batch().items()}
        value = model(mine)
        value.backward()
        found[name] = {"loss": value.detach(), "gradients": gradients(model)}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def weights(architectures, tmp_path_factory) -> str:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "tiny-vit.pt"
    torch.save(load_clip(architectures["tiny-vit"], device="cpu").model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def ranks(architectures, weights, tmp_path_factory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, args=(str(folder), architectures["tiny-vit"], weights), nprocs=WORLD)
    return [
        torch.load(folder / f"{rank}.pt", weights_only=True)  # noqa: TID251 - written above
        for rank in range(WORLD)
    ]


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_give_the_gradients_of_the_one_large_batch(name, ranks, architectures, weights):
    model = Step(architectures["tiny-vit"], weights, LOSSES[name])
    loss = model(batch())
    loss.backward()
    assert (sum(rank[name]["loss"] for rank in ranks) / WORLD).item() == pytest.approx(loss.item(), abs=1e-12)
    whole = gradients(model)
    scales = {key for key in whole if "logit_" in key}
    assert scales == {"clip.model.logit_scale"} | ({"clip.model.logit_bias"} if "siglip" in name else set())
    assert all(whole[key] != 0 for key in scales)
    for key, expected in whole.items():
        for rank in ranks:
            torch.testing.assert_close(rank[name]["gradients"][key], expected, rtol=1e-9, atol=1e-12, msg=key)
