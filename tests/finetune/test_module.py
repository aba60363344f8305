from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from dataclasses import asdict

import lightning
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from curate.clip import load_clip
from curate.errors import ConfigError
from finetune import CLIPDataModule, CLIPModule
from finetune.config import AdapterConfig, ClipConfig, LossConfig, OptimizerConfig
from finetune.losses import contrastive_loss, positives
from finetune.start import Start
from tests.finetune.tiny import plain_state_dict

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


@pytest.fixture(scope="module")
def weights(architectures, tmp_path_factory) -> dict[str, str]:
    """Saved random weights of each tiny architecture: what a run fine-tunes."""
    saved = {}
    for name, path in architectures.items():
        torch.manual_seed(3)
        saved[name] = str(tmp_path_factory.mktemp("weights") / f"{name}.pt")
        torch.save(load_clip(path, device="cpu").model.state_dict(), saved[name])
    return saved


def batch(size: int = 6) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 1000, (size, 16), generator=random)
    tokens[:, 8] = 49407
    group = torch.arange(size) // 2
    return {"pixels": torch.randn(size, 3, 32, 32, generator=random), "tokens": tokens, "group": group}


def trainer(tmp_path, **settings) -> lightning.Trainer:
    return lightning.Trainer(
        **({"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1} | settings),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )


def test_embeddings_are_those_of_open_clip_normalised(architectures, weights):
    clip = load_clip(architectures["tiny-vit"], weights["tiny-vit"], device="cpu")
    module = CLIPModule(ClipConfig(name=architectures["tiny-vit"], pretrained=weights["tiny-vit"])).eval()
    given = batch()
    image, text = module(given["pixels"], given["tokens"])
    torch.testing.assert_close(image, clip.embed_images(given["pixels"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(text, clip.embed_captions(given["tokens"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("micro_batch_size", "dtype"), [(None, torch.float32), (4, torch.float32), (None, torch.float64)]
)
def test_bytes_are_normalised_as_the_clips_own_preprocessing_does(architectures, micro_batch_size, dtype):
    compute = {"micro_batch_size": micro_batch_size}
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None}, compute=compute).eval().to(dtype)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    seen = [module.clip.preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    torch.testing.assert_close(module.encode_image(images), module.encode_image(torch.stack(seen).to(dtype)))


@pytest.mark.parametrize("multi_positive", [True, False])
def test_the_loss_of_a_batch_is_the_loss_of_its_embeddings(architectures, multi_positive):
    clip = {"name": architectures["tiny-vit"], "pretrained": None}
    module = CLIPModule(clip, loss=LossConfig(multi_positive=multi_positive, label_smoothing=0.1))
    given = batch()
    matches = positives(given["group"]) if multi_positive else None
    expected = contrastive_loss(
        *module(given["pixels"], given["tokens"]), module.model.logit_scale, positives_BB=matches, label_smoothing=0.1
    )
    torch.testing.assert_close(module.batch_loss(given, gather=True), expected)


def test_configurations_can_be_dataclasses_or_dicts(architectures):
    by_dict = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None}, {"rank": 2}, None, {"lr": 1e-3})
    assert by_dict.adapter == AdapterConfig(rank=2)
    assert by_dict.optimizer == OptimizerConfig(lr=1e-3)
    assert by_dict.hparams["clip"] == asdict(by_dict.clip_config)


def test_from_scratch_the_seed_makes_the_weights(architectures):
    clips = []
    for seed in (1, 1, 2):
        lightning.seed_everything(seed, verbose=False)
        clips.append(CLIPModule({"name": architectures["tiny-vit"], "pretrained": None}, {"kind": "full"}))
    first, same, other = (module.model.visual.proj for module in clips)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("pretrained", "frozen"), [(True, True), (False, False)])
def test_batchnorm_statistics_stay_when_pretrained_and_move_from_scratch(architectures, weights, pretrained, frozen):
    start = weights["tiny-resnet"] if pretrained else None
    module = CLIPModule({"name": architectures["tiny-resnet"], "pretrained": start}, {"kind": "full"})
    module.eval()
    module.train()
    before = module.model.visual.bn1.running_mean.clone()
    module.batch_loss(batch(), gather=False).backward()
    assert torch.equal(module.model.visual.bn1.running_mean, before) == frozen
    assert module.model.visual.bn1.weight.grad is not None


def test_a_locked_tower_builds_no_graph(architectures):
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None}, {"kind": "full", "lock": ["image"]})
    given = batch()
    assert module.encode_image(given["pixels"]).grad_fn is None
    assert module.encode_text(given["tokens"]).grad_fn is not None
    assert not module.model.visual.training
    assert module.model.transformer.training


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet"])
def test_training_lowers_the_loss(architectures, dataset, tmp_path, name, kind):
    lightning.seed_everything(0, verbose=False)
    targets = ["q", "k", "v", "out", "fc", "proj"] + (["conv", "pool"] if name == "tiny-resnet" else [])
    lr = {"full": 1e-3, "lora": 3e-3}[kind]
    module = CLIPModule(
        {"name": architectures[name], "pretrained": None}, {"kind": kind, "targets": targets}, None, {"lr": lr}
    )
    data = CLIPDataModule(dataset=dataset, batch_size=8, num_workers=0)
    losses = []
    module.on_train_batch_end = lambda outputs, *_: losses.append(outputs["loss"].item())
    trainer(tmp_path, max_epochs=6).fit(module, data)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_what_lora_does_not_train_stays_bit_for_bit(architectures, dataset, tmp_path):
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None}, {"train_logit_scale": False})
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer(tmp_path).fit(module, CLIPDataModule(dataset=dataset, batch_size=8, num_workers=0))
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]) == ("lora_" not in key), key


def test_the_temperature_stays_in_its_bounds_in_training(architectures, dataset, tmp_path):
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None}, None, None, {"lr": 1.0, "warmup": 0.0})
    module.model.logit_scale.data.fill_(4.60)
    trainer(tmp_path).fit(module, CLIPDataModule(dataset=dataset, batch_size=8, num_workers=0))
    assert 0 <= module.model.logit_scale.item() <= torch.tensor(100.0).log().item() + 1e-6


def test_a_step_does_not_raise_the_temperature_over_its_bound(architectures, dataset, tmp_path):
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None}, None, None, {"lr": 1.0, "warmup": 0.0})
    module.model.logit_scale.data.fill_(4.60)
    module.losses = lambda *_, **__: {"contrastive": -module.model.logit_scale}  # the higher the better
    data = CLIPDataModule(dataset=dataset, batch_size=8, num_workers=0)
    trainer(tmp_path, max_epochs=None, max_steps=1, limit_val_batches=0).fit(module, data)
    assert module.model.logit_scale.item() == pytest.approx(math.log(100))


def test_the_loss_is_computed_in_float32_where_the_towers_are_not(architectures):
    loss = LossConfig(distill_feature=1.0, distill_logit=1.0)
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None})
    module.loss, module.start = loss, Start(module.model)
    now, start = (embeddings(16, seed) for seed in (0, 1))
    plain = module.losses(now, None, start=start)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module.losses(now, None, start=start)
    assert plain.keys() == mixed.keys() == {"contrastive", "distill_feature", "distill_logit"}
    for name, value in plain.items():
        assert mixed[name].item() == pytest.approx(value.item(), abs=1e-6), name


def embeddings(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    image, text = (normalize(torch.randn(size, 16, generator=random), dim=-1) for _ in range(2))
    return image, text


def test_metrics_have_their_names(architectures, dataset, tmp_path):
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None})
    loop = trainer(tmp_path)
    loop.fit(module, CLIPDataModule(dataset=dataset, batch_size=8, num_workers=0))
    assert {"train/loss", "train/logit_scale", "val/loss", "lr-AdamW"} <= set(loop.callback_metrics)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_loss_is_at_least_float32_in_any_precision(architectures, dataset, tmp_path, precision):
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None})
    kinds = set()
    module.on_train_batch_end = lambda outputs, *_: kinds.add(outputs["loss"].dtype)
    data = CLIPDataModule(dataset=dataset, batch_size=8, num_workers=0)
    trainer(tmp_path, precision=precision, max_epochs=None, max_steps=2, limit_val_batches=0).fit(module, data)
    assert kinds == {torch.float64 if precision == "64-true" else torch.float32}


def test_a_checkpoint_needs_nothing_but_itself(architectures, weights, dataset, tmp_path):
    import shutil

    moved = {
        name: shutil.copy(path, tmp_path)
        for name, path in {"a": architectures["tiny-vit"], "w": weights["tiny-vit"]}.items()
    }
    module = CLIPModule({"name": moved["a"], "pretrained": moved["w"]}, {"rank": 2})
    module.clip.preprocess_cfg["interpolation"] = "bilinear"
    loop = trainer(tmp_path)
    loop.fit(module, CLIPDataModule(dataset=dataset, batch_size=8, num_workers=0))
    loop.save_checkpoint(tmp_path / "trained.ckpt")
    for path in moved.values():
        (tmp_path / path).unlink()
    loaded = CLIPModule.load_from_checkpoint(tmp_path / "trained.ckpt", weights_only=True).eval()
    given = batch()
    for ours, theirs in zip(
        loaded(given["pixels"], given["tokens"]), module.eval()(given["pixels"], given["tokens"]), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert loaded.clip.name == moved["a"]
    assert loaded.clip.architecture == module.clip.architecture
    assert list(plain_state_dict(loaded.model)) == list(
        load_clip(architectures["tiny-vit"], device="cpu").model.state_dict()
    )


def test_preprocessing_comes_back_from_a_checkpoint(architectures, tmp_path, dataset):
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None})
    module.hparams["architecture"]["preprocess_cfg"] |= {"mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"}
    loop = trainer(tmp_path, max_epochs=None, max_steps=1, limit_val_batches=0)
    loop.fit(module, CLIPDataModule(dataset=dataset, batch_size=8, num_workers=0))
    loop.save_checkpoint(tmp_path / "x.ckpt")
    loaded = CLIPModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.clip.preprocess_cfg["mean"] == (0.1, 0.2, 0.3)
    assert "bilinear" in str(loaded.clip.preprocess)
    assert loaded.model.visual.preprocess_cfg["mean"] == (0.1, 0.2, 0.3)


def test_a_checkpoint_does_not_change_what_open_clip_knows_by_that_name(architectures):
    import open_clip

    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None})
    described = dict(module.hparams["architecture"]) | {"name": "ViT-B-32"}
    known = open_clip.get_model_config("ViT-B-32")
    assert CLIPModule(architecture=described).clip.name == "ViT-B-32"
    assert open_clip.get_model_config("ViT-B-32") == known


def test_with_loaders_of_ones_own_max_steps_is_needed(architectures, tmp_path):
    loader = DataLoader([batch()] * 3, batch_size=None)
    module = CLIPModule({"name": architectures["tiny-vit"], "pretrained": None})
    with pytest.raises(ConfigError, match=r"trainer\.max_steps: needed"):
        trainer(tmp_path, limit_val_batches=0).fit(module, loader)
    loop = trainer(tmp_path, max_epochs=None, max_steps=3, limit_val_batches=0)
    loop.fit(CLIPModule({"name": architectures["tiny-vit"], "pretrained": None}), loader)
    assert loop.global_step == 3


def test_importing_the_package_loads_no_torch():
    code = """
        import sys, finetune
        assert not {"torch", "lightning", "open_clip"} & set(sys.modules)
        assert {"CLIPModule", "CLIPDataModule"} <= set(finetune.__all__)
        try:
            finetune.nothing
        except AttributeError as error:
            assert "nothing" in str(error)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
