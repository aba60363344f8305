from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate import report
from curate.config import ReportConfig, SelectConfig
from curate.errors import ConfigError
from curate.files import write_parquet
from curate.html import MAX_BYTES
from curate.ledger import ledger_schema
from curate.report.embedded import principal
from curate.report.tables import open_tables
from curate.report.thresholds import FINE, find_thresholds, fine_edges, named_columns
from tests.curate.pages import Page
from tests.curate.report_folder import CONFIG, PLAN, Row, example_rows, jpeg, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dataset")
    write_folder(out, example_rows())
    report.run(out, ReportConfig(), CONFIG, seed=3)
    return out


@pytest.fixture(scope="module")
def figures(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


# --- thresholds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("original_width >= 200", [("original_width", ">=", 200, "true")]),
        ("300 < original_width", [("original_width", ">", 300, "true")]),
        ("-1 >= aspect", [("aspect", "<=", -1, "true")]),
        (
            "caption_words BETWEEN 3 AND 6*10",
            [
                ("caption_words", ">=", 3, "caption_words <= (6 * 10)"),
                ("caption_words", "<=", 60, "caption_words >= 3"),
            ],
        ),
        (
            "aspect < 3 AND caption LIKE '%cat%' AND original_width > 1e2",
            [
                ("aspect", "<", 3, "(caption ~~ '%cat%') AND (original_width > 1e2)"),
                ("original_width", ">", 100, "(aspect < 3) AND (caption ~~ '%cat%')"),
            ],
        ),
        (
            "least(original_width, original_height) >= 200",
            [("least(original_width, original_height)", ">=", 200, "true")],
        ),
        ("aspect > 1 OR original_width > 3", []),
        ("NOT (aspect > 1)", []),
        ("caption = 'x'", []),
        ("caption > 'x'", []),
        ("original_width > original_height", []),
        ("nonsense > 3", []),
        ("syntax error (", []),
        ("true", []),
    ],
)
def test_thresholds_are_read_from_an_expression(folder, where, expected):
    filters = [{"name": "x", "where": where}]
    with open_tables(folder, SelectConfig(), named_columns(filters), 0) as tables:
        found = find_thresholds(tables, filters)
    told = [(t.expression, t.operator, t.value, t.rest) for t in found]
    assert [tuple(map(bare, threshold)) for threshold in told] == [
        tuple(map(bare, threshold)) for threshold in expected
    ]


def bare(part: object) -> object:
    """SQL without brackets, of which DuckDB writes more than a person."""
    return part.replace("(", "").replace(")", "") if isinstance(part, str) else part


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.floats(0, 1e4), st.booleans())
def test_the_threshold_is_one_of_few_rising_edges(value, low, span, whole):
    value, low, span = (round(value), round(low), round(span)) if whole else (value, low, span)
    edges, at = fine_edges(value, low, low + span, whole)
    assert edges[at] == value
    assert len(edges) <= FINE + 4
    assert all(a < b for a, b in itertools.pairwise(edges))
    assert edges[0] <= low + 1e-6 * max(1, abs(low))
    assert edges[-1] >= low + span - 1e-6 * max(1, abs(low + span))


def hard_rows(rng: random.Random, operator: str) -> list[Row]:
    """Rows kept and dropped by `clip_score OPERATOR 0.3` and a second condition, many exactly on round numbers."""
    rows = []
    for n in range(400):
        score = float(np.float32(round(rng.gauss(0.3, 0.05), 2 if n % 2 else 5)))
        text = float(str(np.float32(score)))
        passes = {">=": text >= 0.3, ">": text > 0.3, "<=": text <= 0.3, "<": text < 0.3}[operator]
        wide = rng.random() < 0.8
        fate = {} if passes and wide else {"stage": "select", "step": "aligned", "reason": "where", "value": "x"}
        if not fate and n % 5 == 0:
            fate = {"stage": "select", "step": "later", "reason": "where", "value": "x"}
        rows.append(Row(f"{n:020x}", clip_score=score, width=320 if wide else 100, height=100, **fate))
    return rows


@pytest.mark.parametrize("operator", [">=", ">", "<=", "<"])
def test_at_every_edge_the_counts_are_those_of_running_the_step_again(tmp_path, operator):
    rows = hard_rows(random.Random(1), operator)
    write_folder(tmp_path, rows)
    filters = [{"name": "aligned", "where": f"clip_score {operator} 0.3 AND original_width > 200"}]
    report.run(tmp_path, ReportConfig(), {**CONFIG, "filters": filters}, seed=0)
    told = json.loads((tmp_path / "report.json").read_text())
    (cut,) = told["distributions"]["clip_score"]["what_if"]
    assert (cut["value"], cut["operator"]) == (0.3, operator)
    assert cut["edges"][cut["at"]] == 0.3
    for at, edge in enumerate(cut["edges"]):
        passes = {
            ">=": lambda x, t: x >= t,
            ">": lambda x, t: x > t,
            "<=": lambda x, t: x <= t,
            "<": lambda x, t: x < t,
        }[operator]
        scores = [(float(str(np.float32(row.clip_score))), row) for row in rows]
        lost = sum(row.stage is None and not passes(x, edge) for x, row in scores)
        gained = sum(row.step == "aligned" and row.width > 200 and passes(x, edge) for x, row in scores)
        above = operator.startswith(">")
        whole_bins = {
            name: sum(number for place, number in enumerate(cut[name]) if (place > at) == (above == wanted))
            for name, wanted in (("kept", False), ("dropped", True))
        }
        assert whole_bins == {"kept": lost, "dropped": gained}, edge
    assert {"kept": sum(cut["kept"])} == {"kept": sum(row.stage is None for row in rows)}


def test_of_a_ranking_the_cut_is_where_it_was_and_nothing_changes_there(figures):
    (cut,) = figures["distributions"]["clip_score"]["what_if"]
    assert cut["ranked"]
    assert cut["step"] == "aligned"
    assert sum(cut["kept"]) == figures["kept"] - figures["splits"]["retain"]  # the ranking was without them
    assert sum(cut["dropped"]) == 24


def test_of_a_step_only_rows_that_met_it_passed(tmp_path):
    """In retain, a row passed each `where`, but neither the step that moved it nor a later ranking; an earlier one."""
    rows = [Row(f"{n:020x}", clip_score=0.4, width=300) for n in range(30)]
    rows += [
        Row(f"{100 + n:020x}", clip_score=0.1, width=250, split="retain", step="on_topic", value="0.1 (cut 0.2)")
        for n in range(10)
    ]
    fate = {"stage": "select", "reason": "top", "split": None}
    rows += [
        Row(f"{200 + n:020x}", clip_score=0.2, width=260, step="later", value="0.2 (cut 0.3)", **fate) for n in range(5)
    ]
    rows += [
        Row(f"{300 + n:020x}", clip_score=0.2, width=90, step="early", value="90 (cut 240)", **fate) for n in range(5)
    ]
    write_folder(tmp_path, rows)
    filters = [
        {"name": "early", "top": {"by": "original_width", "fraction": 0.9}},
        {"name": "on_topic", "relevance": {"prompts": ["a digit"], "keep": 0.8}},
        {"name": "wide", "where": "aspect < 9"},
        {"name": "later", "top": {"by": "clip_score", "fraction": 0.8}},
    ]
    report.run(tmp_path, ReportConfig(), {**CONFIG, "filters": filters}, seed=0)
    drawn = json.loads((tmp_path / "report.json").read_text())["distributions"].values()
    kept = {cut["step"]: sum(cut["kept"]) for each in drawn for cut in each["what_if"]}
    assert kept == {"early": 40, "on_topic": 0, "wide": 40, "later": 30}
    page = (tmp_path / "report.html").read_text()
    (passed,) = re.findall(r"Kept, nearest the threshold</h4>(?:(?!<h4>).)*?clip_score.*?</section>", page, re.DOTALL)
    assert "clip_score=0.4" in passed
    assert "clip_score=0.1" not in passed


# --- SQL -------------------------------------------------------------------------------------------------------------


def test_each_query_in_the_report_gives_its_figure_from_the_files_alone(folder, figures, monkeypatch):
    monkeypatch.chdir(folder)
    told = figures["sql"]
    with duckdb.connect() as db:
        for statement in told["views"].values():
            db.execute(statement)
        answers = {name: db.execute(query).fetchall() for name, query in told["figures"].items()}
    assert answers["rows"] == [(figures["rows"], figures["kept"])]
    assert answers["images"] == [(figures["images"],)]
    assert dict(answers["splits"]) == {split: n for split, n in figures["splits"].items() if n}
    assert [tuple(row) for row in answers["reasons"]] == [
        (r["stage"], r["step"], r["reason"], r["dropped"]) for r in figures["reasons"]
    ]
    assert answers["hosts.hosts"] == [(figures["hosts"]["hosts"],)]
    assert [row[0] for row in answers["hosts.top"]] == [host["host"] for host in figures["hosts"]["top"]]
    assert answers["captions.different"] == [(figures["captions"]["different"],)]
    assert [row for row, *_ in answers["words.top"]] == [entry["word"] for entry in figures["words"]["top"]]
    assert [list(row) for row in answers["answers"]] == [list(entry.values()) for entry in figures["answers"]]
    for name, drawn in figures["distributions"].items():
        counts = {True: [0] * len(drawn["kept"]), False: [0] * len(drawn["kept"])}
        for kept, place, number in answers[f"distributions.{name}"]:
            counts[kept][place] = number
        assert (counts[True], counts[False]) == (drawn["kept"], drawn["dropped"]), name
        for place, cut in enumerate(drawn["what_if"]):
            found = [0] * len(cut["kept"])
            for kept, at, number in answers[f"distributions.{name}.what_if.{place}"]:
                found[at] += number if kept else 0
            assert found == cut["kept"], name
    assert len(answers) == len(told["figures"]) > 20


def test_words_are_counted_by_captions_before_and_after_in_any_script(tmp_path):
    rows = [Row(f"{n:020x}", caption="a photo PHOTO of кошка") for n in range(4)]
    rows += [Row("f" * 20, caption="photo 猫の写真", stage="fetch", step="fetch", reason="dns")]
    rows += [Row("e" * 20, caption=None, stage="fetch", step="fetch", reason="dns")]
    write_folder(tmp_path, rows)
    report.run(tmp_path, ReportConfig(), CONFIG, seed=0)
    words = json.loads((tmp_path / "report.json").read_text())["words"]
    told = {entry["word"]: (entry["before"], entry["after"]) for entry in words["top"]}
    assert told == {"photo": (5, 4), "кошка": (4, 4), "猫の写真": (1, 0)}
    assert (words["every"], words["before"], words["after"]) == (1, 5, 4)


@pytest.mark.parametrize(("match", "cats"), [("words", (5, 3)), ("substring", (7, 4))])
def test_concepts_of_a_balance_step_are_counted_before_and_after(tmp_path, match, cats):
    captions = ["a Cat!", "cat", "a cat", "location", "two cats", "a dog & a cat", "a cat", "Hund"]
    lost = {2: "cat (3 of 5)", 6: "cat (3 of 5)", 7: "no concept", 4: "it's (a) (2 of 3)"}
    dropped = {"split": None, "stage": "select", "step": "balanced", "reason": "balance"}
    rows = [
        Row(f"{n:020x}", caption, **(dropped | {"value": lost[n]} if n in lost else {}))
        for n, caption in enumerate(captions)
    ]
    write_folder(tmp_path, rows)
    step = {"name": "balanced", "balance": {"concepts": ["cat", "it's (a)"], "cap": 3, "match": match}}
    report.run(tmp_path, ReportConfig(), CONFIG | {"filters": [step]}, seed=0)
    (told,) = json.loads((tmp_path / "report.json").read_text())["concepts"]
    found = {entry["concept"]: (entry["dropped"], entry["before"], entry["after"]) for entry in told["top"]}
    assert found == {"cat": (2, *cats), "no concept": (1, 0, 0), "it's (a)": (1, 0, 0)}
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "Concepts that balanced took most from" in page.source


def test_refusals_answers_and_saved_requests_are_those_of_the_ledger(figures):
    assert [(r["reason"], r["rows"]) for r in figures["refusals"]] == [("opt_out", 2)]
    assert figures["saved"] == [{"step": "caption_length", "requests": 9}]
    answers = {(a["status"], a["reason"], a["detail"]): a["rows"] for a in figures["answers"]}
    assert answers["failed_to_download", "http_status", "404"] == 12
    assert answers["success", None, None] == figures["images"]
    assert sum(answers.values()) == figures["rows"] - 8 - 9


# --- the rows on the page --------------------------------------------------------------------------------------------


def test_every_bar_has_rows_on_the_page_that_lie_in_it(folder, figures):
    (data,) = (json.loads(text) for text in Page((folder / "report.html").read_text("utf-8")).blocks["data"])
    for place, drawn in enumerate(figures["distributions"].values()):
        for bar, (kept, dropped) in enumerate(zip(drawn["kept"], drawn["dropped"], strict=True)):
            here = [row for row in data["rows"] if row["bins"][place] == bar]
            assert sum("split" in row for row in here) >= min(kept, 4)
            assert sum("split" not in row for row in here) >= min(dropped, 4)
            last = bar == len(drawn["kept"]) - 1
            for row in here:
                assert row["values"][place] >= drawn["edges"][bar] - 1e-4
                assert last or row["values"][place] <= drawn["edges"][bar + 1] + 1e-4


def test_data_in_the_page_cannot_end_its_element_and_hides_nothing(tmp_path):
    hostile = "</script><script>alert(1)</script><!-- \u202e\ud800 & ]]>"
    write_folder(tmp_path, [Row("a" * 20, image=jpeg(1))])
    table = pq.read_table(tmp_path / "ledger.parquet")
    text = pa.array([hostile.replace("\ud800", "")], pa.string())
    write_parquet(table.set_column(3, "caption", text), tmp_path / "ledger.parquet", made_from="x")
    report.run(tmp_path, ReportConfig(), CONFIG, seed=0)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    page.assert_inert()
    (data,) = (json.loads(text) for text in page.blocks["data"])
    assert data["rows"][0]["caption"] == hostile.replace("\u202e", "�").replace("\ud800", "")
    assert "<" not in page.blocks["data"][0]


def test_the_map_is_the_plane_of_largest_variance(tmp_path):
    rng = np.random.default_rng(0)
    vectors_ND = (
        rng.normal(size=(50, 8)) * np.array([9, 5, 1, 1, 1, 1, 1, 1]) @ np.linalg.qr(rng.normal(size=(8, 8)))[0]
    )
    places_N2 = principal(vectors_ND)
    values, axes = np.linalg.eigh(np.cov(vectors_ND.T))  # an independent way to the same plane
    for place, axis in enumerate((axes[:, -1], axes[:, -2])):
        correlation = np.corrcoef(places_N2[:, place], vectors_ND @ axis)[0, 1]
        assert abs(correlation) > 1 - 1e-6
    assert values[-1] > values[-2]
    assert places_N2.min() == 0
    assert places_N2.max() == 1
    assert np.array_equal(places_N2, principal(vectors_ND))


# --- a large ledger --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A million rows, without images."""
    out, rows = tmp_path_factory.mktemp("large"), 1_000_000
    rng = np.random.default_rng(0)
    key = pa.array([f"{n:020x}" for n in range(rows)])
    url = pa.array([f"http://host{n % 5000}.example.org/some/path/{n}.jpg" for n in range(rows)])
    caption = pa.array(
        [f"a picture of thing number {n % 300_000} in a long caption of some words" for n in range(rows)]
    )
    words = rng.integers(0, 80, rows)
    kept = words >= 40
    step = pa.array(np.where(kept, None, "length"))
    text = {"split": "train", "stage": "select", "step": "length", "reason": "where", "value": "caption_words=7"}
    columns = {
        "key": key,
        "row": pa.array(np.arange(rows)),
        "url": url,
        "caption": caption,
        "kept": pa.array(kept),
        **{name: pa.array(np.where(kept == (name == "split"), said, None)) for name, said in text.items()},
        "step": step,
        "twin": pa.nulls(rows, pa.string()),
        "duplicate_group": pa.nulls(rows, pa.string()),
    }
    write_parquet(pa.table(columns, ledger_schema()), out / "ledger.parquet", made_from="x")
    plan = {
        **{name: columns[name] for name in ("key", "row", "url", "caption")},
        "url_host": pa.array([f"host{n % 5000}.example.org" for n in range(rows)]),
        "caption_chars": pa.array(rng.integers(0, 400, rows)),
        "caption_words": pa.array(words),
        "license": pa.nulls(rows, pa.string()),
    }
    write_parquet(pa.table(plan, PLAN), out / "plan" / "00000.parquet", made_from="x")
    return out


def test_a_million_rows_fit_the_budget_and_the_memory(large):
    filters = [{"name": "length", "where": "caption_words >= 40"}]
    engine = SelectConfig(memory_limit="400MB", threads=1)
    result = report.run(large, ReportConfig(), {"filters": filters}, seed=0, engine=engine)
    assert result.size < MAX_BYTES / 4
    told = json.loads((large / "report.json").read_text())
    assert told["rows"] == 1_000_000
    (cut,) = told["distributions"]["caption_words"]["what_if"]
    assert sum(cut["kept"]) + sum(cut["dropped"]) == 1_000_000
    assert sum(cut["kept"][: cut["at"] + 1]) == 0 == sum(cut["dropped"][cut["at"] + 1 :])


def test_too_little_memory_is_said_in_one_line(large):
    with pytest.raises(ConfigError, match=r"select.memory_limit 12MB: not enough .* raise it"):
        report.run(large, ReportConfig(), {"filters": []}, seed=0, engine=SelectConfig(memory_limit="12MB", threads=1))


def test_rows_of_the_longest_texts_in_any_script_fit_the_budget_as_well(tmp_path):
    long = "猫" * 2000
    fates = ({}, {"stage": "select", "step": long[:20], "reason": "where", "value": long, "twin": long})
    rows = [
        Row(f"{n:020x}", f"{n} {long}", f"http://{n}.example/{long}", width=40 + n, clip_score=n / 3000, **fates[n % 2])
        for n in range(3000)
    ]
    write_folder(tmp_path, rows)
    result = report.run(tmp_path, ReportConfig(), {**CONFIG, "filters": []}, seed=0)
    assert result.size <= MAX_BYTES
    assert '"rows":[{' in (tmp_path / "report.html").read_text("utf-8")
