"""What every filter step works on: the rows in a locked database, and the embeddings beside them.

Table `rows` has a line for each fetched candidate; `drops` one for each that is out, with the step, reason and value;
view `alive` is the rest. A step reads `alive` and adds to `drops`; so the first step that drops a row is the one the
ledger names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from curate.config import ClipConfig
from curate.database import column_types
from curate.errors import InputError, ModelError
from curate.files import read_rows

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from curate.clip import Clip

# Names and digests of images.
Identity = list[tuple[str, str]]


@dataclass
class Selection:
    """The state of one selection.

    Attributes:
        db: with `rows`, `drops` and `alive`.
        signals: the files with the embeddings, none if no CLIP measured.
        clip: the CLIP that made them.
        seed: of every random choice.
        known: folder of what was found out about the user's own images and texts (`known`).
        weights: the CLIP's fingerprint; None if no step embeds.
        identities: by path, what a change of the user's images there changes.
        asked: the files of `known` that a step asked for.
    """

    db: duckdb.DuckDBPyConnection
    signals: list[Path]
    clip: ClipConfig | None
    seed: int
    known: Path
    weights: str | None = None
    identities: dict[str, Identity] = field(default_factory=dict)
    asked: set[Path] = field(default_factory=set)

    @property
    def columns(self) -> list[str]:
        """Names that an expression may use."""
        return list(column_types(self.db, "alive"))

    @property
    def batch_size(self) -> int:
        """Images encoded at once."""
        return self.clip.batch_size if self.clip else 1

    @cached_property
    def loaded_clip(self) -> Clip:
        """The CLIP itself, loaded once for all steps."""
        from curate.clip import load_clip

        assert self.clip is not None, "check_measured lets no step that embeds come here without a CLIP"
        return load_clip(self.clip.name, self.clip.pretrained, device=self.clip.device)

    def identity_of(self, path: Path) -> Identity:
        """What a change of the images at a path changes."""
        return self.identities[str(path)]

    def embeddings(self) -> Iterator[tuple[pa.Array, np.ndarray]]:
        """For each signals file, the keys and the image embeddings, float32 (N, D)."""
        for path in self.signals:
            yield read_embeddings(path)

    def alive_embeddings(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each signals file, the rows that are alive, int64 (N), and their image embeddings, float32 (N, D)."""
        import numpy as np
        import pyarrow as pa

        for keys, image_ND in self.embeddings():
            self.db.register("found", pa.table({"key": keys, "place_": np.arange(len(keys))}))
            there = self.db.execute("SELECT row, place_ FROM alive JOIN found USING (key) ORDER BY place_").fetchnumpy()
            self.db.unregister("found")
            yield np.asarray(there["row"], np.int64), image_ND[np.asarray(there["place_"], np.int64)]

    def insert(self, table: pa.Table, query: str) -> None:
        """Run an INSERT INTO drops that reads `table` under the name `found`."""
        self.db.register("found", table)
        try:
            self.db.execute(f"INSERT INTO drops {query}")
        finally:
            self.db.unregister("found")


def read_embeddings(path: Path) -> tuple[pa.Array, np.ndarray]:
    """Keys and image embeddings, float32 (N, D) of length 1, of a signals file; rows without one are left out.

    Raises:
        InputError: the file has no embeddings.
    """
    import numpy as np
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from curate.select.semantic import of_length_one

    if "image_embedding" not in pq.read_schema(path).names:
        raise InputError(f"{path}: no column 'image_embedding'; run `curate measure` again")
    table = read_rows(path, ["key", "image_embedding"])
    table = table.filter(pc.is_valid(table["image_embedding"])).combine_chunks()
    flat = pc.list_flatten(table["image_embedding"]).to_numpy()
    width = len(flat) // table.num_rows if table.num_rows else 0
    return table["key"], of_length_one(flat.astype(np.float32).reshape(table.num_rows, width))


def same_width(embeddings: np.ndarray, reference: np.ndarray, path: Any) -> None:
    """Check that two sets of embeddings can be of one CLIP.

    Raises:
        ModelError: their widths differ.
    """
    if len(embeddings) and embeddings.shape[1] != reference.shape[1]:
        raise ModelError(
            f"{path}: embeddings of width {embeddings.shape[1]}, but measure.clip gives {reference.shape[1]}; "
            "run `curate measure` again"
        )
