"""More than a hundred wrong configurations, each given to the real command in a process of its own.

Each ends with status 2 and at most three lines that name the key, and no traceback; all but a few, which need the CLIP
to be found out, within a second of CPU time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.finetune import tiny
from tests.finetune.fitted import labelled_folder
from tests.finetune.warm import Answer, warm

# Of CPU time: a second, less the half that `finetune --help` may take (test_cli.py): its imports do not count here.
LONGEST_S = 0.5


@dataclass(frozen=True)
class Case:
    """What is set, and what must be said of it.

    Attributes:
        key: set to `value` in the file; None: nothing.
        says: all of these are in the message.
        flags: after `--config FILE`.
        also: further keys.
        heavy: only the CLIP can tell.
        in_file: the message begins with the file and the line of the key.
    """

    key: str | None
    value: Any
    says: tuple[str, ...]
    flags: tuple[str, ...] = ()
    also: tuple[tuple[str, Any], ...] = ()
    heavy: bool = False
    in_file: bool = True


def case(key: str | None, value: Any, *says: str, flags: str = "", heavy: bool = False, **also: Any) -> Case:
    more = tuple((name.replace("__", "."), item) for name, item in also.items())
    return Case(key, value, says, tuple(flags.split()), more, heavy, in_file=not flags and not heavy)


def typo(key: str, meant: str, value: Any = 1) -> Case:
    return case(key, value, f"no key '{key}'", f"Did you mean '{meant}'?")


def kind(key: str, value: Any, expected: str) -> Case:
    return case(key, value, f"{key}: expected {expected}", ", got ")


def not_here(name: str, value: Any, *says: str) -> Case:
    return case(f"trainer.{name}", value, f"trainer.{name}: ", *says)


TYPOS = [
    typo("trainr", "trainer", {"max_steps": 1}),
    typo("models", "model", {}),
    typo("dat", "data", {}),
    typo("outt", "out", "x"),
    typo("seed", "seed_everything"),
    typo("lr", "model.optimizer.lr", 1e-4),
    typo("max_epochs", "trainer.max_epochs"),
    typo("dataset", "data.dataset", "x"),
    typo("trainer.max_epoch", "trainer.max_epochs"),
    typo("trainer.maxsteps", "trainer.max_steps"),
    typo("trainer.device", "trainer.devices"),
    typo("trainer.precison", "trainer.precision", "32-true"),
    typo("trainer.acelerator", "trainer.accelerator", "cpu"),
    typo("trainer.gradient_clip", "trainer.gradient_clip_val", 1.0),
    typo("trainer.accumulate_grad_batch", "trainer.accumulate_grad_batches", 2),
    typo("trainer.lr", "model.optimizer.lr", 1e-4),
    typo("model.lr", "model.optimizer.lr", 1e-4),
    typo("model.rank", "model.adapter.rank", 4),
    typo("model.adpter", "model.adapter", {}),
    typo("model.optimiser", "model.optimizer", {}),
    typo("model.clip.nam", "model.clip.name", "RN50"),
    typo("model.clip.pretraind", "model.clip.pretrained", "openai"),
    typo("model.adapter.knd", "model.adapter.kind", "lora"),
    typo("model.adapter.aplha", "model.adapter.alpha", 8),
    typo("model.adapter.target", "model.adapter.targets", ["q"]),
    typo("model.optimizer.warm_up", "model.optimizer.warmup", 0.1),
    typo("model.optimizer.weightdecay", "model.optimizer.weight_decay", 0.1),
    typo("model.loss.label_smooth", "model.loss.label_smoothing", 0.1),
    typo("model.loss.distill_features", "model.loss.distill_feature", 0.1),
    typo("model.compute.microbatch_size", "model.compute.micro_batch_size", 8),
    typo("data.batchsize", "data.batch_size", 8),
    typo("data.workers", "data.num_workers", 8),
    typo("data.replay_data", "data.replay_dataset", "x"),
    typo("evaluate.zeroshot", "evaluate.zero_shot", {}),
    typo("evaluate.monitr", "evaluate.monitor", "val/loss"),
]
NOT_HERE = [
    not_here("logger", True, "metrics.csv"),
    not_here("callbacks", [], "CLIPModule"),
    not_here("plugins", [], "CLIPModule"),
    not_here("fast_dev_run", True, "--dry_run"),
    not_here("limit_train_batches", 3, "trainer.max_steps"),
    not_here("default_root_dir", "x", "`out`"),
    not_here("num_sanity_val_steps", 2, "untouched CLIP"),
]
TYPES = [
    kind("model.optimizer.lr", "abc", "a number"),
    kind("model.optimizer.lr", "1e-4x", "a number"),
    kind("model.optimizer.lr", "1e-4 per step", "a number"),
    kind("model.optimizer.lr", None, "a number"),
    kind("model.optimizer.lr", [1e-4], "a number"),
    kind("model.optimizer.lr", True, "a number"),
    kind("model.optimizer.lr", float("nan"), "a number"),
    kind("model.optimizer.betas", 0.9, "a list of 2: a number, a number"),
    kind("model.optimizer.betas", [0.9], "a list of 2: a number, a number"),
    case("model.optimizer.betas", [0.9, "x"], "model.optimizer.betas[1]: expected a number, got 'x'"),
    kind("model.adapter.kind", "lorra", "one of "),
    kind("model.adapter.rank", 4.5, "a whole number"),
    kind("model.adapter.rank", "four", "a whole number"),
    kind("model.adapter.targets", "q", "a list, each text"),
    case("model.adapter.targets", ["q", 3], "model.adapter.targets[1]: expected text, got 3"),
    case("data.dataset", "wds/{0..9}.tar", "data.dataset: wds/{0..9}.tar: tars are read as a whole folder; give wds/"),
    case("model.adapter.lock", ["img"], "model.adapter.lock[0]: expected one of image, text, got 'img'"),
    kind("model.adapter.train_logit_scale", "maybe", "true or false"),
    kind("model.loss.multi_positive", 1, "true or false"),
    kind("model.loss.kind", "sigmoid", "one of auto, clip, siglip"),
    kind("model.clip.name", 32, "text"),
    kind("model.clip.name", None, "text"),
    kind("model.clip", "ViT-B-32", "keys (name, pretrained)"),
    kind("model", 3, "keys ("),
    kind("model.optimizer", None, "keys ("),
    kind("trainer", ["max_epochs"], "keys ("),
    kind("trainer.max_epochs", "ten", "a whole number or null"),
    kind("trainer.max_epochs", 2.5, "a whole number or null"),
    kind("trainer.precision", "fp16", "one of "),
    kind("trainer.profiler", "fast", "one of simple, advanced, pytorch or null"),
    kind("trainer.gradient_clip_val", "1,0", "a number or null"),
    kind("data.batch_size", "8 pairs", "a whole number"),
    kind("data.batch_size", {"train": 8}, "a whole number"),
    kind("data.dataset", ["bare"], "a path"),
    kind("data.crop_scale", [0.9, 1.0, 1.1], "a list of 2"),
    kind(
        "evaluate.zero_shot",
        ["colours"],
        "a mapping of names to keys (images, split, root, download, classes, image_column, label_column, templates)",
    ),
    kind("evaluate.retrieval.flowers", 3, "a path"),
    case("evaluate.zero_shot.a", {"images": "colours", "template": []}, "no key 'evaluate.zero_shot.a.template'"),
    kind("seed_everything", "random", "a whole number"),
    kind("data.decode", "pillow", "one of fast, exact"),
    kind("data.batches", "sorted", "one of shuffled, without_twins, by_length, hard_negatives"),
    kind("data.cache_features", False, "one of auto, never"),
    kind("data.max_broken", "1 %", "a number"),
    kind("data.sources", "dataset", "a list, each keys (path, weight, where, templates, image, caption)"),
    typo("data.cach_features", "data.cache_features", "never"),
    typo("data.batch", "data.batches", "by_length"),
]
BOUNDS = [
    case("model.optimizer.lr", -1.0, "model.optimizer.lr: expected above 0, got -1.0"),
    case("model.optimizer.lr", 0, "model.optimizer.lr: expected above 0"),
    case("model.optimizer.warmup", 1, "model.optimizer.warmup: expected "),
    case("model.optimizer.warmup", 500, "model.optimizer.warmup: expected "),
    case("model.optimizer.weight_decay", -0.1, "model.optimizer.weight_decay: expected 0 or more"),
    case("model.optimizer.betas", [0.9, 1.0], "model.optimizer.betas: expected 0 to below 1, got 1.0"),
    case("model.optimizer.min_lr", 1.0, "model.optimizer.min_lr: expected at most the lr of"),
    case("model.adapter.rank", 0, "model.adapter.rank: expected "),
    case("model.adapter.dropout", 1.0, "model.adapter.dropout: expected a share, 0 to below 1"),
    case("model.adapter.targets", ["q", "key"], "model.adapter.targets: 'key' is none of q, k, v"),
    case("model.adapter.targets", [], "model.adapter.targets: empty"),
    case("model.loss.label_smoothing", 1.5, "model.loss.label_smoothing: expected "),
    case("model.loss.logit_scale", 0.07, "model.loss.logit_scale: expected 1 to 100, got 0.07"),
    case("model.loss.distill_feature", -1.0, "model.loss.distill_feature: expected 0 or more"),
    case("model.loss.distill_logit", -1.0, "model.loss.distill_logit: expected 0 or more"),
    case("model.loss.l2_start", -0.1, "model.loss.l2_start: expected 0 or more"),
    case("data.batch_size", 1, "data.batch_size: a contrastive batch needs at least 2"),
    case("data.eval_batch_size", 0, "data.eval_batch_size: expected at least 1"),
    case("data.num_workers", -1, "data.num_workers: expected at least 0"),
    case("data.replay", 1.0, "data.replay: expected a share"),
    case("data.crop_scale", [0.0, 1.0], "data.crop_scale: expected above 0 to 1, got 0.0"),
    case("data.crop_scale", [1.0, 0.5], "data.crop_scale: expected [smallest, largest]"),
    case("data.max_broken", 1.0, "data.max_broken: expected 0 to below 1, got 1.0"),
    case("data.max_broken", -0.1, "data.max_broken: expected 0 to below 1, got -0.1"),
    case("data.sources", [{"path": "dataset", "weight": 0}], "data.sources[0].weight: expected above 0"),
    case("evaluate.max_retrieval", 0, "evaluate.max_retrieval: expected at least 2"),
    case("checkpoint_every_n_steps", 0, "checkpoint_every_n_steps: expected at least 1"),
    case("seed_everything", -1, "seed_everything: expected 0 to "),
    case("trainer.num_nodes", 0, "trainer.num_nodes: expected at least 1"),
    case("trainer.devices", 0, "trainer.devices: expected "),
    case("trainer.devices", "two", "trainer.devices: expected "),
    case("trainer.accumulate_grad_batches", 0, "trainer.accumulate_grad_batches: expected at least 1"),
    case("trainer.val_check_interval", 1.5, "trainer.val_check_interval: expected "),
    case("trainer.val_check_interval", 0, "trainer.val_check_interval: expected "),
    case("trainer.max_time", "two hours", "trainer.max_time: expected DAYS:HH:MM:SS"),
    case("trainer.max_time", "00:00:00:00", "trainer.max_time: expected DAYS:HH:MM:SS"),
    case("trainer.accelerator", "gpus", "trainer.accelerator: expected ", "Did you mean 'gpu'?"),
    case("trainer.strategy", "dpp", "trainer.strategy: expected "),
    case("model.optimizer.ema", 1.0, "model.optimizer.ema: expected above 0 to below 1"),
    case("model.compute.micro_batch_size", 0, "model.compute.micro_batch_size: expected at least 1"),
    case("model.compute.patch_dropout", 1.0, "model.compute.patch_dropout: expected 0 to below 1"),
]
TOGETHER = [
    case("model.loss.l2_start", 0.1, "model.loss.l2_start: the start is random weights"),
    case("trainer.max_steps", -1, "trainer: needs max_epochs or max_steps", trainer__max_epochs=0),
    case("model.adapter.lock", ["image", "text"], "model.adapter.lock: with both towers locked"),
    case("trainer.precision", "16-mixed", "trainer.precision: 16-mixed needs a GPU", "trainer.accelerator is cpu"),
    case("trainer.precision", "16-true", "trainer.precision: 16-true needs a GPU"),
    case("model.optimizer.ema", 0.9, "model.optimizer.ema: not with trainer.strategy fsdp2", trainer__strategy="fsdp2"),
    case("trainer.devices", [0, 1], "trainer.devices: on a cpu it is the number of processes"),
    case("trainer.check_val_every_n_epoch", None, "trainer.check_val_every_n_epoch: null needs a val_check_interval"),
    case("data.replay", 0.2, "data.replay: 0.2 of each batch, but bare has no retain split", data__dataset="bare"),
    case("data.replay_dataset", "bare", "data.replay_dataset: nothing of it is replayed while data.replay is 0"),
    case("data.batch_size", 256, "data.batch_size: 256 pairs a step, but dataset has 40"),
    case("out", "dataset", "out: dataset is the dataset itself"),
    case("out", "notes.txt", "out: notes.txt is a file"),
    case(
        "evaluate.monitor",
        "val/image_to_text/recal@1",
        "evaluate.monitor: nothing measures",
        "'val/image_to_text/recall@1'",
    ),
    case("evaluate.monitor", "zero_shot/colours/top1", "evaluate.monitor: nothing measures 'zero_shot/colours/top1'"),
    case("evaluate.monitor", "val/loss", "evaluate.monitor: bare has no val split", data__dataset="bare"),
    case("evaluate.retrieval.val", "bare", "evaluate.retrieval.val: this name is the dataset's own split's"),
    case("evaluate.retrieval.a/b", "bare", "evaluate.retrieval.a/b: the name 'a/b' has a slash"),
    case("evaluate.zero_shot.c", {"images": "colours", "templates": ["a photo"]}, "evaluate.zero_shot.c.templates: "),
]
MISSING = [
    case("data.dataset", "datset", "data.dataset: datset: no such folder; expected a dataset"),
    case("data.dataset", "empty", "data.dataset: empty: an empty folder; expected a dataset"),
    case("data.sources", [{"path": "nowhere"}], "data.sources[0].path: nowhere: no such folder"),
    case("data.replay_dataset", "nowhere", "data.replay_dataset: nowhere: no such", data__replay=0.5),
    case("evaluate.retrieval.flowers", "nowhere", "evaluate.retrieval.flowers: nowhere: no such folder"),
    case(
        "evaluate.zero_shot.c",
        {"images": "colours", "templates": "cifr10"},
        "evaluate.zero_shot.c.templates: ",
        "Did you mean 'cifar10'?",
    ),
    case(
        "evaluate.zero_shot.c",
        {"images": "torchvision:CIFAR10"},
        "evaluate.zero_shot.c.images: torchvision:CIFAR10 ",
    ),
    case(
        "evaluate.zero_shot.c", {"images": "colours", "root": "."}, "evaluate.zero_shot.c.root: it is for torchvision's"
    ),
    case(
        "evaluate.zero_shot.c",
        {"images": "colours", "classes": "gone.txt"},
        "evaluate.zero_shot.c.classes: gone.txt: no such file",
    ),
    case("evaluate.zero_shot.c", {"images": "nowhere"}, "evaluate.zero_shot.c.images: nowhere: no such folder"),
    case("model.clip.name", "nowhere.json", "model.clip.name: nowhere.json: no such file"),
    case("model.clip.name", "weights/ViT-B-32.pt", "model.clip.name: weights/ViT-B-32.pt: no such file"),
    case("model.clip.name", "local-dir:nowhere", "model.clip.name: nowhere: no such folder"),
    case("model.clip.name", "ViT-B-23", "model.clip.name: 'ViT-B-23' is no architecture", "Did you mean 'ViT-B-32'?"),
    case("model.clip.pretrained", "weights/clip.pt", "model.clip.pretrained: weights/clip.pt: no such file"),
    case("model.clip.pretrained", "empty", "model.clip.pretrained: empty is a folder", "local-dir:empty"),
    case("model.clip.pretrained", "laion9b", "laion9b", model__clip__name="RN50", heavy=True),
    case("model.adapter.targets", ["q", "conv"], "model.adapter.targets: 'conv' names no layer", heavy=True),
    case("trainer.accelerator", "mps", "trainer: ", heavy=True),
]
FLAGS = [
    case(None, None, "no key 'model.lr'", "'model.optimizer.lr'", flags="--model.lr 1e-4"),
    case(None, None, "no key 'model.adpter.kind'", "'model.adapter.kind'", flags="--model.adpter.kind full"),
    case(None, None, "trainer.logger: ", flags="--trainer.logger wandb"),
    case(None, None, "model.optimizer.lr: expected a number, got '1e-4x'", flags="--model.optimizer.lr 1e-4x"),
    case(None, None, "model.optimizer.lr: expected a number", flags="--model.optimizer.lr nan"),
    case(None, None, "data.batch_size: expected a whole number, got 'x'", flags="--data.batch_size x"),
    case(None, None, "--config more.yaml: no such file", flags="--config more.yaml"),
    case(None, None, "--config medum: no such file", "Did you mean 'medium'?", flags="--config medum"),
    case(None, None, "--config empty: cannot be read (Is a directory)", flags="--config empty"),
    case(None, None, "notes.txt:1: the file: expected keys (", flags="--config notes.txt"),
    case(None, None, "--out: expected one argument", flags="--out"),
    case(None, None, "no key 'dryrun'", flags="--dryrun"),
    case(None, None, "no key 'continue_change'", flags="--continue_change"),
    case(None, None, "no key 'profiles'", flags="--profiles"),
    case(None, None, "ckpt_path: gone.ckpt: no such file; expected last or the path", flags="--ckpt_path gone.ckpt"),
    case(None, None, "ckpt_path: run/checkpoints: no checkpoint to go on from", flags="--ckpt_path last"),
    case(None, None, "ckpt_path: --restart begins anew", flags="--ckpt_path last --restart"),
    case(None, None, "--ckpt_path: expected one argument", flags="--ckpt_path"),
]
CASES = [*TYPOS, *NOT_HERE, *TYPES, *BOUNDS, *TOGETHER, *MISSING, *FLAGS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, dataset) -> Path:
    """A working directory with all that a right configuration needs, and some of what wrong ones name."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "dataset").symlink_to(dataset)
    tiny.write_dataset(folder / "bare", val=0, retain=0)
    labelled_folder(folder / "colours", each=1)
    tiny.write_architecture("tiny-vit", folder)
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("buy milk\n")
    return folder


def right() -> dict[str, Any]:
    """A configuration that is right."""
    return {
        "out": "run",
        "trainer": {"accelerator": "cpu", "max_steps": 1},
        "model": {"clip": {"name": "tiny-vit.json", "pretrained": None}},
        "data": {"dataset": "dataset", "batch_size": 8, "num_workers": 0},
    }


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[leaf] = value


@pytest.fixture(scope="module")
def fit(folder) -> Iterator[Callable[..., Answer]]:
    """`finetune fit` with these arguments, in a process of its own."""
    with warm() as command:
        yield lambda *arguments: command(folder, ["fit", *arguments])


@pytest.fixture(scope="module")
def heavy_fit(folder) -> Iterator[Callable[..., Answer]]:
    """The same for what needs the CLIP; torch and Lightning are there already."""
    with warm("finetune.module", "open_clip", "peft", "sympy") as command:
        yield lambda *arguments: command(folder, ["fit", *arguments])


def check(answer: Answer, *says: str, heavy: bool = False) -> None:
    status, error, seconds = answer
    assert status == 2, error
    assert "Traceback" not in error
    assert error.count("\n") <= 3, error
    for text in says:
        assert text in error
    assert heavy or seconds < LONGEST_S


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.key or ' '.join(case.flags)}={case.value}")
def test_a_wrong_configuration_is_explained_at_once(case, folder, request):
    fit = request.getfixturevalue("heavy_fit" if case.heavy else "fit")
    tree = right() | ({"out": "heavy"} if case.heavy else {})
    for key, value in [*case.also, *([(case.key, case.value)] if case.key else [])]:
        put(tree, key, value)
    text = yaml.safe_dump(tree, sort_keys=False)
    (folder / "domain.yaml").write_text(text)
    answer = fit("--config", "domain.yaml", *case.flags)
    check(answer, *case.says, heavy=case.heavy)
    if case.in_file:
        place, line, _ = answer[1].removeprefix("finetune: ").split(":", 2)
        key = re.search(r"[\w.]*\.?\b([\w/]+)(\[\d\])?('|: |$)", case.says[0])  # that the message is about
        assert place == "domain.yaml"
        assert key[2] or f"{key[1]}:" in text.splitlines()[int(line) - 1]
    assert not (folder / "run").exists()


BROKEN = {
    "tab": (b"trainer:\n\tmax_epochs: 1\n", "domain.yaml:2: not YAML"),
    "bracket": (b"data: {dataset: [x\n", "domain.yaml:2: not YAML"),
    "colon": (b"out: a: b\n", "domain.yaml:1: not YAML"),
    "twice": (b"out: a\ndata: {batch_size: 8}\nout: b\n", "domain.yaml:3: out: given twice, first in line 1"),
    "inner twice": (b"data:\n  replay: 0.1\n  replay: 0.2\n", "domain.yaml:3: data.replay: given twice"),
    "list": (b"- out: a\n", "domain.yaml:1: the file: expected keys (out, "),
    "number": (b"3\n", "domain.yaml:1: the file: expected keys (out, "),
    "empty": (b"", "domain.yaml: empty; expected keys (out, "),
    "comments": (b"# nothing yet\n", "domain.yaml: empty; expected keys (out, "),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\x00", "--config domain.yaml: cannot be read (not UTF-8)"),
    "control": (b"out: a\x00b\n", "--config domain.yaml: cannot be read (no text"),
    "utf-16": ("out: a\n".encode("utf-16"), "--config domain.yaml: cannot be read (not UTF-8)"),
    "two": (b"out: a\n---\nout: b\n", "domain.yaml:2: not YAML"),
    "object": (b"out: !!python/object/apply:os.system [ls]\n", "domain.yaml:1: not YAML (could not"),
    "anchor": (b"out: *nowhere\n", "domain.yaml:1: not YAML"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_configuration_is_explained_at_once(name, folder, fit):
    content, says = BROKEN[name]
    (folder / "domain.yaml").write_bytes(content)
    check(fit("--config", "domain.yaml"), says)


def test_there_are_more_than_a_hundred_and_hardly_one_needs_the_clip():
    assert len(CASES) + len(BROKEN) >= 100
    assert sum(case.heavy for case in CASES) <= 0.05 * len(CASES)


def test_the_configuration_that_they_are_made_from_is_right(folder, heavy_fit):
    tree = right() | {"evaluate": {"zero_shot": {"c": {"images": "colours"}}, "monitor": "zero_shot/c/top1"}}
    (folder / "domain.yaml").write_text(yaml.safe_dump(tree))
    status, error, _ = heavy_fit("--config", "domain.yaml", "--dry_run")
    assert (status, error) == (0, "")
    assert not (folder / "run").exists()
