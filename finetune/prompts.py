"""Zero-shot classifiers: class names and prompt templates to class embeddings (Radford et al. 2021, section 3.1.4).

Letters: C classes · K templates · D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from finetune.templates import templates_of


def prompts(name: str, templates: Sequence[str]) -> list[str]:
    """The class's name put into each template's `{}`.

    Raises:
        ConfigError: no template, or one without exactly one `{}`.
    """
    return [template.replace("{}", name) for template in templates_of(templates)]


def zero_shot_classifier(
    embed: Callable[[list[str]], torch.Tensor], classes: Sequence[str], templates: Sequence[str]
) -> torch.Tensor:
    """Class embeddings (C, D): the normalised mean of each class's normalised prompt embeddings.

    Args:
        embed: captions to L2-normalised embeddings.
        classes: names of the classes.
        templates: prompts with a `{}`; or the name of a list of them, alone.

    Raises:
        ConfigError: a template without exactly one `{}`.
    """
    listed = templates_of(templates)
    embedding_CKD = embed([prompt for name in classes for prompt in prompts(name, listed)])
    embedding_CKD = embedding_CKD.reshape(len(classes), len(listed), -1)
    return torch.nn.functional.normalize(embedding_CKD.mean(dim=1), dim=-1)


def openai_imagenet_templates() -> list[str]:
    """OpenAI's 80 templates for ImageNet."""
    return templates_of("imagenet")
