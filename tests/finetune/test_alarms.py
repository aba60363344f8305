"""Runs that really go wrong: weights that are no numbers, embeddings that fall together."""

from __future__ import annotations

import csv
import json
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from curate.clip import load_clip
from curate.errors import Diverged
from finetune.alarms import Alarms, Spread, check_finite, spread
from finetune.config import AdapterConfig, FitConfig, OptimizerConfig
from finetune.fit import fit
from finetune.module import CLIPModule
from tests.finetune.fitted import tiny_config


def run(out, dataset, architecture, lr: float, *, every: int = 1, steps: int = 6) -> FitConfig:
    config = tiny_config(out / "run", dataset, architecture, AdapterConfig(kind="full"), steps=steps)
    optimizer = OptimizerConfig(lr=lr, warmup=0.0, schedule="constant")
    trainer = replace(config.trainer, log_every_n_steps=every, val_check_interval=None)
    model = replace(config.model, optimizer=optimizer)
    return replace(config, trainer=trainer, model=model, checkpoint_every_n_steps=2)


@pytest.mark.parametrize("every", [1, 100])
def test_weights_that_are_no_numbers_stop_the_run_and_are_never_saved(dataset, architectures, tmp_path, every):
    """Seen at the step after which it would log, or would save."""
    config = run(tmp_path, dataset, architectures["tiny-vit"], 1e38, every=every)
    with pytest.raises(Diverged) as told:
        fit(config)
    text = str(told.value)
    assert text.startswith(f"step {min(every, 2)}: no numbers any more: weights (image, ")
    assert "learning rate of 1e+38 is probably too large for full" in text
    assert told.value.exit_status == 3
    assert "\n" not in text
    for path in (config.out / "checkpoints").glob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"]  # noqa: TID251 - of this run
        assert all(torch.isfinite(weight).all() for weight in weights.values()), path
    assert not (config.out / "finished.json").exists()


def test_a_checkpoint_between_two_looks_holds_no_such_weights_either(dataset, architectures, tmp_path):
    config = run(tmp_path, dataset, architectures["tiny-vit"], 1e38, every=100)
    config = replace(config, trainer=replace(config.trainer, val_check_interval=1), checkpoint_every_n_steps=100)
    with pytest.raises(Diverged, match="step 1: no numbers any more: weights"):
        fit(config)
    assert not list((config.out / "checkpoints").glob("*.ckpt"))


def test_embeddings_that_fall_together_are_told_once(dataset, architectures, tmp_path, caplog):
    config = run(tmp_path, dataset, architectures["tiny-vit"], 0.5, steps=12)
    with caplog.at_level(logging.WARNING, logger="cliptailor"):
        fit(config)
    told = [record.getMessage() for record in caplog.records if "collapsing" in record.getMessage()]
    assert told
    assert len(told) == len({line.partition("the ")[2].split()[0] for line in told})  # once a tower
    with (config.out / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/image_spread"]]
    assert len(rows) == 12
    found = [float(row["train/image_spread"]) for row in rows]
    assert min(found) < 0.01 * found[0]


def test_a_rank_that_falls_is_told_where_the_start_was_pretrained(dataset, architectures, tmp_path, caplog):
    """Logits that are scaled up hide it from their own differences."""
    torch.manual_seed(0)
    random = load_clip(architectures["tiny-vit"], device="cpu").model
    torch.save(random.state_dict(), tmp_path / "w.pt")
    for pretrained, times in ((str(tmp_path / "w.pt"), 1), (None, 0)):
        clip = {"name": architectures["tiny-vit"], "pretrained": pretrained}
        module = CLIPModule(clip, {"kind": "full"}, {"logit_scale": 100.0})
        alarms = Alarms(1)
        with caplog.at_level(logging.WARNING, logger="cliptailor"):
            for step, rank in enumerate((8.0, 2.1, 1.9, 1.8)):
                alarms._compare(module, "image", Spread(0.3, rank), 16, step)
        told = [record.getMessage() for record in caplog.records if record.name == "cliptailor"]
        assert len(told) == times
        assert all("step 2: the image embeddings are collapsing" in line for line in told)
        caplog.clear()


def test_an_epochs_last_few_pairs_are_no_collapse(architectures, tmp_path, caplog):
    """Four pairs as far apart as can be have rank four, whatever a whole batch had."""
    torch.save(load_clip(architectures["tiny-vit"], device="cpu").model.state_dict(), tmp_path / "w.pt")
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": str(tmp_path / "w.pt")}, {"kind": "full"})
    alarms, whole = Alarms(1), torch.nn.functional.normalize(torch.randn(128, 32), dim=1)
    with caplog.at_level(logging.WARNING, logger="cliptailor"):
        for step, embeddings in enumerate((whole, torch.eye(32)[:4])):
            alarms._compare(module, "image", spread(embeddings), len(embeddings), step)
    assert alarms.start["image"] > 4 * 4
    assert not [record for record in caplog.records if "collapsing" in record.getMessage()]


def test_a_loss_that_is_no_number_is_told_while_the_weights_are_sound(architectures):
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None}, {"kind": "full"})
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, **_: decision)
    optimizers = [SimpleNamespace(param_groups=[{"lr": 0.5}])]
    trainer = SimpleNamespace(
        global_step=3, is_last_batch=False, strategy=strategy, precision="32-true", optimizers=optimizers,
        gradient_clip_val=None,
    )  # fmt: skip
    for loss in (math.nan, math.inf):
        outputs = {"loss": torch.tensor(loss), "embeddings": (torch.eye(4), torch.eye(4))}
        with pytest.raises(Diverged, match=r"step 3: no numbers any more: train/loss\. The learning rate of 0\.5 is"):
            Alarms(3).on_train_batch_end(trainer, module, outputs, None, 0)
    check_finite(module, trainer, torch.tensor(1.0))


def test_a_run_that_goes_on_compares_with_its_beginning_and_warns_no_second_time(architectures, tmp_path, caplog):
    torch.save(load_clip(architectures["tiny-vit"], device="cpu").model.state_dict(), tmp_path / "w.pt")
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": str(tmp_path / "w.pt")}, {"kind": "full"})
    before, after = Alarms(1), Alarms(1)
    before._compare(module, "image", Spread(0.3, 8.0), 16, 0)
    before._compare(module, "text", Spread(0.3, 8.0), 16, 0)
    before._compare(module, "text", Spread(0.3, 1.9), 16, 1)
    caplog.clear()
    after.load_state_dict(before.state_dict())
    for tower in ("image", "text"):
        after._compare(module, tower, Spread(0.3, 1.8), 16, 2)
    (told,) = [record.getMessage() for record in caplog.records if "collapsing" in record.getMessage()]
    assert told.startswith("step 2: the image embeddings are collapsing")
    assert "effective rank 1.8 (8 at the start)" in told


def test_a_run_that_learns_is_left_alone(dataset, architectures, tmp_path, caplog):
    config = run(tmp_path, dataset, architectures["tiny-vit"], 1e-3)
    with caplog.at_level(logging.WARNING, logger="cliptailor"):
        fit(config)
    assert not [record for record in caplog.records if "collapsing" in record.getMessage()]
    assert json.loads((config.out / "finished.json").read_text()) == {"steps": 6}


def test_the_spread_is_the_mean_of_all_pairs_and_the_rank_that_of_the_singular_values():
    random = torch.Generator().manual_seed(0)
    for size, width in ((12, 5), (5, 12)):
        x = torch.nn.functional.normalize(torch.randn(size, width, generator=random, dtype=torch.float64), dim=1)
        cosines = [float(x[a] @ x[b]) for a in range(size) for b in range(size) if a != b]
        values = torch.linalg.svdvals(x)
        entropy = -sum(float(v) * math.log(float(v)) for v in values / values.sum())
        found = spread(x)
        assert found.distance == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-5)
        assert found.rank == pytest.approx(math.exp(entropy), rel=1e-3)


def test_equal_embeddings_have_no_spread_and_rank_one():
    found = spread(torch.nn.functional.normalize(torch.ones(8, 4), dim=1))
    assert found.distance == pytest.approx(0, abs=1e-6)
    assert found.rank == pytest.approx(1, abs=0.01)
