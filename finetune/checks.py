"""Mistakes in a configuration that need no model to be found.

Values out of bounds, missing files, keys that exclude each other; nothing heavy is imported, so they are told at once.

What only the device, the weights or the images can tell comes later, from whoever meets it first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from curate.errors import ConfigError, InputError, did_you_mean
from curate.files import check_writable
from curate.remote import address, shown
from curate.shards import SPLITS, shard_folder, shards_of
from finetune.config import (
    SHARDED,
    TORCHVISION,
    WEIGHTS,
    ClipConfig,
    DataConfig,
    EvaluateConfig,
    FitConfig,
    LabelledConfig,
    ProbeConfig,
    RobustnessConfig,
    TrainerConfig,
)
from finetune.keep import USUAL_GAIN, goal
from finetune.templates import templates_of

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
RETRIEVAL_METRICS = ("recall@1", "recall@5", "recall@10", "median_rank", "map")
ZERO_SHOT_METRICS = ("top1", "top5", "per_class_mean", "ece", "ece_fitted")


def check(config: FitConfig) -> None:
    """Check all that can be checked without the CLIP.

    Raises:
        ConfigError: one line, beginning with the key.
    """
    _check_bounds(config)
    check_writable("out", config.out)
    _check_trainer(config.trainer)
    _check_sharding(config)
    _check_clip(config.model.clip)
    _check_data(config)
    _check_evaluation(config.evaluate)
    _check_monitor(config)


def check_start(out: Path, ckpt_path: str | None, *, restart: bool) -> None:
    """Check that there is what a run is to go on from; whether it is whole, only reading it can tell.

    Args:
        out: folder of the run.
        ckpt_path: `last`, or a path; None: nothing is asked for.
        restart: forget what is there.

    Raises:
        ConfigError: both are asked for.
        InputError: there is no such checkpoint.
    """
    if ckpt_path is None:
        return
    if restart:
        raise ConfigError("ckpt_path: --restart begins anew; give one of the two")
    folder = out / "checkpoints"
    if ckpt_path == "last" and not any((folder / name).is_file() for name in ("last.ckpt", "previous.ckpt")):
        raise InputError(f"ckpt_path: {folder}: no checkpoint to go on from; leave --ckpt_path out to begin")
    if ckpt_path != "last" and not Path(ckpt_path).is_file():
        raise InputError(f"ckpt_path: {ckpt_path}: no such file; expected last or the path of a checkpoint")


# --- values ----------------------------------------------------------------------------------------------------------


def _at_least(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= least, f"at least {least}"


def _share(*, zero: bool = True, one: bool = True) -> tuple[Callable[[Any], bool], str]:
    words = f"{'0' if zero else 'above 0'} to {'1' if one else 'below 1'}"
    return lambda value: (value >= 0 if zero else value > 0) and (value <= 1 if one else value < 1), words


ABOVE_0: tuple[Callable[[Any], bool], str] = (lambda value: 0 < value < math.inf, "above 0")
ZERO_OR_MORE: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value < math.inf, "0 or more")
# What each value (of a list: each of its items) must be; null is left to its type.
BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed_everything": (lambda value: 0 <= value < 2**32, "0 to 4294967295"),
    "checkpoint_every_n_steps": _at_least(1),
    "trainer.num_nodes": _at_least(1),
    "trainer.max_epochs": _at_least(-1),
    "trainer.max_steps": _at_least(-1),
    "trainer.check_val_every_n_epoch": _at_least(1),
    "trainer.gradient_clip_val": (lambda value: 0 <= value < math.inf, "0 (none) or more"),
    "trainer.accumulate_grad_batches": _at_least(1),
    "trainer.log_every_n_steps": _at_least(1),
    "model.adapter.last_blocks": _at_least(1),
    "model.adapter.dropout": _share(one=False),
    "model.loss.label_smoothing": _share(one=False),
    "model.loss.logit_scale": (lambda value: 1 <= value <= 100, "1 to 100"),
    "model.loss.distill_feature": ZERO_OR_MORE,
    "model.loss.distill_logit": ZERO_OR_MORE,
    "model.loss.l2_start": ZERO_OR_MORE,
    "model.optimizer.lr": ABOVE_0,
    "model.optimizer.image_lr": ABOVE_0,
    "model.optimizer.text_lr": ABOVE_0,
    "model.optimizer.layer_decay": _share(zero=False),
    "model.optimizer.min_lr": ZERO_OR_MORE,
    "model.optimizer.warmup": _share(one=False),
    "model.optimizer.weight_decay": ZERO_OR_MORE,
    "model.optimizer.betas": _share(one=False),
    "model.optimizer.eps": ABOVE_0,
    "model.optimizer.ema": _share(zero=False, one=False),
    "model.compute.micro_batch_size": _at_least(1),
    "model.compute.patch_dropout": _share(one=False),
    "keep.budget": _share(one=False),
    "keep.interpolate": ZERO_OR_MORE,
    "data.batch_size": _at_least(2),
    "data.eval_batch_size": _at_least(1),
    "data.num_workers": _at_least(0),
    "data.replay": _share(one=False),
    "data.crop_scale": _share(zero=False),
    "data.max_broken": _share(one=False),
    "data.window": _at_least(2),
    "evaluate.max_retrieval": _at_least(2),
}


def _value(config: FitConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _check_bounds(config: FitConfig) -> None:
    for key, (holds, words) in BOUNDS.items():
        value = _value(config, key)
        values = value if isinstance(value, (list, tuple)) else [value]
        if wrong := [each for each in values if isinstance(each, (int, float)) and not holds(each)]:
            raise ConfigError(f"{key}: expected {words}, got {wrong[0]}")
    if config.model.optimizer.min_lr > config.model.optimizer.lr:
        raise ConfigError(
            f"model.optimizer.min_lr: expected at most the lr of {config.model.optimizer.lr}, "
            f"got {config.model.optimizer.min_lr}"
        )
    low, high = config.data.crop_scale
    if low > high:
        raise ConfigError(f"data.crop_scale: expected [smallest, largest], got [{low}, {high}]")
    for key in ("model.adapter.targets", "model.adapter.lock"):
        items = _value(config, key)
        if twice := [item for item in items if items.count(item) > 1]:
            raise ConfigError(f"{key}: '{twice[0]}' is there twice")
    if not config.model.adapter.targets:
        raise ConfigError("model.adapter.targets: empty; expected at least one, such as q, k, v, out, fc, proj")


# --- trainer ---------------------------------------------------------------------------------------------------------


def _check_trainer(config: TrainerConfig) -> None:
    if config.accelerator not in ACCELERATORS:
        raise ConfigError(
            f"trainer.accelerator: expected one of {', '.join(ACCELERATORS)}, got '{config.accelerator}'."
            + did_you_mean(config.accelerator, ACCELERATORS)
        )
    if config.accelerator == "cpu" and config.precision.startswith("16"):
        raise ConfigError(
            f"trainer.precision: {config.precision} needs a GPU, and trainer.accelerator is cpu; "
            "bf16-mixed or 32-true runs there"
        )
    _check_devices(config)
    interval = config.val_check_interval
    if interval is not None and not (interval >= 1 if isinstance(interval, int) else 0 < interval <= 1):
        raise ConfigError(
            "trainer.val_check_interval: expected steps (1 or more) or a share of an epoch (0.0 to 1.0), "
            f"got {interval}"
        )
    if config.check_val_every_n_epoch is None and not isinstance(interval, int):
        raise ConfigError("trainer.check_val_every_n_epoch: null needs a val_check_interval that counts steps")
    if isinstance(config.limit_val_batches, float) and not 0 <= config.limit_val_batches <= 1:
        raise ConfigError(
            f"trainer.limit_val_batches: expected batches (a whole number) or a share (0.0 to 1.0), "
            f"got {config.limit_val_batches}"
        )
    written = r"(?=.*[1-9])\d+:\d{2}:\d{2}:\d{2}"  # any time but none
    if config.max_time is not None and not re.fullmatch(written, config.max_time):
        raise ConfigError(f"trainer.max_time: expected DAYS:HH:MM:SS, such as 00:11:30:00, got '{config.max_time}'")


def _check_sharding(config: FitConfig) -> None:
    """What needs all weights in each process does not go with parts of them."""
    model = config.model
    asked = {
        "model.optimizer.ema": model.optimizer.ema,
        "model.compute.compile": model.compute.compile,
        f"model.loss.{model.loss.holds_to_start}": model.loss.holds_to_start,
        "trainer.gradient_clip_algorithm": config.trainer.gradient_clip_algorithm == "value",
    }
    if config.trainer.strategy == SHARDED and (wrong := [key for key, value in asked.items() if value]):
        raise ConfigError(f"{wrong[0]}: not with trainer.strategy {SHARDED}; leave it out, or take strategy: ddp")


def _check_devices(config: TrainerConfig) -> None:
    devices = config.devices
    expected = "trainer.devices: expected auto, -1 (all), a number of devices, or a list of theirs"
    if isinstance(devices, str) and not re.fullmatch(r"auto|-1|\d+(,\d+)*", devices):
        raise ConfigError(f"{expected}; got '{devices}'")
    if devices == 0 or (isinstance(devices, int) and devices < -1) or devices in ("0", []):
        raise ConfigError(f"{expected}; got {devices!r}")
    if isinstance(devices, list) and len(set(devices)) < len(devices):
        raise ConfigError(f"trainer.devices: one is listed twice: {devices}")
    if config.accelerator == "cpu" and (isinstance(devices, list) or devices in (-1, "-1")):
        raise ConfigError(f"trainer.devices: on a cpu it is the number of processes; got {devices}")


# --- model -----------------------------------------------------------------------------------------------------------


def _check_clip(clip: ClipConfig) -> None:
    """What cannot be a CLIP. Tags of known architectures and ids on the hub are left to the loader."""
    from curate.clip import OPENAI_NAMES, architectures

    name = clip.name
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") and not folder.is_dir():
        raise ConfigError(f"model.clip.name: {folder}: no such folder; expected one that `finetune export` wrote")
    if name.endswith((".json", *WEIGHTS)) and not Path(name).is_file():
        what = "an open_clip model configuration" if name.endswith(".json") else "a file of weights"
        raise ConfigError(f"model.clip.name: {name}: no such file; expected {what}")
    if re.fullmatch(r"[\w@.-]+", name) and not Path(name).exists():
        known = [*OPENAI_NAMES, *architectures()]
        if name not in known:
            raise ConfigError(f"model.clip.name: '{name}' is no architecture of open_clip.{did_you_mean(name, known)}")
    weights = clip.weights or ""
    if ("/" in weights or weights.endswith(WEIGHTS)) and not Path(weights).exists():
        raise ConfigError(f"model.clip.pretrained: {weights}: no such file; expected weights, or the name of a tag")
    if weights and Path(weights).is_dir():
        raise ConfigError(f"model.clip.pretrained: {weights} is a folder; as model.clip.name it is local-dir:{weights}")


# --- data ------------------------------------------------------------------------------------------------------------


def _check_data(config: FitConfig) -> None:
    data = config.data
    if not data.sources or data.dataset != DataConfig.dataset:
        _there("data.dataset", data.dataset, "a dataset that curate build or img2dataset made, or a list of images")
    for number, source in enumerate(data.sources):
        _there(f"data.sources[{number}].path", source.path, "a dataset, a folder of images or tars, or a list of them")
    if data.replay_dataset is not None:
        _there("data.replay_dataset", data.replay_dataset, "a dataset whose train split is replayed")
        if not data.replay:
            raise ConfigError("data.replay_dataset: nothing of it is replayed while data.replay is 0")
    if data.replay and data.replay_dataset is None and not _has_split(data.dataset, "retain"):
        raise ConfigError(
            f"data.replay: {data.replay} of each batch, but {shown(data.dataset)} has no retain split to replay; "
            "set it to 0, or name a data.replay_dataset"
        )
    if config.out.resolve() == data.dataset.resolve():
        raise ConfigError(f"out: {config.out} is the dataset itself; give the run a folder of its own")
    counts = [count_pairs(source.path, "train") for source in data.trained_on]
    if None in counts:  # known when it has been read
        return
    pairs = sum(round((count or 0) * source.weight) for count, source in zip(counts, data.trained_on, strict=True))
    if pairs < data.batch_size - round(data.batch_size * data.replay):
        where = ", ".join(shown(source.path) for source in data.trained_on)
        raise ConfigError(
            f"data.batch_size: {data.batch_size} pairs a step, but {where} has {pairs:,} to train on; "
            f"an eighth of them at most is a good batch: {max(2, pairs // 8)}"
        )


def _there(key: str, path: Path, expected: str) -> None:
    if address(path):
        shard_folder(path)  # tells what is wrong with it
        return
    if path.suffix == ".tar" and not path.is_dir():  # also webdataset's {00000..00009}.tar
        raise ConfigError(f"{key}: {path}: tars are read as a whole folder; give {path.parent}/")
    if not path.exists():
        raise ConfigError(f"{key}: {path}: no such {'folder' if not path.suffix else 'file'}; expected {expected}")
    if path.is_dir() and not any(path.iterdir()):
        raise ConfigError(f"{key}: {path}: an empty folder; expected {expected}")


def _has_split(dataset: Path, split: str) -> bool:
    return bool(shards_of(shard_folder(dataset), split))


def count_pairs(dataset: Path, split: str) -> int | None:
    """Pairs in a split, at most: what the footers of its shards say; None where there are none."""
    folder = shard_folder(dataset)
    stems = shards_of(folder, split)
    if not stems and split == "train" and not any(shards_of(folder, name) for name in SPLITS):
        stems = shards_of(folder)
    if not stems:
        return None
    import pyarrow.parquet as pq

    return sum(int(pq.read_metadata(stem.with_suffix(".parquet")).num_rows) for stem in stems)


# --- evaluation ------------------------------------------------------------------------------------------------------


def _check_evaluation(config: EvaluateConfig) -> None:
    for name, path in config.retrieval.items():
        key = f"evaluate.retrieval.{name}"
        _check_name(key, name)
        if name in SPLITS:
            raise ConfigError(f"{key}: this name is the dataset's own split's; choose another")
        _there(key, path, "a dataset that curate build or img2dataset made")
    for name, zero_shot in config.zero_shot.items():
        key = f"evaluate.zero_shot.{name}"
        _check_name(key, name)
        _check_labelled(key, zero_shot)
        if zero_shot.templates is not None:
            templates_of(zero_shot.templates, f"{key}.templates")


def check_probes(probes: Mapping[str, ProbeConfig], zero_shot: Collection[str]) -> None:
    """Check the linear probes of `finetune evaluate`.

    Args:
        probes: by name.
        zero_shot: names of the zero-shot sets, which a probe's test images are one of.

    Raises:
        ConfigError: one line, beginning with the key.
    """
    for name, probe in probes.items():
        key = f"probe.{name}"
        _check_name(key, name)
        if name in zero_shot:
            raise ConfigError(f"{key}: a zero-shot set has this name, which that of the probe's test images has too")
        if wrong := [shots for shots in probe.shots if shots < 1]:
            raise ConfigError(f"{key}.shots: expected at least 1, got {wrong[0]}")
        if probe.seed < 0:
            raise ConfigError(f"{key}.seed: expected 0 or more, got {probe.seed}")
        for split in ("train", "validation", "test"):
            if found := getattr(probe, split):
                _check_labelled(f"{key}.{split}", found)
        if probe.test.templates is not None:
            templates_of(probe.test.templates, f"{key}.test.templates")


def check_robustness(shifted: Mapping[str, RobustnessConfig], sets: Collection[str]) -> None:
    """Check the comparison of shifted sets with their references.

    Args:
        shifted: by the name of the shifted set.
        sets: names of the zero-shot sets that there are.

    Raises:
        ConfigError: one line, beginning with the key.
    """
    for name, asked in shifted.items():
        key = f"robustness.{name}"
        for where, each in ((key, name), (f"{key}.reference", asked.reference)):
            if each not in sets:
                raise ConfigError(f"{where}: no zero-shot set '{each}'.{did_you_mean(each, sets)}")
        if asked.reference == name:
            raise ConfigError(f"{key}.reference: expected another set than the shifted one itself")
        if wrong := [share for pair in asked.baseline for share in pair if not 0 <= share <= 1]:
            raise ConfigError(f"{key}.baseline: expected shares, 0 to 1, got {wrong[0]}")
        if asked.baseline and len({reference for reference, _ in asked.baseline}) < 2:
            raise ConfigError(f"{key}.baseline: a line needs two models of different accuracy on {asked.reference}")


def _check_labelled(key: str, labelled: LabelledConfig) -> None:
    images = labelled.images
    if str(images).startswith(TORCHVISION):
        if labelled.root is None:
            raise ConfigError(f"{key}.images: {images} needs `root`, the folder that torchvision keeps it in")
    elif images.is_file():
        if images.suffix not in (".csv", ".parquet"):
            raise ConfigError(f"{key}.images: {images}: expected a folder, FILE.csv, FILE.parquet or torchvision:NAME")
    elif not images.is_dir():
        raise ConfigError(f"{key}.images: {images}: no such folder; expected one with a sub-folder a class, or a table")
    elif labelled.root is not None:
        raise ConfigError(f"{key}.root: it is for torchvision's sets; {images} needs none")
    if labelled.classes and not labelled.classes.is_file():
        raise ConfigError(f"{key}.classes: {labelled.classes}: no such file; expected the name of a class on each line")


def _check_name(key: str, name: str) -> None:
    if not name or "/" in name:
        raise ConfigError(f"{key}: the name '{name}' has a slash, which separates the parts of a metric's name")


def _check_monitor(config: FitConfig) -> None:
    asked = config.evaluate.monitor
    if not shards_of(shard_folder(config.data.dataset)):
        return
    goal(config.keep, asked or USUAL_GAIN, list(_metrics(config)))
    if asked is None:
        return
    if not _has_split(config.data.dataset, "val"):
        raise ConfigError(
            f"evaluate.monitor: {shown(config.data.dataset)} has no val split, so nothing is measured in training"
        )
    known = [*_metrics(config), "val/loss"]
    if asked not in known:
        raise ConfigError(f"evaluate.monitor: nothing measures '{asked}'.{did_you_mean(asked, known)}")


def _metrics(config: FitConfig) -> Iterator[str]:
    """Every metric that these sets can give; small ones give fewer (finetune/evaluate.py)."""
    splits = [split for split in ("val", "retain") if _has_split(config.data.dataset, split)]
    for name in [*splits, *config.evaluate.retrieval]:
        for way in ("image_to_text", "text_to_image"):
            yield from (f"{name}/{way}/{metric}" for metric in RETRIEVAL_METRICS)
    for name in config.evaluate.zero_shot:
        yield from (f"zero_shot/{name}/{metric}" for metric in ZERO_SHOT_METRICS)
