"""Zero-shot classifiers against the paper's formula and open_clip's."""

from __future__ import annotations

import open_clip
import pytest
import torch

from curate.clip import load_clip
from curate.errors import ConfigError
from finetune.labelled import class_name
from finetune.prompts import openai_imagenet_templates, prompts, zero_shot_classifier
from finetune.templates import known


def test_class_embeddings_are_the_normalised_mean_of_normalised_prompt_embeddings():
    raw = torch.nn.functional.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    asked: list[str] = []

    def embed(captions: list[str]) -> torch.Tensor:
        asked.extend(captions)
        return raw

    classifier = zero_shot_classifier(embed, ["cat", "dog"], ["a {}.", "the {}.", "{}!"])
    assert asked == ["a cat.", "the cat.", "cat!", "a dog.", "the dog.", "dog!"]
    for place, own in enumerate((raw[:3], raw[3:])):
        mean = own.mean(0)
        assert torch.allclose(classifier[place], mean / mean.norm(), atol=1e-6)


def test_a_list_of_templates_is_named_too(architectures):
    clip = load_clip(architectures["tiny-vit"], device="cpu")
    by_name = zero_shot_classifier(clip.embed_captions, ["cat", "dog"], ["cifar10"])
    assert torch.equal(by_name, zero_shot_classifier(clip.embed_captions, ["cat", "dog"], known()["cifar10"]))


def test_it_equals_open_clips_classifier(architectures):
    clip = load_clip(architectures["tiny-vit"], device="cpu")
    classes, templates = ["cat", "palm cockatoo", "dog"], openai_imagenet_templates()
    theirs = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, classes, templates)
    assert torch.allclose(zero_shot_classifier(clip.embed_captions, classes, templates), theirs.T, atol=1e-6)


def test_openai_has_80_templates_for_imagenet():
    templates = openai_imagenet_templates()
    assert len(templates) == 80
    assert templates[0] == "a bad photo of a {}."
    assert all(len(prompts("cat", [template])) == 1 for template in templates)


@pytest.mark.parametrize(("folder", "name"), [("palm_cockatoo", "palm cockatoo"), ("T-shirt__red", "T shirt red")])
def test_a_folders_name_becomes_the_classs_name(folder, name):
    assert class_name(folder) == name


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_without_exactly_one_place_for_the_name_is_an_error(template):
    with pytest.raises(ConfigError, match=r"needs exactly one \{\}"):
        prompts("cat", [template])


def test_no_template_is_an_error():
    with pytest.raises(ConfigError, match="at least one"):
        prompts("cat", [])


def test_other_braces_in_a_template_stay():
    assert prompts("cat", ["{a} {}"]) == ["{a} cat"]
