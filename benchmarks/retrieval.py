"""Exact retrieval of 100,000 captions by 100,000 images, beside a plain chunked matmul and sort: CPU time and memory.

    python benchmarks/retrieval.py                    100,000 × 100,000, embeddings of 512; the peer takes 20 minutes
    python benchmarks/retrieval.py --queries 10000    the first 10,000 queries among all 100,000 candidates, for both
    python benchmarks/retrieval.py --alone            ours, without the peer
    python benchmarks/retrieval.py --size 1000000 --queries 1000 --alone
    python benchmarks/retrieval.py --quick            20,000 × 20,000

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
image = image[: int(sys.argv[2])]
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
    parser.add_argument("--size", type=int, default=100_000, help="of candidates")
    parser.add_argument("--queries", type=int, help="only so many queries, among all candidates")
    parser.add_argument("--alone", action="store_true", help="without the peer")
    given = parser.parse_args()
    size = 20_000 if given.quick else given.size
    queries = min(given.queries or size, size)
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, torch {version('torch')}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeddings.pt"
        save_embeddings(path, size)
        ways = {"finetune": OURS} if given.alone else {"matmul and argsort": PLAIN, "finetune": OURS}
        found = {name: run(BEGIN + code + TELL, path, queries) for name, code in ways.items()}
    recall = sum(rank == 1 for rank in found["finetune"]["ranks"]) / queries
    print(f"{queries:,} × {size:,} × 512, recall@1 {recall:.1%}{'' if given.alone else differences(found)}\n")
    print("| | CPU-s | MB at the peak |\n|---|---|---|")
    for name, told in found.items():
        print(f"| {name} | {told['seconds']:.1f} | {told['peak']:,.0f} |")
    print(json.dumps(figures(found)))


def save_embeddings(path: Path, size: int) -> None:
    """Images, and captions of which a third are found first; made in place, as a million of each are 4 GB."""
    random = torch.Generator().manual_seed(0)
    image, text = (torch.randn(size, 512, generator=random) for _ in range(2))
    image /= image.norm(dim=1, keepdim=True)
    text.mul_(0.25).add_(image)
    text /= text.norm(dim=1, keepdim=True)
    torch.save((image, text), path)


def differences(found: dict[str, dict[str, Any]]) -> str:
    """How many ranks differ, which only rounding may explain."""
    ranks = torch.tensor([told["ranks"] for told in found.values()])
    differ = int((ranks[0] != ranks[1]).sum())
    # A product of other shape is summed in another order: scores that agree to six digits may change places.
    if differ > ranks.shape[1] // 100 or (ranks.float().log().diff(dim=0).abs() > 0.1).sum() > ranks.shape[1] // 10_000:
        sys.exit(f"{differ:,} ranks differ, by up to {int(ranks.diff(dim=0).abs().max()):,}")
    return f"; {differ:,} ranks differ by rounding"


def figures(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The last line: ours, and the peer's where it ran."""
    ours, plain = found["finetune"], found.get("matmul and argsort")
    told = {"peak_mb": round(ours["peak"]), "seconds_ours": round(ours["seconds"], 1)}
    if plain:
        told = {"ratio": round(plain["seconds"] / ours["seconds"], 2), **told}
        told |= {"plain_peak_mb": round(plain["peak"]), "seconds_plain": round(plain["seconds"], 1)}
    return told


def run(code: str, path: Path, queries: int) -> dict[str, Any]:
    """What a process of its own prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, str(path), str(queries)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
