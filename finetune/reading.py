"""Samples of an index, read, decoded and augmented into whole batches.

All that is drawn is seeded by (seed, pass, sample), so that nothing depends on how many processes read.

Axes: B samples, H W pixels, L tokens, D width, G ids per sample.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from curate.errors import CliptailorError, InputError
from curate.index import Facts, MemberReader, SampleIndex
from curate.remote import far
from finetune.captions import CachedTokenizer, content_hash
from finetune.features import UNREAD, Features
from finetune.images import UNREADABLE
from finetune.packing import Packer
from finetune.pixels import EvaluationView, Pixels, TrainingView, shared_room
from finetune.schedule import Draw
from finetune.sources import drawn_caption
from finetune.trimming import Trim
from finetune.windows import run_borders

Batch = dict[str, Any]
"""pixels (B, 3, H, W), uint8, or float32 if normalised; tokens (B, L) int64; group (B, G) int64, for
`losses.positives`; row (B,) of the index; packed: the captions in rows (finetune/packing.py), where that is shorter.
In place of pixels, or of tokens, image or text (B, D), the embeddings of a locked tower (finetune/features.py)."""

# The stream of random numbers of what stands in for a sample is apart from those of its crop and caption.
_OF_STAND_INS = 3
_ATTEMPTS, _IN_ITS_TAR = 20, 10  # to find one that can be read; the first of them in a tar far away that is here
_AT_ONCE = 64  # images whose files are in memory at a time
_WHOLE, _HASHED = 16 << 10, 16  # of larger files one byte of so many makes the id: compressed, they differ all over


class Broken(NamedTuple):
    """A sample that could not be read, and why: names its file and key."""

    row: int
    reason: str


class Read(NamedTuple):
    """A batch, or what one tower sees of it with its ids, and the samples that should have been in it."""

    batch: Any
    broken: list[Broken]


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

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, draws: Sequence[Draw]) -> Read | CliptailorError:
        """The batch of these samples; an error if nothing readable stands in for one, or a file cannot be fetched."""
        broken: list[Broken] = []
        try:
            read, images, shown = self.images(draws, broken)
            texts, said = self.texts(read)
            rows = [draw.row for draw in read]
            group = torch.tensor([*zip(said, map(self._duplicates, rows), shown, strict=True)])
        except CliptailorError as error:
            return error
        return Read({**images, **texts, "group": group, "row": torch.tensor(rows)}, broken)

    def images(self, draws: Sequence[Draw], broken: list[Broken]) -> tuple[list[Draw], Batch, list[int]]:
        """These samples or those that stand in for them, what the CLIP sees of them, and an id of each stored image.

        Args:
            draws: the samples.
            broken: gets those that cannot be read.

        Raises:
            InputError: nothing readable is found to stand in for one.
        """
        kept = self.cached if self.keeps("image") else None
        room = shared_room((len(draws), kept.width), torch.float32) if kept else self.view.room(len(draws))
        read: list[Draw] = []
        ids: list[int] = []
        for start in range(0, len(draws), _AT_ONCE):
            some, slots = draws[start : start + _AT_ONCE], room[start : start + _AT_ONCE]
            for draw, slot, found in zip(some, slots, self._seen(some, slots), strict=True):
                other, image = self._stand_in(draw, slot, found, broken) if isinstance(found, Broken) else (draw, found)
                read.append(other)
                ids.append(image)
        return read, {"image" if kept else "pixels": room}, ids

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

    def _stand_in(self, draw: Draw, slot: Tensor, found: Broken, broken: list[Broken]) -> tuple[Draw, int]:
        """Any sample of the same source that can be read, and the id of its image; if need not, no other tar's."""
        is_far = far(self.index.tars[self._facts.place(draw.row)[0]]) is not None
        for attempt in range(_ATTEMPTS):
            broken.append(found)
            random = np.random.default_rng((self.seed, draw.turn, draw.row, _OF_STAND_INS, attempt))
            borders = self._tars_at if is_far and attempt < _IN_ITS_TAR else self._sources_at
            number = int(np.searchsorted(borders, draw.row, side="right"))
            other = Draw(int(random.integers(*borders[number - 1 : number + 1])), draw.turn)
            (seen,) = self._seen([other], slot[None])
            if not isinstance(seen, Broken):
                return other, seen
            found = seen
        broken.append(found)
        raise InputError(f"{found.reason}; nor can any other of {_ATTEMPTS}; build or copy the dataset again")

    # Looked for when the first sample cannot be read: most datasets have none, and may have a hundred million rows.

    @cached_property
    def _sources_at(self) -> np.ndarray:
        return run_borders(self._sources)

    @cached_property
    def _tars_at(self) -> np.ndarray:
        return run_borders(self.index.table["tar"])

    def _seen(self, draws: Sequence[Draw], room: Tensor) -> list[int | Broken]:
        """Put what the CLIP sees of each into its place of `room`; an id of each stored image, or why there is none.

        An image that is there twice has one id: it is a positive of both captions.
        """
        if self.cached and self.keeps("image"):
            embeddings, ids = self.cached.read([draw.row for draw in draws])
            room.copy_(embeddings)
            return [
                self._damaged(draw) or (self._broken(draw) if id_ == UNREAD else id_)
                for draw, id_ in zip(draws, ids, strict=True)
            ]
        # All are opened before the first is decoded: in turn, the decoder and Python would drive each other's code and
        # tables out of the processor's caches, which takes a twentieth of the decoder's time.
        contents = [self._content(draw) for draw in draws]
        views = [self._prepared(*each) for each in zip(draws, contents, strict=True)]
        return [self._decoded(*each) for each in zip(draws, views, room, strict=True)]

    def _content(self, draw: Draw) -> bytes | Broken:
        try:
            return self._damaged(draw) or self.reader.read(*self._facts.place(draw.row))
        except (OSError, InputError) as error:
            return self._broken(draw, error)

    def _damaged(self, draw: Draw) -> Broken | None:
        """That what is said of it cannot be read, if it lies in its tar and cannot."""
        try:
            self._facts.check(draw.row)
        except (OSError, InputError) as error:
            return Broken(draw.row, str(error))
        return None

    def _prepared(self, draw: Draw, content: bytes | Broken) -> tuple[Pixels, int] | Broken:
        """What writes its pixels, and the id of its image."""
        if isinstance(content, Broken):
            return content
        image = len(content) << 32 | zlib.crc32(content if len(content) < _WHOLE else content[::_HASHED])
        return self.view.prepare(content, (self.seed, draw.turn, draw.row)), image

    def _decoded(self, draw: Draw, view: tuple[Pixels, int] | Broken, slot: Tensor) -> int | Broken:
        if isinstance(view, Broken):
            return view
        pixels, image = view
        try:
            pixels(slot)
        except UNREADABLE as error:
            return self._broken(draw, error)
        return image

    def _broken(self, draw: Draw, error: Exception | None = None) -> Broken:
        tar, _, _ = self._facts.place(draw.row)
        # PIL's own words for bytes of no format are the address of our buffer.
        why = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        reason = f"the image cannot be decoded{f' ({why})' if why else ''}"
        return Broken(draw.row, f"{self.index.tars[tar]}: sample {self._facts.key(draw.row)}: {reason}")

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
