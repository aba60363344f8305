"""Batches out of a dataset at s3://…, beside the same from a folder, in wall-clock and in CPU time an image.

    python benchmarks/far.py            2,048 JPEGs of about 500 pixels in 16 tars, three rounds
    python benchmarks/far.py --quick    512 of them in 8, one round

The server is moto's, a process of its own on loopback, which answers each request 20 ms late. Photographs, batches and
decoding are those of benchmarks/loader.py; one worker decodes, and an epoch is what is timed, from the start of the
worker to the last batch. Windows are a quarter of the samples.

    folder               CLIPDataModule's loader over a folder
    far                  the same over s3://…, nothing of its tars here
    far, in time         the same, with nothing fetched ahead: each tar when it is first read
    far, 2nd epoch       the next epoch of `far`: all tars are here

`ratio_far`, `ratio_in_time`, `ratio_second`: images a second, to those of `folder`; `cpu_far`: images per CPU-second of
the first epoch, worker and threads included, to those of `folder`. Medians over the rounds. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

import torch

from benchmarks.shared.photographs import write_shards

LATENCY_S = 0.02
FAR = "s3://far/photographs"
BATCH = 64


def serve(folder: Path) -> None:
    """Answer forever, late; the port stands in `folder`/port."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    answer = DomainDispatcherApplication(create_backend_app)

    def late(environ: Any, start: Any) -> Any:
        time.sleep(LATENCY_S)
        return answer(environ, start)

    class Quiet(MotoRequestHandler):
        def log_request(self, *_: Any) -> None:
            """Nothing."""

    server = make_server("127.0.0.1", 0, late, threaded=True, request_handler=Quiet)
    (folder / "port.tmp").write_text(str(server.port))
    (folder / "port.tmp").rename(folder / "port")
    server.serve_forever()


@contextmanager
def served(folder: Path) -> Iterator[None]:
    """The server, and the environment that leads to it."""
    process = subprocess.Popen([sys.executable, __file__, "--serve", str(folder)])
    try:
        while not (folder / "port").exists():
            time.sleep(0.05)
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{(folder / 'port').read_text()}",
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_DEFAULT_REGION": "us-east-1",
            "CLIPTAILOR_CACHE": str(folder / "cache"),
        }
        yield
    finally:
        process.kill()
        process.wait()


def measure(dataset: str, *, ahead: bool) -> dict[str, float]:
    """Seconds an image, in a first epoch and in a second, and CPU seconds of the first."""
    from curate.clip import load_clip
    from finetune.config import DataConfig
    from finetune.data import CLIPDataModule

    torch.set_num_threads(1)
    clip = load_clip("ViT-B-32", device="cpu")
    clip.tokenizer(["a warm-up"])

    class Data(CLIPDataModule):
        def _clip(self) -> Any:
            return clip

    count = int(os.environ["COUNT"])
    data = Data(DataConfig(dataset=Path(dataset), batch_size=BATCH, num_workers=1, window=count // 4))
    data.setup()
    batches = data.train_dataloader()
    if not ahead:
        batches.needs = None
    taken, cpu = [], []
    for _ in range(2):
        start, spent = time.perf_counter(), sum(os.times()[:4])
        assert sum(len(batch["pixels"]) for batch in batches) == count
        taken.append((time.perf_counter() - start) / count)
        cpu.append((sum(os.times()[:4]) - spent) / count)
    return {"first": taken[0], "second": taken[1], "cpu": cpu[0]}


def compare(folder: Path, rounds: int) -> dict[str, float]:
    """Run the arms in turn, so that a neighbour's load meets all."""
    arms = {"folder": (str(folder / "photographs"), 1), "far": (FAR, 1), "far, in time": (FAR, 0)}
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for arm, (dataset, ahead) in arms.items():
            shutil.rmtree(folder / "cache", ignore_errors=True)
            command = [sys.executable, __file__, "--arm", dataset, str(ahead)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            seconds = json.loads(done.stdout.splitlines()[-1])
            # In the second epoch of a folder the captions are known too.
            found.setdefault(arm, []).append(seconds["first"])
            found.setdefault(f"{arm}, 2nd epoch", []).append(seconds["second"])
            found.setdefault(f"{arm}, CPU", []).append(seconds["cpu"])
    print("| | images per second |\n|---|---|")
    for name, each in found.items():
        print(f"| {name} | {1 / median(each):,.0f} |", flush=True)

    def ratio(one: str, other: str) -> float:
        return round(median(b / a for a, b in zip(found[one], found[other], strict=True)), 2)

    return {
        "ratio_far": ratio("far", "folder"),
        "ratio_in_time": ratio("far, in time", "folder"),
        "cpu_far": ratio("far, CPU", "folder, CPU"),
        "ratio_second": ratio("far, 2nd epoch", "folder, 2nd epoch"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 photographs, one round")
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
    if given.arm:
        print(json.dumps(measure(given.arm[0], ahead=given.arm[1] == "1")))
        return
    import fsspec

    count, rounds, shard_size = (512, 1, 64) if given.quick else (2048, 3, 128)
    os.environ |= {"COUNT": str(count), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name, served(Path(name)):
        folder = Path(name)
        write_shards(folder / "photographs" / "shards", count, shard_size)
        system = fsspec.filesystem("s3")
        system.mkdir("far")
        system.put(str(folder / "photographs"), "far/photographs", recursive=True)
        size = sum(path.stat().st_size for path in folder.glob("photographs/shards/*.tar"))
        print(f"{os.cpu_count()} cores, {count:,} photographs in tars of {size / 1e6:,.0f} MB, requests 20 ms late\n")
        print(json.dumps(compare(folder, rounds)))


if __name__ == "__main__":
    main()
