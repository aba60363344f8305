"""Samples of an index, read, decoded and augmented into whole batches.

All that is drawn is seeded by (seed, pass, sample), so that nothing depends on how many processes read.

Axes: B samples, H W pixels, L tokens, D width, G ids per sample.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from curate.errors import CliptailorError, InputError
from curate.index import Facts, MemberReader, SampleIndex
from finetune.captions import CachedTokenizer, content_hash
from finetune.features import UNREAD, Features
from finetune.packing import Packer
from finetune.pixels import UNREADABLE, EvaluationView, TrainingView
from finetune.schedule import Draw
from finetune.sources import drawn_caption
from finetune.trimming import Trim

Batch = dict[str, Any]
"""pixels (B, 3, H, W), uint8, or float32 if normalised; tokens (B, L) int64; group (B, G) int64, for
`losses.positives`; row (B,) of the index; packed: the captions in rows (finetune/packing.py), where that is shorter.
In place of pixels, or of tokens, image or text (B, D), the embeddings of a locked tower (finetune/features.py)."""

# The stream of random numbers of what stands in for a sample is apart from those of its crop and caption.
_OF_STAND_INS = 3
_ATTEMPTS = 20  # to find one that can be read


class Broken(NamedTuple):
    """A sample that could not be read, and why: names its file and key."""

    row: int
    reason: str


class Read(NamedTuple):
    """A batch, or what one tower sees of it with its ids, and the samples that should have been in it."""

    batch: Any
    broken: list[Broken]


def _stacked(pixels: Sequence[Tensor]) -> Tensor:
    """(B, 3, H, W), with the channels last in memory where they are last in what is stacked."""
    if pixels[0].is_contiguous():
        return torch.stack([*pixels])
    return torch.stack([each.permute(1, 2, 0) for each in pixels]).permute(0, 3, 1, 2)


@dataclass
class PairDataset(Dataset[Read]):
    """Whole batches by `Draw`s.

    For a sample that cannot be read another of its source stands in, chosen by (seed, pass, row): batches keep their
    size, which ranks must have in common, and are the same in every process and after a resume.
    """

    index: SampleIndex
    view: TrainingView | EvaluationView
    tokenizer: Callable[[Sequence[str]], Tensor]
    seed: int = 0
    templates: Sequence[Sequence[str]] = ()
    """Of each source: for captions that are labels."""
    trim: Trim | None = None
    """What cuts captions behind their ends."""
    pack: Packer | None = None
    """What puts captions into rows."""
    cached: Features | None = None
    """Embeddings of a locked tower, in place of what it would see."""
    reader: MemberReader = field(init=False)
    named: set[int] = field(init=False, default_factory=set)
    """Rows of broken samples that have been told of."""

    def __post_init__(self) -> None:
        self.reader = MemberReader(self.index.tars)
        self._facts, self._sources = Facts(self.index, self.reader), self.index.table["source"]
        phrasings = max((len(each) for each in self.templates), default=0) or 1
        self._tokenize = CachedTokenizer(self.tokenizer, len(self.index) * phrasings)
        # Where each source begins, and the last ends: their rows lie side by side.
        runs = pc.run_end_encode(self._sources.combine_chunks())
        self._borders = np.concatenate([[0], runs.run_ends.to_numpy()])

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, draws: Sequence[Draw]) -> Read | CliptailorError:
        """The batch of these samples; an error if nothing readable stands in for one, or a file cannot be fetched."""
        broken: list[Broken] = []
        try:
            read, images, shown = self.images(draws, broken)
            texts, said = self.texts(read)
        except CliptailorError as error:
            return error
        rows = [draw.row for draw in read]
        group = torch.tensor([*zip(said, map(self._duplicates, rows), shown, strict=True)])
        return Read({**images, **texts, "group": group, "row": torch.tensor(rows)}, broken)

    def images(self, draws: Sequence[Draw], broken: list[Broken]) -> tuple[list[Draw], Batch, list[int]]:
        """These samples or those that stand in for them, what the CLIP sees of them, and an id of each stored image.

        Args:
            draws: the samples.
            broken: gets those that cannot be read.

        Raises:
            InputError: nothing readable is found to stand in for one.
        """
        read, seen, ids = zip(*(self._readable(draw, broken) for draw in draws), strict=True)
        return list(read), {"image" if self.keeps("image") else "pixels": _stacked(seen)}, list(ids)

    def texts(self, draws: Sequence[Draw]) -> tuple[Batch, list[int]]:
        """What is said of samples, and an id of each text, as the text tower reads it."""
        if self.cached and self.keeps("text"):
            embeddings, ids = self.cached.read([draw.row for draw in draws])
            return {"text": embeddings}, ids
        tokens, said = self._tokenize([self._caption(draw) for draw in draws])
        seen = self.trim(tokens) if self.trim else tokens
        packed = self.pack(seen) if self.pack else None
        return {"tokens": seen} | ({"packed": packed} if packed else {}), said

    def keeps(self, tower: str) -> bool:
        """Whether the embeddings of a tower are read, and not what it would see."""
        return self.cached is not None and self.cached.tower == tower

    def _caption(self, draw: Draw) -> str:
        source = self._sources[draw.row].as_py()
        templates = self.templates[source] if source is not None and self.templates else ()
        return drawn_caption(self._facts.captions(draw.row), templates, (self.seed, draw.turn, draw.row))

    def _readable(self, draw: Draw, broken: list[Broken]) -> tuple[Draw, Tensor, int]:
        """This sample or one that stands in for it, what is seen of it and the id of its image; adds what is broken."""
        stand_ins = (self._stand_in(draw, attempt) for attempt in range(_ATTEMPTS))
        for row in itertools.chain([draw.row], stand_ins):
            stand_in = Draw(row, draw.turn)
            found = self._kept(stand_in) if self.keeps("image") else self._pixels(stand_in)
            if not isinstance(found, Broken):
                return stand_in, *found
            broken.append(found)
        raise InputError(f"{broken[-1].reason}; nor can any other of {_ATTEMPTS}; build or copy the dataset again")

    def _stand_in(self, draw: Draw, attempt: int) -> int:
        """Any row of the same source."""
        source = int(np.searchsorted(self._borders, draw.row, side="right"))
        random = np.random.default_rng((self.seed, draw.turn, draw.row, _OF_STAND_INS, attempt))
        return int(random.integers(*self._borders[source - 1 : source + 1]))

    def _pixels(self, draw: Draw) -> tuple[Tensor, int] | Broken:
        """What the CLIP sees, and an id of the stored image: one that is there twice is a positive of both captions."""
        tar, offset, size = self._facts.place(draw.row)
        try:
            content = self.reader.read(tar, offset, size)
            pixels = self.view(content, (self.seed, draw.turn, draw.row))
        except (*UNREADABLE, InputError) as error:
            # PIL's own words for bytes of no format are the address of our buffer.
            why = "of no known format" if isinstance(error, UnidentifiedImageError) else error
            sample = f"{self.index.tars[tar]}: sample {self._facts.key(draw.row)}"
            return Broken(draw.row, f"{sample}: the image cannot be decoded ({why})")
        return pixels, len(content) << 32 | zlib.crc32(content)

    def _kept(self, draw: Draw) -> tuple[Tensor, int] | Broken:
        """Its embedding in place of its pixels."""
        assert self.cached is not None
        embedding, (image,) = self.cached.read([draw.row])
        if image == UNREAD:
            tar, _, _ = self._facts.place(draw.row)
            return Broken(draw.row, f"{self.index.tars[tar]}: sample {self._facts.key(draw.row)} could not be decoded")
        return embedding[0], image

    def _duplicates(self, row: int) -> int:
        """An id of the duplicates that a sample belongs to."""
        return content_hash((self._facts.group(row) or f"row {row}").encode())


@dataclass
class OneTower(Dataset[Any]):
    """What one tower sees of samples, and their ids."""

    dataset: PairDataset
    tower: str

    @property
    def named(self) -> set[int]:
        """As the dataset's."""
        return self.dataset.named

    def __getitems__(self, draws: Sequence[Draw]) -> Read | CliptailorError:
        broken: list[Broken] = []
        try:
            if self.tower == "text":
                return Read(self.dataset.texts(draws), [])
            read, images, ids = self.dataset.images(draws, broken)
        except CliptailorError as error:
            return error
        # What stands in for a sample is drawn anew each time: of one that cannot be read that alone is kept.
        kept = [image if draw == other else UNREAD for draw, other, image in zip(draws, read, ids, strict=True)]
        return Read((images, kept), broken)

    def __len__(self) -> int:
        return len(self.dataset)
