"""Sets, evaluations and their comparison: real models, real shards and folders, a real training run."""

from __future__ import annotations

import csv
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import lightning
import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import accuracy_score

from curate.clip import Clip, load_clip
from curate.errors import ConfigError, InputError
from curate.shards import ShardWriter
from finetune.callback import EvaluationCallback, peak_memory
from finetune.config import AdapterConfig, DataConfig, EvaluateConfig, ZeroShotConfig
from finetune.embedding import find_pictures
from finetune.evaluate import Evaluation, Ranking, compare, evaluate_clip, metric_names
from finetune.examples import _confusion, changed_most, examples
from finetune.export import write_open_clip
from finetune.fit import fit
from finetune.module import CLIPModule
from finetune.nearest import draw_pairs, nearest
from finetune.predict import predict
from finetune.runs import checkpoint_of, load_module, load_trained_clip, model_fingerprint
from finetune.sets import dataset_sets, evaluation_sets, zero_shot_set
from tests.finetune import tiny
from tests.finetune.fitted import fit_tiny, labelled_folder


@pytest.fixture(scope="module")
def clip(architectures) -> Clip:
    torch.manual_seed(0)
    return load_clip(architectures["tiny-vit"], device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return labelled_folder(tmp_path_factory.mktemp("labelled"))


def run(clip: Clip, sets, batch_size: int = 8) -> Evaluation:
    return evaluate_clip(clip.model, clip.preprocess, clip.tokenizer, sets, device=clip.device, batch_size=batch_size)


def write_pairs(dataset: Path, pairs: list[tuple[bytes, str | None]], split: str = "val") -> Path:
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    with ShardWriter(dataset / "shards" / f"{split}-00000", schema, made_from="test") as shard:
        for number, (image, caption) in enumerate(pairs):
            shard.add({"key": f"{number:05d}", "caption": caption}, image, "png")
    return dataset


# --- sets ------------------------------------------------------------------------------------------------------------


def test_the_val_and_retain_splits_are_always_evaluated_where_they_exist(dataset, tmp_path):
    sets = evaluation_sets(EvaluateConfig(), dataset)
    assert [(s.name, len(s.images)) for s in sets.retrieval] == [("val", 8), ("retain", 8)]
    without = tiny.write_dataset(tmp_path / "without", val=0)
    assert [s.name for s in evaluation_sets(EvaluateConfig(), without).retrieval] == ["retain"]


def test_a_named_dataset_gives_its_test_split_or_else_everything(dataset, tmp_path):
    with_test = tiny.write_dataset(tmp_path / "with", train=16, val=0, retain=0)
    tiny.write_split(with_test, "test", 5, first=500)
    sets = evaluation_sets(EvaluateConfig(retrieval={"a": with_test, "b": dataset}))
    assert [(s.name, len(s.images)) for s in sets.retrieval] == [("a", 5), ("b", 56)]


def test_one_image_with_many_captions_and_one_caption_with_many_images_are_each_one_entry(tmp_path):
    red, green, blue = (tiny.picture(colour, "circle", 1) for colour in ("red", "green", "blue"))
    pairs = [(red, "a red thing"), (red, "warm"), (green, "a colour"), (blue, "A  COLOUR "), (red, "warm")]
    only = evaluation_sets(EvaluateConfig(), write_pairs(tmp_path, pairs)).retrieval[0]
    assert only.captions == ["a red thing", "warm", "a colour"]
    assert len(only.images) == 3
    assert only.pairs.tolist() == [[0, 0], [0, 1], [1, 2], [2, 2]]


def test_a_large_set_is_sampled_by_seed_in_the_order_of_the_shards(dataset):
    sets = [evaluation_sets(EvaluateConfig(retrieval={"all": dataset}, max_retrieval=20)) for _ in range(2)]
    keys = [[place[3] for place in s.retrieval[0].images.places] for s in sets]
    assert keys[0] == keys[1]
    assert len(keys[0]) == 20
    everything = [p[3] for p in evaluation_sets(EvaluateConfig(retrieval={"all": dataset})).retrieval[0].images.places]
    assert [key for key in everything if key in keys[0]] == keys[0]


def test_class_folders_give_classes_named_after_them(folder):
    found = zero_shot_set("colours", ZeroShotConfig(images=folder))
    assert found.classes == sorted(tiny.COLOURS)
    assert [path.parent.name for path in found.images.paths] == [found.classes[label] for label in found.labels]


def test_a_labels_csv_gives_the_classes_it_names(folder, tmp_path):
    rows = [("b.png", "palm_cockatoo"), ("sub/a.png", "toucan"), ("c.png", "palm_cockatoo")]
    (tmp_path / "sub").mkdir()
    for number, (name, _) in enumerate(rows):
        (tmp_path / name).write_bytes(tiny.picture("red", "circle", number))
    with (tmp_path / "labels.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("image", "label"), *rows])
    found = zero_shot_set("birds", ZeroShotConfig(images=tmp_path))
    assert (found.classes, found.labels) == (["palm cockatoo", "toucan"], [0, 1, 0])
    assert [path.name for path in found.images.paths] == ["b.png", "a.png", "c.png"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,lable\na.png,x\n", r"labels\.csv: no column 'label'\. Did you mean 'lable'\?"),
        ("image,label\na.png,x\nb.png,y\n", r"labels\.csv: line 3: .*b\.png: no such image"),
        ("image,label\na.png,\n", r"labels\.csv: line 2 has no label"),
        ("image,label\na.png,x\n", "1 class; expected at least two"),
    ],
)
def test_a_wrong_labels_csv_names_the_line(tmp_path, table, message):
    (tmp_path / "a.png").write_bytes(tiny.picture("red", "circle", 0))
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(InputError, match=message):
        zero_shot_set("x", ZeroShotConfig(images=tmp_path))


def test_mistakes_in_the_sets_are_errors_that_name_them(dataset, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate\.retrieval\.val: this name"):
        evaluation_sets(EvaluateConfig(retrieval={"val": dataset}))
    with pytest.raises(ConfigError, match="'a/b' has a slash"):
        evaluation_sets(EvaluateConfig(retrieval={"a/b": dataset}))
    with pytest.raises(InputError, match=r"evaluate\.zero_shot\.x\.images: .*nowhere: no such folder"):
        evaluation_sets(EvaluateConfig(zero_shot={"x": ZeroShotConfig(images=tmp_path / "nowhere")}))
    (tmp_path / "empty_class").mkdir()
    with pytest.raises(InputError, match=r"empty_class: no image in this class's folder"):
        evaluation_sets(EvaluateConfig(zero_shot={"x": ZeroShotConfig(images=tmp_path)}))
    with pytest.raises(InputError, match=r"no test split to evaluate on; splits there: train, val, retain"):
        dataset_sets(EvaluateConfig(), dataset, "test")


# --- evaluating ------------------------------------------------------------------------------------------------------


def test_figures_equal_those_of_plain_matrix_arithmetic(clip, dataset, folder):
    sets = evaluation_sets(EvaluateConfig(zero_shot={"colours": ZeroShotConfig(images=folder)}), dataset)
    values = run(clip, sets, batch_size=3).values()
    val = sets.retrieval[0]
    image = clip.embed_images([val.images.open(n) for n in range(8)]).double()
    score = image @ clip.embed_captions(val.captions).double().T
    true = torch.zeros(8, 8, dtype=torch.bool)
    true[tuple(val.pairs.T)] = True
    for name, matrix, match in (("image_to_text", score, true), ("text_to_image", score.T, true.T)):
        for k in (1, 5):
            hits = match.gather(1, matrix.topk(k).indices).any(1).double().mean()
            assert values[f"val/{name}/recall@{k}"] == pytest.approx(float(hits))
    zero_shot = sets.zero_shot[0]
    classes = clip.embed_captions([f"a photo of a {name}." for name in zero_shot.classes])
    images = clip.embed_images([zero_shot.images.open(n) for n in range(len(zero_shot.images))])
    predicted = (images @ classes.T).argmax(1)
    assert values["zero_shot/colours/top1"] == pytest.approx(accuracy_score(zero_shot.labels, predicted))


def test_metrics_are_named_in_one_order_of_words_and_trivial_ones_left_out(clip, dataset, folder):
    sets = evaluation_sets(EvaluateConfig(zero_shot={"colours": ZeroShotConfig(images=folder)}), dataset)
    names = list(run(clip, sets).values())
    assert names == metric_names(sets)
    assert names[:3] == [f"val/image_to_text/{m}" for m in ("recall@1", "recall@5", "median_rank")]  # of 8: no @10
    zero_shot = ("top1", "top5", "per_class_mean", "ece", "ece_fitted")
    assert names[-5:] == [f"zero_shot/colours/{m}" for m in zero_shot]


def test_calibration_is_that_of_the_probabilities_a_user_sees(clip, folder):
    clip.model.logit_scale.data.fill_(math.log(30))
    sets = evaluation_sets(EvaluateConfig(zero_shot={"colours": ZeroShotConfig(images=folder)}))
    ranking = run(clip, sets).rankings["zero_shot/colours"]
    queries = [f"a photo of a {name}." for name in sets.zero_shot[0].classes]
    seen = torch.cat([batch.probabilities for batch in predict(clip, find_pictures([folder]), queries, batch_size=3)])
    assert ranking.confidence == pytest.approx(seen.max(1).values.tolist(), abs=1e-5)
    assert ranking.predicted == seen.argmax(1).tolist()


def test_a_summary_has_value_interval_and_number_of_samples():
    figure = Evaluation("x", {"val/image_to_text": Ranking([1, 2, 1, 9], 20, [1.0, 0.5, 1.0, 0.1])}).summary()[
        "val/image_to_text/recall@1"
    ]
    assert (figure["value"], figure["n"]) == (0.5, 4)
    assert 0 <= figure["low"] < 0.5 < figure["high"] <= 1


def test_the_figures_do_not_depend_on_the_batch_size(clip, dataset):
    sets = evaluation_sets(EvaluateConfig(), dataset)
    assert run(clip, sets, 1).rankings == run(clip, sets, 7).rankings == run(clip, sets, 100).rankings


def test_modes_and_random_states_are_left_as_they_were(clip, dataset):
    sets = evaluation_sets(EvaluateConfig(), dataset)
    clip.model.train()
    clip.model.visual.eval()  # a locked tower
    modes = {name: module.training for name, module in clip.model.named_modules()}
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    greedy = replace(clip, preprocess=lambda image: clip.preprocess(image) + 0 * torch.rand(()))  # draws numbers
    run(greedy, sets)
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert {name: module.training for name, module in clip.model.named_modules()} == modes
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    clip.model.eval()


def test_modes_come_back_after_an_error_too(clip, tmp_path):
    sets = evaluation_sets(EvaluateConfig(), write_pairs(tmp_path, [(b"no image", "a"), (b"none", "b")]))
    clip.model.train()
    with pytest.raises(InputError, match=r"val-00000\.tar: sample 00000: not a readable image"):
        run(clip, sets)
    assert clip.model.training
    clip.model.eval()


def test_half_precision_weights_are_evaluated_as_they_are(clip, dataset, architectures):
    half = load_clip(architectures["tiny-vit"], device="cpu")
    half.model.to(torch.bfloat16)
    values = run(half, evaluation_sets(EvaluateConfig(), dataset)).values()
    assert all(math.isfinite(value) for value in values.values())


def test_an_evaluation_read_back_from_json_is_the_same(clip, dataset):
    evaluation = run(clip, evaluation_sets(EvaluateConfig(), dataset))
    read = Evaluation.from_json(evaluation.to_json())
    assert read.rankings == evaluation.rankings
    assert read.values() == evaluation.values()


# --- before and after ------------------------------------------------------------------------------------------------


def test_compare_gives_after_minus_before_with_a_paired_interval():
    before = Evaluation("x", {"val/image_to_text": Ranking([1, 2, 3, 4] * 10, 20, [0.5] * 40)})
    after = Evaluation("x", {"val/image_to_text": Ranking([1, 1, 3, 4] * 10, 20, [0.5] * 40)})
    compared = compare(before, after, {"steps": 3})
    delta = compared["delta"]["val/image_to_text/recall@1"]
    assert delta["value"] == pytest.approx(0.25)
    assert 0 < delta["low"] < 0.25 < delta["high"]
    assert compared["before"]["val/image_to_text/recall@1"]["value"] == 0.25
    assert compared["after"]["val/image_to_text/recall@1"]["value"] == 0.5
    assert compared["facts"] == {"steps": 3}


def test_comparing_evaluations_of_different_samples_is_an_error():
    with pytest.raises(InputError, match="different samples"):
        compare(Evaluation("x", {}), Evaluation("y", {}))


def test_the_fingerprint_changes_with_samples_and_templates(dataset, folder):
    def of(**config) -> str:
        return evaluation_sets(EvaluateConfig(**config), dataset).fingerprint

    assert of() == of()
    assert of(max_retrieval=5) != of()
    zero_shot = [{"c": ZeroShotConfig(images=folder, templates=[t])} for t in ("a {}.", "the {}.")]
    assert of(zero_shot=zero_shot[0]) != of(zero_shot=zero_shot[1])


def test_the_fingerprint_changes_with_the_truth_and_the_pictures(tmp_path):
    def of(name: str, said: list[str], pictures: list[bytes]) -> str:
        schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
        with ShardWriter(tmp_path / name / "shards" / "val-00000", schema, made_from="test") as shard:
            for number, (caption, picture) in enumerate(zip(said, pictures, strict=True)):
                shard.add({"key": str(number), "caption": caption}, picture, "png")
        return evaluation_sets(EvaluateConfig(), tmp_path / name).fingerprint

    pictures = [tiny.picture("red", "circle", number) for number in range(4)]
    first = of("first", ["a dog", "a cat", "a dog"], pictures[:3])
    assert of("again", ["a dog", "a cat", "a dog"], pictures[:3]) == first
    assert of("truth", ["a dog", "a cat", "a cat"], pictures[:3]) != first
    assert of("pictures", ["a dog", "a cat", "a dog"], [*pictures[:2], pictures[3] + b"."]) != first


def test_examples_tell_what_was_won_lost_and_confused(dataset, folder, architectures):
    sets = evaluation_sets(EvaluateConfig(zero_shot={"colours": ZeroShotConfig(images=folder)}), dataset)
    before, after = two_evaluations(sets, architectures["tiny-vit"])
    found = examples(sets, Evaluation.from_json(before.to_json()), after)
    assert len(json.dumps(found)) < 600_000
    task, was, now = sets.retrieval[0], *(each.rankings["val/text_to_image"].ranks for each in (before, after))
    told = next(each for each in found["retrieval"] if each["direction"] == "text_to_image")
    assert told["won"] == sum(old > 1 and new == 1 for old, new in zip(was, now, strict=True))
    assert told["lost"] == sum(old == 1 and new > 1 for old, new in zip(was, now, strict=True))
    assert told["won"] + told["lost"] > 0
    for kind, shown in told["examples"].items():
        for example in shown:
            query = task.captions.index(example["query"]["caption"])
            assert (example["before"]["rank"], example["after"]["rank"]) == (was[query], now[query])
            assert kind == "worst" or (now[query] == 1) is (kind == "won")
            for item in example["before"]["nearest"] + example["after"]["nearest"]:
                assert item["match"] == (item["caption"] == example["query"]["caption"])
                assert found["pictures"][item["picture"]].startswith("data:image/jpeg;base64,")
    told = next(each for each in found["retrieval"] if each["direction"] == "image_to_text")
    worst = [example["after"]["rank"] for example in told["examples"]["worst"]]
    assert worst == sorted(after.rankings["val/image_to_text"].ranks, reverse=True)[: len(worst)]


def test_the_mistakes_that_changed_most_are_counted_and_shown(dataset, folder, architectures):
    sets = evaluation_sets(EvaluateConfig(zero_shot={"colours": ZeroShotConfig(images=folder)}))
    before, after = two_evaluations(sets, architectures["tiny-vit"])
    (told,) = examples(sets, before, after)["classification"]
    old, new = (np.array(each.confusion()["zero_shot/colours"]) for each in (before, after))
    classes = sets.zero_shot[0].classes
    for change in told["changes"]:
        cell = classes.index(change["class"]), classes.index(change["taken_for"])
        assert (change["before"], change["after"], change["of"]) == (old[cell], new[cell], old[cell[0]].sum())
    by = [abs(change["after"] - change["before"]) for change in told["changes"]]
    difference = np.abs(new - old)
    np.fill_diagonal(difference, 0)
    assert by
    assert by == sorted(difference.ravel(), reverse=True)[: len(by)]
    assert told["confusion"]["after"] == (new / new.sum(1, keepdims=True)).tolist()
    assert told["worst"]
    assert all(mistake["after"]["class"] != mistake["class"] for mistake in told["worst"])


def two_evaluations(sets, architecture: str) -> tuple[Evaluation, Evaluation]:
    """Of two CLIPs with other random weights: what training could have changed, much of it is."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(run(load_clip(architecture, device="cpu"), sets))
    return found[0], found[1]


def test_what_is_kept_to_be_looked_at_is_what_the_embeddings_say(clip, dataset):
    sets = evaluation_sets(EvaluateConfig(), dataset)
    found, task = run(clip, sets), sets.retrieval[0]
    image_ND = clip.embed_images([task.images.open(number) for number in range(len(task.images))])
    score_NM = image_ND @ clip.embed_captions(task.captions).T
    for image, kept in found.nearest["val/image_to_text"].of().items():
        best = sorted(score_NM[image].tolist(), reverse=True)[: len(kept)]
        assert [score for _, score in kept] == pytest.approx(best, abs=1e-4)
        assert [float(score_NM[image, caption]) for caption, _ in kept] == pytest.approx(best, abs=1e-5)
    matrix = found.matrices["val"]
    expected = score_NM.T[matrix.captions][:, matrix.images]
    assert torch.allclose(torch.tensor(matrix.similarity), expected, atol=1e-4)
    assert set(zip(matrix.images, matrix.captions, strict=True)) <= {tuple(pair) for pair in task.pairs.tolist()}


def test_of_a_large_set_a_sample_is_kept_the_same_for_every_clip(monkeypatch):
    monkeypatch.setattr("finetune.nearest.WATCHED", 10)
    first, second = (nearest(torch.randn(50, 4), torch.randn(30, 4)) for _ in range(2))
    assert first.queries == second.queries == sorted(set(first.queries))
    assert len(first.queries) == len(first.candidates) == 10
    drawn = draw_pairs([(image, image % 40) for image in range(200)])
    assert len({image for image, _ in drawn}) == len({caption for _, caption in drawn}) == len(drawn) == 12


def test_of_many_classes_those_that_changed_are_shown_and_the_others_together():
    before = Counter({(number, number): 4 for number in range(30)})
    after = before + Counter({(3, 20): 3, (7, 8): 1})
    after[3, 3], after[7, 7] = 1, 3
    assert changed_most(before, after) == [(3, 20), (7, 8)]
    confusion = _confusion([f"class {number}" for number in range(30)], before, after)
    assert {"class 3", "class 20", "class 7", "class 8"} <= set(confusion["classes"])
    assert confusion["others"]
    row = confusion["after"][confusion["classes"].index("class 3")]
    assert row[confusion["classes"].index("class 20")] == 0.75
    assert all(sum(row) == pytest.approx(1) for row in confusion["before"] + confusion["after"])


def test_an_evaluation_of_an_earlier_version_has_nothing_to_look_at_and_is_no_mistake(clip, dataset):
    sets = evaluation_sets(EvaluateConfig(), dataset)
    evaluation = run(clip, sets)
    old = {key: value for key, value in json.loads(evaluation.to_json()).items() if key not in ("nearest", "matrices")}
    found = examples(sets, Evaluation.from_json(json.dumps(old | {"examples": {}})), evaluation)
    assert (found["retrieval"], found["matrices"], found["pictures"]) == ([], [], {})


# --- in a training run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, dataset, architectures):
    adapter = AdapterConfig(kind="lora", rank=2, dropout=0.5)
    return fit_tiny(tmp_path_factory.mktemp("fitted"), dataset, architectures["tiny-vit"], adapter)


def test_a_run_writes_before_after_and_what_changed(fitted):
    written = json.loads((fitted.out / "evaluation.json").read_text())
    assert list(written) == ["before", "after", "delta", "facts"]
    assert list(written["before"]) == list(written["after"]) == list(written["delta"])
    assert {"val/image_to_text/recall@1", "retain/text_to_image/recall@5", "zero_shot/colours/top1"} <= set(
        written["before"]
    )
    for metric, delta in written["delta"].items():
        assert delta["value"] == pytest.approx(written["after"][metric]["value"] - written["before"][metric]["value"])
    facts = written["facts"]
    assert (facts["steps"], facts["train_samples"], facts["adapter"]) == (6, 40, "lora")
    assert 0 < facts["trainable_parameters"] < facts["total_parameters"]
    assert facts["seconds"] >= 0
    assert facts["checkpoint"] == "best.ckpt"
    assert facts["samples_seen"] == 6 * 8
    assert facts["device"] == "CPU"
    assert 50e6 < facts["peak_memory_bytes"] <= peak_memory()
    assert facts["evaluation_seconds"] >= 0


def test_the_fingerprint_is_that_of_the_weights_that_are_exported(fitted, tmp_path):
    told = json.loads((fitted.out / "evaluation.json").read_text())["facts"]["fingerprint"]
    trained = load_trained_clip(checkpoint_of(fitted.out), "cpu")
    assert model_fingerprint(trained.model) == told
    (tmp_path / "exported").mkdir()
    write_open_clip(trained, tmp_path / "exported")
    assert model_fingerprint(load_clip(f"local-dir:{tmp_path / 'exported'}", device="cpu").model) == told
    with torch.no_grad():
        trained.model.logit_scale += 1e-3
    assert model_fingerprint(trained.model) != told


def test_before_is_the_untouched_model_and_after_the_best_checkpoint(fitted):
    callback = EvaluationCallback(fitted.evaluate, DataConfig(dataset=fitted.data.dataset), fitted.out)
    lightning.seed_everything(fitted.seed_everything, verbose=False)
    untouched = CLIPModule(fitted.model.clip, fitted.model.adapter)
    before = Evaluation.from_json((fitted.out / "before.json").read_text())
    assert callback.evaluate(untouched, torch.device("cpu")).rankings == before.rankings
    after = json.loads((fitted.out / "evaluation.json").read_text())["after"]
    best = callback.evaluate(load_module(checkpoint_of(fitted.out)), torch.device("cpu"))
    assert {metric: figure["value"] for metric, figure in after.items()} == best.values()


def test_each_validation_logs_the_metrics_by_their_names(fitted):
    with (fitted.out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = [row for row in rows if row["val/image_to_text/recall@1"]]
    assert len(logged) == 2  # after steps 3 and 6
    assert all(row["zero_shot/colours/top1"] and row["retain/text_to_image/median_rank"] for row in logged)


def test_a_run_that_evaluates_trains_the_same_weights_as_one_that_does_not(
    fitted, tmp_path, dataset, architectures, monkeypatch
):
    constant = Evaluation.from_json((fitted.out / "before.json").read_text())
    monkeypatch.setattr("finetune.callback.evaluate_clip", lambda *_, **__: constant)
    other = fit_tiny(tmp_path, dataset, architectures["tiny-vit"], fitted.model.adapter)
    weights = [load_module(checkpoint_of(config.out, "last")).state_dict() for config in (fitted, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_resumed_run_compares_with_the_before_of_its_start(tmp_path, dataset, architectures):
    config = fit_tiny(tmp_path, dataset, architectures["tiny-vit"], AdapterConfig(kind="lora", rank=2))
    written = {name: (config.out / name).read_bytes() for name in ("before.json", "evaluation.json", "examples.json")}
    # As if killed while the last evaluation was made.
    for name in ("finished.json", "evaluation.json", "examples.json"):
        (config.out / name).unlink()
    assert fit(config).resumed
    assert {name: (config.out / name).read_bytes() for name in written} == written

    for name in ("finished.json", "before.json"):
        (config.out / name).unlink()
    with pytest.raises(InputError, match=r"before\.json: gone, and the untouched model cannot be measured now"):
        fit(config)
    (config.out / "before.json").write_text(Evaluation("other", {}).to_json())
    with pytest.raises(InputError, match=r"before\.json: made on other evaluation samples than there are now"):
        fit(config)
