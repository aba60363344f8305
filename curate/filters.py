"""The filter list of a configuration, read into typed steps. What the steps do is in `curate.select`.

filters:
  - {name: caption_length, where: "caption_words BETWEEN 3 AND 60"}
  - {name: exact,          dedup: {by: sha256}}
  - {name: near,           dedup: {by: phash, distance: 6, keep: "width * height DESC"}}
  - {name: leak,           decontaminate: {against: my_test_images/, distance: 6, similarity: 0.95}}
  - {name: on_topic,       relevance: {prompts: ["a satellite photo of {}"], images: examples/, keep: 0.4}}
  - {name: aligned,        top: {by: clip_score, fraction: 0.3}}
  - {name: balanced,       balance: {concepts: concepts.txt, cap: 20000}}
  - {name: small,          sample: {count: 100000, per: language}}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from curate.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Where:
    """Keep the rows for which a DuckDB expression over the columns is true; `where: EXPRESSION` in the file."""

    name: str
    expression: str


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Keep one row of each group of duplicates.

    by: `sha256`, any column, or a list of columns (equal values); `phash` (Hamming distance up to `distance` of 64
    bits); or `embedding` (cosine of CLIP's image embeddings from `similarity`).
    keep: an ORDER BY; the first row of it stays. Ties go to the smaller key.
    """

    name: str
    by: str | list[str] = "sha256"
    distance: int = 0
    similarity: float | None = None
    keep: str = "width * height DESC"

    @property
    def columns(self) -> list[str]:
        """The columns whose equal values make duplicates; none for `embedding`."""
        by = [self.by] if isinstance(self.by, str) else list(self.by)
        return [] if by == ["embedding"] else by


@dataclass(frozen=True, kw_only=True)
class Decontaminate:
    """Drop rows whose image is one of a test set's, or nearly is.

    The same: sha256, or phash up to `distance`. Nearly: CLIP cosine from `similarity`.
    against: image folders, files or datasets. similarity: null leaves embeddings out.
    """

    name: str
    against: list[str]
    distance: int = 4
    similarity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Relevance:
    """Keep the rows whose image is nearest the prompts and example images.

    score = greatest cosine to a prompt − mean cosine to `against`; or greatest cosine to an example image; with both,
    the mean of the two.
    concepts: what `{}` in a prompt stands for, each in turn: a list, or a file with one a line.
    keep: share of the rows that are still there to keep; threshold: least score; exactly one of the two.
    """

    name: str
    prompts: list[str] = field(default_factory=list)
    concepts: str | list[str] | None = None
    images: str | None = None
    against: list[str] = field(default_factory=lambda: ["a photo.", "a picture of something.", "text."])
    keep: float | None = None
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class Top:
    """Keep the best rows by a column or expression: `fraction` of those still there, or `count` of them.

    per: a column or expression; the best are chosen among the rows of each of its values.
    """

    name: str
    by: str
    fraction: float | None = None
    count: int | None = None
    per: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Keep a seeded random `fraction`, or `count`, of the rows still there.

    per: a column or expression; the fraction is of the rows of each of its values; the count is spread evenly over its
    values, and one with fewer rows gives all it has.
    """

    name: str
    fraction: float | None = None
    count: int | None = None
    per: str | None = None


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Keep the pairs whose captions hold a concept of a list, fewer of the frequent ones.

    concepts: a list, a file with one a line, or `mined`: from the captions that are still there.
    cap: pairs a concept.
    method: wit (up to `cap` pairs of each concept are taken) or metaclip (each is taken with probability cap / count).
    match: words, or substring: `cat` is in `location` too.
    min_count: captions that a mined concept must stand in.
    """

    name: str
    concepts: str | list[str]
    cap: int = 20_000
    method: str = "wit"
    match: str = "words"
    min_count: int = 100


Step = Where | Dedup | Decontaminate | Relevance | Top | Sample | Balance
KINDS: dict[str, type[Step]] = {
    "where": Where,
    "dedup": Dedup,
    "decontaminate": Decontaminate,
    "relevance": Relevance,
    "top": Top,
    "sample": Sample,
    "balance": Balance,
}
# Of each key that takes one of a few words: which.
CHOICES = {"method": ("wit", "metaclip"), "match": ("words", "substring")}


def parse_steps(filters: Sequence[dict[str, Any]]) -> list[Step]:
    """Read the filter list.

    Raises:
        ConfigError: names the step, the key, and what was expected.
    """
    steps = [_parse_step(number, dict(entry)) for number, entry in enumerate(filters)]
    names = [step.name for step in steps]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"filters: two steps are named '{twice[0]}'; the ledger tells them apart by name")
    return steps


def _parse_step(number: int, entry: dict[str, Any]) -> Step:
    where = f"filters[{number}]"
    name = entry.pop("name", None)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: needs a name, such as 'name: caption_length'")
    where = f"{where} '{name}'"
    if len(entry) != 1:
        raise ConfigError(f"{where}: expected exactly one of {', '.join(KINDS)}, got {', '.join(entry) or 'nothing'}")
    kind, value = entry.popitem()
    if kind not in KINDS:
        raise ConfigError(f"{where}: '{kind}' is not a kind of filter.{did_you_mean(kind, KINDS)}")
    if kind == "where":
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f'{where}: where needs an expression, such as "width >= 200"')
        return Where(name=name, expression=value)
    return _parse_operator(where, name, kind, value)


def _parse_operator(where: str, name: str, kind: str, value: Any) -> Step:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {kind} needs keys, such as {{{', '.join(_keys(kind))}}}")
    if unknown := [key for key in value if key not in _keys(kind)]:
        raise ConfigError(f"{where}: {kind} has no key '{unknown[0]}'.{did_you_mean(unknown[0], _keys(kind))}")
    for key in ("against", "prompts"):
        if isinstance(value.get(key), str):
            value = {**value, key: [value[key]]}
    required = [
        f.name
        for f in fields(KINDS[kind])
        if f.default is MISSING and f.default_factory is MISSING and f.name != "name"
    ]
    if absent := [key for key in required if key not in value]:
        raise ConfigError(f"{where}: {kind} needs the key '{absent[0]}'")
    step = KINDS[kind](name=name, **value)
    _check(where, step)
    return step


def _keys(kind: str) -> list[str]:
    return [f.name for f in fields(KINDS[kind]) if f.name != "name"]


def _check(where: str, step: Step) -> None:
    _check_values(where, step)
    if isinstance(step, Top | Sample):
        _one_of(where, {"fraction": step.fraction, "count": step.count})
    if isinstance(step, Relevance):
        _one_of(where, {"keep": step.keep, "threshold": step.threshold})
        if not step.prompts and not step.images:
            raise ConfigError(f"{where}: relevance needs prompts, or images: a folder of examples, or both")
        _check_template(where, step)
    if isinstance(step, Balance) and step.concepts != "mined" and step.min_count != Balance.min_count:
        raise ConfigError(f"{where}: min_count goes with 'concepts: mined'")
    distance = getattr(step, "distance", 0)
    if not isinstance(distance, int) or not 0 <= distance <= 64:
        raise ConfigError(f"{where}: distance expected 0 to 64 bits, got {distance}")
    if isinstance(step, Dedup):
        _check_dedup(where, step)


def _check_dedup(where: str, step: Dedup) -> None:
    by = step.by
    if isinstance(by, list) and not (by and all(isinstance(name, str) for name in by)):
        raise ConfigError(f"{where}: by expected a column, or a list of columns such as [url_host, caption]")
    if isinstance(by, list) and (special := {"phash", "embedding"}.intersection(by)) and len(by) > 1:
        raise ConfigError(f"{where}: '{min(special)}' goes alone; two dedup steps, one after the other, do both")
    if step.distance and step.columns != ["phash"]:
        raise ConfigError(f"{where}: distance goes with 'by: phash'; equal values of {by} have none")
    if (by in ("embedding", ["embedding"])) != (step.similarity is not None):
        raise ConfigError(f"{where}: 'by: embedding' and 'similarity: 0.95' go together")
    if step.similarity is not None and not 0 < step.similarity <= 1:
        raise ConfigError(f"{where}: similarity expected a cosine above 0 and up to 1, got {step.similarity}")


def _check_values(where: str, step: Step) -> None:
    """Check the keys whose values are of one kind wherever they stand; null is none."""
    for key, value in vars(step).items():
        if value is None:
            continue
        share = key == "fraction" or (key == "keep" and isinstance(step, Relevance))
        if share and not (isinstance(value, int | float) and 0 < value <= 1):
            raise ConfigError(f"{where}: {key} expected a share above 0 and up to 1, got {value!r}")
        if key in ("count", "cap", "min_count") and (type(value) is not int or value < 1):
            raise ConfigError(f"{where}: {key} expected a whole number from 1 on, got {value!r}")
        if key in ("by", "per") and isinstance(step, Top | Sample) and not isinstance(value, str):
            raise ConfigError(f"{where}: {key} expected a column or an expression, got {value!r}")
        if key in CHOICES and value not in CHOICES[key]:
            near = did_you_mean(str(value), CHOICES[key])
            raise ConfigError(f"{where}: {key} expected {' or '.join(CHOICES[key])}, got {value!r}.{near}")
        if key == "concepts" and not _is_text_or_texts(value):
            raise ConfigError(f"{where}: concepts expected a file, or a list of words and terms, got {value!r}")


def _check_template(where: str, step: Relevance) -> None:
    if step.concepts is not None and not any("{}" in prompt for prompt in step.prompts):
        raise ConfigError(f"{where}: concepts go into prompts with {{}}, such as 'a photo of a {{}}.'; none has one")


def _is_text_or_texts(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, str) and bool(value)


def _one_of(where: str, choices: dict[str, Any]) -> None:
    if sum(value is not None for value in choices.values()) != 1:
        raise ConfigError(f"{where}: needs exactly one of {' and '.join(choices)}")
