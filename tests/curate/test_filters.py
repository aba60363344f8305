import pytest

from curate.errors import ConfigError
from curate.filters import Decontaminate, Dedup, Relevance, Sample, Top, Where, parse_steps

ALL = [
    {"name": "a", "where": "width > 3"},
    {"name": "b", "dedup": {"by": "phash", "distance": 6, "keep": "width"}},
    {"name": "c", "decontaminate": {"against": "tests/", "similarity": 0.9}},
    {"name": "d", "relevance": {"prompts": "a {}", "images": "x", "keep": 0.4}},
    {"name": "e", "top": {"by": "clip_score", "fraction": 0.3}},
    {"name": "f", "sample": {"count": 10}},
]


def test_every_kind_of_step_is_read_with_its_defaults():
    contrast = ["a photo.", "a picture of something.", "text."]
    assert parse_steps(ALL) == [
        Where(name="a", expression="width > 3"),
        Dedup(name="b", by="phash", distance=6, keep="width"),
        Decontaminate(name="c", against=["tests/"], distance=4, similarity=0.9),
        Relevance(name="d", prompts=["a {}"], images="x", against=contrast, keep=0.4, threshold=None),
        Top(name="e", by="clip_score", fraction=0.3, count=None),
        Sample(name="f", fraction=None, count=10),
    ]
    assert parse_steps([]) == []


def test_reading_leaves_the_configuration_as_it_was():
    parse_steps(ALL)
    assert ALL[0] == {"name": "a", "where": "width > 3"}


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"where": "x"}, r"filters\[1\]: needs a name"),
        ({"name": "", "where": "x"}, "needs a name"),
        ({"name": "n"}, "expected exactly one of .* got nothing"),
        ({"name": "n", "where": "x", "top": {}}, "expected exactly one of .* got where, top"),
        ({"name": "n", "dedupe": {}}, r"filters\[1\] 'n': 'dedupe' is not a kind of filter\. Did you mean 'dedup'"),
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
        ({"name": "n", "sample": {"fraction": 0.2, "count": 2}}, "exactly one of fraction and count"),
    ],
)
def test_a_mistake_is_told_with_the_step_and_the_way_out(step, says):
    with pytest.raises(ConfigError, match=says):
        parse_steps([step])


def test_two_steps_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two steps are named 'a'"):
        parse_steps([ALL[0], ALL[1], ALL[0]])
