"""What the failures of img2dataset mean: exceptions of urllib under it, and the words that it gives back itself."""

from __future__ import annotations

import http.client
import socket
import ssl
import urllib.error

from curate.fetch.failures import TransferError
from curate.fetch.guard import BlockedAddress
from curate.fetch.manners import MAY_PASS
from curate.images import Rejected
from curate.ledger import Reason

# How its own messages begin; whatever else it says stands in the row as it is.
ITS_WORDS = {
    "Image decoding error": Reason.CORRUPT_IMAGE,
    "image too small": Reason.TOO_SMALL,
    "image area too large": Reason.TOO_MANY_PIXELS,
    "Use of image disallowed by X-Robots-Tag": Reason.OPT_OUT,
}


def as_transfer_error(error: Exception, http_status: int | None) -> TransferError:
    """What an exception of urllib, http.client or a socket means for a row.

    Args:
        error: as it was raised in `urlopen` or while the body was read.
        http_status: of the answer, if there was one.
    """
    if isinstance(error, TransferError):
        return error
    if isinstance(error, Rejected):
        return TransferError(error.reason, error.value, http_status=http_status)
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return TransferError(
            Reason.HTTP_STATUS, str(error.code), http_status=error.code, may_pass=error.code in MAY_PASS
        )
    if isinstance(error, urllib.error.URLError):
        return _without_answer(error.reason)
    if isinstance(error, TimeoutError):
        phase = "first byte" if http_status is None else "stall"
        return TransferError(Reason.TIMEOUT, phase, http_status=http_status, may_pass=True)
    if isinstance(error, http.client.RemoteDisconnected | http.client.IncompleteRead | OSError):
        where = "before the answer" if http_status is None else "in the body"
        return TransferError(Reason.BROKEN_TRANSFER, where, http_status=http_status, may_pass=True)
    words = f"{type(error).__name__}: {error}".splitlines()[0]
    return TransferError(Reason.BAD_RESPONSE, words, http_status=http_status)


def _without_answer(cause: object) -> TransferError:
    """What it means that urllib could not send a request; its cause may be an exception or a text."""
    if isinstance(cause, BlockedAddress):
        return TransferError(Reason.BLOCKED_ADDRESS, cause.address)
    if isinstance(cause, socket.gaierror):
        return lookup_failed(cause)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return TransferError(Reason.TLS, cause.verify_message)
    if isinstance(cause, ssl.SSLError):
        return TransferError(Reason.TLS, (getattr(cause, "reason", None) or "failed").replace("_", " ").lower())
    if isinstance(cause, TimeoutError):
        return TransferError(Reason.TIMEOUT, "connect", may_pass=True, is_network=True)
    words = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return TransferError(Reason.CONNECT, words, may_pass=True, is_network=True)


def lookup_failed(error: OSError) -> TransferError:
    """What it means that a name has no address."""
    unknown = error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
    value = "no such host" if unknown else error.strerror or "no answer"
    return TransferError(Reason.DNS, value, may_pass=not unknown, is_network=True)


def from_words(status: str, message: str, http_status: int | None) -> TransferError:
    """The way back from img2dataset's `status` and `error_message`: our own words if they are that, else its."""
    word, _, value = message.partition(": ")
    if word in {reason.value for reason in Reason}:
        reason = Reason(word)
        is_network = reason in (Reason.DNS, Reason.CONNECT) or (reason, value) == (Reason.TIMEOUT, "connect")
        return TransferError(reason, value, http_status=http_status, is_network=is_network)
    otherwise = Reason.CORRUPT_IMAGE if status == "failed_to_resize" else Reason.BAD_RESPONSE
    reason = next((reason for start, reason in ITS_WORDS.items() if message.startswith(start)), otherwise)
    return TransferError(reason, f"img2dataset: {message}", http_status=http_status)
