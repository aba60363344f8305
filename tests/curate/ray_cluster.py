"""A Ray cluster of two nodes on loopback, in processes of its own.

usage: ray_cluster.py CPUS      prints the address; each line read is a command, answered by a line: `kill` (the second
node and all that runs there, with -9), `add` (another second node). The end of the input is the end of the cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, cast

# Nothing told to anybody, and no more processes than needed; tests/conftest.py keeps all of Ray on 127.0.0.1.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what will be Ray's way; without it, it warns
    # A node that is gone is known as such after two seconds, not ten.
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_worker_niceness": "0",  # 15 else, which gets next to nothing of a machine that other tests keep busy
    "OMP_NUM_THREADS": "1",
}
STORE_BYTES = 80_000_000


class TwoNodes:
    """The cluster as a test sees it, from its first moment on."""

    def __init__(self, environment: dict[str, str], commands: IO[str], answers: IO[str]) -> None:
        self._environment, self._commands, self._answers = environment, commands, answers

    @cached_property
    def environment(self) -> dict[str, str]:
        """Of a driver; waits until the nodes are up."""
        address = self._answers.readline().strip()
        assert address.startswith("127.0.0.1:")
        return {**self._environment, "RAY_ADDRESS": address}

    def kill_node(self) -> None:
        """Kill the second node, and all that runs there."""
        self._tell("kill")

    def add_node(self) -> None:
        """Add a second node again."""
        self._tell("add")

    def _tell(self, command: str) -> None:
        self._commands.write(f"{command}\n")
        self._commands.flush()
        assert self._answers.readline() == f"{command}\n"


@contextmanager
def two_nodes(cpus: int = 1) -> Iterator[TwoNodes]:
    """A cluster for the length of the block."""
    # Paths of Unix sockets are short, those of pytest are not.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    here = str(Path(__file__).parents[2])
    environment = {**os.environ, **ENVIRONMENT, "RAY_TMPDIR": str(folder), "TMPDIR": str(folder), "PYTHONPATH": here}
    process = subprocess.Popen(
        [sys.executable, __file__, str(cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=folder,
        text=True,
    )
    commands, answers = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
    try:
        yield TwoNodes(environment, commands, answers)
    finally:
        commands.close()
        process.wait(60)
        answers.close()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Start two nodes, and do what is read."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    options = {
        "num_cpus": int(sys.argv[1]),
        "object_store_memory": STORE_BYTES,
        "node_ip_address": "127.0.0.1",
        "include_dashboard": False,
    }
    cluster.add_node(**options)
    second = cluster.add_node(**options)
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        if line == "kill\n":
            cluster.remove_node(second, allow_graceful=False)
        else:
            second = cluster.add_node(**options)
        sys.stdout.write(line)
        sys.stdout.flush()
    cluster.shutdown()


if __name__ == "__main__":
    main()
