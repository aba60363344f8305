"""Commands of `finetune`, each in a process of its own, without importing what all of them import a hundred times over.

One process imports the command line and forks for each command, or for each rank of it, as torchrun would start them.
What a command imports beyond that, its status, its stderr and its CPU time are its own; it can be killed as any other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SERVER = """
import importlib, json, os, sys
from finetune.cli import main
from tests.finetune.ranks import run_ranks

for name in sys.argv[1:]:
    importlib.import_module(name)

def command(folder, words):
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open("stderr.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        import traceback
        traceback.print_exc()
        status = 70
    sys.stderr.flush()
    os._exit(status or 0)

def start(ranks, folder, words):
    os.setsid()
    open(os.path.join(folder, "stderr.txt"), "w").close()
    command(folder, words) if ranks == 1 else os._exit(run_ranks(ranks, lambda: command(folder, words)))

for line in sys.stdin:
    child = os.fork() or start(*json.loads(line))
    print(child, flush=True)
    _, status, usage = os.wait4(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]), flush=True)
"""


class Answer(NamedTuple):
    """What became of a command."""

    status: int
    error: str
    seconds: float  # of CPU time, without the imports that all commands share


class Warm:
    """The process that forks; it runs one command at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, folder: Path, words: Sequence[str], ranks: int = 1) -> Answer:
        """Run `finetune WORDS` in a folder to its end."""
        return self.start(folder, words, ranks).answer()

    def start(self, folder: Path, words: Sequence[str], ranks: int = 1) -> Running:
        """Start `finetune WORDS` in a folder."""
        assert self._process.stdin is not None
        print(json.dumps([ranks, str(folder), list(words)]), file=self._process.stdin, flush=True)
        return Running(folder, int(self._line()), self)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


class Running(NamedTuple):
    """A command at work."""

    folder: Path
    pid: int
    warm: Warm

    def kill(self) -> None:
        """Kill all its processes, and see that it did not end before."""
        os.killpg(self.pid, signal.SIGKILL)
        assert self.answer().status == -signal.SIGKILL

    def answer(self) -> Answer:
        """Wait until it has ended."""
        status, seconds = json.loads(self.warm._line())
        return Answer(status, (self.folder / "stderr.txt").read_text(encoding="utf-8"), seconds)


@contextmanager
def warm(*modules: str) -> Iterator[Warm]:
    """Start it, with these modules imported beside the command line, and end it."""
    words = [sys.executable, "-c", SERVER, *modules]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield Warm(process)
        assert process.stdin
        process.stdin.close()
