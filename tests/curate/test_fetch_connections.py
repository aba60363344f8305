"""Connections: TLS, IPv6, how many stay open, what is sent along; and no address that the guard refuses is reached."""

import asyncio
import socket
import ssl
import zlib
from datetime import datetime, timezone
from pathlib import Path

import pytest
import trustme
from aiohttp.abc import AbstractResolver
from yarl import URL

from curate.fetch.failures import TransferError
from curate.fetch.transfer import Transfer, open_session, parse_target
from curate.ledger import Reason
from tests.curate.fetching import impatient, jpeg, patient
from tests.webserver import WebServer, after, gzipped, page, raw, redirect

JPEG = jpeg()


class Names(AbstractResolver):
    """Answers each look-up with the next of these lists of addresses, the last for all further ones."""

    def __init__(self, *answers):
        self.answers = list(answers)

    async def resolve(self, host, port=0, family=socket.AF_INET):
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in addresses
        ]

    async def close(self):
        pass


async def content(body):
    return body.content


def hops(urls, config=None, resolver=None, *, is_last=False, between=lambda: None):
    """What each URL gives, one after the other in one session: bytes, a URL or a TransferError."""
    config = config or patient()

    async def ask():
        found = []
        async with open_session(config, resolver) as session:
            transfer = Transfer(session, config)
            for url in urls:
                try:
                    found.append(
                        await transfer.hop(parse_target(url), config.total_timeout_s, content, is_last=is_last)
                    )
                except TransferError as error:
                    found.append(error)
                between()
        return found

    return asyncio.run(ask())


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def trusted(authority, tmp_path, monkeypatch):
    """The authority is one of the system's."""
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    monkeypatch.setenv("SSL_CERT_FILE", str(path))


def serving(authority, *names, **how):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names, **how).configure_cert(context)
    return WebServer(tls=context)


@pytest.mark.usefixtures("trusted")
def test_https_with_a_good_certificate_is_fetched(authority):
    with serving(authority, "127.0.0.1") as server:
        assert hops([server.add("/a.jpg", page(JPEG))] * 3) == [JPEG] * 3
        assert server.accepted == 1


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("names", "how", "said"),
    [
        (["other.example"], {}, "not valid for '127.0.0.1'"),
        (["127.0.0.1"], {"not_after": datetime(2020, 1, 1, tzinfo=timezone.utc)}, "certificate has expired"),
    ],
)
def test_a_certificate_that_is_not_the_hosts_or_out_of_date_is_refused(authority, names, how, said):
    with serving(authority, *names, **how) as server:
        (refused,) = hops([server.add("/a.jpg", page(JPEG))])
        assert (refused.reason, refused.may_pass, refused.is_network) == (Reason.TLS, False, False)
        assert said in refused.value
        assert not server.asked


def test_a_certificate_of_nobodys_is_refused(authority):
    with serving(authority, "127.0.0.1") as server:
        (refused,) = hops([server.add("/a.jpg", page(JPEG))])
        assert refused.reason is Reason.TLS
        assert "issuer certificate" in refused.value or "self-signed" in refused.value


def test_a_server_that_speaks_no_tls_is_told_as_such():
    config = patient(connect_timeout_s=0.4, total_timeout_s=5.0)
    with WebServer() as server, socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        first, second = hops([f"https://127.0.0.1:{server.port}/", f"https://127.0.0.1:{port}/"], config)
    assert first.reason in (Reason.TLS, Reason.CONNECT, Reason.TIMEOUT)
    assert (second.reason, second.value) == (Reason.TIMEOUT, "connect")


# --- what is sent, and what stays open -------------------------------------------------------------------------------


def test_ipv6_literals_are_fetched_where_they_are_allowed():
    with WebServer("::1") as server:
        found, refused = (
            hops([server.add("/a.jpg", page(JPEG))], patient(allow_addresses=[network]))[0]
            for network in (f"[::1]/128:{server.port}", "127.0.0.0/8")
        )
        assert found == JPEG
        assert (refused.reason, refused.value) == (Reason.BLOCKED_ADDRESS, f"[::1]:{server.port}")


def test_a_request_says_who_we_are_and_carries_nothing_of_another():
    config = patient(contact="me@example.org")
    with WebServer() as server:
        url = server.add("/a.jpg", page(JPEG, headers={"Set-Cookie": "id=1; Path=/"}))
        hops([url, url], config)
        sent = server.headers["/a.jpg"]
    assert set(sent) == {"host", "user-agent", "accept", "accept-encoding"}
    assert sent["user-agent"].startswith("cliptailor/")
    assert "me@example.org" in sent["user-agent"]
    assert sent["accept-encoding"] == "identity"


def test_hosts_with_nothing_more_to_ask_for_leave_no_connection_open():
    open_files = []

    def count():
        open_files.append(len(list(Path("/dev/fd").iterdir())))

    with WebServer() as server:
        server.add("/a.jpg", page(JPEG, headers={"Connection": "close"}))
        urls = [f"http://host{number}.example:{server.port}/a.jpg" for number in range(60)]
        assert hops(urls, resolver=Names(["127.0.0.1"]), is_last=True, between=count) == [JPEG] * 60
        assert server.headers["/a.jpg"]["connection"] == "close"
    assert max(open_files) - open_files[0] < 10


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("http://user:secret@ho\u2100st/", "secret"),
        ("http://user:sec\u2100ret@host/", "ret"),
        ("http://user:secret@host:99999/", "secret"),
        ("http://user:secret@[::1/", "secret"),
        ("http://user:secret@/x", "secret"),
        ("http://user:secret@127.1/x", "secret"),
        ("http://user:secret@10.0.0.1/x", "secret"),
    ],
)
def test_no_failure_tells_a_password(url, secret):
    with WebServer() as server:
        start = server.add("/a.jpg", redirect(url))
        try:
            target = str(parse_target(url))
            (direct,) = hops([target])
            said = f"{target} {direct.value} {direct}"
        except TransferError as error:
            said = f"{error.value} {error}"
        (told,) = hops([start])
    assert secret not in f"{said} {told.value if isinstance(told, TransferError) else told}"


# --- what servers send -----------------------------------------------------------------------------------------------


def test_other_codings_and_a_flood_of_interim_answers():
    bare = zlib.compressobj(wbits=-15)
    unframed = bare.compress(JPEG) + bare.flush()

    async def interim_for_ever(exchange):
        while True:
            await exchange.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 50)
            await asyncio.sleep(0.01)

    with WebServer() as server:
        good = [
            server.add("/gzip", gzipped(JPEG)),
            server.add("/zlib", page(zlib.compress(JPEG), headers={"Content-Encoding": "deflate"})),
            server.add("/deflate", page(unframed, headers={"Content-Encoding": "Deflate"})),
            server.add("/1.0", raw(b"HTTP/1.0 200 OK\r\n\r\n" + JPEG)),
            server.add("/100", raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n" + JPEG)),
        ]
        assert hops(good) == [JPEG] * 5
        cut, flood = hops(
            [
                server.add("/cut", page(unframed[:-9], headers={"Content-Encoding": "deflate"})),
                server.add("/flood", interim_for_ever),
            ],
            impatient(),
        )
    assert (cut.reason, cut.may_pass) == (Reason.BROKEN_TRANSFER, True)
    assert flood.reason is Reason.TIMEOUT


def test_a_connection_that_cannot_be_made_in_time_is_connect():
    async def never(host, port=0, family=socket.AF_INET):
        await asyncio.sleep(30)

    resolver = Names([])
    resolver.resolve = never
    (slow,) = hops(["http://slow.example/"], patient(connect_timeout_s=0.2, total_timeout_s=5.0), resolver)
    assert (slow.reason, slow.value, slow.is_network, slow.may_pass) == (Reason.TIMEOUT, "connect", True, True)


def test_waiting_for_memory_does_not_count_against_the_server():
    config = patient(max_bytes=40_000_000, total_timeout_s=3.0, read_timeout_s=3.0)
    large = JPEG + bytes(30_000_000)

    async def ask():
        async with open_session(config) as session:
            transfer = Transfer(session, config)

            async def slow_use(body):
                await asyncio.sleep(1.5)
                return len(body.content)

            tasks = [transfer.hop(URL(url), 3.0, slow_use) for _ in range(4)]
            return await asyncio.gather(*tasks)

    with WebServer() as server:
        url = server.add("/large.jpg", page(large))
        assert asyncio.run(ask()) == [len(large)] * 4


# --- addresses -------------------------------------------------------------------------------------------------------

SPELLINGS = [
    "127.0.0.1", "127.0.0.2", "127.255.255.254", "0.0.0.0", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1",
    "0177.0.0.1", "017700000001", "127.0.0.01", "127.0.0.1.", "127.000.000.001", "①②⑦.0.0.1", "127。0。0。1",
    "１２７.0.0.1", "0", "0x0", "00", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1]", "[fec0::1]",
    "[ff02::1]", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "[::ffff:169.254.169.254]",
    "[fd00:ec2::254]", "100.64.0.1", "100.100.100.200", "192.0.0.192", "224.0.0.1", "255.255.255.255",
]  # fmt: skip
ANSWERS = [spelling.strip("[]") for spelling in SPELLINGS if spelling.startswith("[")] + [
    "127.0.0.1", "127.0.0.2", "0.0.0.0", "10.0.0.1", "169.254.169.254", "192.168.0.1", "100.64.0.1", "224.0.0.1",
]  # fmt: skip


@pytest.fixture
def listener():
    """A server that nobody may reach."""
    with WebServer() as four, WebServer("::1") as six:
        yield four, six
        assert (four.accepted, six.accepted) == (0, 0)


def is_refused(found):
    return isinstance(found, TransferError) and found.reason in (Reason.BLOCKED_ADDRESS, Reason.BAD_URL)


def test_no_spelling_of_a_forbidden_address_is_reached_directly_or_by_a_redirect(listener):
    ports = [server.port for server in listener]
    urls = [f"http://{host}:{port}/a.jpg" for host in SPELLINGS for port in ports]
    with WebServer("127.0.0.3") as open_server:
        config = patient(allow_addresses=[f"127.0.0.3/32:{open_server.port}"])
        starts = [open_server.add(f"/{number}", redirect(url)) for number, url in enumerate(urls)]
        targets = hops(starts, config)
        assert open_server.accepted == 1
    assert {url for url, found in zip(urls, hops(urls, config), strict=True) if not is_refused(found)} == set()
    followed = hops([str(target) for target in targets if not isinstance(target, TransferError)], config)
    assert len(followed) > len(SPELLINGS)
    assert [found for found in followed if not is_refused(found)] == []


def test_no_name_leads_to_a_forbidden_address(listener):
    """Also where only one of its answers is forbidden, whichever comes first."""
    public = ([], ["8.8.8.8"], ["2606:4700::1111"])
    answers = [answer for one in ANSWERS for other in public for answer in ([*other, one], [one, *other])]
    for server in listener:
        urls = [f"http://name{number}.example:{server.port}/" for number in range(len(answers))]
        found = hops(urls, patient(allow_addresses=[]), Names(*answers, []))
        assert [error.reason for error in found] == [Reason.BLOCKED_ADDRESS] * len(answers)


def test_a_name_that_changes_its_answer_is_checked_at_every_connection(listener):
    secret = listener[0]
    with WebServer("127.0.0.3") as open_server:
        # one port for both, so that only the address differs
        config = patient(allow_addresses=["127.0.0.3/32"])
        open_server.add("/a.jpg", raw(b""))

        async def twice():
            async with open_session(config, Names(["127.0.0.3"], ["127.0.0.1"])) as session:
                transfer, found = Transfer(session, config), []
                for port in (open_server.port, secret.port, secret.port):
                    with pytest.raises(TransferError) as refused:
                        await transfer.hop(URL(f"http://pictures.example:{port}/a.jpg"), 5.0, content)
                    found.append(refused.value.reason)
                return found

        assert asyncio.run(twice()) == [Reason.BROKEN_TRANSFER, Reason.BLOCKED_ADDRESS, Reason.BLOCKED_ADDRESS]


@pytest.mark.parametrize("name", ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"])
def test_no_proxy_of_the_environment_is_used(listener, monkeypatch, name):
    monkeypatch.setenv(name, f"http://127.0.0.1:{listener[0].port}")
    with WebServer("127.0.0.3") as server:
        assert hops([server.add("/a.jpg", after(0, page(JPEG)))]) == [JPEG]
