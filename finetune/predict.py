"""Images + free-text queries → probabilities, as CLIP's own users make them; and images → embeddings.

The softmax over the queries of exp(logit_scale) · image · text (Radford et al. 2021, section 3.1.2). With templates a
query's text embedding is that of a zero-shot class (section 3.1.4).

Everything is a stream of batches: a folder of any size is written to CSV or Parquet in the memory of a few batches.

Letters: B images of a batch · Q queries · D embedding width.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from torch import Tensor

from curate.clip import Clip
from curate.files import atomic
from finetune.embedding import Pictures, embedded, text_embeddings

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("image", "rank", "text", "logit", "probability")
ROW_GROUP = 8_192  # rows of a Parquet file that are held at once, at least


@dataclass(frozen=True, slots=True)
class Predictions:
    """Logits (B, Q) and probabilities (B, Q), each row summing to 1, with the names of the images and the queries."""

    images: list[str]
    texts: list[str]
    logits: Tensor
    probabilities: Tensor

    def rows(self) -> Iterator[tuple[str, int, str, float, float]]:
        """COLUMNS: for each image a row a query, the most probable first, with rank 1."""
        order_BQ = self.logits.argsort(dim=1, descending=True, stable=True)
        columns = (order_BQ.tolist(), self.logits.tolist(), self.probabilities.tolist())
        for image, order, logits, probabilities in zip(self.images, *columns, strict=True):
            for rank, query in enumerate(order, start=1):
                yield image, rank, self.texts[query], logits[query], probabilities[query]


def predict(
    clip: Clip, pictures: Pictures, texts: Sequence[str], *, templates: Sequence[str] = (), batch_size: int = 64
) -> Iterator[Predictions]:
    """Predictions of the readable images, a batch at a time.

    Args:
        clip: in eval mode.
        pictures: what `find_pictures` found.
        texts: the queries; with one alone its probability is always 1, so give what it is not as well.
        templates: as of `text_embeddings`.
        batch_size: images encoded at once.

    Raises:
        ConfigError: as `text_embeddings`.
    """
    query_QD = text_embeddings(clip, texts, templates, batch_size)
    model: Any = clip.model
    scale = model.logit_scale.detach().exp()
    for numbers, image_BD in embedded(clip, pictures, batch_size):
        # SigLIP's logit_bias is the same for all queries: softmax does not see it.
        logits_BQ = (scale * image_BD @ query_QD.T).cpu()
        yield Predictions([pictures.names[n] for n in numbers], list(texts), logits_BQ, logits_BQ.softmax(dim=-1))


def table_rows(batches: Iterable[Predictions]) -> Iterator[tuple[str, list[tuple[float, float, str]]]]:
    """For each image its name and (probability, logit, text) of each query, the most probable first."""
    for batch in batches:
        rows = batch.rows()
        for image in batch.images:
            of_image = itertools.islice(rows, len(batch.texts))
            yield image, [(probability, logit, text) for _, _, text, logit, probability in of_image]


# --- writing ----------------------------------------------------------------------------------------------------------


def write_predictions(batches: Iterable[Predictions], path: Path) -> None:
    """Write COLUMNS to a CSV or Parquet file, atomically."""
    if path.suffix == ".csv":
        with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            write_csv(batches, file)
        return
    import pyarrow as pa

    schema = pa.schema(zip(COLUMNS, (pa.string(), pa.int32(), pa.string(), pa.float32(), pa.float32()), strict=True))
    _write_parquet((pa.table(list(zip(*batch.rows(), strict=True)), schema=schema) for batch in batches), schema, path)


def write_csv(batches: Iterable[Predictions], file: IO[str]) -> None:
    """COLUMNS as CSV."""
    table = csv.writer(file, lineterminator="\n")
    table.writerow(COLUMNS)
    for batch in batches:
        table.writerows(batch.rows())


def write_json(batches: Iterable[Predictions], file: IO[str]) -> None:
    """A list with, for each image, its logits and probabilities by query."""
    between = "["
    for batch in batches:
        rows = zip(batch.images, batch.logits.tolist(), batch.probabilities.tolist(), strict=True)
        for image, logits, probabilities in rows:
            row = {
                "image": image,
                "logits": dict(zip(batch.texts, logits, strict=True)),
                "probabilities": dict(zip(batch.texts, probabilities, strict=True)),
            }
            file.write(f"{between}\n{json.dumps(row, ensure_ascii=False)}")
            between = ","
    file.write("\n]\n" if between == "," else "[]\n")


def write_embeddings(clip: Clip, pictures: Pictures, path: Path, *, batch_size: int) -> None:
    """Write `image` and `embedding` (D float32, L2-normalised) of the readable images to Parquet, atomically."""
    import pyarrow as pa

    width = clip.embed_captions(["how wide?"]).shape[1]
    schema = pa.schema([("image", pa.string()), ("embedding", pa.list_(pa.float32(), width))])

    def tables() -> Iterator[pa.Table]:
        for numbers, image_BD in embedded(clip, pictures, batch_size):
            flat = pa.array(image_BD.cpu().numpy().ravel())
            columns = [[pictures.names[n] for n in numbers], pa.FixedSizeListArray.from_arrays(flat, width)]
            yield pa.table(columns, schema=schema)

    _write_parquet(tables(), schema, path)


def _write_parquet(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as file:
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table)
            if sum(map(len, waiting)) >= ROW_GROUP:
                file.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            file.write_table(pa.concat_tables(waiting))
