"""What is exported, loaded by open_clip alone in a fresh process, gives the embeddings of the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import tokenizers
import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import PreTrainedTokenizerFast

from curate.clip import Clip, load_clip
from curate.errors import ConfigError, InputError, ModelError
from finetune.cli import main
from finetune.config import AdapterConfig
from finetune.export import check, check_export, export, write_open_clip, write_transformers
from finetune.runs import checkpoint_of, load_module, load_trained_clip
from tests.disk import disk_that_ends_at
from tests.finetune.fitted import fit_tiny
from tests.finetune.tiny import TEXT

CAPTIONS = ["a red circle", "ein Größentest: 12 × 3", "a very " + "long " * 30 + "caption"]
ALONE = """
import json, sys
sys.modules["finetune"] = sys.modules["curate"] = None  # importing them fails from here on
import numpy as np, open_clip, torch
from PIL import Image
folder, picture, captions, out = sys.argv[1:]
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
model.eval()
tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(json.loads(captions))
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open(picture))[None], normalize=True)
    text = model.encode_text(tokens, normalize=True)
np.savez(out, image=image, text=text, scale=model.logit_scale.detach())
"""


@pytest.fixture(scope="module", params=["vit", "resnet"])
def run(request, tmp_path_factory, dataset, architectures):
    targets = ["q", "v", "fc", "proj"] + (["conv", "pool"] if request.param == "resnet" else ["k", "out"])
    adapter = AdapterConfig(kind="lora", rank=2, targets=targets)
    return fit_tiny(tmp_path_factory.mktemp("run"), dataset, architectures[f"tiny-{request.param}"], adapter).out


def embeddings_in_training(run) -> tuple[torch.Tensor, torch.Tensor, Image.Image]:
    """Of the checkpoint as it was trained: adapters beside the weights."""
    module = load_module(checkpoint_of(run))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (61, 47, 3), dtype=np.uint8))
    with torch.no_grad():
        return (
            module.encode_image(module.clip.preprocess(picture)[None]),
            module.encode_text(module.clip.tokenizer(CAPTIONS)),
            picture,
        )


def test_open_clip_alone_in_a_fresh_process_gives_the_embeddings_of_training(run, tmp_path):
    image, text, picture = embeddings_in_training(run)
    picture.save(tmp_path / "picture.png")
    export(run, tmp_path / "exported")
    arguments = [tmp_path / "exported", tmp_path / "picture.png", json.dumps(CAPTIONS), tmp_path / "out.npz"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ALONE, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "out.npz")
    assert np.abs(got["image"] - image.numpy()).max() < 1e-5
    assert np.abs(got["text"] - text.numpy()).max() < 1e-5
    assert got["scale"] == pytest.approx(load_module(checkpoint_of(run)).model.logit_scale.item())


def test_training_changed_the_embeddings_so_that_equality_means_something(run):
    trained = load_trained_clip(checkpoint_of(run), "cpu")
    torch.manual_seed(0)
    start = load_module(checkpoint_of(run)).clip_config
    fresh = load_clip(start.name, start.pretrained, device="cpu")
    assert float((trained.embed_captions(CAPTIONS) - fresh.embed_captions(CAPTIONS)).abs().max()) > 1e-2


def test_our_own_loader_reads_it_with_tokenizer_and_preprocessing(run, tmp_path):
    image, text, picture = embeddings_in_training(run)
    write_open_clip(load_trained_clip(checkpoint_of(run)), tmp_path)
    clip = load_clip(f"local-dir:{tmp_path}", device="cpu")
    assert torch.allclose(clip.embed_images([picture]), image, atol=1e-5)
    assert torch.allclose(clip.embed_captions(CAPTIONS), text, atol=1e-5)


def test_transformers_loads_the_run_with_the_embeddings_of_training(run, tmp_path):
    from transformers import CLIPModel

    if "resnet" in str(load_module(checkpoint_of(run)).clip_config.name):
        with pytest.raises(ModelError, match="its CLIPModel has a ViT"):
            export(run, tmp_path / "exported", "transformers")
        return
    image, text, picture = embeddings_in_training(run)
    export(run, tmp_path / "exported", "transformers")
    clip = load_clip(str(tmp_path / "exported"), device="cpu")
    model = CLIPModel.from_pretrained(tmp_path / "exported").eval()
    with torch.no_grad():
        got = model(input_ids=clip.tokenizer(CAPTIONS), pixel_values=clip.preprocess(picture)[None])
    assert torch.allclose(got.image_embeds, image, atol=1e-5)
    assert torch.allclose(got.text_embeds, text, atol=1e-5)


def test_exporting_twice_gives_the_same_bytes(run, tmp_path):
    for name in ("a", "b"):
        write_open_clip(load_trained_clip(checkpoint_of(run)), tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["open_clip_config.json", "open_clip_model.safetensors"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_the_adapter_alone_is_in_pefts_format(run, tmp_path):
    export(run, tmp_path, "adapter")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert weights
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)


def test_a_run_trained_in_full_has_no_adapter_but_exports(tmp_path, dataset, architectures):
    run = fit_tiny(tmp_path, dataset, architectures["tiny-vit"], AdapterConfig(kind="full"), steps=1).out
    with pytest.raises(ModelError, match="no adapter"):
        export(run, tmp_path / "adapter", "adapter")
    assert export(run, tmp_path / "exported") == run / "checkpoints" / "best.ckpt"  # even one step is validated


def test_a_timm_tower_comes_back_from_its_export(tmp_path):
    config = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "image_size": 224},
        "text_cfg": TEXT,
    }
    (tmp_path / "tiny-timm.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip = load_clip(str(tmp_path / "tiny-timm.json"), device="cpu")
    write_open_clip(clip, tmp_path / "out")
    check_export(clip, tmp_path / "out")
    assert load_clip(str(tmp_path / "out"), device="cpu").architecture == clip.architecture
    with pytest.raises(ModelError, match="cannot express timm_model_name"):
        write_transformers(clip, tmp_path / "transformers")


def test_a_run_may_start_from_a_folder_of_transformers(tmp_path, dataset, architectures):
    clip = load_clip(architectures["tiny-vit"], device="cpu")
    write_transformers(clip, tmp_path / "start")
    run = fit_tiny(tmp_path / "run", dataset, str(tmp_path / "start"), AdapterConfig(kind="lora", rank=2), steps=1).out
    module = load_module(checkpoint_of(run))
    assert not module.from_scratch
    assert export(run, tmp_path / "again", "transformers")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "clip"


def test_quickgelu_and_preprocessing_are_written_back(tmp_path, architectures):
    clip = load_clip(architectures["tiny-vit"], device="cpu")
    architecture = {**clip.architecture, "quick_gelu": True}
    preprocess_cfg = {
        **clip.preprocess_cfg,
        "mean": (0.1, 0.2, 0.3),
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    model = open_clip.CLIP(**architecture).eval()
    open_clip.set_model_preprocess_cfg(model, preprocess_cfg)
    preprocess = image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)
    special = Clip(model, preprocess, clip.tokenizer, "special", architecture, preprocess_cfg)
    write_open_clip(special, tmp_path)
    check_export(special, tmp_path)
    written = load_clip(f"local-dir:{tmp_path}", device="cpu")
    assert "QuickGELU" in repr(written.model)
    assert tuple(written.preprocess_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert (written.preprocess_cfg["interpolation"], written.preprocess_cfg["resize_mode"]) == ("bilinear", "squash")


def test_a_hugging_face_tokenizer_goes_with_the_model(tmp_path, architectures):
    vocabulary = {"[UNK]": 0, "[PAD]": 1, "a": 2, "red": 3, "circle": 4}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(tmp_path / "tokenizer")
    clip = load_clip(architectures["tiny-vit"], device="cpu")
    clip.architecture["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "tokenizer")
    clip.tokenizer = HFTokenizer(str(tmp_path / "tokenizer"), context_length=16)
    write_open_clip(clip, tmp_path / "exported")
    shutil.rmtree(tmp_path / "tokenizer")
    check_export(clip, tmp_path / "exported")
    written = load_clip(f"local-dir:{tmp_path / 'exported'}", device="cpu")
    assert written.tokenizer(["a red circle"]).tolist() == clip.tokenizer(["a red circle"]).tolist()
    assert written.tokenizer(["a red circle"])[0, :3].tolist() == [2, 3, 4]


def test_an_export_that_differs_is_refused(tmp_path, architectures):
    clip = load_clip(architectures["tiny-vit"], device="cpu")
    write_open_clip(clip, tmp_path)
    with torch.no_grad():
        clip.model.visual.proj.add_(0.1 * torch.randn_like(clip.model.visual.proj))
    with pytest.raises(ModelError, match=r"image embeddings are .* off the checkpoint's"):
        check_export(clip, tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be loaded"):
        check_export(clip, tmp_path)


def test_a_fresh_process_that_is_killed_is_told(tmp_path, fresh_process):
    script = tmp_path / "killed.py"
    script.write_text("import os, sys\nprint('a warning', file=sys.stderr)\nos.kill(os.getpid(), int(sys.argv[1]))\n")
    assert fresh_process(script, "9") == "its process ended with status -9 (killed: out of memory?)"
    assert fresh_process(script, "15") == "its process ended with status -15"
    script.write_text("raise SystemExit(3)")
    assert fresh_process(script) == "its process ended with status 3"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, dataset, architectures):
    """A run of LoRA from saved weights: what an adapter can be put on."""
    folder = tmp_path_factory.mktemp("adapted")
    torch.manual_seed(1)
    write_open_clip(load_clip(architectures["tiny-vit"], device="cpu"), folder / "start")
    targets = ["q", "k", "v", "out", "fc", "proj", "projection"]
    adapter = AdapterConfig(kind="lora", rank=2, targets=targets)
    return fit_tiny(folder, dataset, f"local-dir:{folder / 'start'}", adapter, steps=3).out


@pytest.mark.parametrize("form", ["open_clip", "transformers", "adapter", "onnx"])
def test_a_full_disk_in_an_export_is_one_line_and_the_same_command_continues(adapted, tmp_path, capsys, form):
    words = ["export", "--run", str(adapted), "--out", str(tmp_path / "clip"), "--to", form]
    with disk_that_ends_at(2_000):
        assert main(words) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "finetune: File too large; what is done is kept, the same command continues"
    assert not list(tmp_path.rglob("*.safetensors"))
    assert main(words) == 0


@pytest.mark.parametrize("form", ["open_clip", "transformers", "onnx", "adapter"])
def test_every_form_is_loaded_in_a_fresh_process_before_it_is_called_done(
    adapted, tmp_path, form, monkeypatch, fresh_process
):
    """With a checkpoint that is another one than what was written, nothing is exported."""
    compared, forked = check._compare, check._in_fresh_process
    monkeypatch.setattr(check, "_in_fresh_process", fresh_process)
    export(adapted, tmp_path / "right", form)
    assert (tmp_path / "right" / "README.md").is_file()
    monkeypatch.setattr(check, "_in_fresh_process", forked)

    def worse(folder, form, given, expected):
        compared(folder, form, given, (expected[0], expected[1] + 1e-3))

    monkeypatch.setattr(check, "_compare", worse)
    with pytest.raises(ModelError, match=r"text embeddings are 0\.001 off the checkpoint's; nothing was exported"):
        export(adapted, tmp_path / "wrong", form)
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


def test_an_onnx_export_takes_batches_of_any_size(run, tmp_path):
    import onnxruntime

    image, text, picture = embeddings_in_training(run)
    export(run, tmp_path / "onnx", "onnx")
    clip = load_trained_clip(checkpoint_of(run), "cpu")
    for tower, name, batch, expected in (
        ("image", "pixels", clip.preprocess(picture)[None], image),
        ("text", "tokens", clip.tokenizer(CAPTIONS), text),
    ):
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / f"{tower}.onnx")
        for times in (1, 4):
            (got,) = session.run([f"{tower}_embedding"], {name: torch.cat([batch] * times).numpy()})
            assert np.abs(got - expected.repeat(times, 1).numpy()).max() < 1e-4


def test_transformers_processor_makes_the_tokens_of_open_clip(adapted, tmp_path):
    from transformers import CLIPProcessor

    export(adapted, tmp_path / "exported", "transformers")
    processor = CLIPProcessor.from_pretrained(tmp_path / "exported")
    for caption in ("a red circle", "Zwölf große Äpfel, 3 × 4!", "it's a dog's life ☺"):
        ours = open_clip.get_tokenizer("ViT-B-32")([caption])[0]
        theirs = processor(text=caption, return_tensors="pt")["input_ids"][0]
        assert theirs.tolist() == ours[ours > 0].tolist()


def test_the_card_tells_the_figures_and_is_read_by_the_hub(adapted, tmp_path):
    from huggingface_hub import ModelCard

    export(adapted, tmp_path / "exported", license="mit")
    card = ModelCard.load(tmp_path / "exported" / "README.md")
    evaluation = json.loads((adapted / "evaluation.json").read_text())
    assert card.data.license == "mit"
    assert card.data.library_name == "open_clip"
    for metric, cell in evaluation["after"].items():
        (row,) = [line for line in card.text.splitlines() if line.startswith(f"| {metric} |")]
        assert f"| {cell['n']} |" in row
    assert "40 pairs" in card.text
    assert f"`{evaluation['facts']['fingerprint']}`" in card.text  # as the report tells it
    assert "Intended use" in card.text


def test_the_use_that_an_adapters_card_tells_gives_the_embeddings_of_training(adapted, run, tmp_path):
    """Projections too; where the adapter has none for them, none are opened."""
    export(adapted, tmp_path / "adapter", "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text("utf-8")
    code = text.partition("```python")[2].partition("```")[0]
    told: dict = {}
    exec(code.replace("FOLDER", str(tmp_path / "adapter")), told)
    tokens = load_module(checkpoint_of(adapted)).clip.tokenizer(CAPTIONS)
    with torch.no_grad():
        expected = load_module(checkpoint_of(adapted)).model.cpu().encode_text(tokens)
        got = told["model"].cpu().eval().encode_text(tokens)
    assert torch.allclose(got, expected, atol=1e-5)
    export(run, tmp_path / "plain", "adapter")
    assert "open_projections" not in (tmp_path / "plain" / "README.md").read_text("utf-8")


def test_the_card_of_another_checkpoint_than_the_evaluated_one_has_no_figures(adapted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(adapted, run)
    checkpoints = run / "checkpoints"
    (checkpoints / "interpolated.ckpt").unlink(missing_ok=True)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["facts"]["checkpoint"] = "best.ckpt"
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    other = torch.load(checkpoints / "best.ckpt", weights_only=True)  # noqa: TID251 - our own file
    name = next(name for name in other["state_dict"] if "lora_B" in name)
    other["state_dict"][name] += 0.1
    torch.save(other, checkpoints / "last.ckpt")
    metric = next(iter(evaluation["after"]))
    for form in ("open_clip", "adapter"):
        export(run, tmp_path / form / "last", form, checkpoint="last")
        export(run, tmp_path / form / "best", form)
        last, best = ((tmp_path / form / name / "README.md").read_text("utf-8") for name in ("last", "best"))
        assert "| checkpoint | last.ckpt |" in last
        assert "None: the run was evaluated with another checkpoint (best.ckpt)." in last
        assert f"| {metric} |" not in last
        assert "| checkpoint | best.ckpt |" in best
        assert f"| {metric} |" in best


def test_a_folder_that_holds_what_is_exported_is_not_overwritten(adapted, tmp_path, monkeypatch):
    run, checkpoint = adapted, checkpoint_of(adapted)
    for out in (run, run.parent, checkpoint.parent, checkpoint):
        with pytest.raises(ConfigError, match=r"--out .*: holds the checkpoint that is exported; give another folder"):
            export(run, out, overwrite=True)
    shutil.copy(checkpoint, tmp_path / "copy.ckpt")
    with pytest.raises(ConfigError, match=r"--out .*: holds the run; give another folder"):
        export(run, run, checkpoint=str(tmp_path / "copy.ckpt"), overwrite=True)
    assert checkpoint.is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match=r"--out \.: holds the folder you are in; give another folder"):
        export(run, Path())


def test_nothing_is_written_over_without_a_word(adapted, tmp_path):
    out = tmp_path / "exported"
    out.mkdir()
    export(adapted, out)  # an empty folder is nobody's
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already; give another folder, or --overwrite"):
        export(adapted, out)
    assert (out / "mine.txt").is_file()
    export(adapted, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    with pytest.raises(InputError):
        export(tmp_path / "nothing", out, overwrite=True)
    assert (out / "open_clip_model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_what_was_there_comes_back_if_the_new_folder_cannot_take_its_place(tmp_path):
    from finetune.export import _new_folder

    out = tmp_path / "exported"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileNotFoundError), _new_folder(out, overwrite=True) as new:
        new.rename(tmp_path / "gone")
    assert (out / "mine.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"exported", "gone"}


@pytest.mark.parametrize("moved", [0, 1])
def test_ctrl_c_while_folders_are_exchanged_leaves_one_of_them(tmp_path, monkeypatch, moved):
    """Just after what was there is moved away (0), or just after the new one is in its place (1)."""
    from finetune.export import _new_folder

    out, replace, asked = tmp_path / "exported", Path.replace, []
    out.mkdir()
    (out / "mine.txt").write_text("mine")

    def interrupted(self, target):
        replace(self, target)
        asked.append(target)
        if len(asked) == moved + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), _new_folder(out, overwrite=True) as new:
        (new / "ours.txt").write_text("ours")
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    assert [path.name for path in out.iterdir()] == ["ours.txt" if moved else "mine.txt"]


def test_a_file_in_the_folders_place_is_replaced_without_a_trace(tmp_path):
    from finetune.export import _new_folder

    out = tmp_path / "exported"
    out.write_text("mine")
    with _new_folder(out, overwrite=True) as new:
        (new / "ours.txt").write_text("ours")
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    assert (out / "ours.txt").is_file()


def test_the_checkpoint_can_be_chosen(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with pytest.raises(InputError, match=r"no last\.ckpt"):
        checkpoint_of(tmp_path)
    (folder / "last.ckpt").touch()
    assert checkpoint_of(tmp_path).name == "last.ckpt"  # nothing was monitored: the last is the best
    (folder / "best.ckpt").touch()
    assert checkpoint_of(tmp_path).name == "best.ckpt"
    assert checkpoint_of(tmp_path, "last").name == "last.ckpt"
    assert checkpoint_of(tmp_path, str(folder / "last.ckpt")).name == "last.ckpt"
    with pytest.raises(InputError, match="expected best, last or the path"):
        checkpoint_of(tmp_path, "bset")


def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match=r"x\.ckpt: not a checkpoint of `finetune fit`") as error:
        load_trained_clip(tmp_path / "x.ckpt")
    assert "\n" not in str(error.value)
