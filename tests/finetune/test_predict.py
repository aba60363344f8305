"""Probabilities against the formula, and where images are found."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from PIL import Image

from curate.clip import Clip, load_clip
from curate.errors import ConfigError, InputError
from finetune.predict import find_images, predict
from tests.finetune.fitted import labelled_folder

QUERIES = ["red", "a green circle", "blue, please"]


@pytest.fixture(scope="module")
def clip(architectures) -> Clip:
    torch.manual_seed(0)
    return load_clip(architectures["tiny-vit"], device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return labelled_folder(tmp_path_factory.mktemp("labelled"))


def test_probabilities_are_the_softmax_over_queries_of_the_scaled_cosines(clip, folder):
    images, names = find_images([folder])
    found = predict(clip, images, names, QUERIES, batch_size=5)
    image = clip.embed_images([Image.open(name) for name in names]).double()
    cosine = image @ clip.embed_captions(QUERIES).double().T
    scaled = (clip.model.logit_scale.detach().double().exp() * cosine).exp()
    assert torch.allclose(found.probabilities.double(), scaled / scaled.sum(1, keepdim=True), atol=1e-6)
    assert torch.allclose(found.probabilities.sum(1), torch.ones(len(names)))


def test_files_and_folders_are_taken_in_order_and_hidden_ones_left_out(folder, tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "thumb.png").write_bytes(b"x")
    (tmp_path / "one.PNG").write_bytes((folder / "red" / "0.png").read_bytes())
    (tmp_path / "notes.txt").write_text("x")
    _, names = find_images([folder / "red" / "1.png", tmp_path])
    assert names == [str(folder / "red" / "1.png"), str(tmp_path / "one.PNG")]


def test_a_dataset_is_predicted_by_key(clip, dataset):
    images, names = find_images([dataset])
    assert len(names) == 56
    assert names[0] == "retain020000"
    assert predict(clip, images, names, QUERIES, batch_size=16).probabilities.shape == (56, 3)


def test_json_and_csv_hold_every_probability(clip, folder):
    images, names = find_images([folder / "red"])
    found = predict(clip, images, names, QUERIES, batch_size=8)
    read = json.loads(found.to_json())
    assert [row["image"] for row in read] == names
    table = list(csv.reader(io.StringIO(found.to_csv())))
    assert table[0] == ["image", *QUERIES]
    for row, line, expected in zip(read, table[1:], found.probabilities.tolist(), strict=True):
        assert list(row["probabilities"].values()) == expected
        assert [float(cell) for cell in line[1:]] == expected


def test_mistakes_are_one_line(clip, folder, tmp_path):
    images, names = find_images([folder])
    with pytest.raises(ConfigError, match="--queries"):
        predict(clip, images, names, [], batch_size=8)
    with pytest.raises(ConfigError, match="each once"):
        predict(clip, images, names, ["red", "red"], batch_size=8)
    with pytest.raises(InputError, match=r"nowhere: no such file"):
        find_images([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="no image found"):
        find_images([tmp_path])
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not whole")
    with pytest.raises(InputError, match=r"broken\.jpg: not a readable image"):
        predict(clip, *find_images([tmp_path / "broken.jpg"]), QUERIES, batch_size=8)
