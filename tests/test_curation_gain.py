"""The pieces of benchmarks/curation_gain.py and data_scaling.py that take no training."""

from itertools import pairwise

import pytest

from benchmarks import curation_gain, data_scaling, quality
from curate.config import BuildConfig
from curate.options import read_config
from demo.mix import COUNTS, FOOD, concepts, make_mix, pairs
from finetune.config import FitConfig

# kept, split, stage, step, true kind
ROWS = (
    [(True, "train", None, None, "clean")] * 40
    + [(True, "train", None, None, "mismatched caption")] * 4
    + [(True, "retain", None, None, "off topic, known")] * 6
    + [(False, None, "select", "aligned", "mismatched caption")] * 40
    + [(False, None, "select", "aligned", "clean")] * 2
    + [(False, None, "select", "leak", "leak, same file")] * 5
    + [(False, None, "fetch", None, "broken")] * 3
    + [(False, None, "plan", None, "boilerplate caption")] * 3
)


@pytest.fixture
def crawled(tmp_path):
    names = ("kept", "split", "stage", "step")
    ledger = [{"key": f"{n:05d}", **dict(zip(names, row, strict=False))} for n, row in enumerate(ROWS)]
    return curation_gain.Crawl(tmp_path / "crawl" / "food", ledger, [row[-1] for row in ROWS])


def test_the_arms_are_what_they_say(crawled):
    arms = {arm: curation_gain.keys(crawled, arm, 0) for arm in curation_gain.ARMS}
    assert {arm: len(chosen) for arm, chosen in arms.items()} == {
        "curated": 44,
        "uncurated": 92,
        "random": 44,
        "+ retain": 50,
        "true labels": 42,
    }
    assert not set(arms["uncurated"]) & {f"{n:05d}" for n in range(92, 103)}, "leaks and what never arrived"
    assert set(arms["random"]) < set(arms["uncurated"])
    assert curation_gain.keys(crawled, "random", 1) != arms["random"] == curation_gain.keys(crawled, "random", 0)
    assert curation_gain.clean_share(crawled, "curated") == pytest.approx(40 / 44)


def test_a_crawl_has_its_share_of_junk_and_three_pairs_of_ten_are_copies():
    counts = curation_gain.counts(1000, 0.7)
    assert set(counts) == set(COUNTS)
    assert sum(counts.values()) == pytest.approx(1000)
    assert counts["clean"] == pytest.approx(300)
    copies = counts["exact duplicate"] + counts["near duplicate"]
    assert copies / (copies + counts["clean"]) == pytest.approx(0.3, abs=0.005)
    shares = curation_gain.counts(40, 0.7)
    kinds = [row.kind for row in make_mix(food=("TOMATO", "LEMON"), other=("KEY",), shares=shares).rows]
    assert {kind: kinds.count(kind) for kind in ("clean", "mismatched caption")} == {
        "clean": 12,
        "mismatched caption": 10,
    }


def test_the_world_is_large_and_each_concept_is_of_one_group():
    food, other = concepts("food"), concepts("animal", "plant", "vehicle", "clothing", "building", "instrument", "tool")
    assert (len(food), len(set(other))) == (112, 288)
    assert not set(food) & set(other)
    assert set(FOOD) <= set(food)
    told = [pair.caption for pair in pairs(("TACO", "OWL"), 24, seed=0)]
    assert any(caption.startswith("food: taco") for caption in told)
    assert any(caption.startswith("animal: owl") for caption in told)


def test_the_gain_is_of_the_means_with_an_interval_over_the_seeds():
    told = curation_gain.gain("gain", [0.55, 0.6, 0.65], [0.5, 0.5, 0.5])
    assert told["gain"] == pytest.approx(0.2)
    assert 0.1 <= told["gain_low"] < 0.2 < told["gain_high"] <= 0.3


def test_the_configuration_of_a_training_is_one_that_finetune_reads(crawled, tmp_path):
    setting = curation_gain.Setting(tmp_path, steps=7)
    made = curation_gain.training(setting, crawled, ["00001", "00002"], 3, tmp_path / "run")
    config = read_config(quality.write_yaml(tmp_path / "fit.yaml", made), FitConfig)
    assert config.data.sources[0].where == "key IN ('00001', '00002')"
    assert (config.trainer.max_steps, config.trainer.max_epochs, config.seed_everything) == (7, None, 3)
    assert config.data.replay == 0
    assert config.keep.interpolate == 0


def test_the_recipe_of_a_crawl_is_one_that_curate_reads_and_packs_all_to_train_on(tmp_path):
    made = curation_gain.recipe(tmp_path, tmp_path / "clip", 0.8, 0.5)
    config = read_config(quality.write_yaml(tmp_path / "build.yaml", made), BuildConfig)
    assert config.measure.clip.name == f"local-dir:{tmp_path / 'clip'}"
    assert (config.pack.val, config.pack.test, config.fetch.image_size) == (0, 0, 64)
    (aligned,) = [step for step in config.filters if step["name"] == "aligned"]
    assert aligned["where"] == "clip_score >= 0.5"


def test_parts_of_a_crawl_lie_within_each_other(crawled):
    for arm in data_scaling.ARMS:
        parts = [data_scaling.part(crawled, arm, fraction, 0) for fraction in data_scaling.FRACTIONS]
        assert all(set(small) <= set(large) for small, large in pairwise(parts))
        assert parts[-1] == curation_gain.keys(crawled, arm, 0)
        assert data_scaling.part(crawled, arm, 0.5, 1) != parts[2]
    assert len(data_scaling.part(crawled, "uncurated", 0.25, 0)) == 23
    assert set(data_scaling.part(crawled, "curated", 0.5, 0)) <= set(data_scaling.part(crawled, "uncurated", 0.5, 0))


@pytest.mark.parametrize(("value", "pairs"), [(0.1, 100), (0.3, 150), (0.5, 300), (0.61, None)])
def test_what_pairs_are_worth_is_read_off_the_uncurated_curve(value, pairs):
    assert data_scaling.equal(value, [(100, 0.2, 0), (200, 0.4, 0), (400, 0.6, 0)]) == pairs


def test_the_chart_has_a_line_for_each_size():
    told = data_scaling.chart({"curated": [(10, 0.25, 0), (20, 0.5, 0)], "uncurated": [(1000, 0.1, 0)]}).splitlines()
    assert [line.count("#") for line in told] == [25, 50, 10]
    assert told[2].split() == ["uncurated", "1,000", "#" * 10, "10.0%"]
