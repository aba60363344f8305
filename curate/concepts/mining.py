"""A list of concepts out of the captions themselves, by the recipe of CLIP's query list.

Radford et al. 2021, section 2.2: words that occur at least 100 times, and bigrams with high pointwise mutual
information (theirs, and WordNet's synsets and titles of articles, from Wikipedia). Here a word's count is that of the
captions it stands in, once each, as it is when a dataset is balanced, and

    PMI(a b) = log2( P(a b) / (P(a) P(b)) ),   P = share of the captions

(Church and Hanks 1990, who find that pairs above 3 tend to be interesting ones).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import duckdb

from curate.concepts.matching import plain
from curate.database import arrow_table, literal

if TYPE_CHECKING:
    import pyarrow as pa

MIN_PMI = 3.0
# English words without a meaning that can be seen, and what is left of don't and it's when apostrophes go.
_STOP_WORDS = """
a about above across after again against all almost along already also although always am among an and another any are
aren around as at be became because become been before behind being below between both but by came can cannot could
couldn did didn do does doesn doing don done down during each either else even ever every few for from further get gets
got had hadn has hasn have haven having he her here hers herself him himself his how however i if in into is isn it its
itself just ll least less let like made make many may me might more most much must my myself near never no nor not now
of off often on once one only onto or other our ours ourselves out over own per perhaps quite rather re s said same she
should shouldn since so some still such t than that the their theirs them themselves then there these they this those
though through thus to too toward towards under until up upon us use used using ve very via was wasn we were weren what
when where whether which while who whom whose why will with within without won would wouldn yet you your yours yourself
yourselves
"""
# What a word must not be: a single letter of an alphabet, or a number.
_NO_CONCEPT = r"[\p{Latin}\p{Cyrillic}\p{Greek}]|[\p{N}\p{M}]+"


def mine(
    db: duckdb.DuckDBPyConnection, relation: str, *, min_count: int, min_pmi: float = MIN_PMI, count: int | None = None
) -> pa.Table:
    """Words that stand in `min_count` captions or more, and so frequent bigrams of them with a PMI from `min_pmi` on.

    Args:
        db: with the captions.
        relation: has a column `caption`.
        min_count: captions; 1 or more.
        min_pmi: bits.
        count: most concepts; null: all.

    Returns:
        `concept`, `captions` (that hold it), `pmi` (null for a word); most captions first, equal ones by their text.
    """
    stop = ", ".join(map(literal, _STOP_WORDS.split()))
    worded = f"SELECT string_split({plain('caption')}, ' ') AS words FROM {relation}"
    db.execute(f"""
        CREATE OR REPLACE TABLE mined_words AS
        SELECT word, count(*) AS captions FROM (SELECT unnest(list_distinct(words)) AS word FROM ({worded}))
        WHERE word <> '' AND word NOT IN ({stop}) AND NOT regexp_full_match(word, '{_NO_CONCEPT}')
        GROUP BY word HAVING count(*) >= {min_count}""")
    # A frequent bigram has frequent words: the others are gone before anything is counted.
    db.execute(f"""
        CREATE OR REPLACE TABLE mined_bigrams AS
        SELECT pair, count(*) AS captions, any_value(a.captions) AS captions_a, any_value(b.captions) AS captions_b
        FROM (
            SELECT unnest(list_distinct(
                list_transform(range(1, len(words)), lambda i: words[i] || ' ' || words[i + 1])
            )) AS pair
            FROM ({worded})
        )
        JOIN mined_words a ON a.word = split_part(pair, ' ', 1) JOIN mined_words b ON b.word = split_part(pair, ' ', 2)
        GROUP BY pair HAVING count(*) >= {min_count}""")
    found = arrow_table(
        db,
        f"""WITH total AS (SELECT count(*) AS captions FROM {relation}),
        bigrams AS (
            SELECT pair, mined_bigrams.captions,
                round(log2(mined_bigrams.captions::DOUBLE * total.captions / captions_a / captions_b), 6) AS pmi
            FROM mined_bigrams CROSS JOIN total
        )
        SELECT word AS concept, captions, NULL::DOUBLE AS pmi FROM mined_words
        UNION ALL SELECT pair, captions, pmi FROM bigrams WHERE pmi >= {min_pmi!r}
        ORDER BY captions DESC, concept {"" if count is None else f"LIMIT {count}"}""",
    )
    db.execute("DROP TABLE mined_words")
    db.execute("DROP TABLE mined_bigrams")
    return found
