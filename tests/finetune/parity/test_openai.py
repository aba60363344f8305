"""OpenAI's files, archive and state dict, give what OpenAI's CLIP computes; nothing of them is run."""

from __future__ import annotations

import logging
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor, nn

from curate.clip import load_clip
from curate.clip.openai import architecture, read_archive
from curate.errors import ModelError
from tests.finetune.parity import reference

CAPTIONS = ["a red circle", "ein Größentest: 12 × 3", "a very " + "long " * 90 + "caption"]
NUMBERS = {"context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}
# At their published sizes.
REAL = {"RN50": "RN50-quickgelu", "RN50x4": "RN50x4-quickgelu", "ViT-B-32": "ViT-B-32-quickgelu"}


class Archive(nn.Module):
    """Weights under OpenAI's names, as TorchScript keeps them."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_buffer(last, value)

    def forward(self, x: Tensor) -> Tensor:
        return x


def openai_weights(name: str) -> dict[str, Tensor]:
    """Random weights of an architecture of the paper, statistics of BatchNorm included."""
    torch.manual_seed(0)
    model = open_clip.create_model(REAL[name])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.2, 0.5)  # OpenAI begins bn3 at 0, which would hide a mistake
    return dict(model.state_dict())


@pytest.fixture(scope="module", params=list(REAL))
def weights(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return openai_weights(request.param)


def check(clip, state: dict[str, Tensor]) -> None:
    size = clip.preprocess_cfg["size"]
    pixels = torch.rand(2, 3, *(size if isinstance(size, (tuple, list)) else (size, size)))
    tokens = clip.tokenizer(CAPTIONS)
    with torch.no_grad():
        expected_image, expected_text = reference.image(pixels, state), reference.text(tokens, state)
    torch.testing.assert_close(clip.embed_images(pixels), expected_image, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.embed_captions(tokens), expected_text, atol=1e-5, rtol=0)
    assert clip.architecture["quick_gelu"]


def test_a_state_dict_of_openais_is_loaded_from_its_shapes(weights, tmp_path, caplog):
    torch.save(weights | NUMBERS | {"input_resolution": torch.tensor(224)}, tmp_path / "clip.pt")
    with caplog.at_level(logging.WARNING, "cliptailor"):
        check(load_clip(str(tmp_path / "clip.pt"), device="cpu"), weights)
    assert not caplog.records


@pytest.mark.parametrize(
    "name", ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B-32", "ViT-B-16", "ViT-L-14-336"]
)
def test_the_architecture_read_from_the_shapes_is_open_clips(name):
    config = open_clip.get_model_config(f"{name}-quickgelu")
    with torch.device("meta"):
        state = open_clip.CLIP(**config).state_dict()
    found = architecture(state)
    assert found["embed_dim"] == config["embed_dim"]
    defaults = {"head_width": 64}
    for part in ("vision_cfg", "text_cfg"):
        expected = {key: value for key, value in config[part].items() if value is not None}
        assert {key: found[part][key] for key in expected if key in found[part]} == {
            key: value for key, value in expected.items() if key in found[part]
        }
        assert set(expected) <= set(found[part]) | set(defaults)
    with torch.device("meta"):
        again = open_clip.CLIP(**found).state_dict()
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in state.items()}


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_an_archive_is_read_as_torch_reads_it_but_without_its_code(tmp_path):
    state = openai_weights("RN50")
    small = {key: value.half() for key, value in state.items() if not key.startswith("token")}
    small["transposed"] = torch.rand(4, 6).T
    torch.jit.script(Archive(small)).save(str(tmp_path / "clip.pt"))
    got = read_archive(tmp_path / "clip.pt")
    expected = torch.jit.load(str(tmp_path / "clip.pt")).state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) and got[key].dtype == expected[key].dtype for key in expected)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_an_archive_as_the_name_brings_its_architecture(tmp_path):
    state = openai_weights("ViT-B-32")
    rounded = {key: value.half().float() for key, value in state.items()}
    archive = {key: value.half() for key, value in state.items()} | {"input_resolution": torch.tensor(224)}
    torch.jit.script(Archive(archive)).save(str(tmp_path / "ViT-B-32.pt"))
    check(load_clip(str(tmp_path / "ViT-B-32.pt"), device="cpu"), rounded)


def test_a_name_that_contradicts_the_file_is_an_error(tmp_path: Path):
    state = openai_weights("ViT-B-32") | NUMBERS | {"input_resolution": torch.tensor(224)}
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ModelError, match=r"clip ViT-B-16: its vision patch_size is 16, but that of .*clip\.pt is 32"):
        load_clip("ViT-B-16", str(tmp_path / "clip.pt"))


def test_an_unknown_activation_is_a_warning_that_names_it(tmp_path: Path, caplog):
    state = openai_weights("ViT-B-32")
    torch.save(state, tmp_path / "clip.pt")
    with caplog.at_level(logging.WARNING, "cliptailor"):
        load_clip("ViT-B-32", str(tmp_path / "clip.pt"), device="cpu")
    assert "ViT-B-32 has GELU" in caplog.text
    assert "ViT-B-32-quickgelu" in caplog.text


def test_an_archive_that_names_anything_else_is_refused(tmp_path: Path):
    import pickle
    import zipfile

    class Evil:
        def __reduce__(self):
            return eval, ("1",)

    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(Evil()))
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(ModelError, match=r"it names builtins\.eval"):
        read_archive(tmp_path / "evil.pt")
