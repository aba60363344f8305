"""Semantic duplicates against comparing all with all, in float64."""

import numpy as np
import pytest

from curate.errors import ConfigError
from curate.filters import parse_steps
from curate.select import semantic


def clumps(seed, size, width=64, topics=40):
    """Unit vectors around topics, a fifth of them copies at a cosine between 0.9 and 1."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(topics, width))[random.integers(0, topics, size)] + random.normal(size=(size, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    copies = random.choice(size, size // 5, replace=False)
    noise = random.normal(size=(len(copies), width))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    near = vectors[random.integers(0, size, len(copies))] + noise * random.uniform(0, 0.45, (len(copies), 1))
    vectors[copies] = near / np.linalg.norm(near, axis=1, keepdims=True)
    return vectors.astype(np.float16)


def on_disk(folder, vectors, batch=700):
    rows = np.random.default_rng(1).permutation(10 * len(vectors))[: len(vectors)]
    parts = range(0, len(vectors), batch)
    return semantic.write_vectors(folder, ((rows[s : s + batch], vectors[s : s + batch]) for s in parts))


def cosines_of(vectors):
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    return exact @ exact.T


def brute_force(vectors, similarity):
    cosines = cosines_of(vectors)
    i, j = np.nonzero(np.triu(np.round(cosines, 6) >= similarity, 1))
    return set(zip(i.tolist(), j.tolist(), strict=True))


def found(vectors, similarity, seed=0):
    pairs = set()
    for i, j in semantic.near_pairs(vectors, similarity, seed):
        pairs |= {(min(a, b), max(a, b)) for a, b in zip(i.tolist(), j.tolist(), strict=True)}
    return pairs


@pytest.mark.parametrize("similarity", [0.9, 0.95, 0.99])
def test_nearly_all_pairs_are_found_and_no_others(tmp_path, similarity):
    vectors = clumps(0, 6_000)
    expected, got = brute_force(vectors, similarity), found(on_disk(tmp_path, vectors), similarity)
    assert len(expected) > 100
    assert len(got & expected) >= 0.95 * len(expected)
    cosines = cosines_of(vectors)
    cosine = {(i, j): float(cosines[i, j]) for i, j in got - expected}
    assert all(value == pytest.approx(similarity, abs=3e-6) for value in cosine.values())


@pytest.mark.parametrize("width", [64, 512, 768])
def test_equal_images_have_a_cosine_of_one(tmp_path, width):
    vectors = np.random.default_rng(0).normal(size=(200, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    label = semantic.near_groups(on_disk(tmp_path, np.concatenate([vectors, vectors])), 1.0, 0)
    assert label.tolist() == [*range(200)] * 2


def test_few_images_are_all_compared(tmp_path):
    vectors = clumps(3, 10)
    assert found(on_disk(tmp_path, vectors), 0.9) == brute_force(vectors, 0.9)


def test_groups_are_what_the_pairs_link_and_the_same_each_time(tmp_path):
    vectors = on_disk(tmp_path, clumps(1, 3_000))
    label = semantic.near_groups(vectors, 0.93, 7)
    expected = list(range(len(vectors)))
    for i, j in sorted(found(vectors, 0.93, 7)):
        low, high = sorted((expected[i], expected[j]))
        expected = [low if group == high else group for group in expected]
    assert label.tolist() == expected
    assert label.tolist() == semantic.near_groups(vectors, 0.93, 7).tolist()


def test_no_embedding_is_nobodys_duplicate(tmp_path):
    assert len(semantic.near_groups(on_disk(tmp_path, np.zeros((0, 8), np.float16)), 0.9, 0)) == 0


def test_the_file_of_embeddings_is_gone_when_it_is_no_longer_used(tmp_path):
    vectors = on_disk(tmp_path, clumps(2, 100))
    np.testing.assert_allclose(vectors.read([5]), clumps(2, 100)[[5]], atol=1e-3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dedup", "said"),
    [
        ({"by": "embedding"}, "'by: embedding' and 'similarity: 0.95' go together"),
        ({"by": "sha256", "similarity": 0.9}, "'by: embedding' and 'similarity: 0.95' go together"),
        ({"by": "embedding", "similarity": 1.5}, "similarity expected a cosine above 0 and up to 1, got 1.5"),
        ({"by": ["sha256", "phash"], "distance": 2}, "'phash' goes alone"),
        ({"by": []}, "by expected a column, or a list of columns"),
        ({"by": ["url_host", "caption"], "distance": 2}, "distance goes with 'by: phash'"),
    ],
)
def test_what_does_not_go_together_is_told(dedup, said):
    with pytest.raises(ConfigError) as error:
        parse_steps([{"name": "same", "dedup": dedup}])
    assert str(error.value).startswith(f"filters[0] 'same': {said}")
