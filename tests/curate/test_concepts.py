import re
import subprocess
import sys

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate import concepts as command
from curate import plan
from curate.concepts import matching, read_concepts
from curate.concepts.matching import find_matches, plain_texts
from curate.concepts.mining import _STOP_WORDS, mine
from curate.config import ConceptsConfig, PlanConfig
from curate.errors import ConfigError, InputError, UnwantedResult
from tests.curate.naive_concepts import held, mined, plain

CURATE = [sys.executable, "-m", "curate.cli"]
ODD = [
    *("A cat, a dog.", "location", "", " ", "\0", "cat\0dog", "double-decker BUS", "double  decker\tbus", "don't"),
    *("北京的猫 🐱🐱", "cafe\u0301", "CAFÉ", "हिन्दी", "ภาษาไทย", "٣ ٣", "STRASSE straße", "a\nb", "🐱", "x" * 100_000),
]
LETTERS = st.sampled_from([*"ab é\u0301猫🐱,-.\n\0", "cat", "Cat", " dog "])


def database(captions):
    db = duckdb.connect(config={"threads": 1})
    db.register("given", pa.table({"row": range(len(captions)), "caption": pa.array(captions, pa.string())}))
    db.execute("CREATE TABLE listed AS SELECT * FROM given")
    db.unregister("given")
    return db


def matches(captions, concepts, match):
    with database(captions) as db:
        find_matches(db, "listed", concepts, match)
        lines = db.execute("SELECT row, concept FROM matches ORDER BY row, concept").fetchall()
    return [[concept for row, concept in lines if row == number] for number in range(len(captions))]


# --- matching --------------------------------------------------------------------------------------------------------


def test_texts_are_compared_in_one_plain_form():
    with duckdb.connect() as db:
        assert plain_texts(db, ODD) == [plain(text) for text in ODD]
        assert plain_texts(db, ["A  Double-decker\tBUS!", "北京 café", "🐱x"]) == [
            "a double decker bus",
            "北 京 café",
            "🐱 x",
        ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    captions=st.lists(st.lists(LETTERS, max_size=12).map("".join), max_size=6),
    concepts=st.lists(st.lists(LETTERS, max_size=4).map("".join), min_size=1, max_size=6),
    match=st.sampled_from(["words", "substring"]),
)
def test_matches_are_those_of_looking_for_each_concept_in_each_caption(captions, concepts, match):
    assert matches(captions, concepts, match) == held(captions, concepts, match)


@pytest.mark.parametrize("match", ["words", "substring"])
def test_many_captions_in_small_batches_match_as_one_by_one(monkeypatch, match):
    monkeypatch.setattr(matching, "BATCH_CHARS", 1000)
    rng = np.random.default_rng(0)
    words = [*"abcdefgh", "cat", "cats", "red", "double", "decker", "猫", "🐱", "Red"]
    captions = [" ".join(rng.choice(words, rng.integers(0, 9))) for _ in range(5000)] + ODD
    concepts = ["cat", "cats", "red", "double decker", "decker", "猫", "a b", "!!", "RED", "none", "猫 🐱"]
    assert matches(captions, concepts, match) == held(captions, concepts, match)


def test_a_word_is_whole_and_a_substring_is_not():
    assert matches(["location", "a cat."], ["cat"], "words") == [[], [0]]
    assert matches(["location", "a cat."], ["cat"], "substring") == [[0], [0]]


# --- lists -----------------------------------------------------------------------------------------------------------


def test_a_list_is_read_from_text_and_parquet_each_concept_once(tmp_path):
    (tmp_path / "list.txt").write_text("cat\n\n dog \ncat\nC#\n")
    pq.write_table(pa.table({"concept": ["cat", None, "dog"], "n": [1, 2, 3]}), tmp_path / "list.parquet")
    assert read_concepts("x", str(tmp_path / "list.txt")) == ["cat", "dog", "C#"]
    assert read_concepts("x", str(tmp_path / "list.parquet")) == ["cat", "dog"]
    assert read_concepts("x", ["b", "a", "b"]) == ["b", "a"]


def test_a_list_that_is_none_is_told(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"cat\ncaf\xe9\n")
    pq.write_table(pa.table({"word": ["cat"]}), tmp_path / "list.parquet")
    for name, says in [
        ("gone.txt", "filters 'b': concepts: .*gone.txt: no such file; expected one with a concept a line"),
        ("empty.txt", "filters 'b': no concepts in .*empty.txt"),
        ("latin.txt", r"latin.txt: not UTF-8 text \(byte 7\)"),
        ("list.parquet", "list.parquet: no column 'concept'"),
    ]:
        with pytest.raises(ConfigError, match=says):
            read_concepts("filters 'b'", str(tmp_path / name))


# --- mining ----------------------------------------------------------------------------------------------------------


def crawl(count):
    """Captions in which some words go together more often than by chance."""
    rng = np.random.default_rng(1)
    words = [f"word{n}" for n in range(30)]
    terms = ["the Eiffel Tower", "a double-decker bus", "hot dog", "東京 at night", "🐱 7 2019"]
    share = np.array([1 / (n + 1) for n in range(30)])
    return [
        " ".join(
            [*rng.choice(words, rng.integers(1, 6), p=share / share.sum()), *rng.choice(terms, rng.integers(0, 2))]
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("min_pmi", [-100.0, 0.5, 3.0])
def test_words_and_bigrams_are_those_of_counting_them_one_by_one(min_pmi):
    captions = crawl(800) + ODD
    with database(captions) as db:
        found = mine(db, "listed", min_count=20, min_pmi=min_pmi)
        best = mine(db, "listed", min_count=20, min_pmi=min_pmi, count=7)
    expected = mined(captions, set(_STOP_WORDS.split()), 20, min_pmi)
    assert [(line["concept"], line["captions"]) for line in found.to_pylist()] == [line[:2] for line in expected]
    assert [line["pmi"] for line in found.to_pylist()] == pytest.approx([pmi for *_, pmi in expected], abs=1e-5)
    assert best.equals(found.slice(0, 7))
    if min_pmi == 3.0:
        names = set(found["concept"].to_pylist())
        assert {"eiffel tower", "decker bus", "hot dog", "東 京", "🐱"} <= names
        assert not names & {"the", "a", "at", "7", "2019", "🐱 7"}


def planned(tmp_path, captions):
    table = pa.table({"url": [f"http://a.test/{n}.jpg" for n in range(len(captions))], "caption": captions})
    pq.write_table(table, tmp_path / "list.parquet")
    plan.run(str(tmp_path / "list.parquet"), tmp_path / "out", PlanConfig(shard_size=97), [])
    return tmp_path / "out"


def test_the_command_writes_the_list_and_prints_its_head(tmp_path):
    captions = crawl(400)
    out = planned(tmp_path, captions)
    words = [*CURATE, "concepts", "--out", str(out), "--min-count", "20", "--count", "12"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    table = pq.read_table(out / "concepts.parquet")
    expected = mined(captions, set(_STOP_WORDS.split()), 20, 3.0)[:12]
    assert [(line["concept"], line["captions"]) for line in table.to_pylist()] == [line[:2] for line in expected]
    assert (out / "concepts.txt").read_text().splitlines() == table["concept"].to_pylist()
    num_words = sum(pmi is None for *_, pmi in expected)
    assert f"{num_words} words and {12 - num_words} bigrams" in shown
    assert re.search(rf"{expected[0][0]} +│ +{expected[0][1]}", shown)
    assert f"concepts {out / 'concepts.txt'}" in shown


def test_the_order_of_the_list_is_of_no_account(tmp_path):
    captions = crawl(300)
    for name, listed in (("a", captions), ("b", captions[::-1])):
        (tmp_path / name).mkdir()
        command.run(ConceptsConfig(out=planned(tmp_path / name, listed), min_count=20))
    for name in ("concepts.txt", "concepts.parquet"):
        a, b = (tmp_path / folder / "out" / name for folder in "ab")
        assert pq.read_table(a).equals(pq.read_table(b)) if name.endswith("parquet") else a.read_text() == b.read_text()


def test_what_cannot_be_mined_is_told(tmp_path):
    with pytest.raises(InputError, match="no candidates there; run `curate plan` first"):
        command.run(ConceptsConfig(out=tmp_path))
    out = planned(tmp_path, ["a cat", "a dog"])
    with pytest.raises(UnwantedResult, match="no word stands in 100 captions or more; lower --min_count"):
        command.run(ConceptsConfig(out=out))
    with pytest.raises(ConfigError, match="min_count: expected at least 1, got 0"):
        ConceptsConfig(min_count=0)
