"""Is the network gone, or are the hosts dead? Names are looked up by a resolver of the test's own."""

import asyncio
import logging
import socket
import time

import pytest

from curate.errors import Outage
from curate.fetch import engine, outage
from tests.curate.fetching import fetch_here, jpeg, patient
from tests.webserver import WebServer, page

look_up = socket.getaddrinfo


@pytest.fixture
def server():
    with WebServer() as running:
        yield running


@pytest.fixture
def names(monkeypatch):
    """Looks up every name under .test as 127.0.0.1; `names["fail"]` may say for which names it raises, or waits."""
    rules = {"fail": lambda host: None}

    def getaddrinfo(host, *args, **kwargs):
        name = host.decode() if isinstance(host, bytes) else host
        if name is None or not name.endswith(".test"):
            return look_up(host, *args, **kwargs)
        rules["fail"](name)
        return look_up("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return rules


def no_answer(name):
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def on_hosts(server, count, first=0):
    """A picture on each of so many hosts, all of them the one server."""
    paths = [f"/{number}.jpg" for number in range(first, first + count)]
    for number, path in enumerate(paths):
        server.add(path, page(jpeg(number)))
    return [f"http://host{path[1:-4]}.test:{server.port}{path}" for path in paths]


def test_names_that_no_longer_resolve_end_the_run_after_outage_s(server, names, tmp_path):
    names["fail"] = no_answer
    started = time.monotonic()
    with pytest.raises(Outage, match=r"nothing could be reached for 1 s \(host\d+\.test: dns Temporary failure"):
        fetch_here(tmp_path, on_hosts(server, 40), patient(outage_s=1.0))
    assert 1.0 <= time.monotonic() - started < 30
    assert not list((tmp_path / "raw").iterdir())
    assert server.accepted == 0


def test_what_failed_in_an_outage_loses_no_try(server, names, tmp_path, caplog):
    """Not one more try is allowed, and robots.txt of each host failed in the outage, too."""

    def fail_until_paused(name):
        if "paused: no network" not in caplog.text:
            no_answer(name)

    names["fail"] = fail_until_paused
    config = patient(outage_s=30.0, retries=0, backoff_s=5.0, read_timeout_s=10.0, total_timeout_s=10.0)
    with caplog.at_level(logging.INFO, "cliptailor"):
        rows = fetch_here(tmp_path, on_hosts(server, 40), config)
    assert [(row["reason"], row["value"]) for row in rows if row["status"] != "success"] == []
    assert "the network is back" in caplog.text


def test_what_began_in_an_outage_and_fails_after_it_loses_no_try(monkeypatch):
    monkeypatch.setattr(outage, "FIRST_PAUSE_S", 0.01)
    stood, again, probes = [], [], []

    async def reach(address):
        probes.append(address)
        if len(probes) < 3:
            raise OSError("no")

    async def story():
        watch = outage.Watch(reach, 30.0, stood.extend, again.extend)
        watch.answered(("alive", 80))
        began = time.monotonic()
        watch.failed("before", ("host", 80), "dns")
        await watch.decide()
        watch.failed("late", ("host", 80), "dns", began)
        watch.failed("after", ("host", 80), "dns", time.monotonic())
        watch.answered(("alive", 80))

    asyncio.run(story())
    assert (stood, again) == (["after"], ["before", "late"])


def test_names_whose_look_up_hangs_are_not_taken_for_an_outage(server, names, tmp_path, monkeypatch, caplog):
    """They keep the threads that look names up busy; the probe has its own."""
    monkeypatch.setattr(engine, "LOOKUP_THREADS", 4)

    def hang(name):
        if name.startswith("dead"):
            time.sleep(1.0)
            no_answer(name)

    names["fail"] = hang
    dead = [f"http://dead{number}.test:{server.port}/x.jpg" for number in range(24)]
    started = time.monotonic()
    rows = fetch_here(tmp_path, [*on_hosts(server, 4), *dead], patient(outage_s=60.0, connect_timeout_s=0.4))
    assert [row["status"] for row in rows[:4]] == ["success"] * 4
    assert {row["reason"] for row in rows[4:]} <= {"dns", "timeout"}
    assert time.monotonic() - started < 40
    assert "paused" not in caplog.text


def test_a_list_whose_only_server_is_down_ends_soon(names, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    started = time.monotonic()
    rows = fetch_here(tmp_path, [f"http://only.test:{port}/{n}.jpg" for n in range(200)], patient(outage_s=60.0))
    assert {row["reason"] for row in rows} == {"connect"}
    assert time.monotonic() - started < 30


def test_a_pause_is_reported(server, names, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "REPORT_EVERY_S", 0.05)
    monkeypatch.setattr(outage, "LONGEST_PAUSE_S", 0.1)
    paused = [0.0]

    def fail_until_long_paused(name):
        if max(paused) <= 0.3:
            no_answer(name)

    names["fail"] = fail_until_long_paused
    config = patient(outage_s=30.0, read_timeout_s=10.0, total_timeout_s=10.0)
    rows = fetch_here(tmp_path, on_hosts(server, 30), config, lambda said: paused.append(said["paused"]))
    assert {row["status"] for row in rows} == {"success"}
    assert max(paused) > 0.3
    assert paused[-1] == 0


@pytest.mark.parametrize("probes", [1, 2])
def test_an_answer_to_what_was_in_flight_ends_the_doubt(probes, monkeypatch):
    """It comes while the probe, or the one after it, is on its way to a host that has just died."""
    monkeypatch.setattr(outage, "FIRST_PAUSE_S", 0.01)
    stood, again, asked = [], [], []

    async def reach(address):
        asked.append(address)
        if len(asked) == probes:
            watch.answered(("alive.test", 80))
        raise OSError("no")

    async def story():
        watch.answered(("dead.test", 80))
        for number in range(30):
            watch.failed(number, (f"host{number}.test", 80), "connect")
        await asyncio.wait_for(watch.decide(), 5)
        await asyncio.wait_for(watch.running(), 5)

    watch = outage.Watch(reach, 60.0, stood.extend, again.extend)
    asyncio.run(story())
    assert (stood, again, len(asked)) == (list(range(30)), [], probes)
    assert watch.paused_s == 0


def test_where_nothing_has_answered_every_host_is_probed_in_its_turn(monkeypatch):
    """Those that failed, however many failed since, and those that are still to be asked."""
    monkeypatch.setattr(outage, "FIRST_PAUSE_S", 0.01)

    async def found(alive):
        again = []

        async def reach(address):
            if address[0] != alive:
                raise OSError("no")

        waiting = [(f"waiting{number}", 80) for number in range(40)]
        watch = outage.Watch(reach, 1.0, again.extend, again.extend, waiting=lambda: waiting)
        for number in range(40):
            watch.failed(number, (f"failed{number}", 80), "connect")
        await asyncio.wait_for(watch.decide(), 5)
        return again

    for alive in ("failed0", "failed20", "failed39", "waiting39"):
        assert asyncio.run(found(alive)) == list(range(40)), alive
