"""Token ids of captions, made once: kept in memory that all workers share, for the epochs to come.

A tokenizer takes a twentieth of the time that an image takes, and gives the same each epoch. What it gave stands in a
table with one place for each hash, so its size is bounded; two captions of one place take turns. Workers are forked
from the training process and write into the same pages, without a lock: a row counts only if it fits its mark.

Axes: B captions, L tokens.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_BYTES = 256 << 20
_PLACES_PER_CAPTION = 8  # so that sixteen of seventeen captions have a place of their own


def content_hash(content: bytes) -> int:
    """64 bits, signed."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


class CachedTokenizer:
    """A tokenizer that remembers.

    Args:
        tokenizer: captions → int64 token ids (B, L), each by itself and the same each time.
        num_captions: about how many different ones there are.
        max_bytes: of the table; it takes memory only as it fills.
    """

    def __init__(
        self, tokenizer: Callable[[Sequence[str]], Tensor], num_captions: int, max_bytes: int = MAX_BYTES
    ) -> None:
        self.tokenizer, self.num_captions, self.max_bytes = tokenizer, num_captions, max_bytes
        self._make_table()

    def _make_table(self) -> None:
        length = self.tokenizer([""]).shape[1]
        num_places = max(1, min(_PLACES_PER_CAPTION * self.num_captions, self.max_bytes // (8 + 4 * length)))
        # Anonymous and shared: zeros until written to, seen by every fork, no file, nothing of /dev/shm's 64 MB.
        self._marks = np.frombuffer(mmap.mmap(-1, num_places * 8), np.int64)
        self._tokens = np.frombuffer(mmap.mmap(-1, num_places * length * 4), np.int32).reshape(num_places, length)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_marks", "_tokens")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_table()

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Token ids (B, L), int64, and a hash of each caption's."""
        asked = [content_hash(caption.encode("utf-8", "surrogatepass")) for caption in captions]
        places = np.array([hash_ % len(self._marks) for hash_ in asked])
        # Copies: another process may write while we read, and then the mark does not fit what was read.
        token_BL, marks = self._tokens[places], self._marks[places].tolist()
        said = [content_hash(row.tobytes()) for row in token_BL]
        new = [number for number, mark in enumerate(marks) if mark != asked[number] ^ said[number]]
        if new:
            token_BL[new] = self.tokenizer([captions[number] for number in new]).numpy()
            for number in new:
                said[number] = content_hash(token_BL[number].tobytes())
            self._tokens[places[new]] = token_BL[new]
            self._marks[places[new]] = [asked[number] ^ said[number] for number in new]
        return torch.from_numpy(token_BL).long(), said
