"""One training run: a folder that the same command continues, and that says what it was made of.

RUN/config.yaml, inputs.json, changes.json      what it is made of (finetune/folder.py)
RUN/checkpoints/last.ckpt  where the run goes on; previous.ckpt: the one before; best.ckpt: the best of the
validations by `evaluate.monitor`
RUN/metrics.csv  tensorboard/
RUN/before.json  evaluation.json  examples.json      (finetune/callback.py)
RUN/finished.json          written last
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.errors import ConfigError, did_you_mean
from curate.files import write_text
from curate.remote import shown
from finetune.checks import check_start
from finetune.config import SHARDED, FitConfig, TrainerConfig
from finetune.folder import begin, checkpoint_to_start_from, forget, is_first_process, only_process
from finetune.keep import LOWER_IS_BETTER, TRADE_OFF, USUAL_GAIN, Goal, goal

if TYPE_CHECKING:
    from lightning import Callback, Trainer

    from finetune.data import CLIPDataModule
    from finetune.module import CLIPModule
    from finetune.plan import Plan

logger = logging.getLogger("cliptailor")

FEATURES = ".features"  # beside `out`: embeddings of locked towers, for other runs too


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
    with only_process(config.out), _quiet():
        if restart and is_first_process():
            forget(config.out)
        # Another rank may see what rank 0 is just forgetting.
        is_forgotten = restart and not is_first_process()
        start = None if is_forgotten else checkpoint_to_start_from(config.out, ckpt_path)
        if not is_forgotten and begin(config, changed=changed, goes_on=start is not None):
            logger.info("%s: finished already; nothing to do", config.out)
            return _result(config.out, finished_before=True)
        try:
            return _run(config, start, anew=changed, profile=profile)
        except Interrupted as stop:
            logger.warning("%s: interrupted; the same command continues it", config.out)
            if stop.code == 130:
                raise KeyboardInterrupt from None
            raise


def _result(out: Path, **how: bool) -> FitResult:
    best = out / "checkpoints" / "best.ckpt"
    return FitResult(
        run=out,
        last=out / "checkpoints" / "last.ckpt",
        best=best if best.is_file() else None,
        evaluation=out / "evaluation.json",
        **how,
    )


def _run(config: FitConfig, start: Path | None, *, anew: bool, profile: bool = False) -> FitResult:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from finetune.plan import tell

    resumed = start is not None
    module, data, trainer = _prepare(config, anew=anew)
    if profile:
        from finetune.profiling import Profile

        trainer.callbacks.append(Profile(config.out / "profile"))  # type: ignore[attr-defined]
    if is_first_process():
        tell(_plan(config, module, data, trainer))
    if resumed:
        logger.info("%s: going on from %s", config.out, start)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error
    if trainer.is_global_zero:
        if trainer.global_step < (steps := module.total_steps()):
            logger.warning("%s: trainer.max_time ended it after %d of %d steps", config.out, trainer.global_step, steps)
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
        given["val_check_interval"] *= config.trainer.accumulate_grad_batches  # it counts batches
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
        Alarms(config.trainer.log_every_n_steps),
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
            f"evaluate.monitor: {shown(config.data.dataset)} has no val split, so nothing is measured in training"
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
    names = ["lightning.pytorch", "lightning.fabric"] + ([] if is_first_process() else [logger.name])
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
