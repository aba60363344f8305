"""Every configuration that ships can be used as it is."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from curate.options import presets, read_config
from finetune.cli import main
from finetune.config import FitConfig

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ("few", "medium", "large")
RECIPES = [
    CONFIGS / "domain.yaml",
    *(CONFIGS / "finetune" / f"{name}.yaml" for name in ("lora", "full", "lit", "scratch", *SIZES)),
]
SHIPPED = [CONFIGS / "domain.yaml", *sorted((CONFIGS / "finetune").glob("*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_yaml_loads(path):
    assert isinstance(read_config(path, FitConfig), FitConfig)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_the_folder_of_its_run_and_an_existing_clip(path):
    import open_clip

    config = read_config(path, FitConfig)
    clip = config.model.clip
    assert config.out.parts[0] == "runs"
    assert clip.name in open_clip.list_models()
    assert clip.pretrained is None or clip.pretrained in open_clip.list_pretrained_tags_by_model(clip.name)


def keys(config: type) -> dict[str, Any]:
    hints = get_type_hints(config)
    return {name: keys(hint) if is_dataclass(hint) else None for name, hint in hints.items()}


def shape(tree: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    return {name: shape(tree[name], inner) if inner else None for name, inner in like.items() if name in tree}


def test_the_example_explains_every_key_in_a_line():
    text = (CONFIGS / "domain.yaml").read_text(encoding="utf-8")
    assert shape(yaml.safe_load(text), keys(FitConfig)) == keys(FitConfig)
    lines = [line for line in text.splitlines() if re.match(r"\s*\w+: +\S", line)]
    unexplained = [line for line in lines if not re.search(r"\S +# \S", line) and "clip:" not in line]
    assert not unexplained


def test_the_example_is_a_lora_of_openais_vit_b_32_in_the_devices_precision():
    config = read_config(CONFIGS / "domain.yaml", FitConfig)
    assert (config.model.clip.name, config.model.clip.pretrained) == ("ViT-B-32", "openai")
    assert (config.model.adapter.kind, config.trainer.precision) == ("lora", "auto")


def test_lit_locks_the_image_tower_and_scratch_starts_from_random_weights():
    assert read_config(CONFIGS / "finetune" / "lit.yaml", FitConfig).model.adapter.lock == ["image"]
    assert read_config(CONFIGS / "finetune" / "scratch.yaml", FitConfig).model.clip.pretrained is None


def test_every_recipe_ships_under_its_name():
    assert set(presets("finetune")) == {path.stem for path in (CONFIGS / "finetune").glob("*.yaml")}


@pytest.mark.parametrize("name", [*SIZES, "lora", "full", "lit", "scratch"])
def test_a_recipe_runs(name, dataset, architectures, tmp_path, capsys):
    """A step of it by its name, on a tiny CLIP and dataset: all that it says is taken as it is."""
    clip = f"--model.clip.name {architectures['tiny-vit']} --model.clip.pretrained null"
    data = f"--data.dataset {dataset} --data.batch_size 8 --data.num_workers 0"
    words = (
        f"fit --config {name} {clip} {data} --out {tmp_path / 'run'} --trainer.accelerator cpu --trainer.max_steps 1"
    )
    assert main(words.split()) == 0
    given = read_config(CONFIGS / "finetune" / f"{name}.yaml", FitConfig)
    made = read_config(tmp_path / "run" / "config.yaml", FitConfig)
    assert (made.model.adapter, made.model.optimizer) == (given.model.adapter, given.model.optimizer)
    assert "plan: steps   1 " in capsys.readouterr().err


def test_the_recipe_against_forgetting_holds_the_clip_in_every_way(dataset, architectures, tmp_path):
    """Replay, distillation, L2 to the start, and the way between start and end: each at work, not merely set."""
    from curate.clip import load_clip
    from finetune.export import write_open_clip

    (tmp_path / "start").mkdir()
    write_open_clip(load_clip(architectures["tiny-vit"], device="cpu"), tmp_path / "start")
    clip = f"--model.clip.name local-dir:{tmp_path / 'start'} --model.clip.pretrained null"
    data = f"--data.dataset {dataset} --data.batch_size 10 --data.num_workers 0 --out {tmp_path / 'run'}"
    steps = "--trainer.accelerator cpu --trainer.max_steps 3 --trainer.log_every_n_steps 1 --keep.interpolate 2"
    assert main(f"fit --config retain {clip} {data} {steps}".split()) == 0
    made, given = (
        read_config(path, FitConfig)
        for path in (tmp_path / "run" / "config.yaml", CONFIGS / "finetune" / "retain.yaml")
    )
    assert (made.model.adapter, made.model.optimizer, made.model.loss) == (
        given.model.adapter,
        given.model.optimizer,
        given.model.loss,
    )
    assert made.data.replay == 0.3
    assert made.model.optimizer.weight_decay == 0, "which pulls elsewhere than l2_start"
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/l2_start"]]
    assert float(rows[0]["train/l2_start"]) == float(rows[0]["train/distill_feature"]) == 0
    assert float(rows[-1]["train/l2_start"]) > 0 < float(rows[-1]["train/distill_feature"])
    assert len(json.loads((tmp_path / "run" / "interpolation.json").read_text())["points"]) == 3


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_by_size_names_its_sources(name):
    head = (CONFIGS / "finetune" / f"{name}.yaml").read_text(encoding="utf-8").partition("\nout:")[0]
    assert re.search(r"CLIP-LoRA|FLYP|Radford", head)
    assert f"--config {name} " in head
