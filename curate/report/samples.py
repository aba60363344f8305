"""The rows that the report shows: a few of each split and of what each step dropped, with small pictures.

Of what a step dropped by a number, those nearest its threshold come first: they are what tells whether the threshold
is right. All else is a seeded random choice. A picture is re-encoded from the pixels alone (at most 128 px, JPEG), so
that no metadata of the web's files, a camera's place say, travels in the report.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.errors import InputError
from curate.report.figures import columns
from curate.shards import MemberReader

if TYPE_CHECKING:
    import duckdb

SIDE = 128
QUALITY = 80
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
PAIRS = ("dedup", "decontaminate")


@dataclass(frozen=True)
class Sample:
    """A row of the ledger as it is shown, and its twin where that is a row too.

    `picture` and `twin_picture` are `data:` URLs, or None. `twin_fate` is the later step that dropped the twin; None if
    it is kept.
    """

    key: str
    url: str | None
    caption: str | None
    reason: str | None
    value: str | None
    twin: str | None
    picture: str | None = None
    twin_picture: str | None = None
    twin_caption: str | None = None
    twin_url: str | None = None
    twin_fate: str | None = None


@dataclass(frozen=True)
class Gallery:
    """Samples of one split (`stage` is "kept") or of what one step dropped; `reason` is the step's first."""

    stage: str
    name: str
    count: int
    reason: str | None
    samples: list[Sample]

    @property
    def pairs(self) -> bool:
        """Whether each sample stands beside a twin."""
        return self.reason in PAIRS

    def at_most(self, number: int) -> Gallery:
        """The same gallery with fewer samples."""
        return replace(self, samples=self.samples[:number])


def choose(
    database: duckdb.DuckDBPyConnection,
    figures: Mapping[str, Any],
    filters: Sequence[dict[str, Any]],
    each: int,
    seed: int,
) -> list[Gallery]:
    """The galleries, kept first, then the steps as in the funnel: `each` samples at most, without pictures."""
    galleries = [
        Gallery("kept", split, number, None, _rows(database, "kept AND split = ?", [split], "", each, seed))
        for split, number in figures["splits"].items()
        if number
    ]
    constants = {str(step.get("name")): _constants(step) for step in filters}
    for step in figures["funnel"]:
        if step["dropped"]:
            place = [step["stage"], step["step"]]
            reason = next(r["reason"] for r in figures["reasons"] if [r["stage"], r["step"]] == place)
            order = _nearest_first(reason, constants.get(step["step"], []))
            rows = _rows(database, "NOT kept AND stage = ? AND step = ?", place, order, each, seed)
            galleries.append(Gallery(step["stage"], step["step"], step["dropped"], reason, rows))
    return galleries


def _rows(
    database: duckdb.DuckDBPyConnection, condition: str, values: Sequence[str], order: str, each: int, seed: int
) -> list[Sample]:
    query = f"""
        SELECT key, left(url, 2001), left(caption, 300), reason, left(value, 300), left(twin, 1000)
        FROM ledger WHERE {condition}
        ORDER BY {order} md5(concat(key, ' ', ?::BIGINT)), key LIMIT ?
    """
    return [Sample(*row) for row in database.execute(query, [*values, seed, each]).fetchall()]


def _nearest_first(reason: str, constants: Sequence[float]) -> str:
    """The start of an ORDER BY that puts the rows first whose `value` is nearest the step's threshold; may be empty."""
    if reason in ("top", "relevance"):  # the best of those that were not good enough
        return f"TRY_CAST(regexp_extract(value, '{NUMBER}') AS DOUBLE) DESC NULLS LAST,"
    if reason in PAIRS:  # the farthest of those that were near enough to be called the same
        number = "TRY_CAST(regexp_extract(value, '^{}=(.*)$', 1) AS DOUBLE)".format
        return f"{number('distance')} DESC NULLS LAST, {number('cosine')} NULLS LAST,"
    if reason == "where" and constants:  # `caption_words=2` is near the 3 in `caption_words BETWEEN 3 AND 60`
        listed = ", ".join(f"{constant!r}::DOUBLE" for constant in constants)
        numbers = f"list_transform(regexp_extract_all(value, '{NUMBER}'), lambda text: TRY_CAST(text AS DOUBLE))"
        near = f"lambda x: list_min(list_transform([{listed}], lambda c: abs(x - c) / greatest(abs(c), 1e-9)))"
        return f"list_min(list_transform({numbers}, {near})) NULLS LAST,"
    return ""


def _constants(step: Mapping[str, Any]) -> list[float]:
    return [float(text) for text in re.findall(rf"(?<![\w.]){NUMBER}", str(step.get("where", "")))][:20]


# --- pictures --------------------------------------------------------------------------------------------------------


def with_pictures(database: duckdb.DuckDBPyConnection, galleries: Sequence[Gallery]) -> list[Gallery]:
    """The galleries with a picture of each sample that lies in a raw shard, and the facts and picture of its twin."""
    samples = [sample for gallery in galleries for sample in gallery.samples]
    twins = _twins(database, {sample.twin for sample in samples if sample.twin})
    pictures = read_pictures(database, {*twins, *(sample.key for sample in samples)})

    def show(sample: Sample) -> Sample:
        caption, url, fate = twins.get(sample.twin or "", (None, None, None))
        return replace(
            sample,
            picture=pictures.get(sample.key),
            twin_picture=pictures.get(sample.twin or ""),
            twin_caption=caption,
            twin_url=url,
            twin_fate=fate,
        )

    return [replace(gallery, samples=[show(sample) for sample in gallery.samples]) for gallery in galleries]


def _twins(
    database: duckdb.DuckDBPyConnection, keys: Iterable[str]
) -> dict[str, tuple[str | None, str | None, str | None]]:
    """By key: caption, url, and the step that dropped it, of the keys that are in the ledger."""
    query = """
        SELECT key, left(caption, 300), left(url, 2001), CASE WHEN NOT kept THEN step END
        FROM ledger WHERE key IN (SELECT unnest(?))
    """
    return {key: (caption, url, fate) for key, caption, url, fate in database.execute(query, [sorted(keys)]).fetchall()}


def read_pictures(database: duckdb.DuckDBPyConnection, keys: Iterable[str]) -> dict[str, str]:
    """By key: the picture as a `data:` URL, of the keys whose image lies in a raw shard and can be read."""
    if not {"image_offset", "image_size"} <= set(columns(database, "raw")):
        return {}
    query = """
        SELECT key, filename, image_offset, image_size FROM raw
        WHERE image_offset IS NOT NULL AND key IN (SELECT unnest(?)) ORDER BY filename, image_offset
    """
    rows = database.execute(query, [sorted(keys)]).fetchall()
    tars = sorted({Path(file).with_suffix(".tar") for _, file, _, _ in rows})
    number = {tar: place for place, tar in enumerate(tars)}
    reader, pictures = MemberReader(tars), {}
    try:
        for key, file, offset, length in rows:
            if small := _read(reader, number[Path(file).with_suffix(".tar")], offset, length):
                pictures[key] = data_url(small)
    finally:
        reader.close()
    return pictures


def _read(reader: MemberReader, tar: int, offset: int, length: int) -> bytes | None:
    try:
        return thumbnail(reader.read(tar, offset, length))
    except (InputError, OSError):  # raw shards that were moved away after packing: a report without their pictures
        return None


def thumbnail(content: bytes, side: int = SIDE) -> bytes | None:
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
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    flat = Image.new("RGB", pixels.size, "white")
    flat.paste(pixels, mask=pixels.getchannel("A"))
    written = io.BytesIO()
    flat.save(written, "JPEG", quality=QUALITY, optimize=True)
    return written.getvalue()


def data_url(jpeg: bytes) -> str:
    """A JPEG as a `data:` URL."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
