"""`curate fetch` against img2dataset on the same list from one server on loopback: CPU time, wall time and memory.

    python benchmarks/fetch.py [--quick] [--images N] [--runs N] [--processes N] [--connections N]

The bodies are photographs: crops, scales and mirrors of the two that scikit-learn ships, 320 to 2,048 pixels wide.
Both tools, in turn, with the same processes and connections,

    resize   256 pixels on the shorter side, JPEG, the same quality; beside it what the codecs alone take
    raw      the bytes as they come, and what is known of them: sha256, width and height. img2dataset must decode to
             know a size; *unchecked*, it stores what comes, be it an image or not
    latency  as resize, from a server that takes 20 and 200 ms to answer

CPU time is that of the tool's process tree: the server is a process of its own, and so fast that it limits neither.
Start-up is what the same command takes for a list of 16 URLs; *net* is without it. Each figure is the median over the
runs, and a ratio is one of medians. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from benchmarks.shared.cost import Cost, spend
from benchmarks.shared.photographs import photograph
from curate.images import Resize, decode, resized

RGB = npt.NDArray[np.uint8]
SIDE, QUALITY = 256, 95
# Pictures that are closer than this are taken for the same.
SAME_DB = 35.0
STARTUP_ROWS = 16
LATENCIES_MS = (20, 200)
BODIES = 240
# Width, height and share of what the web shows; quality 70 to 90 makes them 73 kB on average.
SIZES = {
    (320, 240): 0.1,
    (500, 375): 0.25,
    (640, 480): 0.25,
    (800, 600): 0.15,
    (1024, 768): 0.15,
    (1280, 960): 0.06,
    (2048, 1536): 0.04,
}
HOST = "127.0.0.1"

IMG2DATASET = """
import json, sys, img2dataset
if __name__ == '__main__':
    urls, out, mode, processes, connections, rows = sys.argv[1:]
    how = {
        'resize': dict(image_size=%(side)d, resize_mode='keep_ratio', resize_only_if_bigger=True, skip_reencode=True,
            encode_quality=%(quality)d),
        'raw': dict(resize_mode='no', skip_reencode=True),
        'unchecked': dict(resize_mode='no', disable_all_reencoding=True),
    }[mode]
    img2dataset.download(url_list=urls, output_folder=out, input_format='parquet', url_col='url', caption_col='caption',
        output_format='webdataset', processes_count=int(processes), thread_count=int(connections),
        number_sample_per_shard=-(-int(rows) // int(processes)), **how)
"""
CURATE = """
import sys
from pathlib import Path
if __name__ == '__main__':  # as in the command `curate`, a worker imports what it needs alone
    from curate import fetch, plan
    from curate.config import FetchConfig, PlanConfig
    urls, out, mode, processes, connections, rows = sys.argv[1:]
    how = {
        'resize': dict(image_size=%(side)d, resize_mode='keep_ratio', encode_quality=%(quality)d),
        'raw': dict(resize_mode='no', decode=False),
    }[mode]
    plan.run(urls, Path(out), PlanConfig(shard_size=-(-int(rows) // int(processes))), [])
    fetch.run(Path(out), FetchConfig(processes=int(processes), connections=int(connections),
        per_host=int(processes) * int(connections), per_host_rate=0, allow_addresses=['127.0.0.0/8'], **how))
"""
# A client that only asks and hashes, to see what there is to gain.
BARE = """
import asyncio, hashlib, sys, aiohttp, pyarrow.parquet as pq
async def main():
    urls = iter(pq.read_table(sys.argv[1])['url'].to_pylist())
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async def one():
            for url in urls:
                async with session.get(url) as response:
                    hashlib.sha256(await response.read())
        await asyncio.gather(*(one() for _ in range(int(sys.argv[5]))))
asyncio.run(main())
"""
TOOLS = {"img2dataset": (IMG2DATASET, ""), "curate": (CURATE, "raw"), "bare": (BARE, None)}


# --- what is served --------------------------------------------------------------------------------------------------


def photographs(count: int) -> Iterator[bytes]:
    """JPEGs of cuts from the two photographs, of the sizes in their shares."""
    random = np.random.default_rng(0)
    sizes, shares = list(SIZES), np.array(list(SIZES.values()))
    # As many of each size as its share says, whatever the draw.
    places = np.searchsorted(np.cumsum(shares) / shares.sum(), (np.arange(count) + 0.5) / count)
    for place in random.permutation(places):
        yield photograph(random, sizes[place], quality=(70, 91))


class Answering(asyncio.Protocol):
    """Answers each request with its body, after the latency; as few steps as possible."""

    def __init__(self, pages: dict[bytes, bytes], latency_s: float) -> None:
        self.pages, self.latency_s, self.unread = pages, latency_s, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio calls it."""
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """As asyncio calls it."""
        *requests, self.unread = (self.unread + data).split(b"\r\n\r\n")
        for request in requests:
            close = b"connection: close" in request.lower()
            if self.latency_s:
                asyncio.get_running_loop().call_later(self.latency_s, self.answer, request, close)
            else:
                self.answer(request, close)

    def answer(self, request: bytes, close: bool) -> None:
        """Answer one request."""
        path = request.split(b" ", 2)[1]
        body = self.pages.get(path.rpartition(b"-")[2])
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg" if body else b"HTTP/1.1 404 Not Found"
        self.transport.write(head + b"\r\nContent-Length: %d\r\n\r\n" % len(body or b""))
        if body:
            self.transport.write(body)
        if close:
            self.transport.close()


async def serve(pages: dict[bytes, bytes], latency_s: float) -> None:
    """Serve /ANYTHING-NAME as the page NAME, until stopped; print the port."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Answering(pages, latency_s), HOST, 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


@contextmanager
def server(folder: Path, latency_ms: int) -> Iterator[int]:
    """The port of a server in a process of its own."""
    command = [sys.executable, __file__, "--serve", str(folder), "--latency-ms", str(latency_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def write_list(path: Path, port: int, rows: int, bodies: int) -> Path:
    """A list of `rows` URLs, each of its own, in turn over the bodies."""
    urls = [f"http://{HOST}:{port}/{number}-{number % bodies}.jpg" for number in range(rows)]
    pq.write_table(pa.table({"url": urls, "caption": [f"picture {number}" for number in range(rows)]}), path)
    return path


# --- what is measured ------------------------------------------------------------------------------------------------


def arrived(folder: Path) -> int:
    """Images in the shards of a folder."""
    tables = [pq.read_table(path, columns=["status"]) for path in folder.glob("*.parquet")]
    return sum(table["status"].to_pylist().count("success") for table in tables)


# --- the codecs alone ------------------------------------------------------------------------------------------------


def target_of(height: int, width: int) -> tuple[int, int]:
    """Width and height of the picture that is stored: none is scaled up."""
    scale = min(1.0, SIDE / min(height, width))
    return round(width * scale), round(height * scale)


def by_area(rgb: RGB, size: tuple[int, int]) -> RGB:
    """OpenCV's area filter, where there is something to do."""
    return (
        rgb if rgb.shape[1::-1] == size else np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
    )


def by_opencv(body: bytes) -> RGB:
    """OpenCV, as img2dataset does it."""
    rgb = np.asarray(cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR_RGB), np.uint8)
    return by_area(rgb, target_of(*rgb.shape[:2]))


def by_scaled_decode(body: bytes, margin: float) -> RGB:
    """libjpeg-turbo at the smallest of its scales with `margin` times the pixels wanted on a side, then by area."""
    height, width, *_ = simplejpeg.decode_jpeg_header(body)
    wide, high = target_of(height, width)
    least = {"min_width": int(np.ceil(margin * wide)), "min_height": int(np.ceil(margin * high)), "min_factor": 1}
    return by_area(simplejpeg.decode_jpeg(body, "RGB", **least), (wide, high))


def by_ours(body: bytes) -> RGB:
    """What a fetch calls: see `curate.images.decode` and `resized`."""
    resize = Resize("keep_ratio", SIDE)
    decoded = decode(body, max_pixels=1 << 30, resize=resize)
    return resized(decoded.rgb, resize, decoded.width, decoded.height)


OUR_WAY = "ours"  # the others are a library's, one call each for decoding and resizing
WAYS: dict[str, Callable[[bytes], RGB]] = {
    "opencv": by_opencv,
    "turbo 1x": partial(by_scaled_decode, margin=1.0),
    "turbo 1.5x": partial(by_scaled_decode, margin=1.5),
    "turbo 2x": partial(by_scaled_decode, margin=2.0),
    OUR_WAY: by_ours,
}


def codec_rates(bodies: list[bytes], runs: int) -> dict[str, tuple[float, float]]:
    """Way to decode, resize and encode: images per CPU-second on one core, and how close its pictures are.

    A picture that is small already is decoded and no more, as by both tools: its bytes stay. Closeness is the PSNR in
    dB of the resized picture to img2dataset's, of the one that is worse than 19 of 20.
    """
    cv2.setNumThreads(0)
    wanted, took_s = [by_opencv(body) for body in bodies], {name: list[float]() for name in WAYS}
    is_large = [min(simplejpeg.decode_jpeg_header(body)[:2]) > SIDE for body in bodies]
    for _ in range(runs):
        for name, way in WAYS.items():
            started = time.process_time()
            for body, large in zip(bodies, is_large, strict=True):
                rgb = way(body)
                if large:
                    simplejpeg.encode_jpeg(rgb, quality=QUALITY, colorspace="RGB", colorsubsampling="420")
            took_s[name].append(time.process_time() - started)
    closeness = {
        name: float(np.percentile([cv2.PSNR(way(body), one) for body, one in zip(bodies, wanted, strict=True)], 5))
        for name, way in WAYS.items()
    }
    return {name: (len(bodies) / statistics.median(took_s[name]), closeness[name]) for name in WAYS}


def codec_limit(rates: dict[str, tuple[float, float]], *, ours: bool = True) -> float:
    """Images per CPU-second of the fastest way whose pictures are those that are wanted, with or without our own."""
    return max(rate for name, (rate, psnr) in rates.items() if psnr >= SAME_DB and (ours or name != OUR_WAY))


# --- the comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How large the comparison is."""

    images: int
    runs: int
    processes: int
    connections: int
    bodies: int = BODIES


def measure(folder: Path, setting: Setting) -> dict[str, Cost]:
    """What each tool takes for each part: `curate resize`, `curate resize start-up`, `curate resize 20 ms`."""
    parts = [(tool, mode, 0) for mode in ("resize", "raw") for tool in ("img2dataset", "curate")]
    parts += [("img2dataset", "unchecked", 0), ("bare", "raw", 0)]
    parts += [(tool, "resize", ms) for ms in LATENCIES_MS for tool in ("img2dataset", "curate")]
    costs: dict[str, list[Cost]] = {}
    for _ in range(setting.runs):
        for tool, mode, latency_ms in parts:
            name = f"{tool} {mode}" + (f" {latency_ms} ms" if latency_ms else "")
            with server(folder, latency_ms) as port:
                if not latency_ms:
                    cost = run(tool, mode, port, STARTUP_ROWS, setting)
                    costs.setdefault(f"{name} start-up", []).append(cost)
                costs.setdefault(name, []).append(run(tool, mode, port, setting.images, setting))
    return {name: Cost.median(several) for name, several in costs.items()}


def run(tool: str, mode: str, port: int, rows: int, setting: Setting) -> Cost:
    """One run of a tool over a list of so many rows; each of them must arrive."""
    program, sub = TOOLS[tool]
    with tempfile.TemporaryDirectory() as temporary:
        out, script = Path(temporary) / "out", Path(temporary) / "script.py"
        script.write_text(program % {"side": SIDE, "quality": QUALITY} if sub is not None else program)
        listed = write_list(Path(temporary) / "list.parquet", port, rows, setting.bodies)
        how = [mode, str(setting.processes), str(setting.connections), str(rows)]
        cost = spend([sys.executable, str(script), str(listed), str(out), *how])
        if sub is not None and (count := arrived(out / sub)) != rows:
            raise SystemExit(f"{tool} {mode}: {count} of {rows} arrived")
    return cost


def figures(costs: dict[str, Cost], setting: Setting) -> dict[str, float]:
    """The figures of the last line that come from the runs."""
    net = {
        name: rate(cost, costs[f"{name} start-up"], setting.images)
        for name, cost in costs.items()
        if f"{name} start-up" in costs
    }
    ours = [cost for name, cost in costs.items() if name.startswith("curate")]
    theirs = [cost for name, cost in costs.items() if name.startswith("img2dataset")]
    found = {
        "net_ratio_resize": net["curate resize"] / net["img2dataset resize"],
        "total_ratio_resize": costs["img2dataset resize"].cpu_s / costs["curate resize"].cpu_s,
        "ratio_raw": net["curate raw"] / net["img2dataset raw"],
        "total_ratio_raw": costs["img2dataset raw"].cpu_s / costs["curate raw"].cpu_s,
        "ratio_raw_unchecked": net["curate raw"] / net["img2dataset unchecked"],
        "peak_mb_worker": max(cost.worker_mb for cost in ours),
        "peak_mb_tree": max(cost.tree_mb for cost in ours),
        "img2dataset_peak_mb_tree": max(cost.tree_mb for cost in theirs),
    }
    found |= {f"{name.replace(' ', '_')}_per_cpu_s": value for name, value in net.items()}
    for ms in LATENCIES_MS:
        for tool in ("curate", "img2dataset"):
            found[f"{tool}_per_s_{ms}ms"] = setting.images / costs[f"{tool} resize {ms} ms"].wall_s
    return found


def rate(cost: Cost, start_up: Cost, images: int) -> float:
    """Images per CPU-second, net of start-up."""
    return (images - STARTUP_ROWS) / max(cost.cpu_s - start_up.cpu_s, 1e-9)


def show(costs: dict[str, Cost], setting: Setting) -> None:
    """Print a line for each part."""
    print("| | CPU s | of that start-up | images per CPU-second, net | wall s | MB, tree | MB, worker |")
    print("|---|---|---|---|---|---|---|")
    for name, cost in costs.items():
        if name.endswith("start-up"):
            continue
        start_up = costs.get(f"{name} start-up") or costs[name.rsplit(" ", 2)[0] + " start-up"]
        cells = f"{cost.cpu_s:.1f} | {start_up.cpu_s:.1f} | {rate(cost, start_up, setting.images):,.0f}"
        print(f"| {name} | {cells} | {cost.wall_s:.1f} | {cost.tree_mb:,.0f} | {cost.worker_mb:,.0f} |")


def show_codecs(rates: dict[str, tuple[float, float]]) -> None:
    """Print a line for each way."""
    print("\n| codecs alone | images per CPU-second | PSNR, 5th percentile |\n|---|---|---|")
    for name, (speed, psnr) in rates.items():
        print(f"| {name} | {speed:,.0f} | {f'{psnr:.1f} dB' if psnr < 100 else 'same'} |")


def compare(setting: Setting) -> dict[str, float]:
    """Run everything, print the tables, and give back the figures of the last line."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, bodies = Path(temporary), list(photographs(setting.bodies))
        mean_kb = sum(map(len, bodies)) / len(bodies) / 1000
        for number, body in enumerate(bodies):
            (folder / f"{number}.jpg").write_bytes(body)
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
        print(f"img2dataset {version('img2dataset')} · {setting.images:,} JPEGs, {mean_kb:.0f} kB on average")
        print(f"{setting.processes} process · {setting.connections} connections · median of {setting.runs}\n")
        costs = measure(folder, setting)
        show(costs, setting)
        rates = codec_rates(bodies, setting.runs)
        show_codecs(rates)
    found = {**asdict(setting), "mean_kb": mean_kb, **figures(costs, setting)}
    found["codec_per_cpu_s"] = codec_limit(rates)
    found["codec_share"] = found["curate_resize_per_cpu_s"] / found["codec_per_cpu_s"]
    found["codec_share_library"] = found["curate_resize_per_cpu_s"] / codec_limit(rates, ours=False)
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 images and one run; else 4,000 and three")
    parser.add_argument("--images", type=int)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--latency-ms", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        pages = {path.name.encode(): path.read_bytes() for path in asked.serve.glob("*.jpg")}
        asyncio.run(serve(pages, asked.latency_ms / 1000))
    images, runs = (1_000, 1) if asked.quick else (4_000, 3)
    setting = Setting(asked.images or images, asked.runs or runs, asked.processes, asked.connections)
    print(f"\n{json.dumps(compare(setting))}")


if __name__ == "__main__":
    main()
