"""What is evaluated on: image–caption retrieval from datasets, classification of labelled images (zero-shot, probes).

A retrieval set has every distinct image and every distinct caption once, and the pairs of them that the dataset holds:
an image with five captions is one image with five true captions, a caption that many images share is one caption with
many true images. (Were each row an entry of its own, the copies of one wrong caption would fill the top ten.) Images
are the same if their bytes are, captions if they differ in case and white space at most, as CLIP's tokenizer reads
them.

Sets are read from files in a fixed order and sampled with a fixed seed, so `before` and `after` see the same samples;
`fingerprint` says so.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curate.errors import ConfigError, InputError
from curate.files import fingerprint
from curate.index import MemberReader, SampleIndex, read_index
from curate.shards import SPLITS, shard_folder, shards_of
from finetune.config import EvaluateConfig, ProbeConfig, ZeroShotConfig
from finetune.images import Images, TarImages
from finetune.labelled import Labelled, captioned, is_benchmark, labelled
from finetune.templates import USUAL, templates_of

logger = logging.getLogger("cliptailor")

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE_SEED = 0


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    """Distinct images, distinct captions, and which belong together: `pairs` (P, 2) of (image, caption)."""

    name: str
    images: TarImages
    captions: list[str]
    pairs: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ZeroShotSet:
    """Images, the number of each one's class, the classes' names, and the prompts' templates."""

    name: str
    images: Images
    labels: list[int]
    classes: list[str]
    templates: list[str]


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """Labelled images to fit a linear probe on, to choose its penalty on, and to count; one list of classes."""

    name: str
    train: Labelled
    validation: Labelled | None
    test: ZeroShotSet
    shots: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class EvaluationSets:
    """All that a CLIP is evaluated on."""

    retrieval: list[RetrievalSet]
    zero_shot: list[ZeroShotSet]
    probes: list[ProbeSet] = field(default_factory=list)

    @cached_property  # it looks at every file, and each validation asks for it
    def fingerprint(self) -> str:
        """The same for the same samples, captions, truth, classes and templates."""

        def seen(images: Images) -> tuple[list[str], list[int]]:
            return images.names, images.sizes

        retrieval = [(s.name, seen(s.images), s.captions, s.pairs.tolist()) for s in self.retrieval]
        zero_shot = [(s.name, seen(s.images), s.labels, s.classes, s.templates) for s in self.zero_shot]
        probes = [
            (s.name, seen(s.train.images), s.train.labels, seen(s.test.images), s.test.labels, s.shots, s.seed)
            for s in self.probes
        ]
        return fingerprint(retrieval, zero_shot, probes)


def evaluation_sets(
    config: EvaluateConfig, dataset: Path | None = None, splits: Sequence[str] = ("val", "retain")
) -> EvaluationSets:
    """Find and index everything that is to be evaluated on.

    Args:
        config: the named sets.
        dataset: those of its `splits` that exist are retrieval sets named after the split.
        splits: which ones.

    Raises:
        ConfigError: a name twice or with a slash, a template without `{}`.
        InputError: a folder that is not what it should be.
    """
    folder = shard_folder(dataset) if dataset else None
    there = [split for split in splits if folder and shards_of(folder, split)]
    for name in [*config.retrieval, *config.zero_shot]:
        if "/" in name:
            raise ConfigError(f"evaluate: the name '{name}' has a slash, which separates the parts of a metric's name")
    if taken := [name for name in config.retrieval if name in SPLITS]:
        raise ConfigError(f"evaluate.retrieval.{taken[0]}: this name is the dataset's own split's; choose another")
    indices = {split: read_index(dataset, split) for split in there} if dataset else {}
    retrieval = [retrieval_set(name, index, config.max_retrieval) for name, index in indices.items() if len(index)]
    for name, path in config.retrieval.items():
        if is_benchmark(path):
            retrieval.append(_distinct(name, *captioned(path, config.max_retrieval, SAMPLE_SEED)))
        else:
            retrieval.append(retrieval_set(name, _named_index(path), config.max_retrieval))
    return EvaluationSets(
        retrieval,
        [zero_shot_set(name, zero_shot) for name, zero_shot in config.zero_shot.items()],
    )


def dataset_sets(config: EvaluateConfig, dataset: Path, split: str) -> EvaluationSets:
    """As `evaluation_sets`, of one split of a dataset, which must be there, and its retain split.

    Raises:
        InputError: the dataset has no such split.
    """
    folder = shard_folder(dataset)
    if not folder.is_dir():
        raise InputError(f"{dataset}: no such folder; expected a dataset that curate build or img2dataset made")
    if not shards_of(folder, split):
        there = ", ".join(name for name in SPLITS if shards_of(folder, name)) or "none"
        raise InputError(
            f"{folder}: no {split} split to evaluate on; splits there: {there}. "
            "All of a folder without splits: evaluate.retrieval.NAME"
        )
    return evaluation_sets(config, dataset, (split, "retain"))


def _named_index(path: Path) -> SampleIndex:
    """A named dataset: its test split if it has one, else all of its samples."""
    index = read_index(path, "test" if shards_of(shard_folder(path), "test") else None)
    if not len(index):
        raise InputError(f"{path}: no sample with an image; nothing to evaluate on")
    return index


def retrieval_set(name: str, index: SampleIndex, most: int) -> RetrievalSet:
    """The distinct images and captions of (a seeded sample of `most` of) these samples."""
    chosen = np.arange(len(index))
    if len(index) > most:
        chosen = np.sort(np.random.default_rng(SAMPLE_SEED).choice(len(index), most, replace=False))
    rows = index.table.select(["tar", "image_offset", "image_size", "key", "caption"]).take(chosen).to_pylist()
    places = [(row["tar"], row["image_offset"], row["image_size"], str(row["key"])) for row in rows]
    return _distinct(name, TarImages(MemberReader(index.tars), places), [[row["caption"] or ""] for row in rows])


def _distinct(name: str, given: TarImages, captions_of: Sequence[Sequence[str]]) -> RetrievalSet:
    images: dict[bytes, int] = {}
    captions: dict[str, int] = {}
    places: list[tuple[int, int, int, str]] = []
    texts: list[str] = []
    pairs: set[tuple[int, int]] = set()
    for place, captions_here in zip(given.places, captions_of, strict=True):
        content = hashlib.sha256(given.reader.read(*place[:3])).digest()
        image = images.setdefault(content, len(images))
        places += [place] if image == len(places) else []
        for words in captions_here:
            caption = " ".join(words.split())
            text = captions.setdefault(caption.casefold(), len(captions))
            texts += [caption] if text == len(texts) else []
            pairs.add((image, text))
    return RetrievalSet(name, TarImages(given.reader, places), texts, np.array(sorted(pairs), dtype=np.int64))


def zero_shot_set(name: str, config: ZeroShotConfig, key: str | None = None) -> ZeroShotSet:
    """Labelled images, and the prompts of their classes: those asked for, else the set's own, else the usual one.

    Raises:
        ConfigError: a template without exactly one `{}`, a name that is no list of templates.
        InputError: as `labelled`.
    """
    key = key or f"evaluate.zero_shot.{name}"
    asked = None if config.templates is None else templates_of(config.templates, f"{key}.templates")
    found = labelled(config, key)
    templates = asked or found.templates or USUAL
    return ZeroShotSet(name, found.images, found.labels, found.classes, list(templates))


def probe_set(name: str, config: ProbeConfig) -> ProbeSet:
    """The splits of a linear probe.

    Raises:
        ConfigError: as `zero_shot_set`.
        InputError: as `labelled`; or a split has other classes than the test split.
    """
    key = f"probe.{name}"
    test = zero_shot_set(name, config.test, f"{key}.test")
    train = labelled(config.train, f"{key}.train")
    validation = labelled(config.validation, f"{key}.validation") if config.validation else None
    for split, found in (("train", train), ("validation", validation)):
        if found and found.classes != test.classes:
            odd = sorted(set(found.classes) ^ set(test.classes))
            differ = f"other classes than {key}.test, such as '{odd[0]}'" if odd else f"not in the order of {key}.test"
            raise InputError(f"{key}.{split}: {differ}; name them all, in one order, in a file: classes")
    if missing := set(range(len(train.classes))) - set(train.labels):
        raise InputError(f"{key}.train: no image of class '{train.classes[min(missing)]}', so that it cannot be learnt")
    most = max(Counter(train.labels).values())
    for shots in (shots for shots in config.shots if shots > most):
        logger.warning("%s.train: no class has more than %d images: %d_shot is left out", key, most, shots)
    drawn = tuple(shots for shots in config.shots if shots <= most)
    return ProbeSet(name, train, validation, test, drawn, config.seed)
