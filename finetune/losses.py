"""The contrastive loss of CLIP, as pure functions; gathering embeddings over processes is a function of its own.

For N pairs, logits are exp(logit_scale) · cosine similarity, and the loss is the mean of two cross-entropies: each
image against all captions, and each caption against all images (Radford et al. 2021, figure 3). Where several samples
of a batch say the same (equal captions, near-duplicate images) they are not negatives of each other: the target is
uniform over all that match.

Over W processes each computes the rows of its own samples against all N = W · B columns. With gradients averaged over
processes (DDP) every parameter, the temperature included, gets exactly the gradient of the one large batch.

Axes: B samples of this batch (after gathering: of all processes), D width, G ids per sample.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


def contrastive_loss(
    image_embedding_BD: Tensor,
    text_embedding_BD: Tensor,
    logit_scale: Tensor,
    *,
    positives_BB: Tensor | None = None,
    label_smoothing: float = 0.0,
    rows: slice = slice(None),
) -> Tensor:
    """Symmetric InfoNCE of one batch: a scalar, in nats.

    Args:
        image_embedding_BD: L2-normalised.
        text_embedding_BD: L2-normalised; row i belongs to image i.
        logit_scale: scalar, natural logarithm of the inverse temperature.
        positives_BB: bool, symmetric, True where a sample matches another and on the diagonal; None: only the diagonal.
        label_smoothing: share of each target that is spread over all B.
        rows: the samples to average over, against all as candidates; all of them, unless this process does only its
            own.
    """
    size = image_embedding_BD.shape[0]
    if positives_BB is None:
        positives_BB = torch.eye(size, dtype=torch.bool, device=image_embedding_BD.device)
    target_BB = positives_BB[rows].to(image_embedding_BD.dtype)
    target_BB = target_BB / target_BB.sum(dim=1, keepdim=True)
    target_BB = (1 - label_smoothing) * target_BB + label_smoothing / size
    scale = logit_scale.exp()
    logits_per_image = scale * image_embedding_BD[rows] @ text_embedding_BD.T
    logits_per_text = scale * text_embedding_BD[rows] @ image_embedding_BD.T
    image_loss = functional.cross_entropy(logits_per_image, target_BB)
    text_loss = functional.cross_entropy(logits_per_text, target_BB)
    return (image_loss + text_loss) / 2


def positives(group_ids: Tensor) -> Tensor:
    """Bool (B, B): True where two samples share an id.

    Args:
        group_ids: integers (B,), or (B, G) for several kinds of id (caption, duplicate group), of which one shared is
            enough.
    """
    ids_BG = group_ids.reshape(len(group_ids), -1)
    return (ids_BG[:, None] == ids_BG[None]).any(dim=-1)


def gather_embeddings(embedding_BD: Tensor) -> Tensor:
    """The embeddings of all processes, (W · B, D) in the order of ranks, with gradients to every one of them.

    Each process must bring equally many. Without a process group: the embeddings themselves.
    """
    if not _distributed():
        return embedding_BD
    gathered: Tensor = _Gather.apply(embedding_BD)
    return gathered


def gather_ids(group_ids: Tensor) -> Tensor:
    """The group ids of all processes, in the order of ranks."""
    return _all_gather(group_ids) if _distributed() else group_ids


def local_rows(num_samples: int) -> slice:
    """Which rows of a gathered batch are this process's own, when each brings `num_samples`."""
    rank = dist.get_rank() if _distributed() else 0
    return slice(rank * num_samples, (rank + 1) * num_samples)


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums, over processes, what each found for this process's part."""

    @staticmethod
    def forward(ctx: Any, embedding_BD: Tensor) -> Tensor:
        ctx.rows = local_rows(len(embedding_BD))
        return _all_gather(embedding_BD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # A reduce_scatter would send less, but gloo has none; N · D numbers are little beside the weights' gradients.
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[ctx.rows]


def _all_gather(x: Tensor) -> Tensor:
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
