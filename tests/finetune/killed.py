"""Train, and be killed at random moments; a program of its own, of which the runs are copies that need no imports.

python tests/finetune/killed.py UNBROKEN.pickle BROKEN.pickle KILLS SEED

It trains the one configuration to its end, and the other with so many kills on the way.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import sys
import time
from pathlib import Path

import torch

from finetune.config import FitConfig
from finetune.fit import fit, plan
from tests.finetune.fitted import wait_until_free
from tests.finetune.ranks import run_ranks

PATIENCE_S = 200


def started(file: Path) -> int:
    """Train in copies of this process, one a rank, as torchrun would start them; the number of their group."""
    child = os.fork()
    if child == 0:
        os.setsid()
        status = 1
        try:
            config = pickle.loads(file.read_bytes())
            ranks = config.trainer.devices
            status = train(config) if ranks == 1 else run_ranks(ranks, lambda: train(config))
        finally:
            os._exit(status)
    return child


def train(config: FitConfig) -> int:
    torch.set_num_threads(1)  # makes the pool of threads anew, before two of them do
    fit(config)
    return 0


def ends_within(child: int, seconds: float) -> bool:
    """Whether a process ends, well, in this time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, status
            return True
        time.sleep(0.005)
    return False


def kill_and_go_on(file: Path, kills: int, seed: int) -> None:
    """Train to the end; each start is killed at a random moment after its first checkpoint."""
    config: FitConfig = pickle.loads(file.read_bytes())
    moments, last = random.Random(seed), config.out / "checkpoints" / "last.ckpt"
    for _ in range(kills):
        before = last.stat().st_mtime_ns if last.exists() else 0
        child, until = started(file), time.monotonic() + PATIENCE_S
        while not last.exists() or last.stat().st_mtime_ns == before:
            assert time.monotonic() < until, "no checkpoint"
            assert not ends_within(child, 0.01), "ended too soon to be killed"
        assert not ends_within(child, moments.uniform(0, 0.1)), "ended too soon to be killed"
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        wait_until_free(config.out)
    assert ends_within(started(file), PATIENCE_S)


def main() -> None:
    torch.set_num_threads(1)
    files = [Path(name) for name in sys.argv[1:3]]
    plan(pickle.loads(files[0].read_bytes()))  # imports all but what takes gradients, which no copy could then do
    assert ends_within(started(files[0]), PATIENCE_S)
    kill_and_go_on(files[1], int(sys.argv[3]), int(sys.argv[4]))


if __name__ == "__main__":
    main()
