from __future__ import annotations

import csv
import json
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch

from curate.errors import Busy, ConfigError, InputError
from finetune import folder
from finetune.checkpoints import (
    AtomicCheckpointIO,
    Interrupted,
    KeepBest,
    KeepLast,
    RandomState,
    random_state,
    set_random_state,
    write_checkpoint,
)
from finetune.config import (
    AdapterConfig,
    ClipConfig,
    DataConfig,
    EvaluateConfig,
    FitConfig,
    KeepConfig,
    ModelConfig,
    OptimizerConfig,
    TrainerConfig,
)
from finetune.fit import _prepare, fit
from finetune.loggers import MetricsFile
from finetune.module import CLIPModule
from finetune.runs import run_config
from finetune.schedule import Schedule
from tests.finetune import tiny

STEPS = 10  # an epoch: 40 samples, 4 of them fresh in a batch of 5


@pytest.fixture(scope="module")
def config(dataset, architectures) -> FitConfig:
    """Two epochs with everything that draws random numbers: dropout, crops, replay; validation in mid-epoch too."""
    return FitConfig(
        seed_everything=3,
        checkpoint_every_n_steps=3,
        trainer=TrainerConfig(max_epochs=2, accelerator="cpu", log_every_n_steps=1, val_check_interval=5),
        model=ModelConfig(
            clip=ClipConfig(name=architectures["tiny-vit"], pretrained=None),
            adapter=AdapterConfig(rank=2, dropout=0.3),
            optimizer=OptimizerConfig(lr=1e-2),
        ),
        data=DataConfig(dataset=dataset, batch_size=5, replay=0.2, num_workers=0, crop_scale=(0.5, 1.0)),
    )


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    fit(replace(config, out=out))
    return out


def loaded(path):
    return torch.load(path, weights_only=True)  # noqa: TID251 - written by the tests


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    path = run / "checkpoints" / f"{name}.ckpt"
    return loaded(path)["state_dict"]


def assert_same_run(run: Path, unbroken: Path) -> None:
    for name in ("last", "best"):
        ours, expected = weights(run, name), weights(unbroken, name)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in expected), name
    assert (run / "metrics.csv").read_text() == (unbroken / "metrics.csv").read_text()
    ours, expected = (json.loads((folder / "evaluation.json").read_text()) for folder in (run, unbroken))
    for side in ("before", "after", "delta"):
        assert ours[side] == expected[side]


def interrupt_at(monkeypatch, step: int, error: type[BaseException]) -> None:
    """Let training fail at the start of one step, as if the process had died there."""
    original = CLIPModule.training_step
    count = 0

    def training_step(self, batch, batch_idx):
        nonlocal count
        count += 1
        if count == step:
            raise error
        return original(self, batch, batch_idx)

    monkeypatch.setattr(CLIPModule, "training_step", training_step)


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_leaves_checkpoints_logs_and_evaluation(unbroken):
    files = {str(path.relative_to(unbroken)) for path in unbroken.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "inputs.json",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "metrics.csv",
        "before.json",
        "evaluation.json",
        "examples.json",
        "finished.json",
    } <= files
    assert any(name.startswith("tensorboard/events") for name in files)
    assert not any(name.endswith(".tmp") for name in files)
    assert json.loads((unbroken / "finished.json").read_text()) == {"steps": 2 * STEPS}


def test_metrics_csv_has_one_row_a_step_and_validation_in_lightnings_columns(unbroken):
    with (unbroken / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(2 * STEPS))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [4, 9, 14, 19]
    assert {"epoch", "step", "train/loss", "train/logit_scale", "lr-AdamW", "val/image_to_text/recall@1"} <= set(
        rows[0]
    )


def test_the_best_checkpoint_is_the_one_with_the_best_monitored_metric(unbroken):
    with (unbroken / "metrics.csv").open() as file:
        values = {int(r["step"]): float(r["val/image_to_text/recall@1"]) for r in csv.DictReader(file) if r["val/loss"]}
    best = loaded(unbroken / "checkpoints" / "best.ckpt")
    assert values[best["global_step"] - 1] == max(values.values())


def test_of_a_loss_the_best_is_the_lowest(short, tmp_path):
    asked = EvaluateConfig(monitor="val/loss")
    trainer = replace(short.trainer, max_epochs=1, val_check_interval=2)
    fit(replace(short, out=tmp_path, evaluate=asked, trainer=trainer))
    with (tmp_path / "metrics.csv").open() as file:
        values = {int(row["step"]): float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]}
    best = loaded(tmp_path / "checkpoints" / "best.ckpt")
    assert values[best["global_step"] - 1] == min(values.values()) < max(values.values())


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4, 6, 11, 16])
def test_a_run_that_died_at_any_step_ends_with_the_weights_of_the_unbroken_one(config, unbroken, tmp_path, step):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, step, ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            fit(replace(config, out=tmp_path))
    result = fit(replace(config, out=tmp_path))
    assert result.resumed
    assert_same_run(tmp_path, unbroken)


def test_a_run_that_died_right_after_a_checkpoint_has_the_rows_of_the_unbroken_one(config, unbroken, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        save = KeepLast.save

        def save_and_die(self, trainer):
            save(self, trainer)
            if trainer.global_step == 6:
                raise ZeroDivisionError

        patch.setattr(KeepLast, "save", save_and_die)
        with pytest.raises(ZeroDivisionError):
            fit(replace(config, out=tmp_path))
    assert fit(replace(config, out=tmp_path)).resumed
    assert_same_run(tmp_path, unbroken)


def test_a_run_that_died_in_a_validation_has_its_row_all_the_same(config, unbroken, tmp_path):
    """It follows a step after which there is a checkpoint to be saved."""
    with pytest.MonkeyPatch.context() as patch:
        step = CLIPModule.validation_step

        def dies(self, batch, batch_idx):
            if self.trainer.global_step == 15:
                raise ZeroDivisionError
            return step(self, batch, batch_idx)

        patch.setattr(CLIPModule, "validation_step", dies)
        with pytest.raises(ZeroDivisionError):
            fit(replace(config, out=tmp_path))
    assert fit(replace(config, out=tmp_path)).resumed
    assert_same_run(tmp_path, unbroken)


TRAIN = """
import pickle, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from finetune.fit import fit
fit(pickle.loads(Path(sys.argv[1]).read_bytes()))
"""


def run(command: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def run_script(script: str, config: FitConfig, folder: Path, *arguments: int) -> subprocess.CompletedProcess:
    """Run a script that trains, from a file (Lightning runs it again for each further rank)."""
    (folder / "train.py").write_text(script)
    (folder / "config.pickle").write_bytes(pickle.dumps(config))
    return run([sys.executable, *(str(folder / name) for name in ("train.py", "config.pickle")), *map(str, arguments)])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(config, unbroken, tmp_path, caplog, number, status):
    config = replace(config, out=tmp_path)
    original = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        step = CLIPModule.training_step
        count = 0

        def training_step(self, batch, batch_idx):
            nonlocal count
            count += 1
            if count == 8:
                os.kill(os.getpid(), number)
            return step(self, batch, batch_idx)

        patch.setattr(CLIPModule, "training_step", training_step)
        with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
            fit(config)
    assert getattr(caught.value, "code", None) == status
    assert "the same command continues it" in caplog.text
    saved = loaded(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 8
    assert signal.getsignal(number) is original
    assert fit(config).resumed
    assert_same_run(tmp_path, unbroken)


class FakeTrainer:
    """The part of a trainer that `KeepLast` asks when a batch of validation ends."""

    class strategy:  # noqa: N801 - an attribute
        reduce_boolean_decision = staticmethod(lambda decision, **_: decision)

    def __init__(self, *, is_last_batch: bool) -> None:
        self.fit_loop = self.epoch_loop = self.val_loop = self.batch_progress = self
        self.is_last_batch = is_last_batch


def test_a_signal_waits_for_the_end_of_a_batch_and_while_sets_are_evaluated_stops_at_once():
    keeper = KeepLast(Path("checkpoints"), 10)
    keeper.on_train_start()
    try:
        keeper._stop(signal.SIGTERM, None)  # training: wait for the end of the step
        with pytest.raises(Interrupted):
            keeper._stop(signal.SIGTERM, None)  # asked twice
        keeper._signal = 0
        keeper.on_validation_batch_end(FakeTrainer(is_last_batch=False))
        keeper._stop(signal.SIGUSR1, None)
        with pytest.raises(Interrupted) as caught:
            keeper.on_validation_batch_end(FakeTrainer(is_last_batch=False))
        assert caught.value.code == 138
        keeper._signal = 0
        keeper.on_validation_batch_end(FakeTrainer(is_last_batch=True))  # now sets are evaluated
        with pytest.raises(Interrupted) as caught:
            keeper._stop(signal.SIGINT, None)
        assert caught.value.code == 130
        keeper._signal = 0
        asked = FakeTrainer(is_last_batch=False)
        asked.strategy = SimpleNamespace(reduce_boolean_decision=lambda *_, **__: True)  # another rank has been
        with pytest.raises(Interrupted) as caught:
            keeper.on_validation_batch_end(asked)
        assert caught.value.code == 143
        keeper._signal, keeper._waits = 0, True
        keeper.on_train_end()
        with pytest.raises(Interrupted):
            keeper._stop(signal.SIGTERM, None)
    finally:
        keeper.teardown()


# --- with something changed, from another place -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(config) -> FitConfig:
    """Two epochs of eight batches without validation."""
    data = replace(config.data, replay=0.0, crop_scale=(1.0, 1.0))
    trainer = replace(config.trainer, val_check_interval=None, check_val_every_n_epoch=9)
    return replace(config, checkpoint_every_n_steps=1, trainer=trainer, data=data, keep=KeepConfig(interpolate=0))


@pytest.fixture(scope="module")
def broken_off(short, tmp_path_factory) -> Path:
    """That run as it is after three steps."""
    out = tmp_path_factory.mktemp("broken_off")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 4, ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            fit(replace(short, out=out))
    return out


@pytest.fixture
def taken_up(broken_off, tmp_path) -> Path:
    return shutil.copytree(broken_off, tmp_path / "run")


def rows_trained_on(patch) -> list[list[int]]:
    """Will have the rows of each batch."""
    rows: list[list[int]] = []
    original = CLIPModule.training_step

    def training_step(self, batch, batch_idx):
        rows.append(batch["row"].tolist())
        return original(self, batch, batch_idx)

    patch.setattr(CLIPModule, "training_step", training_step)
    return rows


def in_metrics(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize(("batch_size", "accumulated", "steps"), [(10, 1, 3 + 3 + 4), (3, 2, 3 + 5 + 7)])
def test_with_another_batch_size_a_run_goes_on_at_the_same_sample_and_says_so(
    short, taken_up, monkeypatch, caplog, batch_size, accumulated, steps
):
    rows = rows_trained_on(monkeypatch)
    changed = replace(
        short,
        out=taken_up,
        data=replace(short.data, batch_size=batch_size),
        trainer=replace(short.trainer, accumulate_grad_batches=accumulated),
    )
    assert fit(changed).resumed
    order = [draw.row for number in range(8) for draw in Schedule(40, 0, 5, 0.0, 3).batch(0, number)]
    seen = [row for batch in rows for row in batch]
    assert seen[:25] == order[15:]
    assert sorted(seen[25:]) == list(range(40))
    assert f"data.batch_size was 5 and is {batch_size}" in caplog.text
    assert json.loads((taken_up / "finished.json").read_text()) == {"steps": steps}
    assert in_metrics(taken_up, "lr-AdamW")[-1] < 1e-3  # the schedule ends where the run does
    said = json.loads((taken_up / "changes.json").read_text())
    assert said[0]["data.batch_size"] == {"was": 5, "is": batch_size}
    assert "batch_size: " + str(batch_size) in (taken_up / "config.yaml").read_text()


def test_other_data_or_another_rate_need_a_word_and_then_count(short, taken_up, tmp_path, monkeypatch):
    optimizer = replace(short.model.optimizer, lr=2e-3, schedule="constant", warmup=0.0, weight_decay=0.3, eps=1e-5)
    other = tiny.write_dataset(tmp_path / "other", train=20)
    changed = replace(
        short,
        out=taken_up,
        model=replace(short.model, optimizer=optimizer),
        data=replace(short.data, dataset=other),
    )
    before = (taken_up / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"optimizer\.lr was 0\.01 and is 0\.002; .* --continue_changed to go on so"):
        fit(changed)
    assert (taken_up / "config.yaml").read_text() == before
    rows = rows_trained_on(monkeypatch)
    fit(changed, changed=True)
    assert [sorted(row for batch in rows[i : i + 4] for row in batch) for i in (0, 4)] == [list(range(20))] * 2
    assert len(rows) == 8
    assert in_metrics(taken_up, "lr-AdamW")[3:] == pytest.approx([2e-3] * 8)
    (state,) = loaded(taken_up / "checkpoints" / "last.ckpt")["optimizer_states"]
    assert {group["weight_decay"] for group in state["param_groups"]} <= {0.0, 0.3}
    assert any(group["weight_decay"] for group in state["param_groups"])
    assert {group["eps"] for group in state["param_groups"]} == {1e-5}


def test_what_a_checkpoint_is_made_of_cannot_be_changed(short, taken_up):
    changed = replace(short, out=taken_up, model=replace(short.model, adapter=AdapterConfig(rank=4, dropout=0.3)))
    with pytest.raises(ConfigError, match=r"model\.adapter\.rank was 2 and is 4\. Its checkpoints do not fit that"):
        fit(changed, changed=True)


def with_key(part, key: str, value):
    """A configuration in which one key has another value."""
    name, _, rest = key.partition(".")
    return replace(part, **{name: with_key(getattr(part, name), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.adapter.variant", "dora"),
        ("model.loss.kind", "siglip"),
        ("model.loss.distill_feature", 0.5),
        ("model.loss.distill_logit", 0.5),
        ("model.loss.l2_start", 0.5),
        ("model.optimizer.ema", 0.9),
        ("model.optimizer.layer_decay", 0.5),
        ("model.optimizer.image_lr", 1e-3),
        ("model.optimizer.text_lr", 1e-3),
    ],
)
def test_no_word_lets_a_run_go_on_with_what_does_not_fit_its_checkpoints(short, tmp_path, key, value):
    (tmp_path / "w.pt").write_bytes(b"some weights")
    config = with_key(replace(short, out=tmp_path / "run"), "model.clip.pretrained", str(tmp_path / "w.pt"))
    folder.begin(config)
    with pytest.raises(ConfigError, match=rf"{key} was .* Its checkpoints do not fit that"):
        folder.begin(with_key(config, key, value), changed=True, goes_on=True)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("checkpoint_every_n_steps", 50, False),
        ("trainer.accelerator", "auto", False),
        ("trainer.enable_progress_bar", False, False),
        ("trainer.log_every_n_steps", 50, False),
        ("trainer.profiler", "simple", False),
        ("trainer.detect_anomaly", True, False),
        ("data.num_workers", 3, False),
        ("data.max_broken", 0.5, False),
        ("data.eval_batch_size", 3, False),
        ("data.window", 3, False),  # nothing is far away
        ("data.batch_size", 3, True),
        ("trainer.devices", 3, True),
        ("trainer.num_nodes", 3, True),
        ("trainer.strategy", "ddp", True),
        ("trainer.accumulate_grad_batches", 3, True),
    ],
)
def test_what_needs_no_word_to_be_another_and_is_told_where_batches_are_others(short, tmp_path, key, value, told):
    folder.begin(replace(short, out=tmp_path))
    changed = with_key(replace(short, out=tmp_path), key, value)
    folder.begin(changed, goes_on=True)
    assert run_config(tmp_path) == changed
    assert (tmp_path / "changes.json").is_file() == told
    if told:
        assert list(json.loads((tmp_path / "changes.json").read_text())[0]) == [key]


def test_each_change_of_a_run_is_noted_and_a_finished_one_is_not_cut_anew(short, tmp_path):
    for size in (5, 6, 7):
        folder.begin(with_key(replace(short, out=tmp_path), "data.batch_size", size), goes_on=True)
    said = json.loads((tmp_path / "changes.json").read_text())
    assert said == [{"data.batch_size": {"was": was, "is": was + 1}} for was in (5, 6)]
    (tmp_path / "finished.json").write_text("{}")
    folder.begin(with_key(replace(short, out=tmp_path), "data.batch_size", 8), goes_on=True)
    assert run_config(tmp_path).data.batch_size == 7
    assert json.loads((tmp_path / "changes.json").read_text()) == said
    assert (tmp_path / "finished.json").is_file()


def test_a_run_killed_while_it_writes_down_its_beginning_begins(short, tmp_path, monkeypatch):
    config, write, written = replace(short, out=tmp_path), folder.write_text, []

    def writes_one(path: Path, text: str) -> None:
        if written:
            raise ZeroDivisionError
        write(path, text)
        written.append(path)

    monkeypatch.setattr(folder, "write_text", writes_one)
    with pytest.raises(ZeroDivisionError):
        folder.begin(config)
    monkeypatch.undo()
    folder.begin(config)
    assert run_config(tmp_path) == config
    folder.begin(config, goes_on=True)


def test_a_run_that_goes_on_from_its_end_has_nothing_left_of_its_end(config, unbroken, tmp_path):
    run = shutil.copytree(unbroken, tmp_path / "run")
    ends = ("interpolation.json", "report.html", "checkpoints/interpolated.ckpt")
    for name in ends:
        (run / name).write_text("of the end")
    before = {str(path.relative_to(run)) for path in run.rglob("*")}
    folder.begin(with_key(replace(config, out=run), "trainer.max_epochs", 3), changed=True, goes_on=True)
    gone = before - {str(path.relative_to(run)) for path in run.rglob("*")}
    assert gone == {*ends, "finished.json", "evaluation.json", "examples.json"}


def test_nothing_is_left_of_a_run_that_is_forgotten(unbroken, tmp_path):
    run = shutil.copytree(unbroken, tmp_path / "run")
    for name in ("changes.json", "interpolation.json", "report.html"):
        (run / name).write_text("")
    (run / "profile").mkdir()
    folder.forget(run)
    assert {path.name for path in run.iterdir()} <= {".lock"}


def test_a_run_that_max_time_ends_says_so(short, tmp_path, caplog):
    trainer = replace(short.trainer, max_time="00:00:00:01", max_epochs=10_000, check_val_every_n_epoch=10_000)
    fit(replace(short, out=tmp_path / "run", trainer=trainer, checkpoint_every_n_steps=10_000))
    made = json.loads((tmp_path / "run" / "finished.json").read_text())["steps"]
    assert f"max_time ended it after {made} of 80000 steps" in caplog.text


def test_a_finished_run_may_be_made_longer(short, taken_up):
    once = replace(short, out=taken_up, trainer=replace(short.trainer, max_epochs=1))
    fit(once, changed=True)
    assert json.loads((taken_up / "finished.json").read_text()) == {"steps": 8}
    result = fit(replace(short, out=taken_up), changed=True)
    assert (result.resumed, result.finished_before) == (True, False)
    assert json.loads((taken_up / "finished.json").read_text()) == {"steps": 16}
    assert len(in_metrics(taken_up, "train/loss")) == 16


@pytest.fixture(scope="module")
def short_unbroken(short, tmp_path_factory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("short")
    fit(replace(short, out=out))
    assert loaded(out / "checkpoints" / "previous.ckpt")["global_step"] in (15, 16)
    return weights(out)


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_continues_all_the_same(
    short, taken_up, short_unbroken, caplog, damage
):
    last = taken_up / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    assert loaded(last.with_name("previous.ckpt"))["global_step"] == 2
    content[len(content) // 2] ^= 1
    last.write_bytes(content if damage == "flipped" else content[:-100])
    assert fit(replace(short, out=taken_up), ckpt_path="last").resumed
    assert "last.ckpt is damaged" in caplog.text
    assert_equal(weights(taken_up), short_unbroken)
    for path in (taken_up / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"torn")
    with pytest.raises(InputError, match=r"no whole checkpoint beside it; --restart begins anew"):
        fit(replace(short, out=taken_up))


def test_a_run_goes_on_in_another_folder_from_the_path_of_a_checkpoint(short, broken_off, short_unbroken, tmp_path):
    from_there = str(broken_off / "checkpoints" / "previous.ckpt")
    moved = replace(short, out=tmp_path / "new")
    assert fit(moved, ckpt_path=from_there).resumed
    assert_equal(weights(moved.out), short_unbroken)
    assert len(in_metrics(moved.out, "train/loss")) == 16
    with pytest.raises(ConfigError, match=r"is of another run, but .*new holds one already"):
        fit(moved, ckpt_path=from_there)
    for path, message in (("last", "no checkpoint to go on from"), ("no.ckpt", r"no\.ckpt: no such file")):
        with pytest.raises(InputError, match=message):
            fit(replace(short, out=tmp_path / "empty"), ckpt_path=path)
    with pytest.raises(ConfigError, match="--restart begins anew; give one of the two"):
        fit(moved, restart=True, ckpt_path="last")


@pytest.mark.parametrize("of_later_steps", [False, True])
def test_with_a_checkpoint_of_another_run_its_best_comes_along_unless_it_is_of_later_steps(
    unbroken, tmp_path, of_later_steps
):
    other, out = shutil.copytree(unbroken, tmp_path / "other"), tmp_path / "new"
    (other / "changes.json").write_text("[]")
    last, best = other / "checkpoints" / "last.ckpt", other / "checkpoints" / "best.ckpt"
    os.utime(last, (1_000, 1_000))
    os.utime(best, (1_001, 1_001) if of_later_steps else (1_000, 1_000))
    out.mkdir()
    assert folder.checkpoint_to_start_from(out, str(last)) == last
    taken = {"inputs.json", "config.yaml", "before.json", "metrics.csv", "changes.json"}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == (
        taken if of_later_steps else {*taken, "checkpoints/best.ckpt"}
    )


def test_a_damaged_checkpoint_of_another_run_takes_nothing_along(unbroken, tmp_path):
    other, out = shutil.copytree(unbroken, tmp_path / "other"), tmp_path / "new"
    last = other / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    out.mkdir()
    with pytest.raises(InputError, match=r"ckpt_path: .*last\.ckpt is damaged"):
        folder.checkpoint_to_start_from(out, str(last))
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"])
def test_only_the_first_rank_writes_into_the_folder_of_a_run(short, unbroken, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with folder.only_process(tmp_path):
        folder.begin(replace(short, out=tmp_path))
        last = unbroken / "checkpoints" / "last.ckpt"
        assert folder.checkpoint_to_start_from(tmp_path, str(last)) == last
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(name, "0")
    folder.begin(replace(short, out=tmp_path))
    assert (tmp_path / "config.yaml").is_file()


def test_what_a_killed_run_was_writing_is_swept_away_by_the_next(tmp_path):
    left = [tmp_path / ".metrics.csv.12.tmp", tmp_path / "checkpoints" / ".last.ckpt.12.tmp"]
    left[1].parent.mkdir()
    for path in left:
        path.write_text("half")
    with folder.only_process(tmp_path):
        assert not any(path.exists() for path in left)


def test_a_folder_that_is_no_run_is_left_alone(short, tmp_path):
    (tmp_path / "report.html").write_text("of the dataset")
    for restart in (False, True):
        with pytest.raises(ConfigError, match=r"report\.html is there, but no run of `finetune fit`"):
            fit(replace(short, out=tmp_path), restart=restart)
    assert (tmp_path / "report.html").read_text() == "of the dataset"


def test_a_run_of_so_many_steps_knows_its_epoch_after_one_that_died_at_an_epochs_end(short, tmp_path):
    steps = replace(short.trainer, max_epochs=None, max_steps=10)
    unbroken, broken = (replace(short, out=tmp_path / name, trainer=steps) for name in ("unbroken", "broken"))
    fit(unbroken)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 9, ZeroDivisionError)  # the first of the second epoch
        with pytest.raises(ZeroDivisionError):
            fit(broken)
    fit(broken)
    assert_equal(weights(broken.out), weights(unbroken.out))
    assert (broken.out / "metrics.csv").read_text() == (unbroken.out / "metrics.csv").read_text()


def test_no_checkpoint_is_taken_between_the_batches_of_one_step(short, tmp_path):
    trainer = replace(short.trainer, max_epochs=1, accumulate_grad_batches=3)  # 8 batches: 3, 3 and 2
    unbroken = replace(short, out=tmp_path / "unbroken", trainer=trainer)
    fit(unbroken)
    broken = replace(unbroken, out=tmp_path / "broken")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6, ZeroDivisionError)  # the third batch of its step
        with pytest.raises(ZeroDivisionError):
            fit(broken)
    assert fit(broken).resumed
    assert_equal(weights(broken.out), weights(unbroken.out))


def test_no_checkpoint_is_taken_after_a_validation_between_the_batches_of_one_step(short, tmp_path):
    data = replace(short.data, batch_size=8)  # 5 batches: 2, 2 and 1; the second validation is after 3 of the next 5
    trainer = replace(short.trainer, accumulate_grad_batches=2, val_check_interval=2)
    unbroken = replace(short, out=tmp_path / "unbroken", trainer=trainer, data=data)
    fit(unbroken)
    broken = replace(unbroken, out=tmp_path / "broken")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 9, ZeroDivisionError)  # the batch after it, the second of its step
        with pytest.raises(ZeroDivisionError):
            fit(broken)
    assert fit(broken).resumed
    assert_equal(weights(broken.out), weights(unbroken.out))
    assert (broken.out / "metrics.csv").read_text() == (unbroken.out / "metrics.csv").read_text()


# --- what is there already --------------------------------------------------------------------------------------------


def test_without_a_val_split_a_validation_that_is_due_keeps_no_checkpoint_from_being_taken(short, tmp_path):
    bare = tiny.write_dataset(tmp_path / "data", train=40, val=0, retain=0)
    trainer = replace(short.trainer, max_epochs=1, val_check_interval=2)
    data = replace(short.data, dataset=bare, replay=0.0)
    run = replace(short, out=tmp_path / "run", trainer=trainer, data=data, checkpoint_every_n_steps=2)
    saved, save = [], KeepLast.save

    def noting(self, trainer):
        saved.append(trainer.global_step)
        save(self, trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeepLast, "save", noting)
        fit(run)
    assert saved == [2, 4, 6, 8]


def test_another_rank_does_not_look_at_what_rank_0_is_about_to_forget(config, unbroken, monkeypatch):
    started: list[Path | None] = []
    monkeypatch.setattr("finetune.fit._run", lambda _, start, **__: started.append(start))
    monkeypatch.setenv("RANK", "1")
    fit(replace(config, out=unbroken), restart=True)
    assert started == [None]
    assert (unbroken / "finished.json").is_file()  # which is rank 0's to remove


@pytest.mark.parametrize(("epochs", "started"), [(2, []), (3, ["last.ckpt"])])
def test_another_rank_goes_on_with_a_finished_run_if_rank_0_is_about_to(config, unbroken, monkeypatch, epochs, started):
    went_on: list[str] = []
    monkeypatch.setattr("finetune.fit._run", lambda _, start, **__: went_on.append(start.name))
    monkeypatch.setenv("RANK", "1")
    fit(replace(config, out=unbroken, trainer=replace(config.trainer, max_epochs=epochs)), changed=True)
    assert went_on == started
    assert (unbroken / "finished.json").is_file()


def test_validations_are_so_many_steps_apart_however_many_batches_a_step_has(short, tmp_path):
    trainer = replace(short.trainer, max_epochs=1, accumulate_grad_batches=2, val_check_interval=2, log_every_n_steps=1)
    run = replace(short, out=tmp_path / "run", trainer=trainer)
    fit(run)
    with (run.out / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert steps == [1, 3]  # of 4, counted from 0


def test_a_finished_run_says_so_and_does_nothing(config, unbroken, caplog):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*.ckpt")}
    with caplog.at_level(logging.INFO, "cliptailor"):
        result = fit(replace(config, out=unbroken))
    assert result.finished_before
    assert result.best == unbroken / "checkpoints" / "best.ckpt"
    assert "finished already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*.ckpt")} == before


def test_another_configuration_in_the_same_folder_is_refused_and_named(config, unbroken):
    changed = replace(config, out=unbroken, seed_everything=4, data=replace(config.data, num_workers=3))
    with pytest.raises(
        ConfigError, match=r"seed_everything was 3 and is 4\. Give another `out`, or --restart"
    ) as caught:
        fit(changed)
    assert "num_workers" not in str(caught.value)


def test_another_dataset_in_the_same_folder_is_refused(config, unbroken, tmp_path):
    other = tiny.write_dataset(tmp_path, train=41)
    with pytest.raises(ConfigError, match=r"an earlier run .* dataset was"):
        fit(replace(config, out=unbroken, data=replace(config.data, dataset=other)))


@pytest.mark.parametrize("other", ["weights", "val"])
def test_over_other_weights_or_another_val_split_a_run_does_not_go_on(config, tmp_path, other):
    dataset = tiny.write_dataset(tmp_path / "data", train=4, val=4, retain=0)
    start = tmp_path / "w.pt"
    start.write_bytes(b"some weights")
    model = replace(config.model, clip=replace(config.model.clip, pretrained=str(start)))
    config = replace(config, out=tmp_path / "run", model=model, data=replace(config.data, dataset=dataset, replay=0.0))
    folder.begin(config)
    folder.begin(config, goes_on=True)
    if other == "weights":
        start.write_bytes(b"other weights")
    else:
        tiny.write_split(dataset, "val", 4, first=8)
    with pytest.raises(ConfigError, match=rf"an earlier run was made with something else: {other} was"):
        folder.begin(config, goes_on=True)


def test_a_run_may_have_moved_and_knows_its_best_still(config, unbroken, tmp_path):
    moved = shutil.copytree(unbroken, tmp_path / "moved")
    best = loaded(moved / "checkpoints" / "last.ckpt")["callbacks"]
    (state,) = (each for name, each in best.items() if name.startswith("KeepBest"))
    keeper = KeepBest(moved / "checkpoints", "val/image_to_text/recall@1", "max")
    keeper.load_state_dict(state)
    assert keeper.best_model_path == str(moved / "checkpoints" / "best.ckpt")
    assert keeper.best_model_score == state["best_model_score"]
    (moved / "checkpoints" / "best.ckpt").unlink()
    keeper = KeepBest(moved / "checkpoints", "val/image_to_text/recall@1", "max")
    keeper.load_state_dict(state)
    assert (keeper.best_model_path, keeper.best_model_score) == ("", None)


def test_the_same_dataset_may_have_moved(config, unbroken, dataset, tmp_path):
    run, moved = shutil.copytree(unbroken, tmp_path / "run"), shutil.copytree(dataset, tmp_path / "moved")
    assert fit(replace(config, out=run, data=replace(config.data, dataset=moved))).finished_before
    assert run_config(run).data.dataset == moved  # where `finetune validate` looks


def test_restart_begins_anew_and_leaves_foreign_files(config, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    short = replace(
        config, out=tmp_path, trainer=replace(config.trainer, max_epochs=None, max_steps=2, val_check_interval=2)
    )
    result = fit(short, restart=True)
    assert not result.resumed
    assert json.loads((tmp_path / "finished.json").read_text()) == {"steps": 2}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4


def test_two_processes_do_not_train_into_one_folder(config, tmp_path):
    with (
        folder.only_process(tmp_path),
        pytest.raises(Busy, match="another process is training here"),
    ):
        fit(replace(config, out=tmp_path))


def test_two_processes_train_to_the_weights_of_one_with_the_whole_batch(config, tmp_path):
    model = replace(config.model, adapter=AdapterConfig(kind="full"), optimizer=OptimizerConfig(lr=1e-3))
    short = TrainerConfig(max_steps=3, accelerator="cpu", log_every_n_steps=1, val_check_interval=2)
    runs = {}
    for devices, batch_size in ((1, 16), (2, 8)):
        trainer = replace(short, devices=devices, strategy="ddp" if devices > 1 else "auto")
        data = replace(config.data, batch_size=batch_size, replay=0.0)
        runs[devices] = replace(config, out=tmp_path / str(devices), trainer=trainer, data=data, model=model)
    fit(runs[1])
    ended = run_script(TRAIN, runs[2], tmp_path)
    assert ended.returncode == 0, ended.stderr
    one, two = weights(runs[1].out), weights(runs[2].out)
    for key in one:
        # Adam divides by the size of the gradient: where that is rounding alone, so is the step.
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=2e-5)
    tables = []
    for run in runs.values():
        with (run.out / "metrics.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    losses = [[float(row["train/loss"]) for row in table if row["train/loss"]] for table in tables]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # Both ranks validated, rank 0 evaluated for both, and none waits for the other.
    recall = "val/image_to_text/recall@1"
    evaluated = [[(int(row["step"]), float(row[recall])) for row in table if row[recall]] for table in tables]
    assert [step for step, _ in evaluated[0]] == [1, 2]
    assert evaluated[0] == evaluated[1]
    assert (runs[2].out / "checkpoints" / "best.ckpt").is_file()


# --- configuration ----------------------------------------------------------------------------------------------------


def test_the_seed_decides_the_random_weights_and_the_order(short, tmp_path):
    starts, batches = [], []
    for seed in (5, 5, 0):
        module, data, _ = _prepare(replace(short, out=tmp_path, seed_everything=seed))
        data.setup()
        starts.append(module.model.visual.proj)
        batches.append(data.schedule.batch(0, 0))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert batches[0] == batches[1] != batches[2]


def test_only_deterministic_algorithms_are_a_wish_that_is_heard(short, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # Lightning sets it
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        _prepare(replace(short, out=tmp_path, trainer=replace(short.trainer, deterministic=True)))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_metric_that_nothing_measures_is_refused_with_the_nearest(config, tmp_path):
    asked = EvaluateConfig(monitor="val/image_to_text/recal@1")
    with pytest.raises(ConfigError, match=r"nothing measures .* Did you mean 'val/image_to_text/recall@1'"):
        fit(replace(config, out=tmp_path, evaluate=asked))


def test_without_a_val_split_nothing_is_monitored_and_the_last_is_kept(config, tmp_path):
    bare = tiny.write_dataset(tmp_path / "data", train=12, val=0)
    trainer = replace(config.trainer, max_epochs=1, val_check_interval=None)
    given = replace(config, out=tmp_path / "run", data=replace(config.data, dataset=bare), trainer=trainer)
    result = fit(given)
    assert result.best is None
    assert result.last.is_file()
    with pytest.raises(ConfigError, match="has no val split"):
        fit(replace(given, out=tmp_path / "other", evaluate=EvaluateConfig(monitor="val/loss")))


def test_what_the_trainer_refuses_is_a_configuration_error(config, tmp_path):
    with pytest.raises(ConfigError, match=r"trainer: .*no_such"):
        fit(replace(config, out=tmp_path, trainer=replace(config.trainer, accelerator="no_such")))


def test_a_run_is_silent_but_for_its_own_lines(config, tmp_path, capfd):
    adapter = AdapterConfig(rank=2, lock=["image"])
    short = replace(
        config,
        out=tmp_path,
        trainer=replace(config.trainer, max_epochs=1),
        model=replace(config.model, adapter=adapter),
    )
    fit(short)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Tip" not in err
    assert "GPU available" not in err
    assert "warn" not in err.lower()


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_the_checkpoint_before_the_last_is_kept_on_any_file_system(tmp_path, monkeypatch, links):
    if not links:

        def hardlink_to(*_) -> None:
            raise PermissionError(1, "Operation not permitted")  # as FAT has it

        monkeypatch.setattr(Path, "hardlink_to", hardlink_to)
    for step in range(3):
        AtomicCheckpointIO().save_checkpoint({"step": step}, tmp_path / "last.ckpt")
    AtomicCheckpointIO().save_checkpoint({"step": 7}, tmp_path / "best.ckpt")
    AtomicCheckpointIO().save_checkpoint({"step": 8}, tmp_path / "best.ckpt")
    assert {path.name: loaded(path)["step"] for path in tmp_path.iterdir()} == {
        "last.ckpt": 2,
        "previous.ckpt": 1,
        "best.ckpt": 8,
    }


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_full_disk_is_told_with_the_file(size):
    """Of a small file when it is closed; of a larger one while it is written, and then once more."""
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_checkpoint({"weight": torch.zeros(size)}, Path("/dev/full"))


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": torch.tensor(1)}, path)
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"step": lambda: None}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(path, weights_only=True)["step"] == 1


def test_random_states_come_back_through_a_safely_loaded_file(tmp_path):
    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002 - the global state is what is tested

    lightning.seed_everything(5, verbose=False)
    draw()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draw()
    draw()
    set_random_state(loaded(tmp_path / "state.pt"))
    assert draw() == expected


def test_a_checkpoint_has_the_random_state_of_each_rank_and_each_gets_its_own(monkeypatch):
    def drawn() -> float:
        return torch.rand(()).item()

    states, expected = [], []
    for seed in (5, 6):
        lightning.seed_everything(seed, verbose=False)
        states.append(random_state())
        expected.append(drawn())

    def gather(every: list, mine: dict) -> None:
        every[:] = [mine, states[1]]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    set_random_state(states[0])
    saved = RandomState().state_dict()
    for rank in (1, 0):
        restored, trainer = RandomState(), SimpleNamespace(global_rank=rank)
        restored.load_state_dict(saved)
        restored.on_train_batch_start(trainer)
        assert drawn() == expected[rank]
        restored.on_train_batch_start(trainer)  # the next step goes on
        assert drawn() != expected[rank]


def test_metrics_go_on_where_the_run_was_taken_up_again(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path)
    for step in range(4):
        first.log_metrics({"train/loss": step / 2, "epoch": 0}, step)
    second = MetricsFile(path)
    second.log_metrics({"val/loss": 9.0, "epoch": 0}, 2)
    assert path.read_text().splitlines() == [
        "epoch,step,train/loss,val/loss",
        "0,0,0.0,",
        "0,1,0.5,",
        "0,2,,9.0",
    ]


def test_a_plain_lightning_script_works(dataset, architectures, tmp_path):
    script = f"""
        import lightning
        from finetune import CLIPDataModule, CLIPModule

        lightning.seed_everything(1)
        module = CLIPModule(clip=dict(name={architectures["tiny-vit"]!r}, pretrained=None), adapter=dict(kind="full"))
        data = CLIPDataModule(dataset={str(dataset)!r}, batch_size=8, num_workers=2)
        trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", default_root_dir={str(tmp_path)!r})
        trainer.fit(module, data)
        print("steps", trainer.global_step, trainer.checkpoint_callback.best_model_path)
        CLIPModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    """
    ended = run([sys.executable, "-c", textwrap.dedent(script)])
    assert ended.returncode == 0, ended.stderr
    assert "steps 10" in ended.stdout
