"""Concepts matched the slow way, letter by letter and caption by caption: what the fast way must agree with."""

import math
import unicodedata
from collections import Counter
from itertools import pairwise

ALONE = ("CJK UNIFIED", "HIRAGANA", "KATAKANA LETTER", "THAI", "LAO", "KHMER", "MYANMAR")


def plain(text: str) -> str:
    """As `curate.concepts.matching.plain`."""
    letters = []
    for letter in unicodedata.normalize("NFC", text.replace("\0", " ")).lower():
        kind = unicodedata.category(letter)
        if kind == "So" or unicodedata.name(letter, "").startswith(ALONE):
            letters.append(f" {letter} ")
        else:
            letters.append(letter if kind[0] in "LNM" else " ")
    return " ".join("".join(letters).split())


def held(captions: list[str], concepts: list[str], match: str = "words") -> list[list[int]]:
    """Of each caption, the concepts in it, by their place; of concepts with one plain form, the first."""
    forms: dict[str, int] = {}
    for place, concept in enumerate(concepts):
        if plain(concept):
            forms.setdefault(plain(concept), place)
    space = " " if match == "words" else ""
    texts = [space + plain(caption) + space for caption in captions]
    return [sorted(place for form, place in forms.items() if space + form + space in text) for text in texts]


def counted(matches: list[list[int]]) -> Counter[int]:
    return Counter(concept for found in matches for concept in found)


def mined(captions: list[str], stop: set[str], min_count: int, min_pmi: float) -> list[tuple[str, int, float | None]]:
    """As `curate.concepts.mining.mine`."""
    texts = [plain(caption).split() for caption in captions]
    words = Counter(word for text in texts for word in set(text))
    words = Counter(
        {
            word: count
            for word, count in words.items()
            if count >= min_count and word not in stop and not word.isnumeric() and not (len(word) == 1 and word < "z~")
        }
    )
    pairs = Counter(pair for text in texts for pair in set(pairwise(text)))
    found: list[tuple[str, int, float | None]] = [(word, count, None) for word, count in words.items()]
    for (a, b), count in pairs.items():
        if count >= min_count and a in words and b in words:
            pmi = math.log2(count / len(texts) / (words[a] / len(texts) * words[b] / len(texts)))
            if pmi >= min_pmi:
                found.append((f"{a} {b}", count, pmi))
    return sorted(found, key=lambda line: (-line[1], line[0].encode()))
