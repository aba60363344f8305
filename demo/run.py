"""`python -m demo.run`: from a URL list on a real web server to an adapted CLIP with proof. See README.md.

Every step is the command that a user would type, in a process of its own; what an earlier run finished is reused.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from demo.corpus import Picture, digits, png
from demo.junk import EXPECTED, KEPT, SLIPS, Row, Site, examples, make_site, unseen_emoji, url
from demo.web import Web, serving

RUN = Path("demo-run")
LOCAL = "127.0.0.0/8"
console = Console(width=110)


def main() -> None:
    """Run the demo in ./demo-run."""
    started = time.monotonic()
    site, hits = prepare()
    adapt = ["finetune", "fit", "--config", "configs/demo.yaml"]
    forgetful = ["--out", str(RUN / "adapted-without-retain"), "--data.replay", "0", "--data.batch_size", "64"]
    _step("4 Adapt the CLIP with LoRA, replaying `retain`", adapt)
    _step("5 The same without `retain`, to see what that is worth", [*adapt, *forgetful])
    wrong = _print_junk(site.domain)
    _print_figures()
    console.print(
        f"reports: {RUN}/digits/report.html (the dataset), {RUN}/adapted/report.html (the adapted CLIP)\n"
        f"{time.monotonic() - started:.0f} s, {sum(hits.values()):,} requests"
    )
    if wrong or hits["forbidden"] or hits["private"]:
        sys.exit(f"demo: not under its own reason: {', '.join(wrong) or 'a request to the forbidden port or path'}")


def prepare() -> tuple[Site, Counter[str]]:
    """Steps 1 to 3: the dataset of the domain and the CLIP to adapt, in ./demo-run.

    Returns:
        The site that was crawled, and how often each kind of thing was asked for.
    """
    site = make_site()
    with serving(site.bodies, _ports()) as web:
        _begin(web)
        _write_folders()
        _write_lists(site, web)
        _build(web)
        return site, web.hits()


def _build(web: Web) -> None:
    allow = f'--fetch.allow_addresses=["{LOCAL}:{web.port}","{LOCAL}:{web.closed_port}"]'
    general = ["curate", "build", "--config", "configs/curate/demo_general.yaml", "--out", str(RUN / "general")]
    domain = ["curate", "build", "--config", "configs/curate/demo.yaml", "--out", str(RUN / "digits")]
    _step("1 The general web: emoji and their names", [*general, "--urls", str(RUN / "lists/general.parquet"), allow])
    _step(
        "2 Pretrain a small CLIP on it, from scratch",
        ["finetune", "fit", "--config", "configs/finetune/demo_pretrain.yaml"],
    )
    _step("", ["finetune", "export", "--overwrite", "--run", str(RUN / "pretrain"), "--out", str(RUN / "pretrained")])
    _step(
        "3 A crawl, most of it junk: select the domain", [*domain, "--urls", str(RUN / "lists/domain.parquet"), allow]
    )


def _step(title: str, command: list[str]) -> None:
    """Run a command as its user would.

    Raises:
        SystemExit: it failed, with its status.
    """
    if title:
        console.rule(title, align="left")
    console.print("$ " + " ".join(command), style="bold", highlight=False, soft_wrap=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        sys.exit(f"demo: {command[0]} failed with status {status}")


# --- what the steps read ---------------------------------------------------------------------------------------------


def _ports() -> list[int]:
    """The ports of the last run, so that its URLs, and with them all it fetched, stay what they were."""
    path = RUN / "ports.json"
    return json.loads(path.read_text()) if path.exists() else []


def _begin(web: Web) -> None:
    """Where a port of the last run is taken, all URLs are new, and nothing of that run can be used."""
    ports = [web.port, web.forbidden_port, web.closed_port]
    if _ports() not in ([], ports):
        shutil.rmtree(RUN)
    RUN.mkdir(exist_ok=True)
    (RUN / "ports.json").write_text(json.dumps(ports))


def _write_folders() -> None:
    """The test images the user holds, a folder a class, and the examples of the domain."""
    _write_pictures(RUN / "test_digits", digits()[1], by_class=True)
    _write_pictures(RUN / "unseen_emoji", unseen_emoji(), by_class=True)
    _write_pictures(RUN / "examples", examples(), by_class=False)


def _write_pictures(folder: Path, pictures: list[Picture], *, by_class: bool) -> None:
    for number, picture in enumerate(pictures):
        path = folder / picture.name / f"{number}.png" if by_class else folder / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture.image))


def _write_lists(site: Site, web: Web) -> None:
    (RUN / "lists").mkdir(exist_ok=True)
    for name, rows in (("general", site.general), ("domain", site.domain)):
        urls = [url(row, web.port, web.closed_port) for row in rows]
        captions = [row.caption for row in rows]
        pq.write_table(pa.table({"url": urls, "caption": captions}), RUN / "lists" / f"{name}.parquet")


# --- what came out ---------------------------------------------------------------------------------------------------


def _print_junk(rows: list[Row]) -> list[str]:
    """Each kind of row, and what the ledger says of it; returns the kinds of junk not under their own reason."""
    ledger = pq.read_table(RUN / "digits" / "ledger.parquet").sort_by("row").to_pylist()
    assert len(ledger) == len(rows), "the ledger has a row for each row of the list"
    found: dict[str, Counter[tuple[str, str]]] = {}
    for row, entry in zip(rows, ledger, strict=True):
        fate = ("kept", entry["split"]) if entry["kept"] else (entry["stage"], entry["reason"])
        found.setdefault(row.kind, Counter())[fate] += 1
    table = Table(
        "kind of row", "rows", "what the ledger says", title="The crawl, and what became of it", title_justify="left"
    )
    wrong = []
    for kind, fates in found.items():
        table.add_row(
            kind, f"{sum(fates.values()):,}", ", ".join(f"{a}: {b} {n:,}" for (a, b), n in fates.most_common())
        )
        slipped = sum(count for fate, count in fates.items() if fate not in EXPECTED.get(kind, ()))
        if kind not in KEPT and slipped > SLIPS.get(kind, 0) * sum(fates.values()):
            wrong.append(kind)
    console.print(table)
    console.print(
        "Kept: the digits. Off-topic rows that are good otherwise are the split `retain`; a few black shapes\n"
        "slip through. Wrong captions stay in: this small CLIP cannot judge them."
    )
    return wrong


def _print_figures() -> None:
    """Before and after, with and without `retain`, with 95 % intervals."""
    runs = {"after": "adapted", "after, without retain": "adapted-without-retain"}
    read = {name: json.loads((RUN / folder / "evaluation.json").read_text()) for name, folder in runs.items()}
    metrics = {
        "digits never trained on, zero-shot top-1 of 10": "zero_shot/digits/top1",
        "emoji, top-1 of 1,454 captions": "emoji/image_to_text/recall@1",
        "emoji that nothing replays, top-1 of 182": "zero_shot/unseen_emoji/top1",
    }
    table = Table("", "before", *runs, title="The small CLIP, before and after (95 % intervals)", title_justify="left")
    for label, metric in metrics.items():
        cells = [read["after"]["before"][metric], *(evaluation["after"][metric] for evaluation in read.values())]
        table.add_row(label, *(f"{c['value']:.1%} ({c['low']:.1%}–{c['high']:.1%})" for c in cells))
    console.print(table)


if __name__ == "__main__":
    main()
