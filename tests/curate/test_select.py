import shutil
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from curate import select
from curate.config import MeasureConfig
from curate.database import seeded
from curate.errors import ConfigError, InputError
from curate.expressions import RESERVED
from curate.filters import parse_steps
from curate.images import phash
from tests.curate.fetched import (
    ENGINE,
    PackConfig,
    dropped,
    encoded,
    fetched,
    kept,
    ledger,
    noise,
    pack_rows,
    row,
    select_rows,
)


def rows_of(count, **facts):
    return [
        row(number, noise(number), **{name: value(number) for name, value in facts.items()}) for number in range(count)
    ]


def step(name, **operator):
    return {"name": name, **operator}


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_every_row_is_in_the_ledger_once_with_the_first_step_that_dropped_it(tmp_path):
    rows = rows_of(12, entropy=float, luma_std=lambda n: 3.0 if n == 5 else 9.0)
    rows += [row(20), {**row(21), "url": ""}, {**row(22), "url": rows[0]["url"], "caption": rows[0]["caption"]}]
    rows[3] |= {"rgb": noise(2), "content": encoded(noise(2))}
    rows[4] |= {"caption": ""}
    filters = [
        step("words", where="caption_words > 0"),
        step("flat", where="luma_std > 4 AND width > 10"),
        step("exact", dedup={"by": "sha256", "keep": "entropy DESC"}),
        step("flat_again", where="luma_std > 5"),
        step("best", top={"by": "entropy", "count": 6}),
        step("some", sample={"count": 4}),
    ]
    out = fetched(tmp_path / "out", rows, filters)
    result = select_rows(out, filters)
    lines = ledger(out)
    assert [line["row"] for line in lines] == list(range(15))
    assert len({line["key"] for line in lines}) == 15
    fates = {line["row"]: (line["stage"], line["step"], line["reason"], line["value"]) for line in lines}
    assert fates[4] == ("plan", "words", "where", "caption_words=0")
    assert fates[5] == ("select", "flat", "where", "luma_std=3.0, width=64")
    assert fates[2][:3] == ("select", "exact", "dedup")
    assert fates[12] == ("fetch", "fetch", "http_status", "404")
    assert fates[13] == ("plan", "plan", "empty_url", None)
    assert fates[14] == ("plan", "plan", "duplicate_row", None)
    assert [fates[n][3] for n in (0, 1, 3)] == ["0 (cut 6)", "1 (cut 6)", "3 (cut 6)"]
    assert [fates[n] for n in kept(out)] == [(None, None, None, None)] * 4
    assert lines[2]["twin"] == lines[3]["key"]
    assert lines[14]["twin"] == lines[0]["key"]
    assert sum(result.kept.values()) + sum(result.dropped.values()) == 15
    assert result.kept == {"train": 4, "val": 0, "test": 0, "retain": 0}
    assert result.dropped["select", "best", "top"] == 3


def test_the_ledger_has_the_columns_of_its_schema(tmp_path):
    from curate.ledger import Reason, ledger_schema

    out = fetched(tmp_path / "out", [*rows_of(3), row(3)])
    select_rows(out, [step("one", sample={"count": 1})])
    table = pq.read_table(out / "ledger.parquet")
    assert table.schema.remove_metadata() == ledger_schema()
    assert {Reason(reason) for reason in table["reason"].to_pylist() if reason} == {Reason.SAMPLE, Reason.HTTP_STATUS}


def test_a_list_of_which_plan_drops_all_still_has_its_ledger(tmp_path):
    out = fetched(tmp_path / "out", [{**row(0), "url": ""}, {**row(1), "url": "x"}])
    result = select_rows(out, [step("width", where="width > 3"), step("exact", dedup={})])
    assert result.kept == dict.fromkeys(result.kept, 0)
    assert result.dropped == {("plan", "plan", "bad_url"): 1, ("plan", "plan", "empty_url"): 1}


def test_without_filters_all_that_came_is_kept(tmp_path):
    out = fetched(tmp_path / "out", [*rows_of(5), row(5)])
    assert select_rows(out, []).kept["train"] == 5


def test_an_unchanged_selection_is_left_alone_and_any_change_is_seen(tmp_path):
    out = fetched(tmp_path / "out", rows_of(6))
    filters = [step("half", sample={"fraction": 0.5})]
    first = select_rows(out, filters)
    stamp = (out / "ledger.parquet").stat().st_mtime_ns
    again = select_rows(out, filters)
    assert (again.made, again.kept, again.dropped) == (False, first.kept, first.dropped)
    assert (out / "ledger.parquet").stat().st_mtime_ns == stamp
    assert select_rows(out, filters, seed=1).made
    assert select_rows(out, filters, seed=1, val=0.5).made
    assert select_rows(out, [step("half", sample={"fraction": 0.6})], seed=1, val=0.5).made


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_inputs_give_the_same_bytes_whatever_the_threads(tmp_path, threads):
    rows = rows_of(30, entropy=lambda n: float(n % 7))
    out = fetched(tmp_path / "out", rows)
    filters = [step("near", dedup={"by": "phash", "distance": 6}), step("top", top={"by": "entropy", "fraction": 0.6})]
    select_rows(out, filters, val=0.3)
    expected = (out / "ledger.parquet").read_bytes()
    (out / "ledger.parquet").unlink()
    engine = type(ENGINE)(memory_limit="300MB", threads=threads)
    select.run(out, parse_steps(filters), engine, PackConfig(val=0.3, test=0), MeasureConfig(text=False), 0)
    assert (out / "ledger.parquet").read_bytes() == expected


def test_too_little_memory_is_told_with_the_key(tmp_path):
    out = fetched(tmp_path / "out", rows_of(50))
    with pytest.raises(ConfigError, match=r"select.memory_limit 1MB: not enough.*raise it"):
        select.run(out, [], type(ENGINE)(memory_limit="1MB", threads=1), PackConfig(), MeasureConfig(text=False), 0)


# --- where -----------------------------------------------------------------------------------------------------------


def test_a_filter_can_name_what_plan_and_fetch_know_and_the_lists_own_columns(tmp_path):
    out = fetched(tmp_path / "out", rows_of(4))
    filters = [
        step("one", dedup={"by": "sha256"}),
        step("all", where="width >= 64 AND list_row::INT < 3 AND url_host LIKE 'host%' AND format IS NULL"),
    ]
    select_rows(out, filters)
    assert kept(out) == [0, 1, 2]
    assert dropped(out, "all") == {3: "width=64, list_row=3, url_host=host0.test, format=NULL"}


# What select, pack and plan call their own columns and tables.
OURS = (
    "a alive b bucket_ captions concept counted cuts d distance drops duplicate_group found given grouped h is_kept "
    "kept_row kept_row_ key_ known label least linked listed lot m members name name_ named number numbered num_kept "
    "num_rows numbers order_ part placed places planned rank rarest_ rows score taken test turn twice twin_ value_ "
    "words"
)


def test_columns_of_the_list_may_have_the_names_that_the_queries_use(tmp_path):
    names = OURS.split()
    rows = [{**row, **dict.fromkeys(names, "x")} for row in rows_of(8)]
    rows[1] |= {"rgb": noise(0)}
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.png").write_bytes(encoded(noise(5)))
    theirs = [f"list_{name}" if name in RESERVED else name for name in names]
    every = ", ".join(f'"{name}"' for name in theirs)
    filters = [
        step("all", where=f"concat({every}) <> '' AND width > 0"),
        step("near", dedup={"by": "phash", "distance": 2, "keep": every}),
        step("leak", decontaminate={"against": str(tmp_path / "test")}),
        step("exact", dedup={"by": "sha256", "keep": every}),
        step("words", balance={"concepts": ["caption"], "cap": 100}),
        *(step(f"top {name}", top={"by": f'length("{name}")', "count": 7, "per": f'"{name}"'}) for name in theirs),
        *(step(f"some {name}", sample={"fraction": 1.0, "per": f'"{name}"'}) for name in theirs),
    ]
    out = fetched(tmp_path / "out", rows, filters)
    select_rows(out, filters)
    assert ([*dropped(out, "near").values()], dropped(out, "leak")) == (["distance=0"], {5: "sha256"})
    for config in ({}, {"shard_bytes": 10_000_000}):
        assert pack_rows(out, **config).samples["train"] == 6


def test_an_unknown_column_is_told_with_the_nearest(tmp_path):
    out = fetched(tmp_path / "out", rows_of(2))
    with pytest.raises(ConfigError, match=r"filters 'w': no column 'widht'\. Did you mean 'width'\?"):
        select_rows(out, [step("w", where="widht > 3")])
    with pytest.raises(ConfigError, match=r"filters 't': needs clip_score, .* set measure.clip.name"):
        select_rows(out, [step("t", top={"by": "clip_score", "fraction": 0.5})])
    assert not (out / "ledger.parquet").exists()


def test_stages_that_have_not_run_to_the_end_are_named(tmp_path):
    out = fetched(tmp_path / "out", rows_of(30))
    with pytest.raises(InputError, match="run `curate plan` first"):
        select_rows(tmp_path / "nothing", [])
    (out / "raw" / "00001.parquet").rename(tmp_path / "aside")
    with pytest.raises(InputError, match="2 of 3 shards; run `curate fetch` first"):
        select_rows(out, [])
    shutil.copy(out / "raw" / "00002.parquet", out / "raw" / "00001.parquet")
    with pytest.raises(InputError, match=r"lacks .* of the candidates"):
        select_rows(out, [])


# --- dedup -----------------------------------------------------------------------------------------------------------


def test_of_equal_files_the_first_of_the_order_stays_and_ties_go_to_the_smaller_key(tmp_path):
    rows = rows_of(6, original_width=lambda n: (100, 300, 200, 50, 50, 50)[n])
    for number in range(6):
        rows[number]["rgb"] = noise(0 if number < 3 else 1)
    out = fetched(tmp_path / "out", rows)
    select_rows(out, [step("exact", dedup={"by": "sha256", "keep": "original_width DESC"})])
    lines = ledger(out)
    smallest = min(lines[3:], key=lambda line: line["key"])
    assert kept(out) == sorted([1, smallest["row"]])
    assert [line["twin"] for line in lines[:3]] == [lines[1]["key"], None, lines[1]["key"]]
    assert {line["duplicate_group"] for line in lines[:3]} == {lines[1]["key"]}
    assert {line["duplicate_group"] for line in lines[3:]} == {smallest["key"]}
    assert lines[0]["value"].startswith("sha256=")


def test_dedup_by_any_column_leaves_rows_without_a_value_alone(tmp_path):
    out = fetched(tmp_path / "out", rows_of(5, format=lambda n: (None, None, "png", "png", "gif")[n]))
    select_rows(out, [step("formats", dedup={"by": "format", "keep": "row"})])
    assert kept(out) == [0, 1, 2, 4]
    assert dropped(out, "formats") == {3: "format=png"}


def test_near_duplicates_are_the_components_of_comparing_all_with_all(tmp_path):
    random = np.random.default_rng(5)
    hashes = [int(h) for h in random.integers(-(2**63), 2**63, 20)]
    for parent in range(60):  # chains: each new hash a few bits from an earlier one
        flips = sum(1 << int(bit) for bit in random.choice(63, int(random.integers(1, 9)), replace=False))
        hashes.append(hashes[parent] ^ flips)
    out = fetched(tmp_path / "out", rows_of(80, phash=lambda n: hashes[n], entropy=lambda n: float(n * 37 % 11)))
    select_rows(out, [step("near", dedup={"by": "phash", "distance": 5, "keep": "entropy DESC"})])

    lines = ledger(out)
    label = list(range(80))
    near = [(a, b) for a in range(80) for b in range(a) if ((hashes[a] ^ hashes[b]) & (2**64 - 1)).bit_count() <= 5]
    for _ in range(80):
        for a, b in near:
            label[a] = label[b] = min(label[a], label[b])
    expected = {}
    for number in sorted(range(80), key=lambda n: (-(n * 37 % 11), lines[n]["key"])):
        expected.setdefault(label[number], number)
    assert kept(out) == sorted(expected.values())
    assert 20 < len(expected) < 70
    for number, line in enumerate(lines):
        first = expected[label[number]]
        assert line["duplicate_group"] == lines[first]["key"]
        if not line["kept"]:
            bits = ((hashes[number] ^ hashes[first]) & (2**64 - 1)).bit_count()
            assert (line["twin"], line["value"]) == (lines[first]["key"], f"distance={bits}")


def test_a_rescaled_and_recompressed_copy_is_a_near_duplicate_and_another_picture_is_not(tmp_path):
    from PIL import Image

    picture = np.asarray(Image.fromarray(noise(1, 96)).resize((96, 96), Image.Resampling.BICUBIC))
    copy = np.asarray(Image.fromarray(picture).resize((70, 70)))
    out = fetched(
        tmp_path / "out", [row(0, picture), row(1, copy, content=encoded(copy, "JPEG", quality=60)), row(2, noise(2))]
    )
    select_rows(out, [step("near", dedup={"by": "phash", "distance": 6, "keep": "width * height DESC"})])
    assert kept(out) == [0, 2]


# --- top and sample --------------------------------------------------------------------------------------------------


def test_top_keeps_the_highest_share_rounded_up_and_shows_the_cut(tmp_path):
    values = [3.0, 1.0, 2.0, None, float("nan"), 2.0, 5.0]
    out = fetched(tmp_path / "out", rows_of(7, entropy=lambda n: values[n]))
    select_rows(out, [step("best", top={"by": "entropy * 2", "fraction": 0.4})])
    lines = ledger(out)
    tie = min((2, 5), key=lambda n: lines[n]["key"])
    assert kept(out) == sorted([0, 6, tie])
    loser = {2: 5, 5: 2}[tie]
    assert dropped(out, "best") == {1: "2 (cut 4)", 3: "NULL (cut 4)", 4: "NULL (cut 4)", loser: "4 (cut 4)"}


def test_a_row_without_a_value_is_not_among_the_best_even_if_there_is_room(tmp_path):
    out = fetched(tmp_path / "out", rows_of(3, entropy=lambda n: (1.0, None, 2.0)[n]))
    select_rows(out, [step("best", top={"by": "entropy", "count": 5})])
    assert kept(out) == [0, 2]


def test_top_of_what_is_no_number_is_told(tmp_path):
    out = fetched(tmp_path / "out", rows_of(2))
    with pytest.raises(ConfigError, match="filters 'best': Conversion Error"):
        select_rows(out, [step("best", top={"by": "caption", "count": 1})])


def test_a_fraction_is_rounded_up_from_what_it_is_and_not_from_its_floating_point(tmp_path):
    out = fetched(tmp_path / "out", rows_of(100, entropy=float))
    for fraction, count in (
        (0.07, 7),
        (0.14, 14),
        (0.28, 28),
        (0.55, 55),
        (0.29, 29),
        (0.551, 56),
        (1e-9, 1),
        (1, 100),
    ):
        for operator in (
            {"top": {"by": "entropy", "fraction": fraction}},
            {"sample": {"fraction": fraction}},
            {"sample": {"fraction": fraction, "per": "status"}},
        ):
            assert select_rows(out, [step("some", **operator)]).kept["train"] == count


def test_a_sample_depends_on_the_seed_and_the_key_and_not_on_what_else_is_there(tmp_path):
    out = fetched(tmp_path / "a", rows_of(40), shard_size=40)
    select_rows(out, [step("some", sample={"count": 10})])
    first = set(kept(out))
    assert len(first) == 10
    select_rows(out, [step("some", sample={"count": 10})], seed=1)
    assert len(first & set(kept(out))) < 10
    select_rows(out, [step("less", where="row < 30"), step("some", sample={"count": 10})])
    assert {number for number in first if number < 30} <= set(kept(out))
    select_rows(out, [step("some", sample={"fraction": 0.26})])
    assert first < set(kept(out))
    assert len(kept(out)) == 11


def test_seeded_orders_of_different_purposes_are_independent():
    assert len({seeded(seed, purpose) for seed in (0, 1) for purpose in ("sample", "split", "order")}) == 6


# --- splits ----------------------------------------------------------------------------------------------------------


def test_rows_of_one_url_one_file_or_one_cluster_are_never_parted(tmp_path):
    rows = [row(n, noise(100 + n // 2 if 20 <= n < 40 else n)) for n in range(60)]
    for number in range(20):
        rows[number]["url"] = f"http://a.test/{number // 4}"
    out = fetched(tmp_path / "out", rows, shard_size=60)
    select_rows(out, [], val=0.3, test=0.3)
    lines = ledger(out)
    splits = {}
    for line in lines:
        splits.setdefault(line["duplicate_group"], set()).add(line["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert Counter(len(found) for found in _members(lines).values()) == {4: 5, 2: 10, 1: 20}
    assert len({line["split"] for line in lines}) == 3
    by_key = {line["key"]: line for line in lines}
    assert all(by_key[line["duplicate_group"]]["kept"] for line in lines)


def _members(lines):
    members = {}
    for line in lines:
        members.setdefault(line["duplicate_group"], []).append(line["row"])
    return members


def test_a_dropped_copy_joins_the_groups_of_its_twin_and_of_its_url(tmp_path):
    """Kept 0 — dropped 1, its copy — kept 2, with the URL of 1: all one group."""
    rows = [row(0, noise(0), entropy=2.0), row(1, noise(0), entropy=1.0), row(2, noise(2)), row(3, noise(3))]
    rows[2]["url"] = rows[1]["url"]
    out = fetched(tmp_path / "out", rows)
    select_rows(out, [step("exact", dedup={"by": "sha256", "keep": "entropy DESC"})], val=0.4, test=0.3)
    lines = ledger(out)
    assert kept(out) == [0, 2, 3]
    assert len({line["duplicate_group"] for line in lines[:3]}) == 1
    assert lines[0]["split"] == lines[2]["split"]
    assert lines[3]["duplicate_group"] == lines[3]["key"]


def test_splits_have_their_shares_and_a_row_stays_in_its_split_when_the_list_grows(tmp_path):
    pixel = noise(0)
    rows = [row(n, pixel, sha256=str(n)) for n in range(1_200)]
    out = fetched(tmp_path / "out", rows, shard_size=1_200)
    select_rows(out, [], val=0.2, test=0.1)
    counts = Counter(line["split"] for line in ledger(out))
    assert abs(counts["val"] - 240) < 50
    assert abs(counts["test"] - 120) < 40
    before = {line["key"]: line["split"] for line in ledger(out)}
    select_rows(out, [step("fewer", where="row < 600")], val=0.2, test=0.1)
    assert all(before[line["key"]] == line["split"] for line in ledger(out) if line["kept"])


def test_phashes_of_the_fixture_are_far_apart():
    hashes = [phash(noise(number)) for number in range(40)]
    distances = [((a ^ b) & (2**64 - 1)).bit_count() for n, a in enumerate(hashes) for b in hashes[:n]]
    assert min(distances) > 12


def test_rows_with_equal_values_of_several_columns_are_duplicates(tmp_path):
    pairs = [("a", 1), ("a", 2), ("a", 1), ("b", 1), (None, 1), (None, 1), ("a", 1)]
    rows = [
        row(n, noise(n), shop=shop or "", width_class=str(size), entropy=float(n))
        for n, (shop, size) in enumerate(pairs)
    ]
    filters = [step("same", dedup={"by": ["shop", "width_class"], "keep": "entropy DESC"})]
    out = fetched(tmp_path / "out", rows, filters)
    select_rows(out, filters)
    lines = {line["row"]: line for line in ledger(out)}
    given = {n: lines[n]["value"] for n in dropped(out, "same")}
    assert {n: given[n] for n in (0, 2)} == dict.fromkeys((0, 2), "shop=a, width_class=1")
    assert given.keys() - {0, 2, 4} == set()  # an empty cell of a CSV may be a value or none
    assert {lines[n]["twin"] for n in (0, 2)} == {lines[6]["key"]}
