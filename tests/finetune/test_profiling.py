"""`--profile` writes where the time of a step goes; and nothing in a step makes the CPU wait for a number."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import lightning
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from finetune.config import AdapterConfig
from finetune.fit import fit
from finetune.module import CLIPModule
from finetune.packing import packer_of
from tests.finetune.fitted import tiny_config
from tests.finetune.test_trimming import made

WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero")


@pytest.mark.parametrize(("steps", "written"), [(9, True), (3, False)])
def test_some_steps_are_written_down(steps, written, architectures, dataset, tmp_path, caplog):
    config = tiny_config(tmp_path / "run", dataset, architectures["tiny-vit"], AdapterConfig(rank=2), steps=steps)
    config = replace(
        config,
        trainer=replace(config.trainer, val_check_interval=None),
        data=replace(config.data, crop_scale=(1, 1)),
        keep=replace(config.keep, interpolate=0),
    )
    fit(config, profile=True)
    assert (config.out / "profile").exists() == written
    if not written:
        assert "the run ended before step 4" in caplog.text
        return
    told = (config.out / "profile" / "steps.txt").read_text()
    assert told.startswith("steps 4 to 8: ")
    assert "aten::addmm" in told
    events = json.loads((config.out / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum(event["name"] == "Optimizer.step#AdamW.step" for event in events) == 5


class Watched(lightning.Callback):
    """The operations of the third step, from the batch that is there to the weights that are changed."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            self.profile = profile(activities=[ProfilerActivity.CPU])
            self.profile.start()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            self.profile.stop()


@pytest.mark.filterwarnings(
    "ignore:.*treespec, LeafSpec:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:You defined a `validation_step`",
)
@pytest.mark.parametrize("adapter", [{"kind": "full"}, {"rank": 2}], ids=["full", "lora"])
def test_nothing_in_a_step_waits_for_a_number(adapter, tmp_path):
    module = CLIPModule({"name": made(tmp_path, {}), "pretrained": None}, adapter)
    tokens = module.clip.tokenizer(["a cat", "two dogs on a wire", "snow", "a bird and a bee and a flower"])
    batch = {
        "pixels": torch.randn(4, 3, 32, 32),
        "tokens": tokens,
        "packed": packer_of(module.model)(tokens),
        "group": torch.arange(4),
    }
    watched = Watched()
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=False, callbacks=[watched], gradient_clip_val=1.0, log_every_n_steps=50,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch] * 4, batch_size=None))
    events = watched.profile.events()
    assert {"Optimizer.step#AdamW.step", "aten::scaled_dot_product_attention"} <= {event.name for event in events}
    waits = [event for event in events if event.name in WAITS]
    # On a CPU the fused AdamW reads its own step counters.
    assert [above(event) for event in waits if "aten::_fused_adamw_" not in above(event)] == []


def above(event: Any) -> list[str]:
    """The operations that this one is a part of."""
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names
