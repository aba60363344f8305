"""The pieces of benchmarks/fetch.py and whole_run.py at a size that takes no time; figures are nobody's business."""

import http.client
import importlib
import importlib.util
import math
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg

from benchmarks import whole_run
from benchmarks.shared.cost import Cost


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "benchmarks" / "fetch.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_fetch", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photographs(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number, body in enumerate(bench.photographs(24)):
        (folder / f"{number}.jpg").write_bytes(body)
    return folder


def test_photographs_are_the_same_each_time_and_as_large_as_said(bench):
    bodies = list(bench.photographs(240))
    assert bodies[:3] == [body for body, _ in zip(bench.photographs(240), range(3), strict=False)]
    sizes = [tuple(simplejpeg.decode_jpeg_header(body)[1::-1]) for body in bodies]
    assert {size: sizes.count(size) / 240 for size in bench.SIZES} == pytest.approx(bench.SIZES, abs=0.005)
    assert 50_000 < np.mean([len(body) for body in bodies]) < 100_000


def test_the_server_answers_on_one_connection_after_its_latency(bench, photographs):
    with bench.server(photographs, 40) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for path, status in (("/7-3.jpg", 200), ("/8-3.jpg", 200), ("/robots.txt", 404)):
            started = time.monotonic()
            connection.request("GET", path)
            sock = connection.sock
            answer = connection.getresponse()
            content = answer.read()
            assert (answer.status, connection.sock) == (status, sock)
            assert content == ((photographs / "3.jpg").read_bytes() if status == 200 else b"")
            assert time.monotonic() - started > 0.04
        connection.request("GET", "/9-3.jpg", headers={"Connection": "close"})
        connection.sock.settimeout(10)
        assert connection.sock.makefile("rb").read().endswith(content)  # to the end: the server closes
        connection.close()


def test_what_a_command_takes_is_that_of_its_whole_tree(bench):
    below = "import time; held = bytearray(b'1') * 150_000_000\nwhile time.process_time() < 1.2: pass"
    above = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {below!r}])"
    cost = bench.spend([sys.executable, "-c", above])
    assert 1.2 < cost.cpu_s < 12
    assert cost.wall_s > 1.2
    assert cost.worker_mb > 150
    assert cost.tree_mb > 150


@pytest.mark.parametrize("mode", ["resize", "raw"])
def test_our_tool_runs_and_all_rows_arrive(bench, photographs, mode, tmp_path):
    setting = bench.Setting(images=24, runs=1, processes=1, connections=8, bodies=24)
    with bench.server(photographs, 0) as port:
        cost = bench.run("curate", mode, port, 24, setting)
        listed = pq.read_table(bench.write_list(tmp_path / "list.parquet", port, 30, 24))
    assert cost.cpu_s > 0
    assert listed["url"][25].as_py() == f"http://127.0.0.1:{port}/25-1.jpg"


def test_the_codecs_make_the_size_that_is_wanted_and_the_limit_is_one_that_looks_the_same(bench, photographs):
    bodies = [(photographs / f"{number}.jpg").read_bytes() for number in range(6)]
    for way in bench.WAYS.values():
        for body in bodies:
            height, width, *_ = simplejpeg.decode_jpeg_header(body)
            assert way(body).shape == (*bench.target_of(height, width)[::-1], 3)
    rates = bench.codec_rates(bodies, 1)
    assert rates["opencv"][1] > 100
    some = {"quick": (900, 30.0), bench.OUR_WAY: (500, 36.0), "library": (300, 36.0), "slow": (200, 99.0)}
    assert bench.codec_limit(some) == 500
    assert bench.codec_limit(some, ours=False) == 300


def test_the_figures_are_what_they_say(bench):
    setting = bench.Setting(images=1016, runs=1, processes=1, connections=8)

    def cost(cpu_s, wall_s=1.0, worker_mb=100.0):
        return bench.Cost(cpu_s, wall_s, 2 * worker_mb, worker_mb)

    costs = {
        "img2dataset resize start-up": cost(10),
        "img2dataset resize": cost(20),
        "curate resize start-up": cost(1),
        "curate resize": cost(5, worker_mb=150),
        "img2dataset raw start-up": cost(10),
        "img2dataset raw": cost(15),
        "img2dataset unchecked start-up": cost(10),
        "img2dataset unchecked": cost(12),
        "curate raw start-up": cost(1),
        "curate raw": cost(1.5),
        **{f"{tool} resize {ms} ms": cost(9, 4.0) for tool in ("curate", "img2dataset") for ms in bench.LATENCIES_MS},
    }
    figures = bench.figures(costs, setting)
    expected = {
        "net_ratio_resize": 2.5,
        "total_ratio_resize": 4.0,
        "ratio_raw": 10.0,
        "total_ratio_raw": 10.0,
        "ratio_raw_unchecked": 4.0,
        "peak_mb_worker": 150.0,
        "curate_resize_per_cpu_s": 250.0,
        "curate_per_s_20ms": 254.0,
    }
    assert {name: figures[name] for name in expected} == expected


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return whole_run.prepare(tmp_path_factory.mktemp("whole_run"), 128, shard_size=64, unseen=64)


def test_both_whole_runs_are_told_to_do_the_same(setting, capsys):
    from open_clip_train.params import parse_args

    from finetune.cli import main

    assert main([*whole_run.ours(setting), "--dry_run"]) == 0
    plan = capsys.readouterr().out
    told = parse_args(whole_run.theirs(setting))
    steps = told.epochs * told.train_num_samples // told.batch_size
    assert f"{steps} ({told.epochs} epochs of 2 batches), the first {told.warmup} warm-up" in plan
    assert f"{told.lr}, weight decay {told.wd}: image, " in plan
    assert f"{told.batch_size} pairs" in plan
    assert setting.steps == steps == 4
    assert len(told.train_data.split("::")) == 2


def test_what_a_whole_run_has_not_seen_it_does_not_know(setting):
    from curate.clip import load_clip

    clip = load_clip(f"local-dir:{setting.folder / 'start'}", device="cpu")
    assert whole_run.unseen_loss(clip, setting.folder / "unseen") == pytest.approx(math.log(64), abs=0.5)


def test_the_steps_of_a_whole_run_are_those_of_epochs_that_came_to_their_end():
    log = "\n".join(
        f"Train Epoch: {of} Loss: 4.1" for of in ("0 [ 64/192 (33%)]", "0 [192/192 (100%)]", "1 [ 64/192 (33%)]")
    )
    assert whole_run.steps_of(log) == 3


def test_the_figures_of_whole_runs_are_what_they_say():
    costs = {"open_clip_train": Cost(30.0, 20.0, 1000.0, 9.0), "finetune fit": Cost(10.0, 8.0, 400.0, 9.0)}
    expected = {"wall_ratio": 2.5, "cpu_ratio": 3.0, "memory_share": 0.4, "peak_mb": 400, "peak_mb_open_clip": 1000}
    assert whole_run.figures(costs) == expected


SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "select"])  # which steps aside for the library's
def test_what_a_script_shares_with_others_is_where_it_looks_for_it(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").main)
