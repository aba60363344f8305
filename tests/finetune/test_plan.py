"""The plan that is shown before step 0: its numbers against what training then does, its memory against a count."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
from dataclasses import replace

import lightning
import pytest
import torch

from finetune.cli import main
from finetune.config import AdapterConfig, ClipConfig, DataConfig, ModelConfig, OptimizerConfig, TrainerConfig
from finetune.data import CLIPDataModule
from finetune.fit import fit, plan
from finetune.module import CLIPModule
from finetune.plan import Group, _few, activation_bytes, checkpoint_bytes, estimate_memory, make_plan, rows, size, tell
from tests.finetune import tiny
from tests.finetune.fitted import tiny_config


def module_of(architecture: str, **adapter) -> CLIPModule:
    return CLIPModule(ClipConfig(name=architecture, pretrained=None), AdapterConfig(**adapter))


def counted_bytes(module: CLIPModule, pairs: int) -> int:
    """Bytes that autograd really keeps of a batch, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            saved[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        image, text = module(torch.randn(pairs, 3, 32, 32), torch.randint(1, 9, (pairs, 16)))
    assert image.shape == text.shape
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("architecture", ["tiny-vit", "tiny-resnet"])
@pytest.mark.parametrize(
    "adapter",
    [{"kind": "full"}, {"kind": "lora", "rank": 2, "dropout": 0.1}, {"kind": "full", "lock": ["image"]}],
    ids=["full", "lora", "lit"],
)
def test_the_activations_of_a_pair_are_what_autograd_keeps(architecture, adapter, architectures):
    module = module_of(architectures[architecture], **adapter)
    really = (counted_bytes(module, 8) - counted_bytes(module, 4)) / 4
    assert activation_bytes(module) == pytest.approx(really, rel=0.03)


def test_less_is_kept_in_half_precision_and_nothing_of_a_locked_tower(architectures):
    full = module_of(architectures["tiny-vit"], kind="full")
    locked = module_of(architectures["tiny-vit"], kind="full", lock=["image"])
    assert activation_bytes(locked) < 0.9 * activation_bytes(full)
    assert 0.4 < activation_bytes(full, "bf16-mixed") / activation_bytes(full) < 0.9
    assert activation_bytes(full, "bf16-true") * 2 == activation_bytes(full)


def test_the_estimate_leaves_the_model_and_the_random_state_alone(architectures):
    module = module_of(architectures["tiny-resnet"], kind="lora", targets=["conv"], dropout=0.5)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    before = torch.get_rng_state()
    estimate_memory(module, 8, 1, "32-true")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(each._forward_pre_hooks for each in module.modules())  # they would keep what passes by
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_parts_of_a_batch_and_checkpointed_blocks_need_less(architectures):
    clip = {"name": architectures["tiny-vit"], "pretrained": None}
    plain, parts, small, twice = (
        CLIPModule(clip, {"kind": "full"}, compute=compute)
        for compute in ({}, {"micro_batch_size": 4}, {"micro_batch_size": 2}, {"gradient_checkpointing": True})
    )
    whole = estimate_memory(plain, 10, 1, "32-true")
    assert estimate_memory(parts, 10, 1, "32-true").activations * 10 == whole.activations * 4
    assert estimate_memory(parts, 3, 1, "32-true").activations * 10 == whole.activations * 3
    assert estimate_memory(small, 10, 1, "32-true").activations * 10 == whole.activations * 2
    assert small.compute.micro_batch_size == 2
    # What is kept of four blocks: their inputs, of 5 positions and of 16, 32 wide.
    inputs = 4 * 32 * (2 * 5 + 2 * 16)
    assert inputs < activation_bytes(twice) < inputs + 0.4 * activation_bytes(plain)


def test_memory_is_weights_gradients_moments_activations_and_logits(architectures):
    module = module_of(architectures["tiny-vit"], kind="lora", rank=2)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    memory = estimate_memory(module, 10, 2, "32-true")
    assert memory.gradients == 4 * trained
    assert memory.optimizer == 8 * trained
    assert memory.activations == 10 * memory.activations_a_pair
    assert memory.logits == 4 * 10 * 20 * 4
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits)
    assert memory.total == sum(parts)
    assert estimate_memory(module, 10, 2, "bf16-true").weights * 2 == memory.weights
    assert estimate_memory(module, 10, 2, "16-true").weights * 2 == memory.weights
    assert estimate_memory(module, 10, 2, "64-true").weights == memory.weights * 2
    assert estimate_memory(module, 10, 2, "bf16-mixed").optimizer == memory.optimizer  # what is cast is not kept so


def test_statistics_that_are_no_parameters_are_in_the_weights_too(architectures):
    module = module_of(architectures["tiny-resnet"])
    kept = [*module.parameters(), *module.buffers()]
    assert estimate_memory(module, 2, 1, "32-true").weights == 4 * sum(each.numel() for each in kept)


# --- steps and groups ------------------------------------------------------------------------------------------------


def planned(tmp_path, dataset, architectures, **changes):
    config = tiny_config(tmp_path / "run", dataset, architectures["tiny-vit"], AdapterConfig(kind="lora", rank=2))
    return plan(replace(config, **changes))


def test_the_plan_counts_pairs_batches_and_steps(tmp_path, dataset, architectures):
    trainer = TrainerConfig(accelerator="cpu", max_epochs=3, accumulate_grad_batches=2)
    made = planned(tmp_path, dataset, architectures, trainer=trainer)
    assert made.pairs == {"train": 40, "val": 8}
    assert (made.batch, made.devices, made.batches) == (8, 1, 5)
    assert made.steps == 9  # an epoch of five batches is three steps, the last of one batch
    assert not (tmp_path / "run").exists()


def test_several_devices_share_an_epoch_and_the_contrast(tmp_path, dataset, architectures):
    config = tiny_config(tmp_path, dataset, architectures["tiny-vit"], AdapterConfig(kind="full"))
    module = CLIPModule(config.model.clip, config.model.adapter)
    data = CLIPDataModule(config.data)
    data.setup()
    trainer = lightning.Trainer(accelerator="cpu", devices=2, max_epochs=2, logger=False, enable_checkpointing=False)
    made = make_plan(config, module, data, trainer)
    assert (made.devices, made.batches, made.steps) == (2, 3, 6)
    assert dict(rows(made))["batch"] == "8 pairs, on each of 2 devices; contrast over 16"
    assert made.memory.logits == 4 * 8 * 16 * 4
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, num_nodes=4, max_epochs=2, logger=False, enable_checkpointing=False
    )
    made = make_plan(config, module, data, trainer)
    assert (made.devices, made.batches, made.steps) == (4, 2, 4)


def test_a_batch_is_no_larger_than_what_there_is(tmp_path, dataset, architectures):
    data = DataConfig(dataset=dataset, batch_size=64, num_workers=0)
    assert planned(tmp_path, dataset, architectures, data=data).batch == 40
    assert planned(tmp_path, dataset, architectures, data=replace(data, replay=0.25)).batch == 48
    assert planned(tmp_path, dataset, architectures, data=replace(data, replay=0.25, batch_size=44)).batch == 44


def test_replay_and_warm_up_are_in_the_plan(tmp_path, dataset, architectures):
    data = DataConfig(dataset=dataset, batch_size=8, num_workers=0, replay=0.5)
    model = ModelConfig(
        clip=ClipConfig(name=architectures["tiny-vit"], pretrained=None),
        adapter=AdapterConfig(kind="full"),
        optimizer=OptimizerConfig(warmup=0.3),
    )
    trainer = TrainerConfig(accelerator="cpu", max_epochs=2)
    made = planned(tmp_path, dataset, architectures, data=data, model=model, trainer=trainer)
    assert made.pairs == {"train": 40, "to replay": 8, "val": 8}
    assert (made.batches, made.steps, made.warmup) == (10, 20, 6)  # four fresh pairs a batch
    assert made.trainable == made.total
    assert sum(group.parameters for group in made.groups) == made.trainable
    assert {group.weight_decay for group in made.groups} == {0.0, 0.1}


def test_training_does_what_the_plan_says(tmp_path, dataset, architectures, capsys):
    config = tiny_config(tmp_path / "run", dataset, architectures["tiny-vit"], AdapterConfig(kind="lora", rank=2))
    config = replace(config, trainer=replace(config.trainer, max_steps=-1, max_epochs=1, accumulate_grad_batches=2))
    made = plan(config)
    fit(config)
    told = capsys.readouterr().err
    assert json.loads((config.out / "finished.json").read_text()) == {"steps": made.steps}
    facts = json.loads((config.out / "evaluation.json").read_text())["facts"]
    assert (facts["trainable_parameters"], facts["total_parameters"]) == (made.trainable, made.total)
    assert told.startswith("plan: data")
    sizes = [path.stat().st_size for path in (config.out / "checkpoints").glob("*.ckpt")]
    assert checkpoint_bytes(made) == pytest.approx(max(sizes), rel=0.05)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_disk_without_room_for_the_checkpoints_is_told(ema, tmp_path, dataset, architectures, monkeypatch):
    full = tiny_config(tmp_path / "run", dataset, architectures["tiny-vit"], AdapterConfig(kind="full"))
    model = replace(full.model, optimizer=OptimizerConfig(ema=ema))
    made = plan(replace(full, model=model))
    assert checkpoint_bytes(made) == pytest.approx(made.memory.weights * (4 if ema else 3), rel=1e-3)
    there = shutil.disk_usage(tmp_path)
    for free, told in ((4 * checkpoint_bytes(made), ""), (1_000_000, ": but only 1 MB are free there")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: there._replace(free=free))
        expected = f"{full.out}, checkpoints of up to {size(4 * checkpoint_bytes(made))} at once{told}"
        assert dict(rows(made))["writes"] == expected


def test_very_many_groups_are_shown_as_a_few_that_keep_all_parameters():
    groups = [Group(name=str(n), tensors=1, parameters=n, lr=n * 1e-5, weight_decay=0.1) for n in range(1, 50)]
    few = list(_few(groups))
    assert len(few) == 13
    assert sum(group.parameters for group in few) == sum(group.parameters for group in groups)
    assert list(_few(groups[:12])) == groups[:12]


def test_sizes_are_in_words():
    assert [size(n) for n in (0, 999, 1_500, 606_600_000, 2.5e12)] == ["0 B", "999 B", "1.5 kB", "607 MB", "2.5 TB"]
    assert [size(n) for n in (1_000, 999_499, 999_500, 999_999_999)] == ["1 kB", "999 kB", "1 MB", "1 GB"]


# --- the command -----------------------------------------------------------------------------------------------------


def arguments(tmp_path, dataset, architectures) -> list[str]:
    words = f"--out {tmp_path / 'run'} --trainer.accelerator cpu --trainer.max_epochs 2 --data.batch_size 8"
    model = f"--model.clip.name {architectures['tiny-vit']} --model.clip.pretrained null"
    return ["fit", *words.split(), *model.split(), "--data.dataset", str(dataset), "--data.num_workers", "0"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, dataset, architectures, capsys):
    assert main([*arguments(tmp_path, dataset, architectures), "--dry_run"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    lines = dict(re.findall(r"^plan: (\w+) +(.*)$", out, re.MULTILINE))
    assert list(lines) == ["data", "batch", "steps", "trained", "lr", "memory", "device", "writes"]
    assert lines["data"] == f"{dataset}: 40 pairs, 8 val · recipe for this size: few"
    assert lines["steps"] == "10 (2 epochs of 5 batches), the first 0 warm-up"
    assert re.fullmatch(r"about \S+ \SB a device: weights .*, activations \(\S+ \SB a pair\) .*", lines["memory"])
    assert lines["device"] == "cpu, 32-true"
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_the_plan_is_a_table(tmp_path, dataset, architectures):
    made = planned(tmp_path, dataset, architectures)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        tell(made, terminal)
        shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "│ steps" in shown
    lines = io.StringIO()
    tell(made, lines)
    assert "│" not in lines.getvalue()


def test_the_recipe_for_the_size_is_named(tmp_path, dataset, architectures):
    made = planned(tmp_path, dataset, architectures)
    for pairs, name in ((1_999, "few"), (2_000, "medium"), (199_999, "medium"), (200_000, "large")):
        assert f"recipe for this size: {name}" in dict(rows(replace(made, pairs={"train": pairs})))["data"]


def test_bfloat16_on_a_cpu_without_it_is_told(tmp_path, dataset, architectures, monkeypatch):
    made = replace(planned(tmp_path, dataset, architectures), device="cpu", precision="bf16-mixed")
    for there, told in ((True, "cpu, bf16-mixed"), (False, "cpu, bf16-mixed (this CPU has no bfloat16 arithmetic: ")):
        monkeypatch.setattr("finetune.plan.has_bf16", lambda there=there: there)
        assert dict(rows(made))["device"].startswith(told)
        assert dict(rows(made))["device"].endswith(")") != there


def test_a_dataset_without_a_val_split_plans_none(tmp_path, architectures):
    bare = tiny.write_dataset(tmp_path / "bare", val=0, retain=0)
    data = DataConfig(dataset=bare, batch_size=8, num_workers=0)
    assert planned(tmp_path, bare, architectures, data=data).pairs == {"train": 40}
