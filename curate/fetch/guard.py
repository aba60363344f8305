"""Which addresses a request may go to, checked on the very address that is about to be connected.

The guard stands in aiohttp's `socket_factory`, the one place that every connection passes: literals, redirects, each of
several DNS answers, and a name that changes its answer between two look-ups. A guard in the resolver alone never sees
`http://127.0.0.1/` or `http://[::ffff:127.0.0.1]/`; here one stands in addition, so that a host any of whose answers
is refused is refused whole.

The table is our own: `ipaddress.is_global` changes with the version of Python, and is True for NAT64 and 6to4 forms
of loopback, for site-local and multicast addresses. In IPv6 only what IANA has given out as global unicast is public,
less the parts reserved in it.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from curate.config import parse_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# IANA's special-purpose registries (RFC 6890 and successors), multicast, and class E.
NOT_PUBLIC_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, and the clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # IETF protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays, withdrawn
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
GLOBAL_UNICAST = IPv6Network("2000::/3")
NOT_PUBLIC_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # IETF protocol assignments: Teredo, ORCHID, benchmarks
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
        "3ffe::/16",  # 6bone, withdrawn
    )
)
# An IPv4 address stands in the last 32 bits, or, for 6to4, after the first 16.
NAT64 = IPv6Network("64:ff9b::/96")
SIX_TO_FOUR = IPv6Network("2002::/16")


class BlockedAddress(OSError):  # noqa: N818 - an outcome of a row, like Rejected
    """A connection that the guard refused; an OSError, so that aiohttp hands it through as the cause of its own.

    Attributes:
        address: what was to be connected.
    """

    def __init__(self, address: str) -> None:
        super().__init__(f"{address} is not a public address and not in fetch.allow_addresses")
        self.address = address


def is_public(address: Address) -> bool:
    """Whether an address lies in the public Internet, also where an IPv6 address carries an IPv4 one."""
    plain = unwrap(address)
    if isinstance(plain, IPv4Address):
        return not any(plain in network for network in NOT_PUBLIC_V4)
    return plain in GLOBAL_UNICAST and not any(plain in network for network in NOT_PUBLIC_V6)


def unwrap(address: Address) -> Address:
    """The IPv4 address that a v4-mapped, NAT64 or 6to4 address stands for; any other as it is.

    Teredo (2001::/32) and v4-compatible addresses (::/96) are not unwrapped: no form of them is public.
    """
    if isinstance(address, IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    if address in SIX_TO_FOUR:
        return IPv4Address(int(address) >> 80 & 0xFFFFFFFF)
    return address


@dataclass(frozen=True)
class Guard:
    """Lets through what is public, and the networks that are allowed by name.

    Attributes:
        allowed: networks, each with the one port that is allowed there, or None for any.
    """

    allowed: tuple[tuple[Network, int | None], ...] = ()

    @classmethod
    def allowing(cls, networks: Sequence[str]) -> Guard:
        """A guard that also lets through `fetch.allow_addresses`.

        Raises:
            ConfigError: one of them is not a network.
        """
        return cls(tuple(parse_network(network) for network in networks))

    def check(self, host: str, port: int) -> None:
        """Do nothing if a connection to this numeric address may be made.

        Raises:
            BlockedAddress: it may not, or is no numeric address.
        """
        try:
            address = ip_address(host)
        except ValueError as error:
            raise BlockedAddress(f"{host}:{port}") from error
        if not (is_public(address) or self._is_allowed(address, port)):
            raise BlockedAddress(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    def _is_allowed(self, address: Address, port: int) -> bool:
        forms = {address, unwrap(address)}
        return any(form in network and only in (None, port) for network, only in self.allowed for form in forms)

    def socket(self, addr_info: tuple[Any, ...]) -> socket.socket:
        """A socket for an address that may be connected: `socket_factory` of aiohttp's connector.

        Raises:
            BlockedAddress: it may not.
        """
        family, kind, protocol, _, (host, port, *_) = addr_info
        self.check(host, port)
        return socket.socket(family, kind, protocol)


class GuardedResolver(AbstractResolver):
    """A resolver that refuses a host if any one of its answers may not be connected."""

    def __init__(self, guard: Guard, inner: AbstractResolver) -> None:
        self.guard, self.inner = guard, inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The answers of the inner resolver.

        Raises:
            BlockedAddress: one of them may not be connected.
            OSError: the name does not resolve.
        """
        answers = await self.inner.resolve(host, port, family)
        for answer in answers:
            self.guard.check(answer["host"], port)
        return answers

    async def close(self) -> None:
        """Close the inner resolver."""
        await self.inner.close()
