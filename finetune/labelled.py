"""Labelled images, wherever they are: class folders, a table, torchvision's sets by name, CLIP_benchmark's webdatasets.

CLIP_benchmark's layout (https://github.com/LAION-AI/CLIP_benchmark, `build_wds_dataset`) is a folder with, for each
split, `SPLIT/nshards.txt` and `SPLIT/0.tar` …; a sample is an image (`KEY.webp`, `.png`, `.jpg` or `.jpeg`) and
`KEY.cls`, the number of its class; or, where `dataset_type.txt` says `retrieval`, `KEY.txt`, a caption a line. Beside
the splits lie `classnames.txt` and `zeroshot_classification_templates.txt`, one a line, with `{c}` for the class's
name.
"""

from __future__ import annotations

import csv
import inspect
import logging
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from curate.errors import InputError, did_you_mean
from curate.index import MemberReader
from finetune.config import TORCHVISION, LabelledConfig
from finetune.images import FileImages, Images, TarImages, image_files

logger = logging.getLogger("cliptailor")

BENCHMARK_IMAGES = ("webp", "png", "jpg", "jpeg")
TARGETS = ("targets", "labels", "_labels")  # where torchvision's sets keep them


@dataclass(frozen=True, slots=True)
class Labelled:
    """Images, the number of each one's class, the classes' names, and the set's own templates, if it brings any."""

    images: Images
    labels: list[int]
    classes: list[str]
    templates: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TorchvisionImages:
    """Images of a torchvision dataset."""

    dataset: Any
    name: str

    @property
    def names(self) -> list[str]:
        """Their numbers."""
        return [f"{self.name}/{number}" for number in range(len(self))]

    @property
    def sizes(self) -> list[int]:
        """Not known."""
        return []

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, number: int) -> Image.Image:
        """The image, RGB."""
        image: Image.Image = self.dataset[number][0]
        return image.convert("RGB")


def class_name(folder: str) -> str:
    """What a class folder is called in a prompt: `palm_cockatoo` and `palm-cockatoo` → `palm cockatoo`."""
    return " ".join(folder.replace("_", " ").replace("-", " ").split())


def labelled(config: LabelledConfig, key: str) -> Labelled:
    """Find and label the images.

    Args:
        config: where they are.
        key: of this configuration, for the errors.

    Raises:
        InputError: nothing there, a wrong table, a label that no class has or two have, fewer than two classes.
    """
    where = str(config.images)
    if where.startswith(TORCHVISION):
        return _torchvision(config, key)
    if config.images.is_file():
        return _named(_from_table(config.images, config.image_column, config.label_column), config)
    if not config.images.is_dir():
        raise InputError(f"{key}.images: {where}: no such folder; expected one with a sub-folder a class, or a table")
    if is_benchmark(config.images):
        return _benchmark(config)
    table = config.images / "labels.csv"
    if table.is_file():
        return _named(_from_table(table, config.image_column, config.label_column), config)
    return _named(_from_folders(config.images), config)


def _names(path: Path) -> list[str]:
    """The classes that a text file names, one a line; empty lines at its end are none."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read; expected the name of a class on each line") from error
    if "" in names:
        raise InputError(f"{path}: line {names.index('') + 1} is empty; expected the name of a class on each line")
    return names


def _named(found: Sequence[tuple[Path, str]], config: LabelledConfig) -> Labelled:
    """Labels as numbers: of the lines of `classes`, else of the labels in order."""
    if not found:
        raise InputError(f"{config.images}: no labelled image; expected a sub-folder a class, or a labels.csv")
    labels = [label for _, label in found]
    if config.classes:
        classes = _names(config.classes)
        numbers = _numbers(labels, classes, config.classes)
    else:
        kinds = sorted(set(labels))
        place = {label: number for number, label in enumerate(kinds)}
        classes, numbers = [class_name(label) for label in kinds], [place[label] for label in labels]
    _check_classes(classes, config.images)
    return Labelled(FileImages([path for path, _ in found]), numbers, classes)


def _numbers(labels: Sequence[str], classes: Sequence[str], source: Path) -> list[int]:
    """By name; or by number, from 0, where all are numbers and some are no class's name."""
    place = {class_name(name): number for number, name in enumerate(classes)}
    wanted = {label: class_name(label) for label in set(labels)}
    unknown = sorted(label for label, name in wanted.items() if name not in place)
    if unknown and all(label.isdecimal() for label in wanted):
        return _positions(labels, classes, source)
    if unknown:
        raise InputError(f"{source}: no class '{unknown[0]}'.{did_you_mean(unknown[0], classes)}")
    if twice := sorted(set(wanted.values()) & set(_repeated(list(map(class_name, classes))))):
        raise InputError(f"{source}: there are two classes '{twice[0]}', and labels by that name; give numbers, from 0")
    return [place[wanted[label]] for label in labels]


def _positions(labels: Sequence[str], classes: Sequence[str], source: Path) -> list[int]:
    if wrong := [label for label in labels if int(label) >= len(classes)]:
        raise InputError(f"{source}: {len(classes)} classes, but there is an image of class {wrong[0]}, from 0")
    return [int(label) for label in labels]


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _check_classes(classes: Sequence[str], source: object) -> None:
    if len(classes) < 2:
        raise InputError(f"{source}: {len(classes)} class; expected at least two sub-folders, or a labels.csv")
    if twice := _repeated(classes):
        logger.warning("%s: two classes are called '%s': nothing can tell them apart by their text", source, twice[0])


# --- folders and tables ----------------------------------------------------------------------------------------------


def _from_folders(folder: Path) -> list[tuple[Path, str]]:
    found = []
    for of_class in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = image_files(of_class)
        if not files:
            raise InputError(f"{of_class}: no image in this class's folder; put some there or remove it")
        found += [(path, of_class.name) for path in files]
    return found


def _from_table(table: Path, image: str, label: str) -> list[tuple[Path, str]]:
    rows = _parquet_rows(table, image, label) if table.suffix == ".parquet" else _csv_rows(table, image, label)
    found = [(table.parent / (row[0] or ""), (row[1] or "").strip()) for row in rows]
    # Lines of a CSV are counted as an editor does, below the names of the columns.
    word, first = ("row", 1) if table.suffix == ".parquet" else ("line", 2)
    for line, (path, name) in enumerate(found, start=first):
        if not name:
            raise InputError(f"{table}: {word} {line} has no {label}")
        if not path.is_file():
            raise InputError(f"{table}: {word} {line}: {path}: no such image")
    return found


def _check_columns(table: Path, columns: Sequence[str], *wanted: str) -> None:
    for column in wanted:
        if column not in columns:
            raise InputError(f"{table}: no column '{column}'.{did_you_mean(column, columns)}")


def _csv_rows(table: Path, image: str, label: str) -> list[tuple[str, str]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            _check_columns(table, rows.fieldnames or [], image, label)
            return [(row[image], row[label]) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read ({error}); expected a CSV file in UTF-8") from error


def _parquet_rows(table: Path, image: str, label: str) -> Iterable[tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        _check_columns(table, pq.read_schema(table).names, image, label)
        columns = pq.read_table(table, columns=[image, label])
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{table}: not a readable Parquet file ({error})") from error
    values = ([None if cell is None else str(cell) for cell in columns[name].to_pylist()] for name in (image, label))
    return zip(*values, strict=True)


# --- torchvision -----------------------------------------------------------------------------------------------------


def _torchvision(config: LabelledConfig, key: str) -> Labelled:
    import torchvision

    name = str(config.images).removeprefix(TORCHVISION)
    kind = getattr(torchvision.datasets, name, None)
    taken = set(inspect.signature(kind).parameters) if isinstance(kind, type) else set()
    if not {"root", "download"} <= taken or not taken & {"split", "train"}:
        fitting = [
            each
            for each in torchvision.datasets.__all__
            if {"root", "download"} <= set(inspect.signature(getattr(torchvision.datasets, each)).parameters)
        ]
        raise InputError(f"{key}.images: torchvision has no labelled set '{name}'.{did_you_mean(name, fitting)}")
    if "train" in taken and config.split not in ("train", "test"):
        raise InputError(f"{key}.split: {name} has train and test, not '{config.split}'")
    which = {"train": config.split == "train"} if "train" in taken else {"split": config.split}
    try:
        dataset = kind(root=str(config.root), download=config.download, **which)  # type: ignore[misc]
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{key}.root: {config.root}: torchvision finds no {name}, split {config.split}, there ({reason}); "
            "`download: true` lets it fetch the set"
        ) from error
    labels = _targets(dataset, f"{key}.images: {name}")
    names = _names(config.classes) if config.classes else [class_name(str(each)) for each in _classes(dataset, key)]
    _check_classes(names, name)
    if labels and max(labels) >= len(names):
        raise InputError(f"{key}.classes: {len(names)} names, but {name} has a label {max(labels)}, from 0")
    return Labelled(TorchvisionImages(dataset, name), labels, names)


def _targets(dataset: Any, where: str) -> list[int]:
    kept = next((getattr(dataset, each) for each in TARGETS if hasattr(dataset, each)), None)
    found = [target for _, target in dataset] if kept is None else list(kept)
    try:
        return [int(target) for target in found]
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: its labels are no numbers of classes; nothing to classify") from error


def _classes(dataset: Any, key: str) -> Sequence[Any]:
    names: Sequence[Any] | None = getattr(dataset, "classes", None)
    if names is None:
        raise InputError(f"{key}.classes: torchvision does not name this set's classes; give a text file of them")
    return names


# --- CLIP_benchmark --------------------------------------------------------------------------------------------------


def is_benchmark(folder: Path) -> bool:
    """Whether this is a dataset in CLIP_benchmark's webdataset layout."""
    return any(folder.glob("*/nshards.txt"))


def _benchmark(config: LabelledConfig) -> Labelled:
    folder = config.images
    if _type(folder) != "classification":
        raise InputError(f"{folder}: its dataset_type.txt says {_type(folder)}; expected classification")
    images, labels = _members(folder, config.split, "cls")
    names = config.classes or folder / "classnames.txt"
    if not names.is_file():
        raise InputError(f"{names}: no such file; expected the name of a class on each line")
    classes = _names(names)
    if wrong := [label for label in labels if not label.strip().isdecimal()]:
        raise InputError(f"{folder}: the label {wrong[0][:20]!r} is no number of a class")
    numbers = _positions([label.strip() for label in labels], classes, names)
    own = folder / "zeroshot_classification_templates.txt"
    templates = [line.replace("{c}", "{}") for line in _names(own)] if own.is_file() else []
    _check_classes(classes, names)
    return Labelled(images, numbers, classes, templates)


def captioned(folder: Path, most: int, seed: int) -> tuple[TarImages, list[list[str]]]:
    """The images of CLIP_benchmark's retrieval layout (its test split), and the captions of each.

    Args:
        folder: with a dataset_type.txt that says retrieval.
        most: of larger sets so many images, drawn by seed.
        seed: of the draw.

    Raises:
        InputError: the folder is for classification; a file is missing or wrong.
    """
    if _type(folder) != "retrieval":
        raise InputError(f"{folder}: its dataset_type.txt says {_type(folder)}; expected retrieval")
    images, texts = _members(folder, "test", "txt")
    chosen = np.arange(len(texts))
    if len(chosen) > most:
        chosen = np.sort(np.random.default_rng(seed).choice(len(texts), most, replace=False))
    drawn = TarImages(images.reader, [images.places[number] for number in chosen])
    return drawn, [texts[number].splitlines() for number in chosen]


def _type(folder: Path) -> str:
    said = folder / "dataset_type.txt"
    return said.read_text(encoding="utf-8").strip().lower() if said.is_file() else "classification"


def _members(folder: Path, split: str, beside: str) -> tuple[TarImages, list[str]]:
    """The images of a split, and what stands beside each in the member with this extension."""
    count = folder / split / "nshards.txt"
    if not count.is_file():
        there = ", ".join(sorted(path.parent.name for path in folder.glob("*/nshards.txt")))
        raise InputError(f"{folder}: no split '{split}'; splits there: {there}")
    if not (said := count.read_text(encoding="utf-8").strip()).isdecimal():
        raise InputError(f"{count}: expected a number of shards, found '{said[:20]}'")
    tars = [folder / split / f"{number}.tar" for number in range(int(said))]
    reader = MemberReader(tars)
    places: list[tuple[int, int, int, str]] = []
    texts: list[str] = []
    for number, tar in enumerate(tars):
        for key, members in _samples(tar).items():
            extension = next((each for each in BENCHMARK_IMAGES if each in members), None)
            if extension is None or beside not in members:
                missing = f".{beside}" if extension else "image"
                raise InputError(f"{tar}: sample {key} has no {missing}")
            places.append((number, *members[extension], key))
            texts.append(reader.read(number, *members[beside]).decode("utf-8", "replace"))
    if not places:
        raise InputError(f"{folder / split}: no sample in its shards")
    return TarImages(reader, places), texts


def _samples(tar: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key → extension → (offset, size); as webdataset reads names, the extension begins at the first dot."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.isfile():
                    folder, slash, file = member.name.rpartition("/")
                    stem, _, extension = file.partition(".")
                    places = found.setdefault(folder + slash + stem, {})
                    places[extension.lower()] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{tar}: not a readable tar ({error}); nshards.txt says that it is there") from error
    return found
