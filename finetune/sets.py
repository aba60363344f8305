"""What is evaluated on: image–caption retrieval from datasets, zero-shot classification from labelled folders.

A retrieval set has every distinct image and every distinct caption once, and the pairs of them that the dataset holds:
an image with five captions is one image with five true captions, a caption that many images share is one caption with
many true images. (Were each row an entry of its own, the copies of one wrong caption would fill the top ten.) Images
are the same if their bytes are, captions if they differ in case and white space at most, as CLIP's tokenizer reads
them.

Sets are read from files in a fixed order and sampled with a fixed seed, so `before` and `after` see the same samples;
`fingerprint` says so.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from curate.errors import ConfigError, InputError, did_you_mean
from curate.shards import (
    IMAGE_EXTENSIONS,
    SPLITS,
    MemberReader,
    SampleIndex,
    fingerprint,
    read_index,
    shard_folder,
    shards_of,
)
from finetune.config import EvaluateConfig, ZeroShotConfig
from finetune.prompts import class_name, prompts

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE_SEED = 0


class Images(Protocol):
    """Images that can be opened by number."""

    def __len__(self) -> int: ...

    def open(self, number: int) -> Image.Image:
        """The image, RGB.

        Raises:
            InputError: names the file; it is not a whole image.
        """
        ...


def decode(content: bytes, where: str) -> Image.Image:
    """The image in these bytes, RGB.

    Raises:
        InputError: `where` is not a whole image.
    """
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # PIL's own words for bytes of no format are the address of our buffer.
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{where}: not a readable image ({reason}); remove it or build the dataset again") from error


@dataclass(frozen=True, slots=True)
class TarImages:
    """Images in the shards of a dataset: `places` are (tar, offset, size, key)."""

    reader: MemberReader
    places: list[tuple[int, int, int, str]]

    def __len__(self) -> int:
        return len(self.places)

    def open(self, number: int) -> Image.Image:
        """The image, RGB."""
        tar, offset, size, key = self.places[number]
        return decode(self.reader.read(tar, offset, size), f"{self.reader.tars[tar]}: sample {key}")


@dataclass(frozen=True, slots=True)
class FileImages:
    """Images in files."""

    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, number: int) -> Image.Image:
        """The image, RGB."""
        path = self.paths[number]
        try:
            return decode(path.read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error


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
    images: FileImages
    labels: list[int]
    classes: list[str]
    templates: list[str]


@dataclass(frozen=True, slots=True)
class EvaluationSets:
    """All that a CLIP is evaluated on."""

    retrieval: list[RetrievalSet]
    zero_shot: list[ZeroShotSet]

    @property
    def fingerprint(self) -> str:
        """The same for the same samples, captions, classes and templates."""
        retrieval = [(s.name, [place[3] for place in s.images.places], s.captions) for s in self.retrieval]
        zero_shot = [
            (s.name, [path.name for path in s.images.paths], s.labels, s.classes, s.templates) for s in self.zero_shot
        ]
        return fingerprint(retrieval, zero_shot)


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
    indices |= {name: _named_index(path) for name, path in config.retrieval.items()}
    return EvaluationSets(
        [retrieval_set(name, index, config.max_retrieval) for name, index in indices.items() if len(index)],
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
    reader = MemberReader(index.tars)
    images: dict[bytes, int] = {}
    captions: dict[str, int] = {}
    places: list[tuple[int, int, int, str]] = []
    texts: list[str] = []
    pairs: set[tuple[int, int]] = set()
    for row in rows:
        place = (row["tar"], row["image_offset"], row["image_size"], str(row["key"]))
        content = hashlib.sha256(reader.read(*place[:3])).digest()
        caption = " ".join((row["caption"] or "").split())
        image = images.setdefault(content, len(images))
        text = captions.setdefault(caption.casefold(), len(captions))
        places += [place] if image == len(places) else []
        texts += [caption] if text == len(texts) else []
        pairs.add((image, text))
    return RetrievalSet(name, TarImages(reader, places), texts, np.array(sorted(pairs), dtype=np.int64))


def zero_shot_set(name: str, config: ZeroShotConfig) -> ZeroShotSet:
    """The images of a labelled folder.

    Raises:
        ConfigError: a template without exactly one `{}`.
        InputError: no such folder, no images, fewer than two classes, a bad labels.csv.
    """
    folder = config.images
    prompts("", config.templates)
    if not folder.is_dir():
        raise InputError(
            f"evaluate.zero_shot.{name}.images: {folder}: no such folder; expected one with a sub-folder a class"
        )
    labelled = _from_csv(folder) if (folder / "labels.csv").is_file() else _from_folders(folder)
    classes = sorted({label for _, label in labelled})
    if len(classes) < 2:
        raise InputError(f"{folder}: {len(classes)} class; expected at least two sub-folders, or a labels.csv")
    number = {label: place for place, label in enumerate(classes)}
    return ZeroShotSet(
        name,
        FileImages([path for path, _ in labelled]),
        [number[label] for _, label in labelled],
        [class_name(label) for label in classes],
        list(config.templates),
    )


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and its sub-folders, sorted; hidden ones left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _from_folders(folder: Path) -> list[tuple[Path, str]]:
    labelled = []
    for of_class in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        found = image_files(of_class)
        if not found:
            raise InputError(f"{of_class}: no image in this class's folder; put some there or remove it")
        labelled += [(path, of_class.name) for path in found]
    return labelled


def _from_csv(folder: Path) -> list[tuple[Path, str]]:
    table = folder / "labels.csv"
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        for column in ("image", "label"):
            if column not in columns:
                raise InputError(f"{table}: no column '{column}'.{did_you_mean(column, columns)}")
        labelled = [(folder / (row["image"] or ""), (row["label"] or "").strip()) for row in rows]
    for line, (path, label) in enumerate(labelled, start=2):
        if not label:
            raise InputError(f"{table}: line {line} has no label")
        if not path.is_file():
            raise InputError(f"{table}: line {line}: {path}: no such image")
    return labelled
