"""What a run is about to do, before step 0: data, steps, what is trained and how fast, memory, device, place.

The memory is an estimate of a device's peak in training, the sum of

    weights       of the model, in the width of `precision`
    gradients     of what is trained
    AdamW         two moments of what is trained
    activations   what autograd keeps for the backward pass, times the pairs that go through the towers at once.
                  Measured, not calculated: the towers see a thousand pairs as fake tensors, which have shapes but no
                  numbers, and what is saved is looked at. With gradient checkpointing what a block needs while it is
                  computed again comes on top
    logits        four matrices of float32 (both directions and their softmax), pairs here × pairs on all devices

Fragments, the allocator's cache and the libraries' own workspace come on top (on a GPU some hundred MB to 2 GB).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from curate.cache import cache_bytes
from curate.files import nearest
from curate.remote import cache_folder, shown
from finetune.checks import count_pairs
from finetune.config import FitConfig
from finetune.layers import blocks
from finetune.optim import Group, groups, total_steps
from finetune.pixels import sides
from finetune.sources import CaptionLengths

MOST_GROUPS = 12  # shown of the optimiser's
CHECKPOINTS = 4  # last, the one before, best, and the next one while it is written
FEW, MEDIUM = 2_000, 200_000  # pairs, up to which the recipe of that name is meant
# So many pairs are looked at: a prime that is in no other axis, so that it divides the sizes of their tensors, and not
# those of weights and masks.
LOOKED_AT = 1_009
BYTES = {"64": 8, "32": 4, "bf16": 2, "16": 2}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations_a_pair: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will happen, in numbers.

    Attributes:
        pairs: number of training pairs, and `replayed` and `val` where there are such.
        batch: pairs a batch and device, replayed ones included.
        devices: over which a batch's contrast goes.
        batches: a device sees in an epoch.
        steps: of the optimiser, in the whole run.
        warmup: of them, with rising learning rate.
        trainable: parameters that are trained.
        total: parameters of the CLIP.
        groups: of the trainable parameters.
        captions: how many the context cuts.
        meetings: samples that meet a twin in a batch of the first epoch, though they should not.
        far: what of the training samples is far away, and how it is read; empty: nothing is.
        features: what becomes of the embeddings of a locked tower; empty: none is locked.
    """

    config: FitConfig
    pairs: dict[str, int]
    batch: int
    devices: int
    batches: int
    steps: int
    warmup: int
    trainable: int
    total: int
    groups: list[Group]
    memory: Memory
    device: str
    precision: str
    captions: CaptionLengths
    features: str = ""
    meetings: int = 0
    far: str = ""


def make_plan(config: FitConfig, module: Any, data: Any, trainer: Any) -> Plan:
    """Plan a run.

    Args:
        config: everything.
        module: CLIPModule.
        data: CLIPDataModule, set up.
        trainer: lightning.Trainer that will run them.
    """
    devices = trainer.num_devices * trainer.num_nodes
    schedule = replace(data.schedule, world_size=devices, rank=0)
    steps_per_epoch = -(-len(schedule) // trainer.accumulate_grad_batches)
    steps = total_steps(trainer.max_steps, trainer.max_epochs, steps_per_epoch)
    parameters = list(module.model.parameters())
    return Plan(
        config=config,
        pairs=_pairs(data),
        batch=min(config.data.batch_size, len(data.train_index) + len(data.replay_index or ())),
        devices=devices,
        batches=len(schedule),
        steps=steps,
        warmup=round(config.model.optimizer.warmup * steps),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        groups=groups(module.model, module.optimizer),
        memory=estimate_memory(module, config.data.batch_size, devices, trainer.precision),
        device=_device(trainer),
        precision=trainer.precision,
        captions=data.caption_lengths(module.clip),
        features=_features(module, data, trainer),
        meetings=schedule.meetings(0) if config.data.batches == "without_twins" else 0,
        far=_far(data),
    )


def _features(module: Any, data: Any, trainer: Any) -> str:
    tower, reason = data.locked_tower(module, trainer) or ("", None)
    if not tower:
        return ""
    found = None if reason else data.features(module, trainer)
    if found is None:
        return f"{tower} tower, computed in each step: {reason or 'the disk has no room for its embeddings'}"
    missing = sum(map(len, found.missing))
    how = f"{missing:,} of them computed once, before the first step" if missing else "all there already"
    return f"{tower} tower, {found.num_rows:,} embeddings kept in {found.folder} ({size(found.bytes)}): {how}"


def _pairs(data: Any) -> dict[str, int]:
    counts = {
        "train": len(data.train_index),
        "to replay": len(data.replay_index or ()),
        "val": count_pairs(data.config.dataset, "val") or 0,
    }
    return {name: count for name, count in counts.items() if count}


def _far(data: Any) -> str:
    all_of_it, at_once = data.far_bytes()
    if not all_of_it:
        return ""
    window = f"shuffled within {data.config.window:,} samples" if data.schedule.order else "shuffled as a whole"
    return (
        f"{size(all_of_it)} of tars far away, {window}: about {size(at_once)} here at once; at most "
        f"{size(cache_bytes())} (CLIPTAILOR_CACHE_GB) in {cache_folder()} (CLIPTAILOR_CACHE)"
    )


def _device(trainer: Any) -> str:
    device = trainer.strategy.root_device
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device.type)


def has_bf16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 itself."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# --- memory ----------------------------------------------------------------------------------------------------------


def estimate_memory(module: Any, batch: int, devices: int, precision: str) -> Memory:
    """Estimate the peak on one device; how: see the head of this file.

    Args:
        module: CLIPModule, on any device.
        batch: pairs on this device that are in one backward pass.
        devices: over which the contrast goes.
        precision: as Lightning names it.
    """
    width = 4 if precision.endswith("mixed") else BYTES[precision.partition("-")[0]]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    kept = sum(t.numel() for t in [*module.parameters(), *module.buffers()])
    pair = activation_bytes(module, precision)
    return Memory(
        weights=width * kept,
        gradients=width * trained,
        optimizer=2 * width * trained,
        activations_a_pair=pair,
        activations=pair * min(batch, module.compute.micro_batch_size or batch),
        logits=4 * 4 * batch * batch * devices,
    )


def activation_bytes(module: Any, precision: str = "32-true") -> int:
    """Bytes that autograd keeps for the backward pass of one pair."""
    mixed = precision.endswith("mixed")
    compute, module.compute = module.compute, replace(module.compute, micro_batch_size=None)
    try:
        saved = _saved_bytes(module, LOOKED_AT, mixed=mixed)
    finally:
        module.compute = compute
    pair = sum(count for count in saved if count % LOOKED_AT == 0) // LOOKED_AT
    return pair if mixed else pair * BYTES[precision.partition("-")[0]] // 4


def _saved_bytes(module: Any, size: int, *, mixed: bool) -> list[int]:
    """Bytes of each storage that autograd keeps of `size` pairs."""
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor  # kept, so that no storage's number is given out again
        return tensor

    length = module.clip.tokenizer([""]).shape[-1]
    counters = [(buffer, buffer.clone()) for buffer in module.buffers()]  # of BatchNorm, which counts batches
    cast: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()

    def note_input(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        note(given[0])  # kept by a block that is computed twice, out of autograd's sight

    trained = blocks(name for name, parameter in module.model.named_parameters() if parameter.requires_grad)
    hooks = [module.model.get_submodule(block).register_forward_pre_hook(note_input) for block in trained]
    with (
        torch.random.fork_rng(devices=[]),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        cast,
    ):
        module(torch.zeros(size, 3, *sides(module.clip.preprocess_cfg)), torch.zeros(size, length, dtype=torch.int64))
    for buffer, before in counters:
        buffer.copy_(before)
    for hook in hooks:
        hook.remove()
    return [tensor.untyped_storage().nbytes() for tensor in saved.values()]


def checkpoint_bytes(plan: Plan) -> int:
    """Bytes of a checkpoint, about: weights, moments, and with `ema` a copy of what is trained."""
    average = plan.memory.gradients if plan.config.model.optimizer.ema else 0
    return plan.memory.weights + plan.memory.optimizer + average


# --- in words --------------------------------------------------------------------------------------------------------


def rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """(label, text) of each line of the plan."""
    config, memory = plan.config, plan.memory
    counts = [f"{count:,} {'pairs' if name == 'train' else name}" for name, count in plan.pairs.items()]
    trained_on = ", ".join(shown(source.path) for source in config.data.trained_on)
    yield "data", f"{trained_on}: " + ", ".join(counts) + f" · recipe for this size: {recipe(plan)}"
    if plan.far:
        yield "far", plan.far
    if plan.captions.too_long:
        yield "texts", f"{plan.captions} and are cut"
    if plan.features:
        yield "locked", plan.features
    yield "batch", _batch(plan)
    yield "steps", _steps(plan)
    share = f"{plan.trainable / plan.total:.2%}" if plan.trainable < plan.total else "all"
    yield "trained", f"{plan.trainable:,} of {plan.total:,} parameters ({share}): {config.model.adapter.kind}"
    for group in _few(plan.groups):
        yield (
            "lr",
            (f"{group.lr:.3g}, weight decay {group.weight_decay:g}: {group.name}, {group.parameters:,} parameters"),
        )
    parts = [("weights", memory.weights), ("gradients", memory.gradients), ("AdamW", memory.optimizer)]
    parts += [(f"activations ({size(memory.activations_a_pair)} a pair)", memory.activations)]
    parts += [("logits", memory.logits)]
    listed = ", ".join(f"{name} {size(count)}" for name, count in parts)
    yield "memory", f"about {size(memory.total)} a device: {listed}"
    slow = plan.device == "cpu" and plan.precision.startswith("bf16") and not has_bf16()
    note = " (this CPU has no bfloat16 arithmetic: 32-true is several times faster)" if slow else ""
    yield "device", f"{plan.device}, {plan.precision}{note}"
    yield "writes", _writes(plan)


def _batch(plan: Plan) -> str:
    text = f"{plan.batch:,} pairs"
    if replay := plan.config.data.replay:
        text += f", {replay:.0%} of them replayed"
    if size := plan.config.model.compute.micro_batch_size:
        text += f", {min(size, plan.batch):,} at once through the towers"
    if (batches := plan.config.data.batches) != "shuffled":
        text += f", {batches}"
    if plan.meetings:
        text += f" but for {plan.meetings:,}: their groups have more members than an epoch has batches"
    if plan.devices > 1:
        text += f", on each of {plan.devices} devices; contrast over {plan.batch * plan.devices:,}"
    accumulated = plan.config.trainer.accumulate_grad_batches
    return text + (f"; {accumulated} batches a step" if accumulated > 1 else "")


def _steps(plan: Plan) -> str:
    epochs = plan.steps / max(1, -(-plan.batches // plan.config.trainer.accumulate_grad_batches))
    return f"{plan.steps:,} ({epochs:.4g} epochs of {plan.batches:,} batches), the first {plan.warmup:,} warm-up"


def _writes(plan: Plan) -> str:
    """Where to, how much lies there at once, and whether the disk has room for it."""
    out, needed = plan.config.out, CHECKPOINTS * checkpoint_bytes(plan)
    free = shutil.disk_usage(nearest(out)).free
    short = f": but only {size(free)} are free there" if free < needed else ""
    return f"{out}, checkpoints of up to {size(needed)} at once{short}"


def recipe(plan: Plan) -> str:
    """The recipe that ships for so many pairs: few, medium or large."""
    pairs = plan.pairs.get("train", 0)
    return "few" if pairs < FEW else "medium" if pairs < MEDIUM else "large"


def _few(every: list[Group]) -> Iterator[Group]:
    """The groups; of very many (one a layer) the first and the last, and all between as one."""
    if len(every) <= MOST_GROUPS:
        yield from every
        return
    half = MOST_GROUPS // 2
    between = every[half:-half]
    yield from every[:half]
    yield Group(
        name=f"… {len(between)} groups up to",
        tensors=sum(group.tensors for group in between),
        parameters=sum(group.parameters for group in between),
        lr=between[-1].lr,
        weight_decay=between[-1].weight_decay,
    )
    yield from every[-half:]


def size(count: float) -> str:
    """`607 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # else it would be rounded to 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def tell(plan: Plan, file: TextIO | None = None) -> None:
    """Show the plan: a table on a terminal, lines where it is none."""
    file = file or sys.stderr
    if file.isatty():
        table = Table(title="plan", title_justify="left", show_header=False)
        for label, text in rows(plan):
            table.add_row(label, text)
        Console(file=file).print(table)
    else:
        file.writelines(f"plan: {label:8}{text}\n" for label, text in rows(plan))
