from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate import charts, html

HOSTILE = "<script>alert(1)</script>\"' onload=x \u202etxt.exe\x00\x1b[31m\ud800"


def test_visible_replaces_what_hides_or_reorders_text_and_leaves_the_rest():
    assert html.visible("a\x00b\u202ec\u2066d\ud800e\x85f") == "a�b�c�d�e�f"
    assert html.visible("naïve 猫 👩‍🚀\tx\ny <b>") == "naïve 猫 👩‍🚀\tx\ny <b>"
    assert html.visible(3) == "3"
    assert html.visible(Path("a\u202eb")) == "a�b"  # whatever is not text yet, too


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "JAVASCRIPT:alert(1)",
        "java\tscript:alert(1)",
        "data:text/html,<script>alert(1)</script>",
        "file:///etc/passwd",
        "//evil.example",
        "http://",
        "http://a b/",
        "http://a/\u202e",
        "http://a/\x00",
        "http://[bad",
        " http://a/",
        "http://a/" + "x" * 3000,
        "",
        None,
    ],
)
def test_what_is_not_a_plain_http_url_is_not_a_link(url):
    assert "<a" not in html.link(url)


def test_a_link_is_escaped_and_tells_nothing_of_this_page():
    made = html.link('http://a.example/?"><script>x</script>')
    assert "<script" not in made
    assert 'href="http://a.example/?&#34;&gt;&lt;script&gt;x&lt;/script&gt;"' in made
    assert 'rel="noopener noreferrer nofollow"' in made


def test_figures_are_written_so_that_rounding_does_not_lie():
    assert [html.share(part, 100_000) for part in (0, 1, 50_000, 99_999, 100_000)] == [
        "0 %",
        "< 0.1 %",
        "50.0 %",
        "> 99.9 %",
        "100 %",
    ]
    assert html.share(0, 0) == "–"
    assert html.count(1234567) == "1,234,567"
    assert [html.size(n) for n in (999, 1000, 8_000_000, 3e12)] == ["999 B", "1.0 kB", "8.0 MB", "3.0 TB"]
    assert [html.duration(s) for s in (4.25, 48, 725, 12_000)] == ["4.2 s", "48 s", "12 min 5 s", "3 h 20 min"]
    assert html.clip("a\n b  c" + "d" * 200, 10) == "a b cdddd…"


@given(st.floats(1e-6, 1e9), st.integers(1, 60))
def test_a_nice_step_is_the_smallest_round_one_that_makes_few_enough_parts(span, at_most):
    step = charts.nice_step(span, at_most)
    assert span / step <= at_most * (1 + 1e-8)
    assert round(step / 10 ** math.floor(math.log10(step * (1 + 1e-9))), 6) in (1, 2, 5)
    assert span / (step / 2.5) > at_most * (1 - 1e-8)  # the next smaller one is at least 2.5 times finer


def test_a_nice_step_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="span"):
        charts.nice_step(0, 3)


@given(st.floats(-1e6, 1e6), st.floats(0.001, 1e6))
def test_ticks_lie_within_the_range_and_are_few(low, span):
    found = charts.ticks(low, low + span)
    assert len(found) <= 6
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in found)


def test_a_histogram_draws_each_bin_to_scale_and_says_its_counts():
    svg = ET.fromstring(charts.histogram([0, 10, 20], {"kept": [4, 0], "dropped": [0, 2]}, unit="px"))
    bars = {rect.get("class"): rect for rect in svg.iter("rect")}
    assert float(bars["kept"].get("height")) == pytest.approx(2 * float(bars["dropped"].get("height")), abs=0.02)
    assert bars["kept"].find("title").text == "0–10 px: 4 kept, 0 dropped"


def test_lines_leave_out_what_is_not_finite_and_draw_a_single_point():
    drawn = charts.lines({"loss": [(0, 1.0), (1, math.nan), (2, 0.5)], "one": [(1, 0.7)]})
    svg = ET.fromstring(drawn)
    assert [len(line.get("points").split()) for line in svg.iter("polyline")] == [2, 1]
    assert "nan" not in drawn
    assert charts.lines({"empty": [(0, math.inf)]}) == ""


@pytest.mark.parametrize(
    "svg",
    [
        charts.bar([("kept", 1, HOSTILE)], 2),
        charts.bar([("kept", 0, "nothing")], 0),
        charts.lines({HOSTILE: [(0, 1), (5, 1)]}, label=HOSTILE),
        charts.histogram([0, 1], {"kept": [0]}, unit=HOSTILE),
        charts.change((0.1, 0, 0.2), (0.9, 0.8, 1), 0, 1, "better"),
        charts.change((3, 3, 3), (3, 3, 3), 3, 3, "same"),
    ],
)
def test_charts_are_well_formed_and_inert_whatever_the_text(svg):
    names = {element.tag for element in ET.fromstring(svg).iter()}
    assert names <= {"svg", "g", "rect", "title", "line", "text", "polyline", "circle"}
    assert "style=" not in svg
