from __future__ import annotations

import math

import pytest
import torch

from finetune.adapters import adapt
from finetune.config import AdapterConfig, OptimizerConfig
from finetune.optim import adamw, clamp_logit_scale, learning_rate, parameter_groups, schedule, total_steps
from tests.finetune.test_attention import build
from tests.finetune.test_variants import siglip


def names(model, group) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_matrices_decay_and_biases_norms_embeddings_and_the_temperature_do_not():
    model = build("tiny-vit")
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.2))
    assert [group["weight_decay"] for group in groups if group["name"] == "logit_scale"] == [0.0]
    decayed = set().union(*(names(model, group) for group in groups if group["weight_decay"] == 0.2))
    free = set().union(*(names(model, group) for group in groups if group["weight_decay"] == 0))
    assert {"visual.proj", "visual.conv1.weight", "text_projection"} <= decayed
    assert {
        "logit_scale",
        "token_embedding.weight",
        "positional_embedding",
        "visual.positional_embedding",
        "visual.class_embedding",
        "ln_final.weight",
        "transformer.resblocks.0.mlp.c_fc.bias",
    } <= free
    assert decayed | free == {name for name, _ in model.named_parameters()}
    assert not decayed & free


def test_the_query_of_an_attention_pool_and_the_lengths_of_dora_do_not_decay():
    """They have as many axes as a matrix, or as a kernel."""
    dora = build("tiny-resnet")
    adapt(dora, AdapterConfig(variant="dora", rank=2, targets=["conv"]))
    for model, kind in ((siglip(), "latent"), (dora, "lora_magnitude")):
        found = [(name, parameter) for name, parameter in model.named_parameters() if kind in name]
        assert any(parameter.ndim > 1 for _, parameter in found)
        groups = parameter_groups(model, OptimizerConfig(weight_decay=0.2))
        (free,) = [group for group in groups if group["name"] == "image, no decay"]
        assert {name for name, _ in found} <= names(model, free)
        assert free["weight_decay"] == 0


def test_what_is_not_trained_is_in_no_group_and_an_empty_group_is_left_out():
    model = build("tiny-vit")
    adapt(model, AdapterConfig(rank=2, train_logit_scale=False))
    groups = parameter_groups(model, OptimizerConfig())
    assert {g["name"] for g in groups} == {"image", "text"}
    assert all("lora_" in name for group in groups for name in names(model, group))


def test_one_adamw_step_equals_the_formula():
    config = OptimizerConfig(lr=0.1, weight_decay=0.3, betas=(0.9, 0.98), eps=1e-6)
    linear = torch.nn.Linear(2, 1).double()
    before = linear.weight.detach().clone()
    optimizer = adamw(linear, config)
    linear(torch.tensor([[2.0, -3.0]]).double()).sum().backward()
    optimizer.step()
    gradient = torch.tensor([[2.0, -3.0]]).double()
    expected = before * (1 - 0.1 * 0.3) - 0.1 * gradient / (gradient.abs() + 1e-6)
    torch.testing.assert_close(linear.weight.detach(), expected, rtol=1e-9, atol=1e-9)


def test_the_learning_rate_is_open_clips_warm_up_and_cosine():
    config = OptimizerConfig(lr=2e-4, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    for step in range(10):
        assert rates[step] == pytest.approx(2e-4 * (step + 1) / 10)
    for step in range(10, 100):
        assert rates[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 10) / 90)) * 2e-4)
    assert rates[100] == 0


def test_the_learning_rate_ends_at_the_least_and_stays_there():
    config = OptimizerConfig(lr=1e-3, min_lr=1e-5, warmup=0.0)
    assert learning_rate(0, 10, config) == 1e-3
    assert learning_rate(10, 10, config) == learning_rate(99, 10, config) == pytest.approx(1e-5)
    assert learning_rate(0, 1, OptimizerConfig(lr=1e-3, warmup=0.9)) == 1e-3


def test_the_schedule_sets_these_rates_in_every_group():
    config = OptimizerConfig(lr=1e-3, warmup=0.3)
    model = build("tiny-vit")
    optimizer = adamw(model, config)
    scheduler = schedule(optimizer, lambda: 10, config)
    for step in range(10):
        assert all(g["lr"] == pytest.approx(learning_rate(step, 10, config)) for g in optimizer.param_groups)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "total"), [(-1, 3, 30), (25, 3, 25), (50, 3, 30), (7, None, 7), (7, -1, 7)]
)
def test_total_steps_are_the_lower_limit(max_steps, max_epochs, total):
    assert total_steps(max_steps, max_epochs, 10) == total


@pytest.mark.parametrize(("before", "after"), [(9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)])
def test_the_temperature_is_kept_in_its_bounds(before, after):
    model = build("tiny-vit")
    model.logit_scale.data.fill_(before)
    clamp_logit_scale(model)
    assert model.logit_scale.item() == pytest.approx(after)


def test_each_parameter_gets_its_tower_s_rate_times_the_decay_of_its_depth_at_every_step():
    config = OptimizerConfig(lr=1e-3, image_lr=4e-3, layer_decay=0.5, warmup=0.2, schedule="linear")
    model = build("tiny-vit")
    optimizer = adamw(model, config)
    scheduler = schedule(optimizer, lambda: 10, config)
    by_hand = {  # two blocks: the stem stands three steps below the head
        "visual.proj": 4e-3, "visual.transformer.resblocks.1.mlp.c_fc.weight": 2e-3,
        "visual.transformer.resblocks.0.mlp.c_fc.bias": 1e-3, "visual.conv1.weight": 5e-4,
        "ln_final.bias": 1e-3, "transformer.resblocks.0.mlp.c_fc.weight": 2.5e-4,
        "token_embedding.weight": 1.25e-4, "logit_scale": 1e-3,
    }  # fmt: skip
    for step in range(10):
        factor = (step + 1) / 2 if step < 2 else 1 - (step - 2) / 8
        rates = {name: group["lr"] for group in optimizer.param_groups for name in names(model, group)}
        assert {name: rates[name] for name in by_hand} == pytest.approx({k: v * factor for k, v in by_hand.items()})
        optimizer.step()
        scheduler.step()


def test_a_constant_schedule_stays_after_the_warm_up():
    config = OptimizerConfig(lr=1e-3, warmup=0.2, schedule="constant")
    assert [learning_rate(step, 10, config) for step in (1, 2, 9, 10)] == pytest.approx([1e-3] * 4)
