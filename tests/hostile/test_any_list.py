"""Whatever the list, and whatever the servers do: each row of the list is in the ledger once."""

import asyncio
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate import measure, plan, select
from curate.config import MeasureConfig, PackConfig, PlanConfig, SelectConfig
from curate.fetch import hosts
from curate.fetch.engine import open_worker
from curate.fetch.task import ShardTask
from curate.ledger import Reason
from tests.hostile.behaviours import SHARED, addresses, cases
from tests.hostile.running import hurried
from tests.hostile.server import hostile_server

# Quick ones, that need no name and no address of their own: every kind of end is among them.
QUICK = [
    *("ok", "missing", "gone", "forbidden", "html", "svg", "nothing", "pixel", "cut-png", "corrupt-png", "png-bomb"),
    *("reset", "hangs-up", "says-huge", "says-more", "gzip-cut", "brotli", "tag-noai", "tdm-zero", "to-private"),
    *("to-file", "to-itself", "via-elsewhere", "kind-avif", "kind-gif", "scans", "flaky", "broken-server"),
]


@pytest.fixture(scope="module")
def server():
    with hostile_server(addresses(cases())) as running:
        yield running


def urls(port):
    """URLs of the server, and things that are none."""
    paths = st.tuples(st.sampled_from(SHARED), st.sampled_from(QUICK), st.integers(0, 5))
    good = paths.map(lambda part: f"http://{part[0]}:{port}/{part[1]}/{part[2]}.jpg")
    odd = st.sampled_from(
        ["", " ", "ftp://a/b", "http://", "//x/y", "http://[::1", "http://127.0.0.1:1/", "data:,", "\0"]
    )
    return st.one_of(good, good, good, odd, st.text(max_size=6), st.none())


def ledger_of(out, table, config):
    """Plan, fetch in this process, and select; the ledger's rows."""
    pq.write_table(table, out / "list.parquet")
    found = plan.run(str(out / "list.parquet"), out, PlanConfig(shard_size=7), [])
    (out / "raw").mkdir()
    hosts.create(out / ".fetch" / "hosts", 1)

    async def make():
        plans = sorted(path for path in (out / "plan").glob("*.parquet") if path.stem.isdigit())
        async with open_worker(0, state=out / ".fetch", config=config) as do:
            await asyncio.gather(
                *(do(ShardTask(p, out / "raw" / p.stem, "test", config), lambda _: None) for p in plans)
            )

    if found.candidates:
        asyncio.run(make())
    measure.run(out, MeasureConfig())
    select.run(out, [], SelectConfig(memory_limit="300MB", threads=1), PackConfig(), MeasureConfig(text=False), 0)
    return pq.read_table(out / "ledger.parquet").to_pylist()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_each_row_of_any_list_is_in_the_ledger_once(server, data):
    given_urls = data.draw(st.lists(urls(server.ports.http), min_size=1, max_size=25))
    captions = data.draw(st.lists(st.text(max_size=5), min_size=len(given_urls), max_size=len(given_urls)))
    table = pa.table({"url": pa.array(given_urls, pa.string()), "caption": pa.array(captions, pa.string())})
    config = hurried(server.ports, processes=1, retries=1, backoff_s=0.01)
    with tempfile.TemporaryDirectory() as folder:
        ledger = ledger_of(Path(folder), table, config)
    assert sorted(row["row"] for row in ledger) == list(range(len(given_urls)))
    assert len({row["key"] for row in ledger}) == len(ledger)
    reasons = {reason.value for reason in Reason}
    for row in ledger:
        assert row["kept"] == (row["reason"] is None)
        assert row["reason"] is None or row["reason"] in reasons
