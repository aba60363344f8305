"""The loop closes: what `finetune` exports scores the next `curate build`, which then keeps other pairs."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curate.cli import main
from curate.clip import load_clip
from finetune.config import AdapterConfig, ClipConfig
from finetune.export import write_open_clip
from finetune.fit import fit
from finetune.runs import checkpoint_of, load_trained_clip
from tests.finetune import tiny
from tests.finetune.fitted import tiny_config

PAIRS = 48  # every third with the caption of another colour


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A CLIP with random weights, as open_clip loads it."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    write_open_clip(load_clip(str(tiny.write_architecture("tiny-vit", folder)), device="cpu"), folder)
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, base) -> Path:
    """The same adapted to coloured shapes by LoRA, and exported."""
    folder = tmp_path_factory.mktemp("adapted")
    dataset = tiny.write_dataset(folder / "dataset", train=128, val=16, retain=0)
    config = tiny_config(folder / "run", dataset, "unused", AdapterConfig(kind="lora", rank=8), steps=100)
    clip = ClipConfig(name=f"local-dir:{base}")
    trainer = replace(config.trainer, val_check_interval=20)
    fit(replace(config, trainer=trainer, model=replace(config.model, clip=clip)))
    to = folder / "clip"
    to.mkdir()
    write_open_clip(load_trained_clip(checkpoint_of(folder / "run"), "cpu"), to)  # as `finetune export` does
    return to


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Images with a caption beside each; those of every third are wrong."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(PAIRS):
        colour, shape = tiny.COLOURS[number % 8], tiny.SHAPES[number // 8 % 2]
        (folder / f"{number:02d}.png").write_bytes(tiny.picture(colour, shape, 5000 + number))
        told = tiny.COLOURS[(number + 3) % 8] if number % 3 == 0 else colour
        (folder / f"{number:02d}.txt").write_text(f"a {told} {shape}")
    return folder


def cosines(clip: Path, pairs: list[tuple[Image.Image, str]]) -> np.ndarray:
    """Of image and caption, by open_clip alone."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    with torch.no_grad():
        image_ND = model.eval().encode_image(torch.stack([preprocess(image) for image, _ in pairs]), normalize=True)
        text_ND = model.encode_text(tokenizer([caption for _, caption in pairs]), normalize=True)
    return (image_ND * text_ND).sum(1).numpy()


def test_a_build_scores_and_chooses_by_the_adapted_clip(base, adapted, pictures, tmp_path):
    out, recipe = tmp_path / "dataset", tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "fetch": {"processes": 1, "min_side": 1},
                "filters": [{"name": "aligned", "top": {"by": "clip_score", "fraction": 0.5}}],
                "pack": {"val": 0, "test": 0},
            }
        )
    )
    clip = ["--measure.clip.name", f"local-dir:{adapted}", "--measure.clip.device", "cpu"]
    main(["build", "--urls", str(pictures), "--out", str(out), "--config", str(recipe), *clip])

    shards = sorted((out / "shards").glob("train-*.parquet"))
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    stored = {}
    for shard in shards:
        with tarfile.open(shard.with_suffix(".tar")) as tar:
            stored |= {Path(m.name).stem: tar.extractfile(m).read() for m in tar if m.name.endswith(".png")}
    pairs = [(Image.open(io.BytesIO(stored[row["key"]])).convert("RGB"), row["caption"]) for row in rows]
    told = np.array([row["clip_score"] for row in rows])
    np.testing.assert_allclose(told, cosines(adapted, pairs), atol=1e-5)
    assert np.abs(told - cosines(base, pairs)).max() > 0.1

    names = sorted(path.stem for path in pictures.glob("*.png"))
    given = [(Image.open(pictures / f"{n}.png").convert("RGB"), (pictures / f"{n}.txt").read_text()) for n in names]

    def best(clip: Path) -> set[str]:
        return {names[place] for place in np.argsort(-cosines(clip, given))[: PAIRS // 2]}

    kept = {Path(row["url"]).stem for row in rows}
    assert kept == best(adapted) != best(base)

    def right(chosen: set[str]) -> int:
        return sum(int(name) % 3 != 0 for name in chosen)

    assert right(kept) >= 22 > right(best(base)), "an adapted CLIP knows which captions are wrong"
