"""Balance, top and sample against the plain algorithms: one row after the other, in Python."""

import math
from collections import Counter, defaultdict
from hashlib import md5

import numpy as np
import pytest

from curate import plan
from curate.config import PlanConfig
from curate.errors import ConfigError
from curate.filters import parse_steps
from tests.curate.fetched import dropped, fetched, kept, ledger, noise, row, select_rows
from tests.curate.naive_concepts import counted, held

CONCEPTS = ["cat", "dog", "red cat", "zebra", "Dog", "bus", "unseen"]
PICTURE = noise(0, 8)


def step(name, **operator):
    return {"name": name, **operator}


def captioned(count):
    """Rows whose captions hold none, one or more of CONCEPTS, from very frequent to rare."""
    rng = np.random.default_rng(3)
    words = ["cat", "dog", "red", "zebra", "bus", "sky"]
    share = [0.35, 0.25, 0.15, 0.02, 0.08, 0.15]
    return [
        row(number, PICTURE, caption=f"{' '.join(rng.choice(words, rng.integers(0, 4), p=share))} {number}")
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def rows():
    return captioned(400)


@pytest.fixture(scope="module")
def out(tmp_path_factory, rows):
    return fetched(tmp_path_factory.mktemp("balance") / "out", rows, shard_size=150)


def lot(seed, text):
    """The number that `md5_number_upper` gives: the upper half of the digest, read as little-endian."""
    return int.from_bytes(md5(f"{seed} balance {text}".encode()).digest()[:8], "little")


def wit(keys, matches, cap, seed):
    """Rows kept, by going through all once: a row is kept if any of its concepts has room."""
    room = defaultdict(lambda: cap)
    chosen = []
    for number in sorted(
        range(len(keys)), key=lambda n: (md5(f"{seed} balance {keys[n]}".encode()).hexdigest(), keys[n])
    ):
        if any(room[concept] for concept in matches[number]):
            chosen.append(number)
        for concept in matches[number]:
            room[concept] = max(room[concept] - 1, 0)
    return sorted(chosen)


def metaclip(keys, matches, cap, seed):
    """Rows kept by algorithm 1: for each concept of a row a coin of probability min(1, cap / count)."""
    count = counted(matches)
    return [
        number
        for number, found in enumerate(matches)
        if any(lot(seed, f"{keys[number]} {CONCEPTS[c]}") / 2**64 < cap / max(count[c], cap) for c in found)
    ]


def rarest(matches, cap):
    """The ledger's value, were the row dropped."""
    count = counted(matches)
    least = [min(((count[concept], concept) for concept in found), default=None) for found in matches]
    return [f"{CONCEPTS[found[1]]} ({cap} of {found[0]})" if found else "no concept" for found in least]


@pytest.mark.parametrize("match", ["words", "substring"])
@pytest.mark.parametrize(("cap", "seed"), [(1, 0), (20, 0), (20, 1), (60, 7), (10_000, 0)])
@pytest.mark.parametrize(("method", "naive"), [("wit", wit), ("metaclip", metaclip)])
def test_balance_keeps_what_the_papers_algorithm_keeps(out, rows, method, naive, cap, seed, match):
    filters = [step("b", balance={"concepts": CONCEPTS, "cap": cap, "method": method, "match": match})]
    select_rows(out, filters, seed=seed)
    keys = [line["key"] for line in ledger(out)]
    matches = held([row["caption"] for row in rows], CONCEPTS, match)
    expected = naive(keys, matches, cap, seed)
    assert kept(out) == expected
    values = rarest(matches, cap)
    assert dropped(out, "b") == {n: values[n] for n in range(len(rows)) if n not in set(expected)}


def test_no_concept_gets_fewer_pairs_than_it_may_have_and_the_rare_ones_all(out, rows):
    select_rows(out, [step("b", balance={"concepts": CONCEPTS, "cap": 15})])
    matches = held([row["caption"] for row in rows], CONCEPTS)
    before, after = counted(matches), counted([matches[number] for number in kept(out)])
    assert all(after[concept] >= min(15, pairs) for concept, pairs in before.items())
    assert after[CONCEPTS.index("zebra")] == before[CONCEPTS.index("zebra")]
    assert sum(after.values()) < sum(before.values()) / 2


def test_metaclip_keeps_the_expected_number_of_each_concept(tmp_path):
    rows = [row(number, PICTURE, caption=("cat", "dog", "dog")[number % 3]) for number in range(3000)]
    out = fetched(tmp_path / "out", rows, shard_size=3000)
    select_rows(out, [step("b", balance={"concepts": ["cat", "dog"], "cap": 500, "method": "metaclip"})])
    found = Counter(("cat", "dog", "dog")[number % 3] for number in kept(out))
    for concept, pairs in (("cat", 1000), ("dog", 2000)):
        spread = math.sqrt(500 * (1 - 500 / pairs))
        assert abs(found[concept] - 500) < 4 * spread


def test_balance_by_a_file_sees_its_change_and_a_mined_list_its_captions(out, rows, tmp_path):
    path = tmp_path / "concepts.txt"
    path.write_text("cat\nzebra\n")
    filters = [step("b", balance={"concepts": str(path), "cap": 10})]
    assert select_rows(out, filters).made
    assert not select_rows(out, filters).made
    path.write_text("bus\n")
    assert select_rows(out, filters).made
    assert len(kept(out)) == 10
    assert all("bus" in rows[number]["caption"] for number in kept(out))
    mined = {"concepts": "mined", "cap": 5, "min_count": 100}
    select_rows(out, [step("b", balance=mined)])
    frequent = [word for word in ("cat", "dog", "red", "zebra", "bus", "sky") if _holding(rows, word) >= 100]
    assert 0 < len(frequent) < 6
    select_rows(out, [step("mined", balance=mined)])
    by_mined = kept(out)
    select_rows(out, [step("given", balance={"concepts": frequent, "cap": 5})])
    assert by_mined == kept(out)


def _holding(rows, word):
    return sum(word in row["caption"].split() for row in rows)


def test_what_balance_cannot_have_is_told(out, tmp_path):
    with pytest.raises(ConfigError, match=r"filters 'b': concepts: .*gone.txt: no such file"):
        select_rows(out, [step("b", balance={"concepts": str(tmp_path / "gone.txt")})])
    with pytest.raises(ConfigError, match=r"filters 'b': no word stands in 5,000 of the captions .* lower min_count"):
        select_rows(out, [step("b", balance={"concepts": "mined", "min_count": 5000})])


# --- per -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strata(tmp_path_factory):
    """90 rows in strata of 40, 25, 12, 8, 4 and 1, some of them without a value to rank by; and the strata."""
    rng = np.random.default_rng(5)
    parts = rng.permutation(np.repeat(["a", "b", "c", "d", "", "e"], [40, 25, 12, 8, 4, 1])).tolist()
    rows = [
        row(n, PICTURE, entropy=None if n % 11 == 0 else float(rng.integers(0, 20)), part=part)
        for n, part in enumerate(parts)
    ]
    return fetched(tmp_path_factory.mktemp("strata") / "out", rows, shard_size=90), rows


@pytest.mark.parametrize("much", [{"fraction": 0.3}, {"fraction": 1.0}, {"count": 1}, {"count": 10}, {"count": 99}])
def test_the_top_of_each_value_is_that_of_its_rows_alone(strata, much):
    out, rows = strata
    select_rows(out, [step("best", top={"by": "entropy", "per": "nullif(part, '')", **much})])
    keys = [line["key"] for line in ledger(out)]
    expected, values = [], {}
    for part in {given["part"] for given in rows}:
        members = [n for n, given in enumerate(rows) if given["part"] == part]
        num_kept = much.get("count") or math.ceil(much["fraction"] * len(members))
        ranked = sorted(
            (n for n in members if rows[n]["entropy"] is not None), key=lambda n: (-rows[n]["entropy"], keys[n])
        )
        best = ranked[:num_kept]
        expected += best
        cut = f" (cut {rows[best[-1]]['entropy']:g})" if best else ""
        for n in set(members) - set(best):
            mine = "NULL" if rows[n]["entropy"] is None else f"{rows[n]['entropy']:g}"
            values[n] = f"{mine}{cut} among nullif(part, '')={part or 'NULL'}"
    assert kept(out) == sorted(expected)
    assert dropped(out, "best") == values


@pytest.mark.parametrize("count", [1, 5, 6, 17, 40, 62, 89, 90, 200])
def test_a_count_is_spread_evenly_over_the_values_and_small_ones_give_all(strata, count):
    out, rows = strata
    select_rows(out, [step("some", sample={"count": count, "per": "part"})])
    sizes = Counter(row["part"] for row in rows)
    given = Counter(rows[number]["part"] for number in kept(out))
    # Water-filling: one row of each stratum in turn, as long as it has some.
    left, filled = min(count, 90), Counter()
    while left >= (open_ := sum(filled[part] < size for part, size in sizes.items())) and open_:
        for part, size in sizes.items():
            if filled[part] < size:
                filled[part] += 1
                left -= 1
    assert sum(given.values()) == min(count, 90)
    for part, size in sizes.items():
        assert filled[part] <= given[part] <= min(size, filled[part] + 1)
    assert set(dropped(out, "some").values()) <= {f"count={count} among part={part or 'NULL'}" for part in sizes}


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_a_fraction_is_of_each_value(strata, fraction):
    out, rows = strata
    select_rows(out, [step("some", sample={"fraction": fraction, "per": "part"})])
    sizes = Counter(row["part"] for row in rows)
    given = Counter(rows[number]["part"] for number in kept(out))
    assert given == {part: math.ceil(fraction * size) for part, size in sizes.items()}


def test_a_larger_stratified_count_keeps_what_a_smaller_one_kept_and_the_seed_changes_it(strata):
    out, _ = strata
    chosen = {}
    for count, seed in ((10, 0), (30, 0), (30, 1)):
        select_rows(out, [step("some", sample={"count": count, "per": "part"})], seed=seed)
        chosen[count, seed] = set(kept(out))
    assert chosen[10, 0] < chosen[30, 0]
    assert chosen[30, 0] != chosen[30, 1]


def test_a_typo_in_per_names_the_step_the_column_and_the_nearest_before_any_request(tmp_path):
    (tmp_path / "list.csv").write_text("url,caption,part\nhttp://a.test/1.jpg,one,a\n")
    for operator in ({"top": {"by": "width", "count": 1, "per": "prat"}}, {"sample": {"count": 1, "per": "prat"}}):
        with pytest.raises(ConfigError, match=r"filters 's': no column 'prat'\. Did you mean 'part'\?"):
            plan.run(str(tmp_path / "list.csv"), tmp_path / "out", PlanConfig(), parse_steps([step("s", **operator)]))


# --- order -----------------------------------------------------------------------------------------------------------


def test_the_order_of_the_list_is_of_no_account(tmp_path):
    rows = captioned(250)
    order = np.random.default_rng(9).permutation(len(rows)).tolist()
    filters = [
        step("words", where="caption_words >= 2"),
        step("wit", balance={"concepts": CONCEPTS, "cap": 40}),
        step("metaclip", balance={"concepts": "mined", "min_count": 10, "method": "metaclip", "cap": 30}),
        step("best", top={"by": "caption_chars", "fraction": 0.8, "per": "url_host"}),
        step("some", sample={"count": 40, "per": "url_host"}),
    ]
    fates = []
    for name, listed in (("a", rows), ("b", [rows[number] for number in order])):
        out = fetched(tmp_path / name, listed, filters, shard_size=70)
        result = select_rows(out, filters, val=0.2)
        assert len({line["step"] for line in ledger(out)}) == 6
        assert sum(result.kept.values()) == 40
        lines = {line["key"]: {**line, "row": 0} for line in ledger(out)}
        fates.append(lines)
    assert fates[0] == fates[1]
