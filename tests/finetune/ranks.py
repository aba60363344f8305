"""The ranks of a run, forked as torchrun would start them; no imports, so that a process that forks may use it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable


def run_ranks(ranks: int, run: Callable[[], int]) -> int:
    """`run()` in a process for each rank: 0, or the first status that is not; the others, which would wait, are killed.

    An error in `run` is status 1.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = {_forked(rank, ranks, port, run) for rank in range(ranks)}
    status = 0
    while running and not status:
        child, ended = os.wait()
        running.remove(child)
        status = abs(os.waitstatus_to_exitcode(ended))
    for child in running:
        os.kill(child, signal.SIGKILL)
    return status


def _forked(rank: int, ranks: int, port: int, run: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in (place | where).items()})
        status = 1
        try:
            status = run()
        finally:
            os._exit(status)
    return child
