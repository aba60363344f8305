import hashlib
import io
import os
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curate import measure
from curate.clip import Clip, load_clip
from curate.config import ClipConfig, MeasureConfig
from curate.errors import ModelError
from curate.select.selection import read_embeddings
from curate.shards import ShardWriter
from tests.curate.fetching import encoded, photo
from tests.finetune.parity import reference
from tests.finetune.tiny import write_architecture

SCHEMA = pa.schema({"key": pa.string(), "caption": pa.string(), "status": pa.string()})
CAPTIONS = ["a cat", "a dog", "a cat", None, "a bird", "a fish", "a dog"]


def write_raw(out: Path, shard: int, first: int = 0) -> None:
    with ShardWriter(out / "raw" / f"{shard:05d}", SCHEMA, made_from="test") as writer:
        for number, caption in enumerate(CAPTIONS, start=first):
            row = {"key": f"key{number:03d}", "caption": caption, "status": "success"}
            writer.add(row, encoded(photo(number), "PNG"), "png")
        writer.add({"key": f"key{first}gone", "caption": "x", "status": "failed_to_download"})


@pytest.fixture
def config(tmp_path: Path) -> MeasureConfig:
    """A tiny CLIP with the same random weights at each load."""
    architecture = write_architecture("tiny-vit", tmp_path)
    torch.manual_seed(0)
    weights = tmp_path / "weights.pt"
    torch.save(load_clip(str(architecture), device="cpu").model.state_dict(), weights)
    return MeasureConfig(
        text=False, clip=ClipConfig(name=str(architecture), pretrained=str(weights), batch_size=3, device="cpu")
    )


def signals(out: Path, shard: int = 0, group: str = "clip") -> pa.Table:
    return pq.read_table(out / "signals" / group / f"{shard:05d}.parquet")


def test_every_fetched_image_gets_its_embeddings_and_their_cosine(tmp_path: Path, config: MeasureConfig) -> None:
    write_raw(tmp_path, 0)
    assert measure.run(tmp_path, config).images == len(CAPTIONS)
    rows = signals(tmp_path)
    assert rows["key"].to_pylist() == [f"key{number:03d}" for number in range(len(CAPTIONS))]
    clip = load_clip(config.clip.name, config.clip.pretrained, device="cpu")
    images = [Image.open(io.BytesIO(encoded(photo(number), "PNG"))) for number in range(len(CAPTIONS))]
    image_ND = clip.embed_images(images).double().numpy()
    text_ND = clip.embed_captions([caption or "" for caption in CAPTIONS]).double().numpy()
    np.testing.assert_allclose(rows["image_embedding"].to_pylist(), image_ND, atol=1e-3)
    np.testing.assert_allclose(rows["text_embedding"].to_pylist(), text_ND, atol=1e-3)
    np.testing.assert_allclose(rows["clip_score"].to_numpy(), (image_ND * text_ND).sum(1), atol=1e-5)
    assert rows["image_embedding"].type.value_type == pa.float16()


def transformers_folder(folder: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """A `CLIPModel` as transformers writes it, and its own embeddings of the pictures and captions."""
    from transformers import CLIPImageProcessor, CLIPModel

    from tests.finetune.parity.test_transformers import config, save

    save(folder, config())
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessor.from_pretrained(folder)
    pictures = [Image.open(io.BytesIO(encoded(photo(number), "PNG"))).convert("RGB") for number in range(len(CAPTIONS))]
    tokens = open_clip.SimpleTokenizer(context_length=20)([caption or "" for caption in CAPTIONS])
    with torch.no_grad():
        found = model(pixel_values=processor(pictures, return_tensors="pt")["pixel_values"], input_ids=tokens)
    return str(folder), found.image_embeds.numpy(), found.text_embeds.numpy()


def openai_state_dict(folder: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """A small ViT's state dict as OpenAI's are, and its embeddings in plain functions written from the paper."""
    towers = {"vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}}
    towers["text_cfg"] = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=24, quick_gelu=True, **towers)
    state = dict(model.state_dict())
    numbers = {"input_resolution": 32, "context_length": 16, "vocab_size": 49408}
    half = {name: value.half() for name, value in state.items()}
    torch.save(half | {name: torch.tensor(number) for name, number in numbers.items()}, folder / "small.pt")
    state = {name: value.float() for name, value in half.items()}
    preprocess = open_clip.image_transform(32, is_train=False)
    pixels = [preprocess(Image.open(io.BytesIO(encoded(photo(n), "PNG"))).convert("RGB")) for n in range(len(CAPTIONS))]
    tokens = open_clip.SimpleTokenizer(context_length=16)([caption or "" for caption in CAPTIONS])
    with torch.no_grad():
        image_ND, text_ND = reference.image(torch.stack(pixels), state), reference.text(tokens, state)
    return str(folder / "small.pt"), image_ND.numpy(), text_ND.numpy()


@pytest.mark.parametrize("scorer", [transformers_folder, openai_state_dict])
def test_a_clip_of_transformers_or_openai_scores_as_its_own_code_does(tmp_path: Path, scorer) -> None:
    (tmp_path / "clip").mkdir()
    write_raw(tmp_path, 0)
    name, image_ND, text_ND = scorer(tmp_path / "clip")
    config = MeasureConfig(text=False, clip=ClipConfig(name=name, batch_size=3, device="cpu"))
    assert measure.run(tmp_path, config).made == 1
    rows = signals(tmp_path)
    np.testing.assert_allclose(rows["image_embedding"].to_pylist(), image_ND, atol=1e-3)
    np.testing.assert_allclose(rows["text_embedding"].to_pylist(), text_ND, atol=1e-3)
    np.testing.assert_allclose(
        rows["clip_score"].to_numpy(), (image_ND * text_ND).sum(1), atol=2e-4
    )  # two ways to resize
    assert measure.run(tmp_path, config).reused == 1


def test_only_shards_that_changed_are_measured_again(tmp_path: Path, config: MeasureConfig) -> None:
    write_raw(tmp_path, 0)
    write_raw(tmp_path, 1, first=20)
    assert measure.run(tmp_path, config) == measure.MeasureResult(made=2, reused=0, images=14)
    assert measure.run(tmp_path, config) == measure.MeasureResult(made=0, reused=2, images=0)
    write_raw(tmp_path, 1, first=40)
    assert measure.run(tmp_path, config) == measure.MeasureResult(made=1, reused=1, images=7)


def test_other_weights_measure_everything_again(tmp_path: Path, config: MeasureConfig) -> None:
    write_raw(tmp_path, 0)
    measure.run(tmp_path, config)
    state = torch.load(config.clip.pretrained, weights_only=True)  # noqa: TID251 - the test's own file
    torch.save({name: value + 0.01 for name, value in state.items()}, config.clip.pretrained)
    assert measure.run(tmp_path, config).made == 1


def test_without_a_clip_there_are_no_signals(tmp_path: Path, config: MeasureConfig) -> None:
    write_raw(tmp_path, 0)
    measure.run(tmp_path, config)
    measure.run(tmp_path, MeasureConfig(text=False))
    assert not list((tmp_path / "signals").rglob("*.parquet"))


def test_a_shard_without_images_has_empty_signals(tmp_path: Path, config: MeasureConfig) -> None:
    with ShardWriter(tmp_path / "raw" / "00000", SCHEMA, made_from="test") as writer:
        writer.add({"key": "gone", "caption": "x", "status": "failed_to_download"})
    measure.run(tmp_path, config)
    assert signals(tmp_path).num_rows == 0


def test_an_image_that_cannot_be_decoded_costs_its_own_row(tmp_path: Path, config: MeasureConfig) -> None:
    with ShardWriter(tmp_path / "raw" / "00000", SCHEMA, made_from="test") as writer:
        for number in range(5):
            content = b"\xff\xd8\xff no picture" if number in (0, 3) else encoded(photo(number), "PNG")
            writer.add({"key": f"key{number}", "caption": "a cat", "status": "success"}, content, "png")
    assert measure.run(tmp_path, config).images == 5
    found = [score is not None for score in signals(tmp_path)["clip_score"].to_pylist()]
    assert found == [False, True, True, False, True]
    keys, image_ND = read_embeddings(tmp_path / "signals" / "clip" / "00000.parquet")
    assert keys.to_pylist() == ["key1", "key2", "key4"]
    clip = load_clip(config.clip.name, config.clip.pretrained, device="cpu")
    images = [Image.open(io.BytesIO(encoded(photo(number), "PNG"))) for number in (1, 2, 4)]
    np.testing.assert_allclose(image_ND, clip.embed_images(images).numpy(), atol=1e-3)


def test_equal_images_are_embedded_once_and_each_row_gets_its_own(
    tmp_path: Path, config: MeasureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, embedded, plain = [2, 0, 2, 1, 0, 2], [], Clip.embed_images

    def counted(self: Clip, images: torch.Tensor) -> torch.Tensor:
        embedded.append(len(images))
        return plain(self, images)

    monkeypatch.setattr(Clip, "embed_images", counted)
    schema = pa.schema([*SCHEMA, ("sha256", pa.string())])
    with ShardWriter(tmp_path / "raw" / "00000", schema, made_from="test") as writer:
        for place, number in enumerate(numbers):
            content = encoded(photo(number), "PNG")
            sha256 = hashlib.sha256(content).hexdigest()
            row = {"key": f"key{place}", "caption": f"{place}", "status": "success", "sha256": sha256}
            writer.add(row, content, "png")
    assert measure.run(tmp_path, config).images == len(numbers)
    assert sum(embedded) == 3
    clip = load_clip(config.clip.name, config.clip.pretrained, device="cpu")
    images = [Image.open(io.BytesIO(encoded(photo(number), "PNG"))) for number in numbers]
    np.testing.assert_allclose(signals(tmp_path)["image_embedding"].to_pylist(), plain(clip, images).numpy(), atol=1e-3)


def test_measuring_many_shards_leaves_no_file_open(tmp_path: Path, config: MeasureConfig) -> None:
    def open_tars() -> list[str]:
        links = [os.path.realpath(handle) for handle in Path("/proc/self/fd").iterdir()]
        return [link for link in links if link.startswith(str(tmp_path.resolve())) and link.endswith(".tar")]

    for shard in range(8):
        write_raw(tmp_path, shard)
    measure.run(tmp_path, config)
    assert open_tars() == []


def test_a_clip_that_cannot_be_loaded_is_one_clear_error(tmp_path: Path) -> None:
    write_raw(tmp_path, 0)
    with pytest.raises(ModelError, match="ViT-B-33"):
        measure.run(tmp_path, MeasureConfig(text=False, clip=ClipConfig(name="ViT-B-33")))
