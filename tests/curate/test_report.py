from __future__ import annotations

import base64
import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from curate import report
from curate.config import ReportConfig
from curate.errors import InputError
from curate.files import read_rows
from curate.html import MAX_BYTES
from curate.ledger import Reason
from curate.report import tables, thumbnails
from curate.report.definitions import DEFINITIONS, limits
from curate.report.distributions import BINS, bin_edges
from curate.report.figures import describe
from curate.report.thumbnails import SIDE, thumbnail
from tests.curate.pages import Page
from tests.curate.report_folder import CONFIG, FILTERS, Row, example_rows, jpeg, write_folder

WRITTEN = ("report.html", "README.md", "report.json", "croissant.json", "manifest.json")
NASTY = (
    '"><script>alert(1)</script><img src=x onerror=alert(2)>\u202egpj.exe\x00\x1b[0m {{ 7*7 }} </style></script> `x`|'
)


def make(out: Path, rows: list[Row], config: dict | None = None, **shown) -> Page:
    write_folder(out, rows)
    report.run(out, ReportConfig(**shown), config or CONFIG, seed=3)
    return Page((out / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dataset")
    make(out, example_rows(), title="Handwritten digits")
    return out


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def figures(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


def ask(query: str) -> list[tuple]:
    with duckdb.connect() as database:
        return database.execute(query).fetchall()


def gallery(page: Page, name: str) -> str:
    """The source of one fold of the page."""
    return next(part for part in page.source.split("<details")[1:] if f"<h3>{name}</h3>" in part).split("</details>")[0]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_every_reason_has_a_definition_in_one_line():
    assert set(DEFINITIONS) == set(Reason)
    assert all(text.endswith(".") and "\n" not in text and len(text) < 120 for text in DEFINITIONS.values())


def test_figures_equal_what_the_ledger_says(folder, figures):
    ledger = ask(f"FROM '{folder}/ledger.parquet'")
    kept = Counter(row[5] for row in ledger if row[4])
    assert figures["rows"] == len(ledger) == figures["kept"] + figures["dropped"]
    assert {split: n for split, n in figures["splits"].items() if n} == dict(kept)
    dropped = Counter((row[6], row[7], row[8]) for row in ledger if not row[4])
    assert {(r["stage"], r["step"], r["reason"]): r["dropped"] for r in figures["reasons"]} == dict(dropped)


def test_the_funnel_follows_the_road_and_ends_with_what_is_kept(figures):
    steps = [(step["stage"], step["step"]) for step in figures["funnel"]]
    assert steps == [
        ("plan", "plan"),
        ("plan", "caption_length"),  # pushed before the download
        ("fetch", "fetch"),
        *(("select", name) for name in ("min_side", "exact", "leak", "on_topic", "aligned", "never")),
    ]
    left = figures["rows"]
    for step in figures["funnel"]:
        left -= step["dropped"]
        assert step["left"] == left
    assert left == figures["kept"]
    assert figures["funnel"][-1]["dropped"] == 0  # a step that dropped nothing is still there


def test_steps_of_a_ledger_made_with_other_filters_are_still_counted(tmp_path):
    make(tmp_path, example_rows(2), {**CONFIG, "filters": []})
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["funnel"][-1]["left"] == told["kept"]


ROWS = st.lists(
    st.sampled_from(
        [
            (None, None, None),
            ("plan", "plan", "empty_url"),
            ("fetch", "fetch", "dns"),
            ("fetch", "fetch", "timeout"),
            ("select", "min_side", "where"),
            ("select", "exact", "dedup"),
        ]
    ),
    max_size=40,
)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(ROWS)
def test_the_numbers_on_the_page_are_those_of_the_ledger(tmp_path_factory, fates):
    out = tmp_path_factory.mktemp("any")
    rows = [Row(f"{n:020x}", stage=a, step=b, reason=c, image=jpeg(1, 8, 8)) for n, (a, b, c) in enumerate(fates)]
    page = make(out, rows)
    table = {(row[0], row[1].split("\n")[0]): row for row in page.rows if len(row) == 6}
    dropped = Counter(fate[:2] for fate in fates if fate[0])
    for place, number in dropped.items():
        name = next(key for key in table if key[0] == place[0] and key[1].startswith(place[1]))
        assert table[name][2] == f"−{number}"
    assert f"<b>{len(fates)}</b> rows in = <b>{len(fates) - sum(dropped.values())}</b> kept" in page.source


def test_histograms_hold_every_judged_row_once(folder, figures):
    drawn = dict(figures["distributions"])
    ((judged,),) = ask(f"SELECT count(*) FROM '{folder}/ledger.parquet' WHERE kept OR stage = 'select'")
    scores = drawn.pop("relevance on_topic")  # the ledger has it of what did not pass, dropped or in retain
    assert set(drawn) == {"short_side", "aspect", "caption_words", "clip_score"}
    assert (sum(scores["kept"]), sum(scores["dropped"])) == (24, 36)
    for name, figure in drawn.items():
        extra = 9 if name == "caption_words" else 0  # captions that a filter dropped before the download
        assert sum(figure["kept"]) == figures["kept"], name
        assert sum(figure["kept"] + figure["dropped"]) == judged + extra, name
        assert len(figure["edges"]) == len(figure["kept"]) + 1


def test_a_histogram_counts_like_numpy(folder, figures):
    drawn = figures["distributions"]["clip_score"]
    both = f"'{folder}/signals/clip/00000.parquet' JOIN '{folder}/ledger.parquet' USING (key)"
    scores = [score for (score,) in ask(f"SELECT clip_score FROM {both} WHERE kept")]
    edges = np.array([*drawn["edges"][:-1], np.inf])
    assert np.histogram(scores, edges)[0].tolist() == drawn["kept"]


def test_of_many_rows_a_sample_says_where_a_histogram_ends_and_all_are_counted(folder, figures, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MEASURED_ON", figures["rows"] // 4)
    shutil.copytree(folder, tmp_path / "copy")
    report.run(tmp_path / "copy", ReportConfig(), CONFIG, seed=3)
    sampled = json.loads((tmp_path / "copy" / "report.json").read_text())
    assert "dice % 4 = 0" in sampled["sql"]["figures"]["distributions.short_side.range"]
    assert sampled["distributions"].keys() == figures["distributions"].keys()
    for name, drawn in sampled["distributions"].items():
        whole = figures["distributions"][name]
        assert [sum(drawn["kept"]), sum(drawn["dropped"])] == [sum(whole["kept"]), sum(whole["dropped"])]
        assert (drawn["min"], drawn["max"]) == (whole["min"], whole["max"])
        for cut, other in zip(drawn["what_if"], whole["what_if"], strict=True):
            assert sum(cut["kept"][: cut["at"] + 1]) == sum(other["kept"][: other["at"] + 1])


def test_one_giant_outlier_does_not_flatten_a_histogram(tmp_path):
    rows = [Row(f"{n:020x}", width=300 + n, height=300 + n) for n in range(400)]
    make(tmp_path, [*rows, Row("f" * 20, width=60_000, height=60_000)])
    drawn = json.loads((tmp_path / "report.json").read_text())["distributions"]["short_side"]
    assert drawn["edges"][-1] < 1000
    assert drawn["kept"][-1] >= 1
    assert drawn["max"] == 60_000


@given(st.floats(-1e5, 1e5), st.floats(0, 1e5), st.booleans())
def test_bins_hold_the_range_and_are_few(low, span, whole):
    low, high = (round(low), round(low) + round(span)) if whole else (low, low + span)
    edges = bin_edges(low, high, whole)
    assert 2 <= len(edges) <= BINS + 3
    assert edges[0] <= low + 1e-6 * max(1, abs(low))
    assert edges[-1] >= high
    assert not whole or edges[1] - edges[0] >= 1


def test_hosts_tell_how_many_images_came_and_what_went_wrong_most(tmp_path):
    rows = [Row(f"{n:020x}", url=f"http://good.example/{n}") for n in range(3)]
    rows += [
        Row(f"{n:020x}", url=f"http://bad.example/{n}", stage="fetch", step="fetch", reason=reason)
        for n, reason in enumerate(["dns", "timeout", "timeout", "tls"], start=3)
    ]
    make(tmp_path, rows)
    assert json.loads((tmp_path / "report.json").read_text())["hosts"] == {
        "hosts": 2,
        "top": [
            {"host": "bad.example", "rows": 4, "images": 0, "kept": 0, "worst": "timeout"},
            {"host": "good.example", "rows": 3, "images": 3, "kept": 3, "worst": None},
        ],
    }


def test_common_captions_are_counted_over_kept_pairs_only(tmp_path):
    rows = [Row(f"{n:020x}", caption="IMG_0001.JPG" if n < 3 else f"one of a kind {n}") for n in range(6)]
    rows += [Row(f"{n:020x}", caption="IMG_0001.JPG", stage="fetch", step="fetch", reason="dns") for n in range(6, 9)]
    page = make(tmp_path, rows)
    told = json.loads((tmp_path / "report.json").read_text())["captions"]
    assert told == {"different": 4, "top": [{"caption": "IMG_0001.JPG", "count": 3}]}
    assert ["IMG_0001.JPG", "3", "50.0 %"] in page.rows


def test_a_filter_is_described_as_it_stands_in_the_file():
    assert [describe(step) for step in FILTERS[:3]] == [
        "caption_words BETWEEN 3 AND 60",
        "least(original_width, original_height) >= 200",
        "dedup {by: sha256}",
    ]


# --- what the page must never do -------------------------------------------------------------------------------------


def test_the_page_is_one_inert_file(page):
    page.assert_inert()


def test_hostile_captions_urls_values_and_titles_are_only_text(tmp_path):
    url = f"http://evil.example/{NASTY}"
    kept = [
        Row("a" * 20, caption=NASTY, url=url, image=jpeg(1)),
        Row("b" * 20, caption=NASTY, url="javascript:alert(1)"),
    ]
    dropped = [
        Row("c" * 20, caption=NASTY, url=url, stage="plan", step="plan", reason="bad_url", value=NASTY),
        Row("d" * 20, caption=NASTY, url="data:text/html,x", stage="fetch", step="fetch", reason="dns", value=NASTY),
        Row("e" * 20, caption=NASTY, url=url, stage="select", step=NASTY, reason="where", value=NASTY, image=jpeg(2)),
        Row("f" * 20, caption=NASTY, url=url, stage="select", step="leak", reason="decontaminate", twin=NASTY),
        Row("0" * 20, caption=NASTY, url=url, stage="select", step="exact", reason="dedup", twin="a" * 20),
    ]
    filters = [{"name": NASTY, "where": NASTY}, {"name": "leak", "decontaminate": {"against": [NASTY]}}]
    page = make(tmp_path, kept + dropped, {**CONFIG, "filters": filters, "urls": NASTY}, title=NASTY)
    page.assert_inert()
    assert not [a for a in page.all("a") if "evil" in (a["href"] or "")]
    assert "{{ 7*7 }}" in page.source  # shown, not run: never a template
    card = (tmp_path / "README.md").read_text("utf-8")
    assert (
        "<script" not in card.split("---\n", 2)[2].partition("```")[0]
    )  # after the YAML header, before the code block
    assert "\u202e" not in card + (tmp_path / "report.json").read_text()


def test_pictures_carry_no_metadata_and_are_small(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "SECRET CAMERA"
    content = jpeg(1, 900, 700, exif=exif.tobytes(), comment=b"SECRET COMMENT", icc_profile=b"SECRET PROFILE" * 9)
    page = make(tmp_path, [Row("a" * 20, image=content)])
    (picture,) = (base64.b64decode(image["src"].partition(",")[2]) for image in page.all("img"))
    assert b"SECRET" in content
    assert b"SECRET" not in picture
    with Image.open(io.BytesIO(picture)) as image:
        assert max(image.size) == SIDE
        assert not image.getexif()
        assert image.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "JPEG"])
def test_a_thumbnail_of_any_stored_image_can_be_made(mode, kind):
    content = io.BytesIO()
    image = Image.new(mode, (300, 200))
    try:
        image.save(content, kind)
    except (OSError, ValueError):  # not a mode that this format can hold
        content = io.BytesIO()
        image.convert("RGB").save(content, kind)
    with Image.open(io.BytesIO(thumbnail(content.getvalue()))) as small:
        assert (small.mode, small.size) == ("RGB", (128, 85))


def test_transparency_is_shown_on_white():
    content = io.BytesIO()
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(content, "PNG")
    with Image.open(io.BytesIO(thumbnail(content.getvalue()))) as small:
        assert small.getpixel((25, 25)) == (255, 255, 255)


def test_bytes_that_are_no_image_give_no_thumbnail():
    assert thumbnail(b"<html>") is None
    assert thumbnail(jpeg(1)[:500]) is None


# --- which rows are shown --------------------------------------------------------------------------------------------


def test_each_split_shows_its_pairs_and_each_step_what_it_dropped(page):
    assert gallery(page, "train").count("<img") == 12
    assert gallery(page, "retain").count("<img") == 12
    for step in ("min_side", "on_topic", "aligned"):
        dropped, _, kept = gallery(page, step).partition("<h4>Kept, nearest the threshold</h4>")
        assert dropped.count("<img") == 12
        assert kept.count("<img") == (0 if step == "on_topic" else 12)  # of what passed it the ledger has no score
    assert "too_many_pixels" in gallery(page, "fetch") + "".join(row[1] for row in page.rows if len(row) == 5)
    assert gallery(page, "fetch").count("<tr") == 13  # no pictures of what never came: a table


def test_rows_nearest_the_threshold_come_first(page):
    best = [f"{0.1 + n / 1000:.4f}" for n in range(35, 23, -1)]
    shown = gallery(page, "on_topic")
    places = [shown.index(f'class="value">{value}<') for value in best]
    assert places == sorted(places)
    nearest = gallery(page, "min_side")  # least(original_width, original_height) >= 200: widths 40, 46 … 178
    assert (
        nearest.index("original_width=178") < nearest.index("original_width=172") < nearest.index("original_width=112")
    )
    assert "original_width=106" not in nearest


def test_the_least_certain_duplicates_and_leaks_come_first(tmp_path):
    values = ["distance=1", "distance=10", "distance=9", "sha256=99", "cosine=0.9900", "cosine=0.9500"]
    rows = [
        Row(f"{n:020x}", stage="select", step="leak", reason="decontaminate", twin="a.png", value=value)
        for n, value in enumerate(values)
    ]
    shown = gallery(make(tmp_path, rows), "leak")
    order = sorted(values, key=lambda value: shown.index(f">{value}<"))
    assert order[:5] == ["distance=10", "distance=9", "distance=1", "cosine=0.9500", "cosine=0.9900"]


def test_a_duplicate_stands_beside_the_pair_that_stays(folder, page):
    shown = gallery(page, "exact")
    assert shown.count("<img") == 24
    twins = ask(f"SELECT key, twin FROM '{folder}/ledger.parquet' WHERE reason = 'dedup'")
    for key, twin in twins:
        assert key in shown
        assert twin in shown


def test_a_twin_that_was_dropped_later_is_said_to_be(tmp_path):
    rows = [
        Row("a" * 20, stage="select", step="aligned", reason="top", value="0.1"),
        Row("b" * 20, stage="select", step="exact", reason="dedup", twin="a" * 20),
    ]
    assert "stayed, then aligned" in gallery(make(tmp_path, rows), "exact")


def test_a_leak_names_the_test_image(page):
    assert "test_images/digit-3.png" in gallery(page, "leak")


def test_the_seed_chooses_the_samples(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    report.run(tmp_path / "copy", ReportConfig(title="Handwritten digits"), CONFIG, seed=4)
    assert (tmp_path / "copy" / "report.html").read_bytes() != (folder / "report.html").read_bytes()


def test_the_same_folder_gives_the_same_bytes_wherever_it_lies(folder, tmp_path):
    before = {name: (folder / name).read_bytes() for name in WRITTEN}
    copy = tmp_path / "it's a copy"
    shutil.copytree(folder, copy)
    for name in WRITTEN:
        (copy / name).unlink()
    report.run(copy, ReportConfig(title="Handwritten digits"), {**CONFIG, "out": copy}, seed=3)
    assert {name: (copy / name).read_bytes() for name in WRITTEN} == before


# --- bounds and absences ---------------------------------------------------------------------------------------------


def test_the_page_stays_under_its_budget_with_many_steps_of_noisy_pictures(tmp_path):
    rng = np.random.default_rng(0)
    content = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (128, 128, 3), np.uint8)).save(content, "JPEG", quality=100)
    rows = [
        Row(
            f"{n:020x}",
            "x " * 5000,
            stage="select",
            step=f"step{n % 30}",
            reason="where",
            image=content.getvalue(),
            value="y" * 5000,
        )
        for n in range(30 * 40)
    ]
    result_page = make(tmp_path, rows, {**CONFIG, "filters": [], "urls": "u" * 200_000}, thumbnails=40)
    size = (tmp_path / "report.html").stat().st_size
    assert MAX_BYTES / 4 < size <= MAX_BYTES
    assert len(result_page.all("img")) >= 30
    assert "10 of 40" in gallery(result_page, "step7") or "20 of 40" in gallery(result_page, "step7")


def test_run_tells_where_the_report_is_and_how_large(tmp_path):
    write_folder(tmp_path, [Row("a" * 20)])
    result = report.run(tmp_path, ReportConfig(), CONFIG, seed=0)
    assert result.path == tmp_path / "report.html"
    assert result.size == result.path.stat().st_size


def test_without_raw_shards_and_signals_there_is_a_report_without_pictures(folder, tmp_path):
    out = tmp_path / "moved"
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("raw", "signals"))
    report.run(out, ReportConfig(), CONFIG, seed=3)
    page = Page((out / "report.html").read_text("utf-8"))
    assert not page.all("img")
    assert "CLIP score (cosine" not in page.source
    assert "120</b> kept" in page.source


def test_with_the_raw_tar_gone_or_cut_the_report_lacks_only_its_pictures(tmp_path):
    write_folder(tmp_path, [Row("a" * 20, image=jpeg(1)), Row("b" * 20, image=jpeg(2))])
    tar = tmp_path / "raw" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    report.run(tmp_path, ReportConfig(), CONFIG, seed=0)
    tar.unlink()
    report.run(tmp_path, ReportConfig(), CONFIG, seed=0)
    assert "no picture" in (tmp_path / "report.html").read_text()


def test_a_second_report_makes_no_picture_again(tmp_path, monkeypatch):
    write_folder(tmp_path, [Row("a" * 20, image=jpeg(1)), Row("b" * 20, image=jpeg(2)), Row("c" * 20, image=b"no")])
    tar, kept = tmp_path / "raw" / "00000.tar", tmp_path / thumbnails.FILE
    content = tar.read_bytes()
    tar.unlink()
    report.run(tmp_path, ReportConfig(), CONFIG, seed=0)
    assert not kept.exists()  # what could not be read is looked at again
    tar.write_bytes(content)
    report.run(tmp_path, ReportConfig(), CONFIG, seed=0)
    first = (tmp_path / "report.html").read_bytes()
    assert kept.exists()
    with monkeypatch.context() as patched:
        patched.setattr(thumbnails, "thumbnail", lambda *_: pytest.fail("a picture is made again"))
        report.run(tmp_path, ReportConfig(), CONFIG, seed=0)
    assert (tmp_path / "report.html").read_bytes() == first
    before = read_rows(kept)["name"].to_pylist()
    write_folder(tmp_path, [Row("a" * 20, image=jpeg(3)), Row("b" * 20, image=jpeg(2))])
    report.run(tmp_path, ReportConfig(), CONFIG, seed=0)
    assert (tmp_path / "report.html").read_bytes() != first
    assert not set(read_rows(kept)["name"].to_pylist()) & set(before)
    kept.unlink()
    fresh = (tmp_path / "report.html").read_bytes()
    report.run(tmp_path, ReportConfig(), CONFIG, seed=0)
    assert (tmp_path / "report.html").read_bytes() == fresh


@pytest.mark.parametrize(
    "rows", [[], [Row("a" * 20, stage="plan", step="plan", reason="empty_url", url=None, caption=None)]]
)
def test_an_empty_list_and_nothing_kept_give_a_report_that_says_so(tmp_path, rows):
    page = make(tmp_path, rows)
    assert "Nothing was kept." in page.source
    assert "No row was dropped." in page.source or rows


def test_without_a_ledger_the_way_out_is_named(tmp_path):
    with pytest.raises(InputError, match=r"ledger\.parquet: not there; run 'curate build'"):
        report.run(tmp_path, ReportConfig(), CONFIG, seed=0)


# --- what it cannot tell ---------------------------------------------------------------------------------------------


def test_limits_follow_the_filters():
    bare, full = " ".join(limits([])), " ".join(limits([*FILTERS, {"name": "n", "where": "nsfw < 0.4"}]))
    for words in (
        "captions that do not fit are still here",
        "compared with a test set",
        "unsafe",
        "were not looked for",
    ):
        assert words in bare
    assert "captions that do not fit" not in full
    assert "unsafe" not in full
    assert "Licences" in bare
    assert "Licences" in full


def test_the_page_of_many_rows_is_hardly_larger_than_that_of_few(tmp_path):
    rng = random.Random(0)
    sizes = []
    for number in (2_500, 10_000):
        rows = [
            Row(f"{n:020x}", f"caption {rng.random()}", stage=None if n % 2 else "fetch", step="fetch", reason="dns")
            for n in range(number)
        ]
        make(tmp_path / str(number), rows)
        sizes.append((tmp_path / str(number) / "report.html").stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]
