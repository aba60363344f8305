"""Killed with -9 at random moments, parent or worker, a build ends with the bytes of one that was left in peace."""

import os
import random
import signal
import subprocess
import sys
import time
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


def kill_once(command: list[str], moment_s: float, whom: str, chance: random.Random) -> bool:
    """Start it and kill the parent, or one of its workers, after so long; whether anybody was there to be killed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with suppress(subprocess.TimeoutExpired):
        said = process.communicate(timeout=moment_s)[1]
        assert process.returncode == 0, said
        return False
    workers = sorted(children(process.pid))
    if whom == "parent":
        process.kill()
    elif workers:
        with suppress(ProcessLookupError):
            os.kill(chance.choice(workers), signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    # A build whose worker was killed goes on to its end by itself.
    assert process.returncode in ((-signal.SIGKILL,) if whom == "parent" else (0,)), said
    return whom == "parent" or bool(workers)


def outcome(out: Path) -> dict[str, str]:
    """Digests of what a build is for."""
    files = [out / "ledger.parquet", *sorted((out / "shards").iterdir())]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files}


def killed_and_finished(folder: Path, number: int, kills: int, lasts_s: float) -> tuple[dict[str, str], int]:
    """A build that is killed so many times on its way, and then left to end."""
    chance, out, done = random.Random(number), folder / f"killed-{number}", 0
    for _ in range(kills):
        # Most of the time goes into starting and into fetching; a moment anywhere in it.
        whom = chance.choice(["parent", "parent", "worker"])
        done += kill_once(build_command(folder, out), chance.uniform(0.5, lasts_s), whom, chance)
    finish(build_command(folder, out))
    assert not [*out.rglob("*.tmp"), *out.glob(".owner"), *(out / "raw").glob(".*.decoding")]
    return outcome(out), done


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
    assert sum(done for _, done in ends) >= folders * kills // 2


def test_twenty_kills_at_random_moments_leave_the_bytes_of_an_unbroken_build(tmp_path):
    assert_kills_change_nothing(tmp_path, folders=5, kills=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills(tmp_path):
    assert_kills_change_nothing(tmp_path, folders=20, kills=10)
