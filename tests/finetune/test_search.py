"""Search against the whole similarity matrix, and the page it writes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image

from curate.clip import Clip, load_clip
from curate.errors import ConfigError, InputError
from curate.shards import ShardWriter
from finetune.embedding import find_pictures
from finetune.search import by_image, by_text, rows, search, write_csv, write_json, write_page
from tests.curate.pages import Page
from tests.finetune import tiny
from tests.finetune.fitted import labelled_folder

TEXTS = ["a red circle", "a blue square", "<script>alert(1)</script>"]


@pytest.fixture(scope="module")
def clip(architectures) -> Clip:
    torch.manual_seed(0)
    return load_clip(architectures["tiny-vit"], device="cpu")


def whole_matrix(clip: Clip, pictures, query_QD: torch.Tensor) -> torch.Tensor:
    image_ND = clip.embed_images([pictures.images.open(number) for number in range(len(pictures))])
    return query_QD @ image_ND.T


@pytest.mark.parametrize("batch_size", [3, 16, 100])
@pytest.mark.parametrize("best", [1, 7, 200])
def test_it_finds_what_the_whole_matrix_says(clip, dataset, batch_size, best):
    pictures = find_pictures([dataset])
    queries = by_text(clip, TEXTS, [], 2)
    torch.testing.assert_close(queries.embeddings, clip.embed_captions(TEXTS))
    found = search(clip, pictures, queries, best, batch_size)
    for of, score_N in zip(found, whole_matrix(clip, pictures, queries.embeddings), strict=True):
        assert len(of.results) == min(best, 56)
        expected = score_N.sort(descending=True).values[:best]
        torch.testing.assert_close(torch.tensor([score for _, score in of.results]), expected, atol=1e-5, rtol=0)
        numbers = [number for number, _ in of.results]
        assert len(set(numbers)) == len(numbers)
        torch.testing.assert_close(score_N[numbers], expected, atol=1e-5, rtol=0)


def test_the_nearest_of_an_image_is_itself_and_of_equal_ones_the_first(clip, dataset, tmp_path):
    pictures = find_pictures([dataset])
    pictures.images.open(33).save(tmp_path / "query.png")
    queries = by_image(clip, [tmp_path / "query.png"], 8)
    (found,) = search(clip, pictures, queries, 3, 10)
    assert found.results[0] == (33, pytest.approx(1, abs=1e-5))
    assert found.query == str(tmp_path / "query.png")
    folder = tmp_path / "same"
    folder.mkdir()
    for number in range(9):
        pictures.images.open(33).save(folder / f"{number}.png")
    (found,) = search(clip, find_pictures([folder]), queries, 4, 2)
    assert [number for number, _ in found.results] == [0, 1, 2, 3]
    (tmp_path / "text.jpg").write_text("x")
    with pytest.raises(InputError, match=r"text\.jpg: not a readable image"):
        by_image(clip, [tmp_path / "text.jpg"], 8)


def test_a_broken_image_is_never_found(clip, tmp_path):
    folder = labelled_folder(tmp_path / "colours")
    (folder / "a.jpg").write_text("x")
    pictures = find_pictures([folder])
    (found,) = search(clip, pictures, by_text(clip, ["red"], [], 8), 100, 4)
    assert len(found.results) == 16
    assert pictures.unreadable == {0}


def test_csv_and_json_have_a_row_a_result(clip, dataset):
    pictures = find_pictures([dataset])
    found = search(clip, pictures, by_text(clip, TEXTS, [], 8), 2, 16)
    expected = list(rows(found, pictures))
    assert [row[:2] for row in expected] == [(text, rank) for text in TEXTS for rank in (1, 2)]
    number, similarity = found[0].results[0]
    assert expected[0][2:] == (pictures.names[number], similarity, pictures.captions[number])
    file = io.StringIO()
    write_csv(found, pictures, file)
    header, *lines = csv.reader(io.StringIO(file.getvalue()))
    assert header == ["query", "rank", "image", "similarity", "caption"]
    assert [(q, int(rank), name, float(s), caption) for q, rank, name, s, caption in lines] == expected
    file = io.StringIO()
    write_json(found, pictures, file)
    assert [tuple(row.values()) for row in json.loads(file.getvalue())] == expected


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A dataset whose captions want out of their page."""
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    captions = ["</bdi><script>alert(2)</script>", '"><img src=x onerror=alert(3)>', "\u202eturned\x07", "a red circle"]
    with ShardWriter(tmp_path / "hostile" / "00000", schema, made_from="test") as shard:
        for number, caption in enumerate(captions):
            row = {"key": f"k{number}", "caption": caption}
            shard.add(row, tiny.picture(tiny.COLOURS[number], "circle", number), "png")
    return tmp_path / "hostile"


def test_the_page_shows_what_was_found_and_runs_nothing_of_it(clip, hostile, tmp_path):
    pictures = find_pictures([hostile])
    query = tmp_path / "query.png"
    Image.new("RGB", (50, 40), "red").save(query)
    for queries in (by_text(clip, TEXTS, [], 8), by_image(clip, [query], 8)):
        found = search(clip, pictures, queries, 3, 2)
        write_page(found, pictures, queries, tmp_path / "found.html", model="<b>m", where="</title><script>")
        page = Page((tmp_path / "found.html").read_text(encoding="utf-8"))
        page.assert_inert()
        shown = page.all("img")
        assert len(shown) == 3 * len(queries.names) + (queries.images is not None)
        for each in shown:
            assert each["src"].startswith("data:image/jpeg;base64,")
        assert f"{found[0].results[0][1]:.3f}" in page.source
        assert "alert(2)" in page.source or "alert(3)" in page.source


def test_a_page_of_too_many_pictures_is_refused(clip, dataset, tmp_path):
    pictures = find_pictures([dataset])
    queries = by_text(clip, [f"text {number}" for number in range(40)], [], 64)
    found = search(clip, pictures, queries, 50, 64)
    with pytest.raises(ConfigError, match=r"best: more than 1,500 pictures on a page"):
        write_page(found, pictures, queries, tmp_path / "found.html", model="m", where="d")
    assert not (tmp_path / "found.html").exists()
