"""Headers of tar members in USTAR, made from a template: many times as quick as tarfile's own, and the same bytes."""

from __future__ import annotations

import tarfile


def header(name: str, size: int) -> bytes:
    """The USTAR header of a regular file, as tarfile writes it; mtime, uid, gid stay 0: equal samples, equal bytes."""
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > 100 or size >= 8**11:
        return _tar_info(name, size).tobuf(tarfile.USTAR_FORMAT)
    octal = b"%011o" % size
    # The checksum is of all bytes, its own eight taken as spaces.
    checksum = b"%06o\0 " % (_TEMPLATE_SUM + sum(encoded) + sum(octal))
    return b"".join(
        (encoded.ljust(100, b"\0"), _TEMPLATE[100:124], octal, _TEMPLATE[135:148], checksum, _TEMPLATE[156:])
    )


def _tar_info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info


_TEMPLATE = _tar_info("", 0).tobuf(tarfile.USTAR_FORMAT)
_TEMPLATE_SUM = sum(_TEMPLATE[:148]) + 8 * ord(" ") + sum(_TEMPLATE[156:]) - sum(b"%011o" % 0)
