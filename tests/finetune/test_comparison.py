"""Several CLIPs side by side, probes, robustness; docs/evaluation.md, all of whose YAML and commands run."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
import re
import shlex
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import linear_probe, zeroshot_classification, zeroshot_retrieval
from clip_benchmark.models import load_clip
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from torchmetrics.classification import MulticlassAccuracy

from curate import charts
from curate.clip import Clip
from curate.errors import ConfigError, InputError
from finetune.checks import check_probes, check_robustness
from finetune.cli import main
from finetune.comparison import check_same_classes, write_plots
from finetune.config import (
    AdapterConfig,
    EvaluateConfig,
    OptimizerConfig,
    ProbeConfig,
    RobustnessConfig,
    ZeroShotConfig,
)
from finetune.evaluate import Evaluation, Ranking, evaluate_clip
from finetune.export import write_open_clip
from finetune.fit import fit
from finetune.metrics import recall_at
from finetune.probe import probe
from finetune.robustness import fit_line, robustness
from finetune.runs import checkpoint_of, load_trained_clip
from finetune.sets import EvaluationSets, evaluation_sets, probe_set
from tests.finetune import tiny
from tests.finetune.benchmark_layout import write_benchmark
from tests.finetune.fitted import labelled_folder, tiny_config

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory, architectures) -> Path:
    """A run whose CLIP has learnt something: neither chance nor perfect."""
    folder = tmp_path_factory.mktemp("run")
    dataset = tiny.write_dataset(folder / "dataset", train=128, val=0, retain=0)
    config = tiny_config(folder / "run", dataset, architectures["tiny-vit"], AdapterConfig(kind="full"), steps=60)
    model = replace(config.model, optimizer=OptimizerConfig(lr=3e-3))
    trainer = replace(config.trainer, val_check_interval=None)
    fit(replace(config, model=model, trainer=trainer, data=replace(config.data, batch_size=32)))
    return config.out


@pytest.fixture(scope="module")
def clip(run) -> Clip:
    return load_trained_clip(checkpoint_of(run, "last"), "cpu")


def evaluate(clip: Clip, sets: EvaluationSets) -> Evaluation:
    return evaluate_clip(clip.model, clip.preprocess, clip.tokenizer, sets, device=clip.device, batch_size=16)


# --- the figures are CLIP_benchmark's --------------------------------------------------------------------------------


@pytest.fixture
def benchmark(tmp_path) -> tuple[Path, Path]:
    def picture(n: int) -> bytes:
        return tiny.picture(tiny.COLOURS[n % 8], tiny.SHAPES[n // 8 % 2], n)

    # A third of the labels are another's, and half the classes have twice the images: no two figures are the same.
    classes = [n % 8 if n % 3 else n // 24 for n in range(96)]
    labelled = write_benchmark(tmp_path / "labelled", [(picture(n), str(classes[n])) for n in range(96)], shards=3)
    (labelled / "classnames.txt").write_text("\n".join(tiny.COLOURS))
    (labelled / "zeroshot_classification_templates.txt").write_text("a {c} circle\na {c} square\n{c}")
    captions = [f"a {tiny.COLOURS[n % 8]} {tiny.SHAPES[n // 8 % 2]} {n}\nnumber {n}" for n in range(60)]
    captioned = write_benchmark(
        tmp_path / "captioned", [(picture(n), captions[n]) for n in range(60)], beside="txt", shards=3
    )
    (captioned / "dataset_type.txt").write_text("retrieval")
    return labelled, captioned


@pytest.fixture(scope="module")
def theirs(clip, tmp_path_factory) -> tuple:
    """Model, preprocessing and tokenizer as CLIP_benchmark loads them, from the CLIP's export."""
    folder = tmp_path_factory.mktemp("exported")
    write_open_clip(clip, folder)
    model, transform, tokenizer = load_clip("open_clip", f"local-dir:{folder}", None, None, "cpu")
    return model.eval(), transform, tokenizer


def loader(folder: Path, transform, task: str) -> tuple[torch.utils.data.IterableDataset, torch.utils.data.DataLoader]:
    """What `clip_benchmark eval --dataset wds/… --batch_size 7` reads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"WebDataset\(shardshuffle=")  # today's asks for what it does not say
        dataset = build_dataset("wds/x", root=str(folder), transform=transform, task=task)
    return dataset, torch.utils.data.DataLoader(dataset.batched(7), batch_size=None)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of webdataset
def test_classification_equals_clip_benchmark_and_torchmetrics_on_its_logits(clip, theirs, benchmark, monkeypatch):
    # NumPy 2.4 makes no float any more of an array with one element in a dimension, as CLIP_benchmark's accuracy asks.
    monkeypatch.setattr(zeroshot_classification, "float", lambda x: float(np.squeeze(x)), raising=False)
    values = evaluate(
        clip, evaluation_sets(EvaluateConfig(zero_shot={"x": ZeroShotConfig(images=benchmark[0])}))
    ).values()
    model, transform, tokenizer = theirs
    dataset, batches = loader(benchmark[0], transform, "zeroshot_classification")
    batches.dataset.classes = dataset.classes  # of the set that is batched, as its `evaluate` looks for them
    prompts = (dataset.classes, dataset.templates)
    told = zeroshot_classification.evaluate(model, batches, tokenizer, *prompts, device="cpu", amp=False)
    names = {"top1": "acc1", "top5": "acc5", "per_class_mean": "mean_per_class_recall"}
    assert {name: values[f"zero_shot/x/{name}"] for name in names} == pytest.approx(
        {name: told[theirs] for name, theirs in names.items()}, abs=1e-4
    )
    classifier = zeroshot_classification.zero_shot_classifier(model, tokenizer, *prompts, "cpu", amp=False)
    logits, target = zeroshot_classification.run_classification(model, classifier, batches, "cpu", amp=False)
    for metric, kind in {
        "top1": {"average": "micro"},
        "top5": {"average": "micro", "top_k": 5},
        "per_class_mean": {"average": "macro"},
    }.items():
        of_them = MulticlassAccuracy(num_classes=8, **kind)(logits, target)
        assert values[f"zero_shot/x/{metric}"] == pytest.approx(float(of_them), abs=1e-4), metric
    assert 2 / 8 < told["acc1"] < told["acc5"] < 1  # else it says little
    assert told["acc1"] != told["mean_per_class_recall"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of webdataset
def test_retrieval_equals_clip_benchmark(clip, theirs, benchmark):
    values = evaluate(clip, evaluation_sets(EvaluateConfig(retrieval={"x": benchmark[1]}))).values()
    model, transform, tokenizer = theirs
    _, batches = loader(benchmark[1], transform, "zeroshot_retrieval")
    told = zeroshot_retrieval.evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    ways = {"image_retrieval": "text_to_image", "text_retrieval": "image_to_text"}
    ours = {f"{way}_recall@{k}": values[f"x/{ours}/recall@{k}"] for way, ours in ways.items() for k in (1, 5, 10)}
    assert ours == pytest.approx(told, abs=1e-4)
    assert len(set(told.values())) == 6  # each its own


def test_confusion_is_scikit_learns(clip, benchmark):
    evaluation = evaluate(clip, evaluation_sets(EvaluateConfig(zero_shot={"x": ZeroShotConfig(images=benchmark[0])})))
    ranking = evaluation.rankings["zero_shot/x"]
    theirs = confusion_matrix(ranking.labels, ranking.predicted, labels=range(8))
    assert evaluation.confusion() == {"zero_shot/x": theirs.tolist()}
    assert len(set(ranking.predicted)) > 2  # else it says little


# --- probes ----------------------------------------------------------------------------------------------------------


def test_a_probe_is_scikit_learns_on_clip_benchmarks_features(clip, theirs, tmp_path):
    folders = {}
    for place, (split, each) in enumerate({"train": 6, "validation": 3, "test": 4}.items()):
        folders[split] = tmp_path / split
        for number, colour in enumerate(tiny.COLOURS):
            (folders[split] / colour).mkdir(parents=True)
            for n in range(each):
                content = tiny.picture(colour, tiny.SHAPES[n % 2], 1000 * place + 50 * number + n)
                (folders[split] / colour / f"{n}.png").write_bytes(content)
    config = ProbeConfig(**{name: ZeroShotConfig(images=folder) for name, folder in folders.items()}, shots=[2])
    found = probe_set("x", config)
    rankings = evaluate(clip, EvaluationSets([], [], [found])).rankings
    assert list(rankings) == ["zero_shot/x", "probe/x/2_shot", "probe/x"]

    model, transform, _ = theirs
    featurizer = linear_probe.Featurizer(model)

    def embedded(of) -> np.ndarray:
        with torch.no_grad():
            features = featurizer(torch.stack([transform(of.images.open(n)) for n in range(len(of.images))]))
        return features.double().numpy()

    train, validation, test = (embedded(of) for of in (found.train, found.validation, found.test))
    chosen = probe(
        (torch.from_numpy(train), torch.tensor(found.train.labels)),
        (torch.from_numpy(validation), torch.tensor(found.validation.labels)),
        8,
    )
    regression = LogisticRegression(C=1 / chosen.penalty, max_iter=20_000, tol=1e-6).fit(
        np.concatenate([train, validation]), found.train.labels + found.validation.labels
    )
    ours = rankings["probe/x"]
    assert np.mean(regression.predict(test) == ours.predicted) >= 31 / 32
    assert recall_at(ours.ranks, 1).value == pytest.approx(regression.score(test, found.test.labels), abs=1 / 32)
    assert recall_at(ours.ranks, 1).value > 4 / 8
    zero_shot = {"x": ZeroShotConfig(images=folders["test"])}
    alone = evaluate(clip, evaluation_sets(EvaluateConfig(zero_shot=zero_shot))).rankings["zero_shot/x"]
    assert rankings["zero_shot/x"].ranks == alone.ranks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": [1, 0]}, r"probe\.x\.shots: expected at least 1, got 0"),
        ({"seed": -1}, r"probe\.x\.seed: expected 0 or more"),
        ({"train": ZeroShotConfig(images=Path("gone"))}, r"probe\.x\.train\.images: gone: no such folder"),
        ({"test": ZeroShotConfig(images=Path(), templates=["{} {}"])}, r"probe\.x\.test\.templates: '\{\} \{\}' needs"),
        (
            {"train": ZeroShotConfig(images=Path("torchvision:MNIST"))},
            r"train\.images: torchvision:MNIST needs `root`",
        ),
        ({"train": ZeroShotConfig(images=Path(), root=Path())}, r"probe\.x\.train\.root: it is for torchvision's"),
        ({"train": ZeroShotConfig(images=PAGE)}, r"probe\.x\.train\.images: .*evaluation\.md: expected a folder, FILE"),
        ({"train": ZeroShotConfig(images=Path(), classes=Path("gone"))}, r"probe\.x\.train\.classes: gone: no such"),
    ],
)
def test_a_wrong_probe_is_told_by_its_key(change, message):
    right = ProbeConfig(train=ZeroShotConfig(images=Path()), test=ZeroShotConfig(images=Path()))
    check_probes({"x": right}, ["y"])
    with pytest.raises(ConfigError, match=message):
        check_probes({"x": replace(right, **change)}, ["y"])
    with pytest.raises(ConfigError, match=r"probe\.x: a zero-shot set has this name"):
        check_probes({"x": right}, ["x"])


# --- robustness ------------------------------------------------------------------------------------------------------


def of(share: float, samples: int = 200):
    return recall_at([1] * round(share * samples) + [2] * (samples - round(share * samples)), 1)


def test_effective_robustness_is_the_distance_from_the_baselines_line():
    def logit(p: float) -> float:
        return float(np.log(p / (1 - p)))

    slope = (logit(0.6) - logit(0.2)) / (logit(0.8) - logit(0.3))
    line = fit_line([(0.3, 0.2), (0.8, 0.6)])
    assert (line.slope, line.intercept) == pytest.approx((slope, logit(0.2) - slope * logit(0.3)))
    expected = 1 / (1 + np.exp(-(slope * logit(0.5) + line.intercept)))
    found = robustness(of(0.5), of(0.7), [(0.3, 0.2), (0.8, 0.6)])
    assert (found.reference, found.shifted) == (0.5, 0.7)
    assert found.predicted == pytest.approx(expected)
    assert found.effective == pytest.approx(0.7 - expected)
    assert found.low < found.effective < found.high
    on_the_line = robustness(of(0.3), of(0.2), [(0.3, 0.2), (0.8, 0.6)])
    assert on_the_line.effective == pytest.approx(0, abs=1e-9)
    assert on_the_line.low < 0 < on_the_line.high
    # Both sets vary: wider than the shifted one's own interval.
    assert on_the_line.high - on_the_line.low > 2 * 1.96 * np.sqrt(0.2 * 0.8 / 200)


def test_without_a_baseline_nothing_is_predicted_and_perfect_scores_are_finite():
    assert robustness(of(0.5), of(0.4), []).effective is None
    assert np.isfinite(robustness(of(1.0), of(0.0), [(0.3, 0.2), (1.0, 0.6)]).effective)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"reference": "phtos"},
            r"sketches\.reference: no zero-shot set 'phtos'\. Did you mean 'photos'\?",
        ),
        ({"reference": "sketches"}, r"robustness\.sketches\.reference: expected another set"),
        ({"reference": "photos", "baseline": [(0.1, 2.0)]}, r"sketches\.baseline: expected shares, 0 to 1, got 2\.0"),
        ({"reference": "photos", "baseline": [(0.1, 0.2)]}, r"sketches\.baseline: a line needs two models"),
    ],
)
def test_a_wrong_comparison_is_told_by_its_key(asked, message):
    with pytest.raises(ConfigError, match=message):
        check_robustness({"sketches": RobustnessConfig(**asked)}, ["photos", "sketches"])
    with pytest.raises(ConfigError, match=r"robustness\.sketches: no zero-shot set 'sketches'"):
        check_robustness({"sketches": RobustnessConfig(reference="photos")}, ["photos"])


def test_a_shifted_set_has_its_references_classes(tmp_path):
    for name in ("photos", "sketches"):
        labelled_folder(tmp_path / name)
    (tmp_path / "sketches" / "red").rename(tmp_path / "sketches" / "pink")
    zero_shot = {name: ZeroShotConfig(images=tmp_path / name) for name in ("photos", "sketches")}
    sets = evaluation_sets(EvaluateConfig(zero_shot=zero_shot))
    with pytest.raises(InputError, match=r"robustness\.sketches: other classes than photos, such as 'pink'"):
        check_same_classes({"sketches": RobustnessConfig(reference="photos")}, sets)


# --- the plot --------------------------------------------------------------------------------------------------------


def test_a_logarithmic_axis_puts_equal_ratios_at_equal_distances():
    drawn = str(charts.scatter({"a": (1.0, 3.0), "b<": (10.0, 5.0), "c": (100.0, 4.0), "no": (0.0, 1.0)}, log_x=True))
    x = [float(at) for at in re.findall(r'<circle[^>]* cx="([\d.]+)"', drawn)]
    assert len(x) == 3
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    y = [float(at) for at in re.findall(r'<circle[^>]* cy="([\d.]+)"', drawn)]
    assert y[1] < y[2] < y[0]
    assert {"1", "2", "5", "10", "20", "50", "100"} <= set(re.findall(r'class="tick middle"[^>]*>([^<]+)<', drawn))
    assert "b<" not in drawn
    assert "b&lt;" in drawn
    assert charts.scatter({}) == ""
    assert 'cx="nan"' not in charts.scatter({"one": (5.0, 5.0)})


# --- the page, from top to bottom ------------------------------------------------------------------------------------


@pytest.fixture
def desk(run, tmp_path, monkeypatch) -> Path:
    """A folder with all that docs/evaluation.md names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "domain").symlink_to(run)
    (tmp_path / "runs" / "other").mkdir()
    for name in ("config.yaml", "checkpoints"):
        (tmp_path / "runs" / "other" / name).symlink_to(run / name)
    for number, name in enumerate(("photos", "sketches", "probe_train", "probe_val")):
        labelled_folder(tmp_path / name, each=4 - number % 2)
    images = [f"photos/{colour}/0.png" for colour in tiny.COLOURS]
    (tmp_path / "shelf.csv").write_text("file,kind\n" + "".join(f"{i},{i.split('/')[1]}\n" for i in images))
    (tmp_path / "numbered.csv").write_text("image,label\n" + "".join(f"{i},{n}\n" for n, i in enumerate(images)))
    (tmp_path / "classes.txt").write_text("\n".join(tiny.COLOURS))
    contents = [(tmp_path / image).read_bytes() for image in images]
    wds = write_benchmark(tmp_path / "wds_colours", [(each, str(n)) for n, each in enumerate(contents)])
    (wds / "classnames.txt").write_text("\n".join(tiny.COLOURS))
    wds = write_benchmark(tmp_path / "wds_captions", [(e, f"number {n}") for n, e in enumerate(contents)], beside="txt")
    (wds / "dataset_type.txt").write_text("retrieval")
    tiny.write_split(tmp_path / "flowers", "test", 6)
    write_cifar(tmp_path / "cifar", monkeypatch)
    return tmp_path


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.CIFAR10
    (root / kind.base_folder).mkdir(parents=True)
    data = np.random.default_rng(0).integers(0, 255, (10, 3072), dtype=np.uint8)
    contents = {
        "test_batch": pickle.dumps({"data": data, "labels": list(range(10))}),
        "batches.meta": pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}),
    }
    for name, content in contents.items():
        (root / kind.base_folder / name).write_bytes(content)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(kind, "train_list", [])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})


def test_every_yaml_and_command_of_the_page_runs(desk, capsys):
    page = PAGE.read_text(encoding="utf-8")
    for name, text in re.findall(r"```yaml\n# (\S+)\n(.*?)```", page, re.DOTALL):
        (desk / name).write_text(text)
    commands = [line.strip() for line in page.splitlines() if line.startswith("    finetune evaluate")]
    assert len(commands) == 8
    for command in commands:
        _, *arguments = shlex.split(command.replace("ViT-B/32", "runs/other"))
        assert main([*arguments, "--device", "cpu"]) == 0, command
    assert "change" in capsys.readouterr().out

    everything = json.loads((desk / "all.json").read_text())
    assert list(everything["figures"]) == ["runs/domain", "runs/other"]
    assert list(everything["changes"]) == ["runs/other"]
    # The same weights under another name: no change, and an interval that says so.
    assert all(delta == {"value": 0, "low": 0, "high": 0} for delta in everything["changes"]["runs/other"].values())
    assert everything["classes"]["zero_shot/numbered"] == list(tiny.COLOURS)
    assert sum(map(sum, everything["confusion"]["runs/domain"]["zero_shot/photos"])) == 32
    assert everything["image_gflops"]["runs/domain"] > 0

    with (desk / "table.csv").open() as file:
        rows = {(row["clip"], row["metric"]): row for row in csv.DictReader(file)}
    figures = everything["figures"]["runs/domain"]
    assert len(rows) == 2 * len(figures)
    for metric, figure in figures.items():
        row = rows["runs/domain", metric]
        assert [float(row[key]) for key in ("value", "low", "high", "n")] == [*figure.values()]
        assert (row["change"], rows["runs/other", metric]["change"]) == ("", "0.0")

    table = (desk / "table.md").read_text()
    assert table.startswith("| metric | runs/domain | runs/other | change |\n| --- | ---: | ---: | ---: |\n")
    assert len(table.splitlines()) == 2 + len(figures) + 1
    assert "| sketches | photos | runs/domain |" in (desk / "shift.md").read_text()
    assert "against GFLOPs an image" in (desk / "plots.html").read_text()
    probes = (desk / "probes.html").read_text()
    assert "at 0 zero-shot" in probes
    assert "against that of the probe" in probes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out table.txt", "out: expected a file that ends in .md or .csv or .json"),
        ("--plot plot.svg", "plot: expected a file that ends in .html"),
        ("--batch_size 0", "batch_size: expected at least 1, got 0"),
    ],
)
def test_a_wrong_file_is_told_before_anything_is_loaded(arguments, message, capsys):
    assert main(["evaluate", "--models", "x", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_confusion_of_a_ranking_counts_rows_by_the_true_class():
    ranking = Ranking([1, 2, 2], 3, labels=[0, 1, 1], predicted=[0, 2, 2], confidence=[1.0] * 3, calibrated=[1.0] * 3)
    assert ranking.confusion() == [[1, 0, 0], [0, 0, 2], [0, 0, 0]]


def test_at_0_labels_each_set_counts_once_however_many_numbers_of_labels_it_has(tmp_path, monkeypatch):
    values = {"probe/a/1_shot/top1": 0.5, "probe/a/2_shot/top1": 0.6, "probe/b/1_shot/top1": 0.7}
    values |= {"zero_shot/a/top1": 0.1, "zero_shot/b/top1": 0.4}
    figures = {"clip": {metric: {"value": value} for metric, value in values.items()}}
    drawn = {}
    monkeypatch.setattr(charts, "lines", lambda series, **_: drawn.update(series) or "")
    write_plots({"figures": figures, "image_gflops": {"clip": 1.0}}, tmp_path / "plots.html")
    assert drawn == {"clip": [(0.0, pytest.approx(25)), (1.0, pytest.approx(60)), (2.0, pytest.approx(60))]}
