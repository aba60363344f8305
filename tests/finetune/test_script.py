"""The plain Lightning script of docs/finetune.md, on a tiny CLIP; its checkpoint through the real `finetune export`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import open_clip
import torch

from finetune.runs import load_trained_clip

DOCS = Path(__file__).parents[2] / "docs" / "finetune.md"


def run(folder: Path, *words: str) -> str:
    ended = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_script_of_the_documentation_trains_and_its_checkpoint_is_exported(dataset, architectures, tmp_path):
    script = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[1]
    for ours, tiny in {
        '"ViT-B/32", "pretrained": "openai"': f'{architectures["tiny-vit"]!r}, "pretrained": None',
        'dataset="dataset", batch_size=256': f"dataset={str(dataset)!r}, batch_size=8, num_workers=0",
        "max_epochs=10": 'max_epochs=1, accelerator="cpu"',
    }.items():
        assert ours in script
        script = script.replace(ours, tiny)
    run(tmp_path, "-c", script)
    checkpoint = next(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))
    said = run(tmp_path, "-m", "finetune", "export", "--run", str(checkpoint), "--out", "clip")
    assert "local-dir:clip" in said
    trained = load_trained_clip(checkpoint, "cpu").model.eval()
    exported = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}").eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(trained.encode_image(pixels), exported.encode_image(pixels), atol=1e-5)
