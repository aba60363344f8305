"""CLIPs by their id: a server on 127.0.0.1 that answers as the hub does, and a process that loads from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from curate.clip import brings_weights, load_clip
from curate.clip.hub import is_hub_id
from finetune.export import write_open_clip, write_transformers
from tests.finetune.siglip import write_siglip
from tests.hub import serving

# HF_ENDPOINT is read when huggingface_hub is imported, so all of it happens in a process of its own: everything is
# loaded while the hub is there, then the hub is closed, and everything is loaded again.
CHILD = """
import json, os, sys, time, urllib.request
import open_clip, torch, transformers
from curate.clip import load_clip
from curate.errors import ModelError

root, tiny = sys.argv[1:]
open_clip.pretrained._PRETRAINED["tiny-vit"] = {"web": open_clip.pretrained._pcfg(hf_hub="org/openclip/")}
asked = {"org/clip": (), "hf-hub:org/openclip": (), "org/openclip@main": (), "org/siglip": (), tiny: ("web",)}
wrong = ["org/nothing", "org/page", "org/clip@old", "hf-hub:org/bare"]
told = {}

def loaded(name, rest):
    start = time.monotonic()
    try:
        clip = load_clip(name, *rest, device="cpu")
    except ModelError as error:
        return {"seconds": time.monotonic() - start, "error": str(error)}
    size = clip.preprocess_cfg["size"]
    size = size if isinstance(size, int) else size[0]
    pixels = torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)
    embeddings = [clip.embed_images(pixels), clip.embed_captions(["a red circle"])]
    return {"seconds": time.monotonic() - start, "embeddings": [each.tolist() for each in embeddings]}

told["online"] = {name: loaded(name, rest) for name, rest in asked.items()}
told["wrong"] = {name: loaded(name, ()) for name in wrong}
told["local"] = {name: loaded(f"{root}/org/{name}", ()) for name in ("clip", "openclip", "siglip")}
urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/close").read()
told["offline"] = {name: loaded(name, rest) for name, rest in asked.items()}
told["never"] = {name: loaded(name, ()) for name in ("org/never", "hf-hub:org/never")}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, architectures) -> Path:
    """What the hub has: a CLIPModel, an open_clip folder, a SigLIP, one without weights, one without a CLIP."""
    root = tmp_path_factory.mktemp("hub")
    clip = load_clip(architectures["tiny-vit"], device="cpu")
    for name, write in {"clip": write_transformers, "openclip": write_open_clip}.items():
        (root / "org" / name).mkdir(parents=True)
        write(clip, root / "org" / name)
    write_siglip(root / "org" / "siglip")
    (root / "org" / "bare").mkdir()
    config = (root / "org" / "openclip" / "open_clip_config.json").read_bytes()
    (root / "org" / "bare" / "open_clip_config.json").write_bytes(config)
    (root / "org" / "page").mkdir()
    for name in ("README.md", "tf_model.h5"):
        (root / "org" / "page" / name).write_text("no CLIP")
        (root / "org" / "clip" / name).write_text("not wanted")
    (root / "org" / "clip" / "pytorch_model.bin").write_text("the same weights in another form: not wanted either")
    return root


@pytest.fixture(scope="module")
def told(root, architectures, tmp_path_factory) -> dict:
    with serving(root) as hub:
        environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("home"))}
        words = [sys.executable, "-c", CHILD, str(root), architectures["tiny-vit"]]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]) | {"asked": hub.asked, "tiny": architectures["tiny-vit"]}


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("org/clip", "clip"),
        ("hf-hub:org/openclip", "openclip"),
        ("org/openclip@main", "openclip"),
        ("org/siglip", "siglip"),
        ("tag", "openclip"),
    ],
)
def test_a_clip_comes_by_its_id_and_then_without_the_hub(told, name, same):
    name = told["tiny"] if name == "tag" else name
    expected = told["local"][same]["embeddings"]
    assert told["online"][name].get("embeddings") == expected, told["online"][name]
    assert told["offline"][name].get("embeddings") == expected, told["offline"][name]


def test_only_the_files_of_a_clip_are_asked_for(told):
    asked = {line.rpartition("/")[2] for line in told["asked"] if "org/clip/resolve" in line}
    assert {"config.json", "model.safetensors", "vocab.json"} <= asked
    assert not asked & {"README.md", "tf_model.h5", "pytorch_model.bin"}


def test_what_the_hub_does_not_have_is_told(told):
    wrong = {name: answer["error"] for name, answer in told["wrong"].items()}
    assert "org/nothing: no folder, no name of a CLIP, and no repository of the hub" in wrong["org/nothing"]
    assert "org/page has no open_clip_config.json and no config.json: not a CLIP" in wrong["org/page"]
    assert "org/clip has no revision old" in wrong["org/clip@old"]
    assert "no weights; expected open_clip_model.safetensors" in wrong["hf-hub:org/bare"]


def test_what_is_not_cached_is_told_within_a_second_with_the_way_out(told):
    for answer in told["never"].values():
        assert answer["seconds"] < 1
        assert "not in the cache" in answer["error"]
        assert "run `hf download org/never` where it can and copy the cache" in answer["error"]
    assert "no such folder here, and as an id of the hub" in told["never"]["org/never"]["error"]


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("openai/clip-vit-base-patch32", True),
        ("google/siglip-base-patch16-224@main", True),
        ("hf-hub:timm/ViT-B-16-SigLIP", True),
        ("ViT-B/32", False),
        ("ViT-L/14@336px", False),
        ("ViT-B-32/laion2b_s34b_b79k", False),
        ("convnext_base_w/laion2b_s13b_b82k", False),
        ("tests/finetune", False),
        ("folder/tiny.json", False),
        ("a/b/c", False),
        ("ViT-B-32", False),
    ],
)
def test_which_names_are_ids(name, is_id):
    assert is_hub_id(name) is is_id
    if is_id:
        assert brings_weights(name)
