"""One training run: a folder that the same command continues, and that says what it was made of.

    RUN/config.yaml            the configuration
    RUN/inputs.json            fingerprints of the dataset and of the weights that training starts from
    RUN/checkpoints/last.ckpt  where the run goes on; previous.ckpt: the one before; best.ckpt: the best of the
                               validations by `evaluate.monitor`
    RUN/changes.json           what was changed while it was interrupted
    RUN/metrics.csv  tensorboard/
    RUN/before.json  evaluation.json  examples.json      (finetune/callback.py)
    RUN/finished.json          written last

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
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from curate.clip import weights_fingerprint
from curate.errors import Busy, ConfigError, InputError, did_you_mean
from curate.options import read_config
from curate.shards import fingerprint, sweep, write_text
from finetune.checks import check_start
from finetune.config import SHARDED, FitConfig, TrainerConfig
from finetune.keep import LOWER_IS_BETTER, TRADE_OFF, USUAL_GAIN, Goal, goal
from finetune.runs import INTERPOLATED

if TYPE_CHECKING:
    from lightning import Callback, Trainer

    from finetune.data import CLIPDataModule
    from finetune.module import CLIPModule
    from finetune.plan import Plan

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
FEATURES = ".features"  # beside `out`: embeddings of locked towers, for other runs too
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


@dataclass(frozen=True)
class FitResult:
    """Where the result of a run lies.

    Attributes:
        run: its folder.
        last: the checkpoint of the last step.
        best: the best by the monitored metric; None where nothing was monitored.
        evaluation: before and after, evaluation.json.
        resumed: whether this call continued an interrupted run.
        finished_before: whether there was nothing left to do.
    """

    run: Path
    last: Path
    best: Path | None
    evaluation: Path
    resumed: bool = False
    finished_before: bool = False


def plan(config: FitConfig) -> Plan:
    """What `fit` would do; nothing is written, nothing trained.

    Raises:
        ConfigError, InputError, ModelError: as `fit`.
    """
    import lightning.pytorch  # noqa: F401 - sets its loggers' levels when it is imported

    with _quiet():
        return _plan(config, *_prepare(config))


def fit(
    config: FitConfig,
    *,
    restart: bool = False,
    changed: bool = False,
    ckpt_path: str | None = None,
    profile: bool = False,
) -> FitResult:
    """Train as configured, or go on where the same run was interrupted, or do nothing if it is finished.

    Args:
        config: everything.
        restart: forget what an earlier run left in `config.out`.
        changed: go on although the data or a key that matters is another.
        ckpt_path: `last`: there must be something to go on from; or the checkpoint to go on from, of this run or, into
            a new folder, of another.
        profile: look at a few steps, and write down where their time went (finetune/profiling.py).

    Raises:
        ConfigError: `config.out` holds a run of another configuration or other inputs, or what is no run; or a key does
            not fit the rest.
        InputError: the dataset cannot be read; or there is no whole checkpoint where there should be one.
        ModelError: the CLIP cannot be had, or does not fit the adapter.
        Busy: another process is training into the same folder.
        KeyboardInterrupt: Ctrl-C, after saving a checkpoint; SIGTERM raises SystemExit(143), SIGUSR1 SystemExit(138).
    """
    from finetune.checkpoints import Interrupted

    check_start(config.out, ckpt_path, restart=restart)
    with _only_process(config.out), _quiet():
        if restart and _is_first_process():
            _forget(config.out)
        start = _start(config.out, ckpt_path)
        _begin(config, changed=changed, goes_on=start is not None)
        if (config.out / "finished.json").is_file():
            logger.info("%s: finished already; nothing to do", config.out)
            return _result(config.out, finished_before=True)
        try:
            return _run(config, start, anew=changed, profile=profile)
        except Interrupted as stop:
            logger.warning("%s: interrupted; the same command continues it", config.out)
            if stop.code == 130:
                raise KeyboardInterrupt from None
            raise


# --- the folder of a run ----------------------------------------------------------------------------------------------


@contextmanager
def _only_process(out: Path) -> Iterator[None]:
    """Hold the folder's lock; ranks that Lightning started beside this process share it."""
    out.mkdir(parents=True, exist_ok=True)
    if not _is_first_process():
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


def _is_first_process() -> bool:
    """Whether this is rank 0: Lightning, torchrun or SLURM runs the same command for each of the others."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"))


def _forget(out: Path) -> None:
    """Remove what a run left.

    Raises:
        ConfigError: it was none; someone else's files have such names.
    """
    found = [out / name for name in OURS if (out / name).exists()]
    if found and not (out / "inputs.json").is_file():
        raise ConfigError(f"out: {found[0]} is there, but no run of `finetune fit`; give another `out`")
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _start(out: Path, ckpt_path: str | None) -> Path | None:
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
    if other != out.resolve() and _is_first_process():
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
    _forget(out)
    for name in (*needed, "metrics.csv", "changes.json"):
        if (other / name).is_file():
            shutil.copy(other / name, out / name)


def _begin(config: FitConfig, *, changed: bool = False, goes_on: bool = False) -> None:
    """Write down what this run is made of, or check that it is what an earlier call wrote.

    An earlier call that trained nothing, because its dataset was wrong, say, is forgotten.
    """
    written = _plain(asdict(config))
    inputs = _inputs(config)
    path = config.out / "config.yaml"
    if not _is_first_process():
        return
    finished = config.out / "finished.json"
    if not goes_on and not finished.is_file():
        _forget(config.out)
    if path.is_file():
        before = _plain(asdict(read_config(path, FitConfig)))  # keys that it does not know yet have their defaults
        differ = _differences(_flat(before), _flat(written))
        differ |= _differences(json.loads(path.with_name("inputs.json").read_text()), inputs)
        if not differ or (finished.is_file() and differ.keys() <= set(RECUT)):
            return
        _check_may_differ(config.out, differ, changed=changed)
        if finished.is_file():
            _unfinish(config.out)
        _note_changes(config.out / "changes.json", differ)
    write_text(path.with_name("inputs.json"), json.dumps(inputs, indent=1))
    write_text(path, yaml.safe_dump(written, sort_keys=False, allow_unicode=True))


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
    return str(value) if isinstance(value, Path) else value


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _result(out: Path, **how: bool) -> FitResult:
    best = out / "checkpoints" / "best.ckpt"
    return FitResult(
        run=out,
        last=out / "checkpoints" / "last.ckpt",
        best=best if best.is_file() else None,
        evaluation=out / "evaluation.json",
        **how,
    )


# --- training ---------------------------------------------------------------------------------------------------------


def _run(config: FitConfig, start: Path | None, *, anew: bool, profile: bool = False) -> FitResult:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from finetune.plan import tell

    resumed = start is not None
    module, data, trainer = _prepare(config, anew=anew)
    if profile:
        from finetune.profiling import Profile

        trainer.callbacks.append(Profile(config.out / "profile"))  # type: ignore[attr-defined]
    if _is_first_process():
        tell(_plan(config, module, data, trainer))
    if resumed:
        logger.info("%s: going on from %s", config.out, start)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error
    if trainer.is_global_zero:
        write_text(config.out / "finished.json", json.dumps({"steps": trainer.global_step}))
    return _result(config.out, resumed=resumed)


def _prepare(config: FitConfig, *, anew: bool = False) -> tuple[CLIPModule, CLIPDataModule, Trainer]:
    """Everything that training needs, made from the same seed each time."""
    import lightning

    from finetune.data import CLIPDataModule
    from finetune.module import CLIPModule
    from finetune.sharded import ShardedCLIPModule

    lightning.seed_everything(config.seed_everything, verbose=False)
    model = config.model
    kind = ShardedCLIPModule if config.trainer.strategy == SHARDED else CLIPModule
    module = kind(model.clip, model.adapter, model.loss, model.optimizer, model.compute)
    features = config.out.parent / FEATURES
    data = CLIPDataModule(config.data, seed=config.seed_everything, features=features, anew=anew)
    return module, data, _trainer(config, anew=anew)


def _plan(config: FitConfig, module: CLIPModule, data: CLIPDataModule, trainer: Trainer) -> Plan:
    from finetune.plan import make_plan

    data.setup()
    return make_plan(config, module, data, trainer)


def _on_cuda(config: TrainerConfig) -> bool:
    import torch

    return config.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _precision(config: TrainerConfig) -> str:
    import torch

    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if _on_cuda(config) and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def _trainer(config: FitConfig, *, anew: bool) -> Trainer:
    import lightning
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.loggers import TensorBoardLogger

    from finetune.checkpoints import AtomicCheckpointIO
    from finetune.loggers import MetricsFile
    from finetune.sharded import Sharding

    given = asdict(config.trainer) | {"precision": _precision(config.trainer)}
    if config.trainer.strategy == SHARDED:
        given["strategy"] = Sharding()
    if given.pop("tf32") and _on_cuda(config.trainer):
        torch.set_float32_matmul_precision("high")
    if isinstance(config.trainer.val_check_interval, int):
        # Else Lightning counts steps anew in each epoch, and refuses an interval longer than one.
        given["check_val_every_n_epoch"] = None
    shown = given.pop("enable_progress_bar") and sys.stderr.isatty()
    try:
        return lightning.Trainer(
            **given,
            default_root_dir=config.out,
            callbacks=_callbacks(config, shown=shown, anew=anew),
            logger=[
                MetricsFile(config.out / "metrics.csv"),
                TensorBoardLogger(config.out, name="tensorboard", version="", default_hp_metric=False),
            ],
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=shown,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error


def _callbacks(config: FitConfig, *, shown: bool, anew: bool) -> list[Any]:
    from lightning.pytorch.callbacks import RichProgressBar

    from finetune.alarms import Alarms
    from finetune.averaging import MovingAverage
    from finetune.callback import EvaluationCallback
    from finetune.checkpoints import EpochLength, GivenRates, KeepBest, KeepLast, RandomState
    from finetune.loggers import ProgressLines

    folder = config.out / "checkpoints"
    evaluation = EvaluationCallback(config.evaluate, config.data, config.out, config.keep)
    callbacks: list[Callback] = [
        evaluation,
        Alarms(config.trainer.log_every_n_steps, config.checkpoint_every_n_steps),
        RandomState(),
        EpochLength(),
        *([GivenRates()] if anew else []),
        RichProgressBar() if shown else ProgressLines(),
    ]
    if decay := config.model.optimizer.ema:
        callbacks.append(MovingAverage(decay))
    monitor = _monitor(config, evaluation.metrics)
    evaluation.goal = _goal(config, monitor, evaluation.metrics)
    if evaluation.goal:
        monitor = TRADE_OFF
    if monitor:
        mode = "min" if monitor.endswith(LOWER_IS_BETTER) else "max"
        callbacks.append(KeepBest(folder, monitor, mode))
    return [*callbacks, KeepLast(folder, config.checkpoint_every_n_steps)]


def _monitor(config: FitConfig, metrics: list[str]) -> str | None:
    """The metric that picks the best checkpoint; None: the last is the best.

    Raises:
        ConfigError: the metric that was asked for will not be measured in training.
    """
    from finetune.data import has_split

    validated = has_split(config.data.dataset, "val")
    known = [*metrics, "val/loss"]
    asked = config.evaluate.monitor
    if asked is None:
        return USUAL_GAIN if validated and USUAL_GAIN in known else None
    if not validated:
        raise ConfigError(
            f"evaluate.monitor: {config.data.dataset} has no val split, so nothing is measured in training"
        )
    if asked not in known:
        raise ConfigError(f"evaluate.monitor: nothing measures '{asked}'.{did_you_mean(asked, known)}")
    return asked


def _goal(config: FitConfig, gain: str | None, metrics: list[str]) -> Goal | None:
    """What is weighed against what; None from random weights, which know nothing that could be kept."""
    return None if config.model.clip.is_random else goal(config.keep, gain, metrics)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's adverts, and without its hints at what is so on purpose here."""
    names = ["lightning.pytorch", "lightning.fabric"] + ([] if _is_first_process() else [logger.name])
    talkers = [logging.getLogger(name) for name in names]
    levels = [talker.level for talker in talkers]
    for talker in talkers:
        talker.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for hint in (
            r".*module\(s\) in eval mode at the start of training",  # locked towers, frozen statistics
            r".*does not have many workers",
            r"Total length of `list` across ranks is zero",  # no val split
            r".*smaller than the logging interval",
            r".*treespec, LeafSpec",  # Lightning 2.6 on recent torch
            r"Checkpoint directory .* exists and is not empty",
            r"Be aware that when using `ckpt_path`",  # another evaluate.monitor than before
        ):
            warnings.filterwarnings("ignore", message=hint)
        try:
            yield
        finally:
            for talker, level in zip(talkers, levels, strict=True):
                talker.setLevel(level)
