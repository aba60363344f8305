import pytest

from curate.errors import ConfigError
from curate.filters import Balance, Decontaminate, Dedup, Relevance, Sample, Top, Where, parse_steps

ALL = [
    {"name": "a", "where": "width > 3"},
    {"name": "b", "dedup": {"by": "phash", "distance": 6, "keep": "width"}},
    {"name": "c", "decontaminate": {"against": "tests/", "similarity": 0.9}},
    {"name": "d", "relevance": {"prompts": "a {}", "images": "x", "keep": 0.4}},
    {"name": "e", "top": {"by": "clip_score", "fraction": 0.3}},
    {"name": "f", "sample": {"count": 10, "per": "url_host"}},
    {"name": "g", "balance": {"concepts": ["cat"], "cap": 5}},
]


def test_every_kind_of_step_is_read_with_its_defaults():
    contrast = ["a photo.", "a picture of something.", "text."]
    assert parse_steps(ALL) == [
        Where(name="a", expression="width > 3"),
        Dedup(name="b", by="phash", distance=6, keep="width"),
        Decontaminate(name="c", against=["tests/"], distance=4, similarity=0.9),
        Relevance(name="d", prompts=["a {}"], images="x", against=contrast, keep=0.4, threshold=None),
        Top(name="e", by="clip_score", fraction=0.3, count=None),
        Sample(name="f", fraction=None, count=10, per="url_host"),
        Balance(name="g", concepts=["cat"], cap=5, method="wit", match="words", min_count=100),
    ]
    assert parse_steps([]) == []


def test_reading_leaves_the_configuration_as_it_was():
    parse_steps(ALL)
    assert ALL[0] == {"name": "a", "where": "width > 3"}


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"where": "x"}, r"filters\[0\]: needs a name"),
        ({"name": "", "where": "x"}, "needs a name"),
        ({"name": "n"}, "expected exactly one of .* got nothing"),
        ({"name": "n", "where": "x", "top": {}}, "expected exactly one of .* got where, top"),
        ({"name": "n", "dedupe": {}}, r"filters\[0\] 'n': 'dedupe' is not a kind of filter\. Did you mean 'dedup'"),
        ({"name": "n", "where": " "}, "where needs an expression"),
        ({"name": "n", "where": 3}, "where needs an expression"),
        ({"name": "n", "dedup": "sha256"}, "dedup needs keys"),
        ({"name": "n", "dedup": {"distanc": 3}}, r"dedup has no key 'distanc'\. Did you mean 'distance'"),
        ({"name": "n", "dedup": {"by": "phash", "distance": 65}}, "distance expected 0 to 64"),
        ({"name": "n", "dedup": {"by": "phash", "distance": "6"}}, "distance expected 0 to 64"),
        ({"name": "n", "dedup": {"by": "sha256", "distance": 2}}, "distance goes with 'by: phash'"),
        ({"name": "n", "decontaminate": {"distance": 2}}, "needs the key 'against'"),
        ({"name": "n", "relevance": {"keep": 0.4}}, "relevance needs prompts, or images"),
        ({"name": "n", "relevance": {"prompts": ["x"]}}, "exactly one of keep and threshold"),
        ({"name": "n", "relevance": {"prompts": ["x"], "keep": 0.4, "threshold": 0.1}}, "exactly one of"),
        ({"name": "n", "relevance": {"prompts": ["x"], "keep": 1.4}}, "keep expected a share"),
        ({"name": "n", "top": {"fraction": 0.3}}, "top needs the key 'by'"),
        ({"name": "n", "top": {"by": "width"}}, "exactly one of fraction and count"),
        ({"name": "n", "sample": {"fraction": 0}}, "fraction expected a share above 0"),
        ({"name": "n", "sample": {"fraction": "0.2"}}, "fraction expected a share above 0"),
        ({"name": "n", "sample": {"count": 0}}, "count expected a whole number from 1 on, got 0"),
        ({"name": "n", "sample": {"count": 2, "pre": "x"}}, r"sample has no key 'pre'\. Did you mean 'per'"),
        ({"name": "n", "top": {"by": "width", "count": 2, "per": 3}}, "per expected a column or an expression, got 3"),
        ({"name": "n", "top": {"by": 7, "count": 2}}, "by expected a column or an expression, got 7"),
        ({"name": "n", "balance": {"cap": 2}}, "balance needs the key 'concepts'"),
        ({"name": "n", "balance": {"concept": "x"}}, r"balance has no key 'concept'\. Did you mean 'concepts'"),
        (
            {"name": "n", "balance": {"concepts": []}},
            r"concepts expected a file, or a list of words and terms, got \[\]",
        ),
        ({"name": "n", "balance": {"concepts": ["cat", 3]}}, "concepts expected a file, or a list"),
        ({"name": "n", "balance": {"concepts": "x", "cap": "20k"}}, "cap expected a whole number from 1 on, got '20k'"),
        ({"name": "n", "balance": {"concepts": "x", "method": "metclip"}}, r"got 'metclip'\. Did you mean 'metaclip'"),
        ({"name": "n", "balance": {"concepts": "x", "match": "word"}}, r"expected words or substring, .*mean 'words'"),
        ({"name": "n", "balance": {"concepts": "x", "min_count": 9}}, "min_count goes with 'concepts: mined'"),
        (
            {"name": "n", "relevance": {"prompts": "a cat", "concepts": "x", "keep": 0.1}},
            "concepts go into prompts with",
        ),
        ({"name": "n", "sample": {"fraction": 0.2, "count": 2}}, "exactly one of fraction and count"),
    ],
)
def test_a_mistake_is_told_with_the_step_and_the_way_out(step, says):
    with pytest.raises(ConfigError, match=says):
        parse_steps([step])


def test_two_steps_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two steps are named 'a'"):
        parse_steps([ALL[0], ALL[1], ALL[0]])
