r"""Which captions hold which concepts: one pass of an Aho-Corasick automaton over the captions, in batches.

Captions and concepts are brought to one form first (`plain`): composed (NFC), in lower case, words with one space
between, everything that is no letter, digit, mark or emoji left out. A word ends where its letters end; of scripts that
put no spaces between words, and of emoji, each character counts as a word. Then a concept is found as a substring: with
spaces around both, which is MetaCLIP's rule (Xu et al. 2023, section 3.2: `cat` is not in `location`), or as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import duckdb

from curate.database import arrow_batches

if TYPE_CHECKING:
    import ahocorasick
    import numpy as np
    import pyarrow as pa

MATCHES = ("words", "substring")
# Bytes of captions matched at once: what is in memory at a time.
BATCH_CHARS = 2_000_000

_ALONE = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{So}]"
_BETWEEN = r"[^\p{L}\p{N}\p{M}\p{So}]+"
_NOT_ASCII = r"[^\x00-\x7F]"


def plain(text: str) -> str:
    """SQL: a text in the form in which captions and concepts are compared, such as `a red double decker bus`."""
    # nfc_normalize stops at a NUL.
    composed = f"lower(nfc_normalize(replace({text}, chr(0), ' ')))"
    letters = f"""CASE WHEN regexp_matches({text}, '{_NOT_ASCII}')
        THEN regexp_replace({composed}, '({_ALONE})', ' \\1 ', 'g') ELSE lower({text}) END"""
    return f"trim(regexp_replace(coalesce({letters}, ''), '{_BETWEEN}', ' ', 'g'))"


def plain_texts(db: duckdb.DuckDBPyConnection, texts: Sequence[str]) -> list[str]:
    """`plain` of each of some texts."""
    import pyarrow as pa

    db.register("given", pa.table({"place": range(len(texts)), "text": pa.array(texts, pa.string())}))
    found = db.execute(f"SELECT {plain('text')} FROM given ORDER BY place").fetchall()
    db.unregister("given")
    return [text for (text,) in found]


def find_matches(db: duckdb.DuckDBPyConnection, relation: str, concepts: Sequence[str], match: str) -> None:
    """Make table `matches` (row, concept): a line for each concept that a caption holds, however often it does.

    Args:
        db: with the captions.
        relation: has columns `row` and `caption`.
        concepts: each is meant by its place here; of two with one plain form, the first stands for both.
        match: one of MATCHES.
    """
    forms = plain_texts(db, concepts)
    space = " " if match == "words" else ""
    found = automaton([form and space + form + space for form in forms])
    db.execute("CREATE OR REPLACE TABLE matches (row BIGINT, concept INTEGER)")
    if not len(found):
        return
    query = f"SELECT row, '{space}' || {plain('caption')} || '{space}' AS text FROM {relation}"
    # Of its own cursor: a connection does nothing else while it has a result to give.
    with db.cursor() as reading:
        for rows, texts in _batches(arrow_batches(reading, query)):
            line, concept = matched(found, texts, len(concepts))
            _insert(db, rows[line], concept)


def automaton(forms: Sequence[str]) -> ahocorasick.Automaton:
    """An automaton whose hits are places in `forms`; empty ones are left out, of equal ones the first counts."""
    import ahocorasick

    found = ahocorasick.Automaton()
    for place, form in enumerate(forms):
        if form and form not in found:
            found.add_word(form, place)
    if len(found):
        found.make_automaton()
    return found


def matched(found: ahocorasick.Automaton, texts: pa.Array, num_concepts: int) -> tuple[np.ndarray, np.ndarray]:
    """Line (in `texts`) and concept of every hit, int64 (H) each, sorted, every pair once.

    The texts are searched as one, with a line break between: no concept has one, and one loop in C finds all.
    """
    import numpy as np
    import pyarrow.compute as pc

    lengths = pc.utf8_length(texts).to_numpy(zero_copy_only=False).astype(np.int64)
    starts = np.cumsum(lengths + 1) - lengths - 1
    hits = list(found.iter("\n".join(texts.to_pylist())))
    ends, concepts = np.fromiter(chain.from_iterable(hits), np.int64, 2 * len(hits)).reshape(-1, 2).T
    lines = np.searchsorted(starts, ends, side="right") - 1
    return np.divmod(np.unique(lines * num_concepts + concepts), num_concepts)


def _batches(stream: pa.RecordBatchReader) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """Rows (N) and texts (N) of batches of some BATCH_CHARS; a single longer text is a batch of its own."""
    waiting: list[pa.RecordBatch] = []
    size = 0
    for batch in stream:
        waiting.append(batch)
        size += batch["text"].nbytes
        if size > BATCH_CHARS:
            yield _joined(waiting)
            waiting, size = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[pa.RecordBatch]) -> tuple[np.ndarray, pa.Array]:
    import pyarrow as pa

    table = pa.Table.from_batches(batches).combine_chunks()
    return table["row"].to_numpy(), table["text"]


def _insert(db: duckdb.DuckDBPyConnection, rows: np.ndarray, concepts: np.ndarray) -> None:
    import pyarrow as pa

    db.register("hits", pa.table({"row": rows, "concept": concepts}))
    db.execute("INSERT INTO matches SELECT row, concept FROM hits")
    db.unregister("hits")
