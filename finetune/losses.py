"""The losses of CLIP, SigLIP and of distillation from the start, as pure functions; gathering is a function of its own.

For N pairs, logits are exp(logit_scale) · cosine similarity.

    contrastive   mean of two cross-entropies: each image against all captions, each caption against all images
                  (Radford et al. 2021, figure 3)
    sigmoid       each of the N² pairs by itself: does this caption belong to this image? (arXiv 2303.15343,
                  algorithm 1); logit_bias, added to every logit, stands for how rare a yes is
    feature       squared distance of each embedding to the one that the starting CLIP makes of the same input
    logit         divergence of each row of the softmax from that of the starting CLIP, both ways

Where several samples of a batch say the same (equal captions, equal or near-duplicate images) they are not negatives of
each other: all that match are positives, of equal weight.

Over W processes each computes the rows of its own samples against all N = W · B columns. With gradients averaged over
processes (DDP) every parameter, temperature and bias included, gets exactly the gradient of the one large batch.

Axes: B samples of this batch (after gathering: of all processes), D width, G ids per sample.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

ALL = slice(None)


def contrastive_loss(
    image_embedding_BD: Tensor,
    text_embedding_BD: Tensor,
    logit_scale: Tensor,
    *,
    positives_BB: Tensor | None = None,
    label_smoothing: float = 0.0,
    rows: slice = ALL,
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
    matches_BB = _matches(positives_BB, image_embedding_BD)[rows]
    target_BB = _smooth(matches_BB / matches_BB.sum(dim=1, keepdim=True), label_smoothing)
    image_loss = functional.cross_entropy(_logits(image_embedding_BD, text_embedding_BD, logit_scale, rows), target_BB)
    text_loss = functional.cross_entropy(_logits(text_embedding_BD, image_embedding_BD, logit_scale, rows), target_BB)
    return (image_loss + text_loss) / 2


def sigmoid_loss(
    image_embedding_BD: Tensor,
    text_embedding_BD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    positives_BB: Tensor | None = None,
    label_smoothing: float = 0.0,
    rows: slice = ALL,
) -> Tensor:
    """SigLIP's loss of one batch: binary cross-entropies, summed over captions, averaged over images; in nats.

    Args:
        image_embedding_BD: L2-normalised.
        text_embedding_BD: L2-normalised; row i belongs to image i.
        logit_scale: scalar, natural logarithm of the inverse temperature (the paper's t').
        logit_bias: scalar (the paper's b).
        positives_BB: as in `contrastive_loss`.
        label_smoothing: share of a yes that is spread over the B pairs of its row, so that a row still has one.
        rows: the images to average over, against all captions.
    """
    target_BB = _smooth(_matches(positives_BB, image_embedding_BD)[rows], label_smoothing)
    logits_BB = _logits(image_embedding_BD, text_embedding_BD, logit_scale, rows) + logit_bias
    return functional.binary_cross_entropy_with_logits(logits_BB, target_BB, reduction="sum") / len(logits_BB)


def feature_distance(embedding_BD: Tensor, start_embedding_BD: Tensor) -> Tensor:
    """Mean squared Euclidean distance of embeddings to those of the start: a scalar, 0 to 4.

    Of L2-normalised embeddings it is 2 · (1 - cosine). It is what CLIP-KD calls feature distillation (arXiv
    2307.12732, section 3.2).
    """
    return (embedding_BD - start_embedding_BD).square().sum(dim=1).mean()


def logit_divergence(
    image_embedding_BD: Tensor,
    text_embedding_BD: Tensor,
    logit_scale: Tensor,
    start_image_BD: Tensor,
    start_text_BD: Tensor,
    start_logit_scale: Tensor,
    *,
    rows: slice = ALL,
) -> Tensor:
    """How far the batch's softmax is from that of the starting CLIP: KL(start ‖ now) in nats, mean of both directions.

    It differs from the `dist_loss` of open_clip's `DistillClipLoss` (a cross-entropy) by the entropy of the start,
    which has no gradient: this one is 0 where nothing has changed. Of a sigmoid CLIP the bias plays no part: softmax
    does not see it.

    Args:
        image_embedding_BD: L2-normalised, as the others.
        text_embedding_BD: row i belongs to image i.
        logit_scale: scalar, natural logarithm of the inverse temperature.
        start_image_BD: what the starting CLIP makes of the same images.
        start_text_BD: and of the captions.
        start_logit_scale: its temperature.
        rows: as in `contrastive_loss`.
    """
    per_image = _divergence(
        _logits(image_embedding_BD, text_embedding_BD, logit_scale, rows),
        _logits(start_image_BD, start_text_BD, start_logit_scale, rows),
    )
    per_text = _divergence(
        _logits(text_embedding_BD, image_embedding_BD, logit_scale, rows),
        _logits(start_text_BD, start_image_BD, start_logit_scale, rows),
    )
    return (per_image + per_text) / 2


def _divergence(logits_BB: Tensor, start_logits_BB: Tensor) -> Tensor:
    now, start = logits_BB.log_softmax(dim=1), start_logits_BB.log_softmax(dim=1)
    return functional.kl_div(now, start, reduction="batchmean", log_target=True)


def _logits(of_BD: Tensor, against_BD: Tensor, logit_scale: Tensor, rows: slice) -> Tensor:
    return logit_scale.exp() * of_BD[rows] @ against_BD.T


def _matches(positives_BB: Tensor | None, like_BD: Tensor) -> Tensor:
    if positives_BB is None:
        return torch.eye(len(like_BD), dtype=like_BD.dtype, device=like_BD.device)
    return positives_BB.to(like_BD.dtype)


def _smooth(target_BB: Tensor, share: float) -> Tensor:
    return (1 - share) * target_BB + share / target_BB.shape[1]


# --- which samples say the same ---------------------------------------------------------------------------------------


def positives(group_ids: Tensor) -> Tensor:
    """Bool (B, B): True where two samples share an id.

    Args:
        group_ids: integers (B,), or (B, G) for several kinds of id (caption, duplicate group, image), of which one
            shared is enough.
    """
    ids_BG = group_ids.reshape(len(group_ids), -1)
    return (ids_BG[:, None] == ids_BG[None]).any(dim=-1)


# --- over processes ---------------------------------------------------------------------------------------------------


def gather_embeddings(embedding_BD: Tensor) -> Tensor:
    """The embeddings of all processes, (W · B, D) in the order of ranks, with gradients to every one of them.

    Each process must bring equally many. Without a process group: the embeddings themselves.
    """
    if not _distributed():
        return embedding_BD
    gathered: Tensor = _Gather.apply(embedding_BD)
    return gathered


def gather_fixed(x: Tensor) -> Tensor:
    """What has no gradient (ids, embeddings of the start) of all processes, (W · B, …) in the order of ranks."""
    return _all_gather(x) if _distributed() else x


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
