"""`curate build` as its user runs it: the command in a process of its own, a real web server, the files it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import pandas as pd
import pytest
import webdataset

from curate.build import holding
from tests.curate.fetching import jpeg
from tests.webserver import WebServer, after, page

IMAGES = 12
BUILD = [sys.executable, "-m", "curate.cli", "build"]
FILTERS = "[{name: exact, dedup: {by: sha256, keep: row}}, {name: wide, where: width >= 60}]"
SMALL = ["--plan.shard_size", "5", "--pack.shard_size", "4", "--pack.val", "0.2", "--pack.test", "0.2"]


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        for number in range(IMAGES):
            server.add(f"/{number}.jpg", page(jpeg(number)))
        server.add("/copy.jpg", page(jpeg(3)))
        server.add("/narrow.jpg", page(jpeg(99, size=(40, 48))))
        yield server


def write_list(web: WebServer, folder: Path, *more: str) -> Path:
    paths = [*(f"/{number}.jpg" for number in range(IMAGES)), "/copy.jpg", "/narrow.jpg", "/gone.jpg", *more]
    rows = [{"URL": f"http://127.0.0.1:{web.port}{path}", "TEXT": f'what, "is" at {path}'} for path in paths]
    pd.DataFrame([*rows, {"URL": "", "TEXT": "nothing"}]).to_parquet(folder / "list.parquet")
    return folder / "list.parquet"


def command(urls: Path, out: Path, *options: str, filters: str = FILTERS) -> list[str]:
    recipe = out.parent / f"{out.name}.yaml"
    recipe.write_text(f"filters: {filters}\nfetch: {{allow_addresses: [127.0.0.0/8], retries: 0, processes: 1}}\n")
    return [*BUILD, "--urls", str(urls), "--out", str(out), "--config", str(recipe), *SMALL, *options]


def run(words: list[str], status: int = 0) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == status, ran.stderr
    assert "Traceback" not in ran.stderr
    return ran


def packed(out: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted((out / "shards").iterdir())}


def running(pids: list[str], within_s: float) -> list[str]:
    """Which of the processes are still there after so long; a zombie is not."""
    deadline = time.monotonic() + within_s
    while True:
        stats = [(pid, Path(f"/proc/{pid}/stat")) for pid in pids]
        left = [pid for pid, stat in stats if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def stamps(out: Path, *folders: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in (out / folder).iterdir()}


def test_a_list_becomes_shards_that_webdataset_pandas_and_tar_read(web: WebServer, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    shown = run(command(write_list(web, tmp_path), out)).stdout
    ledger = pd.read_parquet(out / "ledger.parquet")
    assert len(ledger) == IMAGES + 4
    assert ledger.kept.sum() == IMAGES
    assert "16 rows in = 12 kept + 4 dropped" in shown
    assert dict(ledger[~ledger.kept].reason.value_counts()) == {
        "dedup": 1, "where": 1, "http_status": 1, "empty_url": 1,
    }  # fmt: skip
    tars = sorted(str(path) for path in (out / "shards").glob("*.tar"))
    # Its own reader leaves the tars it opened to the garbage collector, so they are opened here.
    with ExitStack() as opened:
        streams = [{"url": tar, "stream": opened.enter_context(Path(tar).open("rb"))} for tar in tars]
        files = webdataset.tariterators.tar_file_expander(streams)
        samples = [sample for sample in webdataset.tariterators.group_by_keys(files) if "__key__" in sample]
    assert len(samples) == IMAGES
    assert {sample["jpg"] for sample in samples} == {jpeg(number) for number in range(IMAGES)}
    rows = pd.concat(pd.read_parquet(path) for path in (out / "shards").glob("*.parquet"))
    assert set(rows.caption) == {sample["txt"].decode() for sample in samples}
    listed = subprocess.run(["tar", "-tf", tars[0]], capture_output=True, text=True, check=True).stdout.split()
    assert {name.partition(".")[2] for name in listed} == {"jpg", "txt", "json"}
    assert {"report.html", "README.md", "manifest.json"} <= {path.name for path in out.iterdir()}


def test_the_same_command_again_asks_for_nothing_and_writes_no_shard(web: WebServer, tmp_path: Path) -> None:
    words = command(write_list(web, tmp_path), tmp_path / "dataset")
    run(words)
    asked, written = dict(web.asked), stamps(tmp_path / "dataset", "plan", "raw", "shards")
    assert "unchanged" in run(words).stderr
    assert dict(web.asked) == asked
    assert stamps(tmp_path / "dataset", "plan", "raw", "shards") == written


def test_a_changed_filter_selects_and_packs_again_without_a_request(web: WebServer, tmp_path: Path) -> None:
    urls, out = write_list(web, tmp_path), tmp_path / "dataset"
    run(command(urls, out))
    asked = dict(web.asked)
    run(command(urls, out, filters="[{name: few, sample: {count: 5}}]"))
    assert dict(web.asked) == asked
    assert pd.read_parquet(out / "ledger.parquet").kept.sum() == 5
    fresh = tmp_path / "fresh"
    run(command(urls, fresh, filters="[{name: few, sample: {count: 5}}]"))
    assert packed(out) == packed(fresh)


def test_killed_in_the_fetch_the_same_command_ends_with_the_same_bytes(web: WebServer, tmp_path: Path) -> None:
    urls = write_list(web, tmp_path, "/slow.jpg")
    web.add("/slow.jpg", page(jpeg(50)))
    run(command(urls, tmp_path / "unbroken"))
    web.add("/slow.jpg", after(3, page(jpeg(50))))
    out = tmp_path / "dataset"
    words = command(urls, out, "--fetch.read_timeout_s", "8")
    killed = subprocess.Popen(words, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while web.asked["/slow.jpg"] < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (out / "ledger.parquet").exists()
    run(words)
    assert packed(out) == packed(tmp_path / "unbroken")
    assert not list(out.rglob("*.tmp"))


def test_terminated_in_the_fetch_it_ends_its_workers_and_continues_when_asked(web: WebServer, tmp_path: Path) -> None:
    urls = write_list(web, tmp_path, "/slow.jpg")
    web.add("/slow.jpg", page(jpeg(50)))
    run(command(urls, tmp_path / "unbroken"))
    web.add("/slow.jpg", after(60, page(jpeg(50))))
    out = tmp_path / "dataset"
    words = command(urls, out, "--fetch.read_timeout_s", "90")
    build = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while web.asked["/slow.jpg"] < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = Path(f"/proc/{build.pid}/task/{build.pid}/children").read_text().split()
    assert workers
    build.terminate()
    said = build.communicate(timeout=30)[1]
    assert build.returncode == 143
    assert said.endswith("curate: interrupted; what is done is kept, the same command continues\n")
    assert "Traceback" not in said
    assert not running(workers, within_s=10)
    assert not [*out.rglob("*.tmp"), *out.glob(".owner")]
    with holding(out):
        pass
    web.add("/slow.jpg", page(jpeg(50)))
    run(words)
    assert packed(out) == packed(tmp_path / "unbroken")


def test_a_folder_whose_name_is_a_pattern_is_a_folder_like_any(web: WebServer, tmp_path: Path) -> None:
    urls = write_list(web, tmp_path)
    run(command(urls, tmp_path / "plain"))
    folder = tmp_path / "a[1]*"
    folder.mkdir()
    urls = urls.rename(folder / "list?.parquet")
    run(command(urls, folder))
    assert packed(folder) == packed(tmp_path / "plain")


def test_too_few_images_are_status_3_with_a_way_out(web: WebServer, tmp_path: Path) -> None:
    words = command(write_list(web, tmp_path), tmp_path / "dataset", "--fetch.min_yield", "0.95")
    said = run(words, status=3).stderr
    assert "14 of 15 images arrived (http_status 1;" in said
    assert "--retry-failed asks again" in said


def test_a_stage_alone_that_keeps_nothing_is_status_3(web: WebServer, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    run(command(write_list(web, tmp_path), out))
    words = command(tmp_path / "list.parquet", out, filters="[{name: huge, where: width > 9000}]")
    words[words.index("build")] = "select"
    assert "all 16 rows were dropped" in run(words, status=3).stderr


def test_retry_failed_asks_again_for_what_may_pass_and_for_nothing_else(web: WebServer, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    pages = web.pages
    web.pages = {path: page(b"", status=404 if path == "/1.jpg" else 503) for path in pages}
    words = command(write_list(web, tmp_path), out)
    said = run(words, status=3).stderr
    assert "0 of 15 images arrived (http_status 15;" in said
    web.pages = pages
    run(words, status=3)  # a failed row is a result like any other
    asked = dict(web.asked)
    run([*words, "--retry-failed"])
    again = {path for path, count in web.asked.items() if count > asked[path]}
    assert again == {path for path in asked if path.endswith(".jpg")} - {"/1.jpg", "/gone.jpg"}
    run([*words, "--retry-failed"])
    ledger = pd.read_parquet(out / "ledger.parquet")
    assert ledger["reason"].value_counts().to_dict() == {"http_status": 2, "empty_url": 1, "dedup": 1, "where": 1}


def test_only_the_new_rows_of_a_list_that_grew_are_asked_for(web: WebServer, tmp_path: Path) -> None:
    out, fresh = tmp_path / "dataset", tmp_path / "fresh"
    urls = write_list(web, tmp_path)
    rows = pd.read_parquet(urls)
    rows.iloc[:9].to_parquet(urls)
    run(command(urls, out))
    asked = dict(web.asked)
    grown = pd.concat([rows.iloc[9:11], rows.iloc[1:9], rows.iloc[11:]])  # one gone, two in front, the rest at the end
    grown.to_parquet(urls)
    assert "(6 new, 1 gone)" in run(command(urls, out)).stderr
    again = {path for path, count in web.asked.items() if count > asked.get(path, 0)}
    assert again == {"/9.jpg", "/10.jpg", "/11.jpg", "/copy.jpg", "/narrow.jpg", "/gone.jpg"}
    run(command(urls, fresh))
    for path in sorted((fresh / "shards").iterdir()):  # a Parquet's metadata name the raw shards, which differ
        ours = out / "shards" / path.name
        if path.suffix == ".tar":
            assert ours.read_bytes() == path.read_bytes()
        else:
            pd.testing.assert_frame_equal(pd.read_parquet(ours), pd.read_parquet(path))
    pd.testing.assert_frame_equal(pd.read_parquet(out / "ledger.parquet"), pd.read_parquet(fresh / "ledger.parquet"))


def test_what_is_redone_for_another_setting_is_said(web: WebServer, tmp_path: Path) -> None:
    urls = write_list(web, tmp_path)
    run(command(urls, tmp_path / "dataset"))
    said = run(command(urls, tmp_path / "dataset", "--fetch.image-size", "30"), status=3).stderr
    assert "shards are fetched again: fetch.image_size was 512, is 30" in said


def test_a_full_disk_is_one_line_and_the_same_command_continues(web: WebServer, tmp_path: Path) -> None:
    """The limit on the size of a file is a disk that ends there."""
    words = command(write_list(web, tmp_path), tmp_path / "dataset")
    program = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY));"
        "sys.argv = sys.argv[1:]; runpy.run_module('curate.cli', run_name='__main__')"
    )
    limited = [sys.executable, "-c", program, "curate", *words[3:]]
    ran = subprocess.run(limited, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "File too large" in ran.stderr.splitlines()[-1]
    run(words)


def test_a_list_of_which_nothing_stays_is_status_3_with_a_report(web: WebServer, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    ran = run(command(write_list(web, tmp_path), out, filters="[{name: huge, where: width > 9000}]"), status=3)
    assert "all 16 rows were dropped" in ran.stderr
    assert (out / "report.html").exists()


def test_a_folder_that_another_run_holds_is_status_75(web: WebServer, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    with holding(out):
        ran = run(command(write_list(web, tmp_path), out), status=75)
    assert f"process {os.getpid()} is building here" in ran.stderr
    run(command(write_list(web, tmp_path), out))


def test_without_config_and_out_the_default_recipe_fills_dataset(web: WebServer, tmp_path: Path) -> None:
    web.add("/big.jpg", page(jpeg(7, size=(320, 240))))
    (tmp_path / "list.txt").write_text(f"http://127.0.0.1:{web.port}/big.jpg\n")
    allowed = ["--fetch.allow_addresses", '["127.0.0.0/8"]']
    ran = subprocess.run(
        [*BUILD, "--urls", "list.txt", *allowed, "--filters", "[]"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "dataset" / "manifest.json").read_text())


def test_a_changed_threshold_asks_for_nothing_and_measures_nothing_again(web, tmp_path):
    urls, out = write_list(web, tmp_path), tmp_path / "out"
    run(command(urls, out, filters="[{name: wide, where: width >= 41}]"))
    before = {
        path: path.stat().st_mtime_ns for stage in ("plan", "raw", "signals") for path in (out / stage).rglob("*.*")
    }
    asked, first = web.asked.total(), packed(out)
    assert any("signals" in path.parts for path in before)
    ran = run(
        command(urls, out, filters="[{name: wide, where: width >= 200}, {name: few, sample: {count: 6}}]"), status=3
    )
    assert "all" in ran.stderr
    run(command(urls, out, filters="[{name: wide, where: width >= 41}, {name: few, sample: {count: 6}}]"))
    assert web.asked.total() == asked
    after = {
        path: path.stat().st_mtime_ns for stage in ("plan", "raw", "signals") for path in (out / stage).rglob("*.*")
    }
    assert after == before
    assert packed(out) != first
    run(command(urls, out, filters="[{name: wide, where: width >= 41}]"))
    assert packed(out) == first


@pytest.mark.parametrize("theirs", ["README.md", "report.html", "plan/mine.parquet", "raw/notes.txt", "manifest.json"])
def test_a_folder_with_files_of_others_under_our_names_is_left_alone(tmp_path: Path, theirs: str) -> None:
    out = tmp_path / "out"
    (out / theirs).parent.mkdir(parents=True)
    (out / theirs).write_text("mine")
    if theirs.endswith(".parquet"):
        pd.DataFrame({"mine": [1]}).to_parquet(out / theirs)
    before = (out / theirs).read_bytes()
    (tmp_path / "list.txt").write_text("http://127.0.0.1:9/1.jpg\n")
    ran = run([*BUILD, "--urls", str(tmp_path / "list.txt"), "--out", str(out)], 2)
    assert ran.stderr.startswith(
        f"curate: --out {out}: is no dataset of curate and has {theirs.partition('/')[0]}, which"
    )
    assert (out / theirs).read_bytes() == before
    assert {path.name for path in out.rglob("*")} == set(Path(theirs).parts)


def test_a_folder_with_other_files_and_one_that_was_copied_without_its_lock_are_built_in(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "list.txt").write_text("http://127.0.0.1:9/1.jpg\n")
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "recipe.yaml").write_text(f"{{urls: {tmp_path}/list.txt, out: {tmp_path}, filters: []}}\n")
    words = [sys.executable, "-m", "curate.cli", "plan", "--config", str(tmp_path / "recipe.yaml")]
    run(words)
    (tmp_path / ".lock").unlink()
    assert "(unchanged)" in run(words).stderr
