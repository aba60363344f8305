"""Killed with -9 at random moments, parent or worker, a build ends with the bytes of one that was left in peace."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hostile.behaviours import SHARED, addresses, cases
from tests.hostile.running import children
from tests.hostile.server import hostile_server

IMAGES = 200
AT_ONCE = 2
RECIPE = """
filters: [{name: exact, dedup: {by: sha256, keep: row}}, {name: plain, where: luma_std > 1}]
fetch: {allow_addresses: [127.0.0.0/8], processes: 2, retries: 2, backoff_s: 0.05, per_host: 4, connections: 16}
plan: {shard_size: 25}
pack: {shard_size: 60}
"""


def build_command(folder: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "curate.cli", "build", "--config", str(folder / "recipe.yaml")]
    return [*command, "--urls", str(folder / "list.parquet"), "--out", str(out)]


def write_list(folder: Path, port: int) -> None:
    """Pictures of three hosts, copies among them, and pages that give none, each in the same way each time."""
    names = ["missing", "tag-noai", "html", "cut-png", "reset-in-body"]
    paths = [f"numbered/{number % (IMAGES - 20)}.jpg" for number in range(IMAGES)]
    paths += [f"{name}/{number}.jpg" for name in names for number in range(6)]
    urls = [f"http://{SHARED[place % 3]}:{port}/{path}?{place}" for place, path in enumerate(paths)]
    table = pa.table({"url": urls, "caption": [f"picture {place}" for place in range(len(urls))]})
    pq.write_table(table, folder / "list.parquet")
    (folder / "recipe.yaml").write_text(RECIPE)


def finish(command: list[str]) -> float:
    """Run to the end; how long it took, in seconds."""
    started = time.monotonic()
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return time.monotonic() - started


def workers_of(parent: int) -> list[int]:
    """The worker processes of a build; not multiprocessing's own helper."""
    found = []
    for pid in sorted(children(parent)):
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def kill_once(command: list[str], moment_s: float, whom: str, chance: random.Random) -> float | None:
    """Start it and kill the parent after so long, or one of its workers then or as soon as there are any.

    Gives None, or how long it took, in seconds, if it ended before anybody could be killed.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment_s)
    while process.poll() is None:
        try:
            os.kill(process.pid if whom == "parent" else chance.choice(workers_of(process.pid)), signal.SIGKILL)
            break
        except (IndexError, ProcessLookupError):
            time.sleep(0.01)
    else:
        whom = "nobody"
    said = process.communicate(timeout=120)[1]
    if whom == "parent" and process.returncode == -signal.SIGKILL:
        return None
    assert process.returncode == 0, said  # a build whose worker was killed goes on to its end by itself
    return None if whom == "worker" else time.monotonic() - started


def outcome(out: Path) -> dict[str, str]:
    """Digests of what a build is for."""
    files = [out / "ledger.parquet", *sorted((out / "shards").iterdir())]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files}


def killed_and_finished(folder: Path, number: int, kills: int, lasts_s: float) -> tuple[dict[str, str], list[str]]:
    """A build that is killed so many times on its way, and then left to end; and who was killed."""
    chance, out, killed = random.Random(number), folder / f"killed-{number}", list[str]()
    while len(killed) < kills:
        # Most of the time goes into starting and into fetching; a moment anywhere in it.
        whom = chance.choice(["parent", "parent", "worker"])
        ended_s = kill_once(build_command(folder, out), chance.uniform(0.5, lasts_s), whom, chance)
        if ended_s is None:
            killed.append(whom)
        else:
            lasts_s = ended_s  # what is done need not be done again: the moments of the next kills come earlier
    finish(build_command(folder, out))
    assert not [*out.rglob("*.tmp"), *out.glob(".owner"), *(out / "raw").glob(".*.decoding")]
    return outcome(out), killed


def assert_kills_change_nothing(folder: Path, folders: int, kills: int) -> None:
    with hostile_server(addresses(cases())) as server:
        write_list(folder, server.ports.http)
        lasts_s = finish(build_command(folder, folder / "unbroken"))
        expected = outcome(folder / "unbroken")
        assert pq.read_table(folder / "unbroken" / "ledger.parquet").num_rows == IMAGES + 30
        with ThreadPoolExecutor(AT_ONCE) as threads:
            runs = [threads.submit(killed_and_finished, folder, number, kills, lasts_s) for number in range(folders)]
            ends = [run.result() for run in runs]
    assert all(end == expected for end, _ in ends)
    whom = Counter(each for _, killed in ends for each in killed)
    assert whom.total() == folders * kills
    assert set(whom) == {"parent", "worker"}


def test_twenty_kills_at_random_moments_leave_the_bytes_of_an_unbroken_build(tmp_path):
    assert_kills_change_nothing(tmp_path, folders=5, kills=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills(tmp_path):
    assert_kills_change_nothing(tmp_path, folders=20, kills=10)
