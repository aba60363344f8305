"""Politeness, proven by the log of the server: what it saw, not what the client believes."""

from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from tests.hostile.behaviours import SHARED, addresses, cases
from tests.hostile.running import fetched, hurried, urls_of
from tests.hostile.server import hostile_server

PER_HOST, RATE = 3, 40.0
CALM = SHARED  # three hosts that never complain
MANNERED = ["wait-seconds", "wait-date", "busy-twice", "robots-no", "robots-no-for-us", "robots-moved", "robots-mark"]


def by_host(log):
    found = defaultdict(list)
    for request in log:
        found[request.address].append(request)
    return found


def most_at_once(requests):
    """The most requests that were being answered at one time."""
    moments = sorted([(one.began_s, 1) for one in requests] + [(one.ended_s, -1) for one in requests])
    now = most = 0
    for _, step in moments:
        now += step
        most = max(most, now)
    return most


def most_in(requests, seconds):
    """The most requests that began within any such time."""
    times = sorted(one.began_s for one in requests)
    return max(sum(begin <= other < begin + seconds for other in times) for begin in times)


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda workers: f"{workers}-workers")
def seen(request, tmp_path_factory):
    """A run with so many workers: its rows by URL, and the server's log."""
    mannered = [case for case in cases() if case.name in MANNERED]
    with hostile_server(addresses(cases())) as server, pytest.MonkeyPatch.context() as patch:
        port = server.ports.http
        urls = [f"http://{CALM[n % 3]}:{port}/numbered/{n}.jpg" for n in range(180)]
        urls += [url for number in range(3) for url in urls_of(mannered, server.ports, number)]
        config = hurried(
            server.ports,
            processes=request.param,
            per_host=PER_HOST,
            per_host_rate=RATE,
            read_timeout_s=4.0,
            total_timeout_s=8.0,
            max_wait_s=60.0,
            retries=4,
        )
        rows = fetched(tmp_path_factory.mktemp("polite"), urls, config, patch, shard_size=20)
        yield {row["url"]: row for row in rows}, server.log()


def test_every_row_came_through_that_may(seen):
    rows, _ = seen
    reasons = Counter(row["reason"] for row in rows.values())
    assert reasons == {None: 180 + 3 * 3, "robots_disallow": 3 * 4}


def test_no_host_sees_more_at_once_than_its_limit(seen):
    for host, requests in by_host(seen[1]).items():
        assert most_at_once(requests) <= PER_HOST, host


def test_the_limit_is_used(seen):
    assert max(most_at_once(requests) for requests in by_host(seen[1]).values()) >= 2


def test_no_host_sees_more_in_a_second_than_its_rate(seen):
    for host, requests in by_host(seen[1]).items():
        # One more for the one that begins it; and what the machine held back arrives together.
        assert most_in(requests, 1.0) <= RATE + 1 + PER_HOST, host


def test_retry_after_is_obeyed_for_every_request_to_that_host(seen):
    told = [case for case in cases() if case.name in ("wait-seconds", "wait-date")]
    for case in told:
        requests = sorted(by_host(seen[1])[case.address(cases())], key=lambda one: one.began_s)
        pages = [one for one in requests if one.path != "/robots.txt"]
        assert len(pages) == 6
        # The first answer told it to wait a second (a date has no fractions: up to one less).
        least_s = 0.95 if case.name == "wait-seconds" else 0.0
        first = pages[0]
        later = [one for one in pages if one.began_s > first.ended_s + 0.1]
        assert later
        assert min(one.began_s for one in later) - first.ended_s >= least_s


def test_a_disallowed_path_is_never_asked_for(seen):
    refused = {case.address(cases()) for case in cases() if case.name in MANNERED and case.name.startswith("robots-")}
    for host in refused:
        assert {one.path for one in by_host(seen[1])[host]} <= {"/robots.txt", "/robots-there"}


def test_robots_txt_is_asked_for_once_an_origin_and_before_anything_else(seen):
    for host, requests in by_host(seen[1]).items():
        in_order = sorted(requests, key=lambda one: one.began_s)
        asked = [one for one in in_order if one.path == "/robots.txt"]
        assert len(asked) == 1, host
        assert in_order[0] is asked[0] or in_order[0].path == "/robots.txt"
        assert all(late.began_s >= early.began_s for early, late in pairwise(in_order))
