"""Which addresses the guard lets through, at the guard, without a socket. Connections are in test_fetch_transfer."""

import asyncio
import socket
from ipaddress import ip_address

import pytest
from aiohttp.abc import AbstractResolver

from curate.errors import ConfigError
from curate.fetch.guard import BlockedAddress, Guard, GuardedResolver, is_public

NOT_PUBLIC = [
    # IPv4: one from each block, and the edges of those that are easily drawn wrong
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.127.255.255", "127.0.0.1", "127.255.255.254",
    "169.254.0.1", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.9", "192.0.2.1",
    "192.88.99.1", "192.168.0.1", "192.168.255.255", "198.18.0.1", "198.19.255.255", "198.51.100.7", "203.0.113.9",
    "224.0.0.1", "224.0.1.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    # IPv6: unspecified, loopback, private, link-local (with its zone), site-local, multicast, documentation, unassigned
    "::", "::1", "fc00::1", "fd12:3456::1", "fe80::1", "fe80::1%1", "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1",
    "3fff::1", "3ffe::1", "5f00::1", "4000::1", "100::1", "8000::1",
    # an IPv4 address that is not public, in IPv6 clothes: mapped, compatible, NAT64, local NAT64, 6to4, Teredo, ORCHID
    "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::8.8.8.8",
    "64:ff9b::7f00:1", "64:ff9b::10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1",
    "2002:a9fe:a9fe::", "2001:0:4136:e378:8000:63bf:80ff:fffe", "2001:10::1", "2001:2::1",
]  # fmt: skip
PUBLIC = [
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.1",
    "172.15.255.255", "172.32.0.0", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255",
    "2606:4700::1111", "2a00:1450:4001::200e", "2001:4860:4860::8888", "2400:cb00::1",
    "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_outside_the_public_internet_is_refused(address):
    assert not is_public(ip_address(address))
    with pytest.raises(BlockedAddress):
        Guard().check(address, 80)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_let_through(address):
    assert is_public(ip_address(address))
    Guard().check(address, 443)


@pytest.mark.parametrize(
    ("allowed", "address", "port", "passes"),
    [
        (["127.0.0.0/8"], "127.3.2.1", 8080, True),
        (["127.0.0.0/8:8080"], "127.0.0.1", 8080, True),
        (["127.0.0.0/8:8080"], "127.0.0.1", 8081, False),
        (["127.0.0.0/8:8080"], "::ffff:127.0.0.1", 8080, True),
        (["127.0.0.0/8"], "::1", 80, False),
        (["[::1]/128:8080"], "::1", 8080, True),
        (["[::1]/128:8080"], "::1", 80, False),
        (["10.1.0.0/16", "127.0.0.1/32:80"], "10.1.2.3", 1, True),
        (["10.1.0.0/16", "127.0.0.1/32:80"], "10.2.2.3", 1, False),
        (["10.1.0.0/16"], "169.254.169.254", 80, False),
    ],
)
def test_only_the_networks_and_ports_allowed_by_name_are_added(allowed, address, port, passes):
    guard = Guard.allowing(allowed)
    if passes:
        guard.check(address, port)
    else:
        with pytest.raises(BlockedAddress):
            guard.check(address, port)


@pytest.mark.parametrize("host", ["localhost", "2130706433", "127.1", "0x7f.1", ""])
def test_what_is_no_numeric_address_is_refused(host):
    with pytest.raises(BlockedAddress):
        Guard().check(host, 80)


def test_a_network_that_is_none_is_a_config_error():
    with pytest.raises(ConfigError, match="allow_addresses: 'localhost'"):
        Guard.allowing(["localhost"])


def test_a_refused_address_gets_no_socket():
    with pytest.raises(BlockedAddress) as refused:
        Guard().socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 80)))
    assert refused.value.address == "10.0.0.1:80"


def test_an_ipv6_address_is_shown_in_brackets():
    with pytest.raises(BlockedAddress) as refused:
        Guard().socket((socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 80, 0, 0)))
    assert refused.value.address == "[fe80::1]:80"


class Answers(AbstractResolver):
    """A resolver with fixed answers."""

    def __init__(self, *hosts):
        self.hosts = hosts

    async def resolve(self, host, port=0, family=socket.AF_INET):
        return [
            {"hostname": host, "host": each, "port": port, "family": family, "proto": 0, "flags": 0}
            for each in self.hosts
        ]

    async def close(self):
        pass


def test_a_host_is_refused_whole_if_one_of_its_answers_is():
    resolver = GuardedResolver(Guard(), Answers("8.8.8.8", "10.0.0.1"))
    with pytest.raises(BlockedAddress):
        asyncio.run(resolver.resolve("example.org", 80))


def test_a_host_with_public_answers_resolves():
    answers = asyncio.run(GuardedResolver(Guard(), Answers("8.8.8.8", "1.1.1.1")).resolve("example.org", 80))
    assert [answer["host"] for answer in answers] == ["8.8.8.8", "1.1.1.1"]
