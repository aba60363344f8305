"""robots.txt: what each answer means, read once by all, asked again where it could not be read."""

import asyncio
import multiprocessing
import os
import signal
import socket
import sqlite3
import time

import pytest
from yarl import URL

from curate.config import FetchConfig
from curate.errors import UnwritableDisk, told
from curate.fetch.origins import prepare
from curate.fetch.robots import MOST_BYTES, Robots, rules_for_us, text_of
from curate.fetch.transfer import Page, Transfer, open_session
from curate.ledger import Reason
from tests.curate.fetching import fetch_here, impatient, jpeg, patient
from tests.disk import disk_that_ends_at
from tests.webserver import (
    WebServer,
    after,
    cut_short,
    drip,
    endless,
    endless_headers,
    gzipped,
    one_after_another,
    page,
    raw,
    redirect,
    reset,
)

SPAWN = multiprocessing.get_context("spawn")
CONFIG = impatient()


@pytest.fixture
def server():
    with WebServer() as running:
        yield running


def judge(path, urls, config=CONFIG, first_pause_s=60.0):
    """The verdicts on these URLs, asked for at once by one worker."""

    async def ask():
        async with open_session(config) as session:
            transfer = Transfer(session, config)
            robots = Robots(
                path, lambda target, _: transfer.page(target, config.total_timeout_s, MOST_BYTES), first_pause_s
            )
            try:
                return await asyncio.gather(*(robots.verdict(URL(url)) for url in urls))
            finally:
                await robots.close()

    return asyncio.run(ask())


def word(verdict):
    return "allowed" if verdict.error is None else (verdict.error.reason.value, verdict.error.value)


def text(content, **how):
    return page(content.encode(), type_="text/plain", **how)


ALL = "User-agent: *\nDisallow: /\n"
NO = "robots_disallow"
UNREACHABLE = "robots_unreachable"
ANSWERS = {
    "forbids all": (text(ALL), NO),
    "forbids nothing": (text("User-agent: *\nDisallow:\n"), "allowed"),
    "empty": (text(""), "allowed"),
    "no content": (page(b"", status=204), "allowed"),
    "forbids us": (text("User-agent: cliptailor\nDisallow: /\n"), NO),
    "forbids others": (text("User-agent: otherbot\nDisallow: /\n"), "allowed"),
    "a web page": (page(b"<html><body>Welcome</body></html>", type_="text/html"), "allowed"),
    "a picture": (page(jpeg()), "allowed"),
    "missing": (text(ALL, status=404), "allowed"),
    "gone": (text(ALL, status=410), "allowed"),
    "not for everybody": (text(ALL, status=401), "allowed"),
    "forbidden": (text(ALL, status=403), "allowed"),
    "too many requests": (text("", status=429), (UNREACHABLE, "http status 429")),
    "broken server": (text("User-agent: *\nAllow: /", status=500), (UNREACHABLE, "http status 500")),
    "busy server": (text("", status=503), (UNREACHABLE, "http status 503")),
    "not modified": (raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"), (UNREACHABLE, "http status 304")),
    "silent": (after(30, text("")), (UNREACHABLE, "timeout first byte")),
    "drips": (drip(b"# " * 500, 0.05), (UNREACHABLE, "timeout total")),
    "reset": (reset(), UNREACHABLE),
    "closes": (raw(b""), UNREACHABLE),
    "cut short": (cut_short(ALL.encode(), 5), (UNREACHABLE, "broken_transfer in the body")),
    "speaks no HTTP": (raw(b"220 mail.example.org ESMTP\r\n\r\n"), UNREACHABLE),
    "endless headers": (endless_headers, UNREACHABLE),
    "unknown coding": (text(ALL, headers={"Content-Encoding": "br"}), UNREACHABLE),
    "gzip cut": (page(b"\x1f\x8b\x08\x00", headers={"Content-Encoding": "gzip"}), UNREACHABLE),
    "gzip unasked": (gzipped(ALL.encode()), NO),
    "byte order mark": (page(b"\xef\xbb\xbf" + ALL.encode()), NO),
    "NULs": (page(b"\0User-\0agent: *\nDisallow: /\n"), NO),
    "not UTF-8": (page(b"# \xff\xfe\nUser-agent: *\nDisallow: /\n"), NO),
    "small letters, odd spaces": (text("  user-AGENT :*\r\n DISALLOW  : /  # all\r\n"), NO),
    "600 KiB": (text(ALL + "# padding\n" * 60_000), NO),
    "a rule after 500 KiB": (text("# padding\n" * 60_000 + ALL), "allowed"),
    "endless": (endless(ALL.encode()), NO),
    "one redirect": (redirect("/there.txt", 301), NO),
    "five redirects": (redirect("/5"), NO),
    "six redirects": (redirect("/6"), "allowed"),
    "redirects nowhere": (page(b"", status=302), UNREACHABLE),
    "redirects to a file": (redirect("file:///etc/passwd"), UNREACHABLE),
    "redirects to a private address": (redirect("http://10.0.0.1/robots.txt"), "blocked_address"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_each_answer_means_what_rfc_9309_says(server, tmp_path, name):
    behaviour, meaning = ANSWERS[name]
    server.add("/robots.txt", behaviour)
    server.add("/there.txt", text(ALL))
    for left in range(2, 7):
        server.add(f"/{left}", redirect(f"/{left - 1}"))
    server.add("/1", text(ALL))
    (verdict,) = judge(tmp_path / "robots.sqlite", [server.url("/a.jpg")])
    found = word(verdict)
    assert found == meaning or found[0] == meaning
    if meaning != "allowed":
        assert verdict.error.may_pass == (verdict.error.reason is Reason.ROBOTS_UNREACHABLE)


def test_nobody_listening_is_the_networks_failure_and_not_the_robots(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (verdict,) = judge(tmp_path / "robots.sqlite", [f"http://127.0.0.1:{port}/a.jpg"])
    assert (verdict.error.reason, verdict.error.is_network, verdict.error.may_pass) == (Reason.CONNECT, True, True)


def test_rules_are_by_path_and_origins_by_port(server, tmp_path):
    rules = "User-agent: *\nDisallow: /private\nAllow: /private/open\nDisallow: /*.gif$\nCrawl-delay: 3\n"
    server.add("/robots.txt", text(rules))
    with WebServer() as other:
        urls = [server.url(path) for path in ("/a.jpg", "/private/a.jpg", "/private/open.jpg", "/a.gif", "/a.gif?x")]
        verdicts = judge(tmp_path / "robots.sqlite", [*urls, other.url("/private/a.jpg")])
        assert [word(verdict)[0] == NO for verdict in verdicts] == [False, True, False, True, False, False]
        assert [verdict.crawl_delay_s for verdict in verdicts] == [3, 0, 3, 0, 3, 0]
        assert verdicts[1].error.value == f"http://127.0.0.1:{server.port}"
        assert server.asked["/robots.txt"] == other.asked["/robots.txt"] == 1


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("User-agent: *\nDisallow: /a", "Disallow: /a"),
        ("User-agent: *\nDisallow: /a\nUser-agent: cliptailor\nDisallow: /b", "Disallow: /b"),
        ("User-agent: ClipTailor/2.0\nDisallow: /b\nUser-agent: *\nDisallow: /a", "Disallow: /b"),
        ("User-agent: otherbot\nUser-agent: cliptailor\nDisallow: /b", "Disallow: /b"),
        ("User-agent: cliptailor\nSitemap: http://x/\nUser-agent: otherbot\n\nDisallow: /b", "Disallow: /b"),
        ("User-agent: cliptailor\nDisallow: /b\nUser-agent: x\nAllow: /\nUser-agent: cliptailor\nDisallow: /c",
         "Disallow: /b\nDisallow: /c"),
        ("User-agent: clip\nDisallow: /a", ""),
        ("User-agent: cliptailor-images\nDisallow: /a", ""),
        ("Disallow: /a\nUser-agent: x\nDisallow: /b", ""),
        ("User agent *\nDisallow /a", "Disallow /a"),
    ],
)  # fmt: skip
def test_only_the_groups_that_mean_us_are_kept(given, kept):
    assert rules_for_us(given) == kept


def test_a_robots_txt_made_to_exhaust_a_parser_costs_little():
    agents = "".join(f"User-agent: bot{number}\n" for number in range(15_000))
    started = time.process_time()
    assert rules_for_us(agents + "Disallow: /a\n" * 20_000) == ""
    assert time.process_time() - started < 2


def test_a_line_that_the_limit_cuts_is_no_rule():
    content = b"User-agent: *\n" + b"#" * (MOST_BYTES - 26) + b"\nDisallow: /private\n"
    assert text_of(content[:MOST_BYTES]).splitlines()[-1].startswith("#")


# --- once, and again -------------------------------------------------------------------------------------------------


def judge_in_a_process(path, urls, results):
    results.put([word(verdict) for verdict in judge(path, urls)])


def test_two_hundred_rows_in_four_processes_read_it_once(server, tmp_path):
    server.add("/robots.txt", after(0.2, text("User-agent: *\nDisallow: /1")))
    prepare(tmp_path / "robots.sqlite")
    urls, results = [server.url(f"/{number}.jpg") for number in range(50)], SPAWN.Queue()
    processes = [
        SPAWN.Process(target=judge_in_a_process, args=(tmp_path / "robots.sqlite", urls, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(10)
    assert server.asked["/robots.txt"] == 1
    assert all([each == "allowed" for each in verdicts].count(False) == 11 for verdicts in found)


def test_what_a_killed_process_was_reading_is_taken_over_at_once(server, tmp_path):
    path = tmp_path / "robots.sqlite"
    server.add("/robots.txt", one_after_another(after(30, text("")), text(ALL)))
    process = SPAWN.Process(target=hang_in_a_process, args=(path, server.url("/a.jpg")))
    process.start()
    until = time.monotonic() + 30
    while not server.asked["/robots.txt"] and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    started = time.monotonic()
    (verdict,) = judge(path, [server.url("/a.jpg")])
    assert word(verdict)[0] == NO
    assert time.monotonic() - started < 20
    process.join(10)


def hang_in_a_process(path, url):
    judge(path, [url], patient(read_timeout_s=60.0, total_timeout_s=60.0))


def test_it_is_kept_for_a_later_run_but_not_for_ever(server, tmp_path):
    path = tmp_path / "robots.sqlite"
    server.add("/robots.txt", text(ALL))
    for _ in range(2):
        assert word(judge(path, [server.url("/a.jpg")])[0])[0] == NO
    assert server.asked["/robots.txt"] == 1
    server.add("/robots.txt", text(""))
    age(path, 23 * 3600)
    assert word(judge(path, [server.url("/a.jpg")])[0])[0] == NO
    age(path, 3700)
    assert word(judge(path, [server.url("/a.jpg")])[0]) == "allowed"


def age(path, seconds):
    with sqlite3.connect(path) as db:
        db.execute("UPDATE origins SET until = until - ?", (seconds,))
    db.close()


def test_unreachable_is_no_and_asked_again_less_and_less_often(server, tmp_path):
    path, url = tmp_path / "robots.sqlite", server.url("/a.jpg")
    server.add("/robots.txt", text("", status=503))
    for pause_s in (5.0, 20.0, 80.0):
        (verdict,) = judge(path, [url], first_pause_s=5.0)
        assert word(verdict) == (UNREACHABLE, "http status 503")
        assert verdict.error.retry_after_s == pytest.approx(pause_s, abs=1)
        judge(path, [url], first_pause_s=5.0)
        age(path, pause_s)
    assert server.asked["/robots.txt"] == 3
    server.add("/robots.txt", text(""))
    assert word(judge(path, [url])[0]) == "allowed"
    server.add("/robots.txt", text("", status=503))
    age(path, 25 * 3600)
    assert judge(path, [url], first_pause_s=5.0)[0].error.retry_after_s == pytest.approx(5.0, abs=1)


def test_a_retry_after_is_heeded(server, tmp_path):
    server.add("/robots.txt", text("", status=429, headers={"Retry-After": "120"}))
    (verdict,) = judge(tmp_path / "robots.sqlite", [server.url("/a.jpg")], first_pause_s=5.0)
    assert verdict.error.retry_after_s == pytest.approx(120, abs=1)


def test_a_database_that_cannot_be_read_is_made_anew(server, tmp_path):
    path = tmp_path / "state" / "robots.sqlite"
    prepare(path)
    path.write_bytes(b"no database" * 1000)
    prepare(path)
    server.add("/robots.txt", text(ALL))
    assert word(judge(path, [server.url("/a.jpg")])[0])[0] == NO
    age(path, 3 * 24 * 3600)
    prepare(path)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM origins").fetchone() == (0,)
    db.close()


def test_parsed_rules_are_held_within_bounds_and_read_back_from_the_database(tmp_path):
    rules = "User-agent: *\nDisallow: /a\n" + "".join(f"Disallow: /{number}\n" for number in range(1500))
    asked = []

    async def read(target, host):
        asked.append(host)
        return Page(200, rules.encode())

    async def ask():
        robots = Robots(tmp_path / "robots.sqlite", read)
        for _ in range(2):
            for number in range(40):
                assert (await robots.verdict(URL(f"http://h{number}.example/a"))).error
        held = len(robots._known)
        await robots.close()
        return held

    assert asyncio.run(ask()) < 30
    assert len(asked) == 40


# --- in a fetch ------------------------------------------------------------------------------------------------------


def test_a_forbidden_path_is_never_asked_for_not_even_by_a_redirect(server, tmp_path):
    server.add("/robots.txt", text("User-agent: *\nDisallow: /private"))
    urls = [server.add("/private/a.jpg", page(jpeg())), server.add("/b.jpg", redirect("/private/b.jpg"))]
    with WebServer("127.0.0.2") as other:
        urls.append(other.add("/c.jpg", redirect(server.url("/private/c.jpg"))))
        rows = fetch_here(tmp_path, urls, patient())
        assert [row["reason"] for row in rows] == [NO] * 3
        assert not any(path.startswith("/private") for path in server.asked)
        assert server.asked["/robots.txt"] == other.asked["/robots.txt"] == 1


def test_a_robots_txt_on_another_host_waits_for_that_hosts_turn(server, tmp_path):
    server.add("/robots.txt", after(0.05, text("")))
    others = [WebServer("127.0.0.2") for _ in range(4)]
    urls = [server.add(f"/{number}.jpg", after(0.05, page(jpeg(number)))) for number in range(4)]
    try:
        for other in others:
            other.__enter__()
            other.add("/robots.txt", redirect(server.url("/robots.txt")))
            urls.append(other.add("/a.jpg", page(jpeg())))
        config = patient(per_host=1, total_timeout_s=5.0, read_timeout_s=5.0, retries=1)
        rows = fetch_here(tmp_path, urls, config)
    finally:
        for other in others:
            other.__exit__()
    assert {row["error_message"] for row in rows} == {None}
    assert server.most_at_once == 1


def test_robots_are_not_read_where_the_user_says_so(server, tmp_path):
    server.add("/robots.txt", text(ALL))
    config = FetchConfig(allow_addresses=["127.0.0.0/8"], processes=1, ignore_opt_outs=["robots.txt"])
    (row,) = fetch_here(tmp_path, [server.add("/a.jpg", page(jpeg()))], config)
    assert row["status"] == "success"
    assert server.asked["/robots.txt"] == 0


def test_a_full_disk_is_one_line(tmp_path):
    with disk_that_ends_at(5_000), pytest.raises(sqlite3.OperationalError) as full:
        prepare(tmp_path / "robots.sqlite")
    assert isinstance(said := told(full.value), UnwritableDisk)
    assert str(said).startswith("robots.sqlite: disk I/O error; is the disk full? ")
    assert told(sqlite3.OperationalError("no such table: origins")) is None
