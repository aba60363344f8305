"""Search in a dataset, or a folder of images, by text or by image: the nearest by cosine, exactly, in one pass.

The result is a list, and a page of thumbnails that opens offline (curate/html.py says what keeps it safe).

Letters: B images of a batch · Q queries · K results · D embedding width.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from curate.clip import Clip
from curate.errors import ConfigError
from curate.files import write_text
from curate.html import render
from finetune.embedding import Pictures, embedded, find_pictures, image_embeddings, text_embeddings
from finetune.examples import thumbnail
from finetune.images import Images

COLUMNS = ("query", "rank", "image", "similarity", "caption")
MOST_THUMBNAILS = 1_500  # of a page that a browser opens at once: some 4 kB each


@dataclass(frozen=True, slots=True)
class Queries:
    """What is searched for: names, embeddings (Q, D), and the images themselves if they are images."""

    names: list[str]
    embeddings: Tensor
    images: Images | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What a query found, best first: (number of the image, cosine similarity)."""

    query: str
    results: list[tuple[int, float]]


def by_text(clip: Clip, texts: Sequence[str], templates: Sequence[str], batch_size: int) -> Queries:
    """Search for texts; arguments and errors as of `text_embeddings`."""
    return Queries(list(texts), text_embeddings(clip, texts, templates, batch_size))


def by_image(clip: Clip, paths: Sequence[Path], batch_size: int) -> Queries:
    """Search for what looks like images: files, or folders of them.

    Raises:
        InputError: one is not there or cannot be read.
    """
    wanted = find_pictures(paths)
    return Queries(wanted.names, image_embeddings(clip, wanted.images, batch_size), wanted.images)


def search(clip: Clip, pictures: Pictures, queries: Queries, best: int, batch_size: int) -> list[Found]:
    """The `best` images for each query; of equally near ones, the first.

    Args:
        clip: in eval mode.
        pictures: what is searched.
        queries: from the same CLIP.
        best: how many images for each.
        batch_size: images encoded at once.
    """
    query_QD = queries.embeddings
    score_QK = query_QD.new_empty(len(query_QD), 0)
    number_QK = torch.empty(len(query_QD), 0, dtype=torch.long, device=query_QD.device)
    for numbers, image_BD in embedded(clip, pictures, batch_size):
        number_QB = torch.tensor(numbers, device=query_QD.device).expand(len(query_QD), -1)
        score_QK = torch.cat([score_QK, query_QD @ image_BD.T], dim=1)
        number_QK = torch.cat([number_QK, number_QB], dim=1)
        order_QK = score_QK.argsort(dim=1, descending=True, stable=True)[:, :best]
        score_QK, number_QK = score_QK.gather(1, order_QK), number_QK.gather(1, order_QK)
    found = zip(queries.names, number_QK.tolist(), score_QK.tolist(), strict=True)
    return [Found(query, list(zip(numbers, scores, strict=True))) for query, numbers, scores in found]


# --- showing ----------------------------------------------------------------------------------------------------------


def rows(found: Sequence[Found], pictures: Pictures) -> Iterator[tuple[str, int, str, float, str]]:
    """COLUMNS: for each query a row an image, the nearest first, with rank 1."""
    for of in found:
        for rank, (number, similarity) in enumerate(of.results, start=1):
            yield of.query, rank, pictures.names[number], similarity, pictures.caption(number)


def write_csv(found: Sequence[Found], pictures: Pictures, file: IO[str]) -> None:
    """COLUMNS as CSV."""
    table = csv.writer(file, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(rows(found, pictures))


def write_json(found: Sequence[Found], pictures: Pictures, file: IO[str]) -> None:
    """A list of results by COLUMNS."""
    results = [dict(zip(COLUMNS, row, strict=True)) for row in rows(found, pictures)]
    file.write(json.dumps(results, ensure_ascii=False, indent=1) + "\n")


def check_page(pictures: int) -> None:
    """Check how many pictures a page would have.

    Raises:
        ConfigError: more than a browser opens at once.
    """
    if pictures > MOST_THUMBNAILS:
        raise ConfigError(
            f"best: more than {MOST_THUMBNAILS:,} pictures on a page; give fewer queries, or a smaller --best"
        )


def write_page(
    found: Sequence[Found], pictures: Pictures, queries: Queries, path: Path, *, model: str, where: str
) -> None:
    """Write one self-contained HTML page: for each query its images, with similarity, name and caption.

    Args:
        found: what `search` gave for the queries.
        pictures: what was searched.
        queries: those; images are shown.
        path: of the page.
        model: the CLIP's name.
        where: the dataset's.

    Raises:
        ConfigError: more pictures than a browser opens at once.
    """
    check_page(sum(len(of.results) for of in found))
    sections = [
        {
            "query": of.query,
            "picture": thumbnail(queries.images.open(number)) if queries.images else None,
            "results": [
                {
                    "thumbnail": thumbnail(pictures.open(image)),
                    "name": pictures.names[image],
                    "caption": pictures.caption(image),
                    "similarity": similarity,
                }
                for image, similarity in of.results
            ],
        }
        for number, of in enumerate(found)
    ]
    searched = len(pictures) - len(pictures.unreadable)
    values = {"sections": sections, "model": model, "where": where, "searched": searched}
    write_text(path, render(Path(__file__).parent, values))
