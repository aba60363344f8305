"""Why a URL gave no body: the exception that says so, and what those of aiohttp, sockets and TLS mean."""

from __future__ import annotations

import asyncio
import socket
import ssl

import aiohttp

from curate.fetch.guard import BlockedAddress
from curate.images import Rejected
from curate.ledger import Reason


class TransferError(Rejected):
    """A URL that gave no body.

    Attributes:
        reason, value: as in the ledger.
        http_status: of the last response, if there was one.
        may_pass: whether another try can help.
        retry_after_s: what the server asked to wait, in seconds.
        is_network: whether no server was reached at all, which may be the network's fault and not the URL's.
    """

    def __init__(
        self,
        reason: Reason,
        value: str = "",
        *,
        http_status: int | None = None,
        may_pass: bool = False,
        retry_after_s: float | None = None,
        is_network: bool = False,
    ) -> None:
        super().__init__(reason, value)
        self.is_network = is_network
        self.http_status = http_status
        self.may_pass = may_pass
        self.retry_after_s = retry_after_s


def failure(error: Exception, status: int | None) -> TransferError:
    """What an exception of aiohttp, the socket or the resolver means for a row."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, BlockedAddress):
        return TransferError(Reason.BLOCKED_ADDRESS, cause.address, http_status=status)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        unknown = error.os_error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
        value = "no such host" if unknown else _words(cause)
        return TransferError(Reason.DNS, value, may_pass=not unknown, is_network=True)
    if isinstance(error, aiohttp.ClientSSLError):
        return TransferError(Reason.TLS, _words(cause))
    if isinstance(error, asyncio.TimeoutError):
        phase = _phase(error, status)
        return TransferError(Reason.TIMEOUT, phase, http_status=status, may_pass=True, is_network=phase == "connect")
    if isinstance(error, aiohttp.ClientConnectorError):
        return TransferError(Reason.CONNECT, _words(cause), may_pass=True, is_network=True)
    return _broken(error, status)


def _broken(error: Exception, status: int | None) -> TransferError:
    """What an exception means that came after the connection."""
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ClientConnectionError | OSError):
        where = "before the answer" if status is None else "in the body"
        return TransferError(Reason.BROKEN_TRANSFER, where, http_status=status, may_pass=True)
    if isinstance(error, aiohttp.ClientError) and not isinstance(error, aiohttp.InvalidURL):
        message = str(getattr(error, "message", "")) or type(error).__name__
        return TransferError(Reason.BAD_RESPONSE, message.splitlines()[0].rstrip(":"), http_status=status)
    return TransferError(Reason.BAD_URL, type(error).__name__)


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return getattr(error, "strerror", None) or type(error).__name__


def _phase(error: BaseException, status: int | None) -> str:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return "connect"
    if isinstance(error, aiohttp.SocketTimeoutError):
        return "first byte" if status is None else "stall"
    return "total"
