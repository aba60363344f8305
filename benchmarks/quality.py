"""How well the domain recipe tells good pairs from junk, on a crawl of which each row's kind is known.

    python benchmarks/quality.py             2,000 rows; a few minutes on two cores, most of them training a small CLIP
    python benchmarks/quality.py --quick     half of it
    python benchmarks/quality.py --work DIR  keep everything in DIR; a second run reuses the CLIP

The commands are the user's own, against a web server on loopback: `curate build` of the general pairs, `finetune fit`
of a CLIP on them, `curate build` of the crawl with configs/curate/domain.yaml. The two thresholds of the recipe come
from trusted pairs, the example images and their captions, and not from the crawl. The labels are written when the
pipeline has ended. Then one threshold is changed and the crawl built again. The last line is one JSON object.
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

from demo.mix import FOOD, OTHER, Mix, Pair, jpeg, make_mix, pairs
from demo.web import HOSTS, Web, serving

RECIPE = REPOSITORY / "configs" / "curate" / "domain.yaml"
# Of the trusted pairs, the share that may fall below a threshold.
LOST = 0.03
DRAWINGS, EPOCHS, BATCH = 64, 16, 96
EXAMPLES = 20  # of each concept


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
    parser.add_argument("--quick", action="store_true", help="half the rows")
    parser.add_argument("--work", type=Path, help="folder to keep everything in")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        setting = Setting(given.work or Path(temporary), scale=0.5 if given.quick else 1.0)
        train_clip(setting)
        print(f"a CLIP from scratch: {(setting.work / 'clip_seconds').read_text()} s")
        run = run_mix(setting)
    print_table(run)
    print(json.dumps(figures(run)))


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
    requests: int
    """Of images."""


@dataclass(frozen=True)
class Run:
    """The mix, the build of it, and the second build, with one threshold changed."""

    mix: Mix
    first: Build
    second: Build
    folder: Path
    recipe: dict[str, Any]


def run_mix(setting: Setting) -> Run:
    """Serve the mix, build it, change one threshold, build again; then write the labels."""
    work = setting.work
    mix = make_mix(setting.scale, food=setting.food, other=setting.other)
    trusted = pairs(setting.food, EXAMPLES * len(setting.food), seed=200)
    write_pairs(work / "examples", trusted)
    (work / "test").mkdir(exist_ok=True)
    for name, body in mix.test.items():
        (work / "test" / name).write_bytes(body)
    on_topic, aligned = thresholds(work / "clip", trusted)
    recipe = domain_recipe(work, on_topic, aligned)
    with serving(mix.bodies, []) as web:
        write_list(work / "list.parquet", mix, web)
        first = build(work, recipe, web)
        stricter = domain_recipe(work, on_topic, round(aligned + 0.02, 3))
        second = build(work, stricter, web)
    labels = {name: [getattr(row, name) for row in mix.rows] for name in ("path", "kind", "picture")}
    pq.write_table(pa.table(labels), work / "labels.parquet")
    return Run(mix, first, second, work / "food", recipe)


def domain_recipe(work: Path, on_topic: float, aligned: float) -> dict[str, Any]:
    """configs/curate/domain.yaml with what is the user's own put in: CLIP, paths, the two thresholds."""
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["measure"]["clip"] = {"name": f"local-dir:{work / 'clip'}"}
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
    asked, started = web.hits()["img"], time.monotonic()
    allow = f'--fetch.allow_addresses=["127.0.0.0/8:{web.port}"]'
    curate(work, "food", recipe, work / "list.parquet", allow, "--fetch.per_host_rate", "0")
    seconds = time.monotonic() - started
    columns = ["row", "kept", "split", "stage", "step", "reason", "value"]
    ledger = pq.read_table(work / "food" / "ledger.parquet", columns=columns).sort_by("row").to_pylist()
    return Build(ledger, seconds, web.hits()["img"] - asked)


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


def figures(run: Run) -> dict[str, Any]:
    """Precision, the least recall, the recall of each kind, and what the second build took."""
    kept = kept_rows(run.first)
    kinds = truths(run.mix, kept)
    recalls = {
        kind: _share(stayed == (kind == "clean") for stayed, found in zip(kept, kinds, strict=True) if found == kind)
        for kind in dict.fromkeys(sorted(kinds))
    }
    return {
        "precision": _share(kind == "clean" for stayed, kind in zip(kept, kinds, strict=True) if stayed),
        "recall": min(recalls.values()),
        **{f"recall_{kind.replace(', ', '_').replace(' ', '_').replace('-', '_')}": recalls[kind] for kind in recalls},
        "rows": len(kinds),
        "kept": sum(kept),
        "seconds_first": round(run.first.seconds, 1),
        "seconds_second": round(run.second.seconds, 1),
        "requests_first": run.first.requests,
        "requests_second": run.second.requests,
    }


def kept_rows(build: Build) -> list[bool]:
    """Which rows were kept to train on: `retain` is not the domain."""
    return [bool(line["kept"]) and line["split"] != "retain" for line in build.ledger]


def print_table(run: Run) -> None:
    """Each kind, how many rows of it were told right, and by which step."""
    kept = kept_rows(run.first)
    kinds = truths(run.mix, kept)
    print(f"on_topic, aligned: {[step for step in run.recipe['filters'] if step['name'] in ('on_topic', 'aligned')]}\n")
    print("| kind | rows | kept | recall | by |\n|---|---|---|---|---|")
    for kind in dict.fromkeys(row.kind for row in sorted(run.mix.rows, key=lambda row: row.kind)):
        places = [place for place, found in enumerate(kinds) if found == kind]
        stayed = sum(kept[place] for place in places)
        right = stayed if kind == "clean" else len(places) - stayed
        fates = Counter(_fate(run.first.ledger[place]) for place in places if not kept[place])
        by = ", ".join(f"{name} {count}" for name, count in fates.most_common())
        print(f"| {kind} | {len(places)} | {stayed} | {right / len(places):.3f} | {by} |")
    first, second = run.first, run.second
    print(
        f"\nfirst build {first.seconds:.1f} s, {first.requests:,} requests; one threshold changed: "
        f"{second.seconds:.1f} s, {second.requests:,} requests, {sum(kept_rows(second)):,} kept\n"
    )


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
