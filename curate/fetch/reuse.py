"""What of an old raw shard still holds, so that a changed list or a second try asks for no more than it must.

A row of the plan whose URL was fetched before under the same settings keeps what it got: the facts, and the bytes in
the old tar. Its own columns, caption and all, come from the new plan. Of images that are here already the place says
which is which, not the URL, which several may share; what is kept must be of the bytes that lie there now.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.errors import InputError
from curate.fetch.local import read
from curate.fetch.manners import MAY_PASS
from curate.fetch.rows import RAW_COLUMNS, Picture
from curate.index import MemberReader
from curate.ledger import Reason
from curate.shards import PLACE

if TYPE_CHECKING:
    from curate.fetch.task import ShardTask

Row = dict[str, Any]
HEADER = 512  # bytes of a tar header, which ends where its member's content begins
PASSING = frozenset(
    reason.value
    for reason in (
        Reason.DNS,
        Reason.CONNECT,
        Reason.TIMEOUT,
        Reason.BROKEN_TRANSFER,
        Reason.THROTTLED,
        Reason.ROBOTS_UNREACHABLE,
        Reason.UNREADABLE,
    )
)


def may_pass(reason: str | None, http_status: int | None) -> bool:
    """Whether a row failed for a reason that another day may be over."""
    return reason in PASSING or (reason == Reason.HTTP_STATUS.value and http_status in MAY_PASS)


def is_asked_again(reason: str | None, http_status: int | None, *, retry: bool) -> bool:
    """Whether a row of an old shard is not kept: always where our own process died, and else if wished."""
    return reason == Reason.WORKER_DIED.value or (retry and may_pass(reason, http_status))


def keep(task: ShardTask, rows: list[Row], write: Callable[[Row, Picture], None]) -> list[Row]:
    """Write the rows that an old shard has the result of; give back those that it has not."""
    if task.known is None:
        return rows
    name = ("url",) if task.root is None else PLACE
    old = _results(task.known, name, task.retry)
    if not old:
        return rows
    reader, left = MemberReader([task.known.with_suffix(".tar")]), []
    try:
        for row in rows:
            result = old.get(tuple(row[column] for column in name))
            kept = _picture(result, reader) if result is not None and _holds(result, row, task) else None
            if kept is None:
                left.append(row)
            else:
                write(row, kept)
    finally:
        reader.close()
    return left


def _results(stem: Path, name: tuple[str, ...], retry: bool) -> dict[tuple[Any, ...], Row]:
    """The results of an old shard by what names its images; none if it cannot be read, or was of another kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["key", "url", *RAW_COLUMNS, "image_ext", "image_offset", "image_size"]
    path = stem.with_suffix(".parquet")
    try:
        places = [column for column in PLACE if column in pq.read_schema(path).names]
        if bool(places) != (name == PLACE):
            return {}
        table = pq.read_table(path, columns=[*columns, *places], page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return {}
    return {
        tuple(row[column] for column in name): row
        for row in table.to_pylist()
        if not is_asked_again(row["reason"], row["http_status"], retry=retry)
    }


def _holds(result: Row, row: Row, task: ShardTask) -> bool:
    """Whether a result is still that of its row: of an image that is here, if it is of the bytes at its place now."""
    if task.root is None:
        return True
    if result["sha256"] is None:
        return False
    try:
        content = read(task.root, row, task.config.max_bytes)
    except OSError:
        return False
    return content is not None and sha256(content).hexdigest() == result["sha256"]


def _picture(result: Row, reader: MemberReader) -> Picture | None:
    facts = {name: result[name] for name in RAW_COLUMNS}
    if result["image_offset"] is None:
        return Picture(facts)
    try:  # with the member's header, which names it: the tar may be another than the Parquet was written with
        member = reader.read(0, result["image_offset"] - HEADER, HEADER + result["image_size"])
    except (OSError, InputError):
        return None
    name, content = member[:HEADER].partition(b"\0")[0], member[HEADER:]
    as_it_came = len(content) == result["bytes"]
    if name != f"{result['key']}.{result['image_ext']}".encode() or (
        as_it_came and sha256(content).hexdigest() != result["sha256"]
    ):
        return None
    return Picture(facts, content, result["image_ext"])
