"""The goal of a run, the way from start to end, and a run that chooses by both."""

from __future__ import annotations

import copy
import csv
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from curate.clip import load_clip
from curate.errors import ConfigError, ModelError
from finetune import report
from finetune.adapters import adapt, merge, scale_lora
from finetune.config import TOWERS, AdapterConfig, ClipConfig, FitConfig, KeepConfig, OptimizerConfig
from finetune.evaluate import Evaluation, Ranking
from finetune.export import export
from finetune.fit import fit
from finetune.interpolate import END, START, Alpha, Point, choose, grid, interpolated, plain_copy, save
from finetune.keep import Goal, goal
from finetune.module import CLIPModule
from finetune.runs import INTERPOLATED, checkpoint_of, load_module, load_trained_clip
from tests.finetune.fitted import tiny_config

WAYS = ("image_to_text", "text_to_image")
GAIN, KEEP = "val/image_to_text/recall@1", "retain/image_to_text/recall@1"


# --- the goal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ((0.6, 0.79), (0.5, 0.80)),  # both within a point of 0.8: the gain decides
        ((0.1, 0.79), (0.9, 0.78)),  # within is better than beyond, whatever was gained
        ((0.0, 0.79), (0.9, 0.78)),
        ((0.2, 0.75), (0.9, 0.70)),  # both beyond: the nearer
    ],
)
def test_a_clip_within_the_budget_is_better_than_any_beyond_it(better, worse):
    aim = Goal(GAIN, (KEEP,), 0.01)
    start = {GAIN: 0.3, KEEP: 0.8}
    assert aim.score(start, dict(zip((GAIN, KEEP), better, strict=True))) > aim.score(
        start, dict(zip((GAIN, KEEP), worse, strict=True))
    )


def test_what_is_kept_is_the_mean_and_a_lower_rank_is_a_gain():
    aim = Goal("val/image_to_text/median_rank", ("a", "b"), 0.01)
    start = {"val/image_to_text/median_rank": 9.0, "a": 0.5, "b": 0.5}
    first = start | {"val/image_to_text/median_rank": 3.0, "a": 0.6, "b": 0.4}  # one lost what the other won
    assert aim.forgotten(start, first) == pytest.approx(0)
    assert aim.score(start, first) > aim.score(start, start) > 0


def test_without_a_retain_split_nothing_is_weighed_and_wrong_metrics_are_errors():
    names = [GAIN, KEEP, "val/image_to_text/median_rank"]
    assert goal(KeepConfig(), GAIN, names) == Goal(GAIN, (KEEP,), 0.01)
    assert goal(KeepConfig(), GAIN, [GAIN]) is None
    assert goal(KeepConfig(metrics=[]), GAIN, names) is None
    assert goal(KeepConfig(), "val/loss", names) is None
    with pytest.raises(ConfigError, match=r"keep\.metrics: nothing measures 'retain/image_to_text/recal@1'. Did you"):
        goal(KeepConfig(metrics=["retain/image_to_text/recal@1"]), GAIN, names)
    with pytest.raises(ConfigError, match=r"keep\.metrics: .*median_rank is better when it is lower"):
        goal(KeepConfig(metrics=["val/image_to_text/median_rank"]), GAIN, names)
    with pytest.raises(ConfigError, match=r"needs an evaluate\.monitor other than val/loss"):
        goal(KeepConfig(metrics=[KEEP]), "val/loss", names)


# --- from start to end ------------------------------------------------------------------------------------------------


def clips(architecture: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(load_clip(architecture, device="cpu").model.state_dict())
    return states[0], states[1]


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet"])
def test_the_weights_are_those_on_the_line_and_each_tower_has_its_own_share(architectures, name):
    start, end = clips(architectures[name])
    end["logit_scale"] += 1
    between = interpolated(start, end, Alpha(image=0.25, text=0.5))
    assert between.keys() == end.keys()
    for key, value in between.items():
        share = 0.375 if key == "logit_scale" else 0.25 if key.startswith("visual.") else 0.5
        expected = (1 - share) * start[key].double().numpy() + share * end[key].double().numpy()
        if value.is_floating_point():
            np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=1e-6, err_msg=key)
    for alpha, state in ((START, start), (END, end)):
        for key, value in interpolated(start, end, alpha).items():
            assert torch.equal(value, (end if not value.is_floating_point() else state)[key]), key


def test_clips_of_two_architectures_are_refused(architectures):
    with pytest.raises(ModelError, match="no CLIPs of one architecture"):
        interpolated(clips(architectures["tiny-vit"])[0], clips(architectures["tiny-resnet"])[0], START)


def test_the_grid_has_both_ends_and_apart_every_pair():
    assert grid(4) == [Alpha(a, a) for a in (0, 0.25, 0.5, 0.75, 1)]
    assert len(set(grid(4, apart=True))) == 25
    assert {START, END} <= set(grid(3, apart=True))


def point(alpha: float, gained: int, kept: int) -> Point:
    """A CLIP that gets so many of 100 right."""

    def ranking(right: int) -> Ranking:
        return Ranking([1] * right + [2] * (100 - right), 100, [1.0] * 100)

    rankings = {f"{name}/{way}": ranking(n) for name, n in (("val", gained), ("retain", kept)) for way in WAYS}
    return Point(Alpha(alpha, alpha), Evaluation("", rankings))


def test_the_best_within_the_budget_is_chosen_and_of_equals_what_keeps_more():
    aim = Goal(GAIN, (KEEP,), 0.01)
    curve = [point(0, 40, 80), point(0.25, 60, 79), point(0.5, 60, 81), point(0.75, 70, 78), point(1, 75, 60)]
    assert choose(curve, aim).alpha == Alpha(0.5, 0.5)
    assert choose(curve, replace(aim, budget=0.02)).alpha == Alpha(0.75, 0.75)
    assert choose([point(0, 40, 80), point(1, 75, 60)], aim).alpha == START


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_a_scaled_lora_is_the_merged_one_interpolated(architectures, variant):
    start = clips(architectures["tiny-vit"])[0]
    model = load_clip(architectures["tiny-vit"], device="cpu").model
    model.load_state_dict(start)
    adapt(model, AdapterConfig(rank=4, variant=variant))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    whole, part = copy.deepcopy(model), copy.deepcopy(model)
    alpha = Alpha(image=0.3, text=0.8)
    scale_lora(part, alpha.of)
    merge(whole)
    merge(part)
    expected = interpolated(start, whole.state_dict(), alpha)
    for name, value in part.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_variants_whose_update_is_not_linear_cannot_be_scaled(architectures, variant):
    model = load_clip(architectures["tiny-vit"], device="cpu").model
    adapt(model, AdapterConfig(rank=4, variant=variant))
    with pytest.raises(ModelError, match="--checkpoint last"):
        scale_lora(model, END.of)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory, dataset, architectures) -> Path:
    """An export of a CLIP that knows something: what can be lost."""
    folder = tmp_path_factory.mktemp("start")
    config = tiny_config(folder / "run", dataset, architectures["tiny-vit"], AdapterConfig(kind="full"), steps=15)
    fit(replace(config, model=replace(config.model, optimizer=OptimizerConfig(lr=1e-3))))
    export(folder / "run", folder / "clip")
    return folder / "clip"


def config_of(out: Path, dataset: Path, start: Path, adapter: AdapterConfig, lr: float, **keep) -> FitConfig:
    config = tiny_config(out, dataset, "unused", adapter, steps=12)
    model = replace(
        config.model, clip=ClipConfig(name=f"local-dir:{start}"), optimizer=OptimizerConfig(lr=lr, warmup=0)
    )
    return replace(config, model=model, keep=KeepConfig(**keep))


@pytest.fixture(scope="module")
def ruined(tmp_path_factory, dataset, start) -> FitConfig:
    """A run that ruins the CLIP from its first steps on: whatever is good lies before them."""
    config = config_of(tmp_path_factory.mktemp("ruined") / "run", dataset, start, AdapterConfig(kind="full"), 0.3)
    fit(config)
    return config


def told(config: FitConfig) -> dict:
    return json.loads((config.out / "interpolation.json").read_text())


def evaluated(config: FitConfig) -> dict:
    return json.loads((config.out / "evaluation.json").read_text())


def test_a_run_that_ruins_the_clip_exports_what_lies_before_the_ruin(ruined, start, tmp_path):
    found, written = told(ruined), evaluated(ruined)
    first, last = found["points"][0], found["points"][-1]
    assert len(found["points"]) == 11
    assert first["within"]
    for point in found["points"]:
        for name in ("gain", "keep"):
            low, high = point[f"{name}_interval"]
            assert low <= point[name] <= high
    assert not last["within"]
    assert first["keep"] == written["before"][KEEP]["value"] > last["keep"] + 0.1
    chosen = next(p for p in found["points"] if {t: p[t] for t in TOWERS} == found["chosen"])
    assert chosen["within"]
    assert written["after"][GAIN]["value"] == chosen["gain"] == max(p["gain"] for p in found["points"] if p["within"])
    assert written["after"][KEEP]["value"] == chosen["keep"]
    assert written["facts"]["checkpoint"].startswith("interpolated.ckpt (α = ")

    assert checkpoint_of(ruined.out).name == "interpolated.ckpt"
    export(ruined.out, tmp_path / "clip")
    end = load_trained_clip(checkpoint_of(ruined.out, "last"), "cpu").model.state_dict()
    alpha = Alpha(**found["chosen"])
    expected = interpolated(load_clip(f"local-dir:{start}", device="cpu").model.state_dict(), end, alpha)
    for name, value in load_clip(f"local-dir:{tmp_path / 'clip'}", device="cpu").model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_the_best_checkpoint_is_the_one_with_the_best_trade_off(ruined):
    with (ruined.out / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("trade_off")]
    before = evaluated(ruined)["before"][KEEP]["value"]
    for row in rows:
        beyond = before - float(row[KEEP]) - 0.01
        assert float(row["trade_off"]) == pytest.approx(-beyond if beyond > 0 else float(row[GAIN]), abs=1e-5)
    assert len(rows) == 4
    best = max(rows, key=lambda row: float(row["trade_off"]))
    saved = torch.load(ruined.out / "checkpoints" / "best.ckpt", weights_only=True)  # noqa: TID251 - our own file
    assert saved["global_step"] == int(best["step"]) + 1


def test_the_report_draws_the_curve_and_names_what_is_exported(ruined):
    page = report.run(ruined.out).read_text()
    assert "Between start and end" in page
    assert page.count("beyond the budget") == sum(not point["within"] for point in told(ruined)["points"])
    assert page.count(">exported<") == 1


def test_a_lora_interpolated_by_tower_comes_back_from_its_exports(tmp_path, dataset, start):
    """α of each tower: open_clip, and plain peft in a fresh process, embed as start + α · (end - start) does."""
    config = config_of(
        tmp_path / "run", dataset, start, AdapterConfig(kind="lora", rank=4), 1e-2, towers_apart=True, interpolate=3
    )
    fit(config)
    found, alpha = told(config), Alpha(image=0.25, text=0.75)
    assert len(found["points"]) == 16
    # Which α is best hangs on a few samples here; what is to come back is one inside, and another for each tower.
    last = checkpoint_of(config.out, "last")
    begun, end = load_clip(f"local-dir:{start}", device="cpu"), load_trained_clip(last, "cpu")
    first, trained = dict(begun.model.state_dict()), copy.deepcopy(end.model.state_dict())
    save(config.out / "checkpoints" / INTERPOLATED, begun, end, alpha, dict(load_module(last).hparams))
    (config.out / "interpolation.json").write_text(json.dumps(found | {"chosen": asdict(alpha)}))
    shares = {name: 0.25 if name.startswith("visual.") else 0.75 for name in first}
    begun.model.load_state_dict({name: first[name] + shares[name] * (trained[name] - first[name]) for name in first})

    export(config.out, tmp_path / "clip")
    export(config.out, tmp_path / "adapter", "adapter")
    pixels, tokens = torch.rand(2, 3, 32, 32), torch.randint(1, 1000, (2, 16))
    tokens[:, 8] = 49407
    torch.save((pixels, tokens), tmp_path / "in.pt")
    script = f"""
import torch
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from curate.clip import load_clip
from finetune.attention import split_attention
model = load_clip("local-dir:{start}", device="cpu").model
split_attention(model)
inject_adapter_in_model(PeftConfig.from_pretrained("{tmp_path / "adapter"}"), model)
set_peft_model_state_dict(model, load_file("{tmp_path / "adapter" / "adapter_model.safetensors"}"))
pixels, tokens = torch.load("{tmp_path / "in.pt"}")
with torch.no_grad():
    torch.save((model.eval().encode_image(pixels), model.encode_text(tokens)), "{tmp_path / "out.pt"}")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True)
    by_peft = torch.load(tmp_path / "out.pt", weights_only=True)  # noqa: TID251 - our own file
    exported = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}")
    with torch.no_grad():
        by_open_clip, expected = (
            (model.eval().encode_image(pixels), model.encode_text(tokens)) for model in (exported, begun.model)
        )
    for a, b, c in zip(by_peft, by_open_clip, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-5)
        torch.testing.assert_close(b, c, rtol=0, atol=1e-5)


def test_what_is_interpolated_can_be_loaded_whatever_was_locked(tmp_path, architectures):
    """A ResNet's tower has no blocks that could be computed twice; while it is locked, nobody asks for that."""
    start = load_clip(architectures["tiny-resnet"], device="cpu")
    clip = {"name": architectures["tiny-resnet"], "pretrained": None}
    made = CLIPModule(clip, {"kind": "full", "lock": ["image"]}, compute={"gradient_checkpointing": True})
    save(tmp_path / "clip.ckpt", start, plain_copy(made.clip), Alpha(0.5, 0.5), dict(made.hparams))
    loaded = load_trained_clip(tmp_path / "clip.ckpt").model.state_dict()
    between = interpolated(start.model.state_dict(), plain_copy(made.clip).model.state_dict(), Alpha(0.5, 0.5))
    assert loaded.keys() == between.keys()
    for name, weight in between.items():
        torch.testing.assert_close(loaded[name], weight, msg=name)


def test_nothing_is_interpolated_where_nothing_is_kept(tmp_path, dataset, start, architectures):
    """Asked so; or from random weights."""
    off = config_of(tmp_path / "off", dataset, start, AdapterConfig(kind="lora"), 1e-3, interpolate=0)
    random = tiny_config(tmp_path / "random", dataset, architectures["tiny-vit"], AdapterConfig(), steps=3)
    for config in (off, random):
        fit(config)
        assert not (config.out / "interpolation.json").exists()
        assert checkpoint_of(config.out).name == "best.ckpt"
    assert "trade_off" in (off.out / "metrics.csv").read_text()
    assert "trade_off" not in (random.out / "metrics.csv").read_text()


def test_a_checkpoint_better_than_the_whole_way_is_exported_as_it_is(tmp_path, dataset, start):
    """One step of the way is the end alone, or the start: an end that kept and gained is taken."""
    config = config_of(tmp_path / "run", dataset, start, AdapterConfig(kind="full"), 1e-3, interpolate=1)
    fit(replace(config, trainer=replace(config.trainer, max_steps=30, val_check_interval=30)))
    found = told(config)
    assert found["points"][1]["gain"] > found["points"][0]["gain"]
    assert found["chosen"] is None
    assert checkpoint_of(config.out).name == "best.ckpt"
    assert load_module(checkpoint_of(config.out)).adapter.kind == "full"
