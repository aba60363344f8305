"""Token ids of captions, made once: kept in memory that all workers share, for the epochs to come.

A tokenizer takes a twentieth of the time that an image takes, and gives the same each epoch. What it gave stands in a
table with a few places for each hash, so its size is bounded; what finds them taken takes another's. Workers are forked
from the training process and write into the same pages, without a lock: a row counts only if it fits its mark.

Axes: B captions, L tokens, W ways: the places of one hash.
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
_WAYS, _PLACES_PER_CAPTION = 4, 4  # so that of a thousand captions four find all their places taken


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
        num_places = min(_PLACES_PER_CAPTION * self.num_captions, self.max_bytes // (16 + 4 * length))
        num_hashes = max(1, num_places // _WAYS)
        # Anonymous and shared: zeros until written to, seen by every fork, no file, nothing of /dev/shm's 64 MB.
        self._keys, self._marks = (
            np.frombuffer(mmap.mmap(-1, num_hashes * _WAYS * 8), np.int64).reshape(num_hashes, _WAYS) for _ in range(2)
        )
        self._tokens = np.frombuffer(mmap.mmap(-1, num_hashes * _WAYS * length * 4), np.int32)
        self._tokens = self._tokens.reshape(num_hashes, _WAYS, length)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_keys", "_marks", "_tokens")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_table()

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Token ids (B, L), int64, and a hash of each caption's."""
        asked = [content_hash(caption.encode("utf-8", "surrogatepass")) for caption in captions]
        asked_B = np.array(asked)
        row_B = asked_B % len(self._keys)
        places = row_B, self._way(row_B, asked_B)
        # Copies: another process may write while we read, and then the mark does not fit what was read.
        token_BL, marks = self._tokens[places], self._marks[places].tolist()
        said = [content_hash(row.tobytes()) for row in token_BL]
        new = [number for number, mark in enumerate(marks) if mark != asked[number] ^ said[number]]
        if new:
            token_BL[new] = self.tokenizer([captions[number] for number in new]).numpy()
            for number in new:
                said[number] = content_hash(token_BL[number].tobytes())
            taken = tuple(each[new] for each in places)
            self._keys[taken], self._tokens[taken] = asked_B[new], token_BL[new]
            self._marks[taken] = [asked[number] ^ said[number] for number in new]
        return torch.from_numpy(token_BL).long(), said

    def _way(self, row_B: np.ndarray, asked_B: np.ndarray) -> np.ndarray:
        """Where in its row each caption is; or, where it is not, a place that is free; or any."""
        key_BW, own_B = self._keys[row_B], asked_B // len(self._keys) % _WAYS
        found_BW, free_BW = key_BW == asked_B[:, None], key_BW == 0
        # Its own place first: others of this batch come to the same row.
        takes_other_B = free_BW.any(axis=1) & ~np.take_along_axis(free_BW, own_B[:, None], axis=1)[:, 0]
        new_B = np.where(takes_other_B, free_BW.argmax(axis=1), own_B)
        return np.where(found_BW.any(axis=1), found_BW.argmax(axis=1), new_B)
