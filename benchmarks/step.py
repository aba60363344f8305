"""One training step, beside open_clip_train's: samples per CPU-second in float32 and bfloat16, and LoRA's memory.

    python benchmarks/step.py             a tiny ViT and ViT-B/32, medians of three runs; half an hour
    python benchmarks/step.py --quick     the tiny ViT, one run
    python benchmarks/step.py --tiny      the tiny ViT alone, medians of three runs
    python benchmarks/step.py --bf16      bfloat16 too where this CPU has no arithmetic for it: hours

The same tensors for all, made by seed: random images, and captions as long as web captions are (log-normal, median 11
tokens with both ends, σ 0.6; open_clip pads them to 77). Each arm is a process of its own, one thread, all in turn, and
what is counted is CPU time after the first step:

    open_clip       open_clip_train.train.train_one_epoch with its loss and AdamW as its main makes it; fp32, amp_bf16
    finetune        CLIPModule under lightning.Trainer, as `finetune fit` has it; 32-true, bf16-mixed
    bare            the same towers, loss and optimiser in a loop without Lightning
    lora            finetune with LoRA of rank 8 in both towers, 32-true
    lit             finetune with the image tower locked and its embeddings kept (finetune/features.py), 32-true

`ratio_fp32` and `ratio_bf16`: finetune to open_clip in the same precision; `bf16_to_fp32`: finetune in bfloat16 to
open_clip in float32. `bare_share`: finetune to bare. `lora_ratio`: lora to finetune. `lit_ratio`: lit to open_clip;
`lit_to_full`: lit to finetune. All of the tiny ViT; those of ViT-B/32 have `b32_` before them.

Memory is what the process holds at its peak beyond what it held before the first step; `lora_memory_share`: lora's to
finetune's. It is measured in two steps of a process whose malloc gives each tensor back when it is freed, as a GPU's
allocator has it for the next one; `lora_heap_share` is without that, where the C library keeps what is freed in pieces.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

TINY = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 112, "layers": 6, "width": 256, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 6},
}
ARMS = (
    "open_clip fp32",
    "open_clip amp_bf16",
    "finetune 32-true",
    "finetune bf16-mixed",
    "bare 32-true",
    "lora 32-true",
    "lit 32-true",
)
# malloc maps what is larger on its own, and gives it back when it is freed (mallopt(3)).
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}
END, BEGIN = 49407, 49406
Pair = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny ViT, one run")
    parser.add_argument("--tiny", action="store_true", help="the tiny ViT alone")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 even where this CPU has no arithmetic for it")
    parser.add_argument("--arm", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        arm, name, batch, steps = given.arm
        print(json.dumps(measure(arm, name, int(batch), int(steps))))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, torch {version('torch')}, "
          f"lightning {version('lightning')}, open_clip {version('open_clip_torch')}")  # fmt: skip
    arms = list(ARMS)
    if not (given.bf16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        arms = [arm for arm in ARMS if "bf16" not in arm]
        print("this CPU has no bfloat16 arithmetic: without the arms of bfloat16")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny-clip.json"
        tiny.write_text(json.dumps(TINY), encoding="utf-8")
        figures |= compare("tiny", str(tiny), 64, 4, 1 if given.quick else 3, arms)
    if not (given.quick or given.tiny):
        found = compare("ViT-B/32", "ViT-B-32", 16, 3, 3, arms)
        figures |= {f"b32_{key}": value for key, value in found.items()}
    print(json.dumps(figures))


def compare(label: str, name: str, batch: int, steps: int, runs: int, arms: list[str]) -> dict[str, float]:
    """The arms, of one architecture."""
    print(f"\n{label}, batches of {batch}, {steps} steps, median of {runs}\n", flush=True)
    several = [{arm: run_arm(arm, name, batch, steps, {}) for arm in arms} for _ in range(runs)]
    print("| | samples per CPU-second | MB | MB, with the heap |\n|---|---|---|---|")
    found: dict[str, dict[str, float]] = {}
    for arm in arms:
        found[arm] = {key: statistics.median(run[arm][key] for run in several) for key in ("speed", "mb")}
        found[arm]["held"] = run_arm(arm, name, batch, 2, GIVES_BACK)["mb"]
        cells = (f"{found[arm][key]:{form}}" for key, form in (("speed", ".1f"), ("held", ",.0f"), ("mb", ",.0f")))
        print(f"| {arm} | {' | '.join(cells)} |", flush=True)
    speed = {arm: each["speed"] for arm, each in found.items()}
    ours, peer = speed["finetune 32-true"], speed["open_clip fp32"]
    ratios = {
        "ratio_fp32": ours / peer,
        "bare_share": ours / speed["bare 32-true"],
        "lora_ratio": speed["lora 32-true"] / ours,
        "lora_memory_share": found["lora 32-true"]["held"] / found["finetune 32-true"]["held"],
        "lora_heap_share": found["lora 32-true"]["mb"] / found["finetune 32-true"]["mb"],
        "lit_ratio": speed["lit 32-true"] / peer,
        "lit_to_full": speed["lit 32-true"] / ours,
    }
    if half := speed.get("finetune bf16-mixed"):
        ratios |= {"ratio_bf16": half / speed["open_clip amp_bf16"], "bf16_to_fp32": half / peer}
    return {key: round(value, 2) for key, value in ratios.items()}


def run_arm(arm: str, name: str, batch: int, steps: int, environment: dict[str, str]) -> dict[str, float]:
    """What an arm measures of itself."""
    command = [sys.executable, __file__, "--arm", arm, name, str(batch), str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


# --- an arm, in a process of its own ---------------------------------------------------------------------------------


class Clock:
    """Counts after the first step."""

    def __init__(self) -> None:
        self.before, self.began = _peak_mb(), 0.0
        self.steps = 0

    def step(self) -> None:
        """A step has ended."""
        self.steps += 1
        if self.steps == 1:
            self.began = time.process_time()
        self.ended = time.process_time()


def measure(arm: str, name: str, batch: int, steps: int) -> dict[str, float]:
    """Run an arm: samples per CPU-second, and MB beyond what there was before the first step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, precision = arm.split()
    run = {"open_clip": open_clip_train, "bare": bare}.get(kind, finetune)
    clock = run(kind, precision, name, batch, steps + 1)
    speed = batch * (clock.steps - 1) / (clock.ended - clock.began)
    return {"speed": speed, "mb": _peak_mb() - clock.before}


def pairs(size: int, batch: int, steps: int) -> list[Pair]:
    """Images (B, 3, H, W) and token ids (B, 77) of each step."""
    random = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(steps):
        tokens = torch.zeros(batch, 77, dtype=torch.int64)
        lengths = (torch.randn(batch, generator=random) * 0.6).exp().mul(11).round().clamp(3, 77).long()
        for row, length in enumerate(lengths.tolist()):
            tokens[row, :length] = torch.randint(1, 40_000, (length,), generator=random)
            tokens[row, 0], tokens[row, length - 1] = BEGIN, END
        batches.append((torch.randn(batch, 3, size, size, generator=random), tokens))
    return batches


def open_clip_train(_: str, precision: str, name: str, batch: int, steps: int) -> Clock:
    """open_clip's own training loop over tensors that are there already."""
    import open_clip
    from open_clip_train.train import train_one_epoch
    from torch import optim

    if name.endswith(".json"):
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    model: Any = open_clip.create_model(name, output_dict=True)
    data = pairs(model.visual.image_size[0], batch, steps)
    named = list(model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    kept = {id(p) for p in plain}
    groups: list[dict[str, Any]] = [
        {"params": plain, "weight_decay": 0.0},
        {"params": [p for _, p in named if id(p) not in kept]},
    ]
    optimizer = optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    clock = Clock()

    class Loader:
        num_batches, num_samples = steps, steps * batch

        def __iter__(self) -> Any:
            for number, each in enumerate(data):
                if number:
                    clock.step()
                yield each
            clock.step()

    told = Namespace(
        device="cpu", precision=precision, distill=False, accum_freq=1, skip_scheduler=True, grad_clip_norm=1.0,
        horovod=False, rank=0, local_rank=0, log_local=False, log_every_n_steps=10, batch_size=batch, world_size=1,
        wandb=False, tensorboard=False, save_logs=False, distributed=False,
    )  # fmt: skip
    source = SimpleNamespace(dataloader=Loader(), set_epoch=lambda _: None)
    train_one_epoch(model, {"train": source}, open_clip.ClipLoss(), 0, optimizer, None, None, None, told)
    return clock


def _module(kind: str, name: str) -> Any:
    from finetune.module import CLIPModule

    adapters: dict[str, dict[str, Any]] = {
        "lora": {"kind": "lora", "rank": 8},
        "lit": {"kind": "full", "lock": ["image"]},
    }
    return CLIPModule({"name": name, "pretrained": None}, adapters.get(kind, {"kind": "full"}))


def _batches(kind: str, module: Any, batch: int, steps: int) -> list[dict[str, Any]]:
    """As the data module makes them: captions in rows; of a locked tower its embeddings."""
    from finetune.packing import packer_of

    pack = packer_of(module.model)
    assert pack is not None
    group = torch.arange(3 * batch).reshape(3, batch).T  # ids of what is said, of duplicates, and of images
    found = []
    for pixels, tokens in pairs(module.model.visual.image_size[0], batch, steps):
        kept = torch.nn.functional.normalize(pixels[:, 0].flatten(1)[:, : module.width], dim=-1)
        seen = {"image": kept} if kind == "lit" else {"pixels": pixels}
        found.append({**seen, "tokens": tokens, "packed": pack(tokens), "group": group})
    return found


def finetune(kind: str, precision: str, name: str, batch: int, steps: int) -> Clock:
    """CLIPModule under Lightning."""
    import logging
    import warnings

    import lightning

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = _module(kind, name)
    data = _batches(kind, module, batch, steps)
    clock = Clock()

    class Ticks(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.step()

    as_lightning_names_it: Any = precision
    trainer = lightning.Trainer(
        accelerator="cpu", precision=as_lightning_names_it, max_steps=steps, callbacks=[Ticks()], logger=False,
        gradient_clip_val=1.0, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return clock


def bare(kind: str, precision: str, name: str, batch: int, steps: int) -> Clock:
    """The same towers, loss and optimiser, without Lightning."""
    del precision
    from finetune.optim import adamw

    module = _module(kind, name)
    data = _batches(kind, module, batch, steps)
    optimizer = adamw(module.model, module.optimizer)
    clock = Clock()
    for each in data:
        optimizer.zero_grad()
        module.batch_loss(each, gather=True).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        clock.step()
    return clock


def _peak_mb() -> float:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 / 1e6 if found else 0.0


if __name__ == "__main__":
    main()
