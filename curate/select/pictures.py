"""The user's own images: test sets to keep out, examples of the domain."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from curate.errors import ConfigError, InputError
from curate.files import digest, file_sha256
from curate.index import iter_images, read_index
from curate.ledger import Reason
from curate.shards import IMAGE_EXTENSIONS, shard_folder, shards_of

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("cliptailor")
T = TypeVar("T")


def find(where: str, text: str) -> Path:
    """The path that a step names.

    Raises:
        ConfigError: nothing is there.
    """
    path = Path(text).expanduser()
    if not path.exists():
        raise ConfigError(
            f"{where}: {text}: no such file or folder; expected an image, a folder of images or a dataset"
        )
    return path


def pictures(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, encoded image) of an image file, of a folder's images, or of a dataset's samples, in a stable order.

    Raises:
        InputError: no image there.
    """
    if shards_of(shard_folder(path)):
        for key, _, content in iter_images(read_index(path)):
            yield f"{path}/{key}", content
        return
    check(path)
    for file in _image_files(path):
        yield str(file), file.read_bytes()


def check(path: Path) -> None:
    """Look whether there are images.

    Raises:
        InputError: no image there.
    """
    if not shards_of(shard_folder(path)) and not _image_files(path):
        raise InputError(f"{path}: no image there; expected {', '.join(IMAGE_EXTENSIONS)} files or a dataset's shards")


def _image_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(
        file for file in path.rglob("*") if file.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS and file.is_file()
    )


def identity(path: Path) -> list[tuple[str, str]]:
    """What a change of these images changes: names and digests, for a fingerprint."""
    stems = shards_of(shard_folder(path))
    if stems:
        return [(stem.name, digest(stem.with_suffix(".parquet"))) for stem in stems]
    return [(str(file), file_sha256(file)) for file in _image_files(path)]


def decoded(name: str, content: bytes) -> np.ndarray | None:
    """Pixels, uint8 (H, W, 3); None, and a warning in the log, where they cannot be had."""
    from curate.config import FetchConfig
    from curate.images import Rejected, decode

    try:
        return decode(content, max_pixels=FetchConfig().max_pixels).rgb
    except Rejected as error:
        logger.warning("%s: %s; only its exact bytes are compared", name, Reason(error.reason).value)
        return None


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`size` of them at a time."""
    waiting = iter(items)
    while batch := list(islice(waiting, size)):
        yield batch
