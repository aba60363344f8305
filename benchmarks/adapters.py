"""What each way to adapt gains: the demo's small CLIP, its domain, its held-out digits, three seeds.

    python benchmarks/adapters.py             every kind and variant, three seeds; about twenty minutes on two cores
    python benchmarks/adapters.py --quick     four of them, one seed, half the epochs
    python benchmarks/adapters.py --seeds 5   other numbers of seeds

The first three steps of the demo (`make demo`) come first: a web server on loopback, a small CLIP from scratch on
emoji, and a crawl of which handwritten digits are selected. What a run of the demo left in ./demo-run is reused. Each
adapter then is one `finetune fit` of its own, with the demo's data, replay and epochs; only what is trained and its
learning rate differ.

An adapter beats the starting model when the lower end of its 95 % interval lies above the upper end of the start's, for
every seed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from demo.run import prepare

DOMAIN, GENERAL = "zero_shot/digits/top1", "emoji/image_to_text/recall@1"
FULL = ["--model.adapter.kind", "full", "--model.optimizer.lr", "1e-3"]
LORA = ["--model.adapter.rank", "32", "--model.adapter.alpha", "64"]
# Rank-stabilised: alpha / √rank. 64 / 32 = 11.3 / √32.
RSLORA = ["--model.adapter.rank", "32", "--model.adapter.alpha", "11.3"]
# Without the convolutions, of which peft takes no PiSSA.
MATRICES = ["--model.adapter.targets", "[q, k, v, out, fc, proj, pool, projection]"]
ADAPTERS: dict[str, list[str]] = {
    "full": [*FULL],
    "lora": [*LORA],
    "lora, matrices alone": [*LORA, *MATRICES],
    "dora": ["--model.adapter.variant", "dora", *LORA],
    "rslora": ["--model.adapter.variant", "rslora", *RSLORA],
    "pissa": ["--model.adapter.variant", "pissa", *LORA, *MATRICES],
    "layernorm": ["--model.adapter.kind", "layernorm", "--model.optimizer.lr", "1e-2"],
    "bias": ["--model.adapter.kind", "bias", "--model.optimizer.lr", "1e-1"],
    "last": ["--model.adapter.kind", "last", "--model.optimizer.lr", "3e-3"],
    "probe": ["--model.adapter.kind", "probe", "--model.optimizer.lr", "3e-3"],
    "locked text tower": [*FULL, "--model.adapter.lock", "[text]"],
}
QUICK = ("full", "lora", "layernorm", "probe")


@dataclass(frozen=True)
class Outcome:
    """One adapter after one run.

    Attributes:
        before: the starting model's figures: metric → value, low, high.
        after: the adapted model's.
        trained: parameters that were trained.
        seconds: of CPU, of the whole command.
    """

    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    trained: int
    seconds: float

    @property
    def wins(self) -> bool:
        """Whether the intervals of the domain's figure lie apart, the adapted model's above."""
        return self.after[DOMAIN]["low"] > self.before[DOMAIN]["high"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four adapters, one seed, half the epochs")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    prepare()
    names = QUICK if given.quick else tuple(ADAPTERS)
    seeds = range(1 if given.quick else given.seeds)
    short = ["--trainer.max_epochs", "4"] if given.quick else []
    outcomes: dict[str, list[Outcome]] = {}
    for name in names:
        for seed in seeds:
            outcome = adapt([*ADAPTERS[name], *short, "--seed_everything", str(seed)])
            outcomes.setdefault(name, []).append(outcome)
            print(f"{name}, seed {seed}: {_figure(outcome.after[DOMAIN])}, {outcome.seconds:.0f} CPU-s", flush=True)
    print_table(outcomes)
    print(json.dumps(figures(outcomes)))


def adapt(options: list[str]) -> Outcome:
    """`finetune fit` as a user would type it."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [str(Path(sys.executable).with_name("finetune")), "fit", "--config", "configs/demo.yaml"]
        before = os.times()
        subprocess.run([*command, "--out", str(run), *options], check=True, capture_output=True, text=True)
        after = os.times()
        read = json.loads((run / "evaluation.json").read_text())
        trained = read["facts"]["trainable_parameters"]
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return Outcome(before=read["before"], after=read["after"], trained=trained, seconds=seconds)


def _figure(cell: dict[str, float]) -> str:
    return f"{cell['value']:.1%} ({cell['low']:.1%} to {cell['high']:.1%})"


def _average(outcomes: list[Outcome], metric: str) -> str:
    return _figure({part: mean(o.after[metric][part] for o in outcomes) for part in ("value", "low", "high")})


def print_table(outcomes: dict[str, list[Outcome]]) -> None:
    """Means over the seeds, of the figures and of the ends of their 95 % intervals."""
    start = next(iter(outcomes.values()))[0].before
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}, peft {version('peft')}\n")
    print("| adapter | trained | digits, zero-shot top-1 | seeds that beat the start | emoji, top-1 of 1,454 | CPU-s |")
    print("|---|---|---|---|---|---|")
    print(f"| the start | | {_figure(start[DOMAIN])} | | {_figure(start[GENERAL])} | |")
    for name, runs in outcomes.items():
        wins = f"{sum(run.wins for run in runs)} of {len(runs)}"
        seconds = mean(run.seconds for run in runs)
        cells = (_average(runs, DOMAIN), wins, _average(runs, GENERAL), f"{seconds:.0f}")
        print(f"| {name} | {runs[0].trained:,} | {' | '.join(cells)} |")


def figures(outcomes: dict[str, list[Outcome]]) -> dict[str, Any]:
    """The last line."""
    start = next(iter(outcomes.values()))[0].before
    found: dict[str, Any] = {"start": start[DOMAIN]["value"], "start_high": start[DOMAIN]["high"]}
    for name, runs in outcomes.items():
        key = name.replace(",", "").replace(" ", "_")
        found[key] = round(mean(run.after[DOMAIN]["value"] for run in runs), 4)
        found[f"{key}_low"] = round(min(run.after[DOMAIN]["low"] for run in runs), 4)
    found["all_beat_the_start"] = all(run.wins for runs in outcomes.values() for run in runs)
    return found


if __name__ == "__main__":
    main()
