"""The turn of a host: limits over all processes, by the server's own log; what a dead process leaves; adaption."""

import asyncio
import fcntl
import multiprocessing
import os
import signal
import time

import pytest

from curate.fetch import hosts
from curate.fetch.hosts import LEAST_SHARE, Hosts, Share
from tests.webserver import WebServer, page

SPAWN = multiprocessing.get_context("spawn")
HOST = "127.0.0.1"


@pytest.fixture
def table(tmp_path):
    hosts.create(tmp_path / "state" / "hosts", 4)
    return tmp_path / "state" / "hosts"


@pytest.fixture
def attach(table):
    """Hosts over the table, closed at the end."""
    opened = []

    def attach(worker=0, per_host=8, rate=0.0):
        opened.append(Hosts(table, worker, per_host, rate))
        return opened[-1]

    yield attach
    for each in opened:
        each.close()


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


# --- by the server's log ---------------------------------------------------------------------------------------------


def ask_a_lot(table, worker, port, requests, per_host, rate):
    """A worker: ten tasks that ask for turns and make a request for each."""
    turns = Hosts(table, worker, per_host, rate)
    left = iter(range(requests))

    async def requester():
        for _ in left:
            async with turns.turn(HOST, 60):
                reader, writer = await asyncio.open_connection(HOST, port)
                writer.write(b"GET /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                await reader.readuntil(b"\r\n\r\n")
                writer.close()

    async def all_of_them():
        await asyncio.gather(*(requester() for _ in range(10)))

    asyncio.run(all_of_them())
    turns.close()


class Log:
    """A page, and when and how many at once it was asked for."""

    def __init__(self, takes_s):
        self.takes_s, self.starts, self.at_once, self.most = takes_s, [], 0, 0

    async def __call__(self, exchange):
        self.starts.append(time.monotonic())
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(self.takes_s)
        self.at_once -= 1  # before the answer: its asker may be quicker than this line
        await page(b"x")(exchange)
        return False


def run_workers(table, workers, requests, log, per_host, rate):
    with WebServer() as server:
        server.add("/a", log)
        at_work = [
            SPAWN.Process(target=ask_a_lot, args=(table, worker, server.port, requests // workers, per_host, rate))
            for worker in range(workers)
        ]
        for process in at_work:
            process.start()
        for process in at_work:
            process.join(60)
        assert [process.exitcode for process in at_work] == [0] * workers
    assert len(log.starts) == requests


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_no_host_sees_more_than_its_limit_at_once_however_many_processes_ask(table, workers):
    log = Log(takes_s=0.02)
    run_workers(table, workers, 120, log, per_host=3, rate=0)
    assert log.most == 3


@pytest.mark.parametrize("workers", [1, 3])
def test_no_host_sees_more_than_its_rate_however_many_processes_ask(table, workers):
    log, rate = Log(takes_s=0.0), 20.0
    run_workers(table, workers, 60, log, per_host=8, rate=rate)
    late_s = 0.8  # what a busy machine may add to one request and not to another; each with a rate of its own: 2 s
    starts = sorted(log.starts)
    for first in range(60):
        for after in range(first + 1, 60):
            assert starts[after] - starts[first] >= (after - first) / rate - late_s


def hold(table, worker, turns, host, held):
    mine = Hosts(table, worker, 8, 0)
    for _ in range(turns):
        assert mine.ask(host) == 0.0
    held.set()
    time.sleep(60)


def test_turns_that_a_killed_worker_held_are_given_back(table, attach):
    held = SPAWN.Event()
    process = SPAWN.Process(target=hold, args=(table, 1, 8, HOST, held))
    process.start()
    assert held.wait(30)
    ours = attach(worker=0)
    assert ours.ask(HOST) > 0
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    end = time.monotonic() + 20
    while ours.ask(HOST) and time.monotonic() < end:
        time.sleep(0.05)
    assert [ours.ask(HOST) for _ in range(7)] == [0.0] * 7
    assert ours.ask(HOST) > 0


def test_turns_of_a_worker_that_lives_are_its_own_however_long_it_holds_them(attach, clock):
    ours, other = attach(worker=0, per_host=1), attach(worker=1, per_host=1)
    assert other.ask(HOST) == 0.0
    for _ in range(5):
        clock.now += 100
        assert ours.ask(HOST) > 0
    other.done(HOST)
    assert ours.ask(HOST) == 0.0


def test_a_worker_begins_without_the_turns_of_the_one_before_it(table, attach):
    before = Hosts(table, 1, 1, 0)
    assert before.ask(HOST) == 0.0
    before.close()
    assert attach(worker=1, per_host=1).ask(HOST) == 0.0


def lock(table, locked):
    with table.open("rb+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        locked.set()
        time.sleep(60)


def test_a_worker_that_is_killed_with_the_lock_in_hand_stops_nobody(table, attach):
    locked = SPAWN.Event()
    process = SPAWN.Process(target=lock, args=(table, locked))
    process.start()
    assert locked.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    assert attach().ask(HOST) == 0.0
    process.join(10)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_hosts_do_not_share_a_limit_and_names_of_one_host_do(attach):
    turns = attach(per_host=1)
    assert turns.ask("a.example") == 0.0
    assert turns.ask("b.example") == 0.0
    assert turns.ask("a.example.") > 0
    turns.done("a.example")
    assert turns.ask("a.example") == 0.0


def test_the_rate_spaces_the_starts_and_gives_nothing_back_for_waiting(attach, clock):
    turns = attach(rate=10)
    assert turns.ask(HOST) == 0.0
    assert turns.ask(HOST) == pytest.approx(0.1)
    clock.now += 5
    assert turns.ask(HOST) == 0.0
    assert turns.ask(HOST) == pytest.approx(0.1)


def test_a_host_that_has_too_much_gets_half_and_is_left_alone_as_long_as_it_asks(attach, clock):
    turns, other = attach(worker=0), attach(worker=1)
    turns.slow_down(HOST, 30.0)
    assert other.ask(HOST) == pytest.approx(30.0)
    assert turns.throttled() == [HOST]
    clock.now += 30.001
    assert [other.ask(HOST) == 0.0 for _ in range(5)] == [True] * 4 + [False]


def test_what_fails_together_is_one_sign(attach, clock):
    turns = attach()
    for _ in range(5):
        turns.slow_down(HOST, 0.0)
        clock.now += 0.1
    assert [turns.ask(HOST) == 0.0 for _ in range(5)] == [True] * 4 + [False]


def test_a_shorter_wait_does_not_undo_a_longer_one(attach, clock):
    turns = attach()
    turns.slow_down(HOST, 30.0)
    turns.slow_down(HOST, 1.0)
    clock.now += 2
    assert turns.ask(HOST) == pytest.approx(28.0)


def test_the_rate_goes_down_with_the_limit_and_never_to_nothing(attach, clock):
    turns = attach(per_host=2, rate=10)
    for expected in (0.2, 0.4, 0.8):
        turns.slow_down(HOST, 0.0)
        clock.now += 10
        assert turns.ask(HOST) == 0.0
        assert turns.ask(HOST) == pytest.approx(expected)
        turns.done(HOST)
    for _ in range(50):
        turns.slow_down(HOST, 0.0)
        clock.now += 10
    assert turns.ask(HOST) == 0.0
    assert turns.ask(HOST) == pytest.approx(0.1 / LEAST_SHARE)


def test_successes_lift_the_limit_to_what_it_was_and_no_further(attach, clock):
    turns = attach(per_host=4)
    for _ in range(20):
        turns.slow_down(HOST, 0.0)
        clock.now += 10
    assert turns.is_slowed(HOST)
    for _ in range(20):
        turns.went_well(HOST)
    assert not turns.is_slowed(HOST)
    assert turns.throttled() == []
    turns.went_well(HOST)
    assert [turns.ask(HOST) == 0.0 for _ in range(5)] == [True] * 4 + [False]


def test_a_crawl_delay_spaces_the_starts_for_all_processes(attach, clock):
    turns, other = attach(worker=0, rate=50), attach(worker=1, rate=50)
    turns.pause_between(HOST, 5.0)
    turns.pause_between(HOST, 1.0)
    assert other.ask(HOST) == pytest.approx(5.0)  # the robots.txt that said so was a request
    clock.now += 5.001
    assert other.ask(HOST) == 0.0
    assert turns.ask(HOST) == pytest.approx(5.0)
    assert turns.throttled() == [HOST]
    assert other.is_slowed(HOST)


@pytest.mark.parametrize(("per_host", "machines"), [(8, 3), (8, 1), (3, 3), (7, 2)])
def test_the_shares_of_all_machines_add_up_to_the_limit(tmp_path, clock, per_host, machines):
    allowed, spacings = 0, []
    for index in range(machines):
        table = tmp_path / str(index) / "hosts"
        hosts.create(table, 2)
        share = Share(index, machines)
        free, paced = Hosts(table, 0, per_host, 0, share), Hosts(table, 1, per_host, 10, share)
        while not free.ask(HOST):
            allowed += 1
        paced.ask("paced.example")
        spacings.append(paced.ask("paced.example"))
        free.pause_between("slow.example", 5.0)
        assert free.ask("slow.example") == pytest.approx(5.0 * machines)
        free.close()
        paced.close()
    assert allowed == per_host
    assert sum(1 / spacing for spacing in spacings) == pytest.approx(10)


def test_a_turn_that_does_not_come_in_time_is_told(attach):
    turns = attach(per_host=1)

    async def second():
        async with turns.turn(HOST, 5), turns.turn(HOST, 0.1):
            raise AssertionError

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(second())
    assert turns.ask(HOST) == 0.0


def test_a_new_run_begins_with_an_empty_table(table, attach):
    turns = attach(per_host=1)
    assert turns.ask(HOST) == 0.0
    turns.slow_down(HOST, 1000.0)
    hosts.create(table, 2)
    assert attach(per_host=1).ask(HOST) == 0.0


def test_asking_takes_microseconds(attach):
    turns = attach()
    started = time.process_time()
    for number in range(2000):
        name = f"host{number}.example"
        assert turns.ask(name) == 0.0
        turns.done(name)
    assert time.process_time() - started < 0.5  # about 0.02 s; a table that is read whole would take minutes
