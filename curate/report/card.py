"""The data card: `README.md` with the header that Hugging Face reads, so that the folder can be pushed as it is.

The header names a data file pattern for each split that there is: `load_dataset(FOLDER)` gives train, validation and
test, `load_dataset(FOLDER, "retain")` the general pairs set aside. What a person writes between the two `yours` marks
survives the next build.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from curate.config import OPT_OUTS
from curate.html import clip, count, share, size, visible
from curate.report.definitions import limits

HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}
BEGIN, END = "<!-- yours: what you write from here … -->", "<!-- … to here stays when the card is written again -->"
YOURS = """
## Licence and use

The licence of this dataset **has not been determined**. Each image and caption belongs to whoever published it at its
URL, under terms that were not checked. Before you share or use the dataset, find out whether you may, and write here on
what grounds, whom to ask, and how to have a pair removed.
"""


def card(out: Path, figures: Mapping[str, Any], config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The text of `README.md`.

    Args:
        out: the dataset folder: sizes of its shards, and what a person wrote in the card that is there.
        figures: `report.json`'s data.
        config: the effective configuration, JSON-ready.
        facts: the manifest.
    """
    sections = (
        _head(figures),
        _splits(out, figures),
        _sources(figures, config),
        _funnel(figures),
        _how(config, facts),
        _manners(figures, config),
        "## What to know before use\n\n" + "\n".join(f"- {note}" for note in limits(config.get("filters") or [])),
        BEGIN + _yours(out / "README.md") + END,
    )
    return _header(out, figures) + "\n" + "\n\n".join(section.strip() for section in sections) + "\n"


# --- the header ------------------------------------------------------------------------------------------------------


def _header(out: Path, figures: Mapping[str, Any]) -> str:
    splits = {split: number for split, number in figures["splits"].items() if number}
    default = {HUB_SPLITS[split]: split for split in splits if split in HUB_SPLITS}
    configs = {"default": default} | ({"retain": {"train": "retain"}} if "retain" in splits else {})
    header = {
        "pretty_name": visible(figures["title"]),
        "license": "unknown",
        "task_categories": ["zero-shot-image-classification", "text-to-image", "image-to-text"],
        "tags": ["image-text pairs", "webdataset", "clip"],
        "size_categories": [size_category(figures["kept"])],
        "configs": [_config(name, parts) for name, parts in configs.items() if parts],
        "dataset_info": [_info(out, name, parts, splits) for name, parts in configs.items() if parts],
    }
    return "---\n" + yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=120) + "---\n"


def _config(name: str, parts: Mapping[str, str]) -> dict[str, Any]:
    files = [{"split": there, "path": f"shards/{split}-*.tar"} for there, split in parts.items()]
    return {"config_name": name, "data_files": files}


def _info(out: Path, name: str, parts: Mapping[str, str], splits: Mapping[str, int]) -> dict[str, Any]:
    told = [
        {"name": there, "num_bytes": _num_bytes(out, split), "num_examples": splits[split]}
        for there, split in parts.items()
    ]
    return {"config_name": name, "splits": told}


def size_category(samples: int) -> str:
    """Hugging Face's word for a number of samples: `n<1K`, `1K<n<10K`, … `n>1T`."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    place = next((place for place in range(len(names)) if samples < 1_000 * 10**place), None)
    if place is None:
        return "n>1T"
    return "n<1K" if place == 0 else f"{names[place - 1]}<n<{names[place]}"


def _num_bytes(out: Path, split: str) -> int:
    return sum(path.stat().st_size for path in (out / "shards").glob(f"{split}-*.tar"))


# --- the text --------------------------------------------------------------------------------------------------------


def _head(figures: Mapping[str, Any]) -> str:
    rows, kept, dropped = figures["rows"], figures["kept"], figures["dropped"]
    return (
        f"# {markdown(figures['title'])}\n\n"
        "Image–caption pairs from the web, curated with [cliptailor](https://pypi.org/project/cliptailor/). "
        f"The list had {count(rows)} rows; {count(kept)} were kept ({share(kept, rows)}), and each of the "
        f"{count(dropped)} others has its reason in `ledger.parquet`. `report.html` shows all of it with pictures."
    )


def _splits(out: Path, figures: Mapping[str, Any]) -> str:
    rows = [
        [f"`{split}`", count(number), size(_num_bytes(out, split)), f"`shards/{split}-*.tar`"]
        for split, number in figures["splits"].items()
        if number
    ]
    text = "Rows of one duplicate group or one URL are never in different splits. "
    if figures["splits"].get("retain"):
        text += "`retain` holds general pairs of the same crawl, off this topic: to measure and prevent forgetting."
    layout = (
        "Each sample is `KEY.jpg` (or .png, .webp, .gif), `KEY.txt` (the caption) and `KEY.json` (the facts), adjacent "
        "in a tar, as webdataset and open_clip read it; the Parquet beside each tar has the same facts in columns, and "
        "where each member's bytes lie."
    )
    return "## Splits\n\n" + _table(["split", "pairs", "size", "files"], rows) + f"\n\n{text.strip()}\n\n{layout}"


def retained(step: Mapping[str, Any]) -> str:
    """Of a step in the funnel, a note of how many rows it moved into the split retain; may be empty."""
    return f"→ retain {count(step['retained'])}" if step["retained"] else ""


def _funnel(figures: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{step['stage']} · {markdown(step['step'])}",
            markdown(clip(step["what"])),
            f"{count(step['dropped'])} {retained(step)}".strip(),
            count(step["left"]),
        ]
        for step in figures["funnel"]
    ]
    reasons = [[f"`{r['reason']}`", r["definition"], count(r["dropped"])] for r in _by_reason(figures["reasons"])]
    return (
        "## How it was filtered\n\n"
        + _table(["step", "what", "dropped", "left"], rows)
        + "\n\n"
        + _table(["reason", "meaning", "rows"], reasons)
    )


def _by_reason(reasons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    totals: dict[str, dict[str, Any]] = {}
    for entry in reasons:
        total = totals.setdefault(entry["reason"], {**entry, "dropped": 0})
        total["dropped"] += entry["dropped"]
    return sorted(totals.values(), key=lambda total: (-total["dropped"], total["reason"]))


def _sources(figures: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The list, the hosts most pairs come from, and the licences that the list names."""
    name = str(config.get("urls") or "").rstrip("/").rpartition("/")[2]
    text = f"The list{f' {code(name)}' if name else ''} named images on {count(figures['hosts']['hosts'])} hosts."
    hosts = [
        [code(host["host"]), count(host["rows"]), count(host["images"]), count(host["kept"])]
        for host in figures["hosts"]["top"][:10]
    ]
    parts = ["## Sources", text]
    if hosts:
        parts.append(_table(["host", "asked for", "came", "kept"], hosts))
    for column, values in figures["licences"].items():
        lines = [[markdown(clip(v["licence"])) if v["licence"] else "(none given)", count(v["pairs"])] for v in values]
        parts.append(
            f"The list's column {code(column)} gives these licences; nobody checked them.\n\n"
            + _table(["licence", "pairs"], lines)
        )
    return "\n\n".join(parts)


def _how(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    filters = {"filters": config.get("filters") or []}
    written = visible(yaml.safe_dump(filters, sort_keys=False, allow_unicode=True)).strip()
    # A fence longer than any in the text cannot be closed by it.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", written)), default=0))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"## How it was made\n\nFingerprint `{facts['fingerprint']}`, seed {facts['seed']}, by {versions}. "
        "`manifest.json` has the configuration and the sha256 of each file; `report.json` has every figure with the "
        f"SQL that counts it.\n\n{fence}yaml\n{written}\n{fence}"
    )


def _manners(figures: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """How the sites were treated that the images come from."""
    fetch = config.get("fetch") or {}
    if fetch.get("engine") == "img2dataset":
        text = "Images were downloaded by img2dataset, which asks no robots.txt and keeps no limit per host. "
        heeded = [name for name in OPT_OUTS if name != "robots.txt"]
    else:
        rate = fetch.get("per_host_rate")
        text = f"No host was asked for more than {fetch.get('per_host')} images at once"
        text += f" or {rate:g} a second. " if rate else ". "
        heeded = list(OPT_OUTS)
    ignored = [name for name in heeded if name in (fetch.get("ignore_opt_outs") or [])]
    heeded = [name for name in heeded if name not in ignored]
    text += f"Opt-outs that were heeded: {', '.join(heeded) or 'none'}. "
    if ignored:
        text += f"**By choice of whoever made this dataset these were ignored: {', '.join(ignored)}.**"
    contact = fetch.get("contact")
    text += f"\n\nThe requests named as contact: {markdown(str(contact)) if contact else 'nobody'}."
    if figures["refusals"]:
        lines = [[f"`{r['reason']}`", r["definition"], count(r["rows"])] for r in figures["refusals"]]
        text += "\n\nNot fetched because of it:\n\n" + _table(["refusal", "meaning", "rows"], lines)
    if saved := [step for step in figures["saved"] if step["requests"]]:
        told = ", ".join(f"{count(step['requests'])} by {markdown(step['step'])}" for step in saved)
        text += f"\n\nFilters that ran before the download saved the sites requests: {told}."
    return f"## How the sites were treated\n\n{text.strip()}"


def _yours(path: Path) -> str:
    """What stands between the two marks of the card that is there, or the first text."""
    if path.exists():
        _, begin, rest = path.read_text("utf-8", errors="replace").partition(BEGIN)
        yours, end, _ = rest.partition(END)
        if begin and end:
            return yours
    return YOURS


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(text: str) -> str:
    """Text as a code span that it cannot close, in a table's cell too."""
    plain = " ".join(visible(text).split()).replace("`", "'").replace("|", "/")
    return f"`{html.escape(plain, quote=False) if '<' in plain else plain}`"


def markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, in a table's cell too."""
    escaped = html.escape(" ".join(visible(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", escaped)
