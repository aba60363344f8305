"""What curation is worth: the same training on the curated pairs, on all that was downloaded, and on as many at random.

    python benchmarks/curation_gain.py             five seeds, four shares of junk; about half an hour on one core
    python benchmarks/curation_gain.py --quick     one seed, half the steps, one share; a few minutes
    python benchmarks/curation_gain.py --work DIR  keep everything in DIR; a second run, and data_scaling.py, reuse it
    python benchmarks/curation_gain.py --junk 0 0.1 --seeds 2    only the gain over all that arrived, at these shares

A crawl of 3,000 rows for the domain of food: 112 concepts of OpenMoji, drawn many times (demo/mix.py), of which each
row's kind is known to the benchmark and not to the pipeline. 70 % of the rows are junk, since the best share of a web
crawl to train on, by CLIP score, is 30 % (DataComp, Gadre et al. 2023), and 30 % of what is left when copies are not
counted as junk are copies, as in LAION-2B (Webster et al. 2023); how the rest is shared among the kinds of junk (JUNK)
is a guess.

The CLIP that curates is the CLIP that is adapted: small, trained from scratch on a general web of 400 concepts, food
among them. `curate build` uses configs/curate/domain.yaml with thresholds from 448 trusted pairs. All arms then see the
same number of samples, in batches of 128, from the same start, by the demo's LoRA without replay:

    curated      the train split that `curate build` made
    uncurated    every row that arrived
    random       as many rows of those as are in the train split, drawn anew for each seed
    + retain     the train split and the `retain` split: clean pairs of other things
    true labels  the clean pairs by the truth, which no pipeline knows

Rows that `curate` drops as copies of test images are left out of all; what it drops before any request is in none but
the last: both are kind to the uncurated arms. The figure is the domain's recall@1, image to name: for each of 448 food
drawings that no list holds, the name among 112 that fits best (zero-shot top-1), one prompt. `gain_vs_uncurated` and
`gain_vs_random` are the curated arm's mean over the seeds divided by the other's, less one; `…_low` and `…_high` their
95 % interval, by resampling seeds. Then the same crawl with less and with more junk: at which share does the gain
vanish? The last line is one JSON object.
"""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

import argparse
import json
import os
import platform
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from importlib.metadata import version
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from benchmarks import quality
from demo.mix import Mix, concepts, jpeg, make_mix, pairs
from demo.web import serving

BATCH, DRAWINGS, EPOCHS = 128, 8, 12
EXAMPLES, TESTS = 4, 4  # of each concept
TYPICAL = 0.7  # share of junk
SHARES = (0.1, 0.3, 0.5, TYPICAL)
# Parts of the junk; near and exact duplicates are 13 of 100 rows at the typical share: 30 % of the pairs and copies.
JUNK = {
    "mismatched caption": 25,
    "exact duplicate": 5,
    "near duplicate": 8,
    "off topic, known": 10,
    "off topic, unknown": 4,
    "boilerplate caption": 8,
    "placeholder": 4,
    "tiny": 2,
    "broken": 2,
    "leak, same file": 1,
    "leak, re-encoded": 1,
}
BARS = ("curated", "uncurated", "random")
ASIDE = ("+ retain", "true labels")  # two seeds
ARMS = (*BARS, *ASIDE)
METRIC = "zero_shot/food/top1"


@dataclass(frozen=True)
class Setting:
    """A benchmark at some size.

    Attributes:
        work: the folder that everything lies in.
        rows: of a crawl.
        steps: of each training.
        seeds: how many.
        food: concepts of the domain.
        other: what else the general web and the crawl show.
    """

    work: Path
    rows: int = 3_000
    steps: int = 80
    seeds: int = 5
    food: tuple[str, ...] = concepts("food")
    other: tuple[str, ...] = concepts("animal", "plant", "vehicle", "clothing", "building", "instrument", "tool")

    @property
    def samples(self) -> int:
        """That each training sees."""
        return self.steps * BATCH


@dataclass(frozen=True)
class Crawl:
    """A crawl after `curate build`: the folder, and of each row of the list the ledger's line and the true kind."""

    folder: Path
    ledger: list[dict[str, Any]]
    kinds: list[str]

    def arrived(self) -> list[str]:
        """Keys of the rows that were downloaded, but those dropped as copies of test images."""
        return [line["key"] for line in self.ledger if _arrived(line)]

    def split(self, *names: str) -> list[str]:
        """Keys of the rows in these splits."""
        return [line["key"] for line in self.ledger if line["kept"] and line["split"] in names]

    def clean(self) -> list[str]:
        """Keys of the rows that are good pairs of the domain, one of each picture."""
        rows = zip(self.ledger, self.kinds, strict=True)
        return [line["key"] for line, kind in rows if kind == "clean" and _arrived(line)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--junk", type=float, nargs="+", help="only the gain over all that arrived, at these shares")
    given = parser.parse_args()
    with benchmark(given) as setting:
        if given.junk:
            print(json.dumps({"seeds": setting.seeds, "gain_by_junk": sweep(setting, given.junk)}))
            return
        typical = crawl(setting, TYPICAL)
        print_crawl(typical)
        found: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for arms, seeds in ((BARS, setting.seeds), (ASIDE, min(2, setting.seeds))):
            for seed in range(seeds):
                for arm in arms:
                    found[arm].append(score(setting, typical, arm, keys(typical, arm, seed), seed))
                told = ", ".join(f"{arm} {found[arm][-1]:.1%}" for arm in arms)
                print(f"seed {seed}: {told}", flush=True)
        print_arms(setting, typical, found)
        figures: dict[str, Any] = {"seeds": setting.seeds}
        for other in ("uncurated", "random"):
            figures |= gain(f"gain_vs_{other}", found["curated"], found[other])
        figures |= {f"score_{arm.strip('+ ').replace(' ', '_')}": round(mean(found[arm]), 4) for arm in ARMS}
        figures["start"] = round(score(setting, typical, "curated", [], 0, "before"), 4)
        if not given.quick:
            figures["gain_by_junk"] = sweep(replace(setting, seeds=1), SHARES)
    print(json.dumps(figures))


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of a script of this kind."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, half the steps")
    parser.add_argument("--seeds", type=int, help="other than usual")
    parser.add_argument("--work", type=Path, help="folder to keep everything in")
    return parser


@contextmanager
def benchmark(given: argparse.Namespace, **options: Any) -> Iterator[Setting]:
    """Train the CLIP to start from, and say what runs; gives the setting.

    Args:
        given: what `arguments` reads.
        **options: of Setting, at its full size.
    """
    with tempfile.TemporaryDirectory() as temporary:
        setting = Setting(given.work or Path(temporary), **options)
        if given.quick:
            setting = replace(setting, steps=setting.steps // 2, seeds=1)
        if given.seeds:
            setting = replace(setting, seeds=given.seeds)
        print(f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}", flush=True)
        start(setting)
        yield setting


# --- the start, the crawl ---------------------------------------------------------------------------------------------


def start(setting: Setting) -> None:
    """Train the CLIP of the general web, which then curates and is adapted; write what it is tested on."""
    world: dict[str, Any] = {"drawings": DRAWINGS, "epochs": EPOCHS, "food": setting.food, "other": setting.other}
    setting.work.mkdir(parents=True, exist_ok=True)
    quality.train_clip(quality.Setting(setting.work, **world))
    for number, pair in enumerate(pairs(setting.food, TESTS * len(setting.food), seed=300)):
        folder = setting.work / "exam" / pair.concept.lower()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / f"{number:05d}.jpg").exists():
            (folder / f"{number:05d}.jpg").write_bytes(jpeg(pair.image, 95))


def crawl(setting: Setting, junk: float) -> Crawl:
    """A crawl with this share of junk and `curate build` of it; what is there from before is used."""
    work = setting.work / f"crawl of {setting.rows} with {junk:.0%} junk"
    mix = make_mix(food=setting.food, other=setting.other, shares=counts(setting.rows, junk))
    if not (work / "done").exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        _build(setting, work, mix)
        (work / "done").touch()
    ledger = pq.read_table(work / "food" / "ledger.parquet").sort_by("row").to_pylist()
    kept = [bool(line["kept"]) and line["split"] == "train" for line in ledger]
    return Crawl(work / "food", ledger, quality.truths(mix, kept))


def counts(rows: int, junk: float) -> dict[str, float]:
    """Rows of each kind."""
    parts = sum(JUNK.values())
    return {"clean": rows * (1 - junk), **{kind: rows * junk * part / parts for kind, part in JUNK.items()}}


def _build(setting: Setting, work: Path, mix: Mix) -> None:
    trusted = pairs(setting.food, EXAMPLES * len(setting.food), seed=200)
    quality.write_pairs(work / "examples", trusted)
    (work / "test").mkdir()
    for name, body in mix.test.items():
        (work / "test" / name).write_bytes(body)
    clip = setting.work / "clip"
    made = recipe(work, clip, *quality.thresholds(clip, trusted))
    with serving(mix.bodies, []) as web:
        quality.write_list(work / "list.parquet", mix, web)
        quality.build(work, made, web)


def recipe(work: Path, clip: Path, on_topic: float, aligned: float) -> dict[str, Any]:
    """Configuration of `curate build`: the domain's, all of it packed to train on."""
    small = {"pack": {"val": 0, "test": 0}, "fetch": {"image_size": 64}}  # the CLIP sees 32 × 32
    return quality.domain_recipe(work, clip, on_topic, aligned) | small


def _arrived(line: Mapping[str, Any]) -> bool:
    return bool(line["kept"]) or (line["stage"] == "select" and line["step"] != "leak")


def keys(crawled: Crawl, arm: str, seed: int) -> list[str]:
    """The pairs of an arm: keys of the raw shards' rows."""
    takes: dict[str, Callable[[], list[str]]] = {
        "curated": lambda: crawled.split("train"),
        "uncurated": crawled.arrived,
        "random": lambda: random.Random(seed).sample(crawled.arrived(), len(crawled.split("train"))),
        "+ retain": lambda: crawled.split("train", "retain"),
        "true labels": crawled.clean,
    }
    return sorted(takes[arm]())


# --- a training -------------------------------------------------------------------------------------------------------


def score(setting: Setting, crawled: Crawl, name: str, chosen: Sequence[str], seed: int, when: str = "after") -> float:
    """recall@1 after training on these pairs of a crawl (or before it); a run of an earlier call is used.

    In this process: to start Python and import PyTorch for each would take as long as the training.
    """
    from curate.options import read_config
    from finetune.config import FitConfig
    from finetune.fit import fit

    run = setting.work / "runs" / f"{crawled.folder.parent.name}, {name}, seed {seed}, {setting.steps} steps"
    if not (run / "evaluation.json").exists():
        run.parent.mkdir(exist_ok=True)
        path = quality.write_yaml(run.with_name(f"{run.name}.yaml"), training(setting, crawled, chosen, seed, run))
        with run.with_name(f"{run.name}.log").open("w") as log, redirect_stderr(log):
            fit(read_config(path, FitConfig), restart=True)
        shutil.rmtree(run / "checkpoints")
    value: float = json.loads((run / "evaluation.json").read_text())[when][METRIC]["value"]
    return value


def training(setting: Setting, crawled: Crawl, chosen: Sequence[str], seed: int, run: Path) -> dict[str, Any]:
    """Configuration of `finetune fit`: the demo's, without replay, with what is this benchmark's own put in."""
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text())
    listed = ", ".join(f"'{key}'" for key in chosen)
    nowhere = setting.work / "no-val"  # nothing is chosen by a val split: the last step counts
    nowhere.mkdir(exist_ok=True)
    (nowhere / "README").touch()
    config |= {"out": str(run), "seed_everything": seed, "keep": {"interpolate": 0}}
    config["trainer"] |= {"max_epochs": None, "max_steps": setting.steps}
    config["model"]["clip"]["name"] = f"local-dir:{setting.work / 'clip'}"
    sources = [{"path": str(crawled.folder / "raw"), "where": f"key IN ({listed})"}]
    config["data"] |= {"dataset": str(nowhere), "sources": sources, "batch_size": BATCH, "replay": 0, "num_workers": 0}
    exam = {"images": str(setting.work / "exam"), "templates": ["a drawing of a {}"]}
    return config | {"evaluate": {"zero_shot": {"food": exam}}}


# --- what came out ----------------------------------------------------------------------------------------------------


def gain(name: str, ours: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Relative gain of the means, and its interval by resampling the seeds of both."""
    generator = np.random.default_rng(0)
    drawn = [generator.choice(scores, (10_000, len(scores))).mean(1) for scores in (ours, other)]
    low, high = np.percentile(drawn[0] / drawn[1] - 1, [2.5, 97.5])
    told = {name: mean(ours) / mean(other) - 1, f"{name}_low": float(low), f"{name}_high": float(high)}
    return {key: round(value, 3) for key, value in told.items()}


def sweep(setting: Setting, shares: Sequence[float]) -> dict[str, float]:
    """The gain over all that arrived, by the share of junk that the crawl has: four rows of a kind at least."""
    found = {}
    columns = ("junk", "pairs, uncurated", "clean", "curated", "clean", "recall@1, uncurated", "curated", "gain")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for share in shares:
        crawled, scores = crawl(setting, share), dict[str, list[float]]()
        for arm in ("uncurated", "curated"):
            scores[arm] = [score(setting, crawled, arm, keys(crawled, arm, n), n) for n in range(setting.seeds)]
        told = gain("gain", scores["curated"], scores["uncurated"])
        junk = f"{1 - crawled.kinds.count('clean') / len(crawled.kinds):.1%}"
        found[junk] = told["gain"]
        sizes = " | ".join(f"{len(keys(crawled, arm, 0)):,} | {clean_share(crawled, arm):.0%}" for arm in scores)
        reached = " | ".join(spread(values) for values in scores.values())
        print(f"| {junk} | {sizes} | {reached} | {told['gain']:+.1%} |", flush=True)
    return found


def clean_share(crawled: Crawl, arm: str) -> float:
    """The share of an arm's pairs that are good pairs of the domain."""
    chosen = keys(crawled, arm, 0)
    return len(set(chosen) & set(crawled.clean())) / len(chosen)


def print_crawl(crawled: Crawl) -> None:
    """Each kind of row: how many, how many arrived, and what became of them."""
    print("\n| kind | rows | arrived | kept to train on | kept as retain |\n|---|---|---|---|---|")
    groups = [set(crawled.arrived()), set(crawled.split("train")), set(crawled.split("retain"))]
    for kind in sorted(set(crawled.kinds)):
        of_kind = [line["key"] for line, found in zip(crawled.ledger, crawled.kinds, strict=True) if found == kind]
        cells = [f"{sum(key in group for key in of_kind):,}" for group in groups]
        print(f"| {kind} | {len(of_kind):,} | {' | '.join(cells)} |")
    print(flush=True)


def print_arms(setting: Setting, crawled: Crawl, found: Mapping[str, list[float]]) -> None:
    """Each arm's pairs and scores, after the start's."""
    before = score(setting, crawled, "curated", [], 0, "before")
    print(f"\n{setting.samples:,} samples seen\n")
    print(f"| | pairs | clean | food, recall@1 of {len(setting.food)} names |\n|---|---|---|---|")
    print(f"| the start | | | {before:.1%} |")
    for arm, scores in found.items():
        print(f"| {arm} | {len(keys(crawled, arm, 0)):,} | {clean_share(crawled, arm):.0%} | {spread(scores)} |")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{mean(values):.1%}" + (f" ± {stdev(values):.1%}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
