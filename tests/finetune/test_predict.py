"""Predictions and embeddings against the formula, as a stream, and what is written of them."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from pathlib import Path

import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curate.clip import Clip, load_clip
from curate.errors import ConfigError, InputError, ModelError, UnwantedResult
from finetune.embedding import find_pictures
from finetune.predict import predict, table_rows, write_csv, write_embeddings, write_json, write_predictions
from finetune.prompts import openai_imagenet_templates
from finetune.runs import load_named
from finetune.tables import prediction_table
from tests.finetune.fitted import labelled_folder

QUERIES = ["red", "a green circle", "blue, please"]


@pytest.fixture(scope="module")
def clip(architectures) -> Clip:
    torch.manual_seed(0)
    return load_clip(architectures["tiny-vit"], device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return labelled_folder(tmp_path_factory.mktemp("labelled"))


@pytest.fixture
def broken(folder, tmp_path) -> list[Path]:
    """Five images, of which the second is text, the fourth cut short."""
    whole = sorted((folder / "red").iterdir()) + sorted((folder / "blue").iterdir())
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(whole[0].read_bytes()[:300])
    return [whole[0], tmp_path / "text.jpg", whole[1], tmp_path / "cut.png", whole[2]]


def expected_logits(clip: Clip, names, queries) -> torch.Tensor:
    image = clip.embed_images([Image.open(name) for name in names]).double()
    return clip.model.logit_scale.detach().double().exp() * image @ clip.embed_captions(queries).double().T


# --- figures ----------------------------------------------------------------------------------------------------------


def test_probabilities_are_the_softmax_over_queries_of_the_scaled_cosines(clip, folder):
    pictures = find_pictures([folder])
    batches = list(predict(clip, pictures, QUERIES, batch_size=5))
    assert [len(batch.images) for batch in batches] == [5, 5, 5, 1]
    assert [name for batch in batches for name in batch.images] == pictures.names
    logits = expected_logits(clip, pictures.names, QUERIES)
    assert torch.allclose(torch.cat([batch.logits for batch in batches]).double(), logits, atol=1e-5)
    odds = logits.exp()
    found = torch.cat([batch.probabilities for batch in batches]).double()
    assert torch.allclose(found, odds / odds.sum(1, keepdim=True), atol=1e-6)


def test_with_templates_a_query_is_the_mean_of_its_prompts(clip, folder):
    pictures = find_pictures([folder / "red"])
    templates = ["a {} circle", "{}!"]
    (found,) = predict(clip, pictures, ["red", "blue"], templates=templates)
    texts = [
        sum(clip.embed_captions([t.replace("{}", name)]).double()[0] for t in templates) for name in ("red", "blue")
    ]
    text = torch.nn.functional.normalize(torch.stack(texts), dim=-1)
    image = clip.embed_images([Image.open(name) for name in pictures.names]).double()
    expected = clip.model.logit_scale.detach().double().exp() * image @ text.T
    assert torch.allclose(found.logits.double(), expected, atol=1e-5)
    (imagenet,) = predict(clip, pictures, ["red", "blue"], templates=["imagenet"])
    (spelled_out,) = predict(clip, pictures, ["red", "blue"], templates=openai_imagenet_templates())
    assert torch.equal(imagenet.logits, spelled_out.logits)


def test_a_text_that_is_cut_is_told(clip, folder, caplog):
    pictures = find_pictures([folder / "red"])
    fits, cut = "cat " * 14, "cat " * 15  # with start and end 16 and 17 tokens; the tiny CLIP reads 16
    with caplog.at_level(logging.WARNING, "cliptailor"):
        next(predict(clip, pictures, [fits, "red"]))
        assert not caplog.records
        next(predict(clip, pictures, [cut, "red"]))
    assert [record.getMessage().partition(" has ")[2] for record in caplog.records] == [
        "17 tokens, of which this CLIP reads 16; say it shorter"
    ]


def test_weights_of_an_architecture_with_a_name_are_one_word(clip, architectures, tmp_path, caplog):
    torch.save(clip.model.state_dict(), tmp_path / "epoch_3.pt")
    open_clip.add_model_config(architectures["tiny-vit"])
    found = load_named(f"tiny-vit/{tmp_path / 'epoch_3.pt'}", "cpu")
    assert torch.equal(found.embed_captions(QUERIES), clip.embed_captions(QUERIES))
    with pytest.raises(ModelError):  # a head of 32: none of OpenAI's
        load_named(str(tmp_path / "epoch_3.pt"), "cpu")
    assert f"Was it trained with GELU? Then say its architecture, too: ViT-B-32/{tmp_path}" in caplog.text


# --- images -----------------------------------------------------------------------------------------------------------


def test_files_and_folders_are_taken_in_order_and_hidden_ones_left_out(folder, tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "thumb.png").write_bytes(b"x")
    (tmp_path / "one.PNG").write_bytes((folder / "red" / "0.png").read_bytes())
    (tmp_path / "notes.txt").write_text("x")
    names = find_pictures([folder / "red" / "1.png", tmp_path]).names
    assert names == [str(folder / "red" / "1.png"), str(tmp_path / "one.PNG")]


def test_a_folder_named_like_an_image_is_none(folder, tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "a.png" / "one.png").write_bytes((folder / "red" / "0.png").read_bytes())
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert find_pictures([tmp_path]).names == [str(tmp_path / "a.png" / "one.png"), str(tmp_path / "gone.png")]


def test_a_dataset_beside_something_else_is_refused(folder, dataset):
    for paths in ([dataset, folder], [folder, dataset], [dataset, dataset]):
        with pytest.raises(ConfigError, match=f"images: {dataset} is a dataset; give it alone, or folders and files"):
            find_pictures(paths)


def test_a_dataset_is_predicted_by_key(clip, dataset):
    pictures = find_pictures([dataset])
    assert len(pictures) == 56
    assert pictures.names[0] == "retain020000"
    assert pictures.captions[0] == "a red circle"
    (found,) = predict(clip, pictures, QUERIES, batch_size=64)
    assert found.probabilities.shape == (56, 3)


def test_broken_images_are_a_line_each_counted_and_left_out(clip, broken, caplog):
    pictures = find_pictures(broken)
    with caplog.at_level(logging.WARNING, "cliptailor"):
        batches = list(predict(clip, pictures, QUERIES, batch_size=2))
    names = [str(broken[place]) for place in (0, 2, 4)]
    assert [name for batch in batches for name in batch.images] == names
    logits = torch.cat([batch.logits for batch in batches])
    assert torch.allclose(logits.double(), expected_logits(clip, names, QUERIES), atol=1e-5)
    said = sorted(record.getMessage() for record in caplog.records)
    assert len(said) == 2
    assert said[0].startswith(f"{broken[3]}: not a readable image (")
    assert said[1].startswith(f"{broken[1]}: not a readable image (of no known format)")
    with pytest.raises(UnwantedResult, match="2 of 5 images could not be read, each named above; the result is of"):
        pictures.check_all_read()


def test_a_folder_is_a_stream(clip, folder, monkeypatch):
    """Of 16 images in batches of 2, at most two batches are ahead of what was asked for."""
    pictures = find_pictures([folder])
    opened = []
    monkeypatch.setattr(type(pictures.images), "open", lambda _, n: opened.append(n) or Image.new("RGB", (40, 40)))
    stream = predict(clip, pictures, QUERIES, batch_size=2)
    assert not opened
    for given in range(1, 6):
        next(stream)
        assert len(opened) <= 2 * (given + 1)


# --- what is written --------------------------------------------------------------------------------------------------


def test_csv_and_parquet_hold_every_logit_and_probability_best_first(clip, folder, tmp_path):
    pictures = find_pictures([folder])
    (found,) = predict(clip, pictures, QUERIES)
    expected = []
    for name, logits, shares in zip(found.images, found.logits.tolist(), found.probabilities.tolist(), strict=True):
        order = sorted(range(3), key=lambda query, logits=logits: -logits[query])
        expected += [(name, rank, QUERIES[q], logits[q], shares[q]) for rank, q in enumerate(order, start=1)]
    write_predictions(predict(clip, pictures, QUERIES, batch_size=16), tmp_path / "new" / "found.csv")
    with (tmp_path / "new" / "found.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "rank", "text", "logit", "probability"]
    assert [(name, int(rank), text, float(x), float(p)) for name, rank, text, x, p in rows] == expected
    write_predictions(predict(clip, pictures, QUERIES, batch_size=16), tmp_path / "found.parquet")
    assert [tuple(row.values()) for row in pq.read_table(tmp_path / "found.parquet").to_pylist()] == expected
    file = io.StringIO()
    write_csv([found], file)
    assert file.getvalue() == (tmp_path / "new" / "found.csv").read_text()


def test_a_file_name_that_is_not_utf_8_is_written_in_ascii(clip, folder, tmp_path):
    (tmp_path / "images").mkdir()
    odd = tmp_path / "images" / os.fsdecode(b"caf\xe9.png")
    odd.write_bytes(next(folder.rglob("*.png")).read_bytes())
    pictures = find_pictures([tmp_path / "images"])
    write_predictions(predict(clip, pictures, QUERIES), tmp_path / "found.csv")
    assert "caf\\udce9.png" in (tmp_path / "found.csv").read_text(encoding="utf-8")
    write_predictions(predict(clip, pictures, QUERIES), tmp_path / "found.parquet")
    write_embeddings(clip, pictures, tmp_path / "embeddings.parquet", batch_size=1)
    for name in ("found", "embeddings"):
        assert pq.read_table(tmp_path / f"{name}.parquet")["image"][0].as_py() == f"{tmp_path}/images/caf\\udce9.png"


def test_json_is_a_list_of_images(clip, folder):
    pictures = find_pictures([folder / "red"])
    file = io.StringIO()
    write_json(predict(clip, pictures, QUERIES, batch_size=1), file)
    (found,) = predict(clip, pictures, QUERIES, batch_size=8)
    read = json.loads(file.getvalue())
    assert [row["image"] for row in read] == pictures.names
    for row, logits, shares in zip(read, found.logits.tolist(), found.probabilities.tolist(), strict=True):
        assert row["logits"] == pytest.approx(dict(zip(QUERIES, logits, strict=True)), abs=1e-5)
        assert row["probabilities"] == pytest.approx(dict(zip(QUERIES, shares, strict=True)), abs=1e-6)
    empty = io.StringIO()
    write_json([], empty)
    assert json.loads(empty.getvalue()) == []


def test_the_table_has_the_best_queries_and_takes_brackets_as_they_are(clip, folder):
    (found,) = predict(clip, find_pictures([folder / "red"]), ["[bold]red", "green", "blue"])
    table = prediction_table(table_rows([found]), top=2)
    assert [column.header for column in table.columns] == ["image", "1.", "2."]
    cells = [str(cell) for cell in table.columns[1].cells]
    for cell, logits, shares in zip(cells, found.logits, found.probabilities, strict=True):
        best = int(logits.argmax())
        assert cell == f"{shares[best]:6.1%}  {found.texts[best]}  (logit {logits[best]:.2f})"


def test_embeddings_are_written_as_they_are(clip, broken, tmp_path):
    write_embeddings(clip, find_pictures(broken), tmp_path / "found.parquet", batch_size=2)
    table = pq.read_table(tmp_path / "found.parquet")
    names = [str(broken[place]) for place in (0, 2, 4)]
    assert table["image"].to_pylist() == names
    expected = clip.embed_images([Image.open(name) for name in names])
    torch.testing.assert_close(torch.tensor(table["embedding"].to_pylist()), expected)


def test_a_file_that_fails_midway_leaves_the_old_one(clip, folder, tmp_path):
    (tmp_path / "found.csv").write_text("before")

    def stream():
        yield next(predict(clip, find_pictures([folder]), QUERIES, batch_size=2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(stream(), tmp_path / "found.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["found.csv"]
    assert (tmp_path / "found.csv").read_text() == "before"


def test_mistakes_are_one_line(clip, folder, tmp_path):
    pictures = find_pictures([folder])
    with pytest.raises(ConfigError, match="text: expected at least one"):
        next(predict(clip, pictures, []))
    with pytest.raises(ConfigError, match="each once"):
        next(predict(clip, pictures, ["red", "red"]))
    with pytest.raises(ConfigError, match="needs exactly one"):
        next(predict(clip, pictures, ["red"], templates=["a photo"]))
    with pytest.raises(InputError, match=r"nowhere: no such file"):
        find_pictures([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="no image found"):
        find_pictures([tmp_path])
