"""The domain recipe on a labelled mix: what benchmarks/quality.py does of one crawl, at the size of its --quick.

Real commands in processes of their own, a real server; the mix, its truth and the bars are the benchmark's. A CLIP is
trained first, which takes minutes: those tests are slow ones.
"""

import importlib.util
import json
import re
import sys
from hashlib import sha256
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from curate.filters import parse_steps
from demo.mix import COUNTS, make_mix

SEED = 6


def slow(test):
    return pytest.mark.slow(pytest.mark.timeout(1800)(test))


@pytest.fixture(scope="module")
def quality():
    path = Path(__file__).parents[1] / "benchmarks" / "quality.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_quality", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def contents(folder, *parts):
    return {
        str(path): (sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for part in parts
        for path in sorted((folder / part).rglob("*.*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def run(quality, tmp_path_factory):
    work = tmp_path_factory.mktemp("quality")
    setting, crawl = quality.Setting(work, scale=0.5), work / f"crawl-{SEED}"
    quality.train_clip(setting)
    measured = []
    real = quality.build

    def watched(*arguments):
        assert not (crawl / "labels.parquet").exists(), "the labels are there while the pipeline runs"
        made = real(*arguments)
        measured.append(contents(crawl / "food", "plan", "raw", "signals"))
        return made

    quality.build = watched
    try:
        return quality.run_mix(setting, SEED, again=True), measured, crawl
    finally:
        quality.build = real


@slow
def test_the_recipe_reaches_the_bars(quality, run):
    found = quality.figures({SEED: run[0]})
    assert found["precision"] >= 0.95, found
    assert found["recall"] >= 0.9, found
    assert len([name for name in found if name.startswith("recall_")]) == len(COUNTS) + 1  # and the worst crawl's


@slow
def test_nothing_tells_the_pipeline_what_a_row_is(run):
    made, _, work = run
    listed = pq.read_table(work / "list.parquet")
    assert listed.column_names == ["url", "caption"]
    assert all(re.fullmatch(r"http://127\.0\.0\.\d:\d+/img/\d{5}\.jpg", url) for url in listed["url"].to_pylist())
    labels = pq.read_table(work / "labels.parquet").to_pylist()
    assert {label["kind"] for label in labels} == set(COUNTS)
    assert "labels" not in (work / "food" / "manifest.json").read_text()
    assert not any(
        kind in (work / "food.yaml").read_text() for kind in COUNTS if kind not in {"clean", "broken", "tiny"}
    )
    # Kinds are spread over the list: position says nothing either.
    clean = [place for place, row in enumerate(made.mix.rows) if row.kind == "clean"]
    assert abs(sum(clean) / len(clean) / len(made.mix.rows) - 0.5) < 0.1


@slow
def test_a_changed_threshold_asks_for_nothing_and_measures_nothing_again(quality, run):
    made, (before, after), _ = run
    assert made.first.requests > 0
    assert made.second.requests == 0
    assert before == after
    assert len(before) >= 6
    assert json.dumps(made.first.ledger) != json.dumps(made.second.ledger)
    # A stricter threshold keeps a part of what was kept, and moves nothing else.
    first, second = quality.kept_rows(made.first), quality.kept_rows(made.second)
    assert sum(second) < sum(first)
    assert all(was for was, stays in zip(first, second, strict=True) if stays)


@slow
def test_the_shards_hold_what_the_second_ledger_keeps(quality, run):
    made, _, work = run
    rows = [
        row
        for path in (work / "food" / "shards").glob("t*-*.parquet")
        for row in pq.read_table(path)["row"].to_pylist()
    ]
    rows += [
        row
        for path in (work / "food" / "shards").glob("val-*.parquet")
        for row in pq.read_table(path)["row"].to_pylist()
    ]
    assert sorted(rows) == [place for place, stays in enumerate(quality.kept_rows(made.second)) if stays]


def test_one_of_a_picture_and_its_copies_counts_as_the_picture(quality):
    mix = make_mix(0.02)
    kinds = [row.kind for row in mix.rows]
    copy = next(place for place, row in enumerate(mix.rows) if row.kind == "exact duplicate")
    original = next(
        place for place, row in enumerate(mix.rows) if row.kind == "clean" and row.picture == mix.rows[copy].picture
    )
    kept = [place == copy for place in range(len(kinds))]
    told = quality.truths(mix, kept)
    assert (told[copy], told[original]) == ("clean", "exact duplicate")
    assert quality.truths(mix, [False] * len(kinds)) == kinds
    assert quality.truths(mix, [True] * len(kinds)) == kinds


def test_shares_over_several_crawls_are_those_of_all_their_rows(quality):
    one = quality.Told(["clean", "clean", "tiny", "tiny"], [True, False, False, False])
    other = quality.Told(["clean", "tiny"], [True, True])
    both = quality.Told.together([one, other])
    assert (one.precision(), other.precision(), both.precision()) == (1.0, 0.5, pytest.approx(2 / 3, abs=1e-4))
    assert both.recalls() == {"clean": pytest.approx(2 / 3, abs=1e-4), "tiny": pytest.approx(2 / 3, abs=1e-4)}


def test_the_interval_of_a_share_is_wilsons(quality):
    # 81 of 263: Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3.
    assert quality.wilson(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert quality.wilson(20, 20)[1] == pytest.approx(1)


def test_the_mix_is_the_same_each_time():
    first, again, other = make_mix(0.02), make_mix(0.02), make_mix(0.02, seed=9)
    assert first == again
    assert first.bodies != other.bodies


def test_the_benchmark_changes_of_the_recipe_what_is_the_users_own(quality, tmp_path):
    shipped = yaml.safe_load(quality.RECIPE.read_text())
    ours = quality.domain_recipe(tmp_path, tmp_path / "clip", 0.6, 0.3)
    differ = [a["name"] for a, b in zip(shipped["filters"], ours["filters"], strict=True) if a != b]
    assert differ == ["leak", "on_topic", "aligned"]
    assert [step.name for step in parse_steps(shipped["filters"])] == [
        step.name for step in parse_steps(ours["filters"])
    ]
    assert {name for name in shipped if shipped[name] != ours[name]} == {"measure", "filters"}
