"""What the tests of this folder share: lists written down, stages run, ledgers read, memory watched."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate import fetch, plan
from curate.config import FetchConfig, PlanConfig
from tests.hostile import worker
from tests.hostile.behaviours import SHARED, Case, Ports, cases


def hurried(ports: Ports, **changes: Any) -> FetchConfig:
    """Short deadlines, and the server's ports the only ones allowed."""
    settings: dict[str, Any] = {
        "processes": 2,
        "connections": 64,
        "per_host": 64,
        "per_host_rate": 0,
        "connect_timeout_s": 1.0,
        "read_timeout_s": 1.0,
        "total_timeout_s": 2.5,
        "max_wait_s": 20.0,
        "retries": 2,
        "backoff_s": 0.1,
        "max_retry_after_s": 3.0,
        "outage_s": 60.0,
        "contact": "https://example.org/crawler",
        "allow_addresses": [
            *(f"127.0.0.0/8:{port}" for port in (ports.http, ports.junk, ports.mute, ports.untrusted)),
            *(f"127.0.0.0/8:{port}" for port in (ports.closed, ports.full)),
            f"[::1]/128:{ports.http}",
        ],
    }
    return FetchConfig(**{**settings, **changes})


def urls_of(chosen: list[Case], ports: Ports, number: int) -> list[str]:
    """One URL of each case, those without an address of their own spread over the shared ones."""
    all_cases = cases()
    return [
        case.url_of(number, case.address(all_cases) or SHARED[(number + place) % len(SHARED)], ports)
        for place, case in enumerate(chosen)
    ]


def fetched(out: Path, urls: list[str], config: FetchConfig, monkeypatch: Any, *, shard_size: int = 250) -> list[Any]:
    """Plan and fetch a list in worker processes; what became of each row, in the order of the list."""
    out.mkdir(parents=True, exist_ok=True)
    captions = [f"picture {number} \x1b[2J\0 end" for number in range(len(urls))]
    pq.write_table(pa.table({"url": urls, "caption": captions}), out / "list.parquet")
    plan.run(str(out / "list.parquet"), out, PlanConfig(shard_size=shard_size), [])
    monkeypatch.setattr(
        fetch, "_work", lambda config, state, **_: partial(worker.open_worker, state=state, config=config)
    )
    fetch.run(out, config)
    return ends(out, len(urls))


def ends(out: Path, count: int) -> list[dict[str, Any]]:
    """The row of each line of the list; each stands in exactly one place."""
    found: dict[int, dict[str, Any]] = {}
    dropped = out / "plan" / "dropped.parquet"
    for path in [*(out / "raw").glob("*.parquet"), *([dropped] if dropped.exists() else [])]:
        for row in pq.read_table(path).to_pylist():
            assert row["row"] not in found, f"row {row['row']} stands twice"
            found[row["row"]] = row
    assert sorted(found) == list(range(count))
    return [found[number] for number in range(count)]


class Memory:
    """Peak resident memory of each child process, in MB, while the block runs."""

    def __init__(self) -> None:
        self.peaks: dict[int, float] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Memory:
        self._before = set(children())
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            for child in set(children()) - self._before:
                peak = peak_mb(child)
                if peak is not None:
                    # The kernel keeps the peak; and a first look may still see this process, which the child was.
                    self.peaks[child] = peak


def children(of: int | None = None) -> list[int]:
    """Processes that this one (or another) started."""
    found: list[int] = []
    for listed in Path(f"/proc/{of or os.getpid()}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(pid) for pid in listed.read_text().split()]
    return found


def peak_mb(pid: int) -> float | None:
    """VmHWM of a process; None if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
    return int(line.split()[1]) / 1024 if line else None
