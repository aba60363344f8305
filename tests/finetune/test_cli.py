"""The command as users type it: real processes for what costs start-up time, `main` for the rest."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from curate.config import BuildConfig
from curate.keys import documented
from curate.options import in_words, read_config
from finetune.cli import HELP, main
from finetune.config import AdapterConfig, FitConfig
from finetune.tables import change_table, figures_table
from tests.disk import disk_that_ends_at
from tests.finetune import tiny
from tests.finetune.fitted import fit_tiny

HEAVY = ("torch", "lightning", "open_clip", "pyarrow", "pandas", "duckdb", "transformers", "PIL", "numpy")


@pytest.fixture(scope="module")
def config(tmp_path_factory, dataset, architectures):
    adapter = AdapterConfig(kind="lora", rank=2)
    return fit_tiny(tmp_path_factory.mktemp("fitted"), dataset, architectures["tiny-vit"], adapter)


def refused(capsys, *arguments: str) -> str:
    """The one line that a wrong command line gets; its exit status is 2."""
    assert main([str(argument) for argument in arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    return error.removeprefix("finetune: ").strip()


# --- start-up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["fit", "--model.adpter.kind", "lora"]])
def test_help_and_mistakes_load_nothing_heavy(arguments):
    code = f"""
import sys
from finetune.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
loaded = sorted(name for name in {HEAVY!r} if name in sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_help_takes_less_than_half_a_second_of_cpu():
    def seconds() -> float:
        import resource

        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "finetune", "--help"], check=True, capture_output=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # CPU time: other work on the machine does not count. Best of three: the first may compile bytecode.
    assert min(seconds() for _ in range(3)) < 0.5


def test_libraries_are_imported_uncollected_and_are_never_looked_through_again(architectures):
    code = f"""
import gc, sys
from finetune.cli import main
from finetune.libraries import import_libraries
during = []
gc.callbacks.append(lambda phase, _: during.append("torch" in sys.modules and "open_clip" not in sys.modules))
assert main(["summary", "--model.clip.name", {architectures["tiny-vit"]!r}, "--model.clip.pretrained", "null"]) == 0
frozen = gc.get_freeze_count()
assert frozen > 100_000, frozen
assert not any(during)
assert gc.isenabled()
import_libraries("torch", "open_clip")
assert gc.get_freeze_count() == frozen
try:
    import_libraries("no_such_library")
except ModuleNotFoundError:
    assert gc.isenabled()
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", HELP)
def test_each_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"\n  finetune {command} --" in capsys.readouterr().out


def test_the_help_of_fit_explains_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate: about 1e-4 for LoRA, 1e-5 for full." in text
    assert "Rank of the LoRA update; of each tower its own: {image: 16, text: 8}. (type: " in text
    assert "<class 'finetune" not in text


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {adpter: {kind: lora}}", "1: no key 'model.adpter'. Did you mean 'model.adapter'?"),
        ("lr: 1e-4", "1: no key 'lr'. Did you mean 'model.optimizer.lr'?"),
        (
            "evaluate: {zero_shot: {a: {image: x}}}",
            "1: no key 'evaluate.zero_shot.a.image'. Did you mean 'evaluate.zero_shot.a.images'?",
        ),
        ("model: 3", "1: model: expected keys (clip, adapter, loss, optimizer, compute), got 3"),
        ("- a", "1: the file: expected keys (out, "),
        ("a: [1", "1: not YAML ("),
    ],
)
def test_a_wrong_yaml_file_is_one_line_with_the_nearest_key(content, message, tmp_path, capsys):
    path = tmp_path / "domain.yaml"
    path.write_text(content)
    assert refused(capsys, "fit", "--config", path).startswith(f"{path}:{message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fit --model.adpter.kind lora", "no key 'model.adpter.kind'. Did you mean 'model.adapter.kind'?"),
        ("fit --model.adapter.kin lora", "no key 'model.adapter.kin'. Did you mean 'model.adapter.kind'?"),
        ("fit --model.optimizer.lr abc", "model.optimizer.lr: expected a number, got 'abc'"),
        ("fit --model.optimizer.lr -1", "model.optimizer.lr: expected above 0, got -1.0"),
        ("fit --trainer.max_epochs x", "trainer.max_epochs: expected a whole number or null, got 'x'"),
        (
            "fit --model.adapter.kind lorra",
            "model.adapter.kind: expected one of full, lora, layernorm, bias, last, probe, got 'lorra'",
        ),
        ("fit --out", "--out: expected one argument"),
        ("fit --lock-image", "lock_image: open_clip_train's; here model.adapter.lock: [image]"),
        (
            "fit --model ViT-B-32",
            "model: has keys of its own: --model.clip.name, --model.clip.pretrained, --model.adapter.kind, …",
        ),
        (
            "fit --config nowhere.yaml",
            "--config nowhere.yaml: no such file, and no preset; presets: bias, demo_pretrain, few, full, large, last, "
            "layernorm, lit, lora, medium, probe, retain, scratch.",
        ),
        ("fitt", "no command 'fitt'. Did you mean 'fit'?"),
        ("", "a command is needed; see --help"),
        ("export --run runs/a", "--out is needed; see --help"),
        ("evaluate --clip.nam x", "clip: no key 'nam'. Did you mean 'name'?"),
        ("evaluate", "evaluate: nothing to evaluate on; give --dataset, --evaluate.retrieval or --evaluate.zero_shot"),
        (
            "evaluate --models m --evaluate.max_retrieval 0",
            "evaluate.max_retrieval: expected at least 2, got 0",
        ),
        ("predict --images a.jpg --text cat", "--model is needed; see --help"),
        ("predict --model m --text cat", "predict: nothing to look at; give --images, or --dataset to search in"),
        (
            "predict --model m --images a.jpg",
            "predict: give either --text to choose among, or --embeddings FILE.parquet",
        ),
        ("predict --model m --images a.jpg --text cat cat", "text: 'cat' is there twice"),
        ("predict --model m --dataset d", "dataset: search in it either by --text, or by --images"),
        (
            "predict --model m --images a.jpg --embeddings e.parquet --out o.csv",
            "embeddings: they are written alone; leave out --dataset and --out (--images takes a dataset)",
        ),
        (
            "predict --model m --images a.jpg --embeddings e.npy",
            "embeddings: expected a file that ends in .parquet, got e.npy",
        ),
        (
            "predict --model m --images a.jpg --text cat --out o.html",
            "out: expected a file that ends in .csv or .parquet, got o.html",
        ),
        (
            "predict --model m --dataset d --text cat --out o.csv",
            "out: expected a file that ends in .html, got o.csv",
        ),
        ("predict --model m --images a.jpg --text cat --top 0", "top: expected at least 1, got 0"),
        (
            "predict --model m --images a.jpg --text cat --templates photo",
            "templates: 'photo' needs exactly one {}, where the text goes; or `imagenet` alone",
        ),
        ("predict --model m --images nowhere.jpg --text cat", "nowhere.jpg: no such file or folder"),
        ("test --run nowhere", "nowhere: no config.yaml; expected the folder of a run (`out` of `finetune fit`)"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(arguments, message, capsys):
    assert refused(capsys, *arguments.split()) == message


@pytest.mark.parametrize(
    "arguments",
    [
        "fit --data.dataset DATASET --out {}/run",
        "export --run runs/a --out {}/clip",
        "evaluate --run runs/a --out {}/table.md",
        "evaluate --run runs/a --plot {}/plots.html",
        "predict --model m --images a.jpg --text cat --out {}/a.csv",
        "predict --model m --images a.jpg --embeddings {}/a/b.parquet",
    ],
)
@pytest.mark.parametrize("kind", ["file", "locked"])
def test_where_nothing_can_be_written_is_told_before_the_work(arguments, kind, dataset, tmp_path, capsys, monkeypatch):
    """A locked folder is one to whoever is not root."""
    runs = tmp_path / "runs" / "a"
    runs.mkdir(parents=True)
    (runs / "config.yaml").write_text("{}")
    monkeypatch.setattr("finetune.export.checkpoint_of", lambda *_: tmp_path / "best.ckpt")
    place = tmp_path / "place"
    if kind == "file":
        place.touch()
        expected = "is a file; expected a folder"
    else:
        place.mkdir(0o500)
        allows = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and allows(path, mode))
        expected = "cannot be written to; give another folder, or the right to write there"
    named = {"{}": place, "runs/a": runs, "DATASET": dataset}
    told = refused(
        capsys, *re.sub("|".join(map(re.escape, named)), lambda word: str(named[word[0]]), arguments).split()
    )
    key = re.search(r"--(out|plot|embeddings)", arguments)[1]
    assert re.fullmatch(rf"(--)?{key}: {re.escape(str(place))} {expected}", told)


def test_a_full_disk_is_one_line_and_the_same_command_continues(config, tmp_path, capsys):
    """In the middle of a checkpoint."""
    again = ["fit", "--config", str(config.out / "config.yaml"), "--out", str(tmp_path / "run")]
    with disk_that_ends_at(100_000):
        assert main(again) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"finetune: File too large \(.*\.ckpt.*\); what is done is kept, the same command continues", told
    )
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert main(again) == 0


@pytest.mark.parametrize("config", [FitConfig, BuildConfig])
def test_the_keys_named_for_the_flags_of_others_are_there_and_the_flags_are_not(config):
    known = {name for name, _ in documented(config)}
    named = {key for told in config.not_here.values() for key in re.findall(r"\b[a-z]+\.[a-z_.]*[a-z]", told)}
    assert {key for key in named if not key.startswith("report.html")} <= known
    assert not known & set(config.not_here)


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules["finetune.cli"].COMMANDS, "report", interrupt)
    assert main(["report", "--run", "x"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_reader_that_has_seen_enough_ends_it_without_a_word(size, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setitem(sys.modules["finetune.cli"].COMMANDS, "report", lambda _: stdout.write("x" * size))
        assert main(["report", "--run", "x"]) == 128 + 13
    assert capsys.readouterr().err == ""


def test_another_broken_pipe_is_no_reader_that_has_gone(monkeypatch):
    def broken(_):
        raise BrokenPipeError

    monkeypatch.setitem(sys.modules["finetune.cli"].COMMANDS, "report", broken)
    with pytest.raises(BrokenPipeError):
        main(["report", "--run", "x"])


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Path, "a path"),
        (int | None, "a whole number or null"),
        (list[str], "a list, each text"),
        (tuple[float, float], "a list of 2: a number, a number"),
        (dict[str, int], "a mapping of names to a whole number"),
        (list[dict[str, Any]], "a list, each a mapping"),
    ],
)
def test_types_are_named_in_words(hint, words):
    assert in_words(hint) == words


@pytest.mark.parametrize(
    ("metric", "low", "value", "high", "colour"),
    [
        ("val/image_to_text/recall@1", 0.01, 0.1, 0.2, "green"),
        ("val/image_to_text/recall@1", -0.2, -0.1, -0.01, "red"),
        ("val/image_to_text/recall@1", -0.1, 0.1, 0.2, "default"),
        ("val/image_to_text/median_rank", -9, -5, -2, "green"),
        ("val/image_to_text/median_rank", 2, 5, 9, "red"),
    ],
)
def test_a_change_is_coloured_where_its_interval_excludes_0_and_lower_ranks_are_better(
    metric, low, value, high, colour
):
    figure = {"value": 1.0, "low": 1.0, "high": 1.0, "n": 4}
    delta = {metric: {"value": value, "low": low, "high": high}}
    table = change_table({"before": {metric: figure}, "after": {metric: figure}, "delta": delta})
    assert next(iter(table.columns[-1].cells)).startswith(f"[{colour}]")


def test_in_a_narrow_terminal_figures_are_folded_and_not_cut():
    metric, figure = "retain/image_to_text/recall@10", {"value": 0.915, "low": 0.899, "high": 0.93, "n": 12_345}
    tables = [
        change_table({"before": {metric: figure}, "after": {metric: figure}, "delta": {metric: figure}}),
        figures_table({"before": {metric: figure}, "runs/a/long/name": {metric: figure}, "c": {metric: figure}}),
    ]
    for table in tables:
        console = Console(width=76, record=True, file=io.StringIO())
        console.print(table)
        shown = console.export_text()
        assert "\u2026" not in shown  # the ellipsis
        assert shown.count("91.5 %") == 3
        assert shown.count("12,345") == 1


def test_brackets_in_the_name_of_a_clip_stay():
    figure = {"value": 0.915, "low": 0.899, "high": 0.93, "n": 4}
    console = Console(width=200, record=True, file=io.StringIO())
    names = ("runs/[lora]", "runs/[/full]")
    console.print(figures_table({name: {"zero_shot/[red]/top1": figure} for name in names}))
    shown = console.export_text()
    assert all(name in shown for name in (*names, "zero_shot/[red]/top1"))


# --- configuration ---------------------------------------------------------------------------------------------------


def test_flags_after_a_file_override_it_and_paths_start_at_the_working_directory(tmp_path, capsys, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text(
        "{out: runs/a, data: {dataset: my/data, batch_size: 8}, model: {optimizer: {lr: 1e-3}}}"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "sub/a.yaml", "--model.optimizer.lr", "3e-5", "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    shown = yaml.safe_load(printed)
    assert (shown["out"], shown["data"]["dataset"], shown["data"]["batch_size"]) == ("runs/a", "my/data", 8)
    assert shown["model"]["optimizer"]["lr"] == 3e-5
    # What is printed is a whole configuration again.
    (tmp_path / "printed.yaml").write_text(printed)
    assert read_config(tmp_path / "printed.yaml", FitConfig).model.optimizer.lr == 3e-5


def test_the_configuration_of_a_run_reads_back_as_it_was(config):
    assert read_config(config.out / "config.yaml", FitConfig) == config


# --- the commands ----------------------------------------------------------------------------------------------------


def test_fit_prints_before_and_after_and_does_nothing_the_second_time(config, capsys):
    started = time.monotonic()
    assert main(["fit", "--config", str(config.out / "config.yaml")]) == 0
    out, error = capsys.readouterr()
    assert "val/image_to_text/recall@1" in out
    assert re.search(r"│ +before │ +after │ +change │|before.*after.*change", out)
    assert f"report: {config.out / 'report.html'}" in out
    assert (config.out / "report.html").is_file()
    assert "finished already" in error
    assert time.monotonic() - started < 60


def test_a_run_in_which_nothing_was_measured_says_so(config, tmp_path, capsys):
    bare = tiny.write_dataset(tmp_path / "bare", val=0, retain=0)
    clip = f"--model.clip.name {config.model.clip.name} --model.clip.pretrained null --trainer.accelerator cpu"
    data = f"--data.dataset {bare} --data.batch_size 5 --data.num_workers 0"
    assert main(["fit", *f"--out {tmp_path / 'run'} {clip} {data} --trainer.max_steps 1".split()]) == 0
    assert "nothing was measured: there is no val split, and `evaluate` names no set" in capsys.readouterr().out


def test_validate_prints_the_figures_that_fit_found(config, capsys):
    assert main(["validate", "--run", str(config.out), "--json", "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out)[str(config.out)]
    expected = json.loads((config.out / "evaluation.json").read_text())["after"]
    assert figures.keys() == expected.keys()
    for metric, figure in expected.items():
        assert figures[metric] == pytest.approx(figure, abs=1e-5)  # merged weights round differently


def test_test_needs_a_test_split(config, capsys):
    assert "no test split to evaluate on; splits there: train, val, retain" in refused(
        capsys, "test", "--run", config.out
    )


def test_evaluate_puts_several_clips_in_one_table(config, capsys):
    clip, run = config.model.clip.name, str(config.out)
    arguments = [
        "evaluate",
        "--clip.name",
        clip,
        "--clip.pretrained",
        "null",
        "--run",
        run,
        run,
        "--checkpoint",
        "last",
    ]
    sets = ["--evaluate.retrieval.all", str(config.data.dataset), "--device", "cpu"]
    assert main([*arguments, *sets, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures) == [clip, f"{run}/checkpoints/last.ckpt"]  # the same run twice is one column
    assert all(list(of) == list(figures[clip]) for of in figures.values())
    assert main([*arguments, *sets]) == 0
    table = capsys.readouterr().out
    assert "all/text_to_image/recall@10" in table
    assert "tiny-vit.json" in table


@pytest.mark.parametrize("flag", ["--run", "--models"])
def test_evaluate_takes_the_sets_of_the_run_where_none_is_given(flag, config, capsys):
    assert main(["evaluate", flag, str(config.out), "--split", "val", "--json", "--device", "cpu"]) == 0
    figures = next(iter(json.loads(capsys.readouterr().out).values()))
    assert {"val/image_to_text/recall@1", "zero_shot/colours/top1"} <= set(figures)


def test_export_then_predict_gives_the_same_probabilities_as_the_run(config, tmp_path, capsys):
    assert main(["export", "--run", str(config.out), "--out", str(tmp_path / "clip")]) == 0
    assert f"local-dir:{tmp_path / 'clip'}" in capsys.readouterr().out
    images = str(config.evaluate.zero_shot["colours"].images)
    rest = ["--images", images, "--text", "red", "a blue circle", "--device", "cpu"]
    assert main(["predict", "--model", str(config.out), *rest, "--csv"]) == 0
    of_run = {(row["image"], row["text"]): row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert main(["predict", "--model", str(tmp_path / "clip"), *rest, "--json"]) == 0
    of_export = json.loads(capsys.readouterr().out)
    assert len(of_run) == 2 * len(of_export) == 32
    for row in of_export:
        for text, probability in row["probabilities"].items():
            assert float(of_run[row["image"], text]["probability"]) == pytest.approx(probability, abs=1e-4)
    assert main(["predict", "--model", str(config.out), *rest, "--top", "1"]) == 0
    assert re.search(r"\d+\.\d% +(red|a blue circle)", capsys.readouterr().out)


def test_predict_writes_searches_and_tells_what_it_could_not_read(config, tmp_path, capsys):
    images = config.evaluate.zero_shot["colours"].images
    model = ["predict", "--model", str(config.out), "--device", "cpu"]
    (tmp_path / "broken.jpg").write_text("x")
    both = ["--images", str(images), str(tmp_path / "broken.jpg")]
    assert main([*model, *both, "--text", "red", "blue", "--out", str(tmp_path / "found.csv")]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert f"16 images → {tmp_path / 'found.csv'}" in told.err
    assert "finetune: 1 of 17 images could not be read, each named above; the result is of the others" in told.err
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 1 + 16 * 2
    assert main([*model, "--images", str(images), "--embeddings", str(tmp_path / "e.parquet")]) == 0
    assert pq.read_metadata(tmp_path / "e.parquet").num_rows == 16
    search = [*model, "--dataset", str(config.data.dataset)]
    page = tmp_path / "found.html"
    assert main([*search, "--text", "red", "--templates", "a {} circle", "--best", "4", "--out", str(page)]) == 0
    assert page.read_text(encoding="utf-8").count("<figure") == 4
    query = str(images / "red" / "0.png")
    capsys.readouterr()
    assert main([*search, "--images", query, "--best", "2", "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{query},1,")
    assert main([*search, "--text", "red", "--best", "2", "--json"]) == 0
    assert [row["rank"] for row in json.loads(capsys.readouterr().out)] == [1, 2]
    assert main([*search, "--text", "red", "--best", "2"]) == 0
    assert "similarity" in capsys.readouterr().out


def test_a_table_of_a_large_folder_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    for number in range(1_001):
        (tmp_path / f"{number}.jpg").touch()
    refusal = refused(capsys, "predict", "--model", "nowhere", "--images", str(tmp_path), "--text", "a", "b")
    assert refusal == "out: 1,001 images are too many for a table; give FILE.csv or FILE.parquet"


def test_a_page_of_too_many_pictures_is_refused_before_the_model_is_loaded(dataset, tmp_path, capsys):
    """56 images are searched; queries are texts or images."""
    (tmp_path / "queries").mkdir()
    for number in range(27):
        (tmp_path / "queries" / f"{number}.jpg").touch()
    search = ["predict", "--model", "nowhere", "--dataset", str(dataset), "--best", "100", "--out", "found.html"]
    for queries in (["--images", str(tmp_path / "queries")], ["--text", *map(str, range(27))]):
        assert refused(capsys, *search, *queries).startswith("best: more than 1,500 pictures on a page; give fewer")


def test_a_checkpoint_that_is_not_there_is_told(tmp_path, capsys):
    path = tmp_path / "besst.ckpt"
    (tmp_path / "a.jpg").touch()
    refusal = refused(capsys, "predict", "--model", str(path), "--images", str(tmp_path), "--text", "a", "b")
    assert refusal == f"{path}: no such file; expected a checkpoint, or the folder of a run"


def test_report_writes_the_report_again(config, capsys):
    (config.out / "report.html").unlink(missing_ok=True)
    assert main(["report", "--run", str(config.out)]) == 0
    assert capsys.readouterr().out.strip() == str(config.out / "report.html")
    assert (config.out / "report.html").is_file()


def test_python_m_finetune_has_the_exit_status_of_the_error():
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "fit", "--config", "nowhere.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("finetune: --config nowhere.yaml: no such file, and no preset; presets: ")
