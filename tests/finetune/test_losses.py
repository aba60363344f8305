from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch.nn.functional import normalize

from finetune.losses import contrastive_loss, gather_embeddings, gather_ids, local_rows, positives


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
    assert local_rows(6) == slice(0, 6)


# --- two processes ----------------------------------------------------------------------------------------------------


class Towers(torch.nn.Module):
    """Two linear towers and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(7, 5).double(), torch.nn.Linear(4, 5).double()
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        rows = local_rows(len(pixels))
        image = gather_embeddings(normalize(self.image(pixels), dim=-1))
        text = gather_embeddings(normalize(self.text(tokens), dim=-1))
        matches = positives(gather_ids(group))
        return contrastive_loss(image, text, self.logit_scale, positives_BB=matches, rows=rows)


def towers_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(2)
    pixels, tokens = (torch.randn(8, width, generator=random, dtype=torch.float64) for width in (7, 4))
    return pixels, tokens, torch.tensor([1, 2, 3, 1, 4, 5, 3, 6])


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(Towers())
    loss = model(*(x[rank * 4 : rank * 4 + 4] for x in towers_inputs()))
    loss.backward()
    torch.save({"loss": loss.detach(), **gradients(model)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_the_one_large_batch(tmp_path):
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]  # noqa: TID251 - written above
    model = Towers()
    loss = model(*towers_inputs())
    loss.backward()
    assert ((ranks[0]["loss"] + ranks[1]["loss"]) / 2).item() == pytest.approx(loss.item(), abs=1e-12)
    for name, expected in gradients(model).items():
        for rank in ranks:
            torch.testing.assert_close(rank[name], expected, rtol=1e-10, atol=1e-12)
