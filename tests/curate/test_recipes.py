"""Each preset, by its name, on a small crawl with the worst a list can hold: each row ends as it should."""

import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.ledger import Reason
from tests.curate.fetched import tiny_clip
from tests.curate.fetching import jpeg
from tests.webserver import WebServer, page

GOOD = 130
# Which step drops which rows; None: kept. The first word of a URL's path says what a row is.
FATES: dict[str, dict[str, set[str | None]]] = {
    "default": {
        "good": {None}, "german": {None}, "rare": {None}, "word": {"caption_length"}, "plate": {"a_caption"},
        "small": {"min_side"}, "strip": {"min_side"}, "copy": {"exact", None},
    },
    "wit": {
        "good": {None}, "german": {"balanced"}, "rare": {"balanced"}, "word": {None}, "plate": {"balanced"},
        "small": {None}, "strip": {None}, "copy": {"exact", None},
    },
    "metaclip": {
        "good": {None}, "german": {"english"}, "rare": {"balanced"}, "word": {"english"},
        "small": {None}, "strip": {None}, "copy": {"exact", None},
    },
    "datacomp-basic": {
        "good": {None}, "german": {"english"}, "rare": {None}, "word": {"caption_words"},
        "small": {"image_size"}, "strip": {"aspect_ratio"}, "copy": {None},
    },
    "datacomp-clip-score": {},
}  # fmt: skip
CAPTIONS = {
    "german": "Ein Fahrrad lehnt am Abend an einer Mauer in der Altstadt",
    "rare": "The weather here was wonderful this whole summer and everybody enjoyed themselves",
    "word": "dog",
    "plate": "click to enlarge",
}
ENGLISH = "A photo of a brown dog playing in the park, number"
SIZES = {"small": (150, 150), "strip": (800, 220)}
ODD_CAPTIONS = [
    "",
    None,
    " \t ",
    "\0",
    "a dog\0in a park",
    "🐱🐶🎉",
    "x" * 100_000,
    "dog " * 20_000,
    "\u202eolleh",
    "'; --",
]
ODD_URLS = [
    *("", None, " ", "http://", "//a/b", "ftp://127.0.0.1/a.jpg", "file:///etc/passwd", "data:,x", "\0", "http://[::1"),
    *("http://127.0.0.1:1/a.jpg", "http://user:secret@127.0.0.1:1/b.jpg", "http://192.168.0.1/x.jpg", "🐱", "x" * 5000),
]


@pytest.fixture(scope="module")
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        for number in range(GOOD):
            server.add(f"/good/{number}.jpg", page(jpeg(number, size=(260, 220))))
        for place, kind in enumerate(("german", "rare", "word", "plate", "small", "strip")):
            for number in range(3):
                picture = jpeg(1000 * (place + 1) + number, size=SIZES.get(kind, (260, 220)))
                server.add(f"/{kind}/{number}.jpg", page(picture))
        for number in range(4):
            server.add(f"/copy/{number}.jpg", page(jpeg(9000 + number // 2, size=(260, 220))))
        for number in range(len(ODD_CAPTIONS)):
            server.add(f"/odd/{number}.jpg", page(jpeg(5000 + number, size=(260, 220))))
        server.add("/odd/html.jpg", page(b"<html>not found</html>", type_="text/html"))
        server.add("/odd/cut.jpg", page(jpeg(6000, size=(260, 220))[:900]))
        server.add("/odd/nothing.jpg", page(b""))
        yield server


def crawl(web: WebServer) -> list[tuple[str | None, str | None]]:
    """URLs and captions: all that is served, and what is none, shuffled."""
    rows: list[tuple[str | None, str | None]] = []
    for path in web.pages:
        kind, name = path.strip("/").split("/")
        number = Path(name).stem
        if kind == "odd":
            caption = ODD_CAPTIONS[int(number)] if number.isdigit() else f"{ENGLISH} {number}"
        else:
            caption = CAPTIONS.get(kind, f"{ENGLISH} {number}")
        rows.append((web.url(path), caption))
    rows += [rows[0], rows[0], (web.url("/copy/0.jpg"), f"{ENGLISH} nought")]
    rows += [(url, caption) for url in ODD_URLS for caption in ("a dog in the park", ODD_CAPTIONS[4])]
    rows.append((web.url("/odd/gone.jpg"), ENGLISH))
    random.Random(0).shuffle(rows)
    return rows


def build(rows: list[tuple[str | None, str | None]], out: Path, preset: str, *options: str) -> str:
    urls, captions = zip(*rows, strict=True)
    listed = out.parent / f"{out.name}.parquet"
    pq.write_table(pa.table({"url": pa.array(urls, pa.string()), "caption": pa.array(captions, pa.string())}), listed)
    words = [sys.executable, "-m", "curate.cli", "build", "--config", preset, "--urls", str(listed), "--out", str(out)]
    words += ["--fetch.allow_addresses", '["127.0.0.0/8"]', "--fetch.retries", "0", "--fetch.processes", "1"]
    words += ["--plan.shard_size", "70", *options]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False, cwd=out.parent)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    return ran.stdout


def check_conserved(out: Path, count: int) -> pd.DataFrame:
    """Rows in = kept + dropped, each once, for a known reason; and what is kept is what is packed."""
    ledger = pd.read_parquet(out / "ledger.parquet")
    assert list(ledger.row) == list(range(count))
    assert ledger.key.is_unique
    dropped = ledger[~ledger.kept]
    assert ledger.kept.sum() + len(dropped) == count
    assert set(dropped.reason) <= {reason.value for reason in Reason}
    assert dropped.step.notna().all()
    packed = pd.concat(pd.read_parquet(path, columns=["key"]) for path in (out / "shards").glob("*.parquet"))
    assert sorted(packed.key) == sorted(ledger[ledger.kept].key)
    return ledger


@pytest.mark.parametrize("preset", FATES)
def test_a_preset_keeps_what_its_source_would_and_accounts_for_every_row(
    web: WebServer, tmp_path: Path, preset: str
) -> None:
    rows = crawl(web)
    options: list[str] = []
    if preset == "datacomp-clip-score":
        clip = tiny_clip(tmp_path)
        options = ["--measure.clip.name", clip.name, "--measure.clip.pretrained", str(clip.pretrained)]
    shown = build(rows, tmp_path / "out", preset, *options)
    ledger = check_conserved(tmp_path / "out", len(rows))
    assert f"{len(rows):,} rows in = {ledger.kept.sum():,} kept + {(~ledger.kept).sum():,} dropped" in shown
    fates: dict[str, set[Any]] = defaultdict(set)
    for line in ledger.itertuples():
        if line.url.startswith(web.url("/")) and line.reason != "duplicate_row":
            fates[line.url.removeprefix(web.url("/")).split("/")[0]].add(None if line.kept else line.step)
    for kind, expected in FATES[preset].items():
        assert fates[kind] == expected, kind
    copies = ledger[ledger.url.str.startswith(web.url("/copy/"))]
    assert (copies.step == "exact").sum() == (0 if preset == "datacomp-basic" else 3)
    if preset == "datacomp-clip-score":
        judged = ledger[ledger.kept | (ledger.step == "clip_score")]
        assert ledger.kept.sum() == -(-len(judged) * 3 // 10)
        assert (ledger.step == "clip_score").sum() > 80


def test_the_order_of_the_list_changes_nothing_that_is_kept(web: WebServer, tmp_path: Path) -> None:
    rows = crawl(web)
    other = rows[::-1]
    told = []
    for name, listed in (("a", rows), ("b", other)):
        build(listed, tmp_path / name, "metaclip", "--pack.test", "0.2")
        ledger = check_conserved(tmp_path / name, len(rows))
        told.append(ledger[ledger.kept].set_index("key").drop(columns="row").sort_index())
    pd.testing.assert_frame_equal(*told)


def test_every_preset_has_its_test_and_its_source() -> None:
    folder = Path(__file__).parents[2] / "configs" / "curate"
    shipped = {path.stem: path.read_text() for path in folder.glob("*.yaml") if not path.stem.startswith("demo")}
    assert FATES.keys() <= shipped.keys()
    for name in FATES:
        assert "et al. 20" in shipped[name], name
