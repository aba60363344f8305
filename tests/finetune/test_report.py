from __future__ import annotations

import base64
import csv
import io
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from PIL import Image

from curate.errors import InputError
from curate.html import MAX_BYTES
from finetune import report
from tests.curate.pages import Page

NASTY = '"><script>alert(1)</script>\u202e\x00 onerror=x {{ 7*7 }}'
METRICS = {
    "zero_shot/digits/top1": (0.10, 0.98),
    "val/image_to_text/recall@1": (0.05, 0.44),
    "retain/image_to_text/recall@1": (0.38, 0.33),
    "retain/text_to_image/recall@1": (0.36, 0.355),
}
FACTS = {
    "model": "ViT-B-32 openai",
    "adapter": "lora",
    "trainable_parameters": 2_000_000,
    "total_parameters": 100_000_000,
    "train_samples": 1437,
    "steps": 340,
    "seconds": 75.3,
    "samples_per_second": 812.4,
    "dataset": "dataset",
}


def interval(value: float, width: float = 0.02, **more) -> dict:
    return {"value": value, "low": value - width, "high": value + width, **more}


def evaluation(metrics=METRICS, facts=FACTS) -> dict:
    return {
        "before": {name: interval(was, n=400) for name, (was, _) in metrics.items()},
        "after": {name: interval(now, n=400) for name, (_, now) in metrics.items()},
        "delta": {name: interval(now - was) for name, (was, now) in metrics.items()},
        "facts": facts,
    }


def picture(side: int = 96) -> str:
    content = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(content, "JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def write_run(run: Path, found: dict, config: dict | None = None, examples: dict | None = None) -> Page:
    run.mkdir(exist_ok=True)
    config = config or {"out": str(run), "data": {"dataset": str(run.parent / "dataset"), "batch_size": 256}}
    (run / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    (run / "evaluation.json").write_text(json.dumps(found), "utf-8")
    if examples is not None:
        (run / "examples.json").write_text(json.dumps(examples), "utf-8")
    assert report.run(run) == run / "report.html"
    return Page((run / "report.html").read_text("utf-8"))


def write_metrics(run: Path, rows: list[dict]) -> None:
    names = ["epoch", "step", "train/loss", "val/loss", "zero_shot/digits/top1", "lr-AdamW"]
    run.mkdir(exist_ok=True)
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


# --- before and after ------------------------------------------------------------------------------------------------


def test_each_metric_has_its_values_intervals_change_and_verdict(tmp_path):
    page = write_run(tmp_path / "run", evaluation())
    rows = {row[0]: row for row in page.rows}
    assert rows["top1"][1:3] == ["10.0 %8.0 % – 12.0 %", "98.0 %96.0 % – 100.0 %"]
    assert rows["top1"][4:] == ["+88.0+86.0 … +90.0", "better", "400"]
    verdicts = [(row[0], row[5]) for row in page.rows if len(row) == 7 and row[0] != "metric"]
    assert verdicts == [
        ("top1", "better"),
        ("image_to_text/recall@1", "better"),
        ("image_to_text/recall@1", "worse"),
        ("text_to_image/recall@1", "no clear change"),
    ]


def test_what_got_worse_is_said_at_the_top(tmp_path):
    top = write_run(tmp_path / "run", evaluation()).source.partition("<main")[0]
    assert "1 worse" in top
    assert "Worse: retain/image_to_text/recall@1." in top
    assert 'class="tile bad"><b>33.0 %</b><span>retain/image_to_text/recall@1, from 38.0 %: worse</span>' in top


@pytest.mark.parametrize(
    ("metric", "low", "high", "told"),
    [
        ("val/image_to_text/recall@1", 0.01, 0.2, "better"),
        ("val/image_to_text/recall@1", -0.2, -0.01, "worse"),
        ("val/image_to_text/recall@1", -0.01, 0.2, "same"),
        ("val/image_to_text/recall@1", 0.0, 0.2, "same"),
        ("val/loss", -0.3, -0.1, "better"),
        ("val/loss", 0.1, 0.3, "worse"),
        ("val/image_to_text/median_rank", -30, -2, "better"),
        ("zero_shot/loss/top1", 0.1, 0.3, "better"),  # a set may have any name
        ("val/loss", math.nan, math.nan, "same"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(metric, low, high, told):
    assert report.verdict(metric, low, high) == told


def test_figures_that_are_no_shares_are_written_as_they_are(tmp_path):
    page = write_run(tmp_path / "run", evaluation({"val/loss": (3.5, 1.25), "val/image_to_text/median_rank": (34, 3)}))
    rows = {row[0]: row for row in page.rows}
    assert rows["loss"][1].startswith("3.5")
    assert rows["loss"][4].startswith("−2.25")
    assert rows["image_to_text/median_rank"][5] == "better"


def test_a_figure_that_is_not_a_number_is_a_dash_not_a_failure(tmp_path):
    found = evaluation()
    found["after"]["zero_shot/digits/top1"] = {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    found["delta"]["zero_shot/digits/top1"] = {"value": math.nan, "low": math.nan, "high": math.nan}
    page = write_run(tmp_path / "run", found)
    assert next(row for row in page.rows if row[0] == "top1")[2].startswith("–")
    assert "nan" not in page.source.partition("<main")[2].partition("config.yaml")[0]


def test_the_marks_of_a_change_lie_where_the_values_are():
    (row,) = report.compare(evaluation({"zero_shot/digits/top1": (0.25, 0.75)}))
    before, after = ET.fromstring(row["chart"]).iter("circle")
    assert (float(after.get("cx")) - float(before.get("cx"))) == pytest.approx(0.5 * 188, abs=0.2)
    assert after.get("class") == "mark after better"


def test_a_run_without_any_evaluation_set_still_has_a_report(tmp_path):
    page = write_run(tmp_path / "run", {"before": {}, "after": {}, "delta": {}, "facts": {}})
    assert "Nothing was evaluated" in page.source


# --- curves ----------------------------------------------------------------------------------------------------------


def test_curves_are_read_as_lightning_writes_them(tmp_path):
    write_metrics(
        tmp_path,
        [
            {"epoch": 0, "step": 9, "train/loss": 4.0, "lr-AdamW": 1e-4},
            {"epoch": 0, "step": 19, "train/loss": "nan", "lr-AdamW": 2e-4},
            {"epoch": 0, "step": 19, "val/loss": 3.0, "zero_shot/digits/top1": 0.5},
            {"epoch": 0, "step": 9, "train/loss": 3.9},  # a run continued from before step 9
        ],
    )
    assert report.read_curves(tmp_path / "metrics.csv") == {
        "train/loss": [(9, 3.9)],
        "lr-AdamW": [(9, 1e-4), (19, 2e-4)],
        "val/loss": [(19, 3.0)],
        "zero_shot/digits/top1": [(19, 0.5)],
    }
    assert report.read_curves(tmp_path / "none.csv") == {}


def test_each_kind_of_curve_has_a_plot_with_its_names(tmp_path):
    steps = [
        {"step": n, "train/loss": 1 / (n + 1), "lr-AdamW": n, "val/loss": 2.0, "zero_shot/digits/top1": 0.5}
        for n in range(5)
    ]
    write_metrics(tmp_path / "run", steps)
    page = write_run(tmp_path / "run", evaluation())
    curves = page.source.partition('id="curves"')[2].partition('id="trained"')[0]
    titles = [part.partition("</h3>")[0] for part in curves.split("<h3>")[1:]]
    assert titles == ["Loss", "Learning rate", "Zero-shot classification: digits"]
    assert "train/loss" in curves
    assert "val/loss" in curves


def test_no_plot_has_more_curves_than_there_are_colours():
    metrics = ("recall@1", "recall@5", "recall@10", "map", "median_rank")
    directions = ("image_to_text", "text_to_image")
    retrieval = {f"flowers/{direction}/{metric}": 0.5 for direction in directions for metric in metrics}
    alarms = {f"train/{tower}_{figure}": 0.5 for tower in ("image", "text") for figure in ("rank", "spread")}
    curves = report._plots({name: [(0, value), (1, value)] for name, value in (retrieval | alarms).items()})
    assert {plot["title"]: len(plot["names"]) for plot in curves} == {
        "Effective rank in a batch": 2,
        "Spread in a batch": 2,
        "Retrieval: flowers, image to text": 4,
        "Retrieval: flowers, text to image": 4,
        "Retrieval: flowers, median_rank": 2,
    }


def test_a_long_curve_is_thinned_to_means_that_keep_its_shape():
    points = [(float(n), math.sin(n / 500)) for n in range(10_000)]
    thinned = report.thin(points, 300)
    assert len(thinned) == 300
    assert all(abs(y - math.sin(x / 500)) < 1e-3 for x, y in thinned)
    assert sum(y for _, y in thinned) / 300 == pytest.approx(sum(y for _, y in points) / 10_000, abs=1e-3)
    assert report.thin(points[:300], 300) == points[:300]


@pytest.mark.parametrize(
    ("metric", "parts"),
    [
        ("zero_shot/digits/top1", ("zero_shot/digits", "top1")),
        ("val/image_to_text/recall@1", ("val", "image_to_text/recall@1")),
        ("loss", ("loss", "loss")),
    ],
)
def test_a_metrics_name_is_split_into_task_and_name(metric, parts):
    assert report.split_metric(metric) == parts


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_inert_whatever_names_captions_and_pictures_say(tmp_path):
    examples = looked_at(NASTY)
    key = next(iter(examples["pictures"]))
    examples["pictures"] = {key: "javascript:alert(1)", "b": f"data:image/png;base64,{NASTY}"}
    facts = {**FACTS, "model": NASTY, "adapter": NASTY}
    config = {"data": {"dataset": NASTY.replace("\x00", "")}, "note": NASTY}
    found = evaluation({f"zero_shot/{NASTY}/top1": (0.1, 0.2)}, facts)
    page = write_run(tmp_path / "run", found, config, examples)
    page.assert_inert()
    assert not page.all("img")


def test_the_page_tells_what_was_trained_on_what_at_what_cost(tmp_path):
    source = write_run(tmp_path / "run", evaluation()).source
    for words in (
        "ViT-B-32 openai",
        "lora",
        "2,000,000",
        "2.0 % of all",
        "1,437 pairs",
        "1 min 15 s",
        "batch_size: 256",
    ):
        assert words in source


def test_facts_that_are_not_known_are_left_out(tmp_path):
    facts = {"model": "RN50", "seconds": 0.0, "samples_per_second": None}
    source = write_run(tmp_path / "run", evaluation(facts=facts)).source
    assert "None" not in source
    assert "RN50" in source


def test_the_datasets_report_is_linked_where_it_is_there(tmp_path):
    folder = tmp_path / "data: set"
    config = {"data": {"dataset": str(folder)}}
    assert "/report.html" not in write_run(tmp_path / "run", evaluation(), config).source
    folder.mkdir()
    (folder / "report.html").write_text("")
    (folder / "manifest.json").write_text('{"fingerprint": "0123456789abcdef"}')
    page = write_run(tmp_path / "run", evaluation(), config)
    assert {a["href"] for a in page.all("a") if "report.html" in a["href"]} == {"../data%3A%20set/report.html"}
    assert "0123456789abcdef" in page.source


def looked_at(caption: str = "a handwritten seven", side: int = 96) -> dict:
    """An examples.json in which every part is there."""
    image, text = {"picture": "val/1", "caption": caption}, {"picture": None, "caption": caption}

    def example(query: dict, found: dict, truth: dict) -> dict:
        wrong, right = ({**found, "similarity": 0.25, "match": match} for match in (False, True))
        sides = {"before": {"rank": 37, "nearest": [wrong] * 4}, "after": {"rank": 1, "nearest": [right] * 4}}
        return {"query": query, "truth": [truth], **sides}

    def task(direction: str, query: dict, found: dict) -> dict:
        shown = {kind: [example(query, found, found)] for kind in ("won", "lost", "worst")}
        counts = {"queries": 400, "watched": 400, "won": 312, "lost": 7}
        return {"set": "val", "direction": direction, **counts, "examples": shown}

    predicted = {"class": caption, "probability": 0.875, "rank": 3}
    change = {"class": "seven", "taken_for": caption, "of": 40, "before": 31, "after": 2, "pictures": ["val/1"] * 3}
    confusion = {
        "classes": ["one", caption],
        "others": True,
        "before": [[0.25, 0.5, 0.25]] * 2,
        "after": [[0, 1, 0]] * 2,
    }
    digits = {
        "set": "digits",
        "images": 450,
        "won": 11,
        "lost": 2,
        "changes": [change],
        "confusion": confusion,
        "worst": [{"picture": "val/1", "class": "four", "before": predicted, "after": predicted}],
    }
    own = [[True, False], [False, True]]
    cosines = {"before": [[0.2, 0.3], [0.1, 0.2]], "after": [[0.9, 0.1], [0.0, 0.8]]}
    return {
        "pictures": {"val/1": picture(side)},
        "retrieval": [task("image_to_text", image, text), task("text_to_image", text, image)],
        "classification": [digits],
        "matrices": [{"set": "val", "captions": [caption, "b"], "images": ["val/1"] * 2, "true": own, **cosines}],
        "left_out": [],
    }


def test_what_was_won_lost_confused_and_mistaken_is_shown_in_pictures(tmp_path):
    page = write_run(tmp_path / "run", evaluation(), examples=looked_at())
    page.assert_inert()
    parts = {name: page.source.partition(f'id="{name}"')[2].partition("<h2")[0] for name in SECTIONS}
    assert all(parts.values())
    for words in ("312 won", "7 lost", "before: rank 37", "after: rank 1", "image → captions", "caption → images"):
        assert words in parts["examples"]
    assert parts["examples"].count('<figure class="hit">') == 8  # four of each example found after, for captions
    assert ["seven", "a handwritten seven", "31", "2", "40"] in [row[:5] for row in page.rows]
    assert ["a handwritten seven", "25", "50", "25"] in page.rows
    assert "all others" in parts["confusion"]
    assert ["a handwritten seven", "90", "10"] in page.rows
    assert 'class="heat-20 own">90</td><td class="heat-2">10</td>' in parts["similarity"]
    assert "own − other pairs: 0.00 before, <b>+0.80</b> after" in parts["similarity"].replace("+0.00", "0.00")
    assert "a handwritten seven · 88 %" in parts["failures"]
    assert page.source.count('tabindex="0" role="region"') >= 4  # what scrolls can be scrolled with the keyboard


SECTIONS = ("examples", "confusion", "similarity", "failures")


def test_examples_of_an_earlier_version_or_none_leave_the_sections_out(tmp_path):
    for examples in ({"set": "val", "examples": []}, None):
        source = write_run(tmp_path / "run", evaluation(), examples=examples).source
        assert not [name for name in SECTIONS if f'id="{name}"' in source]


def test_broken_examples_are_told(tmp_path):
    with pytest.raises(InputError, match=r"examples\.json: 'retrieval' is missing or wrong"):
        write_run(tmp_path / "run", evaluation(), examples={"pictures": {}})


def test_cost_and_fingerprints_are_told(tmp_path):
    told = {"samples_seen": 87040, "evaluation_seconds": 61, "peak_memory_bytes": 1_234_000_000, "device": "CPU"}
    run = tmp_path / "run"
    run.mkdir()
    (run / "inputs.json").write_text('{"weights": "5ta27"}')
    source = write_run(run, evaluation(facts={**FACTS, **told, "fingerprint": "f00d" * 16})).source
    for words in ("87,040", "1 min 1 s", "1.2 GB", "peak memory of the process", "f00d" * 16, "5ta27"):
        assert words in source


def test_every_source_is_linked_with_its_report_and_its_data_card(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("")
    (tmp_path / "one" / "report.html").write_text("")
    sources = [{"path": str(tmp_path / name)} for name in ("one", "two")]
    config = {"data": {"dataset": str(tmp_path / "val"), "sources": sources}}
    page = write_run(tmp_path / "run", evaluation(), config)
    links = {a["href"] for a in page.all("a") if not a["href"].startswith("#")}
    assert links == {"../one/report.html", "../one/README.md", "../two/README.md"}


def test_the_page_stays_under_its_budget(tmp_path):
    page = write_run(tmp_path / "run", evaluation(), examples=looked_at(side=1500))
    assert (tmp_path / "run" / "report.html").stat().st_size <= MAX_BYTES
    assert not page.all("img")
    assert "312 won" in page.source  # what is told in words stays


def test_the_same_run_gives_the_same_bytes(tmp_path):
    write_metrics(tmp_path / "run", [{"step": n, "train/loss": 1 / (n + 1)} for n in range(50)])
    assert write_run(tmp_path / "run", evaluation()).source == write_run(tmp_path / "run", evaluation()).source


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_missing_or_broken_file_is_named_with_the_way_out(tmp_path):
    with pytest.raises(InputError, match=r"config\.yaml: not there; 'finetune fit'"):
        report.run(tmp_path)
    (tmp_path / "config.yaml").write_text("data: [")
    with pytest.raises(InputError, match=r"config\.yaml: not readable"):
        report.run(tmp_path)
    (tmp_path / "config.yaml").write_text("- a list")
    with pytest.raises(InputError, match=r"config\.yaml: expected names and values, found list"):
        report.run(tmp_path)
    (tmp_path / "config.yaml").write_text("data: {dataset: x}")
    (tmp_path / "evaluation.json").write_text('{"before": {}}')
    with pytest.raises(InputError, match=r"evaluation\.json: 'after' is missing"):
        report.run(tmp_path)
