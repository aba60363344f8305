"""The real img2dataset against a server that misbehaves. Its imports take seconds, so one run covers many rows."""

import asyncio
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curate import plan
from curate.config import PlanConfig
from curate.errors import ConfigError, Outage
from curate.fetch import RAW_COLUMNS, img2dataset, run
from curate.fetch.guard import BlockedAddress
from curate.fetch.img2dataset_errors import as_transfer_error, from_words
from curate.fetch.task import ShardTask
from curate.files import made_from
from curate.ledger import Reason
from tests.curate.fetching import encoded, images, impatient, jpeg, patient, photo, read_rows, read_stats, write_plan
from tests.webserver import (
    WebServer,
    after,
    cut_short,
    drip,
    endless,
    one_after_another,
    page,
    redirect,
    reset,
    when,
)

HERE = "curate.fetch.img2dataset_process"


def fetch(out, urls, config):
    """Fetch one shard by img2dataset; its rows, in the order of the URLs."""
    planned = write_plan(out, urls)
    (out / "raw").mkdir(exist_ok=True)
    task = ShardTask(planned, out / "raw" / planned.stem, "test", config)

    async def make():
        async with img2dataset.open_worker(0, state=out / "state", config=config) as do:
            await do(task, lambda said: None)

    asyncio.run(make())
    return read_rows(out)


def at_work(parent=None):
    """Process ids of img2dataset's processes: those that `parent` started, or all."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, stat = (path / "cmdline").read_bytes(), (path / "stat").read_text()
        except OSError:
            continue
        above, state = int(stat.rpartition(")")[2].split()[1]), stat.rpartition(")")[2].split()[0]
        if HERE.encode() in command and state != "Z" and parent in (None, above):
            found.append(int(path.name))
    return found


def wait_until(condition: Callable[[], object], seconds=100.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_every_row_ends_once_and_no_request_goes_where_it_must_not(tmp_path):
    turned = photo(3, (90, 60))
    exif = turned.getexif()
    exif[0x0112] = 6
    with WebServer() as server, WebServer() as forbidden:
        port, other = server.port, forbidden.port
        server.add("/%C3%A4%20%C3%B6.jpg", page(jpeg(2)))
        expected = {
            server.add("/good.jpg", page(jpeg(0))): ("success", None),
            server.add("/large.png", page(encoded(photo(1, (900, 700)), "PNG"))): ("success", None),
            server.url("/ä ö.jpg"): ("success", None),
            server.add("/turned.jpg", page(encoded(turned, exif=exif))): ("success", None),
            server.add("/moved", redirect("/good.jpg")): ("success", None),
            server.add("/second", one_after_another(page(b"", status=503), page(jpeg(4)))): ("success", None),
            server.url("/gone.jpg"): ("http_status", "404"),
            server.add("/503.jpg", page(b"", status=503)): ("http_status", "503"),
            server.add("/text", page(b"<html>no image", type_="text/html")): ("not_an_image", None),
            server.add("/pixel", page(encoded(photo(5, (1, 1)), "PNG"))): ("too_small", "1x1"),
            server.add("/bomb", page(jpeg(5, (1200, 1200)))): ("too_many_pixels", "1200x1200"),
            server.add("/broken.jpg", page(jpeg(6)[:300])): ("corrupt_image", "img2dataset: Image decoding error"),
            server.add("/empty", page(b"")): ("empty_body", None),
            server.add("/endless", endless(jpeg(7))): ("too_large", "over 400000 bytes"),
            server.add("/cut", cut_short(jpeg(8), 400)): ("broken_transfer", "in the body"),
            server.add("/reset", reset()): ("broken_transfer", "before the answer"),
            server.add("/drip", drip(jpeg(9), 0.2)): ("timeout", "total"),
            server.add("/silent", after(30, page(jpeg(9)))): ("timeout", "first byte"),
            server.add("/noai", page(jpeg(9), headers={"X-Robots-Tag": "noai"})): ("opt_out", "noai"),
            server.add("/noml", page(jpeg(9), headers={"X-Robots-Tag": "cliptailor: noml"})): ("opt_out", "noml"),
            server.add("/tdm", page(jpeg(9), headers={"TDM-Reservation": "1"})): ("opt_out", "tdm-reservation"),
            server.add("/loop", redirect("/loop")): ("too_many_redirects", "5"),
            server.add("/to-file", redirect("file:///etc/passwd")): ("blocked_scheme", "file"),
            server.add("/away", redirect(forbidden.url("/x"))): ("blocked_address", f"127.0.0.1:{other}"),
            forbidden.url("/direct"): ("blocked_address", f"127.0.0.1:{other}"),
            f"http://0x7f000001:{other}/": ("blocked_address", f"127.0.0.1:{other}"),
            f"http://localhost:{other}/": ("blocked_address", None),
            "file:///etc/passwd": ("blocked_scheme", "file"),
            "data:image/png;base64,iVBORw0KGgo=": ("blocked_scheme", "data"),
            "http://127.0.0.1:1/": ("connect", "Connection refused"),
        }
        config = impatient(
            allow_addresses=[f"127.0.0.0/8:{port}", "127.0.0.0/8:1"],
            image_size=256,
            retries=1,
            max_bytes=400_000,
            max_pixels=1_000_000,
        )
        rows = fetch(tmp_path, [*expected, server.url("/good.jpg")], config)

    *each, again = rows
    assert [row["url"] for row in each] == list(expected)
    for row, (reason, value) in zip(each, expected.values(), strict=True):
        assert (row["reason"] or "success") == reason, row
        assert value is None or row["value"] == value
    assert forbidden.accepted == 0
    # One URL, one request; what will never pass, no second; what may, one for each retry.
    for path, times in {"/good.jpg": 2, "/gone.jpg": 1, "/text": 1, "/noai": 1, "/503.jpg": 2, "/second": 2}.items():
        assert server.asked[path] == times, path
    assert server.headers["/good.jpg"]["user-agent"] == config.user_agent
    assert {**again, "key": "", "row": 0, "caption": ""}.items() >= {
        name: each[0][name] for name in RAW_COLUMNS
    }.items()

    by_path = {row["url"].rpartition("/")[2]: row for row in each}
    good, large, turned_row = (by_path[name] for name in ("good.jpg", "large.png", "turned.jpg"))
    stored = images(tmp_path)
    assert stored[good["key"]] == jpeg(0)
    assert (good["bytes"], good["http_status"], good["format"]) == (len(jpeg(0)), 200, "jpeg")
    assert stored[large["key"]][:3] == b"\xff\xd8\xff"
    assert [large[name] for name in ("width", "height", "original_width", "original_height")] == [329, 256, 900, 700]
    assert (large["format"], large["image_ext"], large["aspect"]) == ("png", "jpg", 1.2857)
    assert large["bytes"] == len(encoded(photo(1, (900, 700)), "PNG"))
    assert (turned_row["width"], turned_row["height"]) == (60, 90)
    assert all(row["phash"] is not None for row in rows if row["status"] == "success")
    assert read_stats(tmp_path)["status_dict"] == dict(Counter(row["reason"] or "success" for row in rows))


def test_a_thin_image_that_would_grow_to_gigabytes_does_not_reach_it(tmp_path):
    with WebServer() as server:
        thin = server.add("/thin.png", page(encoded(photo(0, (2, 60_000)), "PNG")))
        urls = [thin, server.add("/good.jpg", page(jpeg(0)))]
        rows = fetch(tmp_path, urls, patient(image_size=256, resize_only_if_bigger=False))
    assert [row["reason"] for row in rows] == ["too_many_pixels", None]
    assert rows[0]["value"] == "2x60000, resized 256x7680000"


def test_killed_or_hung_it_starts_again_with_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(img2dataset, "GRACE_S", 3.0)
    first, second = threading.Event(), threading.Event()
    with WebServer() as server:
        urls = [server.add(f"/{number}.jpg", page(jpeg(number))) for number in range(8)]
        server.add("/3.jpg", one_after_another(when(first, page(jpeg(3))), page(jpeg(3))))
        server.add("/6.jpg", when(second, page(jpeg(6))))

        def disturb():
            wait_until(lambda: server.asked["/3.jpg"])
            os.kill(*at_work(os.getpid()), signal.SIGKILL)
            wait_until(lambda: server.asked["/6.jpg"])
            os.kill(*at_work(os.getpid()), signal.SIGSTOP)

        disturbing = threading.Thread(target=disturb)
        disturbing.start()
        rows = fetch(tmp_path, urls, patient(connections=1, read_timeout_s=30.0, total_timeout_s=4.0))
        disturbing.join()
        first.set()
        second.set()
    reasons = {row["url"].rpartition("/")[2]: (row["reason"], row["value"]) for row in rows if row["reason"]}
    assert reasons == {"6.jpg": ("timeout", "img2dataset hung")}
    assert len(images(tmp_path)) == 7
    # What was done before is not asked for again.
    assert [server.asked[f"/{number}.jpg"] for number in range(8)] == [1, 1, 1, 2, 1, 1, 1, 1]
    assert not at_work(os.getpid())


def test_where_it_dies_twice_over_nothing_its_rows_are_left_for_the_next_run(tmp_path):
    ended = threading.Event()

    def kill_all():
        while not ended.wait(0.05):
            for process in at_work(os.getpid()):
                os.kill(process, signal.SIGKILL)

    killing = threading.Thread(target=kill_all)
    killing.start()
    try:
        rows = fetch(tmp_path, ["http://127.0.0.1:1/a.jpg", "ftp://127.0.0.1/b.jpg"], patient())
    finally:
        ended.set()
        killing.join()
    assert [row["reason"] for row in rows] == ["worker_died", "blocked_scheme"]
    assert made_from(tmp_path / "raw" / "00000.parquet") == "test-died"


def test_a_death_costs_the_row_whose_image_was_decoded_the_second_time(tmp_path):
    """Not by a real crash: no image is known that would crash the decoder."""
    ended = []

    class Noting(img2dataset.Engine):
        def _end(self, shard, errand, error):
            ended.append((errand, error.reason))

    engine = Noting.__new__(Noting)
    errands, strikes = dict(enumerate("abc")), Counter()
    for decoding in (1, 2, 1):
        sitting = img2dataset.Sitting(open={0}, decoding=decoding)
        engine._lose(None, errands, sitting, img2dataset.Died(hung=False), strikes)
    assert ended == [("b", Reason.WORKER_DIED)]
    assert errands == {0: "a", 2: "c"}


def test_nothing_reached_anywhere_is_an_outage_and_no_shard(tmp_path):
    urls = [f"http://127.0.0.1:{1 + number % 7}/{number}.jpg" for number in range(30)]
    with pytest.raises(Outage, match="nothing could be reached for 1 s"):
        fetch(tmp_path, urls, patient(outage_s=1.0))
    assert not list((tmp_path / "raw").iterdir())


def test_images_that_are_here_already_need_no_img2dataset(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imghdr", None)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.jpg").write_bytes(jpeg(1))
    (tmp_path / "pictures" / "cat.txt").write_text("a cat")
    plan.run(str(tmp_path / "pictures"), tmp_path / "out", PlanConfig(), [])
    assert run(tmp_path / "out", patient(engine="img2dataset")).counts == {"success": 1}


def test_it_dies_with_the_run_however_that_ends(tmp_path):
    gate = threading.Event()
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import logging, sys
            from pathlib import Path
            from curate import fetch
            from curate.config import FetchConfig
            if __name__ == "__main__":
                logging.basicConfig(level=logging.INFO, format="%(message)s")
                fetch.run(Path(sys.argv[1]), FetchConfig(
                    engine="img2dataset", processes=1, retries=0, allow_addresses=["127.0.0.0/8"]))
            """
        )
    )
    with WebServer() as server:
        write_plan(tmp_path, [server.add("/held.jpg", when(gate, page(jpeg()))), server.add("/1.jpg", page(jpeg(1)))])
        before = set(at_work())
        command = [sys.executable, str(script), str(tmp_path)]
        with subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: server.asked["/held.jpg"])
            ours = set(at_work()) - before
            process.kill()
            assert "knows no robots.txt" in process.stderr.read()
        assert len(ours) == 1
        wait_until(lambda: not ours & set(at_work()), 5)
        gate.set()
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True, timeout=100)
    table = pq.read_table(tmp_path / "raw" / "00000.parquet")
    assert table["status"].to_pylist() == ["success", "success"]


def test_a_python_that_cannot_import_it_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "imghdr", None)
    with pytest.raises(ConfigError, match=r"no module 'imghdr'\); set fetch.engine native") as told:
        img2dataset.prepare()
    assert "\n" not in str(told.value)


def test_no_thread_and_no_other_process_gets_past_the_guard():
    with WebServer() as allowed, WebServer() as forbidden:
        program = f"""
        import socket, subprocess, threading
        from curate.fetch.guard import Guard
        from curate.fetch.img2dataset_process import refuse_other_processes, refuse_what_the_guard_refuses
        refuse_what_the_guard_refuses(Guard.allowing(["127.0.0.0/8:{allowed.port}"]))
        refuse_other_processes()
        said = []
        def attempt(do):
            try:
                do()
                said.append("passed")
            except OSError as error:
                said.append(type(error).__name__)
        def connect(host, port):
            return lambda: socket.create_connection((host, port)).close()
        for do in (
            connect("127.0.0.1", {allowed.port}),
            connect("127.0.0.1", {forbidden.port}),
            connect("::ffff:127.0.0.1", {forbidden.port}),
            lambda: socket.socket().connect_ex(("localhost", {forbidden.port})),
            lambda: subprocess.run(["true"]),
        ):
            thread = threading.Thread(target=attempt, args=(do,))
            thread.start()
            thread.join()
        print(*said)
        """
        command = [sys.executable, "-c", textwrap.dedent(program)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        assert done.stdout.split() == ["passed", *["BlockedAddress"] * 3, "PermissionError"]
        assert forbidden.accepted == 0


@pytest.mark.parametrize(
    ("error", "http_status", "reason", "may_pass"),
    [
        (urllib.error.URLError(socket.gaierror(socket.EAI_NONAME, "x")), None, Reason.DNS, False),
        (urllib.error.URLError(socket.gaierror(socket.EAI_AGAIN, "x")), None, Reason.DNS, True),
        (urllib.error.URLError(ssl.SSLError(1, "[SSL: X] x")), None, Reason.TLS, False),
        (urllib.error.URLError(TimeoutError()), None, Reason.TIMEOUT, True),
        (urllib.error.URLError(BlockedAddress("10.0.0.1:80")), None, Reason.BLOCKED_ADDRESS, False),
        (urllib.error.URLError("no host given"), None, Reason.CONNECT, True),
        (TimeoutError(), 200, Reason.TIMEOUT, True),
        (ConnectionResetError(), 200, Reason.BROKEN_TRANSFER, True),
        (http.client.BadStatusLine("x"), None, Reason.BAD_RESPONSE, False),
        (UnicodeError("label too long"), None, Reason.BAD_RESPONSE, False),
    ],
)
def test_what_urllib_raises_has_a_reason(error, http_status, reason, may_pass):
    found = as_transfer_error(error, http_status)
    assert (found.reason, found.may_pass) == (reason, may_pass)


def test_its_words_have_a_reason_too():
    assert from_words("failed_to_download", "timeout: connect", None).is_network
    assert not from_words("failed_to_download", "timeout: total", 200).is_network
    assert from_words("failed_to_download", "dns: no such host", None).value == "no such host"
    assert from_words("failed_to_resize", "Image decoding error", 200).reason is Reason.CORRUPT_IMAGE
    unknown = from_words("failed_to_download", "something new: at 3", 200)
    assert (unknown.reason, unknown.value) == (Reason.BAD_RESPONSE, "img2dataset: something new: at 3")
