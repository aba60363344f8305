"""What curation is worth: the same training on the curated pairs, on all that was downloaded, and on as many at random.

    python benchmarks/curation_gain.py             five seeds; about half an hour on two cores
    python benchmarks/curation_gain.py --quick     one seed, a third of the steps

The demo's small CLIP and its crawl (`make demo`, steps 1 to 3; what is in ./demo-run is reused): a list of 3,069 rows
for the domain of handwritten digits, of which 2,820 arrive. Half of those are of other things, others are exact or near
duplicates; 1,325 are left as its train split. All arms see the same number of samples, in batches of 256, from the same
start, LoRA as the demo's but without replay:

    curated      the train split that `curate build` made
    uncurated    every row that arrived
    random       as many rows of those as are in the train split, drawn anew for each seed

Rows that `curate` dropped as copies of test images are left out of all three: they would flatter the uncurated ones.
The figure is the domain's recall@1: for each of 450 digits that no list holds, the name among ten that fits best
(zero-shot top-1), one prompt. `gain_vs_uncurated` and `gain_vs_random` are the curated arm's mean over the seeds
divided by the other's, less one; `…_low` and `…_high` their 95 % interval, by resampling seeds. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

import duckdb
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from benchmarks.adaptation import BATCH, DOMAIN, STEPS, run_command
from demo.run import RUN, prepare

WORK = RUN / "curation_gain"
CURATED = RUN / "digits"
ARMS = ("curated", "uncurated", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a third of the steps")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    seeds, steps = (1, STEPS // 3) if given.quick else (given.seeds, STEPS)
    prepare()
    shutil.rmtree(WORK, ignore_errors=True)
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            found[arm].append(score(arm, seed, steps))
        told = ", ".join(f"{arm} {scores[-1]:.1%}" for arm, scores in found.items())
        print(f"seed {seed}: {told}", flush=True)
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}; {steps * BATCH:,} samples seen\n")
    print("| | pairs | digits, recall@1 of ten names |\n|---|---|---|")
    for arm, scores in found.items():
        spread = f" ± {stdev(scores):.1%}" if seeds > 1 else ""
        print(f"| {arm} | {len(keys(arm, 0)):,} | {mean(scores):.1%}{spread} |")
    figures: dict[str, float] = {"seeds": seeds}
    for other in ARMS[1:]:
        figures |= gain(f"gain_vs_{other}", found["curated"], found[other])
    print(json.dumps(figures))


def keys(arm: str, seed: int) -> list[str]:
    """The pairs of an arm: keys of the raw shards' rows, in their order."""
    ledger = CURATED / "ledger.parquet"
    rows = duckdb.sql(f"SELECT key, split, step FROM '{ledger}' WHERE kept OR stage = 'select' ORDER BY key")
    arrived = [(key, split) for key, split, step in rows.fetchall() if step != "leak"]
    curated = [key for key, split in arrived if split == "train"]
    everything = [key for key, _ in arrived]
    drawn = random.Random(seed).sample(everything, len(curated))
    return {"curated": curated, "uncurated": everything, "random": sorted(drawn)}[arm]


def score(arm: str, seed: int, steps: int) -> float:
    """Train on the pairs of an arm by `finetune fit`, and read digits."""
    run = WORK / f"{arm}-{seed}"
    listed = ", ".join(f"'{key}'" for key in keys(arm, seed))
    config = {"data": {"sources": [{"path": str(CURATED / "raw"), "where": f"key IN ({listed})"}], "batch_size": BATCH}}
    path = WORK / f"{arm}-{seed}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config), encoding="utf-8")
    command = ["finetune", "fit", "--config", "configs/demo.yaml", "--config", str(path), "--out", str(run)]
    length = ["--trainer.max_epochs", "null", "--trainer.max_steps", str(steps), "--seed_everything", str(seed)]
    nowhere = ["--data.dataset", str(WORK / "no-val")]  # nothing is chosen by a val split: the last step counts
    (WORK / "no-val").mkdir(exist_ok=True)
    (WORK / "no-val" / "README").touch()
    run_command([*command, *length, *nowhere, "--data.replay", "0", "--keep.interpolate", "0"])
    sets = ["--evaluate.zero_shot.digits.images", str(RUN / "test_digits")]
    prompt = ["--evaluate.zero_shot.digits.templates", '["a handwritten {}"]']
    told = run_command(["finetune", "evaluate", "--run", str(run), *sets, *prompt, "--json"])
    (figures,) = json.loads(told).values()
    value: float = figures[DOMAIN]["value"]
    return value


def gain(name: str, ours: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Relative gain of the means, and its interval by resampling the seeds of both."""
    generator = np.random.default_rng(0)
    drawn = [generator.choice(scores, (10_000, len(scores))).mean(1) for scores in (ours, other)]
    low, high = np.percentile(drawn[0] / drawn[1] - 1, [2.5, 97.5])
    told = {name: mean(ours) / mean(other) - 1, f"{name}_low": float(low), f"{name}_high": float(high)}
    return {key: round(value, 3) for key, value in told.items()}


if __name__ == "__main__":
    main()
