"""The stage as a whole: plan files in, raw shards out, through kills, changes and dead workers."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curate.config import FetchConfig
from curate.errors import InputError
from curate.fetch import MANNER_OF_FETCHING, FetchResult, run
from curate.files import made_from
from tests.curate.fetching import images, impatient, jpeg, patient, read_rows, read_stats, write_plan
from tests.webserver import WebServer, after, page, when

SHARDS, A_SHARD = 3, 8


@pytest.fixture
def server():
    with WebServer() as running:
        yield running


def serve(server, out, behaviour=page):
    """A plan of SHARDS files, A_SHARD rows each, every second picture missing."""
    for shard in range(SHARDS):
        urls = [f"/{shard}-{number}.jpg" for number in range(A_SHARD)]
        for number, path in enumerate(urls):
            server.add(path, behaviour(jpeg(shard * A_SHARD + number)) if number % 2 else page(b"", status=404))
        write_plan(out, [server.url(path) for path in urls], shard)


def files(out):
    return {path.name: path.read_bytes() for path in sorted((out / "raw").iterdir())}


def test_every_plan_row_is_in_raw_once_and_a_second_run_asks_for_nothing(server, tmp_path):
    serve(server, tmp_path)
    result = run(tmp_path, patient(processes=2))
    assert result == FetchResult({"success": 12, "http_status": 12}, made=3, reused=0)
    assert (result.rows, result.images) == (24, 12)
    for shard in range(SHARDS):
        plan = pq.read_table(tmp_path / "plan" / f"{shard:05d}.parquet").to_pylist()
        rows = read_rows(tmp_path, shard)
        assert [{name: row[name] for name in plan[0]} for row in rows] == plan
        assert read_stats(tmp_path, shard)["successes"] == 4
    assert images(tmp_path) == {
        f"{s:02d}{n:08d}": jpeg(s * A_SHARD + n) for s in range(SHARDS) for n in range(1, A_SHARD, 2)
    }

    asked, before = server.asked.total(), files(tmp_path)
    assert run(tmp_path, patient(processes=1, connections=3, contact="me@example.org")) == FetchResult(
        result.counts, made=0, reused=3
    )
    assert server.asked.total() == asked
    assert files(tmp_path) == before


def test_only_the_shards_whose_plan_changed_are_fetched_again(server, tmp_path):
    serve(server, tmp_path)
    run(tmp_path, patient())
    asked = dict(server.asked)
    write_plan(tmp_path, [server.url("/1-1.jpg"), server.add("/new.jpg", page(jpeg(99)))], shard=1)
    (tmp_path / "plan" / "00002.parquet").unlink()
    result = run(tmp_path, patient())
    assert result == FetchResult({"success": 6, "http_status": 4}, made=1, reused=1)
    assert {path for path, count in server.asked.items() if count != asked.get(path)} == {"/new.jpg"}
    assert [path.name for path in (tmp_path / "raw").glob("00002*")] == []


def test_what_changes_the_stored_images_fetches_again_and_speeds_do_not(server, tmp_path):
    serve(server, tmp_path)
    run(tmp_path, patient())
    assert run(tmp_path, patient(retries=1, connections=7, min_yield=0.5)).made == 0
    assert run(tmp_path, patient(image_size=20)).made == SHARDS
    assert {row["height"] for row in read_rows(tmp_path) if row["status"] == "success"} == {20}


def test_every_key_of_the_configuration_is_known_to_decide_what_is_stored_or_not():
    """A new key must be given its place, here and in curate.fetch."""
    decides = {f.name for f in fields(FetchConfig)} - MANNER_OF_FETCHING
    assert decides == {
        "max_bytes",
        "max_pixels",
        "min_side",
        "max_redirects",
        "allow_addresses",
        "ignore_opt_outs",
        "decode",
        "resize_mode",
        "image_size",
        "resize_only_if_bigger",
        "skip_reencode",
        "encode_format",
        "encode_quality",
    }


def test_a_shard_whose_tar_is_gone_is_fetched_again(server, tmp_path):
    serve(server, tmp_path)
    run(tmp_path, patient())
    (tmp_path / "raw" / "00001.tar").unlink()
    assert run(tmp_path, patient()).made == 1


def test_without_a_plan_the_way_out_is_named(tmp_path):
    with pytest.raises(InputError, match="curate plan"):
        run(tmp_path, FetchConfig())


def test_a_plan_without_candidates_gives_no_shards(tmp_path):
    (tmp_path / "plan").mkdir()
    assert run(tmp_path, FetchConfig()) == FetchResult({}, made=0, reused=0)


FETCH = """
import sys
from pathlib import Path
from curate.fetch import run
from tests.curate.fetching import patient

if __name__ == "__main__":
    run(Path(sys.argv[1]), patient(read_timeout_s=60.0, total_timeout_s=60.0))
"""


def start_fetch(out):
    script = out / "fetch.py"
    script.write_text(FETCH)
    return subprocess.Popen([sys.executable, str(script), str(out)], env={**os.environ, "PYTHONPATH": str(Path.cwd())})


def eventually(condition, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def children_of(pid):
    """Worker processes of a process (Linux), without multiprocessing's own resource tracker."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_killed_in_the_second_shard_and_run_again_it_asks_for_no_finished_row_and_ends_the_same(server, tmp_path):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    serve(server, out)
    serve(server, whole)
    run(whole, patient())
    server.asked.clear()

    gate = threading.Event()
    server.pages["/1-7.jpg"] = when(gate, server.pages["/1-7.jpg"])
    killed = start_fetch(out)
    assert eventually(lambda: server.asked["/1-7.jpg"] == 1 and (out / "raw" / "00002.parquet").exists())
    workers = children_of(killed.pid)
    assert len(workers) == 1
    killed.kill()
    killed.wait()
    assert eventually(lambda: not Path(f"/proc/{workers[0]}").exists())
    assert sorted(path.name for path in (out / "raw").iterdir() if not path.name.startswith(".")) == [
        *("00000.parquet", "00000.tar", "00000_stats.json"),
        *("00002.parquet", "00002.tar", "00002_stats.json"),
        "settings.json",
    ]
    assert any(path.name.startswith(".00001.tar") for path in (out / "raw").iterdir())

    asked = dict(server.asked)
    gate.set()
    result = run(out, patient())
    assert (result.made, result.reused) == (1, 2)
    assert {path for path in server.asked if path.startswith("/0-")} == {
        f"/0-{number}.jpg" for number in range(A_SHARD)
    }
    assert all(server.asked[f"/0-{number}.jpg"] == asked[f"/0-{number}.jpg"] == 1 for number in range(A_SHARD))
    assert images(out) == images(whole)
    assert [facts(row) for row in read_rows(out, 1)] == [facts(row) for row in read_rows(whole, 1)]
    assert not any(path.name.startswith(".") for path in (out / "raw").iterdir())


def facts(row):
    """A row without its places in the tar, which are in the order of arrival."""
    return {name: value for name, value in row.items() if not name.endswith("_offset")}


def test_a_killed_worker_costs_one_try_of_its_shard(server, tmp_path):
    serve(server, tmp_path)
    gate = threading.Event()
    server.pages["/1-7.jpg"] = when(gate, server.pages["/1-7.jpg"])
    parent = start_fetch(tmp_path)
    assert eventually(lambda: server.asked["/1-7.jpg"] == 1 and (tmp_path / "raw" / "00000.parquet").exists())
    os.kill(children_of(parent.pid)[0], signal.SIGKILL)
    gate.set()
    assert parent.wait(30) == 0
    assert [len(read_rows(tmp_path, shard)) for shard in range(SHARDS)] == [A_SHARD] * SHARDS
    assert len(images(tmp_path)) == 12
    assert server.asked["/1-7.jpg"] == 2


def test_a_shard_that_kills_its_worker_twice_is_told_as_worker_died_and_tried_again_by_the_next_run(server, tmp_path):
    serve(server, tmp_path)
    gate = threading.Event()
    server.pages["/1-7.jpg"] = when(gate, server.pages["/1-7.jpg"])
    parent = start_fetch(tmp_path)
    others = [tmp_path / "raw" / name for name in ("00000.parquet", "00002.parquet")]
    for number in (1, 2):
        assert eventually(lambda number=number: server.asked["/1-7.jpg"] == number and all(map(made_from, others)))
        os.kill(children_of(parent.pid)[0], signal.SIGKILL)
    assert parent.wait(30) == 0
    assert {(row["status"], row["reason"]) for row in read_rows(tmp_path, 1)} == {("failed_to_download", "worker_died")}
    assert read_stats(tmp_path, 1)["status_dict"] == {"worker_died": A_SHARD}
    assert len(images(tmp_path)) == 8

    gate.set()
    assert run(tmp_path, patient()) == FetchResult({"success": 12, "http_status": 12}, made=1, reused=2)


def test_ctrl_c_stops_in_seconds_and_keeps_what_is_finished(server, tmp_path):
    serve(server, tmp_path)
    server.pages["/1-7.jpg"] = after(60, page(b""))
    parent = start_fetch(tmp_path)
    assert eventually(lambda: server.asked["/1-7.jpg"] == 1 and (tmp_path / "raw" / "00002.parquet").exists())
    workers = children_of(parent.pid)
    started = time.monotonic()
    parent.send_signal(signal.SIGINT)
    assert parent.wait(50) != 0
    assert time.monotonic() - started < 20
    assert eventually(lambda: not Path(f"/proc/{workers[0]}").exists(), seconds=20)
    assert (tmp_path / "raw" / "00000.parquet").exists()
    assert not (tmp_path / "raw" / "00001.parquet").exists()
    assert not list((tmp_path / "raw").glob(".*"))
    assert run(tmp_path, impatient()).reused == 2


def test_order_of_arrival_and_number_of_processes_change_no_row(server, tmp_path):
    serve(server, tmp_path / "a")
    run(tmp_path / "a", patient(processes=1))
    serve(server, tmp_path / "b", behaviour=lambda content: after(0.01 + content[-5] % 7 / 50, page(content)))
    run(tmp_path / "b", patient(processes=2, connections=3))
    for shard in range(SHARDS):
        assert [facts(row) for row in read_rows(tmp_path / "a", shard)] == [
            facts(row) for row in read_rows(tmp_path / "b", shard)
        ]
    assert images(tmp_path / "a") == images(tmp_path / "b")


def test_many_rows_share_few_connections(server, tmp_path):
    urls = [server.add(f"/{number}.jpg", page(jpeg(number % 5))) for number in range(600)]
    write_plan(tmp_path, urls)
    assert run(tmp_path, patient(per_host=8, read_timeout_s=10.0, total_timeout_s=10.0)).images == 600
    assert server.accepted <= 8
    assert server.asked.total() == 601  # with robots.txt


LIGHT = """
import sys
from pathlib import Path
from curate import fetch, plan
from curate.config import FetchConfig, PlanConfig
if __name__ == "__main__":
    urls, out = sys.argv[1], Path(sys.argv[2])
    plan.run(urls, out, PlanConfig(), [])
    assert fetch.run(out, FetchConfig(processes=1, allow_addresses=["127.0.0.0/8"])).images == 4
    print(sorted({"pandas", "cv2", "aiohttp", "PIL", "torch"} & set(sys.modules)))
"""


def test_the_parent_of_the_workers_imports_nothing_heavy(server, tmp_path):
    urls = [server.add(f"/{number}.jpg", page(jpeg(number))) for number in range(4)]
    (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{url},a\n" for url in urls))
    (tmp_path / "light.py").write_text(LIGHT)
    command = [sys.executable, tmp_path / "light.py", tmp_path / "list.csv", tmp_path / "out"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip() == "[]"
