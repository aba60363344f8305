"""The users of an export (finetune/export/use_….py), each in a process of its own that need not import what all import.

One process imports open_clip, transformers and peft, nothing of the training, and forks for each script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from finetune.export.check import OFFLINE

SERVER = """
import json, os, runpy, sys, traceback
import open_clip, peft, torch, transformers

def use(told, script, *words):
    os.dup2(os.open(told, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)

for line in sys.stdin:
    child = os.fork() or use(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Users:
    """The process that forks; started when it is first asked."""

    def __init__(self, folder: Path) -> None:
        self._told = folder / "stderr.txt"
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, script: Path, *arguments: Path) -> str | None:
        """As `finetune.export.check` runs a script: None, or the last line that it said when it failed."""
        if self._process is None:
            words = [sys.executable, "-c", SERVER]
            pipe, environment = subprocess.PIPE, {**os.environ, **OFFLINE}
            self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self._process.stdin
        assert self._process.stdout
        print(
            json.dumps([str(each) for each in (self._told, script, *arguments)]), file=self._process.stdin, flush=True
        )
        if int(self._process.stdout.readline()) == 0:
            return None
        return self._told.read_text(encoding="utf-8").strip().splitlines()[-1]

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.communicate()
