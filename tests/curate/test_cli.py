import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from curate import cli
from curate.cli import COMMANDS, main
from curate.config import BuildConfig
from curate.options import read_config

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "curate").glob("*.yaml"))
HEAVY = ("torch", "duckdb", "pyarrow", "aiohttp", "numpy", "pandas", "cv2", "lightning", "open_clip")


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_answers_without_a_heavy_import(command: str) -> None:
    program = "import sys; from curate.cli import main\n"
    program += f"try: main({[*command.split(), '--help']!r})\nexcept SystemExit: pass\n"
    program += f"loaded = [name for name in {HEAVY!r} if name in sys.modules]; sys.exit(str(loaded) if loaded else 0)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "usage: " in ran.stdout


def test_help_takes_under_half_a_second_of_cpu() -> None:
    def cpu_s() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "curate.cli", "--help"], capture_output=True, check=True, timeout=60)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(cpu_s() for _ in range(3)) < 0.5


def test_a_misspelt_key_is_named_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(capsys, "build", "--urls", "x.txt", "--fetch.conections", "3") == (
        2,
        "curate: no key 'fetch.conections'. Did you mean 'fetch.connections'?\n",
    )


def test_a_misspelt_key_in_a_file_is_named_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("fetch:\n  retires: 3\n")
    status, message = failing(capsys, "build", "--config", str(recipe), "--urls", "x.txt")
    assert (status, message) == (2, f"curate: {recipe}:2: no key 'fetch.retires'. Did you mean 'fetch.retries'?\n")


def test_a_value_of_another_kind_says_what_was_expected(capsys: pytest.CaptureFixture[str]) -> None:
    status, message = failing(capsys, "build", "--urls", "x.txt", "--pack.val", "many")
    assert (status, message) == (2, "curate: pack.val: expected a number, got 'many'\n")


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("{name: b, wher: width > 10}", "filters[1] 'b': 'wher' is not a kind of filter. Did you mean 'where'?"),
        ("{where: width > 10}", "filters[1]: needs a name, such as 'name: caption_length'"),
        ("{name: a, where: aspect < 3}", "filters: two steps are named 'a'; the ledger tells them apart by name"),
    ],
)
def test_a_filter_that_is_none_is_told_with_its_file_and_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, step: str, says: str
) -> None:
    config = tmp_path / "domain.yaml"
    config.write_text(f"out: {tmp_path / 'out'}\nfilters:\n  - {{name: a, where: width > 10}}\n  - {step}\n")
    (tmp_path / "urls.txt").write_text("http://127.0.0.1/1.jpg\n")
    status, message = failing(capsys, "build", "--config", str(config), "--urls", str(tmp_path / "urls.txt"))
    line = 2 if says.startswith("filters: ") else 4
    assert (status, message) == (2, f"curate: {config}:{line}: {says}\n")


def test_a_signal_that_is_wrong_is_told_with_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "domain.yaml"
    signals = [f"    - {{name: {name}, function: 'my:{name}', columns: {{{name}: DOUBL}}}}\n" for name in "ab"]
    config.write_text("measure:\n  signals:\n" + "".join(signals))
    status, message = failing(capsys, "build", "--config", str(config), "--urls", "x.txt")
    assert status == 2
    assert message.startswith(f"curate: {config}:3: measure.signals[0] 'a': column 'a': type 'DOUBL' is none of")


def test_a_build_needs_a_list(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, message = failing(capsys, "build", "--out", str(tmp_path / "out"))
    assert status == 2
    assert message.startswith("curate: --urls: needs a list of URLs")
    assert not (tmp_path / "out").exists()


def test_a_list_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, message = failing(capsys, "build", "--urls", str(tmp_path / "no.parquet"), "--out", str(tmp_path / "out"))
    assert status == 2
    assert message.count("\n") == 1
    assert "no.parquet" in message


def test_a_stage_says_which_one_must_come_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, message = failing(capsys, "pack", "--out", str(tmp_path))
    assert status == 2
    assert "run `curate select`" in message


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert failing(capsys, "build")[0] == 130


QUERY = """
import os, signal, sys, threading
import duckdb
from curate import cli

def query(_):
    threading.Timer(0.3, os.kill, (os.getpid(), int(sys.argv[1]))).start()
    with duckdb.connect() as db:
        db.execute(sys.argv[2])

cli._run, cli.GRACE_S = query, 1.0
cli.main(["build"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "query", ["sum(a.range * b.range) FROM range(1000000) a, range(1000000) b", "sum(range) FROM range(9000000000000)"]
)
def test_a_signal_in_a_query_of_the_database_is_one_line_soon(number: int, query: str) -> None:
    words = [sys.executable, "-c", QUERY, str(int(number)), f"SELECT {query}"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=110, check=False)
    assert (ran.returncode, ran.stderr) == (128 + number, cli.INTERRUPTED)


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = failing(capsys)
    assert status == 2
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        ("[{name: fit, top: {by: clip_score, fraction: 0.3}}]", "filters 'fit': needs clip_score"),
        ("[{name: fit, where: CLIP_SCORE > 0.2}]", "filters 'fit': needs clip_score"),
        ("[{name: near, dedup: {by: sha256, keep: clip_score DESC}}]", "filters 'near': needs clip_score"),
        ("[{name: topic, relevance: {prompts: [x], keep: 0.3}}]", "filters 'topic': needs embeddings"),
        ("[{name: leak, decontaminate: {against: x, similarity: 0.9}}]", "filters 'leak': needs embeddings"),
    ],
)
def test_a_filter_that_needs_a_clip_is_told_before_any_work(
    filters: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    status, message = failing(capsys, "build", "--urls", "nowhere.txt", "--out", str(out), "--filters", filters)
    assert (status, message.count("\n")) == (2, 1)
    assert message.startswith(f"curate: {says}")
    assert "set measure.clip.name" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("decontaminate: {against: nothere/}", "filters 'odd': nothere/: no such file or folder"),
        ("decontaminate: {against: [.]}", ".: no image there"),
        ("balance: {concepts: nothere.txt}", "filters 'odd': concepts: nothere.txt: no such file"),
    ],
)
def test_a_path_in_a_filter_that_leads_nowhere_is_told_before_any_work(
    step: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"urls: l.txt\nout: out\nfilters: [{{name: odd, {step}}}]\n")
    (tmp_path / "l.txt").write_text("http://a.test/1.jpg\n")
    status, message = failing(capsys, "build", "--config", "recipe.yaml")
    assert (status, message.count("\n")) == (2, 1)
    assert says in message
    assert not (tmp_path / "out").exists()
    main(["plan", "--config", "recipe.yaml"])  # `curate concepts` may come after it


def test_a_list_of_which_nothing_can_be_fetched_names_the_filters(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "l.txt").write_text("nonsense\nhttp://a.test/1\nhttp://a.test/2\nhttp://b.test/\n")
    filters = "[{name: not_a, where: url_host != 'a.test'}, {name: words, where: caption_words > 0}]"
    words = ["plan", "--urls", str(tmp_path / "l.txt"), "--out", str(tmp_path / "out"), "--filters", filters]
    status, message = failing(capsys, *words)
    assert status == 3
    assert message.endswith("of 4 rows none can be fetched: where 'not_a' 2, bad_url 1, where 'words' 1\n")


def test_a_folder_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "out" / ".lock").mkdir(parents=True)
    status, message = failing(capsys, "build", "--urls", "x.txt", "--out", str(tmp_path / "out"))
    assert (status, message.count("\n")) == (2, 1)
    assert f"--out {tmp_path / 'out'}: cannot be written to" in message


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_read(path: Path) -> None:
    from curate.filters import parse_steps

    config = read_config(path, BuildConfig)
    assert len(parse_steps(config.filters)) == len(config.filters) > 0


def test_the_default_recipe_rules_when_no_config_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("filters: []")
    arguments = cli._with_recipe(["build", "--urls", "x"])
    assert arguments[1] == "--config"
    assert yaml.safe_load(Path(arguments[2]).read_text())["filters"]
    (tmp_path / "default").mkdir()
    assert cli._with_recipe(["build", "--urls", "x"]) == arguments
    assert cli._with_recipe(["build", "--config", "mine.yaml"]) == ["build", "--config", "mine.yaml"]


@pytest.mark.parametrize("written", [["--config", "{}"], ["--config={}"]])
def test_a_preset_goes_by_its_name_and_a_file_of_that_name_before_it(
    written: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = cli._with_recipe(["build", "--out", "x", *(word.format("wit") for word in written), "--seed", "1"])
    path = words[-3].removeprefix("--config=")
    assert Path(path).name == "wit.yaml"
    assert "Radford et al. 2021" in Path(path).read_text()
    assert words == ["build", "--out", "x", *(word.format(path) for word in written), "--seed", "1"]
    (tmp_path / "wit").write_text("filters: []")
    given = ["build", *(word.format("wit") for word in written)]
    assert cli._with_recipe(given) == given


def test_a_config_that_is_neither_file_nor_preset_is_told_with_the_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ", ".join(path.stem for path in RECIPES)
    told = f"curate: --config metclip: no such file, and no preset; presets: {names}. Did you mean 'metaclip'?\n"
    assert failing(capsys, "build", "--config", "metclip", "--urls", "x") == (2, told)


def test_a_section_that_may_be_absent_can_be_set_by_dotted_flags() -> None:
    command = [
        sys.executable,
        "-m",
        "curate.cli",
        "build",
        "--urls",
        "x",
        "--measure.clip.name",
        "ViT-B/32",
        "--print_config",
    ]
    started = time.monotonic()
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert yaml.safe_load(printed)["measure"]["clip"]["name"] == "ViT-B/32", f"after {time.monotonic() - started:.1f} s"
