"""The demo's parts; `make demo` itself runs the whole road and fails if a kind of junk is not under its own reason."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import fetch, plan
from curate.build import effective
from curate.config import BuildConfig, FetchConfig
from curate.filters import Where
from curate.options import read_config
from demo.corpus import DIGIT_WORDS, digits, emoji, png
from demo.junk import EXPECTED, KEPT, Site, examples, make_site, url
from demo.web import serving
from finetune.config import FitConfig

# What needs a CLIP or a whole dataset to be found out is left to `make demo`.
BY_FETCH = {kind for kind, fates in EXPECTED.items() if all(stage in ("plan", "fetch") for stage, _ in fates)}


@pytest.fixture(scope="module")
def site() -> Site:
    return make_site()


def test_every_kind_of_junk_in_the_list_has_its_expected_reason(site: Site) -> None:
    kinds = {row.kind for row in site.domain}
    assert kinds == {*EXPECTED, *KEPT}


def test_digits_to_test_on_are_never_among_those_to_train_on_or_the_examples() -> None:
    train, test = digits()
    assert len(test) == 450
    assert {picture.name for picture in test} == set(DIGIT_WORDS)
    test_bytes = {png(picture.image) for picture in test}
    assert not test_bytes & {png(picture.image) for picture in [*train, *examples()]}


def test_emoji_have_names_of_their_own() -> None:
    pictures = emoji()
    assert len(pictures) > 1400
    assert len({picture.caption for picture in pictures}) == len(pictures)
    assert all(len(picture.caption.split()) > 1 for picture in pictures)


def test_the_web_misbehaves_as_the_list_says_and_the_fetch_tells_each(site: Site, tmp_path: Path) -> None:
    rows, seen = [], Counter[str]()
    for row in site.domain:
        seen[row.kind] += 1
        if row.kind in {*BY_FETCH, "digit", "digit, busy server"} and seen[row.kind] <= 50:
            rows.append(row)
    with serving(site.bodies, []) as web:
        urls = [url(row, web.port, web.closed_port) for row in rows]
        pq.write_table(pa.table({"url": urls, "caption": [row.caption for row in rows]}), tmp_path / "list.parquet")
        recipe = read_config(Path("configs/curate/demo.yaml"), BuildConfig)
        wordy = [Where(name="caption_length", expression=str(recipe.filters[0]["where"]))]
        plan.run(str(tmp_path / "list.parquet"), tmp_path, recipe.plan, wordy)
        settings = {**effective(recipe)["fetch"], "processes": 1, "read_timeout_s": 1.0, "total_timeout_s": 3.0}
        allowed = [f"127.0.0.0/8:{web.port}", f"127.0.0.0/8:{web.closed_port}"]
        fetch.run(tmp_path, FetchConfig(**{**settings, "allow_addresses": allowed}))
        hits = web.hits()
    fates = {
        row["row"]: ("plan", row["reason"]) for row in pq.read_table(tmp_path / "plan/dropped.parquet").to_pylist()
    }
    for row in pq.read_table(tmp_path / "raw" / "00000.parquet").to_pylist():
        fates[row["row"]] = ("fetch", row["reason"]) if row["reason"] else ("fetched", "")
    assert len(fates) == len(rows)
    wrong = [
        (row.kind, fates[number])
        for number, row in enumerate(rows)
        if fates[number] not in EXPECTED.get(row.kind, {("fetched", "")})
    ]
    assert wrong == []
    assert hits["forbidden"] == hits["private"] == 0
    assert hits["internal"] > 0


def test_the_demos_configurations_are_read() -> None:
    adapt = read_config(Path("configs/demo.yaml"), FitConfig)
    pretrain = read_config(Path("configs/finetune/demo_pretrain.yaml"), FitConfig)
    assert (pretrain.model.clip.pretrained, adapt.model.adapter.kind) == (None, "lora")
    assert adapt.data.replay > 0
