"""The sources of training pairs as one index, and what is said of a sample each time it is drawn.

Reading is `curate.pairs`'s; here sources are put one after the other, captions chosen and put into templates, and
captions counted that are longer than the text tower's context.

A sample with several captions, or a label with several templates, gets one of them each time it is drawn: a pure
function of (seed, pass, row), as everything of a sample is, so that workers, ranks and a resumed run agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from curate.errors import InputError
from curate.files import fingerprint
from curate.index import Facts, MemberReader, SampleIndex
from curate.pairs import Wanted, read_pairs
from curate.remote import far
from curate.shards import shard_folder
from finetune.config import DataConfig, SourceConfig
from finetune.labelled import class_name
from finetune.prompts import prompts
from finetune.schedule import Passes

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

# A caption's stream of random numbers is apart from that of its image's crop, which has three seeds.
_OF_CAPTIONS = 1
_COUNTED = 2_000
_TOKENIZED_AT_ONCE = 1_000


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """All sources together.

    Attributes:
        index: the rows of the sources, one source after the other; column `source` is the number of each row's.
        passes: size and weight of each source.
        templates: of each source; none where captions are captions.
    """

    index: SampleIndex
    passes: tuple[Passes, ...]
    templates: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class CaptionLengths:
    """How many of `counted` captions do not fit into the `context_length` tokens of the text tower, and are cut."""

    counted: int
    too_long: int
    context_length: int

    def __str__(self) -> str:
        share = self.too_long / self.counted if self.counted else 0.0
        return f"{self.too_long:,} of {self.counted:,} captions ({share:.1%}) are over {self.context_length} tokens"


def training_set(config: DataConfig) -> TrainingSet:
    """Read all sources.

    Raises:
        ConfigError: a source's keys do not fit it.
        InputError: a source that cannot be read, or has no pair (left).
    """
    sources = config.trained_on
    indices = [read_source(source, config.source_key(number), number) for number, source in enumerate(sources)]
    whole = indices[0]
    for index in indices[1:]:
        whole = concatenate(whole, index)
    passes = tuple(Passes(len(index), source.weight) for index, source in zip(indices, sources, strict=True))
    return TrainingSet(whole, passes, tuple(tuple(source.templates) for source in sources))


def read_source(source: SourceConfig, key: str, number: int = 0) -> SampleIndex:
    """The training pairs of one source, with a column `source`.

    Args:
        source: which.
        key: what it is called in the configuration.
        number: of the source.

    Raises:
        ConfigError: a key that does not fit it.
        InputError: it cannot be read, has no pair (left), no caption at all, or a sample without the label that its
            templates need.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = Wanted(key, source.where, source.image, source.caption, is_labelled=bool(source.templates))
    index = read_pairs(source.path, wanted)
    if not len(index):
        why = f"no row for which {source.where}" if source.where else "no image"
        raise InputError(f"{key}: {source.path}: {why}; nothing to train on")
    if pa.types.is_null(index.table["captions"].type):  # so many that they stay in the tars
        return _marked(index, source.path, number, labelled=False)
    without = pc.equal(pc.list_value_length(index.table["captions"]), 0)
    bare = pc.sum(without).as_py()
    if bare == len(index) or (bare and source.templates):
        sample = index.table["key"].filter(without)[0].as_py()
        what = "no label for the templates" if source.templates else "no caption, nor has any other"
        raise InputError(f"{key}: {source.path}: sample {sample} has {what}")
    return _marked(index, source.path, number, labelled=bool(source.templates))


def split_pairs(dataset: Path, split: str) -> SampleIndex:
    """The pairs of a split of a dataset, which belong to no source of the configuration."""
    return _marked(read_pairs(dataset, Wanted("data.dataset"), split), dataset, None, labelled=False)


def _marked(index: SampleIndex, path: Path, number: int | None, *, labelled: bool) -> SampleIndex:
    """With the number of its source, and groups that are unique over sources; equal labels are one group in all."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = index.table
    if labelled:
        labels = pc.utf8_lower(pc.list_element(table["captions"], 0))
        groups = pc.binary_join_element_wise("label", labels, ":")
    else:
        groups = table["duplicate_group"]
        if not pa.types.is_null(groups.type):
            groups = pc.binary_join_element_wise(str(shard_folder(path)), groups, ":")
    place = table.schema.get_field_index("duplicate_group")
    table = table.set_column(place, "duplicate_group", groups)
    return SampleIndex(index.tars, table.append_column("source", pa.repeat(pa.scalar(number, pa.int32()), len(index))))


def concatenate(first: SampleIndex, second: SampleIndex) -> SampleIndex:
    """One index over both, the rows of `second` after those of `first`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    shifted = pc.add(second.table["tar"], pa.scalar(len(first.tars), second.table["tar"].type))
    table = second.table.set_column(second.table.schema.get_field_index("tar"), "tar", shifted)
    return SampleIndex(first.tars + second.tars, pa.concat_tables([first.table, table], promote_options="permissive"))


def drawn_caption(captions: Sequence[str], templates: Sequence[str], seed: Sequence[int]) -> str:
    """What is said of a sample this time: one of its captions, in one of the templates.

    Args:
        captions: of the sample; none is the empty text.
        templates: with a `{}` each, for captions that are labels; none: the caption as it is.
        seed: (seed, pass, row); equal seeds, equal text.
    """
    if len(captions) < 2 and len(templates) < 2:
        caption, template = (captions[0] if captions else ""), (templates[0] if templates else None)
    else:
        random = np.random.default_rng((*seed, _OF_CAPTIONS))
        caption = captions[int(random.integers(len(captions)))] if captions else ""
        template = templates[int(random.integers(len(templates)))] if templates else None
    return prompts(class_name(caption), [template])[0] if template else caption


def caption_lengths(found: TrainingSet, tokenizer: Callable[..., Tensor], seed: int) -> CaptionLengths:
    """Count the captions that the context cuts: of all, or of a seeded sample of 2,000 samples.

    Tokenizers cut without a word. One that had room for one token more shows what it did: a text that fits comes out
    the same with one more token of padding, a text that was cut does not.
    """
    rows = _counted_among(found.index)
    if len(rows) > _COUNTED:
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), _COUNTED, replace=False))
        rows = [int(rows[number]) for number in chosen]
    facts, sources = Facts(found.index, MemberReader(found.index.tars)), found.index.table["source"]
    texts = [
        text
        for row in rows
        for caption in _said(facts, row)
        for text in _phrased(caption, found.templates[sources[row].as_py()])
    ]
    empty_L = tokenizer([""])[0]
    context, padding = len(empty_L), empty_L[-1]
    too_long = 0
    for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
        some = texts[start : start + _TOKENIZED_AT_ONCE]
        cut_BL, roomier_BM = tokenizer(some), tokenizer(some, context_length=context + 1)
        fits_B = (cut_BL == roomier_BM[:, :context]).all(dim=1) & (roomier_BM[:, context] == padding)
        too_long += int((~fits_B).sum())
    return CaptionLengths(len(texts), too_long, context)


def _counted_among(index: SampleIndex) -> Sequence[int]:
    """All samples; of those whose captions stay in tars far away, one tar's: `curate build` has shuffled them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    away = [number for number, tar in enumerate(index.tars) if far(tar)]
    if not away:
        return range(len(index))
    tars = index.table["tar"]
    unread = pc.and_(pc.is_null(index.table["captions"]), pc.is_in(tars, pa.array(away, tars.type)))
    first = pc.index(unread, True).as_py()
    if first < 0:
        return range(len(index))
    counted: Sequence[int] = pc.indices_nonzero(pc.or_(pc.invert(unread), pc.equal(tars, tars[first]))).to_pylist()
    return counted


def _said(facts: Facts, row: int) -> list[str]:
    """Its captions; none, where they are damaged, which costs the sample when it is trained on."""
    try:
        return facts.captions(row)
    except InputError:
        return []


def _phrased(caption: str, templates: Sequence[str]) -> list[str]:
    return prompts(class_name(caption), templates) if templates else [caption]


def sources_fingerprint(config: DataConfig) -> str:
    """Changes with the pairs, weights and templates of the sources; not with where they lie."""
    found = training_set(config)
    sizes = [(passes.num_samples, passes.weight) for passes in found.passes]
    return fingerprint(_content(found.index.table), sizes, found.templates)


def _content(table: pa.Table) -> str:
    """A hash of what is in the rows: captions, duplicates, and where in its file each image lies."""
    digest = hashlib.blake2b(digest_size=16)
    columns = ["key", "captions", "duplicate_group", "image_offset", "image_size"]
    for batch in table.select(columns).to_batches(max_chunksize=10_000):
        digest.update(repr(batch.to_pylist()).encode())
    return digest.hexdigest()
