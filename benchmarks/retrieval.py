"""Exact retrieval of 100,000 captions by 100,000 images, beside a plain chunked matmul and sort: CPU time and memory.

    python benchmarks/retrieval.py             100,000 × 100,000, embeddings of 512; some minutes
    python benchmarks/retrieval.py --quick     20,000 × 20,000

The same work in a process each, one thread: the rank of each query's true match among all candidates. The plain way
takes 1,000 queries at a time: matmul, argsort (descending), the place at which the true candidate stands. Ours gives
each query's average precision too, and counts ties against the model; on these embeddings, which have none, both give
the same ranks but for rounding, which is checked. Both get the embeddings from a file; reading it is in neither figure
of time, and the embeddings themselves (2 × 205 MB) are in both figures of memory. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
BEGIN = """
import json, re, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
image, text = torch.load(sys.argv[1], weights_only=True, mmap=False)
began = time.process_time()
"""
OURS = """
from finetune.metrics import retrieve
pairs = torch.arange(len(image))[:, None].expand(-1, 2)
ranks, _ = retrieve(image, text, pairs)
"""
PLAIN = """
ranks = []
for first in range(0, len(image), 1000):
    order = (image[first : first + 1000] @ text.T).argsort(dim=1, descending=True)
    true = torch.arange(first, first + len(order))[:, None]
    ranks.append((order == true).nonzero()[:, 1] + 1)
ranks = torch.cat(ranks)
"""
TELL = """
seconds = time.process_time() - began
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
print(json.dumps({"seconds": seconds, "peak": peak, "ranks": ranks.tolist()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 × 20,000")
    size = 20_000 if parser.parse_args().quick else 100_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeddings.pt"
        random = torch.Generator().manual_seed(0)
        image = torch.nn.functional.normalize(torch.randn(size, 512, generator=random), dim=1)
        noise = torch.randn(size, 512, generator=random)
        text = torch.nn.functional.normalize(image + 0.25 * noise, dim=1)  # a third of the captions are found first
        torch.save((image, text), path)
        ours, plain = (run(BEGIN + code + TELL, path) for code in (OURS, PLAIN))
    ranks = torch.tensor([ours["ranks"], plain["ranks"]])
    differ = int((ranks[0] != ranks[1]).sum())
    # A product of other shape is summed in another order: scores that agree to six digits may change places.
    if differ > size // 100 or (ranks.float().log().diff(dim=0).abs() > 0.1).sum() > size // 10_000:
        sys.exit(f"{differ:,} ranks differ, by up to {int(ranks.diff(dim=0).abs().max()):,}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, torch {version('torch')}")
    recall = (ranks[0] == 1).float().mean()
    print(f"{size:,} × {size:,} × 512, recall@1 {recall:.1%}; {differ:,} ranks differ by rounding\n")
    print("| | CPU-s | MB at the peak |\n|---|---|---|")
    for name, found in (("matmul and argsort", plain), ("finetune", ours)):
        print(f"| {name} | {found['seconds']:.1f} | {found['peak']:,.0f} |")
    figures = {
        "ratio": round(plain["seconds"] / ours["seconds"], 2),
        "peak_mb": round(ours["peak"]),
        "plain_peak_mb": round(plain["peak"]),
        "seconds_ours": round(ours["seconds"], 1),
        "seconds_plain": round(plain["seconds"], 1),
    }
    print(json.dumps(figures))


def run(code: str, path: Path) -> dict[str, Any]:
    """What a process of its own prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
