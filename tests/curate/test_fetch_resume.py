"""Run again: what is kept, what is asked for, and what is said, when the list, the settings or the files changed."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curate.fetch import FetchResult, run
from curate.files import write_parquet
from curate.shards import ShardWriter
from tests.curate.fetching import images, jpeg, patient, read_rows, write_plan
from tests.webserver import WebServer, after, page

ROWS = 12


@pytest.fixture
def server():
    with WebServer() as running:
        yield running


def serve(server, rows=ROWS):
    return [server.add(f"/{number}.jpg", page(jpeg(number))) for number in range(rows)]


def asked_by(server, action):
    """The pictures that are asked for while something is done."""
    before = dict(server.asked)
    action()
    return {path for path, count in server.asked.items() if count > before.get(path, 0) and path.endswith(".jpg")}


def contents(out):
    """What a raw folder says of its rows, and their images; places in the tar follow the order of arrival."""
    rows = [row for path in sorted((out / "raw").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [{k: v for k, v in row.items() if not k.endswith("_offset")} for row in rows], images(out)


def test_a_plan_file_that_grew_shrank_and_was_reordered_costs_the_new_urls_only(server, tmp_path):
    urls = serve(server)
    write_plan(tmp_path, urls[:8])
    run(tmp_path, patient())
    plan = [urls[9], *urls[5:1:-1], urls[10], urls[0]]
    write_plan(tmp_path, plan)
    assert asked_by(server, lambda: run(tmp_path, patient())) == {"/9.jpg", "/10.jpg"}

    write_plan(tmp_path / "fresh", plan)
    run(tmp_path / "fresh", patient())
    assert contents(tmp_path) == contents(tmp_path / "fresh")


def test_a_kept_row_has_the_new_caption_and_the_old_bytes(server, tmp_path):
    plan = write_plan(tmp_path, serve(server))
    run(tmp_path, patient())
    table = pq.read_table(plan)
    names = [f"another caption {number}" for number in range(ROWS)]
    column = table.schema.get_field_index("caption")
    write_parquet(table.set_column(column, "caption", [names]), plan, made_from="test")
    assert asked_by(server, lambda: run(tmp_path, patient())) == set()
    assert [row["caption"] for row in read_rows(tmp_path)] == names
    assert images(tmp_path) == {f"00{number:08d}": jpeg(number) for number in range(ROWS)}


@pytest.mark.parametrize("harm", ["emptied", "cut", "swapped", "no parquet", "broken parquet"])
def test_old_files_that_are_not_what_they_were_cost_requests_and_no_row(server, tmp_path, harm):
    urls = serve(server)
    write_plan(tmp_path, urls[:8])
    run(tmp_path, patient())
    tar, parquet = tmp_path / "raw" / "00000.tar", tmp_path / "raw" / "00000.parquet"
    match harm:
        case "emptied":
            tar.write_bytes(b"")
        case "cut":
            tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
        case "swapped":
            write_plan(tmp_path / "other", urls[::-1])
            run(tmp_path / "other", patient())
            tar.write_bytes((tmp_path / "other" / "raw" / "00000.tar").read_bytes())
        case "no parquet":
            parquet.unlink()
        case "broken parquet":
            content = bytearray(parquet.read_bytes())
            content[4:400] = bytes(396)
            parquet.write_bytes(content)
    write_plan(tmp_path, urls)
    assert run(tmp_path, patient()).counts == {"success": ROWS}
    assert images(tmp_path) == {f"00{number:08d}": jpeg(number) for number in range(ROWS)}


PASS = {"/0.jpg": 503, "/1.jpg": 429, "/2.jpg": 408}
STAY = {"/3.jpg": 404, "/4.jpg": 410, "/5.jpg": 403}


def test_retry_failed_takes_again_what_may_pass_and_leaves_shards_without_such_rows(server, tmp_path):
    urls = serve(server)
    write_plan(tmp_path, urls[:6], shard=0)
    write_plan(tmp_path, urls[6:], shard=1)
    good = dict(server.pages)
    server.pages.update({path: page(b"", status=status) for path, status in {**PASS, **STAY}.items()})
    config = patient(per_host=1, backoff_s=0.01)
    run(tmp_path, config)
    assert asked_by(server, lambda: run(tmp_path, config)) == set()

    server.pages.update(good)
    results = []
    again = asked_by(server, lambda: results.append(run(tmp_path, config, retry_failed=True)))
    assert again == set(PASS)
    assert results == [FetchResult({"success": 9, "http_status": 3}, made=1, reused=1)]
    assert run(tmp_path, config, retry_failed=True).made == 0


def test_another_setting_names_the_keys_that_changed_and_only_once(server, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="cliptailor")
    write_plan(tmp_path, serve(server))
    run(tmp_path, patient())
    assert not [message for message in caplog.messages if "again" in message]
    run(tmp_path, patient(image_size=20, encode_quality=80))
    run(tmp_path, patient(image_size=20, encode_quality=80, retries=1))
    assert [message for message in caplog.messages if "again" in message] == [
        "fetch   1 shards are fetched again: fetch.image_size was 512, is 20; fetch.encode_quality was 95, is 80"
    ]


def test_a_shard_that_is_cut_off_between_its_two_files_is_no_shard(server, tmp_path, monkeypatch):
    """The old Parquet beside the new tar would have its images in the wrong places."""
    write_plan(tmp_path, serve(server))
    run(tmp_path, patient())
    parquet, beside = tmp_path / "raw" / "00000.parquet", []

    def cut_off(table, path, made_from):
        beside.append(parquet.exists())
        raise KeyboardInterrupt

    monkeypatch.setattr("curate.shards.write_parquet", cut_off)
    with pytest.raises(KeyboardInterrupt), ShardWriter(parquet.with_suffix(""), pq.read_schema(parquet), made_from="2"):
        pass
    monkeypatch.undo()
    assert beside == [False]
    assert run(tmp_path, patient()).counts == {"success": ROWS}
    assert images(tmp_path) == {f"00{number:08d}": jpeg(number) for number in range(ROWS)}


FETCH = """
import sys
from pathlib import Path
from curate.fetch import run
from tests.curate.fetching import patient

if __name__ == "__main__":
    run(Path(sys.argv[1]), patient(processes=2, connections=2, total_timeout_s=30.0))
"""


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(server, tmp_path):
    out, whole, script = tmp_path / "killed", tmp_path / "whole", tmp_path / "fetch.py"
    urls = [server.add(f"/{number}.jpg", after(0.02, page(jpeg(number)))) for number in range(60)]
    for shard in range(6):
        for folder in (out, whole):
            write_plan(folder, urls[10 * shard : 10 * shard + 10], shard)
    run(whole, patient())
    script.write_text(FETCH)
    chance, ended = random.Random(4), 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, str(script), str(out)], env={**os.environ, "PYTHONPATH": str(Path.cwd())}
        )
        time.sleep(chance.uniform(0.4, 2.5))
        process.send_signal(signal.SIGKILL)
        ended += process.wait() == 0
    assert ended < 6
    run(out, patient())
    assert contents(out) == contents(whole)
    assert not list((out / "raw").glob(".*"))
