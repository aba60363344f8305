"""`curate fetch` against img2dataset on the same list from one server on loopback: images per CPU-second of the client.

    python benchmarks/bench_fetch.py [--quick]

Both resize to 256 pixels on the shorter side and write tar shards with Parquet. Start-up counts for
both. CPU time, not wall: the machine may be busy. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HOST = "127.0.0.1"
SERVER = """
import sys
from aiohttp import web
bodies = [open(p, 'rb').read() for p in sys.argv[1:]]
async def answer(request):
    return web.Response(body=bodies[int(request.match_info['n']) % len(bodies)], content_type='image/jpeg')
async def main():
    app = web.Application(); app.router.add_get('/{n}.jpg', answer)
    runner = web.AppRunner(app, access_log=None); await runner.setup()
    site = web.TCPSite(runner, '127.0.0.1', 0); await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    import asyncio; await asyncio.Event().wait()
import asyncio; asyncio.run(main())
"""
IMG2DATASET = """
import sys, img2dataset
img2dataset.download(url_list=sys.argv[1], output_folder=sys.argv[2], input_format='parquet', url_col='url',
    caption_col='caption', output_format='webdataset', image_size=256, resize_mode='keep_ratio', processes_count=1,
    thread_count=64, number_sample_per_shard=10000, enable_wandb=False, disallowed_header_directives=[])
"""
CURATE = """
import sys
from pathlib import Path
from curate import fetch, plan
from curate.config import FetchConfig, PlanConfig
plan.run(sys.argv[1], Path(sys.argv[2]), PlanConfig(), [])
fetch.run(Path(sys.argv[2]), FetchConfig(processes=1, per_host=64, max_side=256, allow_addresses=['127.0.0.0/8']))
"""


def photographs(folder: Path, count: int) -> list[Path]:
    """Noisy 640 × 480 JPEGs of about 50 kB."""
    random = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        noisy = np.clip(np.asarray(coarse).astype(int) + random.normal(0, 4, (480, 640, 3)), 0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=80)
    return paths


def cpu_s(program: str, *arguments: str) -> float:
    """CPU seconds of a program and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def arrived(folder: Path) -> int:
    """Images in the shards."""
    tables = [pq.read_table(path, columns=["status"]) for path in folder.glob("*.parquet")]
    return sum(table["status"].to_pylist().count("success") for table in tables)


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 000 images, one run each; else 10 000, three runs")
    quick = parser.parse_args().quick
    count, runs = (2_000, 1) if quick else (10_000, 3)
    rates: dict[str, list[float]] = {"img2dataset": [], "curate": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bodies = photographs(folder, 50)
        server = subprocess.Popen([sys.executable, "-c", SERVER, *map(str, bodies)], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout
            port = int(server.stdout.readline())
            urls = [f"http://{HOST}:{port}/{number}.jpg" for number in range(count)]
            listed = folder / "list.parquet"
            pq.write_table(pa.table({"url": urls, "caption": [f"picture {n}" for n in range(count)]}), listed)
            for run in range(runs):
                for name, program, sub in (("img2dataset", IMG2DATASET, ""), ("curate", CURATE, "raw")):
                    out = folder / f"{name}{run}"
                    seconds = cpu_s(program, str(listed), str(out))
                    assert arrived(out / sub) == count, f"{name}: {arrived(out / sub)} of {count} arrived"
                    rates[name].append(count / seconds)
        finally:
            server.terminate()
            server.wait()
    median = {name: float(np.median(values)) for name, values in rates.items()}
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{count:,} JPEGs of 640 × 480 to 256 pixels, median of {runs}\n\n| | images per CPU-second |\n|---|---|")
    print(f"| img2dataset {version('img2dataset')} | {median['img2dataset']:.0f} |")
    print(f"| curate fetch | {median['curate']:.0f} |\n")
    figures = {f"{name}_images_per_cpu_s": round(value, 1) for name, value in median.items()}
    ratio = round(median["curate"] / median["img2dataset"], 2)
    print(json.dumps({"images": count, "runs": runs, **figures, "ratio": ratio}))


if __name__ == "__main__":
    main()
