import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from curate import report
from curate.ask.arguments import EngineOptions
from curate.ask.overview import overview
from curate.config import ReportConfig
from tests.curate.built import FILTERS, asked, build
from tests.curate.report_folder import CONFIG, example_rows, write_folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("overview") / "out")


def test_the_funnel_is_the_ledgers_in_the_order_of_the_filters(out: Path) -> None:
    found = overview(out, EngineOptions())
    ledger = pd.read_parquet(out / "ledger.parquet")
    assert (found.rows, found.kept) == (60, ledger.kept.sum())
    steps = [step["name"] for step in FILTERS]
    assert [step.step for step in found.funnel] == ["plan", "words", "fetch", *steps[1:]]
    dropped = Counter(zip(ledger.stage[~ledger.kept], ledger.step[~ledger.kept], strict=True))
    assert {(step.stage, step.step): step.dropped for step in found.funnel if step.dropped} == dropped
    left = 60 - np.cumsum([step.dropped for step in found.funnel])
    assert [step.left for step in found.funnel] == left.tolist()
    assert found.funnel[-1].left == found.kept
    assert found.splits == {split: int((ledger.split == split).sum()) for split in ("train", "val", "test")}


def test_reasons_and_hosts_are_counted(out: Path) -> None:
    found = overview(out, EngineOptions())
    ledger = pd.read_parquet(out / "ledger.parquet")
    counts = Counter(zip(ledger.stage[~ledger.kept], ledger.reason[~ledger.kept], strict=True))
    assert {(stage, reason): rows for stage, reason, rows, _ in found.reasons} == counts
    assert all(definition for *_, definition in found.reasons)
    hosts = ledger.assign(host=ledger.url.str.extract("//([^/]+)/")[0]).groupby("host")
    assert {host: (rows, kept) for host, rows, kept, _ in found.hosts} == {
        host: (len(lines), lines.kept.sum()) for host, lines in hosts
    }
    for host, _, _, worst in found.hosts:
        reasons = hosts.get_group(host).reason.value_counts()
        assert reasons[worst] == reasons.max()


def test_distributions_are_of_the_kept_beside_the_dropped(out: Path) -> None:
    found = {name: figures for name, *figures in overview(out, EngineOptions()).distributions}
    ledger = pd.read_parquet(out / "ledger.parquet")
    signals = pd.concat(pd.read_parquet(path) for path in (out / "signals" / "clip").glob("*.parquet"))
    joined = ledger.merge(signals, on="key")
    kept, dropped = joined.clip_score[joined.kept], joined.clip_score[~joined.kept]
    count, low, median, high, median_dropped = found["clip_score"]
    assert count == len(kept)
    # t-digests of few rows are exact but for how they go between two values.
    assert low == pytest.approx(kept.quantile(0.05), abs=0.05)
    assert median == pytest.approx(kept.median(), abs=0.05)
    assert high == pytest.approx(kept.quantile(0.95), abs=0.05)
    assert median_dropped == pytest.approx(dropped.median(), abs=0.1)
    assert {"width", "caption_words"} <= found.keys()
    assert {"row", "phash", "image_offset", "key"}.isdisjoint(found)


def test_what_was_moved_to_retain_counts_as_left(tmp_path: Path) -> None:
    out = write_folder(tmp_path / "out", example_rows())
    found = overview(out, EngineOptions())
    topic = next(step for step in found.funnel if step.step == "on_topic")
    assert (topic.dropped, topic.retained) == (36, 24)
    assert found.funnel[-1].left == found.kept
    assert found.splits["retain"] == 24
    # This ledger says no order, so the manifest's is taken.
    report.run(out, ReportConfig(), CONFIG, seed=3)
    names = [step["name"] for step in CONFIG["filters"]]
    assert [step.step for step in overview(out, EngineOptions()).funnel] == ["plan", names[0], "fetch", *names[1:]]


def test_it_works_before_the_report_and_of_ledger_and_shards_alone(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out / "shards", copy / "shards")
    shutil.copy(out / "ledger.parquet", copy)
    whole, part = overview(out, EngineOptions()), overview(copy, EngineOptions())
    assert (part.funnel, part.splits, part.reasons, part.hosts) == (
        whole.funnel, whole.splits, whole.reasons, whole.hosts
    )  # fmt: skip
    assert "width" in {name for name, *_ in part.distributions}


def test_the_command_shows_the_sum(out: Path, tmp_path: Path) -> None:
    said = asked("inspect", out)
    kept = overview(out, EngineOptions()).kept
    assert f"60 rows in = {kept} kept + {60 - kept} dropped" in said
    assert [line.split()[:2] for line in said.splitlines() if line.startswith("select")][:3] == [
        ["select", "wide"], ["select", "exact"], ["select", "few"]
    ]  # fmt: skip
    assert "not a dataset folder" in asked("inspect", tmp_path, status=2)
    (tmp_path / "ledger.parquet").write_text("no ledger")
    assert "not a ledger of curate" in asked("inspect", tmp_path, status=2)
