"""One worker's engine: retries, outages, crashed decoders, and what it tells."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from curate.errors import Outage
from curate.fetch import outage, run
from curate.fetch.decoding import journal_of
from curate.fetch.task import ShardTask
from tests.curate.fetching import fetch_here, images, jpeg, make_here, patient, read_rows, write_plan
from tests.webserver import WebServer, after, one_after_another, page

BUSY = page(b"", status=503)


@pytest.fixture
def server():
    with WebServer() as running:
        yield running


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return closed.getsockname()[1]


def noting(order, behaviour):
    async def behave(exchange):
        order.append(exchange.path)
        return await behaviour(exchange)

    return behave


# --- order -----------------------------------------------------------------------------------------------------------


def test_retries_come_after_every_first_try_of_the_shard(server, tmp_path):
    order = []
    flaky = [server.add(f"/flaky{n}.jpg", noting(order, one_after_another(BUSY, page(jpeg(n))))) for n in range(3)]
    good = [server.add(f"/{n}.jpg", noting(order, after(0.01, page(jpeg(n))))) for n in range(20)]
    rows = fetch_here(tmp_path, [*flaky, *good], patient(retries=1, connections=2, per_host=2, backoff_s=0.001))
    assert {row["status"] for row in rows} == {"success"}
    assert set(order[-3:]) == {f"/flaky{n}.jpg" for n in range(3)}


def test_a_second_shard_fills_the_connections_while_the_first_waits_for_its_last_row(server, tmp_path):
    slow = server.add("/slow.jpg", after(0.8, page(jpeg(0))))
    quick = [server.add(f"/{n}.jpg", page(jpeg(n))) for n in range(30)]
    config = patient(read_timeout_s=5.0, total_timeout_s=5.0, connections=3, per_host=3)
    plans = [write_plan(tmp_path, [slow, quick[0]], 0), write_plan(tmp_path, quick[1:], 1)]
    finished = []
    tasks = [ShardTask(plan, tmp_path / "raw" / plan.stem, "test", config) for plan in plans]
    make_here(tmp_path, tasks, config, lambda said: finished.append(said["counts"].get("success")))
    assert {row["status"] for shard in (0, 1) for row in read_rows(tmp_path, shard)} == {"success"}
    stamps = [(tmp_path / "raw" / f"{shard:05d}.parquet").stat().st_mtime_ns for shard in (0, 1)]
    assert stamps[1] < stamps[0]  # the second was whole before the first


def test_a_host_that_asks_for_patience_is_given_up_after_max_wait(server, tmp_path):
    busy = page(b"", status=429, headers={"Retry-After": "30"})
    urls = [server.add(f"/{n}.jpg", busy) for n in range(3)]
    with WebServer("127.0.0.2") as other:
        good = other.add("/good.jpg", page(jpeg()))
        started = time.monotonic()
        rows = fetch_here(tmp_path, [*urls, good], patient(max_wait_s=0.5, per_host=1, max_retry_after_s=60.0))
    assert time.monotonic() - started < 25
    assert rows[3]["status"] == "success"
    assert {row["reason"] for row in rows[:3]} <= {"throttled", "http_status"}
    assert [row["reason"] for row in rows].count("throttled") == 2
    assert server.asked.total() == 2  # robots.txt, and the one that was told to wait


# --- the network -----------------------------------------------------------------------------------------------------


def nowhere(count):
    """URLs of so many hosts at a port where nobody listens."""
    port = free_port()
    return [f"http://127.0.0.{2 + number % 40}:{port}/{number}.jpg" for number in range(count)], port


def test_a_few_dead_hosts_are_taken_for_dead_at_once(tmp_path):
    urls, _ = nowhere(8)
    started = time.monotonic()
    rows = fetch_here(tmp_path, urls, patient(outage_s=60.0))
    assert {row["reason"] for row in rows} == {"connect"}
    assert time.monotonic() - started < 30


def test_many_dead_hosts_among_living_ones_stand_as_their_own_fault(server, tmp_path):
    dead, _ = nowhere(60)
    good = [server.add(f"/{n}.jpg", page(jpeg(n))) for n in range(5)]
    rows = fetch_here(tmp_path, [*good, *dead], patient(outage_s=60.0))
    assert [row["status"] for row in rows[:5]] == ["success"] * 5
    assert {row["reason"] for row in rows[5:]} == {"connect"}


def test_dead_hosts_at_the_head_of_a_list_do_not_hide_the_living_ones_behind_them(server, tmp_path):
    dead, _ = nowhere(60)
    good = [server.add(f"/{n}.jpg", page(jpeg(n))) for n in range(5)]
    rows = fetch_here(tmp_path, [*dead, *good], patient(outage_s=60.0, connections=20))
    assert {row["reason"] for row in rows[:60]} == {"connect"}
    assert [row["status"] for row in rows[60:]] == ["success"] * 5


def test_when_nothing_can_be_reached_the_run_ends_and_nothing_is_marked_as_done(tmp_path):
    urls, _ = nowhere(40)
    write_plan(tmp_path, urls)
    started = time.monotonic()
    with pytest.raises(Outage, match=r"nothing could be reached for 1 s \(127.0.0.\d+: connect .*same command"):
        run(tmp_path, patient(outage_s=1.0, processes=1))
    assert time.monotonic() - started < 20
    assert not list((tmp_path / "raw").glob("*.parquet"))
    assert not list((tmp_path / "raw").glob(".*"))


def test_when_the_network_comes_back_every_row_is_asked_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(outage, "LONGEST_PAUSE_S", 0.5)
    port = free_port()
    urls = [f"http://127.0.0.{2 + number % 20}:{port}/{number}.jpg" for number in range(40)]
    hosts = sorted({url.split("/")[2].split(":")[0] for url in urls})
    servers = []

    def open_once_paused():
        while "paused: no network" not in caplog.text:
            time.sleep(0.05)
        for host in hosts:
            one = WebServer(host)
            one.port = port
            for number in range(40):
                one.add(f"/{number}.jpg", page(jpeg(number)))
            one.__enter__()
            servers.append(one)

    opening = threading.Thread(target=open_once_paused, daemon=True)
    opening.start()
    try:
        with caplog.at_level(logging.INFO, "cliptailor"):
            rows = fetch_here(tmp_path, urls, patient(outage_s=30.0, retries=6, backoff_s=0.5))
    finally:
        opening.join(20)
        for one in servers:
            one.__exit__()
    assert {row["status"] for row in rows} == {"success"}
    assert "fetch: paused: no network (127.0.0." in caplog.text
    assert "the network is back" in caplog.text


def test_a_watch_decides_by_hosts_that_answered_before():
    """Failures are held until an answer or a probe; a probe asks the witnesses, not those that fail."""
    asked, stood, again = [], [], []

    async def reach(address):
        asked.append(address)
        if address[0] != "alive":
            raise OSError("no")

    async def story():
        watch = outage.Watch(reach, 5.0, stood.extend, again.extend)
        watch.answered(("alive", 80))
        for number in range(30):
            watch.failed(number, (f"dead{number}", 80), "connect")
        assert watch.is_suspicious
        assert stood == []
        await watch.decide()
        assert (stood, again, asked) == (list(range(30)), [], [("alive", 80)])
        watch.failed("one", ("dead", 80), "dns")
        watch.answered(("alive", 80))
        assert stood[-1] == "one"

    asyncio.run(story())


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_what_stood_in_a_decoder_when_the_worker_died_is_decoded_apart(server, tmp_path):
    """An innocent image comes through; the file is gone when the shard is whole."""
    urls = [server.add(f"/{n}.jpg", page(jpeg(n))) for n in range(4)]
    plan = write_plan(tmp_path, urls)
    journal = journal_of(tmp_path / "raw" / plan.stem)
    journal.parent.mkdir()
    journal.write_text("0000000002".ljust(64))
    config = patient(read_timeout_s=20.0, total_timeout_s=20.0)
    make_here(tmp_path, [ShardTask(plan, tmp_path / "raw" / plan.stem, "test", config)], config)
    assert {row["status"] for row in read_rows(tmp_path)} == {"success"}
    assert images(tmp_path)["0000000002"] == jpeg(2)
    assert not journal.exists()


CRASH = """
import sys
from pathlib import Path
import curate.fetch.rows as rows, curate.fetch.decoding as decoding
from curate.fetch import run
from tests.curate.fetching import patient

if __name__ == "__main__":
    run(Path(sys.argv[1]), patient(processes=1, read_timeout_s=20.0, total_timeout_s=60.0))
"""
SITE = """
import ctypes, os
if os.environ.get("CRASH_ON"):
    import curate.images.header as header
    probe = header.probe
    def deadly(content):
        if content[-20:].hex() == os.environ["CRASH_ON"]:
            ctypes.string_at(0)
        return probe(content)
    import curate.images.decoding as decoding
    decoding.probe = deadly
"""


def test_an_image_that_crashes_the_decoder_costs_its_row_only(server, tmp_path):
    urls = [server.add(f"/{n}.jpg", page(jpeg(n))) for n in range(12)]
    write_plan(tmp_path, urls)
    (tmp_path / "crash.py").write_text(CRASH)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(tmp_path / "site"), str(Path.cwd())])
    environment = {**os.environ, "PYTHONPATH": path, "CRASH_ON": jpeg(5)[-20:].hex()}
    command = [sys.executable, str(tmp_path / "crash.py"), str(tmp_path)]
    subprocess.run(command, check=True, env=environment, timeout=100)
    rows = read_rows(tmp_path)
    assert [row["reason"] for row in rows] == [None] * 5 + ["worker_died"] + [None] * 6
    assert rows[5]["value"] == "in the decoder"


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_rows_of_an_old_shard_are_kept_without_a_request(server, tmp_path):
    urls = [server.add(f"/{n}.jpg", page(jpeg(n))) for n in range(6)] + [server.url("/gone.jpg")]
    before = fetch_here(tmp_path, urls[:4] + urls[6:], patient())
    old = images(tmp_path)
    server.asked.clear()
    config = patient()
    rows = [{"key": row["key"], "url": row["url"]} for row in before]
    plan = write_plan(tmp_path, urls)  # keys by place: the fifth is another URL's now
    task = ShardTask(plan, tmp_path / "raw" / plan.stem, "new", config, known=tmp_path / "raw" / plan.stem)
    make_here(tmp_path, [task], config)
    assert set(server.asked) - {"/robots.txt"} == {"/4.jpg", "/5.jpg"}
    assert [row["status"] for row in read_rows(tmp_path)] == ["success"] * 6 + ["failed_to_download"]
    assert images(tmp_path).items() >= {row["key"]: old[row["key"]] for row in rows[:4]}.items()


def test_an_old_tar_that_was_cut_costs_its_rows_a_request(server, tmp_path):
    urls = [server.add(f"/{n}.jpg", page(jpeg(n))) for n in range(4)]
    fetch_here(tmp_path, urls, patient())
    tar = tmp_path / "raw" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:4000])
    server.asked.clear()
    config = patient()
    task = ShardTask(tmp_path / "plan" / "00000.parquet", tar.with_suffix(""), "new", config, known=tar.with_suffix(""))
    make_here(tmp_path, [task, replace(task, stem=tmp_path / "raw" / "00001")], config)
    assert 0 < len(set(server.asked) - {"/robots.txt"}) <= 4
    assert {row["status"] for row in read_rows(tmp_path)} == {"success"}


# --- telling ---------------------------------------------------------------------------------------------------------


def test_a_low_share_of_images_is_said_after_a_thousand_rows(server, tmp_path, caplog):
    urls = [server.url(f"/gone{n}.jpg") for n in range(1_100)]
    write_plan(tmp_path, urls)
    with caplog.at_level(logging.INFO, "cliptailor"):
        run(tmp_path, patient(per_host=64, read_timeout_s=20.0, total_timeout_s=20.0))
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "only 0 % of the first 1," in warning
    assert "http_status 1," in warning
