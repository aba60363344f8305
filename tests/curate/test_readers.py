"""Who else reads what `curate` packs: webdataset, open_clip's training, Hugging Face datasets, tar, pandas."""

import io
import subprocess
from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from tests.curate.built import build


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("readers") / "out")


@pytest.fixture(scope="module")
def packed(out: Path) -> pd.DataFrame:
    """The train split as its Parquet files say, in order."""
    paths = sorted((out / "shards").glob("train-*.parquet"))
    return pd.concat([pd.read_parquet(path).assign(tar=path.with_suffix(".tar")) for path in paths], ignore_index=True)


def tars(out: Path) -> list[str]:
    return [str(path) for path in sorted((out / "shards").glob("train-*.tar"))]


def stored(line) -> bytes:
    """An image by its offset, as pandas and a file give it."""
    with line.tar.open("rb") as file:
        file.seek(line.image_offset)
        return file.read(line.image_size)


def test_pandas_finds_every_image_by_its_offset(out: Path, packed: pd.DataFrame) -> None:
    ledger = pd.read_parquet(out / "ledger.parquet")
    assert set(packed.key) == set(ledger.key[ledger.split == "train"])
    for line in packed.itertuples():
        with Image.open(io.BytesIO(stored(line))) as image:
            assert image.size == (line.width, line.height)


def test_tar_lists_and_extracts_the_members_in_the_order_of_the_parquet(
    out: Path, packed: pd.DataFrame, tmp_path: Path
) -> None:
    listed = [
        name
        for tar in tars(out)
        for name in subprocess.run(["tar", "-tf", tar], capture_output=True, text=True, check=True).stdout.split()
    ]
    extensions = [(line.key, what) for line in packed.itertuples() for what in (line.image_ext, "txt", "json")]
    assert listed == [f"{key}.{what}" for key, what in extensions]
    for tar in tars(out):
        subprocess.run(["tar", "-xf", tar, "-C", str(tmp_path)], check=True)
    for line in packed.itertuples():
        assert (tmp_path / f"{line.key}.txt").read_text() == line.caption
        assert (tmp_path / f"{line.key}.{line.image_ext}").read_bytes() == stored(line)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_pairs_decoded(out: Path, packed: pd.DataFrame) -> None:
    import webdataset

    dataset = webdataset.WebDataset(tars(out), shardshuffle=False).decode("pil").to_tuple("__key__", "png", "txt")
    samples = list(dataset)
    assert [(key, text) for key, _, text in samples] == list(zip(packed.key, packed.caption, strict=True))
    assert [image.size for _, image, _ in samples] == list(zip(packed.width, packed.height, strict=True))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_open_clips_own_training_reader_gives_batches_of_all_samples(out: Path, packed: pd.DataFrame) -> None:
    """What `--train-data 'shards/train-{00000..00004}.tar' --dataset-type webdataset` reads with, in its own words."""
    import open_clip
    import torch
    from open_clip_train.data import get_wds_dataset

    last = len(tars(out)) - 1
    options = Namespace(
        train_data=str(out / "shards" / f"train-{{00000..{last:05d}}}.tar"),
        val_data=str(out / "shards" / f"train-{{00000..{last:05d}}}.tar"),
        train_data_upsampling_factors=None,
        train_num_samples=len(packed),
        val_num_samples=len(packed),
        dataset_resampled=False,
        batch_size=5,
        workers=1,
        world_size=1,
        seed=0,
    )
    size = 16
    transform = open_clip.image_transform(size, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(options, transform, is_train=False, tokenizer=tokenizer)
    batches = list(data.dataloader)
    assert {tuple(images.shape[1:]) for images, _ in batches} == {(3, size, size)}
    tokens = torch.cat([texts for _, texts in batches])
    expected = tokenizer(packed.caption.tolist())
    assert sorted(map(tuple, tokens.tolist())) == sorted(map(tuple, expected.tolist()))


def test_hugging_face_datasets_loads_the_shards_without_a_network(
    out: Path, packed: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    files = {"train": tars(out), "validation": [str(path) for path in sorted((out / "shards").glob("val-*.tar"))]}
    loaded = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(tmp_path))
    assert loaded["train"].num_rows == len(packed)
    for sample, line in zip(loaded["train"], packed.itertuples(), strict=True):
        assert (sample["__key__"], sample["txt"], sample["png"].size) == (line.key, line.caption, (64, 64))
        assert sample["json"]["sha256"] == line.sha256
