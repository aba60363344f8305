from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from finetune.losses import contrastive_loss, gather_embeddings, gather_fixed, local_rows, positives, sigmoid_loss


def batch(size: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    image, text = (torch.randn(size, width, generator=random, dtype=torch.float64) for _ in range(2))
    return (
        normalize(image).requires_grad_(),
        normalize(text).requires_grad_(),
        torch.tensor(1.3, dtype=torch.float64, requires_grad=True),
    )


def by_hand(image: np.ndarray, text: np.ndarray, t: float, matches: np.ndarray, smoothing: float = 0.0) -> float:
    """The definition, sample by sample."""
    logits = np.exp(t) * image @ text.T
    size = len(image)
    total = 0.0
    for matrix in (logits, logits.T):
        for i in range(size):
            log_probability = matrix[i] - np.log(np.exp(matrix[i]).sum())
            target = (1 - smoothing) * matches[i] / matches[i].sum() + smoothing / size
            total -= (target * log_probability).sum() / size
    return total / 2


def test_the_loss_and_its_gradients_are_those_of_the_papers_pseudo_code():
    image, text, t = batch()
    loss = contrastive_loss(image, text, t)
    gradients = torch.autograd.grad(loss, (image, text, t))
    # Radford et al. 2021, figure 3
    logits = image @ text.T * torch.exp(t)
    labels = torch.arange(len(image))
    loss_i = torch.nn.functional.cross_entropy(logits, labels)
    loss_t = torch.nn.functional.cross_entropy(logits.T, labels)
    paper = (loss_i + loss_t) / 2
    assert loss.item() == pytest.approx(paper.item(), abs=1e-12)
    for ours, papers in zip(gradients, torch.autograd.grad(paper, (image, text, t)), strict=True):
        torch.testing.assert_close(ours, papers, rtol=0, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_several_positives_share_the_target(smoothing):
    image, text, t = batch()
    matches = positives(torch.tensor([1, 2, 1, 3, 2, 1]))
    loss = contrastive_loss(image, text, t, positives_BB=matches, label_smoothing=smoothing)
    x, y = image.detach().numpy(), text.detach().numpy()
    assert loss.item() == pytest.approx(by_hand(x, y, 1.3, matches.numpy().astype(float), smoothing), abs=1e-12)
    assert torch.autograd.gradcheck(
        lambda *given: contrastive_loss(*given, positives_BB=matches, label_smoothing=smoothing), (image, text, t)
    )


def test_with_all_captions_distinct_it_is_the_plain_loss():
    image, text, t = batch()
    distinct = positives(torch.arange(6))
    assert torch.equal(contrastive_loss(image, text, t, positives_BB=distinct), contrastive_loss(image, text, t))


def test_which_of_two_equal_captions_an_image_came_with_makes_no_difference():
    image, text, t = batch()
    matches = positives(torch.tensor([5, 5, 1, 2, 3, 4]))
    swapped = text[[1, 0, 2, 3, 4, 5]]
    loss, same = (contrastive_loss(image, captions, t, positives_BB=matches).item() for captions in (text, swapped))
    assert same == pytest.approx(loss, abs=1e-12)
    assert contrastive_loss(image, swapped, t).item() != pytest.approx(
        contrastive_loss(image, text, t).item(), abs=1e-3
    )


def test_the_order_of_the_batch_does_not_matter():
    image, text, t = batch()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = contrastive_loss(image[order], text[order], t)
    assert shuffled.item() == pytest.approx(contrastive_loss(image, text, t).item(), abs=1e-12)
    assert contrastive_loss(text, image, t).item() == pytest.approx(shuffled.item(), abs=1e-12)


def test_one_shared_id_of_several_makes_a_positive():
    ids = torch.tensor([[1, 10], [2, 10], [2, 11], [3, 12]])
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert positives(ids).int().tolist() == expected


def test_rows_average_to_the_whole():
    image, text, t = batch()
    parts = [contrastive_loss(image, text, t, rows=slice(start, start + 3)) for start in (0, 3)]
    assert (sum(parts) / 2).item() == pytest.approx(contrastive_loss(image, text, t).item(), abs=1e-12)


def test_without_processes_gathering_gives_the_batch_itself():
    image, _, _ = batch()
    assert gather_embeddings(image) is image
    assert gather_fixed(image) is image
    assert local_rows(6) == slice(0, 6)


# --- SigLIP -----------------------------------------------------------------------------------------------------------


B = torch.tensor(-2.1, dtype=torch.float64, requires_grad=True)


def sigmoid_by_hand(image: np.ndarray, text: np.ndarray, t: float, b: float, targets: np.ndarray) -> float:
    """Pair by pair: the probability of a yes, and the entropy of the target against it."""
    total = 0.0
    for i, x in enumerate(image):
        for j, y in enumerate(text):
            yes = 1 / (1 + np.exp(-(np.exp(t) * x @ y + b)))
            total -= targets[i, j] * np.log(yes) + (1 - targets[i, j]) * np.log(1 - yes)
    return total / len(image)


def test_the_sigmoid_loss_and_its_gradients_are_those_of_the_papers_algorithm():
    image, text, t = batch()
    given = (image, text, t, B)
    loss = sigmoid_loss(*given)
    # Zhai et al. 2023, algorithm 1
    n = len(image)
    logits = image @ text.T * torch.exp(t) + B
    labels = 2 * torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64)
    paper = -torch.sum(torch.nn.functional.logsigmoid(labels * logits)) / n
    assert loss.item() == pytest.approx(paper.item(), abs=1e-12)
    for ours, papers in zip(torch.autograd.grad(loss, given), torch.autograd.grad(paper, given), strict=True):
        torch.testing.assert_close(ours, papers, rtol=0, atol=1e-12)


def test_the_sigmoid_loss_is_that_of_open_clip():
    from open_clip.loss import SigLipLoss

    image, text, t = batch()
    assert sigmoid_loss(image, text, t, B).item() == pytest.approx(SigLipLoss()(image, text, t.exp(), B).item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_several_positives_are_as_many_yeses(smoothing):
    image, text, t = batch()
    matches = positives(torch.tensor([1, 2, 1, 3, 2, 1]))
    loss = sigmoid_loss(image, text, t, B, positives_BB=matches, label_smoothing=smoothing)
    targets = (1 - smoothing) * matches.numpy() + smoothing / 6
    expected = sigmoid_by_hand(image.detach().numpy(), text.detach().numpy(), 1.3, -2.1, targets)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(
        lambda *given: sigmoid_loss(*given, positives_BB=matches, label_smoothing=smoothing), (image, text, t, B)
    )


def test_with_all_captions_distinct_it_is_the_plain_sigmoid_loss():
    image, text, t = batch()
    distinct = positives(torch.arange(6))
    assert torch.equal(sigmoid_loss(image, text, t, B, positives_BB=distinct), sigmoid_loss(image, text, t, B))


def test_rows_of_the_sigmoid_loss_average_to_the_whole():
    image, text, t = batch()
    matches = positives(torch.tensor([1, 2, 1, 3, 2, 1]))
    whole = sigmoid_loss(image, text, t, B, positives_BB=matches)
    parts = [sigmoid_loss(image, text, t, B, positives_BB=matches, rows=slice(i, i + 3)) for i in (0, 3)]
    assert (sum(parts) / 2).item() == pytest.approx(whole.item(), abs=1e-12)


def test_large_logits_stay_finite():
    image, _, _ = batch()
    t = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    loss = sigmoid_loss(image, -image, t, B)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, (image, t)))
