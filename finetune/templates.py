"""Prompt templates by name, and what a list of templates must look like. Loads no torch: checks.py asks it too.

`templates.json` has OpenAI's 80 templates for ImageNet (`imagenet`) and those of the paper's other sets (Radford et al.
2021; published as data/prompts.md of openai/CLIP, MIT licence, © 2021 OpenAI), as CLIP_benchmark 1.6.2 has them
(`en_zeroshot_classification_templates.json`, MIT licence, © 2022 Mehdi Cherti), with `{}` for the class's name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from curate.errors import ConfigError, did_you_mean
from curate.keys import shown

USUAL = ("a photo of a {}.",)


@cache
def known() -> dict[str, list[str]]:
    """Every list of templates that has a name."""
    found: dict[str, list[str]] = json.loads(Path(__file__).with_name("templates.json").read_text(encoding="utf-8"))
    return found


def templates_of(given: str | Sequence[str], key: str = "templates") -> list[str]:
    """The templates of a name (`imagenet`, `cifar10`, …; alone in a list too), or a user's own.

    Raises:
        ConfigError: no list of that name, no template, or one without exactly one `{}`; begins with `key`.
    """
    listed = [given] if isinstance(given, str) else list(given)
    if not listed:
        raise ConfigError(f"{key}: needs at least one, such as 'a photo of a {{}}.'")
    if len(listed) == 1 and listed[0] in known():
        return known()[listed[0]]
    if wrong := [text for text in listed if text.count("{}") != 1]:
        names = sorted(known())
        hint = did_you_mean(wrong[0], names) or f" Names: {', '.join(names)}."
        raise ConfigError(
            f"{key}: {shown(wrong[0])} needs exactly one {{}}, where the class's name goes"
            + (f"; and it is no name of a list of templates.{hint}" if isinstance(given, str) else "")
        )
    return listed
