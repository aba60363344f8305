"""Bodies → pictures, in threads: the codecs release the GIL. Bounded in memory, and proof against a codec that crashes.

A small JPEG is decoded on the event loop itself: two milliseconds on average, where a thread would take three, because
each call into a codec gives the interpreter's lock away and waits to get it back. A process is one core's worth of
work then; there is one for each core.

What is being decoded is noted beside the shard, in a file of one slot a thread. A codec that crashes takes the whole
worker along; on the shard's second try the images that stood there are decoded in a process of their own, one each, so
that the crash costs the one row and the innocent ones come through.
"""

from __future__ import annotations

import asyncio
import mmap
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import local

from curate.config import FetchConfig
from curate.fetch.budget import Budget
from curate.fetch.rows import Picture, picture, rejected
from curate.fetch.transfer import Body
from curate.images import decode_cost, is_small_jpeg
from curate.ledger import Reason

# Two keep a core busy while the loop writes; more processes, not more threads, use more cores.
THREADS = 2
# Of decoded pixels. What needs more is decoded alone.
DECODED_BYTES = 96 << 20
SLOT_BYTES = 64
# What is larger goes to a thread.
AT_ONCE_BYTES = 1 << 20
ALONE_S = 60.0


@dataclass(frozen=True, slots=True)
class Journal:
    """The file that says what is in a decoder.

    Attributes:
        slots: the file in memory, which outlives the process.
        suspects: keys that stood in it when the shard's last try died.
    """

    slots: mmap.mmap
    suspects: frozenset[str]


class Decoder:
    """The decoding threads of a worker; a context manager."""

    def __init__(self, config: FetchConfig) -> None:
        self.config = config
        self._memory = Budget(DECODED_BYTES)
        self._thread = local()
        self._free_slots = list(range(THREADS + 1))

    def __enter__(self) -> Decoder:
        self._take_slot()  # the event loop's
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="decode", initializer=self._take_slot)
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    @contextmanager
    def journal(self, stem: Path) -> Iterator[Journal]:
        """The journal of a shard; gone when the shard has ended in any way but by a death."""
        path = journal_of(stem)
        suspects = frozenset(path.read_text().split()) if path.exists() else frozenset()
        path.write_bytes(b" " * SLOT_BYTES * (THREADS + 1))
        with path.open("rb+") as file, mmap.mmap(file.fileno(), 0) as slots:
            try:
                yield Journal(slots, suspects)
            finally:
                path.unlink(missing_ok=True)

    async def picture(self, body: Body, key: str, journal: Journal) -> Picture:
        """What becomes of a body; `key` is of the row that it was fetched for."""
        if key in journal.suspects:
            return await _alone(body, self.config)
        if self._takes_no_time(body.content):
            return self._decode(body, key, journal.slots)
        async with self._memory.hold(decode_cost(body.content)):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._decode, body, key, journal.slots)

    def _takes_no_time(self, content: bytes) -> bool:
        if len(content) > AT_ONCE_BYTES:
            return False
        return not self.config.decode or is_small_jpeg(content)

    def _take_slot(self) -> None:
        self._thread.slot = self._free_slots.pop()

    def _decode(self, body: Body, key: str, slots: mmap.mmap) -> Picture:
        place = slice(self._thread.slot * SLOT_BYTES, (self._thread.slot + 1) * SLOT_BYTES)
        slots[place] = key.encode().ljust(SLOT_BYTES)
        try:
            return picture(body.content, body.http_status, self.config)
        finally:
            slots[place] = b" " * SLOT_BYTES


def journal_of(stem: Path) -> Path:
    """Where the journal of a raw shard lies while it is made."""
    return stem.with_name(f".{stem.name}.decoding")


async def _alone(body: Body, config: FetchConfig) -> Picture:
    """Decode in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "curate.fetch.decoding"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(pickle.dumps((body, config))), ALONE_S)
    except asyncio.TimeoutError:
        process.kill()
        await process.wait()
        out = b""
    if process.returncode != 0:
        return Picture(rejected(Reason.WORKER_DIED, "in the decoder", body.http_status))
    result: Picture = pickle.loads(out)  # noqa: S301 - from our own process
    return result


def _main() -> None:
    body, config = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our own process
    sys.stdout.buffer.write(pickle.dumps(picture(body.content, body.http_status, config)))


if __name__ == "__main__":
    _main()
