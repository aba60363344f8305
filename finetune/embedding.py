"""Embeddings of images, as a stream, and of texts with templates.

A folder of any size passes through in the memory of a few batches, and a broken file costs that file.

An evaluation must not lose an image (finetune/sets.py raises); a prediction over a folder must not be lost for one.

Letters: B images of a batch · Q texts · D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from open_clip import SimpleTokenizer
from PIL import Image
from torch import Tensor

from curate.clip import Clip
from curate.errors import ConfigError, InputError, UnwantedResult
from curate.files import utf8
from curate.index import MemberReader, read_index
from curate.keys import shown
from curate.remote import address
from curate.shards import shard_folder, shards_of
from finetune.evaluate import Encoder, pixel_batches
from finetune.images import FileImages, Images, TarImages, image_files
from finetune.prompts import openai_imagenet_templates, zero_shot_classifier

logger = logging.getLogger("cliptailor")


@dataclass(frozen=True, slots=True)
class Pictures:
    """Images by number; one that cannot be read is told in a line, counted, and left out of what is made of them.

    Attributes:
        images: where they are.
        names: paths of files, or keys of a dataset's samples.
        captions: of a dataset's samples; empty otherwise.
        unreadable: numbers of those that could not be read so far.
    """

    images: Images
    names: list[str]
    captions: list[str] = field(default_factory=list)
    unreadable: set[int] = field(default_factory=set)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each."""
        return self.images.sizes

    def __len__(self) -> int:
        return len(self.images)

    def open(self, number: int) -> Image.Image:
        """The image, RGB; a black pixel if it cannot be read, which `embedded` takes out again."""
        try:
            return self.images.open(number)
        except InputError as error:
            logger.warning("%s", error)
            self.unreadable.add(number)
            return Image.new("RGB", (1, 1))

    def caption(self, number: int) -> str:
        """Its caption, or nothing."""
        return self.captions[number] if self.captions else ""

    def check_all_read(self) -> None:
        """Call it at the end.

        Raises:
            UnwantedResult: some could not be read.
        """
        if self.unreadable:
            bad, all_ = len(self.unreadable), len(self)
            rest = "the result is of the others" if bad < all_ else "there is no result"
            raise UnwantedResult(f"{bad:,} of {all_:,} images could not be read, each named above; {rest}")


def find_pictures(paths: Sequence[Path]) -> Pictures:
    """The images of files and folders, in the order given, or of one dataset (all its splits).

    Raises:
        ConfigError: a dataset and something else.
        InputError: no such file, or no image found.
    """
    datasets = [path for path in paths if address(path) or (path.is_dir() and shards_of(shard_folder(path)))]
    if datasets and len(paths) > 1:
        raise ConfigError(f"images: {datasets[0]} is a dataset; give it alone, or folders and files of images")
    if datasets:
        index = read_index(paths[0])
        columns = ("tar", "image_offset", "image_size", "key")
        places = list(zip(*(index.table[name].to_pylist() for name in columns), strict=True))
        captions = [caption or "" for caption in index.table["caption"].to_pylist()]
        return Pictures(TarImages(MemberReader(index.tars), places), [str(place[3]) for place in places], captions)
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        found += image_files(path) if path.is_dir() else [path]
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: no image found; expected image files, or folders of them")
    return Pictures(FileImages(found), [utf8(str(path)) for path in found])


def embedded(clip: Clip, pictures: Pictures, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """(numbers, embeddings (B, D), L2-normalised float32) of the readable ones, a batch at a time, in order.

    Two batches are in memory: the next one is decoded while the caller works on this one.
    """
    first = 0
    for pixels in pixel_batches(pictures, clip.preprocess, batch_size):
        there = [place for place in range(len(pixels)) if first + place not in pictures.unreadable]
        if there:
            yield [first + place for place in there], clip.embed_images(pixels[there])
        first += len(pixels)


def image_embeddings(clip: Clip, images: Images, batch_size: int) -> Tensor:
    """Embeddings (B, D) of a few images, L2-normalised float32.

    Raises:
        InputError: one of them cannot be read.
    """
    with torch.inference_mode():
        return _encoder(clip, batch_size).images(images)


def text_embeddings(clip: Clip, texts: Sequence[str], templates: Sequence[str], batch_size: int) -> Tensor:
    """Embeddings (Q, D) of texts, L2-normalised float32: with templates the mean over them, normalised again.

    Args:
        clip: in eval mode.
        texts: at least one, each once.
        templates: prompts with a `{}` for the text; none: the text itself; `imagenet` alone: OpenAI's 80.
        batch_size: prompts encoded at once.

    Raises:
        ConfigError: no text, or one twice; a template without exactly one `{}`.
    """
    if not texts or len(set(texts)) < len(texts):
        raise ConfigError("text: expected at least one, each once, such as 'a photo of a cat'")
    prompts = openai_imagenet_templates() if list(templates) == ["imagenet"] else list(templates) or ["{}"]

    def embed(prompts: list[str]) -> Tensor:
        _tell_what_is_cut(clip.tokenizer, prompts)
        return _encoder(clip, batch_size).captions(prompts)

    with torch.inference_mode():
        return zero_shot_classifier(embed, list(texts), prompts)


def _tell_what_is_cut(tokenizer: Any, texts: Sequence[str]) -> None:
    """CLIP's BPE cuts without a word what is longer than the model reads; other tokenizers do not say."""
    if not isinstance(tokenizer, SimpleTokenizer):
        return
    length = tokenizer.context_length
    for text in texts:
        if (tokens := len(tokenizer.encode(text)) + 2) > length:  # and its start and end
            logger.warning(
                "text: %s has %d tokens, of which this CLIP reads %d; say it shorter", shown(text), tokens, length
            )


def _encoder(clip: Clip, batch_size: int) -> Encoder:
    return Encoder(clip.model, clip.preprocess, clip.tokenizer, clip.device, batch_size)
