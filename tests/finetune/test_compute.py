"""A batch in parts, blocks computed twice, compiled towers, patches left out: the same gradient, less memory."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn

from curate.errors import ModelError
from finetune.compute import in_parts, one_by_one
from finetune.config import AdapterConfig, ComputeConfig
from finetune.export import export
from finetune.fit import fit
from finetune.losses import local_rows
from finetune.module import CLIPModule
from finetune.packing import Packed
from finetune.runs import load_module
from tests.finetune.fitted import tiny_config

PAIRS, PART, WORLD = 32, 5, 2  # the last part is smaller
Gradients = dict[str, torch.Tensor]


def batch(pairs: int = PAIRS) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 1000, (pairs, 16), generator=random)
    tokens[:, 8] = 49407
    group = torch.stack([torch.arange(pairs) % 11, torch.arange(pairs)], dim=1)
    pixels = torch.randn(pairs, 3, 32, 32, generator=random, dtype=torch.float64)
    return {"pixels": pixels, "tokens": tokens, "group": group}


def module(architecture: str, adapter: AdapterConfig, **compute: Any) -> CLIPModule:
    torch.manual_seed(5)
    made = CLIPModule({"name": architecture, "pretrained": None}, adapter, compute=ComputeConfig(**compute)).double()
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:  # which begins at zero, where A has no gradient
            nn.init.normal_(parameter, std=0.1)
    return made


def gradients(made: CLIPModule, given: dict[str, torch.Tensor], seed: int = 1) -> Gradients:
    made.zero_grad()
    torch.manual_seed(seed)
    made.batch_loss(given, gather=True).backward()
    return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


def assert_same(found: Gradients, expected: Gradients, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name, **(tolerance or {"rtol": 1e-9, "atol": 1e-12}))


# --- cached gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["tiny-vit", "tiny-resnet"])
@pytest.mark.parametrize(
    "adapter",
    [AdapterConfig(kind="full"), AdapterConfig(rank=2), AdapterConfig(kind="full", lock=["image"])],
    ids=["full", "lora", "locked"],
)
def test_the_gradient_of_a_batch_in_parts_is_that_of_the_batch(architectures, architecture, adapter):
    whole = module(architectures[architecture], adapter)
    whole.eval()  # else a ResNet from random weights takes statistics of the batch
    parts = copy.deepcopy(whole)
    parts.compute = ComputeConfig(micro_batch_size=PART)
    expected = gradients(whole, batch())
    assert "logit_scale" in expected
    assert len(expected) > 4
    assert_same(gradients(parts, batch()), expected)


@pytest.mark.parametrize("given", [{"dropout": 0.3}, {"patches": 0.5}], ids=["dropout", "patch dropout"])
def test_random_numbers_are_drawn_again_alike_for_the_backward_pass(architectures, given, monkeypatch):
    adapter = AdapterConfig(rank=2, dropout=given.get("dropout", 0.0))
    compute = {"patch_dropout": given.get("patches", 0.0), "micro_batch_size": PART}
    made = module(architectures["tiny-vit"], adapter, **compute)
    found = gradients(made, batch())
    assert any(not torch.equal(found[name], other) for name, other in gradients(made, batch(), seed=2).items())

    def with_all_kept(encode: Any, inputs: torch.Tensor, size: int) -> torch.Tensor:
        return torch.cat([encode(part) for part in inputs.split(size)])

    monkeypatch.setattr("finetune.module.in_parts", with_all_kept)
    assert_same(found, gradients(made, batch()))


def test_a_batch_in_parts_under_autocast(architectures):
    whole = module(architectures["tiny-vit"], AdapterConfig(kind="full")).float()
    parts = copy.deepcopy(whole)
    parts.compute = ComputeConfig(micro_batch_size=8)
    given = batch() | {"pixels": batch()["pixels"].float()}
    found = []
    for made in (whole, parts):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(made, given))
    # Sums over other parts, in bfloat16, which has eight bits.
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= 0.05 * expected.norm() + 1e-6, name


MEMORY = """
import json, re, sys, torch
from pathlib import Path
from finetune.module import CLIPModule
def peak():  # of this program; ru_maxrss is the parent's too
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 4}
vision = {"image_size": 64, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8}
Path(sys.argv[1]).write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
pairs = 256
given = {"pixels": torch.randn(pairs, 3, 64, 64), "tokens": torch.ones(pairs, 16, dtype=torch.long),
         "group": torch.arange(pairs)[:, None]}
before = None
for size in (16, None):  # the smaller peak first
    made = CLIPModule({"name": sys.argv[1], "pretrained": None}, {"kind": "full"}, compute={"micro_batch_size": size})
    made.losses(made.embed(given | {"pixels": given["pixels"][:4], "tokens": given["tokens"][:4]}), None)
    before = before or peak()
    made.losses(made.embed(given), None)["contrastive"].backward()
    print(peak() - before)
"""


def test_a_batch_in_parts_needs_the_memory_of_a_part(tmp_path):
    """Peak resident memory, in kB above what the process began with.

    Every tensor has pages of its own, which go back when it is freed: what the heap keeps for later differs from run
    to run by a tenth of the peak.
    """
    gives_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "clip.json")]
    told = subprocess.run(command, env=gives_back, capture_output=True, text=True, check=True, timeout=120)
    in_parts, whole = map(int, told.stdout.split())
    assert whole > 150_000
    assert in_parts < 0.25 * whole


class Step(nn.Module):
    def __init__(self, clip: CLIPModule) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.clip.batch_loss(given, gather=True)


def one_rank(rank: int, folder: str, architecture: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    step = Step(module(architecture, AdapterConfig(kind="full"), micro_batch_size=PART))
    model = nn.parallel.DistributedDataParallel(step)
    sent: list[int] = []

    def count(_, bucket):
        sent.append(bucket.index())
        mean = torch.distributed.all_reduce(bucket.buffer().div_(WORLD), async_op=True).get_future()
        return mean.then(lambda done: done.value()[0])

    model.register_comm_hook(None, count)
    model({key: value[local_rows(PAIRS // WORLD)] for key, value in batch().items()}).backward()
    found = {name: p.grad for name, p in step.clip.model.named_parameters() if p.grad is not None}
    torch.save({"gradients": found, "sent": sent}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_exchange_the_gradient_of_a_batch_in_parts_once(architectures, tmp_path: Path):
    architecture = architectures["tiny-vit"]
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path), architecture), nprocs=WORLD)
    expected = gradients(module(architecture, AdapterConfig(kind="full")), batch())
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)  # noqa: TID251 - written above
        assert_same(found["gradients"], expected)
        assert found["sent"] == sorted(set(found["sent"]))  # each bucket once, whatever the number of parts


def test_a_whole_run_in_parts_gives_the_weights_of_one_in_whole_batches(dataset, architectures, tmp_path):
    weights = []
    for size in (None, 3):
        config = tiny_config(tmp_path / str(size), dataset, architectures["tiny-vit"], AdapterConfig(kind="full"))
        model = replace(config.model, compute=ComputeConfig(micro_batch_size=size))
        fit(replace(config, model=model))
        weights.append(load_module(config.out / "checkpoints" / "last.ckpt").state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-4, msg=name)  # Adam: sign-like first steps


def test_statistics_of_a_part_are_refused(architectures):
    with pytest.raises(ModelError, match=r"model\.compute\.micro_batch_size: .* BatchNorm"):
        CLIPModule(
            {"name": architectures["tiny-resnet"], "pretrained": None},
            {"kind": "full"},
            compute={"micro_batch_size": 4},
        )


def test_parts_of_no_gradient_are_embedded_without_a_graph():
    sizes = []

    def encode(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return part * part

    inputs = torch.arange(7.0, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(in_parts(encode, inputs, 3), inputs * inputs)
    assert sizes == [3, 3, 1]
    in_parts(encode, inputs, 3).sum().backward()
    assert torch.equal(inputs.grad, 2 * inputs)
    assert sizes[3:] == [3, 3, 1, 1, 3, 3]  # and each again, the last part first


def test_the_devices_of_packed_captions_are_seen_where_random_numbers_are_kept(monkeypatch):
    """On a GPU its generator is put back for the tensors that are handed over; else dropout would draw another mask."""
    handed: list[Any] = []

    def noted(function: Any, *given: Any, **more: Any) -> Any:
        handed.append(given)
        return function(*given)

    monkeypatch.setattr("finetune.compute.checkpoint", noted)
    parts = [Packed(*[torch.zeros(1, 2)] * len(Packed.__slots__)) for _ in range(2)]
    one_by_one(lambda part: part.token_RW + torch.zeros(1, requires_grad=True), parts)
    assert [[type(each) for each in given] for given in handed] == [[torch.Tensor]] * 2


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter", [AdapterConfig(kind="full"), AdapterConfig(rank=2, dropout=0.2)], ids=["full", "lora"]
)
def test_checkpointed_blocks_give_the_same_gradient(architectures, adapter):
    plain = module(architectures["tiny-vit"], adapter)
    twice = module(architectures["tiny-vit"], adapter, gradient_checkpointing=True)
    kept = {}
    for name, made in (("plain", plain), ("twice", twice)):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: (to.append(x.numel()), x)[1], lambda x: x):
            torch.manual_seed(1)
            made.batch_loss(batch(), gather=False)
        kept[name] = sum(sizes)
    assert kept["twice"] < 0.3 * kept["plain"]
    assert_same(gradients(twice, batch()), gradients(plain, batch()))


def test_patches_are_left_out_in_training_only_and_not_from_the_export(dataset, architectures, tmp_path):
    config = tiny_config(tmp_path / "run", dataset, architectures["tiny-vit"], AdapterConfig(kind="full"))
    config = replace(config, model=replace(config.model, compute=ComputeConfig(patch_dropout=0.5)))
    made = module(architectures["tiny-vit"], AdapterConfig(kind="full"), patch_dropout=0.5)
    seen: list[int] = []
    made.model.visual.transformer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    pixels = batch(2)["pixels"]
    made.encode_image(pixels)
    made.eval()
    made.encode_image(pixels)
    assert seen == [1 + 2, 1 + 4]  # a class token, and of four patches two
    fit(config)
    export(config.out, tmp_path / "clip")
    assert "patch_dropout" not in (tmp_path / "clip" / "open_clip_config.json").read_text()


@pytest.mark.parametrize(
    ("architecture", "adapter", "compute", "told"),
    [
        (
            "tiny-resnet",
            {"kind": "full"},
            {"gradient_checkpointing": True},
            "gradient_checkpointing: the image tower has no",
        ),
        ("tiny-resnet", {"kind": "full"}, {"patch_dropout": 0.5}, "patch_dropout: this CLIP's image tower is no ViT"),
        ("tiny-vit", {"lock": ["image"]}, {"patch_dropout": 0.5}, "patch_dropout: the image tower is not trained"),
    ],
)
def test_what_a_tower_cannot_do_is_told(architectures, architecture, adapter, compute, told):
    with pytest.raises(ModelError, match=rf"model\.compute\.{told}"):
        CLIPModule({"name": architectures[architecture], "pretrained": None}, adapter, compute=compute)


def test_compiled_towers_give_the_same_gradient_and_the_same_keys(architectures, monkeypatch):
    """By dynamo and autograd, without the C++ compiler, which would take a minute."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda what, **more: plain(what, **more | {"backend": "aot_eager"}))
    made = module(architectures["tiny-vit"], AdapterConfig(rank=2), compile=True)
    eager = module(architectures["tiny-vit"], AdapterConfig(rank=2))
    assert made.state_dict().keys() == eager.state_dict().keys()
    torch._dynamo.reset()
    assert_same(gradients(made, batch()), gradients(eager, batch()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert load_weights(made, eager)


def load_weights(first: CLIPModule, second: CLIPModule) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
