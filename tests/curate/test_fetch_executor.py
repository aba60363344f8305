"""Workers that finish, raise, die, are interrupted or lose their parent: real processes, real signals."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path

import pytest

from curate.errors import InputError, UnwantedResult
from curate.executor import Outcome, Processes, WorkerError, run_over


def doing(function):
    """The work of a worker that does this with each item."""
    return partial(open_worker, function)


@asynccontextmanager
async def open_worker(function, number):
    async def do(item, report):
        return await asyncio.to_thread(function, item, report)

    yield do


def square(number, report):
    report(f"squaring {number}")
    return number**2, os.getpid()


def die_at(item, report):
    """Kill this worker at a marked item, as often as its folder has no file for."""
    folder, deaths = item
    (Path(folder) / f"try{len(list(Path(folder).iterdir()))}").touch()
    if len(list(Path(folder).iterdir())) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def raise_at(number, report):
    if number == 2:
        raise InputError("shard 2 is unreadable")
    return number


def interrupt_myself(number, report):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    return number


def sleep_long(folder, report):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_every_item_has_one_outcome_and_reports_arrive(processes):
    reports = []
    with closing(
        run_over(doing(square), range(5), Processes(processes), on_report=lambda *r: reports.append(r))
    ) as outcomes:
        results = {outcome.item: outcome.result for outcome in outcomes}
    assert {item: result[0] for item, result in results.items()} == {0: 0, 1: 1, 2: 4, 3: 9, 4: 16}
    pids = {result[1] for result in results.values()}
    assert os.getpid() not in pids
    assert len(pids) <= max(1, processes)
    assert sorted(reports) == [(number, f"squaring {number}") for number in range(5)]
    assert not any(alive(pid) for pid in pids)


def test_no_items_start_no_worker():
    assert list(run_over(doing(square), [], Processes(2))) == []


@pytest.mark.parametrize(("deaths", "died"), [(0, False), (1, False), (2, True), (9, True)])
def test_a_killed_worker_is_noticed_and_its_item_is_tried_twice(tmp_path, deaths, died):
    items = []
    for name, count in (("marked", deaths), ("other", 0)):
        (tmp_path / name).mkdir()
        items.append((str(tmp_path / name), count))
    started = time.monotonic()
    outcomes = {outcome.item: outcome for outcome in run_over(doing(die_at), items, Processes(1))}
    assert time.monotonic() - started < 60
    assert outcomes[items[0]] == Outcome(items[0], None if died else "done", died)
    assert not outcomes[items[1]].died or deaths > 1  # it may have been in the same worker both times
    assert len(list((tmp_path / "marked").iterdir())) == min(deaths + 1, 2)


def wait_for_all(item, report):
    """Note the worker, and go on when so many have: it hangs if they are not at work at once."""
    folder, name, count = item
    (Path(folder) / f"{name}-{os.getpid()}").touch()
    if not eventually(lambda: len(list(Path(folder).iterdir())) >= count):
        raise TimeoutError(f"{name} waited for the others in vain")
    return os.getpid()


@pytest.mark.parametrize(("processes", "items", "workers"), [(1, 2, 1), (2, 2, 2), (2, 4, 2)])
def test_a_worker_is_given_a_second_item_when_each_has_one(tmp_path, processes, items, workers):
    todo = [(str(tmp_path), number, items) for number in range(items)]
    pids = [outcome.result for outcome in run_over(doing(wait_for_all), todo, Processes(processes))]
    assert len(set(pids)) == workers
    assert all(pids.count(pid) == items // workers for pid in pids)


def die_together(item, report):
    """Kill the worker when both of its items are at work."""
    folder, name = Path(item[0]), item[1]
    (folder / f"{name}-{os.getpid()}").touch()
    if eventually(lambda: len(list(folder.glob(f"*-{os.getpid()}"))) == 2) and name == "first":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_a_death_costs_both_items_of_the_worker_a_try(tmp_path):
    items = [(str(tmp_path), "first"), (str(tmp_path), "second")]
    outcomes = list(run_over(doing(die_together), items, Processes(1)))
    assert sorted(outcomes, key=lambda outcome: outcome.item) == [Outcome(item, None, died=True) for item in items]
    assert len(list(tmp_path.iterdir())) == 4


@asynccontextmanager
async def die_at_the_start(number):
    os.kill(os.getpid(), signal.SIGKILL)
    yield


def test_workers_that_never_come_up_are_no_fault_of_the_items():
    with pytest.raises(UnwantedResult, match="no worker is left"):
        list(run_over(die_at_the_start, range(3), Processes(2)))


def test_what_a_worker_raises_is_raised_here_with_its_traceback():
    with pytest.raises(InputError, match="shard 2 is unreadable") as raised:
        list(run_over(doing(raise_at), range(4), Processes(1)))
    assert isinstance(raised.value.__cause__, WorkerError)
    assert "raise_at" in str(raised.value.__cause__)


def test_workers_do_not_hear_ctrl_c():
    assert [outcome.result for outcome in run_over(doing(interrupt_myself), [1, 2], Processes(1))] == [1, 2]


def test_the_first_worker_of_a_process_does_not_hear_ctrl_c_either(tmp_path):
    """It is the one that starts multiprocessing's resource tracker, which plays with the signal mask itself."""
    script = tmp_path / "first.py"
    script.write_text("""
from tests.curate.test_fetch_executor import doing, interrupt_myself
from curate.executor import Processes, run_over

if __name__ == "__main__":
    print([outcome.result for outcome in run_over(doing(interrupt_myself), [1], Processes(1))])
""")
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert (ran.stdout, ran.stderr) == ("[1]\n", "")


def test_closing_the_iterator_stops_the_workers(tmp_path):
    (tmp_path / "quick").mkdir()

    def interrupt(item, message):
        raise KeyboardInterrupt

    with (
        closing(run_over(doing(square), [1], Processes(1), on_report=interrupt)) as outcomes,
        pytest.raises(KeyboardInterrupt),
    ):
        next(outcomes)


PARENT = """
import sys
from contextlib import closing
from tests.curate.test_fetch_executor import doing, sleep_long
from curate.executor import Processes, run_over

if __name__ == "__main__":
    with closing(run_over(doing(sleep_long), [sys.argv[1]] * 2, Processes(2))) as outcomes:
        list(outcomes)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_parent(tmp_path, how):
    """SIGINT goes to the whole group, as a terminal's Ctrl-C does; the others to the parent alone."""
    script, folder = tmp_path / "parent.py", tmp_path / "pids"
    script.write_text(PARENT)
    folder.mkdir()
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        text=True,
    )
    try:
        assert eventually(lambda: len(list(folder.iterdir())) == 2)
        pids = [int(path.name) for path in folder.iterdir()]
        (os.killpg if how is signal.SIGINT else os.kill)(parent.pid, how)
        errors = parent.communicate(timeout=60)[1]
    finally:
        parent.kill()
    assert eventually(lambda: not any(alive(pid) for pid in pids), seconds=20)
    if how is signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1  # the parent's; none of the workers'
