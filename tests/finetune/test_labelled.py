"""Labelled images from tables, torchvision's own formats and CLIP_benchmark's; their templates by name."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from PIL import Image

from curate.errors import ConfigError, InputError
from finetune.config import EvaluateConfig, ProbeConfig, ZeroShotConfig
from finetune.sets import evaluation_sets, probe_set, zero_shot_set
from finetune.templates import known, templates_of
from tests.finetune import tiny
from tests.finetune.benchmark_layout import write_benchmark
from tests.finetune.fitted import labelled_folder


def pictures(folder: Path, number: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    for each in range(number):
        (folder / f"{each}.png").write_bytes(tiny.picture(tiny.COLOURS[each], "circle", each))
    return [f"{each}.png" for each in range(number)]


# --- tables and files of classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_has_a_column_of_paths_and_one_of_labels(tmp_path, ending):
    names = pictures(tmp_path / "images", 3)
    rows = {"file": [f"images/{name}" for name in names], "kind": ["red_one", "green", "red_one"], "other": [1, 2, 3]}
    table = tmp_path / f"list.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table(rows), table)
    else:
        table.write_text("\n".join(",".join(map(str, row)) for row in [list(rows), *zip(*rows.values(), strict=True)]))
    found = zero_shot_set("x", ZeroShotConfig(images=table, image_column="file", label_column="kind"))
    assert (found.classes, found.labels) == (["green", "red one"], [1, 0, 1])
    assert found.images.names == names
    with pytest.raises(InputError, match=r"list\.\w+: no column 'kin'\. Did you mean 'kind'"):
        zero_shot_set("x", ZeroShotConfig(images=table, image_column="file", label_column="kin"))


def test_a_parquet_table_of_numbered_labels_goes_with_a_file_of_classes(tmp_path):
    names = pictures(tmp_path, 3)
    pq.write_table(pa.table({"image": names, "label": [2, 0, 2]}), tmp_path / "t.parquet")
    (tmp_path / "classes.txt").write_text("zebra\naardvark\nT-rex\n")
    config = ZeroShotConfig(images=tmp_path / "t.parquet", classes=tmp_path / "classes.txt")
    found = zero_shot_set("x", config)
    # In the order of the file, as it writes them; a class without an image is still a candidate.
    assert (found.classes, found.labels) == (["zebra", "aardvark", "T-rex"], [2, 0, 2])


def test_labels_that_are_names_are_looked_up_in_the_file_of_classes(tmp_path):
    folder = labelled_folder(tmp_path / "colours")
    (tmp_path / "classes.txt").write_text("\n".join([*sorted(tiny.COLOURS, reverse=True), "brown"]))
    found = zero_shot_set("x", ZeroShotConfig(images=folder, classes=tmp_path / "classes.txt"))
    assert found.classes[-1] == "brown"
    assert [path.parent.name for path in found.images.paths] == [found.classes[label] for label in found.labels]


@pytest.mark.parametrize(
    ("classes", "label", "message"),
    [
        ("a\nb\n", "2", r"classes\.txt: 2 classes, but there is an image of class 2, from 0"),
        ("cat\ndog\n", "dgo", r"classes\.txt: no class 'dgo'\. Did you mean 'dog'\?"),
        ("cat\n\ndog\n", "dog", r"classes\.txt: line 2 is empty"),
    ],
)
def test_a_label_that_the_file_does_not_have_is_an_error(tmp_path, classes, label, message):
    pictures(tmp_path, 1)
    (tmp_path / "t.csv").write_text(f"image,label\n0.png,{label}\n")
    (tmp_path / "classes.txt").write_text(classes)
    with pytest.raises(InputError, match=message):
        zero_shot_set("x", ZeroShotConfig(images=tmp_path / "t.csv", classes=tmp_path / "classes.txt"))


def test_numbers_that_are_names_of_classes_are_names(tmp_path):
    """Folders 1, 2 and 10, and the classes as `ls` sorts them."""
    for number, name in enumerate(("1", "2", "10")):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "x.png").write_bytes(tiny.picture(tiny.COLOURS[number], "circle", number))
    (tmp_path / "classes.txt").write_text("1\n10\n2\n")
    found = zero_shot_set("x", ZeroShotConfig(images=tmp_path / "images", classes=tmp_path / "classes.txt"))
    assert [found.classes[label] for label in found.labels] == ["1", "10", "2"]


def test_two_classes_of_one_name_are_told_and_labels_by_it_refused(tmp_path, caplog):
    pictures(tmp_path, 3)
    (tmp_path / "classes.txt").write_text("crane\nlift\ncrane\n")
    config = ZeroShotConfig(images=tmp_path / "labels.csv", classes=tmp_path / "classes.txt")
    (tmp_path / "labels.csv").write_text("image,label\n0.png,2\n1.png,1\n2.png,0\n")
    assert zero_shot_set("x", config).labels == [2, 1, 0]
    assert "two classes are called 'crane': nothing can tell them apart by their text" in caplog.text
    (tmp_path / "labels.csv").write_text("image,label\n0.png,crane\n1.png,lift\n")
    with pytest.raises(InputError, match="there are two classes 'crane', and labels by that name; give numbers"):
        zero_shot_set("x", config)
    (tmp_path / "labels.csv").write_text("image,label\n0.png,lift\n1.png,lift\n")
    assert zero_shot_set("x", config).labels == [1, 1]


def test_where_no_image_is_labelled_the_folder_is_named(tmp_path):
    (tmp_path / "flat").mkdir()
    pictures(tmp_path / "flat", 2)
    (tmp_path / "t.csv").write_text("image,label\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    for name in ("flat", "t.csv"):
        for classes in (tmp_path / "classes.txt", None):
            config = ZeroShotConfig(images=tmp_path / name, classes=classes)
            with pytest.raises(InputError, match=f"{name}: no labelled image; expected a sub-folder a class, or a lab"):
                zero_shot_set("x", config)


def test_a_table_in_another_encoding_is_named(tmp_path):
    (tmp_path / "t.csv").write_bytes("image,label\n0.png,café\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"t\.csv: cannot be read \(.*\); expected a CSV file in UTF-8"):
        zero_shot_set("x", ZeroShotConfig(images=tmp_path / "t.csv"))


# --- torchvision -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    """A folder in CIFAR-10's own format, of few and plain images, whose check sums torchvision is told."""
    root = tmp_path_factory.mktemp("cifar")
    base = root / "cifar-10-batches-py"
    base.mkdir()
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        labels = list(range(10))
        data = random.integers(0, 255, (10, 3 * 32 * 32), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return root


@pytest.fixture
def known_sums(cifar, monkeypatch):
    kind = torchvision.datasets.CIFAR10

    def sums(files: list[list[str]]) -> list[list[str]]:
        folder = cifar / kind.base_folder
        return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name, _ in files]

    monkeypatch.setattr(kind, "train_list", sums(kind.train_list))
    monkeypatch.setattr(kind, "test_list", sums(kind.test_list))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums([["batches.meta", ""]])[0][1]})


def test_a_torchvision_set_is_read_by_its_name(cifar, known_sums):
    config = ZeroShotConfig(images=Path("torchvision:CIFAR10"), root=cifar, templates="cifar10")
    found = zero_shot_set("cifar", config)
    theirs = torchvision.datasets.CIFAR10(str(cifar), train=False)
    assert found.classes == theirs.classes
    assert found.labels == theirs.targets
    assert len(found.templates) == 18
    assert all(np.array_equal(np.asarray(found.images.open(n)), np.asarray(theirs[n][0])) for n in range(10))
    train = zero_shot_set("cifar", ZeroShotConfig(images=Path("torchvision:CIFAR10"), root=cifar, split="train"))
    assert len(train.images) == 50


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"images": Path("torchvision:CIFAR10")}, r"x\.root: .*torchvision finds no CIFAR10, split test, there"),
        ({"images": Path("torchvision:CIFR10")}, r"no labelled set 'CIFR10'\. Did you mean 'CIFAR10'\?"),
        ({"images": Path("torchvision:ImageFolder")}, "no labelled set 'ImageFolder'"),
        ({"images": Path("torchvision:CIFAR10"), "split": "val"}, r"x\.split: CIFAR10 has train and test, not 'val'"),
    ],
)
def test_nothing_is_downloaded_unless_asked_and_mistakes_are_told(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        zero_shot_set("x", ZeroShotConfig(root=tmp_path, **config))
    assert not list(tmp_path.iterdir())


# --- CLIP_benchmark --------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(tmp_path) -> Path:
    samples = [(tiny.picture(tiny.COLOURS[n % 3], "circle", n), str(n % 3)) for n in range(7)]
    folder = write_benchmark(tmp_path / "wds", samples)
    (folder / "classnames.txt").write_text("red\ngreen\nblue\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} circle\nthe {c}.\n")
    return folder


def test_clip_benchmarks_layout_brings_classes_labels_and_templates(benchmark):
    found = zero_shot_set("x", ZeroShotConfig(images=benchmark))
    assert (found.classes, found.labels) == (["red", "green", "blue"], [0, 1, 2, 0, 1, 2, 0])
    assert found.templates == ["a {} circle", "the {}."]
    assert found.images.names == [f"s{n:07d}" for n in range(7)]
    expected = Image.open(io.BytesIO(tiny.picture("green", "circle", 4))).convert("RGB")
    assert found.images.open(4).tobytes() == expected.tobytes()
    own = zero_shot_set("x", ZeroShotConfig(images=benchmark, templates=["{}"]))
    assert own.templates == ["{}"]


def test_its_retrieval_layout_has_a_caption_a_line(tmp_path):
    samples = [(tiny.picture(c, "circle", n), f"a {c} thing\n{c}") for n, c in enumerate(tiny.COLOURS[:5])]
    folder = write_benchmark(tmp_path / "wds", samples, beside="txt")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    (only,) = evaluation_sets(EvaluateConfig(retrieval={"x": folder})).retrieval
    assert only.captions == [caption for c in tiny.COLOURS[:5] for caption in (f"a {c} thing", c)]
    assert only.pairs.tolist() == [[n // 2, n] for n in range(10)]
    (drawn,) = evaluation_sets(EvaluateConfig(retrieval={"x": folder}, max_retrieval=3)).retrieval
    assert len(drawn.images) == 3
    with pytest.raises(InputError, match=r"dataset_type\.txt says retrieval; expected classification"):
        zero_shot_set("x", ZeroShotConfig(images=folder))


def test_what_is_missing_in_it_is_named(benchmark, tmp_path):
    with pytest.raises(InputError, match="no split 'train'; splits there: test"):
        zero_shot_set("x", ZeroShotConfig(images=benchmark, split="train"))
    with pytest.raises(InputError, match=r"dataset_type\.txt says classification; expected retrieval"):
        evaluation_sets(EvaluateConfig(retrieval={"x": benchmark}))
    (benchmark / "classnames.txt").write_text("red\ngreen\n")
    with pytest.raises(InputError, match="2 classes, but there is an image of class 2"):
        zero_shot_set("x", ZeroShotConfig(images=benchmark))
    (benchmark / "classnames.txt").unlink()
    with pytest.raises(InputError, match=r"classnames\.txt: no such file"):
        zero_shot_set("x", ZeroShotConfig(images=benchmark))
    (benchmark / "test" / "nshards.txt").write_text("3")
    with pytest.raises(InputError, match=r"2\.tar: not a readable tar"):
        zero_shot_set("x", ZeroShotConfig(images=benchmark))
    bare = write_benchmark(tmp_path / "bare", [(tiny.picture("red", "circle", 0), "0")], beside="json", shards=1)
    with pytest.raises(InputError, match=r"sample s0000000 has no \.cls"):
        zero_shot_set("x", ZeroShotConfig(images=bare))


# --- templates, probes -----------------------------------------------------------------------------------------------


def test_imagenets_templates_are_those_that_open_clip_ships():
    assert templates_of("imagenet") == templates_of(["imagenet"]) == [t("{}") for t in OPENAI_IMAGENET_TEMPLATES]


def test_every_list_with_a_name_is_one_of_templates():
    assert {"imagenet", "cifar10", "food101", "pets", "eurosat"} <= set(known())
    assert all(templates_of(templates) == templates for templates in known().values())


def test_a_name_that_is_no_list_is_an_error():
    with pytest.raises(
        ConfigError, match=r"t: 'cifr10' needs exactly one .* no name of a list .*Did you mean 'cifar10'"
    ):
        templates_of("cifr10", "t")
    assert templates_of("one {} alone") == ["one {} alone"]


def test_more_shots_than_there_are_images_are_told_and_left_out(tmp_path, caplog):
    train, test = (ZeroShotConfig(images=labelled_folder(tmp_path / name, each=4)) for name in ("train", "test"))
    (tmp_path / "train" / "red" / "0.png").unlink()
    assert probe_set("x", ProbeConfig(train=train, test=test, shots=[2, 4, 5])).shots == (2, 4)
    assert "probe.x.train: no class has more than 4 images: 5_shot is left out" in caplog.text


def test_the_splits_of_a_probe_have_the_same_classes(tmp_path):
    folders = [labelled_folder(tmp_path / name) for name in ("train", "test")]
    train, test = (ZeroShotConfig(images=folder) for folder in folders)
    assert probe_set("x", ProbeConfig(train=train, test=test)).train.classes == sorted(tiny.COLOURS)
    (tmp_path / "other.txt").write_text("\n".join(sorted(tiny.COLOURS, reverse=True)))
    turned = ZeroShotConfig(images=folders[0], classes=tmp_path / "other.txt")
    with pytest.raises(InputError, match=r"probe\.x\.train: not in the order of probe\.x\.test; name them all"):
        probe_set("x", ProbeConfig(train=turned, test=test))
    (folders[0] / "red").rename(folders[0] / "rot")
    with pytest.raises(InputError, match=r"probe\.x\.train: other classes than probe\.x\.test, such as 're?o?[dt]'"):
        probe_set("x", ProbeConfig(train=train, test=test))
    (tmp_path / "classes.txt").write_text("\n".join([*tiny.COLOURS, "rot", "brown"]))
    named = [ZeroShotConfig(images=folder, classes=tmp_path / "classes.txt") for folder in folders]
    with pytest.raises(InputError, match=r"probe\.x\.train: no image of class 'red'"):
        probe_set("x", ProbeConfig(train=named[0], test=named[1]))
