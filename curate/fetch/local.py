"""Images that are here already: rows of a plan that have a place in a file instead of a URL. No request is made.

Photographs as a camera makes them have 20 MB and more: what is held at once is bounded by a budget of bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from curate.fetch.budget import Budget
from curate.fetch.rows import Picture, rejected
from curate.fetch.transfer import Body
from curate.ledger import Reason

Row = dict[str, Any]
AT_ONCE = 8


async def fetch(
    rows: list[Row],
    root: Path,
    max_bytes: int,
    memory: Budget,
    write: Callable[[list[Row], Picture], None],
    use: Callable[[Body, str], Awaitable[Picture]],
) -> None:
    """Read every row's image and write what became of it; `memory` bounds what all shards of a process hold."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(row: Row) -> None:
        async with slots, memory.hold(min(row["source_size"] or max_bytes, max_bytes)):
            try:
                content = await asyncio.to_thread(read, root, row, max_bytes)
            except OSError as error:
                write([row], Picture(rejected(Reason.UNREADABLE, f"{row['source_file']}: {error.strerror or error}")))
                return
            if content is None:
                write([row], Picture(rejected(Reason.TOO_LARGE, f"over {max_bytes} bytes")))
            elif not content:
                write([row], Picture(rejected(Reason.EMPTY_BODY, "")))
            else:
                write([row], await use(Body(content, None), row["key"]))

    await asyncio.gather(*map(one, rows))


def read(root: Path, row: Row, max_bytes: int) -> bytes | None:
    """The bytes at a row's place; None if they are more than `max_bytes`.

    Raises:
        OSError: the file is gone, or shorter than it was.
    """
    path, offset, size = root / row["source_file"], row["source_offset"], row["source_size"]
    if offset is None and size is not None:
        raise OSError("it has no image of this row")
    with path.open("rb") as file:
        if offset is not None:
            file.seek(offset)
        wanted = min(size, max_bytes + 1) if size is not None else max_bytes + 1
        content = file.read(wanted)
    if len(content) > max_bytes:
        return None
    if size is not None and len(content) < size:
        raise OSError(f"ends at {offset + len(content):,}, not at {offset + size:,}")
    return content
