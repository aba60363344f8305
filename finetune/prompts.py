"""Zero-shot classifiers: class names and prompt templates to class embeddings (Radford et al. 2021, section 3.1.4).

Letters: C classes · K templates · D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from curate.errors import ConfigError


def class_name(folder: str) -> str:
    """What a class folder is called in a prompt: `palm_cockatoo` and `palm-cockatoo` → `palm cockatoo`."""
    return " ".join(folder.replace("_", " ").replace("-", " ").split())


def prompts(name: str, templates: Sequence[str]) -> list[str]:
    """The class's name put into each template's `{}`.

    Raises:
        ConfigError: no template, or one without exactly one `{}`.
    """
    if not templates:
        raise ConfigError("templates: needs at least one, such as 'a photo of a {}.'")
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(f"templates: '{template}' needs exactly one {{}}, where the class's name goes")
    return [template.replace("{}", name) for template in templates]


def zero_shot_classifier(
    embed: Callable[[list[str]], torch.Tensor], classes: Sequence[str], templates: Sequence[str]
) -> torch.Tensor:
    """Class embeddings (C, D): the normalised mean of each class's normalised prompt embeddings.

    Args:
        embed: captions to L2-normalised embeddings.
        classes: names of the classes.
        templates: prompts with a `{}`.

    Raises:
        ConfigError: a template without exactly one `{}`.
    """
    embedding_CKD = embed([prompt for name in classes for prompt in prompts(name, templates)])
    embedding_CKD = embedding_CKD.reshape(len(classes), len(templates), -1)
    return torch.nn.functional.normalize(embedding_CKD.mean(dim=1), dim=-1)


def openai_imagenet_templates() -> list[str]:
    """OpenAI's 80 templates for ImageNet, as open_clip ships them."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
