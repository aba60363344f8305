"""A dataset folder → `report.html`, data card `README.md`, figures `report.json`, `croissant.json`, `manifest.json`.

It computes nothing that is not shown. The figures are counted in the database, the rows shown are a bounded sample,
and the page has a hard limit of bytes: where a dataset has so many steps that their pictures would pass it, each step
shows fewer. The same folder gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from curate import charts
from curate.config import ReportConfig, SelectConfig
from curate.errors import InputError
from curate.files import write_text
from curate.html import MAX_BYTES, count, render, share
from curate.report.card import card, retained
from curate.report.croissant import croissant
from curate.report.definitions import limits, why_paired
from curate.report.distributions import JUDGED
from curate.report.embedded import embedded_rows
from curate.report.figures import count_all
from curate.report.manifest import manifest
from curate.report.samples import Gallery, choose, with_pictures
from curate.report.tables import open_tables
from curate.report.thresholds import named_columns

if TYPE_CHECKING:
    from rich.table import Table

MOST_THUMBNAILS = 200
SCRIPTS = ("explore.css", "data.js", "rows.js", "plots.js", "map.js")  # with the frame's own, in this order
LONGEST_CONFIG = 60_000
QUERIES = (
    (
        "Why were rows dropped?",
        "SELECT stage, step, reason, count(*) FROM 'ledger.parquet' WHERE NOT kept GROUP BY ALL ORDER BY ALL;",
    ),
    (
        "What did one host send?",
        "SELECT url, status, reason, value FROM 'raw/*.parquet' WHERE url_host = 'example.org';",
    ),
    (
        "Which rows are one picture?",
        "SELECT duplicate_group, list(url) FROM 'ledger.parquet' GROUP BY ALL HAVING count(*) > 1;",
    ),
)


@dataclass(frozen=True)
class ReportResult:
    """The report, and its size in bytes."""

    path: Path
    size: int


def run(
    out: Path, config: ReportConfig, effective_config: dict[str, Any], seed: int, engine: SelectConfig | None = None
) -> ReportResult:
    """Write the five files into the dataset folder, `manifest.json` last.

    Args:
        out: a folder with a ledger; plan, raw, signals and shards as far as they are there.
        config: title, and how many thumbnails.
        effective_config: the whole configuration of the build, as plain data.
        seed: of the build; chooses the samples shown.
        engine: limits of the database that counts.

    Raises:
        InputError: there is no ledger yet.
        ConfigError: the database cannot count within its limits.
    """
    plain = json.loads(json.dumps(effective_config, default=str))
    filters = plain.get("filters") or []
    with open_tables(out, engine or SelectConfig(), named_columns(filters), seed) as tables:
        figures = {"title": config.title, **count_all(tables, filters)}
        chosen = choose(tables, figures, filters, min(config.thumbnails, MOST_THUMBNAILS))
        galleries = with_pictures(tables, chosen, _test_sets(filters))
        rows = embedded_rows(tables, figures, _pictures(galleries), seed)
        tables.thumbnails.save()
        figures["sql"] = {"views": tables.views, "figures": tables.sql}
    facts = manifest(out, plain, seed)
    page = _page(figures, galleries, rows, facts)
    write_text(out / "report.html", page)
    write_text(out / "README.md", card(out, figures, plain, facts))
    write_text(out / "croissant.json", _json(croissant(out, figures, facts)))
    write_text(out / "report.json", _json(figures))
    write_text(out / "manifest.json", _json(facts))
    return ReportResult(out / "report.html", len(page.encode()))


def _test_sets(filters: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the decontaminate steps compare with."""
    named = [(step.get("decontaminate") or {}).get("against") or [] for step in filters]
    return [path for some in named for path in ([some] if isinstance(some, str) else some)]


def _pictures(galleries: Sequence[Gallery]) -> dict[str, str]:
    samples = [sample for gallery in galleries for sample in (*gallery.samples, *gallery.passed)]
    return {sample.key: sample.picture for sample in samples if sample.picture}


def _json(data: Mapping[str, Any]) -> str:
    # ASCII: a caption with a lone surrogate is still valid JSON.
    return json.dumps(data, indent=1) + "\n"


# --- the page --------------------------------------------------------------------------------------------------------


def _page(
    figures: Mapping[str, Any], galleries: Sequence[Gallery], rows: Sequence[dict[str, Any]], facts: Mapping[str, Any]
) -> str:
    """The page; with half the samples in each gallery and every second row, and again, until it is small enough."""
    each = max((len(gallery.samples) for gallery in galleries), default=0)
    while True:
        shown = [gallery.at_most(each) for gallery in galleries]
        there = _pictures(shown)
        data = _data(figures, rows, there)
        page = render(Path(__file__).parent, _values(figures, shown, rows, facts), more=SCRIPTS, data=data)
        if len(page.encode()) <= MAX_BYTES or not (each or rows):
            return page
        each, rows = each // 2, rows[::2] if len(rows) > 1 else []


def _data(figures: Mapping[str, Any], rows: Sequence[dict[str, Any]], shown: Mapping[str, str]) -> dict[str, Any]:
    """What the page's scripts work on; `plot` is where a chart's axes lie."""
    return {
        "rows": [{**row, "shown": True} if row["key"] in shown else row for row in rows],
        "drawn": list(figures["distributions"].values()),
        "total": figures["rows"],
        "splits": [split for split, number in figures["splits"].items() if number],
        "steps": [step["step"] for step in figures["funnel"] if step["dropped"]],
        "judged": JUDGED,
        "plot": {"left": charts.LEFT, "right": charts.WIDTH - charts.RIGHT, "top": charts.TOP - 6}
        | {"bottom": charts.HEIGHT - charts.BOTTOM},
    }


def _values(
    figures: Mapping[str, Any], galleries: Sequence[Gallery], rows: Sequence[dict[str, Any]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    config = yaml.safe_dump(facts["config"], sort_keys=False, allow_unicode=True, width=100)
    filters = facts["config"].get("filters") or []
    return {
        "figures": figures,
        "kept": [gallery for gallery in galleries if gallery.stage == "kept"],
        "dropped": [gallery for gallery in galleries if gallery.stage != "kept" and not gallery.pairs],
        "pairs": [gallery for gallery in galleries if gallery.pairs],
        "funnel": [{**step, "bar": _bar(step, figures["rows"])} for step in figures["funnel"]],
        "what": {step["step"]: step["what"] for step in figures["funnel"]},
        "why": {str(step.get("name")): why_paired(step) for step in filters},
        "split_bar": _split_bar(figures),
        "histograms": [_histogram(name, drawn) for name, drawn in figures["distributions"].items()],
        "hosts": [{**host, "bar": _host_bar(host)} for host in figures["hosts"]["top"]],
        "words": _compared(figures["words"]["top"], "word", figures["words"]["before"], figures["words"]["after"]),
        "languages": _compared(
            figures["languages"],
            "language",
            sum(line["before"] for line in figures["languages"]),
            sum(line["after"] for line in figures["languages"]),
        ),
        "concepts": [_balanced(balance, figures["words"]) for balance in figures["concepts"]],
        "host": _host,
        "embedded": len(rows),
        "mapped": sum("xy" in row for row in rows),
        "limits": limits(filters),
        "config": config[:LONGEST_CONFIG] + ("\n… manifest.json has the rest" if len(config) > LONGEST_CONFIG else ""),
        "facts": facts,
        "queries": QUERIES,
    }


def _compared(lines: Sequence[Mapping[str, Any]], name: str, before: int, after: int) -> list[dict[str, Any]]:
    """Shares before and after, and a bar of each on the scale of the largest."""
    shares = [(line["before"] / before if before else 0, line["after"] / after if after else 0) for line in lines]
    most = max((share for both in shares for share in both), default=0) or 1
    return [
        {
            "name": line[name],
            "before": line["before"],
            "after": line["after"],
            "shares": both,
            "bars": [
                charts.bar([("same", both[0], f"{share(line['before'], before)} before")], most),
                charts.bar([("kept", both[1], f"{share(line['after'], after)} of what is kept")], most),
            ],
        }
        for line, both in zip(lines, shares, strict=True)
    ]


def _balanced(balance: Mapping[str, Any], captions: Mapping[str, Any]) -> dict[str, Any]:
    """The concepts of a balance step as `_compared` draws them, with the rows that it dropped of each."""
    lines = _compared(balance["top"], "concept", captions["before"], captions["after"])
    dropped = (entry["dropped"] for entry in balance["top"])
    return {"step": balance["step"], "top": [{**line, "dropped": n} for line, n in zip(lines, dropped, strict=True)]}


def _bar(step: Mapping[str, Any], rows: int) -> str:
    left, dropped = step["left"], step["dropped"]
    return charts.bar(
        [("kept", left, f"{count(left)} left"), ("dropped", dropped, f"{count(dropped)} dropped here")], rows
    )


def _split_bar(figures: Mapping[str, Any]) -> str:
    parts = [
        (split, number, f"{split}: {count(number)} ({share(number, figures['kept'])})")
        for split, number in figures["splits"].items()
        if number
    ]
    return charts.bar(parts, figures["kept"])


def _histogram(name: str, drawn: Mapping[str, Any]) -> dict[str, Any]:
    series = {"kept": drawn["kept"], "dropped": drawn["dropped"]}
    cuts = [(cut["value"], f"{cut['step']}: {cut['operator']} {cut['value']:g}") for cut in drawn["what_if"]]
    chart = charts.histogram(drawn["edges"], series, unit=drawn["unit"], cuts=cuts, label=drawn["title"])
    return {"name": name, **drawn, "chart": chart}


def _host_bar(host: Mapping[str, Any]) -> str:
    came, failed = host["images"], host["rows"] - host["images"]
    return charts.bar(
        [("kept", came, f"{count(came)} came"), ("dropped", failed, f"{count(failed)} failed")], host["rows"]
    )


def _host(url: str | None) -> str:
    try:
        return urlsplit(url or "").hostname or url or "no URL"
    except ValueError:
        return url or "no URL"


# --- the table at the end of a build ---------------------------------------------------------------------------------


def summary_table(out: Path) -> Table:
    """The funnel as one table for the terminal: what each step dropped, moved to retain and left, and the splits.

    Raises:
        InputError: `report.json` is not there or not ours.
    """
    from rich.markup import escape
    from rich.table import Table

    figures = _read_figures(out / "report.json")
    table = Table(title=escape(str(figures["title"])), title_justify="left", caption_justify="left")
    for name, side in (
        ("stage", "left"),
        ("step", "left"),
        ("dropped", "right"),
        ("left", "right"),
        ("share", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    table.add_row("list", "rows in", "", count(figures["rows"]), share(figures["rows"], figures["rows"]))
    for step in figures["funnel"]:
        cells = (
            escape(step["step"]),
            count(step["dropped"]),
            count(step["left"]),
            share(step["left"], figures["rows"]),
            retained(step),
        )
        table.add_row(step["stage"], *cells)
    table.add_section()
    for split, number in figures["splits"].items():
        if number:
            table.add_row("kept", split, "", count(number), share(number, figures["rows"]))
    table.caption = (
        f"{count(figures['rows'])} rows in = {count(figures['kept'])} kept + {count(figures['dropped'])} dropped"
    )
    return table


def _read_figures(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); run 'curate report' on {path.parent} first") from error
