"""Images + free-text queries → probabilities, as CLIP's own users make them.

The softmax over the queries of exp(logit_scale) · image · text (Radford et al. 2021, section 3.1.2).

Letters: N images · Q queries.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from curate.clip import Clip
from curate.errors import ConfigError, InputError
from curate.shards import MemberReader, read_index, shard_folder, shards_of
from finetune.evaluate import Encoder
from finetune.sets import FileImages, Images, TarImages, image_files


@dataclass(frozen=True, slots=True)
class Predictions:
    """Probabilities (N, Q), each row summing to 1, with the names of the images and the queries."""

    images: list[str]
    queries: list[str]
    probabilities: torch.Tensor

    def to_json(self) -> str:
        """A list with, for each image, its probabilities by query."""
        rows = zip(self.images, self.probabilities.tolist(), strict=True)
        return json.dumps(
            [{"image": image, "probabilities": dict(zip(self.queries, row, strict=True))} for image, row in rows],
            ensure_ascii=False,
            indent=1,
        )

    def to_csv(self) -> str:
        """A line an image, a column a query."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["image", *self.queries])
        table.writerows([image, *row] for image, row in zip(self.images, self.probabilities.tolist(), strict=True))
        return text.getvalue()


def predict(
    clip: Clip, images: Images, names: Sequence[str], queries: Sequence[str], *, batch_size: int
) -> Predictions:
    """Probabilities of the queries for each image.

    Args:
        clip: in eval mode.
        images: what `find_images` found.
        names: theirs.
        queries: at least one; with one alone its probability is always 1, so give what it is not as well.
        batch_size: images encoded at once.

    Raises:
        ConfigError: no query, or one twice.
        InputError: an image that cannot be read.
    """
    if not queries or len(set(queries)) < len(queries):
        raise ConfigError("--queries: expected at least one text, each once, such as 'a photo of a cat'")
    encoder = Encoder(clip.model, clip.preprocess, clip.tokenizer, clip.device, batch_size)
    model: Any = clip.model
    with torch.no_grad():
        # SigLIP's logit_bias is the same for all queries: softmax does not see it.
        logits_NQ = model.logit_scale.exp() * encoder.images(images) @ encoder.captions(list(queries)).T
    return Predictions(list(names), list(queries), logits_NQ.softmax(dim=-1).cpu())


def find_images(paths: Sequence[Path]) -> tuple[Images, list[str]]:
    """The images of files and folders, or of one dataset (all its splits), and their names: paths, or keys.

    Raises:
        InputError: no such file, or no image found.
    """
    if len(paths) == 1 and paths[0].is_dir() and shards_of(shard_folder(paths[0])):
        index = read_index(paths[0])
        columns = ("tar", "image_offset", "image_size", "key")
        places = list(zip(*(index.table[name].to_pylist() for name in columns), strict=True))
        return TarImages(MemberReader(index.tars), places), [str(place[3]) for place in places]
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        found += image_files(path) if path.is_dir() else [path]
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: no image found; expected image files, or folders of them")
    return FileImages(found), [str(path) for path in found]
