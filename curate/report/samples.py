"""The rows that the report shows: a few of each split and of what each step dropped, with small pictures.

Of what a step dropped by a number, those nearest its threshold come first: they are what tells whether the threshold
is right. All else is a seeded random choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from curate.report.tables import Tables
from curate.report.thresholds import NUMBER, met
from curate.report.thumbnails import QUALITY, SIDE, data_url, thumbnail

PAIRS = ("dedup", "decontaminate")
UNSAFE = 0.5  # probability of nsfw from which a picture is blurred


@dataclass(frozen=True)
class Sample:
    """A row of the ledger as it is shown, and its twin where that is a row too.

    `picture` and `twin_picture` are `data:` URLs, or None. `twin_fate` is the later step that dropped the twin; None if
    it is kept. `unsafe`: to be shown blurred.
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
    unsafe: bool = False
    twin_unsafe: bool = False


@dataclass(frozen=True)
class Gallery:
    """Samples of one split (`stage` is "kept") or of what one step dropped; `reason` is the step's first.

    `passed` are kept rows that passed the step, those nearest its threshold first; none where no number decided.
    """

    stage: str
    name: str
    count: int
    reason: str | None
    samples: list[Sample]
    passed: list[Sample] = field(default_factory=list)

    @property
    def pairs(self) -> bool:
        """Whether each sample stands beside a twin."""
        return self.reason in PAIRS

    def at_most(self, number: int) -> Gallery:
        """The same gallery with fewer samples."""
        return replace(self, samples=self.samples[:number], passed=self.passed[:number])


def choose(
    tables: Tables,
    figures: Mapping[str, Any],
    filters: Sequence[dict[str, Any]],
    each: int,
) -> list[Gallery]:
    """The galleries, kept first, then the steps as in the funnel: `each` samples at most, without text and pictures."""
    galleries = [
        Gallery("kept", split, number, None, _rows(tables, "kept AND split = ?", [split], "", each))
        for split, number in figures["splits"].items()
        if number
    ]
    cuts: dict[str, list[Mapping[str, Any]]] = {}
    for drawn in figures["distributions"].values():
        for cut in drawn["what_if"]:
            cuts.setdefault(cut["step"], []).append(cut)
    constants = {str(step.get("name")): _constants(step) for step in filters}
    for step in figures["funnel"]:
        if step["dropped"]:
            place = [step["stage"], step["step"]]
            reason = next(r["reason"] for r in figures["reasons"] if [r["stage"], r["step"]] == place)
            order = _nearest_first(reason, constants.get(step["step"], []))
            rows = _rows(tables, "NOT kept AND stage = ? AND step = ?", place, order, each)
            passed = _passed(tables, filters, cuts.get(step["step"], []), each)
            galleries.append(Gallery(step["stage"], step["step"], step["dropped"], reason, rows, passed))
    return galleries


def _passed(
    tables: Tables, filters: Sequence[Mapping[str, Any]], cuts: Sequence[Mapping[str, Any]], each: int
) -> list[Sample]:
    """Kept rows whose numbers are nearest one of a step's thresholds, which they passed, and that number as value."""
    if not cuts:
        return []
    numbers = ", ".join(f"CAST({cut['expression']} AS DOUBLE)" for cut in cuts)
    listed = ", ".join(f"{cut['value']!r}::DOUBLE" for cut in cuts)
    away = "lambda x, place: abs(x - cuts[place]) / greatest(abs(cuts[place]), 1e-9)"
    query = f"""
        SELECT key, numbers, blurred
        FROM (SELECT key, dice, {unsafe(tables)} AS blurred, [{numbers}] AS numbers, [{listed}] AS cuts FROM rows
            WHERE {met(filters, str(cuts[0]["step"]))})
        WHERE list_min(list_transform(numbers, {away})) IS NOT NULL
        ORDER BY list_min(list_transform(numbers, {away})), dice, key LIMIT {each}
    """
    names = list(dict.fromkeys(cut["expression"] for cut in cuts))
    found = []
    for key, values, blurred in tables.db.execute(query).fetchall():
        by_name = dict(zip((cut["expression"] for cut in cuts), values, strict=True))
        told = ", ".join(f"{short_name(name)}={by_name[name]:.5g}" for name in names if by_name[name] is not None)
        found.append(Sample(key, None, None, None, told, None, unsafe=blurred))
    return found


def short_name(expression: str) -> str:
    """An expression without DuckDB's outer brackets and quotes."""
    return expression.removeprefix("(").removesuffix(")") if expression.startswith("(") else expression


def _rows(tables: Tables, condition: str, values: Sequence[str], order: str, each: int) -> list[Sample]:
    query = f"""
        SELECT key, NULL, NULL, reason, left(value, 300), left(twin, 1000), {unsafe(tables)}
        FROM rows WHERE {condition} ORDER BY {order} dice, key LIMIT {each}
    """
    found = tables.db.execute(query, values).fetchall()
    return [replace(Sample(*told), unsafe=blurred) for *told, blurred in found]


def unsafe(tables: Tables) -> str:
    """SQL of whether a row's picture is to be shown blurred; nothing is where nobody measured it."""
    return f"coalesce(nsfw >= {UNSAFE}, false)" if "nsfw" in tables.columns() else "false"


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


def with_pictures(tables: Tables, galleries: Sequence[Gallery], test_sets: Sequence[str] = ()) -> list[Gallery]:
    """The galleries with URL, caption and picture of each sample, and those of its twin.

    Args:
        tables: of the dataset.
        galleries: what is shown.
        test_sets: the only files and folders that a test image's picture is read from.
    """
    samples = [sample for gallery in galleries for sample in (*gallery.samples, *gallery.passed)]
    twins = _twins(tables, {sample.twin for sample in samples if sample.twin})
    texts = tables.texts({*twins, *(sample.key for sample in samples)}, 2001, 300)
    pictures = read_pictures(tables, texts)

    def show(sample: Sample) -> Sample:
        url, caption = texts.get(sample.key, (None, None))
        twin_url, twin_caption = texts.get(sample.twin or "", (None, None))
        fate, blurred = twins.get(sample.twin or "", (None, False))
        return replace(
            sample,
            url=url,
            caption=caption,
            picture=pictures.get(sample.key),
            twin_picture=pictures.get(sample.twin or "") or test_picture(sample, test_sets),
            twin_caption=twin_caption,
            twin_url=twin_url,
            twin_fate=fate,
            twin_unsafe=blurred,
        )

    return [
        replace(gallery, samples=list(map(show, gallery.samples)), passed=list(map(show, gallery.passed)))
        for gallery in galleries
    ]


def _twins(tables: Tables, keys: Iterable[str]) -> dict[str, tuple[str | None, bool]]:
    """By key: the step that dropped it, and whether it is blurred, of the keys that are in the ledger."""
    query = f"""
        SELECT key, CASE WHEN NOT kept THEN step END, {unsafe(tables)} FROM rows WHERE key IN (SELECT unnest(?))
    """
    return {key: (fate, blurred) for key, fate, blurred in tables.db.execute(query, [sorted(keys)]).fetchall()}


def read_pictures(tables: Tables, keys: Iterable[str], side: int = SIDE, quality: int = QUALITY) -> dict[str, str]:
    """By key: the picture as a `data:` URL, of the keys whose image lies in a raw shard and can be read."""
    if not {"image_offset", "image_size"} <= set(tables.columns("raw")):
        return {}
    query = """
        SELECT key, filename, image_offset, image_size FROM raw
        WHERE image_offset IS NOT NULL AND key IN (SELECT unnest(?)) ORDER BY filename, image_offset
    """
    rows = tables.db.execute(query, [sorted(keys)]).fetchall()
    members = [(key, Path(file), offset, length) for key, file, offset, length in rows]
    return tables.thumbnails.read(members, side, quality)


def test_picture(sample: Sample, test_sets: Sequence[str]) -> str | None:
    """The picture of the test image that a leak hit, where that is a file of the test sets and still there."""
    if sample.reason != "decontaminate" or not sample.twin:
        return None
    try:
        path = Path(sample.twin).resolve()
        allowed = any(path.is_relative_to(Path(named).resolve()) for named in test_sets)
        small = thumbnail(path.read_bytes()) if allowed and path.is_file() else None
    except (OSError, ValueError):
        return None
    return data_url(small) if small else None
