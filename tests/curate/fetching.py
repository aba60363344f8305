"""What the tests of fetch share: small pictures, plan files, and a shard fetched in this process."""

import asyncio
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curate.config import FetchConfig
from curate.fetch import hosts
from curate.fetch.engine import open_worker
from curate.fetch.task import ShardTask
from curate.files import write_parquet
from curate.index import MemberReader, read_index


def photo(number=0, size=(64, 48)):
    """A small picture like no other number's."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def jpeg(number=0, size=(64, 48)):
    return encoded(photo(number, size), quality=90)


def patient(**changes):
    """A configuration for loopback without retries, with deadlines that a machine keeps which is busy with others."""
    settings = {
        "processes": 1,
        "connect_timeout_s": 20.0,
        "read_timeout_s": 20.0,
        "total_timeout_s": 60.0,
        "retries": 0,
        "backoff_s": 0.02,
        "per_host_rate": 0,
        "allow_addresses": ["127.0.0.0/8"],
    }
    return FetchConfig(**{**settings, **changes})


def impatient(**changes):
    """The same with short deadlines, for servers that keep nobody waiting but on purpose."""
    return patient(**{"connect_timeout_s": 2.0, "read_timeout_s": 1.5, "total_timeout_s": 4.0, **changes})


def write_plan(out, urls, shard=0):
    """`out/plan/NNNNN.parquet` with a row for each URL."""
    rows = [
        {
            "key": f"{shard:02d}{number:08d}",
            "row": number,
            "url": url,
            "caption": f"picture {number}",
            "list_id": str(number),
        }
        for number, url in enumerate(urls)
    ]
    path = out / "plan" / f"{shard:05d}.parquet"
    write_parquet(pa.Table.from_pylist(rows), path, made_from="test")
    return path


def read_rows(out, shard=0):
    return pq.read_table(out / "raw" / f"{shard:05d}.parquet").to_pylist()


def read_stats(out, shard=0):
    return json.loads((out / "raw" / f"{shard:05d}_stats.json").read_text())


def images(out):
    """{key: stored bytes} of every shard in `out/raw`, read through the index."""
    index = read_index(out / "raw")
    reader = MemberReader(index.tars)
    rows = index.table.to_pylist()
    found = {row["key"]: reader.read(row["tar"], row["image_offset"], row["image_size"]) for row in rows}
    reader.close()
    return found


def fetch_here(out, urls, config, report=lambda said: None):
    """Fetch one shard in this process; its rows, in the order of the URLs."""
    plan = write_plan(out, urls)
    make_here(out, [ShardTask(plan, out / "raw" / plan.stem, "test", config)], config, report)
    return read_rows(out)


def make_here(out, tasks, config, report=lambda said: None):
    """Make these shards in this process, at once."""
    (out / "raw").mkdir(exist_ok=True)
    hosts.create(out / "state" / "hosts", 1)

    async def make():
        async with open_worker(0, state=out / "state", config=config) as do:
            await asyncio.gather(*(do(task, report) for task in tasks))

    asyncio.run(make())
