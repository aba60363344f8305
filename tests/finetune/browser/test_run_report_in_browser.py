"""The report of a run in a real browser: what is seen, on a desk and on a phone, and what it must never do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from curate.clip import load_clip
from finetune import report
from finetune.config import EvaluateConfig, ZeroShotConfig
from finetune.evaluate import compare, evaluate_clip
from finetune.examples import examples
from finetune.sets import evaluation_sets
from tests.curate.browser.chromium import Browser, chromium
from tests.finetune import tiny
from tests.finetune.fitted import labelled_folder

HOSTILE = '"><script>window.pwned=1</script><img src=x onerror="window.pwned=2">'
SCRIPTS = ["猫の写真 きれい", "صورة قطة جميلة", "кот на окне", "चित्र बिल्ली का", HOSTILE]
SECTIONS = ("figures", "examples", "confusion", "similarity", "failures", "interpolation", "curves", "trained", "cost")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Two CLIPs of random weights stand for before and after: real evaluations, real pictures."""
    folder = tmp_path_factory.mktemp("run")
    sets = evaluation_sets(
        EvaluateConfig(zero_shot={"colours": ZeroShotConfig(images=labelled_folder(folder / "colours"))}),
        tiny.write_dataset(folder / "dataset"),
    )
    sets.retrieval[0].captions[: len(SCRIPTS)] = SCRIPTS
    sets.zero_shot[0].classes[:2] = SCRIPTS[-2:]
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        clip = load_clip(str(tiny.write_architecture("tiny-vit", folder)), device="cpu")
        found.append(evaluate_clip(clip.model, clip.preprocess, clip.tokenizer, sets, device=clip.device, batch_size=8))
    facts = {"model": "tiny", "adapter": "lora", "seconds": 75, "fingerprint": "f00d" * 16}
    points = [
        {"image": image / 2, "text": text / 2, "gain": (image + text) / 4, "keep": 0.5, "within": text < 2}
        for image in range(3)
        for text in range(3)
    ]
    goal = {"gain": "val/image_to_text/recall@1", "keep": ["retain/image_to_text/recall@1"], "budget": 0.01}
    files = {
        "config.yaml": yaml.safe_dump({"data": {"dataset": str(folder / "dataset")}}),
        "evaluation.json": json.dumps(compare(*found, facts)),
        "examples.json": json.dumps(examples(sets, *found)),
        "interpolation.json": json.dumps({"goal": goal, "chosen": {"image": 1.0, "text": 0.5}, "points": points}),
        "metrics.csv": "epoch,step,train/loss\n0,1,2.5\n0,2,1.5\n0,3,1.25\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    return report.run(folder)


@pytest.fixture(scope="module")
def browser() -> Browser:
    with chromium() as opened:
        yield opened


def test_every_section_and_picture_is_there_and_nothing_is_asked_for_or_run(browser, path):
    browser.open(path)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.run("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    browser.run("Promise.all([...document.images].map(i => i.decode()))")
    assert [name for name in SECTIONS if not browser.run(f"!!document.getElementById('{name}')")] == []
    links = browser.run("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert set(SECTIONS) <= set(links)
    assert browser.run("document.images.length") > 40
    assert browser.run("[...document.images].every(i => i.naturalWidth > 0)")
    assert [url for url in browser.requests if not url.startswith("data:image/jpeg;base64,")] == [path.as_uri()]
    assert browser.run("window.pwned") is None
    assert browser.complaints == []


def test_captions_of_any_script_stand_there_as_they_are(browser, path):
    browser.open(path)
    told = browser.run("document.getElementById('similarity').parentElement.textContent")
    for caption in SCRIPTS:
        assert caption[:50] in told


@pytest.mark.parametrize("dark", [False, True])
def test_a_cells_colour_rises_with_its_cosine_and_its_number_can_be_read(browser, path, dark):
    browser.open(path, dark=dark)
    cells = browser.run(
        """[...document.querySelectorAll('#similarity ~ details table.heat tbody td')].map(cell => {
          const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
          const light = colour => { paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
            const part = [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3)
              .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2]; };
          const style = getComputedStyle(cell);
          return [+cell.className.match(/heat-(\\d+)/)[1], light(style.backgroundColor), light(style.color)];
        })"""
    )
    assert len(cells) > 100
    grounds = dict(sorted((level, ground) for level, ground, _ in cells))
    assert list(grounds.values()) == sorted(grounds.values(), reverse=not dark)
    for _, ground, ink in cells:
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) >= 3.9


def test_on_a_phone_nothing_is_wider_than_the_page_and_tables_scroll_by_themselves(browser, path):
    browser.open(path, width=375, height=740)
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.run("[...document.querySelectorAll('.scroll')].every(part => part.tabIndex === 0)")
    widths = browser.run("[...document.querySelectorAll('.pair')].map(p => p.getBoundingClientRect().right)")
    assert widths
    assert max(widths) <= 375


def test_the_keyboard_reaches_links_and_sections_and_opens_them(browser, path):
    browser.open(path)
    browser.press("Tab")
    assert browser.run("document.activeElement.hash") == "#figures"
    browser.run("document.querySelectorAll('#examples ~ details summary')[0].focus()")
    was = browser.run("document.activeElement.parentElement.open")
    browser.press("Enter")
    assert browser.run("document.activeElement.parentElement.open") is not was
