"""Captions packed into rows: web captions have about 15 tokens, and a batch of them is as long as its longest.

Several captions stand one behind the other in a row, each with positions of its own from 0 on, and none sees another:
so hardly a padding token goes through the text tower, however much the lengths differ. It is done where captions may
be trimmed (finetune/trimming.py): under a causal mask, with the embedding read at the end of the text.

What goes where is decided where a batch is made, on the CPU: no device waits for it.

Axes: B captions, L tokens of a caption, R rows, W positions of a row, Q captions of a row, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune.pooling import LastBlock, Queries, has_split_attention
from finetune.trimming import Trim, trim_of

MULTIPLE = 32  # of which rows are: three widths at most for 77 tokens, and all that kernels like


class Packed:
    """Captions in rows. No dataclass: Lightning would look into it for a batch's size, and does not copy frozen ones.

    Args:
        token_RW: token ids; 0 where a row has room left.
        position_RW: place of each token in its caption.
        caption_RW: number of its caption; B where a row has room left.
        query_RQ: place in the row of the end of each caption; rows with fewer captions repeat 0.
        place_B: of each caption's query, into R · Q.
        end_B: of each caption's end, into R · W.
    """

    __slots__ = ("caption_RW", "end_B", "place_B", "position_RW", "query_RQ", "token_RW")

    def __init__(
        self,
        token_RW: Tensor,
        position_RW: Tensor,
        caption_RW: Tensor,
        query_RQ: Tensor,
        place_B: Tensor,
        end_B: Tensor,
    ) -> None:
        self.token_RW, self.position_RW, self.caption_RW = token_RW, position_RW, caption_RW
        self.query_RQ, self.place_B, self.end_B = query_RQ, place_B, end_B

    def to(self, device: Any, **_: Any) -> Packed:
        """The same on another device; nothing waits for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Packed:
        """The same in memory that is copied to a GPU without waiting; the loader asks for it."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        return Packed(**{name: change(getattr(self, name)) for name in self.__slots__})


def rows_of(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Numbers of the captions in each row: longest first, each into the fullest row that has room for it."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(width + 1)]
    for number in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        needed = lengths[number]
        room = next((room for room in range(needed, width + 1) if by_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, width
        else:
            row = by_room[room].pop()
        rows[row].append(number)
        by_room[room - needed].append(row)
    return rows


def pack(token_BL: Tensor, trim: Trim) -> Packed | None:
    """Token ids on the CPU, in rows; None where that would be no fewer tokens than as they are."""
    length_B = trim.lengths(token_BL)
    if not len(length_B):
        return None
    width = -(-int(length_B.max()) // MULTIPLE) * MULTIPLE
    lengths = length_B.tolist()
    rows = rows_of(lengths, width)
    if len(rows) * width >= token_BL.numel():
        return None
    order = np.array([number for row in rows for number in row])
    first = np.concatenate([np.cumsum([0, *(lengths[number] for number in row[:-1])]) for row in rows])
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    most = max(map(len, rows))
    slot = np.concatenate([np.arange(len(row)) for row in rows])
    start_B, place_B = np.empty_like(order), np.empty_like(order)
    start_B[order], place_B[order] = row_of * width + first, row_of * most + slot
    length = np.asarray(lengths)
    caption_T = np.repeat(np.arange(len(length)), length)
    position_T = np.arange(len(caption_T)) - np.repeat(np.cumsum(length) - length, length)
    flat_T = start_B[caption_T] + position_T
    token_RW = torch.zeros(len(rows) * width, dtype=token_BL.dtype)
    position_RW, caption_RW = np.zeros(len(rows) * width, np.int64), np.full(len(rows) * width, len(length))
    token_RW[flat_T] = token_BL[caption_T, position_T]
    position_RW[flat_T], caption_RW[flat_T] = position_T, caption_T
    end_B = start_B + length - 1
    query_RQ = np.zeros(len(rows) * most, np.int64)
    query_RQ[place_B] = end_B % width
    return Packed(
        token_RW.view(len(rows), -1),
        torch.from_numpy(position_RW).view(len(rows), -1),
        torch.from_numpy(caption_RW).view(len(rows), -1),
        torch.from_numpy(query_RQ).view(len(rows), -1),
        torch.from_numpy(place_B),
        torch.from_numpy(end_B),
    )


@dataclass(frozen=True, slots=True)
class Packer:
    """Packs the captions of a batch.

    Attributes:
        trim: knows where they end.
        size: captions that go through the tower at once; None: all.
    """

    trim: Trim
    size: int | None

    def __call__(self, token_BL: Tensor) -> list[Packed] | None:
        """Token ids on the CPU, in rows, `size` captions at a time; None where they are no shorter so."""
        packed = [pack(part, self.trim) for part in token_BL.split(self.size or max(1, len(token_BL)))]
        whole = [part for part in packed if part is not None]
        return whole if len(whole) == len(packed) else None


def packer_of(model: Any, size: int | None = None) -> Packer | None:
    """How captions are packed for an adapted open_clip model; None: not at all."""
    trim = trim_of(model) if _takes_rows(getattr(model, "text", model)) else None
    return Packer(trim, size) if trim else None


def _takes_rows(text: Any) -> bool:
    blocks = getattr(getattr(text, "transformer", None), "resblocks", None)
    return (
        blocks is not None
        and isinstance(blocks[-1], LastBlock)
        and all(hasattr(block, "attn") and has_split_attention(block) for block in blocks)
    )


def encode_packed(model: Any, packed: Packed) -> Tensor:
    """Features (B, D) of packed captions: what `model.encode_text` makes of each."""
    text = getattr(model, "text", model)
    transformer = text.transformer
    kind = transformer.get_cast_dtype()
    x_RWD = text.token_embedding(packed.token_RW).to(kind)
    x_RWD = x_RWD + text.positional_embedding.to(kind)[packed.position_RW]
    sees_RWW = _sees(packed.caption_RW)
    mask_R1WW = _additive(sees_RWW, x_RWD.dtype)
    index_RQW = packed.query_RQ.unsqueeze(-1).expand(-1, -1, sees_RWW.shape[-1])
    queries = Queries(
        packed.query_RQ, _additive(sees_RWW.gather(1, index_RQW), x_RWD.dtype), packed.place_B, packed.end_B
    )
    *blocks, last = transformer.resblocks
    for block in blocks:
        x_RWD = _call(transformer, block, x_RWD, None, None, mask_R1WW)
    pooled_BD = text.ln_final(_call(transformer, last, x_RWD, None, None, None, queries))
    projection = text.text_projection
    if projection is None:
        return pooled_BD
    return projection(pooled_BD) if isinstance(projection, torch.nn.Linear) else pooled_BD @ projection


def _sees(caption_RW: Tensor) -> Tensor:
    """(R, W, W): whether a position sees another, one of its own caption that is not behind it."""
    same_RWW = caption_RW.unsqueeze(2) == caption_RW.unsqueeze(1)
    return same_RWW.tril()


def _additive(sees_RQW: Tensor, kind: torch.dtype) -> Tensor:
    mask = torch.zeros(sees_RQW.shape, dtype=kind, device=sees_RQW.device)
    return mask.masked_fill_(~sees_RQW, -torch.inf).unsqueeze(1)


def _call(transformer: Any, block: Any, *given: Any) -> Tensor:
    """A block; computed again for the gradient where the tower is configured so."""
    if transformer.grad_checkpointing and torch.is_grad_enabled():
        again: Tensor = checkpoint(block, *given, use_reentrant=False)
        return again
    once: Tensor = block(*given)
    return once
