from __future__ import annotations

import json
import shutil
from pathlib import Path

import duckdb
import pytest
import yaml

from curate import report
from curate.config import ReportConfig
from curate.report.card import BEGIN, END, size_category
from tests.curate.report_folder import CONFIG, Row, example_rows, write_folder


def make(out: Path, rows: list[Row], config: dict | None = None) -> str:
    write_folder(out, rows)
    report.run(out, ReportConfig(), config or CONFIG, seed=3)
    return (out / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dataset")
    write_folder(out, example_rows())
    report.run(out, ReportConfig(title="Handwritten digits"), CONFIG, seed=3)
    return out


@pytest.fixture(scope="module")
def figures(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


def ask(query: str) -> list[tuple]:
    with duckdb.connect() as database:
        return database.execute(query).fetchall()


def test_the_cards_header_names_files_that_are_there_with_their_counts(folder, figures):
    card = (folder / "README.md").read_text("utf-8")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "unknown"
    assert header["size_categories"] == ["n<1K"]
    told = {
        config["config_name"]: {f["split"]: f["path"] for f in config["data_files"]} for config in header["configs"]
    }
    assert {name: list(splits) for name, splits in told.items()} == {
        "default": ["train", "validation", "test"],
        "retain": ["train"],
    }
    sizes = {(i["config_name"], s["name"]): s for i in header["dataset_info"] for s in i["splits"]}
    for name, splits in told.items():
        for split, pattern in splits.items():
            tars = list(folder.glob(pattern))
            samples = sum(ask(f"SELECT count(*) FROM '{tar.with_suffix('.parquet')}'")[0][0] for tar in tars)
            assert tars
            assert sizes[name, split]["num_examples"] == samples
            assert sizes[name, split]["num_bytes"] == sum(tar.stat().st_size for tar in tars)


def test_the_card_has_the_funnel_the_reasons_and_an_honest_licence(folder, figures):
    card = (folder / "README.md").read_text("utf-8")
    for step in figures["funnel"]:
        assert f"{step['step']}".replace("_", "\\_") in card
    assert "| `dedup` | A duplicate of a pair that is kept; the twin says which. | 12 |" in card
    assert "**has not been determined**" in card


def test_what_a_person_wrote_in_the_card_stays(folder, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    card = (out / "README.md").read_text("utf-8")
    (out / "README.md").write_text(card.replace("**has not been determined**", "is ours"), "utf-8")
    report.run(out, ReportConfig(title="Renamed"), CONFIG, seed=3)
    card = (out / "README.md").read_text("utf-8")
    assert "# Renamed" in card
    assert "is ours" in card
    assert "not been determined" not in card


def test_a_filter_cannot_close_the_cards_code_block(tmp_path):
    card = make(tmp_path, [Row("a" * 20)], {**CONFIG, "filters": [{"name": "x", "where": "caption <> '````'"}]})
    assert "\n`````yaml\n" in card


@pytest.mark.parametrize(
    ("samples", "name"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (999_999, "100K<n<1M"), (10**9, "1B<n<10B"), (10**13, "n>1T")],
)
def test_size_categories_are_those_of_the_hub(samples, name):
    assert size_category(samples) == name


def test_every_word_between_the_marks_stays_byte_for_byte_however_often_the_card_is_written(tmp_path):
    make(tmp_path, [Row("a" * 20)])
    mine = "\n## Ours\n\n| a | ``` |\n\n\u200bкот 猫 <!-- not a mark -->\n\n"
    card = (tmp_path / "README.md").read_text("utf-8")
    before, _, rest = card.partition(BEGIN)
    (tmp_path / "README.md").write_text(before + BEGIN + mine + END + rest.partition(END)[2], "utf-8")
    for _ in range(3):
        report.run(tmp_path, ReportConfig(title="New"), CONFIG, seed=3)
    assert (tmp_path / "README.md").read_text("utf-8").count(BEGIN + mine + END) == 1


def test_the_card_names_sources_contact_refusals_and_what_was_ignored(tmp_path):
    rows = [Row(f"{n:020x}", url=f"http://good.example/{n}") for n in range(3)]
    rows += [Row("f" * 20, url="http://no.example/x", stage="fetch", step="fetch", reason="robots_disallow")]
    rows += [Row("e" * 20, caption="x", stage="plan", step="caption_length", reason="where", value="caption_words=1")]
    fetch = {"contact": "me@lab.example", "ignore_opt_outs": ["noai"], "per_host": 8, "per_host_rate": 5.0}
    card = make(tmp_path, rows, {**CONFIG, "fetch": fetch, "urls": "/home/me/secret/list.parquet"})
    assert "The list `list.parquet` named images on 2 hosts." in card
    assert "/home/me" not in card
    assert "| `good.example` | 3 | 3 | 3 |" in card
    assert "me@lab.example" in card
    assert "ignored: noai" in card
    assert "| `robots_disallow` |" in card
    assert "1 by caption\\_length" in card


def test_licences_are_counted_over_kept_pairs_where_the_list_names_them(tmp_path):
    licences = ["CC-BY-4.0", "CC-BY-4.0", None, "`|<b>"]
    rows = [Row(f"{n:020x}", extra={"license": licence}) for n, licence in enumerate(licences)]
    rows += [Row("f" * 20, stage="fetch", step="fetch", reason="dns", extra={"license": "CC0"})]
    card = make(tmp_path, rows)
    told = json.loads((tmp_path / "report.json").read_text())["licences"]["license"]
    assert {entry["licence"]: entry["pairs"] for entry in told} == {"CC-BY-4.0": 2, None: 1, "`|<b>": 1}
    assert "| CC-BY-4.0 | 2 |" in card
    assert "| (none given) | 1 |" in card
    assert "<b>" not in card.split("---\n", 2)[2]


def test_the_card_has_the_versions_and_the_fingerprint_of_the_manifest(folder):
    card, manifest = (folder / "README.md").read_text("utf-8"), json.loads((folder / "manifest.json").read_text())
    assert manifest["fingerprint"] in card
    assert all(f"{name} {version}" in card for name, version in manifest["versions"].items())


# --- croissant and datasets ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_croissant_is_valid_and_its_records_are_the_ledgers(folder):
    import mlcroissant

    metadata = json.loads((folder / "croissant.json").read_text())
    dataset = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    issues = dataset.metadata.ctx.issues
    assert not issues.errors, issues.report()
    records = list(dataset.records("ledger"))
    ledger = ask(f"SELECT key, kept FROM '{folder}/ledger.parquet'")
    assert {(r["ledger/key"].decode(), bool(r["ledger/kept"])) for r in records} == set(ledger)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {d["@id"]: d["sha256"] for d in metadata["distribution"]} == {n: f["sha256"] for n, f in files.items()}
    assert all((folder / d["contentUrl"]).is_file() for d in metadata["distribution"])


@pytest.mark.filterwarnings("ignore")
def test_datasets_loads_the_folder_offline_by_its_card(folder, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    copy = tmp_path / "digits"
    shutil.copytree(folder, copy)
    loaded = datasets.load_dataset(str(copy), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 72, "validation": 12, "test": 12}
    captions = dict(ask(f"SELECT key, caption FROM '{folder}/ledger.parquet' WHERE split = 'val'"))
    assert {row["__key__"]: row["txt"] for row in loaded["validation"]} == captions
    assert loaded["validation"][0]["jpg"].size == (160, 120)
    retain = datasets.load_dataset(str(copy), "retain", cache_dir=str(tmp_path / "cache"))
    assert len(retain["train"]) == 24
