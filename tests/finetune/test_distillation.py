"""What holds a CLIP to where it started: the functions by hand, and the start itself, through training and resuming."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from curate.clip import load_clip
from curate.errors import ConfigError
from finetune.adapters import merge
from finetune.config import AdapterConfig, ClipConfig, FitConfig, LossConfig
from finetune.fit import fit
from finetune.losses import feature_distance, logit_divergence
from finetune.module import CLIPModule
from finetune.start import Start, evaluating
from tests.finetune import tiny
from tests.finetune.fitted import tiny_config

HELD = {"distill_feature": 2.0, "distill_logit": 1.0, "l2_start": 0.1}
ADAPTERS = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.3},
    "locked": {"kind": "full", "lock": ["image"]},
    "no temperature": {"kind": "lora", "train_logit_scale": False},
    "dora": {"kind": "lora", "variant": "dora", "rank": 4},
    "pissa": {"kind": "lora", "variant": "pissa", "rank": 4},
    "layernorm": {"kind": "layernorm"},
    "probe": {"kind": "probe"},
}


def embeddings(count: int, size: int = 6, width: int = 5) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [normalize(torch.randn(size, width, generator=random, dtype=torch.float64)) for _ in range(count)]


def scale(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- functions --------------------------------------------------------------------------------------------------------


def test_the_distance_of_embeddings_is_that_of_their_angles():
    now, start = embeddings(2)
    expected = np.mean([2 * (1 - x @ y) for x, y in zip(now.numpy(), start.numpy(), strict=True)])
    assert feature_distance(now, start).item() == pytest.approx(expected, abs=1e-12)
    assert feature_distance(now, now).item() == 0
    assert torch.autograd.gradcheck(feature_distance, (now.requires_grad_(), start))


def kl_by_hand(now: np.ndarray, start: np.ndarray) -> float:
    """Σ p log(p / q), row by row, from logits."""
    total = 0.0
    for new, old in zip(now, start, strict=True):
        q, p = (np.exp(row) / np.exp(row).sum() for row in (new, old))
        total += (p * np.log(p / q)).sum()
    return total / len(now)


def test_the_divergence_of_logits_is_kl_both_ways():
    image, text, old_image, old_text = embeddings(4)
    given = (image, text, scale(1.3), old_image, old_text, scale(0.7))
    now, start = np.exp(1.3) * (image @ text.T).numpy(), np.exp(0.7) * (old_image @ old_text.T).numpy()
    expected = (kl_by_hand(now, start) + kl_by_hand(now.T, start.T)) / 2
    assert logit_divergence(*given).item() == pytest.approx(expected, abs=1e-12)
    assert expected > 0.01
    assert torch.autograd.gradcheck(logit_divergence, [x.requires_grad_() for x in given])


def test_the_divergence_is_open_clips_distillation_less_the_entropy_of_the_start():
    from open_clip.loss import DistillClipLoss

    image, text, old_image, old_text = embeddings(4)
    trained = [image.requires_grad_(), text.requires_grad_(), scale(1.3).requires_grad_()]
    ours = logit_divergence(*trained, old_image, old_text, scale(0.7))
    _, theirs = DistillClipLoss()(image, text, trained[2].exp(), old_image, old_text, scale(0.7).exp())
    logits = np.exp(0.7) * old_image @ old_text.T
    entropy = sum(torch.distributions.Categorical(logits=each).entropy().mean() for each in (logits, logits.T)) / 2
    assert ours.item() == pytest.approx(theirs.item() - entropy.item(), abs=1e-12)
    for a, b in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_rows_of_the_divergence_average_to_the_whole_and_at_the_start_it_is_nothing():
    image, text, old_image, old_text = embeddings(4)
    given = (image, text, scale(1.3), old_image, old_text, scale(0.7))
    parts = [logit_divergence(*given, rows=slice(first, first + 3)) for first in (0, 3)]
    assert (sum(parts) / 2).item() == pytest.approx(logit_divergence(*given).item(), abs=1e-12)
    assert logit_divergence(image, text, scale(1.3), image, text, scale(1.3)).item() == 0


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start_weights(architectures, tmp_path_factory) -> dict[str, str]:
    """Saved random weights of each tiny architecture: something to start from and be held to."""
    saved = {}
    for name, path in architectures.items():
        torch.manual_seed(3)
        saved[name] = str(tmp_path_factory.mktemp("weights") / f"{name}.pt")
        torch.save(load_clip(path, device="cpu").model.state_dict(), saved[name])
    return saved


@pytest.fixture
def make(architectures, start_weights):
    def make(adapter: dict, loss: dict = HELD, name: str = "tiny-vit") -> CLIPModule:
        return CLIPModule({"name": architectures[name], "pretrained": start_weights[name]}, adapter, loss)

    return make


def batch(size: int = 6) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 1000, (size, 16), generator=random)
    tokens[:, 8] = 49407
    return {
        "pixels": torch.randn(size, 3, 32, 32, generator=random),
        "tokens": tokens,
        "group": torch.arange(size)[:, None],
    }


def move(module: CLIPModule, by: float = 0.1) -> None:
    """Shift all that is trained, as training would."""
    random = torch.Generator().manual_seed(5)
    for parameter in module.model.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn(parameter.shape, generator=random).to(parameter.dtype)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_start_embeds_as_the_untouched_clip_wherever_the_weights_have_gone(make, start_weights, adapter, name):
    module = make(ADAPTERS[adapter], name=name)
    given = batch()
    plain = load_clip(module.clip.name, start_weights[name], device="cpu")
    expected = plain.embed_images(given["pixels"]), plain.embed_captions(given["tokens"])
    move(module)
    moved = {key: value.clone() for key, value in module.state_dict().items()}
    modes = {key: part.training for key, part in module.named_modules()}
    for ours, theirs in zip(module.embed_start(given), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert not ours.requires_grad
    assert (module.embed(given)[1] - expected[1]).abs().max() > 1e-2
    assert {key: part.training for key, part in module.named_modules()} == modes
    assert all(torch.equal(value, moved[key]) for key, value in module.state_dict().items())


def test_the_start_drops_no_patches(tmp_path):
    made = copy.deepcopy(tiny.ARCHITECTURES["tiny-vit"])
    made["vision_cfg"]["patch_dropout"] = 0.5
    (tmp_path / "drops.json").write_text(json.dumps(made))
    name, weights = str(tmp_path / "drops.json"), str(tmp_path / "w.pt")
    torch.save(load_clip(name, device="cpu").model.state_dict(), weights)
    module = CLIPModule({"name": name, "pretrained": weights}, {"kind": "full"}, HELD)
    given = batch()
    first, second = (module.embed_start(given)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(module.embed(given)[0], module.embed(given)[0])  # what is trained does


def test_of_lora_only_the_updates_are_kept(make):
    module = make({"kind": "lora"})
    assert all("lora_" in name or name == "logit_scale" for name in module.start.named())
    assert make({"kind": "lora"}, {}).start is None


def test_the_mode_of_every_part_comes_back():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    module[1].eval()
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == [True, True, False]


def test_at_the_start_nothing_holds(make):
    module = make({"kind": "lora"}).eval()
    given = batch()
    parts = module.losses(module.embed(given), None, start=module.embed_start(given))
    assert parts["distill_feature"].item() == pytest.approx(0, abs=1e-9)
    assert parts["distill_logit"].item() == pytest.approx(0, abs=1e-6)
    assert module.start.squared_distance(module.model).item() == 0


def test_each_part_has_its_weight(make):
    module = make({"kind": "full"}, {"distill_feature": 2.0, "distill_logit": 3.0})
    move(module)
    given = batch()
    (image, text), (old_image, old_text) = module.embed(given), module.embed_start(given)
    parts = module.losses((image, text), given["group"], start=(old_image, old_text))
    features = feature_distance(image, old_image) + feature_distance(text, old_text)
    torch.testing.assert_close(parts["distill_feature"], features)
    old_scale = module.start.of("logit_scale")
    assert old_scale != module.model.logit_scale
    divergence = logit_divergence(image, text, module.model.logit_scale, old_image, old_text, old_scale)
    torch.testing.assert_close(parts["distill_logit"], 3 * divergence)
    torch.testing.assert_close(parts["contrastive"], module.batch_loss(given, gather=True))


def test_the_start_keeps_its_temperature_when_training_begins_with_another(make):
    module = make({"kind": "full", "train_logit_scale": False}, HELD | {"logit_scale": 20.0})
    assert module.model.logit_scale.exp().item() == pytest.approx(20)
    assert module.start.of("logit_scale").exp().item() == pytest.approx(1 / 0.07)


def test_random_weights_are_nothing_to_be_held_to(architectures):
    for key in HELD:
        with pytest.raises(ConfigError, match=f"model.loss.{key}: the start is random weights"):
            CLIPModule({"name": architectures["tiny-vit"], "pretrained": None}, None, {key: 1.0})


# --- L2 to the start --------------------------------------------------------------------------------------------------


def test_the_distance_of_full_weights_is_that_of_all_but_the_temperature(make):
    module = make({"kind": "full"}).double()
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    move(module)
    distance = module.start.squared_distance(module.model)
    gaps = {name: p.detach() - before[name] for name, p in module.model.named_parameters() if name != "logit_scale"}
    assert distance.item() == pytest.approx(sum(float(gap.square().sum()) for gap in gaps.values()), rel=1e-12)
    distance.backward()
    for name, gap in gaps.items():
        torch.testing.assert_close(module.model.get_parameter(name).grad, 2 * gap)
    assert module.model.logit_scale.grad is None


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet"])
@pytest.mark.parametrize("from_elsewhere", [False, True])
def test_the_distance_of_lora_is_that_of_the_merged_weights(make, name, from_elsewhere):
    """`from_elsewhere`: updates that start at something other than nothing, as PiSSA's do."""
    targets = ["q", "v", "out", "fc"] + (["conv", "pool"] if name == "tiny-resnet" else [])
    module = make({"kind": "lora", "rank": 3, "alpha": 4.0, "targets": targets}, name=name).double()
    if from_elsewhere:
        move(module, 0.3)
    model, held = module.model, Start(module.model)
    start = merged(model)
    move(module)
    distance = held.squared_distance(model)
    expected = sum(float((now - start[key]).square().sum()) for key, now in merged(model).items())
    assert expected > 0.1
    assert distance.item() == pytest.approx(expected, rel=1e-9)
    factors = [p for key, p in model.named_parameters() if "lora_" in key]
    ours = torch.autograd.grad(distance, factors)
    for gradient, dense in zip(ours, dense_gradients(model, held, factors), strict=True):
        torch.testing.assert_close(gradient, dense, rtol=1e-9, atol=1e-12)


def merged(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    import copy

    plain = copy.deepcopy(model)
    merge(plain)
    return {name: p.detach() for name, p in plain.named_parameters() if name != "logit_scale"}


def dense_gradients(model, held: Start, factors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Of Σ (s·B·A - s·B₀·A₀)², each product written out."""
    total = torch.zeros((), dtype=torch.float64)
    for name in (key for key, _ in model.named_parameters() if ".lora_A." in key):
        other = name.replace("lora_A", "lora_B")
        now = model.get_parameter(other).flatten(1) @ model.get_parameter(name).flatten(1)
        then = held.of(other).flatten(1) @ held.of(name).flatten(1)
        total = total + (4.0 / 3 * (now - then)).square().sum()
    return torch.autograd.grad(total, factors)


# --- in training ------------------------------------------------------------------------------------------------------


def held_config(out: Path, dataset, architecture: str, weights: str, loss: LossConfig, kind: str) -> FitConfig:
    config = tiny_config(out, dataset, architecture, AdapterConfig(kind=kind, dropout=0.2, rank=4))
    clip = ClipConfig(name=architecture, pretrained=weights)
    return replace(
        config,
        checkpoint_every_n_steps=2,
        trainer=replace(config.trainer, log_every_n_steps=1),
        model=replace(config.model, clip=clip, loss=loss),
    )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_that_died_goes_on_towards_the_same_start(
    kind, dataset, architectures, start_weights, tmp_path, monkeypatch
):
    given = (dataset, architectures["tiny-vit"], start_weights["tiny-vit"], LossConfig(**HELD), kind)
    fit(held_config(tmp_path / "whole", *given))
    config = held_config(tmp_path / "broken", *given)
    with monkeypatch.context() as patch:
        patch.setattr(CLIPModule, "training_step", dying_at(4, CLIPModule.training_step))
        with pytest.raises(KeyError):
            fit(config)
    assert fit(config).resumed
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]  # noqa: TID251 - ours
        for name in ("whole", "broken")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    kept = {key: value for key, value in states[0].items() if key.startswith("start.")}
    assert any(not torch.equal(value, states[0][model_key(key)]) for key, value in kept.items())
    assert len(kept) < len(states[0]) / 2 + 1
    rows = [read_metrics(tmp_path / name) for name in ("whole", "broken")]
    assert rows[0] == rows[1]


def dying_at(step: int, original):
    """`training_step` of a process that dies before a step is done."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step:
            raise KeyError
        return original(self, batch, batch_idx)

    return training_step


def model_key(key: str) -> str:
    return "model." + key.removeprefix("start.weights.").replace("/", ".")


def read_metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_is_held_and_says_by_what(dataset, architectures, start_weights, tmp_path):
    given = (dataset, architectures["tiny-vit"], start_weights["tiny-vit"])
    moved = {}
    for name, loss in {"free": LossConfig(), "held": LossConfig(distill_feature=100.0, l2_start=0.5)}.items():
        fit(held_config(tmp_path / name, *given, loss, "full"))
        checkpoint = tmp_path / name / "checkpoints" / "last.ckpt"
        module = CLIPModule.load_from_checkpoint(checkpoint, weights_only=True).eval()
        plain = load_clip(given[1], given[2], device="cpu")
        expected = plain.embed_images(batch()["pixels"]), plain.embed_captions(batch()["tokens"])
        moved[name] = sum(
            float((a - b).detach().square().sum()) for a, b in zip(module.embed(batch()), expected, strict=True)
        )
        if module.start is not None:
            for ours, theirs in zip(module.embed_start(batch()), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert moved["held"] < 0.5 * moved["free"]
    steps = [row for row in read_metrics(tmp_path / "held") if row["train/loss"]]
    for row in steps:
        parts = [float(row[f"train/{name}"]) for name in ("contrastive", "distill_feature", "l2_start")]
        assert float(row["train/loss"]) == pytest.approx(sum(parts), rel=1e-5)
    assert "train/distill_logit" not in steps[0]
    assert "train/contrastive" not in read_metrics(tmp_path / "free")[0]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_run_is_held_in_any_precision(dataset, architectures, start_weights, tmp_path, precision, kind):
    loss = LossConfig(kind=kind, **HELD)
    config = held_config(tmp_path, dataset, architectures["tiny-vit"], start_weights["tiny-vit"], loss, "lora")
    fit(replace(config, trainer=replace(config.trainer, precision=precision, max_steps=3)))
    first, *_, last = [row for row in read_metrics(tmp_path) if row["train/loss"]]
    # Dropout apart, nothing has moved before the first step.
    assert float(first["train/l2_start"]) == 0
    assert all(0 < float(last[f"train/{name}"]) < 10 for name in HELD)
