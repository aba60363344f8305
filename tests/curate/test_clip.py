import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from curate import clip as clip_module
from curate.clip import OPENAI_NAMES, load, load_clip, weights_fingerprint
from curate.errors import ConfigError, ModelError
from tests.finetune.tiny import write_architecture


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(write_architecture("tiny-vit", tmp_path))


def test_embeddings_are_open_clips_features_normalised(tiny: str) -> None:
    torch.manual_seed(0)
    clip = load_clip(tiny, device="cpu")
    images = [Image.new("RGB", (50, 40), colour) for colour in ("red", "green", "blue")]
    with torch.no_grad():
        image_features = clip.model.encode_image(torch.stack([clip.preprocess(image) for image in images]))
        text_features = clip.model.encode_text(clip.tokenizer(["a cat", "a dog"]))
    torch.testing.assert_close(
        clip.embed_images(images), image_features / image_features.norm(dim=1, keepdim=True), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        clip.embed_captions(["a cat", "a dog"]),
        text_features / text_features.norm(dim=1, keepdim=True),
        atol=1e-6,
        rtol=0,
    )


def test_a_caption_alone_is_a_batch_of_it_and_nothing_is_an_empty_batch(tiny: str) -> None:
    clip = load_clip(tiny, device="cpu")
    assert torch.equal(clip.embed_captions("a dog"), clip.embed_captions(["a dog"]))
    assert clip.embed_images([]).shape == clip.embed_captions([]).shape == (0, 16)


def test_weights_that_are_no_numbers_are_not_loaded(tiny: str, tmp_path: Path) -> None:
    state = load_clip(tiny, device="cpu").model.state_dict()
    state["text_projection"][3, 5] = float("nan")
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="text_projection has values that are no numbers, or infinite"):
        load_clip(tiny, str(tmp_path / "weights.pt"), device="cpu")


def test_a_file_that_holds_code_is_told_in_plain_words(tiny: str, tmp_path: Path) -> None:
    """torch's own words for it have bold ones."""
    torch.save({"args": Path("x")}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="cannot be loaded") as told:
        load_clip(tiny, str(tmp_path / "weights.pt"), device="cpu")
    assert "\x1b" not in str(told.value)


def test_the_papers_models_have_their_architectures_with_quickgelu() -> None:
    known = open_clip.list_models()
    assert len(OPENAI_NAMES) == 9
    for name in OPENAI_NAMES.values():
        assert name in known
        assert open_clip.get_model_config(name)["quick_gelu"]
        assert "openai" in open_clip.list_pretrained_tags_by_model(name)


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-B-32", "ViT-B-32-quickgelu"])
def test_openais_weights_are_never_loaded_into_the_plain_activation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="ViT-B-32-quickgelu, pretrained openai: not in the cache"):
        load_clip(name, "openai")


def test_weights_that_cannot_be_had_are_told_at_once_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"run `hf download timm/resnet50_clip\.openai`"):
        load("RN50")


@pytest.mark.parametrize("hub", ["http://127.0.0.1:9", "https://hub.invalid"])  # refused; not to be resolved
def test_a_hub_that_cannot_be_reached_costs_less_than_a_second(hub: str) -> None:
    code = """
import time, open_clip, huggingface_hub, safetensors
from curate.clip import load
from curate.errors import ModelError
for name in ("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "ViT-B/32"):
    start = time.monotonic()
    try:
        load(name)
    except ModelError as error:
        print(time.monotonic() - start, error)
"""
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"HF_ENDPOINT": hub}, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        seconds, _, message = line.partition(" ")
        assert float(seconds) < 1
        assert "run `hf download " in message


def test_load_gives_no_random_weights() -> None:
    with pytest.raises(ModelError, match=r"load\('ViT-B-32'\): which weights\? Give pretrained=, or one of .*ViT-B/32"):
        load("ViT-B-32")


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-33", None, "no such architecture. Did you mean 'ViT-B-32'"),
        ("ViT-B-32", "laion2b_s34b_b79", "neither a file nor a tag of ViT-B-32. Did you mean 'laion2b_s34b_b79k'"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_clip(name, pretrained)


def test_a_model_configuration_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere/tiny\.json: no such file"):
        load_clip("nowhere/tiny.json")


def test_a_folder_without_a_model_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no open_clip_config\.json"):
        load_clip(f"local-dir:{tmp_path}")


def test_the_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(b"one")
    before = weights_fingerprint(f"local-dir:{tmp_path}", None)
    weights.write_bytes(b"two")
    assert weights_fingerprint(f"local-dir:{tmp_path}", None) != before
    assert weights_fingerprint("ViT-B/32", "openai") != weights_fingerprint("ViT-B/16", "openai")


@pytest.mark.parametrize("kind", ["garbage.pt", "garbage.safetensors", "other.pt", "wider.pt"])
def test_weights_that_do_not_fit_are_an_error_of_one_line(tiny: str, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    path.write_bytes(b"garbage" * 50)
    if kind == "other.pt":
        torch.save({"weight": torch.zeros(1)}, path)
    if kind == "wider.pt":
        weights = load_clip(tiny, device="cpu").model.state_dict()
        weights["positional_embedding"] = torch.zeros(16, 48)
        torch.save(weights, path)
    with pytest.raises(ModelError, match=r"cannot be loaded: \S.*[^:]$") as caught:
        load_clip(tiny, str(path), device="cpu")
    assert "\n" not in str(caught.value)


def test_the_example_in_the_modules_docstring_runs_as_it_stands(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), "red").save("photo.jpg")
    lines = [line.strip() for line in (clip_module.__doc__ or "").splitlines() if line.startswith("    ")]
    torch.save(load_clip(tiny, device="cpu").model.state_dict(), "weights.pt")
    example = "\n".join(lines).replace('"ViT-B/32"', f'"{tiny}", "weights.pt"')
    found: dict[str, torch.Tensor] = {}
    exec(example, found)
    assert found["probabilities"].shape == (1, 2)
    assert float(found["probabilities"].sum()) == pytest.approx(1)
    assert not found["probabilities"].requires_grad


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
def test_openais_archive_is_loaded_with_quickgelu(tiny: str, tmp_path: Path) -> None:
    open_clip.add_model_config(tiny)
    quick = open_clip.create_model(Path(tiny).stem, force_quick_gelu=True).eval()
    pixels, tokens = torch.rand(1, 3, *quick.visual.image_size), open_clip.get_tokenizer(Path(tiny).stem)(["a cat"])
    quick.register_buffer("input_resolution", torch.tensor(32))
    torch.jit.trace(quick, (pixels, tokens), check_trace=False).save(tmp_path / "ViT.pt")
    clip = load_clip(tiny, str(tmp_path / "ViT.pt"), device="cpu")
    with torch.no_grad():
        expected = quick.encode_image(pixels, normalize=True)
    torch.testing.assert_close(clip.embed_images(pixels), expected, atol=1e-6, rtol=0)
    assert clip.architecture["quick_gelu"]
    torch.save(clip.model.state_dict(), tmp_path / "plain.pt")
    plain = load_clip(tiny, str(tmp_path / "plain.pt"), device="cpu")
    assert (plain.embed_images(pixels) - expected).abs().max() > 1e-4
