"""Images that can be opened by number: in files, in the shards of a dataset."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image, UnidentifiedImageError

from curate.errors import InputError
from curate.index import MemberReader
from curate.shards import IMAGE_EXTENSIONS

UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, EOFError, Image.DecompressionBombError)
"""What Pillow and the decoders under it raise for bytes that are no whole image."""


class Images(Protocol):
    """Images that can be opened by number."""

    @property
    def names(self) -> list[str]:
        """What each is called: the same for the same images, wherever they lie."""
        ...

    @property
    def sizes(self) -> list[int]:
        """Bytes of each, as far as that is known: another image has another size, almost always."""
        ...

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
    except UNREADABLE as error:
        # PIL's own words for bytes of no format are the address of our buffer.
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{where}: not a readable image ({reason}); remove it or build the dataset again") from error


@dataclass(frozen=True, slots=True)
class TarImages:
    """Images in the shards of a dataset: `places` are (tar, offset, size, key)."""

    reader: MemberReader
    places: list[tuple[int, int, int, str]]

    @property
    def names(self) -> list[str]:
        """The keys of the samples."""
        return [place[3] for place in self.places]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each."""
        return [place[2] for place in self.places]

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

    @property
    def names(self) -> list[str]:
        """The names of the files, without their folders."""
        return [path.name for path in self.paths]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each; -1 of one that is not there, which is told when it is opened."""
        return [path.stat().st_size if path.exists() else -1 for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, number: int) -> Image.Image:
        """The image, RGB."""
        path = self.paths[number]
        try:
            return decode(path.read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and its sub-folders, sorted; hidden ones left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
        and not path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
