"""Opt-outs, Retry-After and back-off, as pure functions."""

from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.config import OPT_OUTS
from curate.fetch.manners import backoff_after, opt_out, retry_after_s

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("headers", "directive"),
    [
        ([], None),
        (["all"], None),
        (["nofollow, noarchive"], None),
        (["noai"], "noai"),
        (["noimageai"], "noimageai"),
        (["noml"], "noml"),
        (["noindex"], "noindex"),
        (["noimageindex"], "noimageindex"),
        (["none"], "none"),
        ([" NoAI "], "noai"),
        (["nofollow,noai"], "noai"),
        (["nofollow", "noai"], "noai"),
        (["googlebot: noindex"], None),
        (["googlebot: noindex, noai"], None),
        (["googlebot: noindex", "noai"], "noai"),
        (["cliptailor: noindex"], "noindex"),
        (["Cliptailor : nofollow, noindex"], "noindex"),
        (["*: noai"], "noai"),
        (["googlebot: nofollow, cliptailor: noai"], "noai"),
        (["cliptailor: nofollow, googlebot: noai"], None),
        (["max-image-preview: large, noai"], "noai"),
        (["unavailable_after: Wed, 25 Jun 2025 15:00:00 GMT, noimageai"], "noimageai"),
        (["noindexing"], None),
        (["NOAI;NOIMAGEAI"], "noai"),
        (["all;\tnoimageindex"], "noimageindex"),
        (["noai: true"], "noai"),
        (["googlebot: noai: true"], None),
        (["unavailable_after: 25 Jun 2025 15:00:00 PST"], None),
        (["unavailable_after: Sunday, 25-Jun-25 15:00:00 GMT, none"], "none"),
        (["max-snippet:-1,max-video-preview:-1, noml"], "noml"),
        (["otherbot: noindex, *: nofollow, noml"], "noml"),
        ([",,,"], None),
        ([":noai"], None),
        ([""], None),
    ],
)
def test_opt_outs_bind_unless_they_are_for_another_agent(headers, directive):
    assert opt_out(headers) == directive


@pytest.mark.parametrize(
    ("headers", "heeded"),
    [
        (["1"], True),
        ([" 1 "], True),
        (["0", "1"], True),
        (["0, 1"], True),
        (["0"], False),
        ([], False),
        (["yes"], False),
    ],
)
def test_a_reservation_of_data_mining_is_an_opt_out(headers, heeded):
    assert opt_out([], headers) == ("tdm-reservation" if heeded else None)


def test_each_opt_out_can_be_ignored_by_its_name():
    for name in OPT_OUTS[1:-1]:
        assert opt_out([name]) == name
        assert opt_out([name], ignored=[name]) is None
    assert opt_out(["noai, noindex"], ["1"], ["noai"]) == "noindex"
    assert opt_out(["noai"], ["1"], ["noai"]) == "tdm-reservation"
    assert opt_out(["noai"], ["1"], ["noai", "tdm-reservation"]) is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("0", 0.0),
        ("1.5", None),
        ("315360000", 315_360_000.0),
        ("9" * 400, None),
        ("Mon, 23 Nov 99999999999999999999 12:00:00 GMT", None),
        ("Monday, 23-Nov-26 12:02:00 GMT", 120.0),
        ("Mon Nov 23 12:03:00 2026", 180.0),
        (" 120 ", 120.0),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0.0),
        ("Mon, 23 Nov 2026 12:01:00 -0000", 60.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header, seconds):
    assert retry_after_s(header, NOW) == seconds


def test_backoff_is_drawn_up_to_a_doubling_limit_and_comes_from_the_key():
    waits = [[backoff_after(attempt, 1.0, f"key{number}") for attempt in range(4)] for number in range(200)]
    for attempt in range(4):
        column = [row[attempt] for row in waits]
        assert 0 <= min(column) < 0.1 * 2**attempt
        assert 0.9 * 2**attempt < max(column) <= 2**attempt
        assert len(set(column)) == 200
    assert waits[7] == [backoff_after(attempt, 1.0, "key7") for attempt in range(4)]


@given(header=st.text(max_size=200))
def test_no_header_breaks_anything(header):
    assert opt_out([header], [header]) in {None, *OPT_OUTS[1:]}
    seconds = retry_after_s(header, NOW)
    assert seconds is None or seconds >= 0
