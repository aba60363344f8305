"""OpenAI's hands-on through `import finetune as clip`, against OpenAI's formulas, transformers and curate.clip."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

import finetune as clip
from curate.clip import load as load_plain
from curate.clip import load_clip
from curate.errors import ConfigError, ModelError
from finetune.config import AdapterConfig
from finetune.hands_on import CustomTextCLIP, as_openai
from finetune.runs import checkpoint_of, load_trained_clip
from tests.finetune import tiny
from tests.finetune.fitted import fit_tiny
from tests.finetune.parity import reference

QUERIES = ["a red circle", "a blue square", "a photo of a cat", "words", "Grün!"]
# As OpenAI's files have them: heads 64 wide, 77 tokens. Small otherwise.
OPENAI_LIKE = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 64, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(open_clip.CLIP(**OPENAI_LIKE).state_dict())


@pytest.fixture(scope="module")
def cache(state, tmp_path_factory) -> Path:
    """A folder as OpenAI's package leaves it."""
    numbers = {"context_length": 77, "vocab_size": 49408, "input_resolution": 32}
    folder = tmp_path_factory.mktemp("cache")
    torch.save(state | {key: torch.tensor(value) for key, value in numbers.items()}, folder / "ViT-B-32.pt")
    return folder


@pytest.fixture
def hands_on(cache):
    return clip.load("ViT-B/32", device="cpu", download_root=str(cache))


def photo(colour: str = "red") -> Image.Image:
    return Image.open(io.BytesIO(tiny.picture(colour, "circle", 1)))


def test_the_readme_of_openais_clip_runs_and_gives_openais_numbers(hands_on, state):
    model, preprocess = hands_on
    image = preprocess(photo()).unsqueeze(0)
    text = clip.tokenize(QUERIES)
    assert text.shape == (5, 77)
    with torch.no_grad():
        image_features, text_features = model.encode_image(image), model.encode_text(text)
        logits_per_image, logits_per_text = model(image, text)
        probabilities = logits_per_image.softmax(dim=-1)
    assert image_features.shape == (1, 24)
    assert text_features.shape == (5, 24)
    assert not torch.allclose(image_features.norm(dim=-1), torch.ones(1), atol=1e-3)
    # Numpy-like pseudo-code of the paper's figure 3, on towers written out from OpenAI's model.py.
    cosines = reference.image(image, state) @ reference.text(text, state).T
    expected = state["logit_scale"].exp() * cosines
    torch.testing.assert_close(logits_per_image, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_per_text, expected.T, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(1 / 0.07))
    torch.testing.assert_close(probabilities, expected.softmax(-1), atol=1e-5, rtol=0)


def test_embeddings_are_those_of_the_loader_before_normalisation(hands_on, cache):
    model, preprocess = hands_on
    plain = load_plain(str(cache / "ViT-B-32.pt"), device="cpu")
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(photo(c)) for c in ("red", "blue")]))
        text = model.encode_text(clip.tokenize(QUERIES))
    normalise = torch.nn.functional.normalize
    assert torch.equal(normalise(image, dim=-1), plain.embed_images([photo("red"), photo("blue")]))
    assert torch.equal(normalise(text, dim=-1), plain.embed_captions(QUERIES))


def test_the_model_has_what_openais_users_ask_it_for(hands_on, state):
    model, _ = hands_on
    assert (model.visual.input_resolution, model.context_length, model.vocab_size) == (32, 77, 49408)
    assert model.dtype == torch.float32
    assert not model.training
    assert model.state_dict().keys() == state.keys()
    shown = str(model)
    assert shown.startswith("CLIP(")
    image_tower, text_tower = shown.split("(visual)")[1].split("\n  (transformer)")
    assert "QuickGELU()" in image_tower
    assert "QuickGELU()" in text_tower


def test_half_float_and_copies_of_it_work(hands_on):
    model, preprocess = hands_on
    image, text = preprocess(photo()).unsqueeze(0), clip.tokenize(QUERIES)
    with torch.no_grad():
        expected = model(image, text)[0]
        half = copy.deepcopy(model).half()
        assert half.dtype == torch.float16
        assert half.encode_image(image).dtype == half.encode_text(text).dtype == torch.float16
        torch.testing.assert_close(half(image, text)[0].float(), expected, atol=0.05, rtol=0)
        torch.testing.assert_close(half.float()(image, text)[0], expected, atol=0.05, rtol=0)


def test_available_models_are_the_papers_nine():
    assert clip.available_models() == [
        *("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"),
        *("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"),
    ]


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_are_clips(hands_on):
    tokens = clip.tokenize("a photo of a cat")  # one text is taken as a list of it
    assert tokens.dtype == torch.int32
    assert tokens.shape == (1, 77)
    assert tokens[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert not tokens[0, 7:].any()
    several = [*QUERIES, "Ein  GRÖSSERER\ntext &amp; more", ""]
    assert torch.equal(clip.tokenize(several).long(), open_clip.get_tokenizer("ViT-B-32")(several))
    assert torch.equal(hands_on[0].tokenize(several), clip.tokenize(several))


def test_a_text_that_is_too_long_is_openais_error_or_cut():
    text = "cat " * 76  # with start and end 78
    with pytest.raises(RuntimeError, match=r"Input cat cat .* is too long for context length 77"):
        clip.tokenize(["short", text])
    cut = clip.tokenize(["short", text], truncate=True)[1]
    assert cut.tolist() == [49406, *[2368] * 75, 49407]
    assert torch.equal(clip.tokenize("cat " * 75)[0], cut)  # exactly 77
    assert clip.tokenize(text, context_length=78).shape == (1, 78)


# --- other CLIPs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory) -> Path:
    """A CLIPModel with a context of 20 tokens and plain GELU, saved by transformers itself."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    shared = {"hidden_act": "gelu", "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    text = shared | {"intermediate_size": 64, "max_position_embeddings": 20, "eos_token_id": 49407}
    vision = shared | {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    folder = tmp_path_factory.mktemp("transformers")
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def test_a_transformers_folder_gives_transformers_logits_and_another_context_length_is_told(transformers_folder):
    from transformers import CLIPModel

    model, preprocess = clip.load(transformers_folder, device="cpu")
    assert model.context_length == 20
    image, text = preprocess(photo()).unsqueeze(0), model.tokenize(QUERIES)
    assert text.shape == (5, 20)
    theirs = CLIPModel.from_pretrained(transformers_folder, local_files_only=True).eval()
    with torch.no_grad():
        expected = theirs(pixel_values=image, input_ids=text.long()).logits_per_image
        torch.testing.assert_close(model(image, text)[0], expected, atol=1e-5, rtol=0)
        with pytest.raises(ModelError, match=r"expected token ids of shape \[n, 20\], got \[5, 77\]; model\.tokenize"):
            model(image, clip.tokenize(QUERIES))
    with pytest.raises(RuntimeError, match="too long for context length 20"):
        model.tokenize("cat " * 19)
    assert model.tokenize("cat " * 19, truncate=True).shape == (1, 20)


def test_a_run_of_ours_is_loaded_with_its_lora_merged(dataset, architectures, tmp_path):
    config = fit_tiny(tmp_path, dataset, architectures["tiny-vit"], AdapterConfig(kind="lora", rank=2))
    model, preprocess = clip.load(config.out, device="cpu")
    plain = load_trained_clip(checkpoint_of(config.out), "cpu")
    assert model.state_dict().keys() == plain.model.state_dict().keys()
    parts = {type(part).__module__ for part in (*model.visual.modules(), *model.transformer.modules())}
    assert not [module for module in parts if module.startswith(("finetune", "peft"))]  # open_clip's own towers
    with torch.no_grad():
        features = model.encode_image(preprocess(photo()).unsqueeze(0))
    assert torch.equal(torch.nn.functional.normalize(features, dim=-1), plain.embed_images([photo()]))
    by_file, _ = clip.load(str(config.out / "checkpoints" / "last.ckpt"), "cpu")
    assert by_file.state_dict().keys() == model.state_dict().keys()


def test_a_siglip_has_its_bias_in_the_logits(tmp_path):
    """A text tower of its own (CustomTextCLIP), a bias, and a ResNet."""
    cfg = copy.deepcopy(tiny.ARCHITECTURES["tiny-resnet"]) | {"init_logit_bias": -10.0, "custom_text": True}
    (tmp_path / "tiny-biased.json").write_text(json.dumps(cfg))
    plain = load_clip(str(tmp_path / "tiny-biased.json"), device="cpu")
    cosines = plain.embed_images([photo()]) @ plain.embed_captions(QUERIES).T
    model = as_openai(plain.model, plain.tokenizer)
    assert isinstance(model, CustomTextCLIP)
    with torch.no_grad():
        logits, _ = model(plain.preprocess(photo())[None], model.tokenize(QUERIES))
    torch.testing.assert_close(logits, cosines * model.logit_scale.detach().exp() - 10)


def test_what_cannot_be_loaded_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match="jit=True is not offered"):
        clip.load("ViT-B/32", jit=True)
    with pytest.raises(ModelError, match=r"runs/a/nowhere: no such file, folder or CLIP with weights; expected a run"):
        clip.load("runs/a/nowhere")
    with pytest.raises(
        ModelError, match=r"runs/nowhere: no such folder here, and as an id of the hub: not in the cache"
    ):
        clip.load("runs/nowhere")
    with pytest.raises(ModelError, match=r"Did you mean 'ViT-B/32'\?"):
        clip.load("ViT-B/31")
    with pytest.raises(ModelError, match=r"neither a file nor a tag of ViT-B-32\. Did you mean 'laion2b_s34b_b79k'"):
        clip.load("ViT-B-32/laion2b_s34b_b79")
    with pytest.raises(ModelError, match=r"ViT-B-32: which weights\? Expected ViT-B-32/TAG; its tags: openai, "):
        clip.load("ViT-B-32")
    (tmp_path / "cut.pt").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"cut\.pt, pretrained None: cannot be loaded"):
        clip.load(tmp_path / "cut.pt")
    with pytest.raises(ModelError, match="Linear: not a CLIP of an image and a text tower"):
        as_openai(torch.nn.Linear(1, 1), None)


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, finetune as clip\n"
        "assert {'load', 'tokenize', 'available_models', 'CLIPModule', 'CLIPDataModule'} <= set(dir(clip))\n"
        "heavy = {'torch', 'open_clip', 'lightning', 'numpy', 'PIL', 'pyarrow', 'curate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from finetune import CLIPModule, CLIPDataModule, load\n"
        "assert 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
