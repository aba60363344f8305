"""The report in a real browser: what a click, a key, a slider and a search do, and what the page must never do."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curate import report
from curate.config import ReportConfig
from curate.files import write_parquet
from tests.curate.browser.chromium import Browser, chromium
from tests.curate.report_folder import CONFIG, FILTERS, Row, example_rows, jpeg, write_folder

HOSTILE = '"><script>window.pwned=1</script><img src=x onerror="window.pwned=2">\u202egpj </script><!--'
SCRIPTS = ["猫の写真 きれい", "صورة قطة جميلة", "кот на окне", "चित्र बिल्ली का", "👩‍🚀 rocket 🚀 photo"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    rows = example_rows()
    for row, caption in zip(rows, SCRIPTS, strict=False):
        row.caption = caption
    rows[5].caption = rows[6].url = HOSTILE
    rows[7].url = "javascript:window.pwned=3"
    write_folder(folder, rows)
    fetched = [row for row in rows if row.fetched]
    rng = np.random.default_rng(0)
    vectors = [vector.astype(np.float16) for vector in rng.normal(size=(len(fetched), 16))]
    keys = [row.key for row in fetched]
    groups = {
        "clip": {
            "clip_score": pa.array([row.clip_score for row in fetched], pa.float32()),
            "image_embedding": pa.array(vectors, pa.list_(pa.float16())),
        },
        "text": {"language": ["ja" if n == 0 else "en" for n, _ in enumerate(fetched)]},
        "safety": {"nsfw": pa.array([0.9 if n % 10 == 0 else 0.1 for n, _ in enumerate(fetched)], pa.float32())},
        "mine": {"sharp": [float(n % 7) for n, _ in enumerate(fetched)], "note": ["x"] * len(fetched)},
    }
    for group, columns in groups.items():
        table = pa.table({"key": keys, **columns})
        write_parquet(table, folder / "signals" / group / "00000.parquet", made_from="raw")
    filters = [*FILTERS, {"name": HOSTILE, "where": "true"}]
    report.run(folder, ReportConfig(title="Handwritten digits"), {**CONFIG, "filters": filters}, seed=3)
    return folder


@pytest.fixture(scope="module")
def browser() -> Browser:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser, out) -> Browser:
    browser.open(out / "report.html")
    return browser


@pytest.fixture(scope="module")
def figures(out) -> dict:
    return json.loads((out / "report.json").read_text())


def shown(page: Browser, within: str = "#cards") -> list[str]:
    return page.run(f"[...document.querySelectorAll('{within} figure')].map(f => f.title)")


def test_it_asks_for_nothing_but_itself_and_nothing_complains(page, out):
    page.run("window.scrollTo(0, document.body.scrollHeight)")
    page.run("new Promise(done => setTimeout(done, 300))")
    assert [url for url in page.requests if not url.startswith("data:image/jpeg;base64,")] == [
        (out / "report.html").as_uri()
    ]
    assert page.complaints == []


def test_hostile_captions_run_nothing_and_stand_there_as_text(page):
    page.run("document.getElementById('search').value = 'pwned'; explore({})")
    assert page.run("window.pwned") is None
    assert page.run("document.querySelectorAll('script').length") == 2
    assert page.run("document.querySelectorAll('[onerror], #cards script, #cards img[src=x]').length") == 0
    assert "<script>window.pwned=1</script>" in page.run("document.getElementById('cards').textContent")
    links = page.run("[...document.links].map(a => a.protocol)")
    assert set(links) <= {"http:", "https:", "file:"}
    assert page.complaints == []


def test_a_script_that_was_put_into_the_page_does_not_run(browser, out, tmp_path):
    source = (out / "report.html").read_text("utf-8")
    changed = tmp_path / "changed.html"
    changed.write_text(source.replace("</main>", "<script>window.pwned=1</script><img src=x onerror='pwned=2'></main>"))
    browser.open(changed)
    assert browser.run("window.pwned") is None
    assert any("Content Security Policy" in text for text in browser.complaints)


def test_captions_of_any_script_are_found_and_shown_as_they_are(page):
    for caption in SCRIPTS:
        page.run("document.getElementById('search').value = ''")
        page.run("document.getElementById('search').focus()")
        page.write(caption.split()[0])
        assert caption in page.run("document.querySelector('#cards bdi.text').textContent")


def test_a_click_on_a_bar_shows_its_rows_and_says_of_how_many(page, figures, out):
    names = list(figures["distributions"])
    drawn = figures["distributions"]["clip_score"]
    place, bar = names.index("clip_score"), int(np.argmax(drawn["kept"]))
    page.click(f'[data-drawn="{place}"] [data-bin="{bar}"] .reach')
    total = drawn["kept"][bar] + drawn["dropped"][bar]
    told = page.run(f"document.querySelector('[data-drawn=\"{place}\"] .picked').textContent")
    assert f"{min(total, 12)} of {total} rows ({drawn['kept'][bar]} kept, {drawn['dropped'][bar]} dropped)" in told
    rows = {row["key"]: row for row in page.run("data.rows")}
    keys = shown(page, f'[data-drawn="{place}"] .picked')
    assert len(keys) == min(total, 12)
    low, high = drawn["edges"][bar : bar + 2]
    assert all(low - 1e-4 <= rows[key]["values"][place] <= high + 1e-4 for key in keys)
    page.click(f'[data-drawn="{place}"] .picked button')
    assert f"of {total} that match" in page.run("document.getElementById('matching').textContent")
    assert page.run("document.activeElement.id") == "search"
    page.click("#bar")
    assert f"of {figures['rows']} that match" in page.run("document.getElementById('matching').textContent")


def test_bars_can_be_reached_and_chosen_with_the_keyboard(page, figures):
    bars = len(figures["distributions"]["short_side"]["kept"])
    page.run('document.querySelector(\'[data-drawn="0"] [data-bin="0"]\').focus()')
    page.press("ArrowRight", 3)
    assert page.run("document.activeElement.dataset.bin") == "3"
    page.press("Enter")
    assert (
        page.run("document.querySelector('[data-drawn=\"0\"] [data-bin=\"3\"]').getAttribute('aria-pressed')") == "true"
    )
    assert shown(page, '[data-drawn="0"] .picked')
    page.press("End")
    assert page.run("document.activeElement.dataset.bin") == str(bars - 1)
    page.press("Home")
    page.press("ArrowLeft")
    assert page.run("document.activeElement.dataset.bin") == "0"
    assert "px: " in page.run("document.activeElement.getAttribute('aria-label')")


def test_the_slider_says_what_another_threshold_would_have_changed(page, out):
    box = '[data-drawn="0"] .what-if'
    assert "threshold that was used" in page.run(f"document.querySelector('{box} p').textContent")
    page.run(f"document.querySelector('{box} input').focus()")
    for key in ("ArrowRight", "ArrowLeft"):
        page.press(key, 30)
        threshold = float(page.run(f"document.querySelector('{box} output').textContent"))
        said = page.run(f"document.querySelector('{box} p').textContent")
        if key == "ArrowRight":
            sides = [min(row.width, row.height) for row in example_rows() if row.stage is None]
            assert threshold > 200
            assert said.startswith(
                f"{sum(side < threshold for side in sides)} of the rows that are kept would not pass"
            )
            page.press("ArrowLeft", 30)
    sides = [min(row.width, row.height) for row in example_rows() if row.step == "min_side"]
    assert threshold < 200
    assert f"{sum(side >= threshold for side in sides)} that it dropped would pass it" in said


def test_rows_are_searched_filtered_and_sorted(page, figures, out):
    page.run("document.getElementById('outcome').value = 'step:min_side'; explore({})")
    assert f"of {24} that match" in page.run("document.getElementById('matching').textContent")
    place = list(figures["distributions"]).index("short_side")
    page.run(f"document.getElementById('order').value = 'drawn:{place}'; explore({{}})")
    sides = {row.key: min(row.width, row.height) for row in example_rows()}
    values = [sides[key] for key in shown(page)]
    assert values == sorted(values)
    page.click("#turn")
    assert [sides[key] for key in shown(page)] == sorted(values, reverse=True)
    page.run("document.getElementById('outcome').value = 'kept'; document.getElementById('language').value = 'ja'")
    page.run("explore({})")
    assert len(shown(page)) == 1
    page.run("document.getElementById('search').value = 'no such words'; explore({})")
    assert shown(page) == []


def test_signals_of_ones_own_are_drawn_as_well(page, figures):
    assert figures["distributions"]["sharp"]["kept"][0] > 0
    assert "sharp" in page.run("[...document.querySelectorAll('.drawn h3')].map(h => h.textContent)")


def test_the_funnel_on_the_page_adds_up(page, figures):
    rows = page.run(
        "[...document.querySelectorAll('#funnel ~ .card table')][0].innerText.split('\\n').filter(line => line.trim())"
    )
    assert rows
    text = page.run("document.querySelector('.sum').textContent")
    assert text == f"{figures['rows']} rows in = {figures['kept']} kept + {figures['dropped']} dropped"
    assert figures["kept"] + sum(step["dropped"] for step in figures["funnel"]) == figures["rows"]


def test_the_map_shows_the_image_pointed_at_and_the_next_one_by_arrow_keys(page):
    dots = page.run("document.querySelectorAll('#points circle').length")
    assert dots == page.run("data.rows.filter(row => row.xy).length")
    page.point("#points circle:nth-of-type(5)")
    first = shown(page, "#pointed")
    assert len(first) == 1
    page.run("document.getElementById('points').focus()")
    page.press("ArrowLeft")
    second = shown(page, "#pointed")
    x = {row["key"]: row["xy"][0] for row in page.run("data.rows.filter(row => row.xy)")}
    assert x[second[0]] < x[first[0]]


def test_unsafe_pictures_are_blurred_until_one_asks_to_see_them(page, figures):
    blurred = (
        "[...document.querySelectorAll('.frame.unsafe img')].every(i => getComputedStyle(i).filter.includes('blur'))"
    )
    assert page.run("document.querySelectorAll('.frame.unsafe img').length") > 0
    assert page.run(blurred)
    unsafe = Counter(page.run("data.rows.map(row => !!row.unsafe)"))
    assert unsafe[True] > 0
    before = page.run("document.querySelectorAll('#cards .frame.unsafe').length")
    page.click("#cards .frame.unsafe .reveal")
    assert page.run("document.querySelectorAll('#cards .frame.unsafe').length") == before - 1


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_runs_out_of_the_window_and_text_stands_out_in_light_and_dark(browser, out, width, dark):
    browser.open(out / "report.html", width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    colours = browser.run(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        ".map(c => c.match(/\\d+/g).slice(0, 3).map(Number))"
    )
    assert contrast(*colours) > 7
    assert (sum(colours[1]) < 3 * 128) == dark
    small = browser.run(
        "[...document.querySelectorAll('button:not([hidden]), select, input')].filter(e => e.offsetParent)"
        ".filter(e => !e.getAttribute('aria-label') && !e.textContent.trim() && !e.closest('label')).length"
    )
    assert small == 0  # everything that can be used has a name


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG 2.2's contrast ratio of two colours."""

    def luminance(colour: list[int]) -> float:
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_a_report_of_nothing_opens_without_complaint(browser, tmp_path):
    write_folder(tmp_path, [Row("a" * 20, stage="plan", step="plan", reason="empty_url", url=None, image=jpeg(1))])
    report.run(tmp_path, ReportConfig(), CONFIG, seed=0)
    browser.open(tmp_path / "report.html")
    browser.run("find.value = 'x'; find.dispatchEvent(new Event('input'))")
    assert browser.complaints == []
