"""What lies beside the page: the manifest, and the table at the end of a build."""

from __future__ import annotations

import hashlib
import io
import json
import resource
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from curate import report
from curate.config import ReportConfig
from curate.errors import InputError
from curate.files import write_parquet
from tests.curate.pages import Page
from tests.curate.report_folder import CONFIG, FILTERS, Row, example_rows, jpeg, write_folder

WRITTEN = ("report.html", "README.md", "report.json", "croissant.json", "manifest.json")


def make(out: Path, rows: list[Row], config: dict | None = None, **shown) -> Page:
    write_folder(out, rows)
    report.run(out, ReportConfig(**shown), config or CONFIG, seed=3)
    return Page((out / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dataset")
    make(out, example_rows(), title="Handwritten digits")
    return out


@pytest.fixture(scope="module")
def figures(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


# --- manifest --------------------------------------------------------------------------------------------------------


def test_the_manifest_has_every_shards_sha256_size_and_samples(folder, figures):
    told = json.loads((folder / "manifest.json").read_text())
    there = {f"shards/{path.name}" for path in (folder / "shards").iterdir()} | {"ledger.parquet"}
    assert set(told["files"]) == there
    for name, facts in told["files"].items():
        content = (folder / name).read_bytes()
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
        assert facts["bytes"] == len(content)
    assert sum(f["samples"] for name, f in told["files"].items() if name.endswith(".tar")) == figures["kept"]
    assert told["files"]["ledger.parquet"]["samples"] == figures["rows"]


def test_the_manifest_tells_versions_config_and_seed_but_not_where_it_was_made(folder):
    text = (folder / "manifest.json").read_text()
    told = json.loads(text)
    assert {"cliptailor", "python", "pyarrow", "duckdb", "open_clip_torch"} <= set(told["versions"])
    assert told["seed"] == 3
    assert told["config"]["filters"] == FILTERS
    assert "out" not in told["config"]
    assert str(folder) not in text


def test_without_a_clip_the_manifest_names_no_version_of_one(tmp_path):
    make(tmp_path, [Row("a" * 20)], {"filters": [], "measure": {"clip": None}})
    assert "torch" not in json.loads((tmp_path / "manifest.json").read_text())["versions"]


def test_the_manifest_is_written_last(folder):
    times = {name: (folder / name).stat().st_mtime_ns for name in WRITTEN}
    assert max(times, key=lambda name: (times[name], name == "manifest.json")) == "manifest.json"


def test_the_fingerprint_follows_the_content(tmp_path):
    rows = [Row("a" * 20, caption=caption) for caption in ("one", "two")]
    made = []
    for number, row in enumerate(rows):
        make(tmp_path / str(number), [row])
        made.append(json.loads((tmp_path / str(number) / "manifest.json").read_text())["fingerprint"])
    assert made[0] != made[1]


# --- the table at the end --------------------------------------------------------------------------------------------


def test_the_summary_table_accounts_for_every_row(folder, figures):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.summary_table(folder))
    text = console.export_text()
    assert "258 rows in = 120 kept + 138 dropped" in text
    for step in figures["funnel"]:
        assert step["step"] in text
    for split in ("train", "val", "test", "retain"):
        assert split in text


def test_what_a_step_moved_to_retain_is_said_at_that_step(tmp_path):
    rows = [Row(f"{n:020x}", split="retain", step="on_topic", value="0.1") for n in range(1322)]
    page = make(tmp_path, [Row("f" * 20), *rows])
    funnel = json.loads((tmp_path / "report.json").read_text())["funnel"]
    assert {step["step"]: step["retained"] for step in funnel if step["retained"]} == {"on_topic": 1322}
    assert [(step["dropped"], step["left"]) for step in funnel if step["step"] == "on_topic"] == [(0, 1323)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.summary_table(tmp_path))
    (line,) = [line for line in console.export_text().splitlines() if "on_topic" in line]
    assert "→ retain 1,322" in line
    assert any("→\xa0retain\xa01,322" in cell for row in page.rows for cell in row)
    assert "| 0 → retain 1,322 |" in (tmp_path / "README.md").read_text()


def test_a_report_of_more_shards_than_a_process_may_hold_open(tmp_path, monkeypatch):
    rows = [Row(f"{n:020x}", image=jpeg(n, 40, 30), split="train") for n in range(3)]
    write_folder(tmp_path, rows)
    empty = pq.read_table(tmp_path / "raw" / "00000.parquet").slice(0, 0)
    for number in range(1, 120):
        write_parquet(empty, tmp_path / "raw" / f"{number:05d}.parquet", made_from="x")
    monkeypatch.setattr("curate.database.FILES_AT_ONCE", 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 60, hard))
    try:
        report.run(tmp_path, ReportConfig(), CONFIG, seed=0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert json.loads((tmp_path / "report.json").read_text())["images"] == 3


def test_markup_in_a_filters_name_is_printed_as_it_is(tmp_path):
    make(tmp_path, [Row("a" * 20)], {"filters": [{"name": "[red]x[/red]", "where": "true"}]}, title="[bold]")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.summary_table(tmp_path))
    assert "[red]x[/red]" in console.export_text()


def test_without_a_report_the_summary_names_the_way_out(tmp_path):
    with pytest.raises(InputError, match="run 'curate report'"):
        report.summary_table(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(InputError, match="not readable"):
        report.summary_table(tmp_path)
