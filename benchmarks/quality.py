"""How well the domain recipe tells good pairs from junk, on a crawl of which each row's kind is known.

    python benchmarks/quality.py               three crawls of 1,940 rows each; about six minutes on two cores
    python benchmarks/quality.py --quick       one crawl of half the rows
    python benchmarks/quality.py --seeds 7 8   these crawls
    python benchmarks/quality.py --work DIR    keep everything in DIR; a second run reuses the CLIP

The commands are the user's own, against a web server on loopback: `curate build` of the general pairs, `finetune fit`
of a CLIP on them, once; then, of each seed, `curate build` of a crawl with configs/curate/domain.yaml. A seed decides
all that is drawn but the CLIP: the crawl, its test set, and the trusted pairs, the example images and their captions,
which the recipe's two thresholds come from. The labels are written when the pipeline has ended. Of the first crawl,
one threshold is changed and it is built again. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # A script's own folder comes first in the search, where select.py would stand before Python's own module.
    sys.path[0] = str(REPOSITORY)

import argparse
import json
import resource
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from demo.junk import HOSTS
from demo.mix import FOOD, OTHER, Mix, Pair, jpeg, make_mix, pairs
from demo.web import Web, serving

RECIPE = REPOSITORY / "configs" / "curate" / "domain.yaml"
# Of the trusted pairs, the share that may fall below a threshold.
LOST = 0.03
DRAWINGS, EPOCHS, BATCH = 64, 16, 96
EXAMPLES = 20  # of each concept
SEEDS = (1, 2, 3)
APART = 1_000  # between what two seeds draw from


@dataclass(frozen=True)
class Setting:
    """A benchmark at some size.

    Attributes:
        work: the folder that everything lies in.
        scale: of the mix.
        drawings: of each concept, that the CLIP is trained on.
        epochs: that it is trained for.
        food: concepts of the domain.
        other: concepts outside the domain that the CLIP is trained on.
    """

    work: Path
    scale: float = 1.0
    drawings: int = DRAWINGS
    epochs: int = EPOCHS
    food: tuple[str, ...] = FOOD
    other: tuple[str, ...] = tuple(OTHER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half the rows, and the first seed alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the crawls")
    parser.add_argument("--work", type=Path, help="folder to keep everything in")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        setting = Setting(given.work or Path(temporary), scale=0.5 if given.quick else 1.0)
        train_clip(setting)
        print(f"a CLIP from scratch: {(setting.work / 'clip_seconds').read_text()} s", flush=True)
        runs: dict[int, Any] = {}
        for seed in given.seeds[:1] if given.quick else given.seeds:
            runs[seed] = run_mix(setting, seed, again=not runs)
            print_table(seed, runs[seed])
    if len(runs) > 1:
        print_summary(runs)
    print(json.dumps(figures(runs)))


# --- the CLIP --------------------------------------------------------------------------------------------------------


def train_clip(setting: Setting) -> Path:
    """Train a small CLIP on other drawings of the same world; what is there from before is used.

    Returns:
        The folder that `local-dir:` names.
    """
    work, started = setting.work, time.monotonic()
    if (work / "clip" / "open_clip_config.json").exists():
        return work / "clip"
    concepts = [*setting.food, *setting.other]
    write_pairs(work / "general-images", pairs(concepts, len(concepts) * setting.drawings, seed=100), side=64)
    everything = {"filters": [], "pack": {"val": 0, "test": 0}}
    curate(work, "general", everything, work / "general-images")
    run_command("finetune", "fit", "--config", str(write_yaml(work / "pretrain.yaml", pretraining(setting))))
    run_command("finetune", "export", "--run", str(work / "pretrain"), "--out", str(work / "clip"))
    (work / "clip_seconds").write_text(f"{time.monotonic() - started:.0f}")
    return work / "clip"


def pretraining(setting: Setting) -> dict[str, Any]:
    """Configuration of `finetune fit`: the demo's, on these pairs."""
    config = yaml.safe_load((REPOSITORY / "configs" / "finetune" / "demo_pretrain.yaml").read_text())
    config["out"] = str(setting.work / "pretrain")
    config["trainer"]["max_epochs"] = setting.epochs
    config["model"]["clip"]["name"] = str(REPOSITORY / "configs" / "finetune" / "demo_clip.json")
    config["data"]["dataset"] = str(setting.work / "general")
    config["data"] |= {"batch_size": BATCH, "crop_scale": [0.9, 1.0]}
    config["model"]["optimizer"]["lr"] = 1.5e-3  # the batch is smaller than the demo's: more steps for as much work
    del config["evaluate"]
    return config


def write_pairs(folder: Path, chosen: list[Pair], side: int | None = None) -> None:
    """The images, and beside each its caption: NUMBER.jpg, NUMBER.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pair in enumerate(chosen):
        image = pair.image.resize((side, side)) if side else pair.image
        (folder / f"{number:05d}.jpg").write_bytes(jpeg(image, 95))
        (folder / f"{number:05d}.txt").write_text(pair.caption)


def thresholds(clip_folder: Path, trusted: list[Pair]) -> tuple[float, float]:
    """What all but LOST of the trusted pairs reach: cosine to the nearest other one's image, and to their captions."""
    import numpy as np

    from curate.clip import load_clip
    from curate.select.relevance import score

    clip = load_clip(f"local-dir:{clip_folder}", device="cpu")
    image_ND = clip.embed_images([pair.image for pair in trusted]).numpy()
    text_ND = clip.embed_captions([pair.caption for pair in trusted]).numpy()
    none = image_ND[:0]
    nearest = [score(image_ND[n : n + 1], none, none, np.delete(image_ND, n, axis=0))[0] for n in range(len(trusted))]
    fits = (image_ND * text_ND).sum(axis=1)
    return round(float(np.quantile(nearest, LOST)), 3), round(float(np.quantile(fits, LOST)), 3)


# --- the pipeline, as its user runs it -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """One `curate build`: what the ledger says (row → kept to train on, and what dropped it), and what it took."""

    ledger: list[dict[str, Any]]
    seconds: float
    cpu_seconds: float
    """Of all its processes."""
    requests: int
    """Of images."""


@dataclass(frozen=True)
class Run:
    """The mix, the build of it, and the second build, with one threshold changed, if it was made."""

    mix: Mix
    first: Build
    second: Build | None
    recipe: dict[str, Any]


def run_mix(setting: Setting, seed: int, *, again: bool) -> Run:
    """Serve the mix of a seed and build it, and `again` with one threshold changed; then write the labels."""
    work = setting.work / f"crawl-{seed}"
    mix = make_mix(setting.scale, APART * seed, setting.food, setting.other)
    trusted = pairs(setting.food, EXAMPLES * len(setting.food), APART * seed + 200)
    write_pairs(work / "examples", trusted)
    (work / "test").mkdir(exist_ok=True)
    for name, body in mix.test.items():
        (work / "test" / name).write_bytes(body)
    clip = setting.work / "clip"
    on_topic, aligned = thresholds(clip, trusted)
    recipe = domain_recipe(work, clip, on_topic, aligned)
    with serving(mix.bodies, []) as web:
        write_list(work / "list.parquet", mix, web)
        first = build(work, recipe, web)
        stricter = domain_recipe(work, clip, on_topic, round(aligned + 0.02, 3))
        second = build(work, stricter, web) if again else None
    labels = {name: [getattr(row, name) for row in mix.rows] for name in ("path", "kind", "picture")}
    pq.write_table(pa.table(labels), work / "labels.parquet")
    return Run(mix, first, second, recipe)


def domain_recipe(work: Path, clip: Path, on_topic: float, aligned: float) -> dict[str, Any]:
    """configs/curate/domain.yaml with what is the user's own put in: CLIP, paths, the two thresholds."""
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["measure"]["clip"] = {"name": f"local-dir:{clip}"}
    steps = {step["name"]: step for step in recipe["filters"]}
    steps["leak"]["decontaminate"]["against"] = str(work / "test")
    steps["on_topic"]["relevance"] = {"images": str(work / "examples"), "threshold": on_topic}
    steps["aligned"]["where"] = f"clip_score >= {aligned}"
    return recipe


def write_list(path: Path, mix: Mix, web: Web) -> None:
    """URL and caption, and nothing else."""
    urls = [f"http://{HOSTS[place % len(HOSTS)]}:{web.port}{row.path}" for place, row in enumerate(mix.rows)]
    pq.write_table(pa.table({"url": urls, "caption": [row.caption for row in mix.rows]}), path)


def build(work: Path, recipe: dict[str, Any], web: Web) -> Build:
    """`curate build` of the list, and its ledger in the list's order."""
    asked, started, spent = web.hits()["img"], time.monotonic(), children_cpu()
    allow = f'--fetch.allow_addresses=["127.0.0.0/8:{web.port}"]'
    curate(work, "food", recipe, work / "list.parquet", allow, "--fetch.per_host_rate", "0")
    seconds, cpu_seconds = time.monotonic() - started, children_cpu() - spent
    columns = ["row", "kept", "split", "stage", "step", "reason", "value"]
    ledger = pq.read_table(work / "food" / "ledger.parquet", columns=columns).sort_by("row").to_pylist()
    return Build(ledger, seconds, cpu_seconds, web.hits()["img"] - asked)


def children_cpu() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def curate(work: Path, name: str, recipe: dict[str, Any], urls: Path, *options: str) -> None:
    """`curate build` into the folder `name`."""
    config = write_yaml(work / f"{name}.yaml", recipe)
    command = ["build", "--config", str(config), "--urls", str(urls), "--out", str(work / name)]
    run_command("curate", *command, *options)


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run_command(command: str, *arguments: str) -> None:
    """Run one of our commands; what it says is shown only when it fails."""
    ran = subprocess.run(
        [sys.executable, "-m", f"{command}.cli", *arguments], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        sys.exit(f"{command} {' '.join(arguments)}\n{ran.stdout}{ran.stderr}")


# --- held against the truth ------------------------------------------------------------------------------------------


def truths(mix: Mix, kept: list[bool]) -> list[str]:
    """The kind of each row, where of a picture and its copies the one that was kept counts as the picture itself.

    Which of them stays is the recipe's choice (the largest, then the smallest key); that just one does is what counts.
    """
    kinds = [row.kind for row in mix.rows]
    copies: dict[int, list[int]] = {}
    for place, row in enumerate(mix.rows):
        if row.picture >= 0:
            copies.setdefault(row.picture, []).append(place)
    for places in copies.values():
        original = next(place for place in places if kinds[place] == "clean")
        chosen = next((place for place in places if kept[place]), original)
        if not kept[original]:
            kinds[original], kinds[chosen] = kinds[chosen], kinds[original]
    return kinds


def figures(runs: dict[int, Run]) -> dict[str, Any]:
    """Precision, the least recall of a kind and that of each, over all crawls; the worst crawl; the two builds."""
    told = {seed: Told.of(run) for seed, run in runs.items()}
    everything = Told.together(told.values())
    recalls, first = everything.recalls(), next(iter(runs.values()))
    found = {
        "precision": everything.precision(),
        "recall": min(recalls.values()),
        **{f"recall_{kind.replace(', ', '_').replace(' ', '_').replace('-', '_')}": recalls[kind] for kind in recalls},
        "precision_worst_crawl": min(one.precision() for one in told.values()),
        "recall_worst_crawl": min(min(one.recalls().values()) for one in told.values()),
        "seeds": list(runs),
        "rows": len(everything.kinds),
        "kept": sum(everything.kept),
        "seconds_first": round(first.first.seconds, 1),
        "cpu_seconds_first": round(first.first.cpu_seconds, 1),
        "requests_first": first.first.requests,
    }
    if first.second:
        found |= {
            "seconds_second": round(first.second.seconds, 1),
            "cpu_seconds_second": round(first.second.cpu_seconds, 1),
            "requests_second": first.second.requests,
        }
    return found


@dataclass(frozen=True)
class Told:
    """Of each row its kind, as `truths` gives it, and whether it was kept to train on."""

    kinds: list[str]
    kept: list[bool]

    @classmethod
    def of(cls, run: Run) -> Told:
        """What the first build told of its crawl."""
        kept = kept_rows(run.first)
        return cls(truths(run.mix, kept), kept)

    @classmethod
    def together(cls, several: Iterable[Told]) -> Told:
        """All rows of several crawls."""
        parts = list(several)
        return cls([kind for one in parts for kind in one.kinds], [kept for one in parts for kept in one.kept])

    def precision(self) -> float:
        """The share of what was kept that is clean."""
        return _share(kind == "clean" for kind, kept in zip(self.kinds, self.kept, strict=True) if kept)

    def recalls(self) -> dict[str, float]:
        """By kind: the share that was told right: of clean what was kept, of all else what was not."""
        by_kind = {kind: [0, 0] for kind in sorted(set(self.kinds))}
        for kind, kept in zip(self.kinds, self.kept, strict=True):
            by_kind[kind][0] += kept == (kind == "clean")
            by_kind[kind][1] += 1
        return {kind: round(right / rows, 4) for kind, (right, rows) in by_kind.items()}


def kept_rows(build: Build) -> list[bool]:
    """Which rows were kept to train on: `retain` is not the domain."""
    return [bool(line["kept"]) and line["split"] != "retain" for line in build.ledger]


def print_table(seed: int, run: Run) -> None:
    """Each kind, how many rows of it were told right, and by which step."""
    told = Told.of(run)
    steps = {step["name"]: step for step in run.recipe["filters"]}
    cuts = f"on_topic at {steps['on_topic']['relevance']['threshold']}, aligned: {steps['aligned']['where']}"
    print(f"\nseed {seed}, {cuts}\n\n| kind | rows | kept | recall | by |\n|---|---|---|---|---|")
    for kind, recall in told.recalls().items():
        places = [place for place, found in enumerate(told.kinds) if found == kind]
        fates = Counter(_fate(run.first.ledger[place]) for place in places if not told.kept[place])
        by = ", ".join(f"{name} {count}" for name, count in fates.most_common())
        print(f"| {kind} | {len(places)} | {sum(told.kept[place] for place in places)} | {recall:.3f} | {by} |")
    first, second = run.first, run.second
    print(f"\nprecision {told.precision():.3f}; build {first.seconds:.1f} s, {first.requests:,} requests", end="")
    if second:
        again = f"{second.seconds:.1f} s ({second.cpu_seconds:.1f} of CPU), {second.requests:,} requests"
        print(f"; one threshold changed: {again}, {sum(kept_rows(second)):,} kept", end="")
    print(flush=True)


def print_summary(runs: dict[int, Run]) -> None:
    """Each kind over all crawls, and in the crawl where it went worst."""
    told = [Told.of(run) for run in runs.values()]
    everything = Told.together(told)
    print(f"\n{len(runs)} crawls\n\n| kind | rows | recall | 95 % interval | worst crawl |\n|---|---|---|---|---|")
    for kind, recall in everything.recalls().items():
        worst = min(one.recalls()[kind] for one in told)
        rows = everything.kinds.count(kind)
        low, high = wilson(round(recall * rows), rows)
        print(f"| {kind} | {rows:,} | {recall:.3f} | {low:.3f} to {high:.3f} | {worst:.3f} |")
    low, high = wilson(round(everything.precision() * sum(everything.kept)), sum(everything.kept))
    worst = min(one.precision() for one in told)
    kept = f"{sum(everything.kept):,} kept"
    print(f"| precision | {kept} | {everything.precision():.3f} | {low:.3f} to {high:.3f} | {worst:.3f} |\n")


def wilson(right: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, "Probable inference", 1927)."""
    z, share = 1.96, right / rows
    middle = share + z * z / (2 * rows)
    spread = z * (share * (1 - share) / rows + z * z / (4 * rows * rows)) ** 0.5
    return (middle - spread) / (1 + z * z / rows), (middle + spread) / (1 + z * z / rows)


def _fate(line: dict[str, Any]) -> str:
    return (
        f"retain ({line['step']})"
        if line["kept"]
        else str(line["step"] if line["stage"] == "select" else line["reason"])
    )


def _share(found: Iterable[bool]) -> float:
    values = list(found)
    return round(sum(values) / len(values), 4)


if __name__ == "__main__":
    main()
