"""The page of `finetune predict --dataset … --out found.html` in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from curate.clip import load_clip
from finetune.embedding import find_pictures
from finetune.search import by_image, by_text, search, write_page
from tests.curate.browser.chromium import Browser, chromium
from tests.finetune import tiny

HOSTILE = '"><script>window.pwned=1</script><img src=x onerror="window.pwned=2">'


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> tuple[Path, Path]:
    """One page found by text, one by image."""
    folder = tmp_path_factory.mktemp("search")
    torch.manual_seed(0)
    clip = load_clip(str(tiny.write_architecture("tiny-vit", folder)), device="cpu")
    pictures = find_pictures([tiny.write_dataset(folder / "dataset")])
    (folder / "query.png").write_bytes(tiny.picture("red", "circle", 3))
    asked = (by_text(clip, ["a red circle", HOSTILE], [], 8), by_image(clip, [folder / "query.png"], 8))
    paths = (folder / "text.html", folder / "image.html")
    for queries, path in zip(asked, paths, strict=True):
        found = search(clip, pictures, queries, 56, 16)
        write_page(found, pictures, queries, path, model="tiny", where="dataset")
    return paths


@pytest.fixture(scope="module")
def browser() -> Browser:
    with chromium() as opened:
        yield opened


def test_it_shows_every_picture_asks_for_nothing_and_runs_nothing_of_what_it_shows(browser, pages):
    for path, pictures in zip(pages, (112, 57), strict=True):
        browser.open(path)
        browser.run("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
        browser.run("Promise.all([...document.images].map(i => i.decode()))")
        assert browser.run("[...document.images].filter(i => i.naturalWidth > 0).length") == pictures
        assert [url for url in browser.requests if not url.startswith("data:image/jpeg;base64,")] == [path.as_uri()]
        assert browser.run("window.pwned") is None
        assert browser.complaints == []
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_queries_stand_there_as_text_and_results_are_found_by_their_caption(browser, pages):
    browser.open(pages[0])
    assert HOSTILE in browser.run("document.querySelectorAll('summary h3')[1].textContent")
    browser.run("document.getElementById('find').focus()")
    browser.write("red circle")
    shown = browser.run("[...document.querySelectorAll('figure')].filter(f => !f.hidden).map(f => f.textContent)")
    assert 0 < len(shown) < 112
    assert all("a red circle" in text for text in shown)
    assert browser.run("document.getElementById('found').textContent") == f"{len(shown)} of 112"


def test_it_fits_a_telephone(browser, pages, tmp_path):
    browser.open(pages[0], width=390, height=800, dark=True)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    browser.screenshot(tmp_path / "phone.png")
    assert (tmp_path / "phone.png").stat().st_size > 5_000
