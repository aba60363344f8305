"""What a run of fetch says while it is at work: counts, speed, who is slowed down, and when little arrives."""

import logging
from types import SimpleNamespace

import pytest

import curate.progress
from curate.fetch.task import ShardTask
from curate.fetch.tell import ENOUGH_ROWS, Teller
from tests.curate.fetching import patient, write_plan


@pytest.fixture
def tasks(tmp_path):
    plans = [write_plan(tmp_path, [f"http://a.example/{n}" for n in range(ENOUGH_ROWS)], shard) for shard in range(2)]
    return [ShardTask(plan, tmp_path / "raw" / plan.stem, "test", patient()) for plan in plans]


@pytest.fixture
def clock(monkeypatch):
    """Time that moves when told, so that half a minute of a log is over at once."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(curate.progress.time, "monotonic", lambda: now.seconds)
    return now


def said(counts, size=0, throttled=(), paused=0.0, kept=None):
    return {"counts": counts, "kept": kept or {}, "bytes": size, "throttled": list(throttled), "paused": paused}


def test_where_there_is_no_terminal_a_line_every_half_minute_says_it_all(tasks, clock, caplog):
    caplog.set_level(logging.INFO, logger="cliptailor")
    with Teller(tasks) as teller:
        teller.report(tasks[0], said({"success": 10}))
        assert not caplog.messages
        clock.seconds += 40
        teller.report(tasks[0], said({"success": 300, "http_status": 90, "dns": 10}, size=80_000_000))
        clock.seconds += 1
        teller.report(tasks[0], said({"success": 301, "http_status": 90, "dns": 10}, size=80_000_000))
    assert caplog.messages == [
        "fetch: 400 of 2000 (10.0/s, 3 min left) 2.0 MB/s · 75% ok · http_status 90 · dns 10",
    ]


def test_slowed_hosts_and_an_outage_are_shown_while_they_last(tasks, clock, caplog):
    caplog.set_level(logging.INFO, logger="cliptailor")
    with Teller(tasks) as teller:
        clock.seconds += 40
        teller.report(tasks[0], said({"success": 1}, throttled=["a.org", "b.org", "c.org", "d.org"]))
        clock.seconds += 40
        teller.report(tasks[0], said({"success": 2}, paused=40.0))
        clock.seconds += 40
        teller.report(tasks[0], said({"success": 3}))
    slowed, paused, over = caplog.messages
    assert slowed.endswith("slowed down: a.org, b.org, c.org and 1 more")
    assert paused.endswith("paused: no network for 40 s")
    assert over.endswith("100% ok")


def test_slowed_hosts_and_an_outage_are_those_of_all_workers(tasks, clock, caplog):
    caplog.set_level(logging.INFO, logger="cliptailor")
    with Teller(tasks) as teller:
        teller.report(tasks[0], said({"success": 1}, throttled=["c.org", "a.org"], paused=40.0))
        clock.seconds += 40
        teller.report(tasks[1], said({"success": 1}, throttled=["b.org", "a.org"], paused=3.0))
        clock.seconds += 40
        teller.report(tasks[1], said({"success": 2}))
        teller.report(tasks[0], said({"success": ENOUGH_ROWS}, throttled=["c.org"]))  # this shard is over
        clock.seconds += 40
        teller.report(tasks[1], said({"success": 3}))
    both, one, none = caplog.messages
    assert both.endswith("slowed down: a.org, b.org, c.org · paused: no network for 40 s")
    assert one.endswith("slowed down: a.org, c.org · paused: no network for 40 s")
    assert none.endswith("100% ok")


def test_a_shard_that_is_tried_again_is_not_counted_twice(tasks, clock, caplog):
    caplog.set_level(logging.INFO, logger="cliptailor")
    with Teller(tasks) as teller:
        for counts in ({"success": 5}, {"success": 2}, {"success": 6}):
            teller.report(tasks[0], said(counts, size=1_000_000))
        teller.report(tasks[1], said({"success": 4}, size=3_000_000))
        clock.seconds += 40
        teller.report(tasks[1], said({"success": 4}, size=3_000_000))
    assert caplog.messages == ["fetch: 10 of 2000 (0.2/s, 133 min left) 0.1 MB/s · 100% ok"]


@pytest.mark.parametrize(("arrived", "warned"), [(499, True), (500, False)])
def test_a_low_share_is_said_once_after_a_thousand_rows(tasks, caplog, arrived, warned):
    with Teller(tasks) as teller:
        teller.report(tasks[0], said({"success": arrived - 1, "dns": 1000 - arrived}))
        assert not caplog.messages  # 999 rows
        teller.report(tasks[0], said({"success": arrived, "dns": 1000 - arrived}))
        teller.report(tasks[1], said({"dns": 900}))
    assert [message.partition(";")[0] for message in caplog.messages] == [
        "fetch   only 50 % of the first 1,000 rows are images: dns 501"
    ] * warned


def test_rows_from_an_earlier_run_say_nothing_of_this_one(tasks, caplog):
    caplog.set_level(logging.INFO, logger="cliptailor")
    kept = {"success": 990, "dns": 10}
    with Teller(tasks) as teller:
        teller.report(tasks[0], said(kept, kept=kept))
        teller.report(tasks[1], said({"dns": 900, "success": 99}))
        assert not caplog.messages  # 999 were asked for
        teller.report(tasks[1], said({"dns": 901, "success": 99}))
    low, summary = caplog.messages
    assert low.startswith("fetch   only 10 % of the first 1,000 rows are images: dns 901")
    assert summary == "fetch   1,000 rows were there from before, 1,000 were asked for"
