"""What adapting gains and what it costs: full training, LoRA, LoRA with `retain.yaml`'s means, and open_clip_train.

    python benchmarks/adaptation.py             five seeds; about half an hour on one core
    python benchmarks/adaptation.py --quick     one seed, a third of the steps

The demo's small CLIP and its domain (`make demo`, steps 1 to 3; what is in ./demo-run is reused), its dataset split
anew into train, val and test. All see the same number of samples, in batches of 256, from the same start:

    full          all weights, domain pairs alone
    lora          LoRA, domain pairs alone
    retain        LoRA, three quarters of each batch general pairs, embeddings and weights held to the start, and the
                  best CLIP between start and end that loses at most a point on the retain split
    open_clip     open_clip_train, all weights, domain pairs alone; of three learning rates the best by the val split

`gain` is the zero-shot accuracy on digits that nobody trained on (top-1 of 10), after − before; `retention_loss` what
is lost of emoji → name (recall@1 of 1,454, the data that the CLIP was pretrained on), before − after; both of `retain`,
means over the seeds. The same of emoji that nothing replays (top-1 of 182) stand beside them. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from demo.run import RUN, prepare

DATASET = RUN / "digits-split"
WORK = RUN / "adaptation"
BATCH, STEPS = 256, 222
DOMAIN, GENERAL, UNSEEN = "zero_shot/digits/top1", "emoji/image_to_text/recall@1", "zero_shot/unseen_emoji/top1"
RECALL, CHOOSING = "test/text_to_image/recall@1", "zero_shot/val_digits/top1"
RATES = ("1e-3", "3e-4", "1e-4")  # of open_clip_train
Figures = dict[str, float]
ALONE = ["--data.replay", "0", "--keep.interpolate", "0"]
OURS = {
    "full": ["--model.adapter.kind", "full", "--model.optimizer.lr", "1e-3", *ALONE],
    "lora": ALONE,
    "retain": ["--data.replay", "0.75", "--model.loss.distill_feature", "0.3", "--model.loss.l2_start", "1e-3"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a third of the steps")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    seeds, steps = (1, STEPS // 3) if given.quick else (given.seeds, STEPS)
    prepare()
    split()
    shutil.rmtree(WORK / "runs", ignore_errors=True)
    start = evaluate(["--clip.name", f"local-dir:{RUN / 'pretrained'}"])
    rates = {rate: open_clip(0, rate, steps) for rate in RATES}
    rate = max(rates, key=lambda rate: rates[rate][CHOOSING])
    print(", ".join(f"open_clip_train at {r}: {f[CHOOSING]:.1%} on val" for r, f in rates.items()), flush=True)
    found: dict[str, list[Figures]] = {name: [] for name in (*OURS, "open_clip")}
    for seed in range(seeds):
        for name, options in OURS.items():
            found[name].append(ours(name, seed, options, steps))
        found["open_clip"].append(open_clip(seed, rate, steps) if seed else rates[rate])
        told = ", ".join(f"{name} {runs[-1][DOMAIN]:.1%} / {runs[-1][GENERAL]:.1%}" for name, runs in found.items())
        print(f"seed {seed}, digits / emoji: {told}", flush=True)
    print_table(start, found, rate, steps)
    print(json.dumps(figures(start, found)))


# --- the data ---------------------------------------------------------------------------------------------------------


def split() -> None:
    """The demo's dataset with a val and a test split: what was downloaded and measured for it is taken again."""
    if not DATASET.is_dir():
        shutil.copytree(RUN / "digits", DATASET)
    web, _, closed = json.loads((RUN / "ports.json").read_text())
    allow = f'--fetch.allow_addresses=["127.0.0.0/8:{web}","127.0.0.0/8:{closed}"]'
    command = ["curate", "build", "--config", "configs/curate/demo.yaml", "--out", str(DATASET)]
    run_command(
        [*command, "--urls", str(RUN / "lists/domain.parquet"), allow, "--pack.val", "0.15", "--pack.test", "0.2"]
    )
    shutil.rmtree(WORK, ignore_errors=True)
    captions = _extract("val", WORK / "val")
    digits = {path.name for path in (RUN / "test_digits").iterdir()}
    for file, caption in captions.items():  # a folder a class: "three, written by hand" → three
        for digit in digits & set(re.findall(r"\w+", caption)):
            folder = WORK / "val_digits" / digit
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder)
    with (WORK / "train.csv").open("w", newline="") as table:
        writer = csv.writer(table, delimiter="\t")
        writer.writerows([("filepath", "title"), *_extract("train", WORK / "train").items()])


def _extract(split: str, folder: Path) -> dict[Path, str]:
    """The images of a split as files, with their captions."""
    found: dict[Path, str] = {}
    for shard in sorted((DATASET / "shards").glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            tar.extractall(folder, filter="data")
        rows = pq.read_table(shard.with_suffix(".parquet"), columns=["key", "caption"]).to_pylist()
        captions = {row["key"]: row["caption"] for row in rows}
        files = [file for file in sorted(folder.iterdir()) if file.suffix not in (".txt", ".json")]
        found |= {file: captions[file.stem] for file in files if file.stem in captions}
    return found


# --- the arms ---------------------------------------------------------------------------------------------------------


def ours(name: str, seed: int, options: Sequence[str], steps: int) -> Figures:
    """`finetune fit` with the demo's configuration, and its figures by `finetune evaluate`."""
    run = WORK / "runs" / f"{name}-{seed}"
    command = ["finetune", "fit", "--config", "configs/demo.yaml", "--out", str(run)]
    common = ["--seed_everything", str(seed), "--trainer.max_epochs", "null", "--trainer.max_steps", str(steps)]
    data = ["--data.dataset", str(DATASET), "--data.batch_size", str(BATCH)]
    sets = ["--evaluate.monitor", CHOOSING, "--evaluate.zero_shot.val_digits.images", str(WORK / "val_digits")]
    templates = ["--evaluate.zero_shot.val_digits.templates", '["a handwritten {}"]']
    run_command([*command, *common, *data, *sets, *templates, *options])
    return evaluate(["--run", str(run)])


def open_clip(seed: int, rate: str, steps: int) -> Figures:
    """open_clip_train with its own defaults but for the rate, the warm-up and the batch."""
    pairs = len((WORK / "train.csv").read_text().splitlines()) - 1
    epochs, name = round(steps / (pairs // BATCH)), f"open_clip-{seed}-{rate}"
    command = [sys.executable, "-m", "open_clip_train.main", "--model", f"local-dir:{RUN / 'pretrained'}"]
    data = ["--dataset-type", "csv", "--train-data", str(WORK / "train.csv"), "--workers", "1"]
    step = ["--batch-size", str(BATCH), "--epochs", str(epochs), "--lr", rate, "--warmup", str(steps // 16)]
    how = ["--precision", "fp32", "--device", "cpu", "--seed", str(seed), "--save-frequency", str(epochs)]
    run_command([*command, *data, *step, *how, "--logs", str(WORK / "runs"), "--name", name])
    weights = WORK / "runs" / name / "checkpoints" / f"epoch_{epochs}.pt"
    return evaluate(["--clip.name", _architecture(), "--clip.pretrained", str(weights)])


def _architecture() -> str:
    """The start's architecture as a file of its own: weights of a run of open_clip_train bring none."""
    path = WORK / "architecture.json"
    path.write_text(json.dumps(json.loads((RUN / "pretrained/open_clip_config.json").read_text())["model_cfg"]))
    return str(path)


def evaluate(clip: Sequence[str]) -> Figures:
    """Every figure of a CLIP on the same sets, by `finetune evaluate`."""
    sets = WORK / "sets.yaml"
    told = {
        "zero_shot": {
            "digits": {"images": str(RUN / "test_digits"), "templates": ["a handwritten {}"]},
            "val_digits": {"images": str(WORK / "val_digits"), "templates": ["a handwritten {}"]},
            "unseen_emoji": {"images": str(RUN / "unseen_emoji"), "templates": ["a picture of {}"]},
        },
        "retrieval": {"emoji": str(RUN / "general")},
    }
    sets.write_text(json.dumps({"dataset": str(DATASET), "split": "test", "evaluate": told}))
    (read,) = json.loads(run_command(["finetune", "evaluate", "--config", str(sets), *clip, "--json"])).values()
    return {metric: cell["value"] for metric, cell in read.items()}


def run_command(command: Sequence[str]) -> str:
    """Standard output of a command; it must succeed."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stdout


# --- what came out ----------------------------------------------------------------------------------------------------


def print_table(start: Figures, found: Mapping[str, list[Figures]], rate: str, steps: int) -> None:
    """Means over the seeds, and their standard deviations."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "open_clip_torch"))
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, {packages}; {steps * BATCH:,} samples seen")
    print(f"open_clip_train's learning rate: {rate}\n")
    print("| | digits, zero-shot top-1 | test, caption → image recall@1 | emoji, recall@1 | emoji unseen, top-1 |")
    print("|---|---|---|---|---|")
    metrics = (DOMAIN, RECALL, GENERAL, UNSEEN)
    print(f"| the start | {' | '.join(f'{start[metric]:.1%}' for metric in metrics)} |")
    for name, runs in found.items():
        cells = [_spread([run[metric] for run in runs]) for metric in metrics]
        print(f"| {name} | {' | '.join(cells)} |")


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1%}" + (f" ± {stdev(values):.1%}" if len(values) > 1 else "")


def figures(start: Figures, found: Mapping[str, list[Figures]]) -> dict[str, Any]:
    """The last line: `gain` and `retention_loss` as shares, of `retain` and of open_clip_train."""
    told: dict[str, Any] = {"seeds": len(found["retain"])}
    for name, suffix in (("retain", ""), ("open_clip", "_open_clip"), ("full", "_full"), ("lora", "_lora")):
        runs = found[name]
        told[f"gain{suffix}"] = round(mean(run[DOMAIN] for run in runs) - start[DOMAIN], 4)
        told[f"retention_loss{suffix}"] = round(start[GENERAL] - mean(run[GENERAL] for run in runs), 4)
        told[f"unseen_loss{suffix}"] = round(start[UNSEEN] - mean(run[UNSEEN] for run in runs), 4)
    return told


if __name__ == "__main__":
    main()
