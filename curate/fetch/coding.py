"""Content-Encoding undone: of servers that compress although asked for `identity`.

What a few bytes unpack to may be endless, so it is given out in pieces, each made only when the one before was taken:
who takes them counts, and stops.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from curate.fetch.failures import TransferError
from curate.images import sniff
from curate.ledger import Reason

PIECE_BYTES = 128 << 10
WINDOW_BYTES = 16 << 20  # brotli's largest; zstd's grows with what is taken
ZLIB = 8  # the low half of the first byte of zlib's frame
_INFLATED = ("gzip", "x-gzip", "deflate")
_BY_ARROW = {"br": "brotli", "zstd": "zstd"}  # Arrow's names of the codecs that it brings


class ContentCoding:
    """One body's coding.

    Args:
        header: Content-Encoding, as the server says it.
        most: bytes on the wire that may be kept until they can be unpacked.

    Raises:
        TransferError: a coding that is not known.
    """

    def __init__(self, header: str, most: int) -> None:
        self.name, self._most = header.strip().lower(), most
        self._inflate = zlib.decompressobj(wbits=47) if self.name in _INFLATED else None  # 47: gzip or zlib
        self._codec = _arrow_codec(self.name)
        self._packed = bytearray()
        self._started = False
        if self.plain and self.name not in ("", "identity"):
            raise self._error(f"content-encoding {self.name}")

    @property
    def plain(self) -> bool:
        """Whether the bytes on the wire are the body's own, so that Content-Length is its length."""
        return self._inflate is None and self._codec is None

    @property
    def takes_memory(self) -> bool:
        """Whether `rest` needs WINDOW_BYTES to look back on what it has given out, and not a few kB."""
        return self._codec is not None and self._started

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """What a chunk of the body unpacks to, as far as it is known yet.

        Raises:
            TransferError: it is not encoded as it says, or longer than may be kept.
        """
        self._begin(chunk)
        if self._inflate is not None:
            yield from self._inflated(self._inflate, chunk)
        elif self._codec is None:
            yield chunk
        else:
            self._packed += chunk  # Arrow reads a file, and cannot be fed
            if len(self._packed) > self._most:
                raise TransferError(Reason.TOO_LARGE, f"over {self._most} bytes", http_status=200)
            yield b""

    def rest(self) -> Iterator[bytes]:
        """What is left when the body has ended.

        Raises:
            TransferError: the encoded stream has not come to its end, or is not encoded as it says.
        """
        if self._inflate is not None and self._started and not self._inflate.eof:
            raise self._ends_early()
        if self._codec is not None:
            yield from self._unpacked(self._codec)

    def _begin(self, chunk: bytes) -> None:
        if self._started:
            return
        self._started = True
        if sniff(chunk) is not None:
            self._inflate = self._codec = None  # says that it is encoded, and is not
        elif self.name == "deflate" and chunk[0] & 0x0F != ZLIB:
            self._inflate = zlib.decompressobj(wbits=-15)  # without zlib's frame, as some servers understand it

    def _inflated(self, inflate: zlib._Decompress, packed: bytes) -> Iterator[bytes]:
        is_full = False
        while packed or is_full:  # a full piece may have left something behind
            try:
                piece = inflate.decompress(packed, PIECE_BYTES)
            except zlib.error as error:
                raise self._error(f"content-encoding {self.name}: {error}") from error
            packed, is_full = inflate.unconsumed_tail, len(piece) == PIECE_BYTES
            yield piece

    def _unpacked(self, codec: str) -> Iterator[bytes]:
        import pyarrow as pa

        try:
            with pa.CompressedInputStream(pa.BufferReader(self._packed), codec) as stream:
                while piece := stream.read(PIECE_BYTES):
                    yield piece
        except OSError as error:
            if "Truncated" in str(error):
                raise self._ends_early() from error
            raise self._error(f"content-encoding {self.name}: {error}") from error

    def _ends_early(self) -> TransferError:
        return TransferError(Reason.BROKEN_TRANSFER, "content encoding ends early", http_status=200, may_pass=True)

    def _error(self, value: str) -> TransferError:
        return TransferError(Reason.BAD_RESPONSE, value, http_status=200)


def _arrow_codec(name: str) -> str | None:
    """Arrow's name of a coding, if this build of it has that."""
    if name not in _BY_ARROW:
        return None
    import pyarrow as pa

    return _BY_ARROW[name] if pa.Codec.is_available(_BY_ARROW[name]) else None
