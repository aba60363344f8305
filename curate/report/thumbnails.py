"""Small pictures of the rows that are shown, made once: `.report/thumbnails.parquet` keeps those of the last report.

A picture is re-encoded from the pixels alone (JPEG, of at most so many pixels), so that no metadata of the web's
files, a camera's place say, travels in the report. It is known by the digest of its raw shard's Parquet and its key.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from curate.errors import InputError
from curate.files import digest, made_from, read_rows, sweep, write_parquet
from curate.index import MemberReader

FILE = Path(".report", "thumbnails.parquet")
FORMAT = "thumbnails 1"
SIDE = 128
QUALITY = 80


class Thumbnails:
    """The pictures that a dataset's report shows, `data:` URLs."""

    def __init__(self, out: Path) -> None:
        self._file = out / FILE
        self._kept: dict[str, bytes] = {}
        if made_from(self._file) == FORMAT:
            table = read_rows(self._file)
            self._kept = dict(zip(table["name"].to_pylist(), table["jpeg"].to_pylist(), strict=True))
        self._used: dict[str, bytes] = {}
        self._digests: dict[Path, str] = {}

    def read(self, members: Sequence[tuple[str, Path, int, int]], side: int, quality: int) -> dict[str, str]:
        """By key: the picture, of those that can be read.

        Args:
            members: key, raw Parquet, offset and size of the image in the tar beside it.
            side: pixels of the longer side at most.
            quality: of the JPEG.
        """
        tars = sorted({file.with_suffix(".tar") for _, file, _, _ in members})
        number = {tar: place for place, tar in enumerate(tars)}
        reader, pictures = MemberReader(tars), {}
        try:
            for key, file, offset, length in members:
                name = f"{self._digest(file)} {key} {side} {quality}"
                small = self._kept.get(name)
                if small is None:
                    content = _read(reader, number[file.with_suffix(".tar")], offset, length)
                    if content is None:
                        continue
                    small = thumbnail(content, side, quality) or b""
                self._used[name] = small
                if small:
                    pictures[key] = data_url(small)
        finally:
            reader.close()
        return pictures

    def save(self) -> None:
        """Keep what was used since this was made, and no more."""
        import pyarrow as pa

        if self._used.keys() != self._kept.keys():
            names = sorted(self._used)
            jpegs = pa.array([self._used[name] for name in names], pa.binary())
            table = pa.table({"name": pa.array(names, pa.string()), "jpeg": jpegs})
            write_parquet(table, self._file, made_from=FORMAT)
            sweep(self._file.parent)

    def _digest(self, file: Path) -> str:
        if file not in self._digests:
            self._digests[file] = digest(file)
        return self._digests[file]


def _read(reader: MemberReader, tar: int, offset: int, length: int) -> bytes | None:
    try:
        return reader.read(tar, offset, length)
    except (InputError, OSError):  # raw shards that were moved away after packing: a report without their pictures
        return None


def thumbnail(content: bytes, side: int = SIDE, quality: int = QUALITY) -> bytes | None:
    """A JPEG of at most `side` pixels on its longer side, white where it is transparent, without any metadata.

    None for bytes that are not an image that Pillow can read.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (2 * side, 2 * side))
            pixels = image.convert("RGBA") if image.mode in ("P", "PA") else image  # a palette cannot be averaged
            pixels.thumbnail((side, side), reducing_gap=2)
            pixels = pixels.convert("RGBA")
    except (OSError, ValueError, SyntaxError, RuntimeError, EOFError, Image.DecompressionBombError):
        return None
    flat = Image.new("RGB", pixels.size, "white")
    flat.paste(pixels, mask=pixels.getchannel("A"))
    written = io.BytesIO()
    flat.save(written, "JPEG", quality=quality, optimize=True)
    return written.getvalue()


def data_url(jpeg: bytes) -> str:
    """A JPEG as a `data:` URL."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
