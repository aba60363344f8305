"""The tokenizer that remembers: the same ids as without it, in every process, in bounded memory."""

import multiprocessing
import pickle

import open_clip
import pytest
import torch

from finetune.captions import CachedTokenizer

CAPTIONS = [f"a picture of {number} things, {'long ' * (number % 7)}" for number in range(40)] + ["", "né\ud800"]


class Counting:
    """open_clip's tokenizer; how many captions it was asked for."""

    def __init__(self):
        self.tokenizer = open_clip.get_tokenizer("ViT-B-32")
        self.asked = 0

    def __call__(self, captions):
        self.asked += len(captions)
        return self.tokenizer(captions)


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.mark.parametrize("max_bytes", [1 << 20, 5 * 316, 1])
def test_ids_are_those_of_the_tokenizer_whatever_is_remembered(counting, max_bytes):
    cached = CachedTokenizer(counting, len(CAPTIONS), max_bytes)
    expected = open_clip.get_tokenizer("ViT-B-32")(CAPTIONS)
    for order in (range(42), range(41, -1, -1), [0] * 5 + [41] * 5):
        tokens, hashes = cached([CAPTIONS[number] for number in order])
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, expected[list(order)])
        assert len(set(hashes)) == len({CAPTIONS[number] for number in order})


def test_a_caption_is_tokenised_once(counting):
    cached = CachedTokenizer(counting, len(CAPTIONS))
    before = counting.asked
    _, first = cached(CAPTIONS)
    assert counting.asked == before + 42
    _, second = cached(CAPTIONS)
    assert counting.asked - before - 42 <= 8  # but for those that found one place free at the same time
    assert first == second


def test_of_many_captions_few_share_a_place(counting):
    captions = [f"number {number}" for number in range(4_000)]
    cached = CachedTokenizer(counting, len(captions))
    for start in range(0, len(captions), 50):
        cached(captions[start : start + 50])
    before = counting.asked
    cached(captions)
    assert counting.asked - before < 40


def test_captions_that_read_alike_have_one_hash(counting):
    _, hashes = CachedTokenizer(counting, 4)(["A  Red circle", "a red circle", "a dog"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_processes_share_what_they_learn(counting):
    cached = CachedTokenizer(counting, 10_000)
    worker = multiprocessing.get_context("fork").Process(target=cached, args=(CAPTIONS,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    before = counting.asked
    cached(CAPTIONS)
    assert counting.asked == before


def test_a_row_that_was_half_written_is_not_believed(counting):
    cached = CachedTokenizer(counting, len(CAPTIONS))
    expected, _ = cached(CAPTIONS)
    cached._tokens[..., 3] += 1
    assert torch.equal(cached(CAPTIONS)[0], expected)


def test_a_copy_starts_empty(counting):
    cached = CachedTokenizer(counting, len(CAPTIONS))
    expected, hashes = cached(CAPTIONS)
    tokens, again = pickle.loads(pickle.dumps(cached))(CAPTIONS)
    assert torch.equal(tokens, expected)
    assert again == hashes
