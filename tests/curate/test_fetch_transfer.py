"""Every way a server can behave ends in the right reason, within its deadline: real sockets, in one process."""

import asyncio
import gzip
import resource
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from aiohttp.abc import AbstractResolver

from curate.fetch.coding import PIECE_BYTES, ContentCoding
from curate.fetch.failures import TransferError
from curate.fetch.transfer import Transfer, open_session, parse_target
from curate.ledger import Reason
from tests.curate.fetching import encoded, fetch_here, images, impatient, jpeg, patient, photo, read_stats
from tests.webserver import (
    WebServer,
    after,
    chunk,
    cut_chunks,
    cut_short,
    drip,
    endless,
    endless_headers,
    gzipped,
    head,
    in_coding,
    one_after_another,
    packed,
    page,
    raw,
    redirect,
    reset,
    until_close,
)

JPEG = jpeg()
BROTLI = in_coding(JPEG, "br")
ZSTD_SAYS = "content-encoding zstd: ZSTD decompress failed: Unknown frame descriptor"
PNG_BOMB = encoded(photo(), "PNG")[:16] + (60_000).to_bytes(4, "big") * 2 + encoded(photo(), "PNG")[24:]


@pytest.fixture
def server():
    with WebServer() as running:
        yield running


BAD = {
    "missing": (page(b"", status=404), Reason.HTTP_STATUS, "404"),
    "gone": (page(JPEG, status=410), Reason.HTTP_STATUS, "410"),
    "forbidden": (page(JPEG, status=403), Reason.HTTP_STATUS, "403"),
    "no content": (page(b"", status=204), Reason.HTTP_STATUS, "204"),
    "silent": (after(30, page(JPEG)), Reason.TIMEOUT, "first byte"),
    "drips": (drip(JPEG, 0.05), Reason.TIMEOUT, "total"),
    "stalls in the body": (drip(JPEG, 30), Reason.TIMEOUT, "stall"),
    "endless": (endless(JPEG), Reason.TOO_LARGE, "over 100000 bytes"),
    "endless rubbish": (endless(b"not an image at all"), Reason.NOT_AN_IMAGE, "image/jpeg"),
    "endless headers": (endless_headers, Reason.BAD_RESPONSE, None),
    "says it is large": (raw(head(headers={"Content-Length": "5000000000"})), Reason.TOO_LARGE, "5000000000 bytes"),
    "cut short": (cut_short(JPEG, 500), Reason.BROKEN_TRANSFER, "in the body"),
    "cut chunks": (cut_chunks(JPEG, 500), Reason.BROKEN_TRANSFER, "in the body"),
    "cut without a length": (until_close(JPEG[: len(JPEG) // 2]), Reason.TRUNCATED_IMAGE, None),
    "reset at once": (reset(), Reason.BROKEN_TRANSFER, None),
    "reset in the body": (reset(head(headers={"Content-Length": "9999"}) + JPEG[:300]), Reason.BROKEN_TRANSFER, None),
    "closes at once": (raw(b""), Reason.BROKEN_TRANSFER, "before the answer"),
    "speaks no HTTP": (raw(b"220 mail.example.org ESMTP\r\n\r\n"), Reason.BAD_RESPONSE, None),
    "HTML as JPEG": (page(b"<html><body>sorry, not here</body></html>"), Reason.NOT_AN_IMAGE, "image/jpeg"),
    "HTML": (page(b"<!doctype html>" * 9, type_="text/html; charset=utf-8"), Reason.NOT_AN_IMAGE, "text/html"),
    "a few bytes": (page(b"no"), Reason.NOT_AN_IMAGE, "begins with 6e6f"),
    "empty": (page(b""), Reason.EMPTY_BODY, None),
    "PNG bomb": (page(PNG_BOMB, type_="image/png"), Reason.TOO_MANY_PIXELS, "60000x60000"),
    "gzip bomb": (gzipped(JPEG + bytes(50_000_000)), Reason.TOO_LARGE, "over 100000 bytes"),
    "gzip cut": (page(gzip.compress(JPEG)[:-30], headers={"Content-Encoding": "gzip"}), Reason.BROKEN_TRANSFER, None),
    "gzip of nothing": (gzipped(b""), Reason.EMPTY_BODY, None),
    "gzip rubbish": (page(b"rubbish" * 9, headers={"Content-Encoding": "gzip"}), Reason.BAD_RESPONSE, None),
    "brotli bomb": (packed(JPEG + bytes(50_000_000), "br"), Reason.TOO_LARGE, "over 100000 bytes"),
    "brotli cut": (page(BROTLI[:-30], headers={"Content-Encoding": "br"}), Reason.BROKEN_TRANSFER, None),
    "brotli of nothing": (packed(b"", "br"), Reason.EMPTY_BODY, None),
    "brotli without an end": (endless(BROTLI, {"Content-Encoding": "br"}), Reason.TOO_LARGE, "over 100000 bytes"),
    "zstd bomb": (packed(JPEG + bytes(50_000_000), "zstd"), Reason.TOO_LARGE, "over 100000 bytes"),
    "zstd of HTML": (packed(b"<html>not here</html>" * 9, "zstd"), Reason.NOT_AN_IMAGE, "image/jpeg"),
    "zstd rubbish": (page(b"rubbish" * 9, headers={"Content-Encoding": "zstd"}), Reason.BAD_RESPONSE, ZSTD_SAYS),
    "lzma": (page(b"?" * 99, headers={"Content-Encoding": "lzma"}), Reason.BAD_RESPONSE, "content-encoding lzma"),
    "redirects to itself": (redirect("?again"), Reason.TOO_MANY_REDIRECTS, "5"),
    "redirects to a file": (redirect("file:///etc/passwd"), Reason.BLOCKED_SCHEME, "file"),
    "redirects to data": (redirect("data:image/png;base64,AAAA"), Reason.BLOCKED_SCHEME, "data"),
    "redirects nowhere": (page(b"", status=302), Reason.BAD_RESPONSE, "redirect without Location"),
    "redirects to no URL": (redirect("http://[::1"), Reason.BAD_RESPONSE, "redirect to no URL"),
    "redirects to a private address": (redirect("http://10.0.0.1/"), Reason.BLOCKED_ADDRESS, "10.0.0.1:80"),
    "redirects to the metadata": (redirect("http://[::ffff:a9fe:a9fe]/"), Reason.BLOCKED_ADDRESS, None),
    "opt-out": (page(JPEG, headers={"X-Robots-Tag": "noai"}), Reason.OPT_OUT, "noai"),
    "two opt-outs": (page(JPEG, headers={"X-Robots-Tag": "all", "X-Robots-Tag+": "none"}), Reason.OPT_OUT, "none"),
    "1x1": (page(encoded(photo(size=(1, 1)), "PNG")), Reason.TOO_SMALL, "1x1"),
    "truncated PNG": (page(encoded(photo(), "PNG")[:-40]), Reason.TRUNCATED_IMAGE, None),
}


def test_each_misbehaviour_ends_in_its_own_reason_and_costs_its_row_only(server, tmp_path):
    good = server.add("/good.jpg", page(JPEG))
    loop = "redirects to itself"
    server.add("/again", redirect("/again"))
    urls = [server.add(f"/{number}.jpg", behaviour) for number, (behaviour, _, _) in enumerate(BAD.values())]
    server.pages[f"/{list(BAD).index(loop)}.jpg"] = redirect("/again")
    started = time.monotonic()
    rows = fetch_here(tmp_path, [*urls, good], impatient(max_bytes=100_000, connections=100, per_host=100))
    assert time.monotonic() - started < 25  # one deadline of 4 s, no retries; the rest is a slow machine

    found = {name: (row["reason"], row["value"]) for name, row in zip(BAD, rows, strict=False)}
    wanted = {
        name: (reason.value, value if value is not None else found[name][1]) for name, (_, reason, value) in BAD.items()
    }
    assert found == wanted
    assert rows[-1]["status"] == "success"
    assert list(images(tmp_path).values()) == [JPEG]
    assert all(row["error_message"] and row["image_offset"] is None for row in rows[:-1])


FINE = {
    "plain": page(JPEG),
    "chunked": raw(head(headers={"Transfer-Encoding": "chunked", "Connection": "close"}) + chunk(JPEG) + b"0\r\n\r\n"),
    "without a length": until_close(JPEG),
    "gzip unasked": gzipped(JPEG),
    "brotli unasked": packed(JPEG, "br"),
    "zstd unasked": packed(JPEG, "zstd"),
    "says brotli and is not": page(JPEG, headers={"Content-Encoding": "br"}),
    "says gzip and is not": page(JPEG, headers={"Content-Encoding": "gzip"}),
    "wrong type": page(JPEG, type_="text/plain"),
    "other agent's opt-out": page(JPEG, headers={"X-Robots-Tag": "googlebot: noindex"}),
    "redirect": redirect("/plain.jpg"),
    "redirect to a quoted path": redirect("/caf%C3%A9%20au%20lait.jpg"),
    "redirect to a raw path": redirect("/café au lait.jpg"),
    "four redirects": redirect("/hop1"),
}


def test_every_good_answer_is_kept(server, tmp_path):
    for path in ("/plain.jpg", "/caf%C3%A9%20au%20lait.jpg"):
        server.add(path, page(JPEG))
    for hop in range(1, 5):
        server.add(
            f"/hop{hop}", redirect(f"/hop{hop + 1}" if hop < 4 else "plain.jpg", status=300 + (7 if hop % 2 else 8))
        )
    urls = [server.add(f"/{number}", behaviour) for number, behaviour in enumerate(FINE.values())]
    rows = fetch_here(tmp_path, urls, patient())
    assert {name: row["error_message"] for name, row in zip(FINE, rows, strict=True)} == dict.fromkeys(FINE)
    assert set(images(tmp_path).values()) == {JPEG}


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("/größe/Zürich.jpg", "/gr%C3%B6%C3%9Fe/Z%C3%BCrich.jpg"),
        ("/a b.jpg?q=1 2&ü=[|]", "/a%20b.jpg?q=1%202&%C3%BC=%5B%7C%5D"),
        ("/i?url=https%3A%2F%2Fc%2Fa.jpg&s=%2C%24%40%27%2b+", "/i?url=https%3A%2F%2Fc%2Fa.jpg&s=%2C%24%40%27%2b+"),
        ("/i?url=http://c/a.jpg?b,$@'", "/i?url=http://c/a.jpg?b,$@'"),
        ("/%7Eme/%2525%27%E4.jpg?%", "/~me/%2525%27%E4.jpg?%25"),
        ("/x/../a/./%2e%2E//b/..", "//"),
        ("?x=1", "/?x=1"),
        ("", "/"),
        ("/a%20b%2Fc.jpg", "/a%20b%2Fc.jpg"),
        ('/it\'s "quoted".jpg', "/it's%20%22quoted%22.jpg"),
        ("/100%.jpg", "/100%25.jpg"),
        ("/a.jpg#part", "/a.jpg"),
        ("  /a.jpg\n", "/a.jpg"),
    ],
)
def test_urls_as_people_write_them_are_asked_for_rightly(server, tmp_path, written, asked):
    server.add(asked, page(JPEG))
    lead = written[: len(written) - len(written.lstrip())]
    (row,) = fetch_here(tmp_path, [f"{lead}http://127.0.0.1:{server.port}{written.lstrip()}"], patient())
    assert row["error_message"] is None
    assert server.asked[asked] == 1


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        ("b.jpg?url=a%2Fb&s=%2C", "/a/b.jpg?url=a%2Fb&s=%2C"),
        ("../ö k.jpg", "/%C3%B6%20k.jpg"),
        ("?x=%2F", "/a/first?x=%2F"),
        ("//{host}/c%2F.jpg#part", "/c%2F.jpg"),
    ],
)
def test_a_redirect_is_followed_as_it_is_written(server, tmp_path, location, asked):
    place = location.format(host=f"127.0.0.1:{server.port}")
    server.add("/a/first", redirect(place))
    server.add(asked, page(JPEG))
    (row,) = fetch_here(tmp_path, [f"http://127.0.0.1:{server.port}/a/first"], patient())
    assert row["error_message"] is None
    assert server.asked[asked] == 1


def test_a_host_with_letters_beyond_ascii_is_asked_for_by_its_own_name():
    assert str(parse_target("HTTPS://u:p@Bücher.Example:443/ö#x")) == "https://xn--bcher-kva.example/%C3%B6"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", Reason.BLOCKED_SCHEME),
        ("ftp://127.0.0.1/a.jpg", Reason.BLOCKED_SCHEME),
        ("data:image/png;base64,AAAA", Reason.BLOCKED_SCHEME),
        ("javascript:alert(1)", Reason.BLOCKED_SCHEME),
        ("a.jpg", Reason.BAD_URL),
        ("//127.0.0.1/a.jpg", Reason.BAD_URL),
        ("http://", Reason.BAD_URL),
        ("http://[::1/a.jpg", Reason.BAD_URL),
        ("http://127.0.0.1:99999/a.jpg", Reason.BAD_URL),
        ("", Reason.BAD_URL),
    ],
)
def test_what_is_no_web_address_is_never_asked_for(url, reason):
    with pytest.raises(TransferError) as refused:
        parse_target(url)
    assert refused.value.reason is reason


def test_user_name_and_password_are_taken_off(server, tmp_path):
    server.add("/a.jpg", page(JPEG))
    (row,) = fetch_here(tmp_path, [f"http://user:secret@127.0.0.1:{server.port}/a.jpg"], patient())
    assert row["status"] == "success"
    assert "authorization" not in server.headers["/a.jpg"]


# --- retries ---------------------------------------------------------------------------------------------------------

BUSY = page(b"", status=503)


@pytest.mark.parametrize(
    ("first", "tries"),
    [
        ((BUSY, BUSY), 3),
        ((page(b"", status=429),), 2),
        ((page(b"", status=429, headers={"Retry-After": "0"}),), 2),
        ((reset(),), 2),
        ((cut_short(JPEG, 100), cut_chunks(JPEG, 100)), 3),
        ((after(30, page(JPEG)),), 2),
    ],
)
def test_what_may_pass_is_tried_again(server, tmp_path, first, tries):
    url = server.add("/a.jpg", one_after_another(*first, page(JPEG)))
    (row,) = fetch_here(tmp_path, [url], impatient(retries=3))
    assert row["error_message"] is None
    assert server.asked["/a.jpg"] == tries


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451, 501])
def test_what_will_not_pass_is_asked_for_once(server, tmp_path, status):
    url = server.add("/a.jpg", page(b"", status=status))
    (row,) = fetch_here(tmp_path, [url], patient(retries=3))
    assert (row["reason"], row["value"], row["http_status"]) == ("http_status", str(status), status)
    assert server.asked["/a.jpg"] == 1


@pytest.mark.parametrize("bad", ["HTML as JPEG", "opt-out", "PNG bomb", "endless", "redirects to a file", "1x1"])
def test_a_row_that_is_dropped_for_what_it_is_is_asked_for_once(server, tmp_path, bad):
    url = server.add("/a.jpg", BAD[bad][0])
    fetch_here(tmp_path, [url], patient(retries=3))
    assert server.asked["/a.jpg"] == 1


def test_retries_are_counted(server, tmp_path):
    (row,) = fetch_here(tmp_path, [server.add("/a.jpg", BUSY)], patient(retries=2))
    assert (row["reason"], row["value"]) == ("http_status", "503")
    assert server.asked["/a.jpg"] == 3


def test_retry_after_is_waited_for(server, tmp_path):
    times = []

    async def noting(exchange):
        times.append(time.monotonic())
        busy = page(b"", status=429, headers={"Retry-After": "1"})
        return await (busy if exchange.number == 0 else page(JPEG))(exchange)

    (row,) = fetch_here(tmp_path, [server.add("/a.jpg", noting)], patient(retries=1))
    assert row["status"] == "success"
    assert times[1] - times[0] >= 0.99


def test_a_retry_after_beyond_the_limit_is_not_waited_for(server, tmp_path):
    url = server.add("/a.jpg", page(b"", status=503, headers={"Retry-After": "315360000"}))
    (row,) = fetch_here(tmp_path, [url], patient(retries=3))
    assert (row["reason"], row["value"]) == ("http_status", "503")
    assert server.asked["/a.jpg"] == 1


def test_waiting_for_a_retry_takes_no_connection_from_others(server, tmp_path):
    wait = page(b"", status=503, headers={"Retry-After": "1"})
    order = []

    async def noting(exchange):
        order.append(exchange.path)
        return await page(JPEG)(exchange)

    busy = server.add("/busy.jpg", one_after_another(wait, noting))
    others = [server.add(f"/{number}.jpg", noting) for number in range(5)]
    rows = fetch_here(tmp_path, [busy, *others], patient(retries=1, connections=1, per_host=1))
    assert {row["status"] for row in rows} == {"success"}
    assert order[-1] == "/busy.jpg"


# --- limits ----------------------------------------------------------------------------------------------------------


def test_requests_to_one_host_and_in_all_stay_within_their_limits(server, tmp_path):
    with WebServer("127.0.0.2") as other:
        urls = [
            each.add(f"/{number}.jpg", after(0.01, page(jpeg(number))))
            for number in range(40)
            for each in (server, other)
        ]
        rows = fetch_here(tmp_path, urls, patient(per_host=3, connections=100))
        assert {row["status"] for row in rows} == {"success"}
        assert server.most_at_once == other.most_at_once == 3
        assert server.accepted <= 3  # kept alive

        server.most_at_once = other.most_at_once = 0
        fetch_here(tmp_path / "again", urls, patient(per_host=50, connections=4))
        assert max(server.most_at_once, other.most_at_once) <= 4


def test_hosts_that_redirect_to_each_other_do_not_lock_up(server, tmp_path):
    with WebServer("127.0.0.2") as other:
        urls = []
        for number in range(20):
            for here, there in ((server, other), (other, server)):
                there.add(f"/to{number}.jpg", page(JPEG))
                urls.append(here.add(f"/from{number}.jpg", redirect(there.url(f"/to{number}.jpg"))))
        rows = fetch_here(tmp_path, urls, patient(per_host=1, connections=2))
        assert {row["status"] for row in rows} == {"success"}
        assert (server.most_at_once, other.most_at_once) == (1, 1)


def test_a_slow_host_does_not_hold_up_the_others(server, tmp_path):
    with WebServer("127.0.0.2") as slow:
        waiting = [slow.add(f"/{number}.jpg", after(30, page(JPEG))) for number in range(8)]
        finished = []

        async def noting(exchange):
            finished.append(time.monotonic())
            return await page(JPEG)(exchange)

        quick = [server.add(f"/{number}.jpg", noting) for number in range(20)]
        started = time.monotonic()
        config = patient(per_host=2, connections=4, read_timeout_s=1.0, total_timeout_s=2.0)
        rows = fetch_here(tmp_path, [*waiting, *quick], config)
        assert {row["reason"] for row in rows[:8]} == {"timeout"}
        assert {row["status"] for row in rows[8:]} == {"success"}
        assert finished[-1] - started < time.monotonic() - finished[-1]  # done long before the slow host's four rounds


def test_large_bodies_cost_bounded_memory(server, tmp_path):
    urls = [server.add(f"/{number}.jpg", endless(JPEG)) for number in range(100)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = patient(max_bytes=20_000_000, connections=100, per_host=100, total_timeout_s=60.0, read_timeout_s=60.0)
    rows = fetch_here(tmp_path, urls, config)
    assert {row["reason"] for row in rows} == {"too_large"}
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 300  # 48 + 100 × 1/4, the allocator's waste, and the server in this process; unbounded, 1800


@pytest.mark.parametrize("name", ["gzip", "br", "zstd"])
def test_what_is_packed_comes_in_pieces_of_a_bounded_size_and_whole(name):
    content = np.random.default_rng(0).bytes(50_000) + bytes(1_000_000)
    sent = gzip.compress(content) if name == "gzip" else in_coding(content, name)
    coding = ContentCoding(name, most=len(sent))
    chunks = [sent[place : place + 1000] for place in range(0, len(sent), 1000)]
    pieces = [piece for part in chunks for piece in coding.pieces(part)] + list(coding.rest())
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= PIECE_BYTES


@pytest.mark.parametrize("name", ["gzip", "br", "zstd"])
def test_many_bombs_at_once_cost_bounded_memory(server, tmp_path, name):
    bomb = JPEG + bytes(30_000_000)
    behaviour = gzipped(bomb) if name == "gzip" else packed(bomb, name)
    urls = [server.add(f"/{number}.jpg", behaviour) for number in range(15)]
    del bomb
    config = patient(max_bytes=20_000_000, connections=30, per_host=30, total_timeout_s=60.0, read_timeout_s=60.0)
    with most_memory() as grown_mb:
        rows = fetch_here(tmp_path, urls, config)
    assert {row["reason"] for row in rows} == {"too_large"}
    assert grown_mb[-1] < 130  # a body of 20 MB and what unpacks it; all of them would take 300


@contextmanager
def most_memory():
    """A list whose last entry is by how many MB this process grew in the block, looked at often."""
    grown, over = [0.0], threading.Event()
    before = resident_mb()

    def watch():
        while not over.wait(0.005):
            grown.append(max(grown[-1], resident_mb() - before))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield grown
    finally:
        over.set()
        watching.join()


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def test_redirects_and_body_share_one_deadline(server, tmp_path):
    for hop in range(4):
        server.add(f"/{hop}.jpg", after(0.5, redirect(f"/{hop + 1}.jpg")))
    server.add("/4.jpg", page(JPEG))
    (row,) = fetch_here(tmp_path, [server.url("/0.jpg")], patient(read_timeout_s=5.0, total_timeout_s=1.2))
    assert (row["reason"], row["value"]) == ("timeout", "total")
    assert server.asked["/4.jpg"] == 0


# --- addresses -------------------------------------------------------------------------------------------------------


def test_a_redirect_to_a_port_that_is_not_allowed_reaches_no_listener(server, tmp_path):
    with WebServer() as secret:
        urls = [
            server.add("/302.jpg", redirect(secret.url("/secret.jpg"))),
            server.add("/307.jpg", redirect(f"http://[::ffff:127.0.0.1]:{secret.port}/secret.jpg", status=307)),
            secret.url("/direct.jpg"),
        ]
        rows = fetch_here(tmp_path, urls, patient(allow_addresses=[f"127.0.0.0/8:{server.port}"], retries=2))
        assert [row["reason"] for row in rows] == ["blocked_address"] * 3
        assert rows[0]["value"] == f"127.0.0.1:{secret.port}"
        assert secret.accepted == 0
        assert server.asked["/302.jpg"] == 1


class Answers(AbstractResolver):
    """Gives each look-up the next of its answers; a number is an error's."""

    def __init__(self, *answers):
        self.answers = list(answers)

    async def resolve(self, host, port=0, family=socket.AF_INET):
        answer = self.answers.pop(0)
        if isinstance(answer, int):
            raise socket.gaierror(answer, "no")
        return [
            {"hostname": host, "host": one, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
            for one in answer
        ]

    async def close(self):
        pass


def get(url, config, resolver):
    """One body with a resolver of ours."""

    async def body(result):
        return result.content

    async def once():
        async with open_session(config, resolver) as session:
            return await Transfer(session, config).hop(parse_target(url), config.total_timeout_s, body)

    return asyncio.run(once())


def test_a_name_that_resolves_to_an_allowed_address_is_fetched(server):
    server.add("/a.jpg", page(JPEG))
    assert get(f"http://pictures.example:{server.port}/a.jpg", patient(), Answers(["127.0.0.1"])) == JPEG


def test_a_name_that_does_not_exist_will_not_pass_and_a_failing_resolver_may():
    with pytest.raises(TransferError) as unknown:
        get("http://nowhere.example/", patient(), Answers(socket.EAI_NONAME))
    assert (unknown.value.reason, unknown.value.value, unknown.value.may_pass) == (Reason.DNS, "no such host", False)
    with pytest.raises(TransferError) as outage:
        get("http://nowhere.example/", patient(), Answers(socket.EAI_AGAIN))
    assert (outage.value.reason, outage.value.value, outage.value.may_pass) == (Reason.DNS, "no", True)
    assert unknown.value.is_network
    assert outage.value.is_network


def test_a_port_where_nobody_listens_is_connect(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (row,) = fetch_here(tmp_path, [f"http://127.0.0.1:{port}/a.jpg"], patient())
    assert row["reason"] == "connect"


# --- the shard -------------------------------------------------------------------------------------------------------


def test_one_url_with_several_captions_is_fetched_once_and_keeps_them_all(server, tmp_path):
    url = server.add("/a.jpg", page(JPEG))
    rows = fetch_here(tmp_path, [url] * 3, patient())
    assert server.asked["/a.jpg"] == 1
    assert [row["caption"] for row in rows] == ["picture 0", "picture 1", "picture 2"]
    assert len(images(tmp_path)) == 3


def test_rows_are_sorted_and_told_with_all_their_facts(server, tmp_path):
    picture = jpeg(7, size=(900, 700))
    slow = server.add("/slow.jpg", after(0.2, page(picture)))
    urls = [slow, server.add("/quick.jpg", page(JPEG)), server.add("/no.jpg", page(b"", status=404))]
    rows = fetch_here(tmp_path, urls, patient(image_size=350))
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    first = rows[0]
    assert (first["status"], first["reason"], first["error_message"], first["list_id"]) == ("success", None, None, "0")
    assert (first["width"], first["height"], first["original_width"], first["original_height"]) == (450, 350, 900, 700)
    assert (first["bytes"], first["format"], first["http_status"]) == (len(picture), "jpeg", 200)
    assert first["aspect"] == pytest.approx(9 / 7, abs=1e-4)
    assert len(first["sha256"]) == 64
    assert rows[2]["error_message"] == "http_status: 404"
    stats = read_stats(tmp_path)
    assert stats.pop("duration") > 0
    assert stats == {
        "count": 3,
        "successes": 2,
        "failed_to_download": 1,
        "failed_to_resize": 0,
        "status_dict": {"http_status": 1, "success": 2},
    }


def test_what_a_server_writes_cannot_steer_a_terminal(server, tmp_path):
    url = server.add("/a.jpg", page(b"<html>", headers={"Content-Encoding": "a\x1b[31m" + "x" * 500}))
    (row,) = fetch_here(tmp_path, [url], patient())
    assert row["value"].isprintable()
    assert len(row["value"]) <= 200
