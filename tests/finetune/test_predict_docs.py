"""docs/hands_on.ipynb and docs/predict.md, run from top to bottom with a small CLIP that knows colours."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.config import AdapterConfig, OptimizerConfig
from finetune.fit import fit
from tests.finetune import tiny
from tests.finetune.fitted import labelled_folder, tiny_config

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOK = DOCS / "hands_on.ipynb"
# As Jupyter does it: a cell's last expression is its result.
RUNNER = """
import ast, json, sys, warnings
warnings.simplefilter("error")
cells = json.loads(sys.stdin.read())
names, results = {"__name__": "__main__"}, []
for number, source in enumerate(cells):
    tree = ast.parse(source, f"cell {number}")
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), names)
    result = eval(compile(last, f"cell {number}", "eval"), names) if last else None
    results.append([type(result).__name__, getattr(result, "size", None)])
matrix = names["similarity"] - names["similarity"].mean(dim=0)
told = {
    "results": results,
    "accuracy": names["accuracy"],
    "probability": names["probabilities"].sum().item(),
    "diagonal": matrix.diagonal().mean().item(),
    "matrix": matrix.abs().mean().item(),
}
print("TOLD " + json.dumps(told))
"""


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return notebook["cells"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on coloured shapes, of a CLIP with OpenAI's 77 tokens."""
    folder = tmp_path_factory.mktemp("run")
    architecture = copy.deepcopy(tiny.ARCHITECTURES["tiny-vit"])
    architecture["quick_gelu"] = True
    architecture["text_cfg"]["context_length"] = 77
    (folder / "tiny-77.json").write_text(json.dumps(architecture))
    dataset = tiny.write_dataset(folder / "dataset", train=128, val=0, retain=0)
    config = tiny_config(folder / "run", dataset, str(folder / "tiny-77.json"), AdapterConfig(kind="full"), steps=100)
    model = replace(config.model, optimizer=OptimizerConfig(lr=3e-3))
    trainer = replace(config.trainer, val_check_interval=None)
    fit(replace(config, model=model, trainer=trainer, data=replace(config.data, batch_size=32)))
    return config.out


def test_it_is_stored_without_outputs_and_every_cell_has_a_name(cells):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
    names = [cell["id"] for cell in cells]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w-]{1,64}", name) for name in names)


def test_it_runs_and_shows_what_its_text_says(cells, run):
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(code),
        env=os.environ | {"HANDS_ON_MODEL": str(run), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    printed, _, told_line = done.stdout.partition("TOLD ")
    told = json.loads(told_line)
    assert "QuickGELU()" in printed
    assert "pictures (16, 16) · texts (16, 16)" in printed
    assert told["probability"] == pytest.approx(1, abs=1e-5)
    assert told["accuracy"] >= 0.75, printed
    assert told["diagonal"] > 1.5 * told["matrix"]
    assert [size for kind, size in told["results"] if kind == "Image"] == [
        [576, 144],
        [1024, 256],
        [96, 96],
        [544, 512],
        [728, 684],
    ]


@pytest.fixture
def desk(run, tmp_path, monkeypatch) -> Path:
    """A folder with all that docs/predict.md names, and no cache of OpenAI's."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "domain").symlink_to(run)
    labelled_folder(tmp_path / "photos")
    (tmp_path / "photo.jpg").write_bytes(tiny.picture("red", "circle", 7))
    shutil.copytree(run.parent / "dataset", tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_page_runs(desk, capsys):
    page = (DOCS / "predict.md").read_text(encoding="utf-8")
    commands = [line.strip() for line in page.splitlines() if line.startswith("    finetune predict")]
    assert len(commands) == 9
    for command in commands:
        _, *arguments = shlex.split(command.replace("--model ViT-B/32", "--model runs/domain"))
        assert main([*arguments, "--device", "cpu"]) == 0, command
        for name in ("--out", "--embeddings"):
            if name in arguments:
                assert (desk / arguments[arguments.index(name) + 1]).stat().st_size > 500
    assert "a full shelf" in capsys.readouterr().out


def test_the_python_of_the_page_runs(desk):
    page = (DOCS / "predict.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(source.replace('"ViT-B/32"', '"runs/domain"').replace("torch.cuda.is_available()", "False"), names)
    assert names["probabilities"].shape == (1, 3)
    assert names["image_features"].shape == (1, 16)
    assert names["text_features"].shape == (3, 16)
