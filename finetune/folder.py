"""The folder of a run: whose it is, what it was begun with, and what may be another when it goes on.

    RUN/config.yaml            the configuration
    RUN/inputs.json            fingerprints of the dataset and of the weights that training starts from
    RUN/changes.json           what was changed while it was interrupted

A run goes on under the configuration and the inputs it was begun with, as far as they matter to its result. With
another batch or number of devices it goes on at the same sample, and says so; with other data or another key that
matters only if told to (`changed`). A folder that is no run's is left alone.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from curate.clip import weights_fingerprint
from curate.errors import Busy, ConfigError, InputError
from curate.files import fingerprint, sweep, write_text
from curate.options import read_config
from curate.remote import shown
from finetune.config import FitConfig
from finetune.runs import INTERPOLATED

logger = logging.getLogger("cliptailor")

# What a run may be continued with another value of: its result does not depend on it.
IMMATERIAL = (
    "out",
    "checkpoint_every_n_steps",
    "trainer.accelerator",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "trainer.detect_anomaly",
    "data.dataset",  # its content counts, not its place
    "data.sources",  # likewise: their pairs, weights and templates are in the fingerprint
    "data.replay_dataset",
    "data.window",  # likewise, where it plays a part
    "data.num_workers",
    "data.max_broken",
    "data.eval_batch_size",
)
# What it may be continued with another value of without further ado: it goes on at the same sample.
RECUT = (
    "data.batch_size",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accumulate_grad_batches",
)
# What a checkpoint is made of: with others there is nothing to go on from.
FIXED = (
    "weights",
    "model.clip.",
    "model.adapter.",
    "model.loss.kind",
    "model.loss.distill_",
    "model.loss.l2_start",
    "model.optimizer.ema",
    "model.optimizer.layer_decay",
    "model.optimizer.image_lr",
    "model.optimizer.text_lr",
)
OURS = (
    "config.yaml",
    "inputs.json",
    "changes.json",
    "checkpoints",
    "metrics.csv",
    "tensorboard",
    "profile",
    "before.json",
    "interpolation.json",
    "evaluation.json",
    "examples.json",
    "report.html",
    "finished.json",
)


@contextmanager
def only_process(out: Path) -> Iterator[None]:
    """Hold the folder's lock; ranks that Lightning started beside this process share it."""
    out.mkdir(parents=True, exist_ok=True)
    if not is_first_process():
        yield
        return
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{out}: another process is training here; wait for it or give another `out`") from None
        sweep(out)
        sweep(out / "checkpoints")
        yield


def is_first_process() -> bool:
    """Whether this is rank 0: Lightning, torchrun or SLURM runs the same command for each of the others."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"))


def forget(out: Path) -> None:
    """Remove what a run left.

    Raises:
        ConfigError: it was none; someone else's files have such names.
    """
    found = [out / name for name in OURS if (out / name).exists()]
    if found and not (out / "inputs.json").is_file():
        raise ConfigError(f"out: {found[0]} is there, but no run of `finetune fit`; give another `out`")
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def checkpoint_to_start_from(out: Path, ckpt_path: str | None) -> Path | None:
    """The checkpoint to go on from; None: from the beginning. From another run's, its figures are taken along.

    Raises:
        InputError: none that is whole.
        ConfigError: another run's, but there is a run here.
    """
    from finetune.checkpoints import damage_of, newest_checkpoint

    folder = out / "checkpoints"
    if ckpt_path in (None, "last"):
        return newest_checkpoint(folder)
    path = Path(ckpt_path)
    if damage := damage_of(path):
        raise InputError(f"ckpt_path: {path} is damaged ({damage})")
    other = path.resolve().parent.parent
    if other != out.resolve() and is_first_process():
        if any(folder.glob("*.ckpt")):
            raise ConfigError(f"ckpt_path: {path} is of another run, but {out} holds one already; give another `out`")
        _take_along(other, out)
        best = path.with_name("best.ckpt")
        if best.is_file() and best.stat().st_mtime <= path.stat().st_mtime:  # else it is of later steps
            folder.mkdir(exist_ok=True)
            shutil.copy(best, folder)
    return path


def _take_along(other: Path, out: Path) -> None:
    """Copy what a run is compared with when it is continued, and what it has measured so far."""
    needed = ("inputs.json", "config.yaml", "before.json")
    if missing := [name for name in needed if not (other / name).is_file()]:
        raise InputError(f"ckpt_path: {other}: no {missing[0]}; expected a checkpoint in the folder of a run")
    forget(out)
    for name in (*needed, "metrics.csv", "changes.json"):
        if (other / name).is_file():
            shutil.copy(other / name, out / name)


def begin(config: FitConfig, *, changed: bool = False, goes_on: bool = False) -> bool:
    """Write down what this run is made of, or check that it is what an earlier call wrote; whether it is finished.

    An earlier call that trained nothing, because its dataset was wrong, say, is forgotten.
    """
    written = _plain(asdict(config))
    inputs = _inputs(config)
    path, finished = config.out / "config.yaml", config.out / "finished.json"
    if not is_first_process():
        # Looked at again: rank 0 may be about to go on, and removes it before it writes down with what.
        return finished.is_file() and _stays_finished(_compared(path, written, inputs)[1]) and finished.is_file()
    if not goes_on and not finished.is_file():
        forget(config.out)
    if path.is_file():
        before, differ = _compared(path, written, inputs)
        if finished.is_file() and differ and _stays_finished(differ):
            return True
        if not differ:
            if before != written:  # the dataset lies elsewhere now, say
                write_text(path, yaml.safe_dump(written, sort_keys=False, allow_unicode=True))
            return finished.is_file()
        _check_may_differ(config.out, differ, changed=changed)
        if finished.is_file():
            _unfinish(config.out)
        _note_changes(config.out / "changes.json", differ)
    write_text(path.with_name("inputs.json"), json.dumps(inputs, indent=1))
    write_text(path, yaml.safe_dump(written, sort_keys=False, allow_unicode=True))
    return finished.is_file()


def _compared(path: Path, written: dict[str, Any], inputs: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of the earlier call, and what differs from it."""
    before = _plain(asdict(read_config(path, FitConfig)))  # keys that it does not know yet have their defaults
    was = json.loads(path.with_name("inputs.json").read_text())
    return before, _differences(_flat(before), _flat(written)) | _differences(was, inputs)


def _stays_finished(differ: Collection[str]) -> bool:
    return set(differ) <= set(RECUT)


def _inputs(config: FitConfig) -> dict[str, str]:
    from finetune.data import data_fingerprint, split_digests

    clip = config.model.clip
    return {
        "dataset": data_fingerprint(config.data),
        "val": fingerprint(split_digests(config.data.dataset, "val")),
        "weights": fingerprint(weights_fingerprint(clip.name, clip.pretrained)),
    }


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What was and is, of the keys that matter."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in IMMATERIAL]
    return {key: (before.get(key), now.get(key)) for key in keys}


def _check_may_differ(out: Path, differ: dict[str, tuple[Any, Any]], *, changed: bool) -> None:
    """Tell what differs from the earlier call.

    Raises:
        ConfigError: the run cannot go on with that, or not without a word.
    """
    told = {key: f"{key} was {before!r} and is {now!r}" for key, (before, now) in differ.items()}
    where = f"{out}: an earlier run was made with something else"
    if fixed := [text for key, text in told.items() if key.startswith(FIXED)]:
        raise ConfigError(
            f"{where}: {'; '.join(fixed[:3])}. Its checkpoints do not fit that: give another `out`, or --restart"
        )
    material = [text for key, text in told.items() if key not in RECUT]
    if material and not changed:
        raise ConfigError(
            f"{where}: {'; '.join(material[:3])}. Give another `out`, or --restart, or --continue_changed to go on so"
        )
    logger.warning("%s: goes on, but %s", out, "; ".join(told.values()))


def _unfinish(out: Path) -> None:
    """Forget the end of a run that is to go on."""
    for name in ("finished.json", "interpolation.json", "evaluation.json", "examples.json", "report.html"):
        (out / name).unlink(missing_ok=True)
    (out / "checkpoints" / INTERPOLATED).unlink(missing_ok=True)


def _note_changes(path: Path, differ: dict[str, tuple[Any, Any]]) -> None:
    """Add to what was changed while the run was interrupted."""
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    said.append({key: {"was": before, "is": now} for key, (before, now) in differ.items()})
    write_text(path, json.dumps(said, indent=1))


def _plain(value: Any) -> Any:
    """The same in what YAML knows."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return shown(value) if isinstance(value, Path) else value


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
