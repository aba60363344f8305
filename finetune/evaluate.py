"""Evaluate a CLIP on retrieval and zero-shot sets, and compare two evaluations.

An evaluation keeps the *rank* of every sample (finetune/metrics.py), and everything else is read off them: the figures,
their intervals, and the paired intervals of what training changed. Metric names have one order of words:

    val/image_to_text/recall@1   val/text_to_image/median_rank   val/text_to_image/map
    zero_shot/digits/top1        zero_shot/digits/per_class_mean zero_shot/digits/ece
    probe/digits/top1            probe/digits/4_shot/top1        (linear probes: finetune/probe.py)

A recall@k or top-k with no more than k candidates is always 1 and left out.

Embeddings are computed in the weights' own precision, without autocast, and by this one way for every command, so that
figures can be compared.

Letters: N images · M captions · C classes · B batch · D embedding width · H W image.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from curate.errors import InputError
from finetune.calibration import calibrated
from finetune.images import Images
from finetune.labelled import Labelled
from finetune.metrics import (
    Outcomes,
    bootstrap_interval,
    calibration_error,
    class_ranks,
    mean_average_precision,
    median_rank,
    paired_bootstrap,
    per_class_mean,
    recall_at,
    retrieve,
)
from finetune.nearest import Matrix, Nearest, draw_pairs, matrix, nearest
from finetune.probe import draw_shots, probe
from finetune.prompts import zero_shot_classifier
from finetune.sets import EvaluationSets, ProbeSet, RetrievalSet, ZeroShotSet
from finetune.trimming import encode_text, trim_of

logger = logging.getLogger("cliptailor")

RECALLS = (1, 5, 10)
TOPS = (1, 5)
DECODERS = min(
    16, os.cpu_count() or 1
)  # threads that decode and preprocess; both release the interpreter's lock for most of their time

Preprocess = Callable[[Image.Image], torch.Tensor]
Tokenizer = Callable[[Sequence[str]], torch.Tensor]


# --- what an evaluation is -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ranking:
    """What came of every query of one task: a retrieval direction, or (with `labels`) a zero-shot classification.

    Attributes:
        ranks: of the best-placed true match, or of the true class.
        candidates: how many there are.
        precisions: retrieval: each query's average precision.
        labels: classification: the number of each image's class.
        predicted: that of the class with the highest score.
        confidence: its probability.
        calibrated: its probability with a fitted temperature.
    """

    ranks: list[int]
    candidates: int
    precisions: list[float] = field(default_factory=list)
    labels: list[int] | None = None
    predicted: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    calibrated: list[float] = field(default_factory=list)

    def outcomes(self) -> dict[str, Outcomes]:
        """The task's metrics."""
        if self.labels is None:
            recalls = {f"recall@{k}": recall_at(self.ranks, k) for k in RECALLS if k == 1 or k < self.candidates}
            rank, precision = median_rank(self.ranks), mean_average_precision(self.precisions)
            return {**recalls, "median_rank": rank, "map": precision}
        tops = {f"top{k}": recall_at(self.ranks, k) for k in TOPS if k < self.candidates}
        right = [predicted == label for predicted, label in zip(self.predicted, self.labels, strict=True)]
        return {
            **tops,
            "per_class_mean": per_class_mean(self.ranks, self.labels),
            "ece": calibration_error(self.confidence, right),
            "ece_fitted": calibration_error(self.calibrated, right),
        }

    def confusion(self) -> list[list[int]]:
        """Images of each class (row) that were taken for each class (column)."""
        counts = np.zeros((self.candidates, self.candidates), dtype=np.int64)
        np.add.at(counts, (self.labels or [], self.predicted), 1)
        return [list(map(int, row)) for row in counts]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one CLIP did on the sets.

    Attributes:
        sets: fingerprint of the sets.
        rankings: by task: `val/image_to_text`, `zero_shot/digits`, …
        nearest: by task: what the queries (of a large set, a sample of them) found; not of probes.
        matrices: by set (`val`, `zero_shot/digits`): the similarities of a few pairs with each other.
    """

    sets: str
    rankings: dict[str, Ranking]
    nearest: dict[str, Nearest] = field(default_factory=dict)
    matrices: dict[str, Matrix] = field(default_factory=dict)

    def outcomes(self) -> dict[str, Outcomes]:
        """Every metric, by its full name."""
        return {
            f"{task}/{metric}": outcomes
            for task, ranking in self.rankings.items()
            for metric, outcomes in ranking.outcomes().items()
        }

    def values(self) -> dict[str, float]:
        """Every metric's value."""
        return {metric: outcomes.value for metric, outcomes in self.outcomes().items()}

    def summary(self) -> dict[str, dict[str, float]]:
        """Every metric's value, its 95 % interval (low, high) and the number of samples n."""
        table = {}
        for metric, outcomes in self.outcomes().items():
            low, high = bootstrap_interval(outcomes)
            table[metric] = {"value": outcomes.value, "low": low, "high": high, "n": len(outcomes.values)}
        return table

    def confusion(self) -> dict[str, list[list[int]]]:
        """By classification: how many images of each class (row) were taken for each class (column).

        scikit-learn's `confusion_matrix` over all classes, also those that do not occur.
        """
        return {task: ranking.confusion() for task, ranking in self.rankings.items() if ranking.labels is not None}

    def to_json(self) -> str:
        """Everything, as text that `from_json` reads back."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Evaluation:
        """Read back what `to_json` gave."""
        read = json.loads(text)
        rankings = {task: Ranking(**ranking) for task, ranking in read["rankings"].items()}
        # A run that an earlier version began has neither.
        nearest_ = {task: Nearest(**found) for task, found in read.get("nearest", {}).items()}
        matrices = {name: Matrix(**found) for name, found in read.get("matrices", {}).items()}
        return Evaluation(read["sets"], rankings, nearest_, matrices)


def metric_names(sets: EvaluationSets) -> list[str]:
    """Names of the metrics that these sets give."""
    rankings = {}
    for task in sets.retrieval:
        rankings[f"{task.name}/image_to_text"] = Ranking([1], len(task.captions), [1.0])
        rankings[f"{task.name}/text_to_image"] = Ranking([1], len(task.images), [1.0])
    for zero_shot in sets.zero_shot:
        rankings[f"zero_shot/{zero_shot.name}"] = Ranking([1], len(zero_shot.classes), [], [0], [0], [1.0], [1.0])
    return list(Evaluation("", rankings).outcomes())


def compare(before: Evaluation, after: Evaluation, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `evaluation.json` holds: both summaries, and for each metric `after - before` with its paired 95 % interval.

    Raises:
        InputError: the two were not made on the same sets.
    """
    if before.sets != after.sets:
        raise InputError("before and after were evaluated on different samples; start the run again in another `out`")
    was, now = before.outcomes(), after.outcomes()
    delta = {}
    for metric in now:
        low, high = paired_bootstrap(was[metric], now[metric])
        delta[metric] = {"value": now[metric].value - was[metric].value, "low": low, "high": high}
    return {"before": before.summary(), "after": after.summary(), "delta": delta, "facts": facts or {}}


# --- evaluating ------------------------------------------------------------------------------------------------------


def evaluate_clip(
    model: torch.nn.Module,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    sets: EvaluationSets,
    *,
    device: torch.device | str,
    batch_size: int,
) -> Evaluation:
    """Evaluate a CLIP (open_clip's `encode_image` and `encode_text`) on all sets.

    The model comes back as it was: each module's train or eval mode, and torch's random state.

    Raises:
        InputError: an image cannot be read; names it.
    """
    towers = Encoder(model, preprocess, tokenizer, torch.device(device), batch_size)
    found = Evaluation(sets.fingerprint, {})
    with _undisturbed(model, towers.device), torch.no_grad():
        for retrieval in sets.retrieval:
            logger.info("evaluating %s: %d images", retrieval.name, len(retrieval.images))
            _retrieve(towers, retrieval, found)
        for zero_shot in sets.zero_shot:
            logger.info("evaluating zero_shot/%s: %d images", zero_shot.name, len(zero_shot.images))
            _classify(towers, zero_shot, found)
        for probes in sets.probes:
            logger.info("probing probe/%s: %d images to learn from", probes.name, len(probes.train.images))
            found.rankings.update(_probe(towers, probes))
    return found


@dataclass(frozen=True, slots=True)
class Encoder:
    """A CLIP and how to feed it: images and captions to embeddings. Use it in eval mode, without gradient."""

    model: Any  # a CLIP; torch.nn.Module does not say what it has
    preprocess: Preprocess
    tokenizer: Tokenizer
    device: torch.device
    batch_size: int

    def images(self, images: Images) -> torch.Tensor:
        """Embeddings (N, D), float32, L2-normalised."""
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        batches = pixel_batches(images, self.preprocess, self.batch_size)
        return torch.cat([_normalised(self.model.encode_image(pixels.to(self.device, dtype))) for pixels in batches])

    def captions(self, captions: list[str]) -> torch.Tensor:
        """Embeddings (M, D), float32, L2-normalised."""
        starts = range(0, len(captions), self.batch_size)
        trim = trim_of(self.model)
        tokens = (self.tokenizer(captions[start : start + self.batch_size]) for start in starts)
        trimmed = ((trim(token_BL) if trim else token_BL).to(self.device) for token_BL in tokens)
        return torch.cat([_normalised(encode_text(self.model, token_BL)) for token_BL in trimmed])


def _normalised(features_BD: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features_BD.float(), dim=-1)


def _retrieve(towers: Encoder, task: RetrievalSet, found: Evaluation) -> None:
    image_ND, caption_MD = towers.images(task.images), towers.captions(task.captions)
    pairs_P2 = torch.from_numpy(task.pairs)
    for direction, query_ND, candidate_MD, pairs in (
        ("image_to_text", image_ND, caption_MD, pairs_P2),
        ("text_to_image", caption_MD, image_ND, pairs_P2.flip(1)),
    ):
        rank_N, precision_N = retrieve(query_ND, candidate_MD, pairs)
        name = f"{task.name}/{direction}"
        found.rankings[name] = Ranking(rank_N.tolist(), len(candidate_MD), precision_N.tolist())
        found.nearest[name] = nearest(query_ND, candidate_MD)
    found.matrices[task.name] = matrix(image_ND, caption_MD, draw_pairs(task.pairs.tolist()))


def _classify(towers: Encoder, task: ZeroShotSet, found: Evaluation) -> None:
    name = f"zero_shot/{task.name}"
    image_ND = towers.images(task.images)
    class_CD = zero_shot_classifier(towers.captions, task.classes, task.templates)
    found.rankings[name] = _ranked(image_ND @ class_CD.T, task, towers.model.logit_scale.exp())
    found.nearest[name] = nearest(image_ND, class_CD)
    found.matrices[name] = matrix(image_ND, class_CD, draw_pairs(list(enumerate(task.labels))))


def _probe(towers: Encoder, task: ProbeSet) -> dict[str, Ranking]:
    """Zero-shot, the probe on all labels and those on a few of each class, on the same embeddings of the test images.

    The features are the L2-normalised embeddings, as CLIP_benchmark's. (The paper's are those before the projection.)
    """
    classes = task.test.classes
    test_ND, train = towers.images(task.test.images), _features(towers, task.train)
    validation = _features(towers, task.validation) if task.validation else None
    zero_shot_NC = test_ND @ zero_shot_classifier(towers.captions, classes, task.test.templates).T
    found = {f"zero_shot/{task.name}": _ranked(zero_shot_NC, task.test, towers.model.logit_scale.exp())}
    for shots in task.shots:
        drawn = draw_shots(train[1], shots, task.seed).to(test_ND.device)
        fitted = probe((train[0][drawn], train[1][drawn]), None, len(classes))
        found[f"probe/{task.name}/{shots}_shot"] = _ranked(fitted.scores(test_ND), task.test)
    found[f"probe/{task.name}"] = _ranked(probe(train, validation, len(classes)).scores(test_ND), task.test)
    return found


def _features(towers: Encoder, of: Labelled) -> tuple[torch.Tensor, torch.Tensor]:
    feature_ND = towers.images(of.images)
    return feature_ND, torch.tensor(of.labels, device=feature_ND.device)


def _ranked(score_NC: torch.Tensor, task: ZeroShotSet, scale: torch.Tensor | float = 1.0) -> Ranking:
    label_N = torch.tensor(task.labels, device=score_NC.device)
    # As a user of the classifier would have them; SigLIP's logit_bias is the same for all classes.
    logit_NC = scale * score_NC
    predicted_N = score_NC.argmax(1)
    # Rounded: they are kept for every image, and further digits are the device's, not the model's.
    confidence_N, calibrated_N = (
        [round(each, 6) for each in probability_NC.cpu().gather(1, predicted_N[:, None].cpu())[:, 0].tolist()]
        for probability_NC in (logit_NC.softmax(1), calibrated(logit_NC, label_N))
    )
    return Ranking(
        class_ranks(score_NC, label_N).tolist(),
        len(task.classes),
        labels=task.labels,
        predicted=predicted_N.tolist(),
        confidence=confidence_N,
        calibrated=calibrated_N,
    )


def pixel_batches(images: Images, preprocess: Preprocess, batch_size: int) -> Iterator[torch.Tensor]:
    """Preprocessed pixels (B, 3, H, W) in order; the next batch is decoded while the caller works on this one."""

    def load(number: int) -> torch.Tensor:
        return preprocess(images.open(number))

    waiting: deque[list[Future[torch.Tensor]]] = deque()
    with ThreadPoolExecutor(DECODERS) as pool:
        for first in range(0, len(images), batch_size):
            waiting.append([pool.submit(load, n) for n in range(first, min(first + batch_size, len(images)))])
            if len(waiting) > 1:
                yield torch.stack([loaded.result() for loaded in waiting.popleft()])
        for batch in waiting:
            yield torch.stack([loaded.result() for loaded in batch])


@contextmanager
def _undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """The model in eval mode; afterwards each module's mode and torch's random state are as before.

    Exact resume depends on it: a run that evaluates draws the same dropout masks as one that does not.
    """
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
