"""Fetch and measure on a Ray cluster of two nodes, one of them killed; workers that die, raise, lose their driver."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from curate.cli import main
from curate.clip import load_clip
from curate.errors import ConfigError, InputError
from curate.executor import Outcome, WorkerError, cluster, run_over
from curate.shards import OFFSET_COLUMNS
from tests.curate.fetching import images, jpeg
from tests.curate.ray_cluster import two_nodes
from tests.curate.test_fetch_executor import alive, die_at, doing, eventually, raise_at, square, wait_for_all
from tests.finetune.tiny import write_architecture
from tests.hostile.behaviours import SHARED, addresses, cases
from tests.hostile.server import hostile_server
from tests.hostile.test_politeness import by_host, most_at_once, most_in

REPOSITORY = Path(__file__).parents[2]
IMAGES = 180
PER_HOST, RATE = 5, 16.0
# Ray takes minutes where the machine is busy with others.
PATIENCE_S = 240.0
pytestmark = pytest.mark.timeout(2 * PATIENCE_S)
# Each worker stops in the middle of a shard, and says so, until it may go on.
HELD_SIGNAL = """
import os
import time
from pathlib import Path

FOLDER = Path({folder!r})

def lengths(batch):
    (FOLDER / f"held-{{os.getpid()}}").touch()
    while not (FOLDER / "go").exists():
        time.sleep(0.02)
    return {{"size": [len(image) for image in batch["image"].to_pylist()]}}
"""


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture
def crew(nodes, monkeypatch, tmp_path):
    """Of one worker a node, with this process as the driver."""
    for name, value in nodes.environment.items():
        monkeypatch.setenv(name, value)
    with cluster.connected():
        yield cluster.Actors(cluster.places(cluster.nodes_for(tmp_path), 1))


def curate(*words, folder, environment=None):
    command = [sys.executable, "-m", "curate.cli", *map(str, words)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def curate_here(*words, folder):
    """In this process, which has imported what it takes already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(list(words))


def finished(process):
    try:
        out, said = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == 0, said
    return out, said


# --- the same bytes --------------------------------------------------------------------------------------------------


def write_recipe(folder, port):
    """Pictures of three hosts, some twice, pages that give none, and a tiny CLIP."""
    architecture = write_architecture("tiny-vit", folder)
    torch.manual_seed(0)
    torch.save(load_clip(str(architecture), device="cpu").model.state_dict(), folder / "weights.pt")
    paths = [f"numbered/{number % (IMAGES - 20)}.jpg" for number in range(IMAGES)]
    paths += [f"{name}/{number}.jpg" for name in ("missing", "tag-noai", "cut-png") for number in range(4)]
    urls = [f"http://{SHARED[place % 3]}:{port}/{path}?{place}" for place, path in enumerate(paths)]
    pq.write_table(
        pa.table({"url": urls, "caption": [f"picture {n}" for n in range(len(urls))]}), folder / "list.parquet"
    )
    recipe = {
        "urls": "list.parquet",
        "plan": {"shard_size": 20},
        "fetch": {
            "allow_addresses": ["127.0.0.0/8"],
            "retries": 2,
            "backoff_s": 0.05,
            "per_host": PER_HOST,
            "per_host_rate": RATE,
        },
        "measure": {"clip": {"name": str(architecture), "pretrained": "weights.pt", "batch_size": 7, "device": "cpu"}},
        "filters": [
            {"name": "exact", "dedup": {"by": "sha256", "keep": "row"}},
            {"name": "plain", "where": "luma_std > 1"},
        ],
        "pack": {"shard_size": 60},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def made(out):
    """What a build made: the rows and images of its raw shards, digests of its signals, ledger and packed shards."""
    raw = {
        path.name: pq.read_table(path).drop_columns(list(OFFSET_COLUMNS)) for path in (out / "raw").glob("*.parquet")
    }
    files = [out / "ledger.parquet", *(out / "signals").rglob("*.parquet"), *(out / "shards").iterdir()]
    return raw, images(out), {str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def builds(nodes, tmp_path_factory):
    """A local build, and one of two nodes, one of them killed in the middle of the fetch, with the server's log."""
    folder = tmp_path_factory.mktemp("builds")
    with hostile_server(addresses(cases())) as server:
        write_recipe(folder, server.ports.http)
        curate_here("build", "--config", "recipe.yaml", "--out", "local", folder=folder)
        before = len(server.log())
        words = ["build", "--config", "recipe.yaml", "--out", "ray", "--executor", "ray"]
        running = curate(*words, folder=folder, environment=nodes.environment)
        assert eventually(lambda: len(server.log()) > before + IMAGES // 3 or running.poll() is not None, PATIENCE_S)
        at_its_death = len(server.log()) - before
        nodes.kill_node()
        try:
            out, said = finished(running)
        finally:
            nodes.add_node()
        log = server.log()[before:]
    return folder, out, said, log, at_its_death


def test_two_nodes_one_of_them_killed_give_the_bytes_of_one_machine(builds):
    folder, out, said, log, at_its_death = builds
    assert "2 workers on 2 nodes" in said
    assert "a worker on node 127.0.0.1 is gone" in said
    assert IMAGES // 3 < at_its_death < len(log) - IMAGES // 4  # in the middle
    assert f"{IMAGES:,} of {IMAGES + 12:,} images arrived" in said
    assert "Raylet" not in out  # what Ray has to say is no part of the command's output
    assert made(folder / "ray") == made(folder / "local")
    assert not [*(folder / "ray").rglob("*.tmp"), *(folder / "ray" / "raw").glob(".*.decoding")]


def test_no_host_sees_more_of_both_nodes_together_than_its_limits(builds):
    seen = by_host(builds[3])
    for host in SHARED:
        assert most_at_once(seen[host]) <= PER_HOST, host
        # One more for the one that begins it, of each node; and what the machine held back arrives together.
        assert most_in(seen[host], 1.0) <= RATE + 2 + PER_HOST, host
        assert sum(one.path == "/robots.txt" for one in seen[host]) <= 2  # each node asks by itself


def test_a_second_run_finds_all_of_it_done(builds, nodes):
    words = ["build", "--config", "recipe.yaml", "--out", "ray"]
    said = finished(curate(*words, folder=builds[0]))[1]
    assert "fetch" in said
    assert f"{IMAGES:,} of {IMAGES + 12:,} images arrived (unchanged)" in said
    assert "0 files" in said


def test_measuring_goes_on_when_a_node_is_killed(builds, nodes):
    """The signal is the user's own; its module lies in the folder of the call, which the nodes share."""
    folder = builds[0]
    (folder / "my_signals.py").write_text(HELD_SIGNAL.format(folder=str(folder)))
    signal_ = {"name": "lengths", "function": "my_signals:lengths", "columns": {"size": "BIGINT"}}
    (folder / "own.yaml").write_text(yaml.safe_dump({"measure": {"signals": [signal_], "text": False}}))
    words = ["measure", "--config", "own.yaml", "--out"]
    running = curate(*words, "ray", "--executor", "ray", folder=folder, environment=nodes.environment)
    assert eventually(lambda: len(list(folder.glob("held-*"))) == 2, PATIENCE_S)
    held = [int(path.name.removeprefix("held-")) for path in folder.glob("held-*")]
    nodes.kill_node()
    # A worker outlives its raylet a little, and could do all that is left.
    assert eventually(lambda: sum(alive(pid) for pid in held) == 1, PATIENCE_S)
    (folder / "go").touch()
    try:
        said = finished(running)[1]
    finally:
        nodes.add_node()
    assert "a worker on node 127.0.0.1 is gone" in said
    curate_here(*words, "local", folder=folder)
    digests = [
        {path.name: sha256(path.read_bytes()).hexdigest() for path in (folder / out / "signals").rglob("*.parquet")}
        for out in ("local", "ray")
    ]
    assert len(digests[0]) == 10
    assert digests[0] == digests[1]


# --- workers ---------------------------------------------------------------------------------------------------------


def test_every_item_has_one_outcome_and_each_worker_is_at_two(crew, tmp_path):
    items = [(str(tmp_path), number, 4) for number in range(4)]
    with closing(run_over(doing(wait_for_all), items, crew)) as outcomes:
        pids = {outcome.item[1]: outcome.result for outcome in outcomes}
    assert sorted(pids) == [0, 1, 2, 3]
    assert [list(pids.values()).count(pid) for pid in set(pids.values())] == [2, 2]
    assert eventually(lambda: not any(alive(pid) for pid in pids.values()), seconds=20)


def test_reports_arrive_before_the_result(crew):
    said = []
    with closing(run_over(doing(square), range(6), crew, on_report=lambda *report: said.append(report))) as outcomes:
        for outcome in outcomes:
            assert (outcome.item, f"squaring {outcome.item}") in said
            assert outcome.result[0] == outcome.item**2
    assert sorted(said) == [(number, f"squaring {number}") for number in range(6)]


@pytest.mark.parametrize(("deaths", "died"), [(1, False), (2, True)])
def test_a_killed_worker_is_noticed_and_its_item_is_tried_twice(crew, tmp_path, deaths, died):
    started = time.monotonic()
    item = (str(tmp_path), deaths)
    assert list(run_over(doing(die_at), [item], crew)) == [Outcome(item, None if died else "done", died)]
    assert time.monotonic() - started < PATIENCE_S
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_worker_raises_is_raised_here_with_its_traceback(crew):
    with pytest.raises(InputError, match="shard 2 is unreadable") as raised:
        list(run_over(doing(raise_at), range(4), crew))
    assert isinstance(raised.value.__cause__, WorkerError)
    assert "raise_at" in str(raised.value.__cause__)


DRIVER = """
import sys
from contextlib import closing
from pathlib import Path
from curate.executor import cluster, run_over
from tests.curate.test_fetch_executor import doing, sleep_long

with cluster.connected():
    crew = cluster.Actors(cluster.places(cluster.nodes_for(Path(sys.argv[1])), 1))
    with closing(run_over(doing(sleep_long), [sys.argv[1]] * 2, crew)) as outcomes:
        list(outcomes)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_driver(nodes, tmp_path, how):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        env=nodes.environment,
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert eventually(lambda: len([path for path in tmp_path.iterdir() if path.name.isdigit()]) == 2, PATIENCE_S)
        os.kill(driver.pid, how)
        driver.wait(60)
    finally:
        driver.kill()
        driver.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert eventually(lambda: not any(alive(pid) for pid in pids), seconds=60)


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_folder_that_a_node_does_not_see_is_told(crew, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"node 127\.0\.0\.1 does not see /proc/self/cwd; it must lie on a file system"
    ):
        cluster.nodes_for(Path("/proc/self/cwd"))  # another folder for each process


def test_a_node_with_another_version_is_told(crew, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "source_digest", lambda: "of another version")
    with pytest.raises(ConfigError, match=r"node 127\.0\.0\.1 runs another cliptailor than this machine"):
        cluster.nodes_for(tmp_path)


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures: a source that asks no server for anything."""
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(jpeg(number))
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"picture {number}")
    return tmp_path


def test_without_ray_one_line_says_how_to_install_it_and_nothing_else_misses_it(pictures):
    (pictures / "ray.py").write_text("raise ImportError('no Ray here')\n")
    environment = {**os.environ, "PYTHONPATH": f"{pictures}{os.pathsep}{REPOSITORY}"}
    words = ["fetch", "--urls", "pictures", "--out", "dataset", "--executor"]
    finished(curate("plan", "--urls", "pictures", "--out", "dataset", folder=pictures, environment=environment))
    asked = curate(*words, "ray", folder=pictures, environment=environment)
    assert (
        asked.communicate(timeout=PATIENCE_S)[1]
        == "curate: --executor ray: Ray is not installed; pip install 'cliptailor[ray]'\n"
    )
    assert asked.returncode == 2
    assert "3 of 3 images arrived" in finished(curate(*words, "local", folder=pictures, environment=environment))[1]


def asked_at(address, folder):
    words = ["build", "--urls", "pictures", "--executor", "ray"]
    return curate(*words, folder=folder, environment={**os.environ, "RAY_ADDRESS": address, "RAY_TMPDIR": str(folder)})


def test_an_address_that_is_none_is_told(pictures):
    asked = asked_at("nowhere", pictures)
    assert (
        asked.communicate(timeout=PATIENCE_S)[1]
        .splitlines()[-1]
        .startswith(
            "curate: --executor ray: no Ray cluster can be reached (Invalid address format: nowhere); start one with "
        )
    )
    assert asked.returncode == 2


def test_an_address_where_nobody_is_is_soon_suspected(pictures):
    with asked_at("127.0.0.1:1", pictures) as asked:
        said = next(line for line in asked.stderr if line.startswith("executor:"))
        asked.kill()
    assert said == "executor: no answer from the Ray cluster yet; RAY_ADDRESS?\n"


def test_an_unknown_executor_is_told(tmp_path):
    asked = curate("build", "--urls", "x", "--executor", "spark", folder=tmp_path)
    assert (
        asked.communicate(timeout=PATIENCE_S)[1].strip().startswith("curate: executor: 'spark' is none of local, ray")
    )
    assert asked.returncode == 2
