"""Which request goes next: alone, and as a server's log shows it."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from yarl import URL

from curate.fetch.frontier import Errand, Frontier
from tests.curate.fetching import fetch_here, jpeg, patient, read_rows, write_plan
from tests.webserver import WebServer, page, when


class Turns:
    """Turns of hosts, given by the test: seconds to wait by host, and who holds one."""

    def __init__(self, at_once=1_000, **waits):
        self.waits, self.at_once, self.held, self.slowed = waits, at_once, {}, set()

    def ask(self, host):
        if self.waits.get(host):
            return self.waits[host]
        if self.held.get(host, 0) >= self.at_once:
            return 0.02
        self.held[host] = self.held.get(host, 0) + 1
        return 0.0

    def done(self, host):
        self.held[host] -= 1

    def is_slowed(self, host):
        return host in self.slowed


def errand(host, number=0, shard=0):
    return Errand(shard, [{"key": f"{host}{number}"}], URL(f"http://{host}/{number}"), 5, 60.0)


def taken(frontier, count, timeout=30.0):
    """The names of the next errands."""

    async def take():
        return [(await asyncio.wait_for(frontier.next(), timeout)).rows[0]["key"] for _ in range(count)]

    return take()


def frontier_of(turns, *errands, max_wait_s=60.0, on_throttled=lambda errand: None):
    frontier = Frontier(turns, max_wait_s, on_throttled)
    for shard in sorted({errand.shard for errand in errands}):
        frontier.add_shard(shard, [errand for errand in errands if errand.shard == shard])
    return frontier


def test_hosts_give_one_errand_each_in_turn():
    async def story():
        frontier = frontier_of(Turns(), *(errand(host, n) for host in "ab" for n in range(3)))
        assert await taken(frontier, 6) == ["a0", "b0", "a1", "b1", "a2", "b2"]
        assert frontier.is_idle

    asyncio.run(story())


def test_the_oldest_shard_goes_first():
    async def story():
        frontier = frontier_of(Turns(), errand("a", shard=1), errand("b", shard=0), errand("c", shard=1))
        assert await taken(frontier, 3) == ["b0", "a0", "c0"]

    asyncio.run(story())


def test_a_host_that_must_wait_holds_up_no_other_and_is_asked_once():
    async def story():
        turns = Turns(a=30.0)
        asked = []
        ask = turns.ask
        turns.ask = lambda host: asked.append(host) or ask(host)
        frontier = frontier_of(turns, *(errand("a", n) for n in range(100)), *(errand("b", n) for n in range(20)))
        assert await taken(frontier, 20) == [f"b{n}" for n in range(20)]
        assert asked.count("a") == 1
        with pytest.raises(asyncio.TimeoutError):
            await taken(frontier, 1, timeout=0.1)

    asyncio.run(story())


def test_a_turn_given_back_wakes_who_waits_for_it():
    async def story():
        turns = Turns(at_once=1)
        frontier = frontier_of(turns, errand("a", 0), errand("a", 1))
        assert await taken(frontier, 1) == ["a0"]
        with pytest.raises(asyncio.TimeoutError):
            await taken(frontier, 1, timeout=0.1)
        asyncio.get_running_loop().call_later(0.1, frontier.done, "a")
        assert await taken(frontier, 1) == ["a1"]

    asyncio.run(story())


def test_retries_wait_for_the_first_tries_of_their_own_shard_and_for_their_back_off():
    async def story():
        first, second, other = errand("a", 0), errand("b", 0), errand("c", shard=1)
        frontier = frontier_of(Turns(), first, second, other)
        assert await taken(frontier, 1) == ["a0"]
        frontier.tried(first)
        frontier.add_retry(first, 0.05)
        assert await taken(frontier, 2) == ["b0", "c0"]
        with pytest.raises(asyncio.TimeoutError):
            await taken(frontier, 1, timeout=0.2)  # b has not had its try; that of another shard is none of its
        frontier.tried(second)
        assert await taken(frontier, 1) == ["a0"]
        started = time.monotonic()
        frontier.add_retry(first, 0.2)
        assert await taken(frontier, 1) == ["a0"]
        assert time.monotonic() - started >= 0.19

    asyncio.run(story())


def test_only_a_host_that_asked_for_less_is_given_up_on():
    async def story():
        given_up = []
        turns = Turns(a=5.0, b=5.0)
        turns.slowed.add("a")
        frontier = frontier_of(turns, errand("a"), errand("b"), max_wait_s=1.0, on_throttled=given_up.append)
        with pytest.raises(asyncio.TimeoutError):
            await taken(frontier, 1, timeout=0.1)
        assert [errand.host for errand in given_up] == ["a"]
        assert frontier.has("b")

    asyncio.run(story())


# --- as a server sees it ---------------------------------------------------------------------------------------------


def test_a_slow_host_of_a_thousand_rows_does_not_slow_a_thousand_others(tmp_path):
    """It answers nothing until the others have been asked for everything; they have only to be let through."""
    all_asked = threading.Event()

    def counting(behaviour):
        async def behave(exchange):
            if sum(quick.asked.values()) >= 1_000:
                all_asked.set()
            return await behaviour(exchange)

        return behave

    with WebServer("127.0.0.1") as slow, WebServer("127.0.0.2") as quick:
        tardy = [slow.add(f"/{n}.jpg", when(all_asked, page(jpeg(n % 5)))) for n in range(1_000)]
        brisk = [quick.add(f"/{n}.jpg", counting(page(jpeg(n % 5)))) for n in range(1_000)]
        settings = {"per_host": 2, "connections": 8, "read_timeout_s": 30.0, "total_timeout_s": 30.0}
        rows = fetch_here(tmp_path, tardy + brisk, patient(**settings, ignore_opt_outs=["robots.txt"]))
        assert {row["status"] for row in rows} == {"success"}
        assert slow.most_at_once <= 2


MANY_HOSTS = """
import socket, sys
from pathlib import Path
from tests.curate.fetching import patient, make_here
from curate.fetch.task import ShardTask

look_up = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **more: look_up("127.0.0.1", *rest, **more)
out = Path(sys.argv[1])
config = patient(connections=64, connect_timeout_s=20.0, read_timeout_s=20.0, total_timeout_s=20.0)
make_here(out, [ShardTask(out / "plan" / "00000.parquet", out / "raw" / "00000", "test", config)], config)
# Not ru_maxrss, which begins at the parent's.
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024)
"""


def peak_mb(out, urls):
    """Megabytes that a process of its own takes at most to fetch one shard."""
    write_plan(out, urls)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", MANY_HOSTS, str(out)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    assert {row["status"] for row in read_rows(out)} == {"success"}
    return int(done.stdout)


@pytest.mark.parametrize("hosts", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_is_bounded_when_every_row_is_on_a_host_of_its_own(hosts, tmp_path):
    with WebServer() as server:
        server.add("/a.jpg", page(jpeg()))
        few = peak_mb(tmp_path / "few", [f"http://h{n}.test:{server.port}/a.jpg" for n in range(200)])
        many = peak_mb(tmp_path / "many", [f"http://h{n}.test:{server.port}/a.jpg" for n in range(hosts)])
    assert many < 300
    assert many - few < 20 + hosts / 100  # megabytes: 10 kB a row and host
