"""The rows that the page carries with it, as data: what a click on a bar, a search and the map show, without a server.

They are chosen so that every bar of every histogram has some, kept and dropped; a seeded random sample of all rows
is among them, and of those with an embedding, which are laid out on the map by their principal components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.html import linkable, visible
from curate.report.distributions import JUDGED, bin_of
from curate.report.samples import read_pictures, unsafe
from curate.report.tables import Tables
from curate.report.thresholds import as_double
from curate.signals import EMBEDDINGS

if TYPE_CHECKING:
    import numpy as np

MOST_ROWS = 1_800
PER_BAR = 4
AT_RANDOM = 400
ON_THE_MAP = 600
MAP_FILES = 8  # embeddings are read from at most so many shards
SIDE, QUALITY = 96, 60
PICTURE_BYTES = 3_000_000  # of all pictures together; rows beyond it have none
LONGEST = 240


def embedded_rows(
    tables: Tables, figures: Mapping[str, Any], shown: Mapping[str, str], seed: int
) -> list[dict[str, Any]]:
    """The rows, JSON-ready, in the list's order.

    Args:
        tables: of the dataset.
        figures: with `distributions`, whose bars the rows are to fill.
        shown: key → picture of rows that the page shows anyway; the script takes those from there.
        seed: for which shards the map is made from.

    Returns:
        For each row what the ledger says, `values` and `bins` (one for each distribution, None where the row is not in
        it), `host`, `language`, `unsafe`, `link` where the URL may be one, `picture` and `xy` (both in [0, 1]) if it
        has them.
    """
    drawn = list(figures["distributions"].values())
    places = _map(tables, seed)
    keys = dict.fromkeys([*places, *_keys(tables, drawn)])
    rows = _facts(tables, list(keys)[: MOST_ROWS + ON_THE_MAP], drawn)
    first = [key for key in keys if key not in shown]
    pictures = _within(read_pictures(tables, first, SIDE, QUALITY), first)
    for row in rows:
        if row["key"] in places:
            row["xy"] = places[row["key"]]
        if row["key"] in pictures:
            row["picture"] = pictures[row["key"]]
    return rows


def _within(pictures: Mapping[str, str], order: Sequence[str]) -> dict[str, str]:
    """As many of the pictures as PICTURE_BYTES hold, in this order."""
    chosen, left = {}, PICTURE_BYTES
    for key in order:
        if key in pictures and len(pictures[key]) <= left:
            chosen[key] = pictures[key]
            left -= len(pictures[key])
    return chosen


def _keys(tables: Tables, drawn: Sequence[Mapping[str, Any]]) -> list[str]:
    """At random over all, then one for each bar, then a second, … by the same dice."""
    keys = [
        key for (key,) in tables.db.execute(f"SELECT key FROM rows ORDER BY dice, key LIMIT {AT_RANDOM}").fetchall()
    ]
    bars = []
    for figure in drawn:
        query = f"""
            SELECT arg_min(key, dice, {PER_BAR}) FROM (
                SELECT key, dice, kept, {as_double(tables, figure["expression"])} AS x FROM rows WHERE {JUDGED})
            WHERE isfinite(x) GROUP BY kept, {bin_of(figure["edges"])} ORDER BY min(dice)
        """
        bars += [list(found) for (found,) in tables.db.execute(query).fetchall()]
    for place in range(PER_BAR):
        keys += [found[place] for found in bars if len(found) > place]
    return list(dict.fromkeys(keys))[:MOST_ROWS]


def _facts(tables: Tables, keys: Sequence[str], drawn: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    there = tables.columns()
    text = {"reason": 80, "value": 120, "twin": 120, "step": 80}
    texts = [f"left({column}, {length})" for column, length in text.items()]
    numbers = [as_double(tables, figure["expression"]) for figure in drawn]
    bins = [
        f"CASE WHEN ({JUDGED}) AND isfinite({x}) THEN {bin_of(figure['edges'], x)} END"
        for x, figure in zip(numbers, drawn, strict=True)
    ]
    host = "left(url_host, 100)" if "url_host" in there else "NULL"
    language = "left(CAST(language AS VARCHAR), 20)" if "language" in there else "NULL"
    query = f"""
        SELECT key, "row", split, stage, {unsafe(tables)}, {host}, {language}, {", ".join(texts)},
            [{", ".join(numbers) or "NULL"}], [{", ".join(bins) or "NULL"}]
        FROM rows WHERE key IN (SELECT unnest(?)) ORDER BY "row", key
    """
    names = ("key", "row", "split", "stage", "unsafe", "host", "language", *text, "values", "bins")
    found = [dict(zip(names, row, strict=True)) for row in tables.db.execute(query, [list(keys)]).fetchall()]
    words = tables.texts(keys, 300, LONGEST)
    return [_row({**told, **dict(zip(("url", "caption"), words[told["key"]], strict=True))}) for told in found]


def _row(told: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null or false, with text that can hide nothing, and numbers of five digits."""
    row = {name: visible(value) if isinstance(value, str) else value for name, value in told.items() if value}
    row["row"] = told["row"]
    row["values"] = [None if value is None or value != value else float(f"{value:.5g}") for value in told["values"]]
    row["bins"] = list(told["bins"])
    if linkable(told["url"]):
        row["link"] = True
    return row


# --- the map ---------------------------------------------------------------------------------------------------------


def _map(tables: Tables, seed: int) -> dict[str, list[float]]:
    """Key → place, in [0, 1]², of a seeded sample of the rows with an embedding; none where nothing was embedded."""
    import numpy as np

    files = tables.embedded
    if len(files) > MAP_FILES:
        files = [files[place] for place in sorted(np.random.default_rng(seed).permutation(len(files))[:MAP_FILES])]
    keys: list[str] = []
    vectors: list[np.ndarray] = []
    for path in files:
        found, image_ND = _vectors(path, tables, -(-ON_THE_MAP // len(files)))
        keys += found
        vectors += [image_ND] if len(found) else []
    if len(keys) < 3:
        return {}
    return dict(zip(keys, principal(np.concatenate(vectors)).tolist(), strict=True))


def _vectors(path: Path, tables: Tables, most: int) -> tuple[list[str], np.ndarray]:
    """Keys and embeddings, float64 (N, D), of at most so many rows of a file, by the dice."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["key", EMBEDDINGS[0]])
    table = table.filter(pc.is_valid(table[EMBEDDINGS[0]]))
    query = "SELECT key FROM rows WHERE key IN (SELECT unnest(?)) ORDER BY dice, key LIMIT ?"
    keys = [key for (key,) in tables.db.execute(query, [table["key"].to_pylist(), most]).fetchall()]
    table = table.take(pc.index_in(pa.array(keys, pa.string()), table["key"].combine_chunks())).combine_chunks()
    flat = pc.list_flatten(table[EMBEDDINGS[0]]).to_numpy(zero_copy_only=False).astype(np.float64)
    return keys, flat.reshape(len(keys), -1) if keys else flat.reshape(0, 0)


def principal(vectors_ND: np.ndarray) -> np.ndarray:
    """Places (N, 2) of vectors (N, D) on their first two principal components, each scaled to [0, 1].

    A component's sign is free; the entry that is largest in it is made positive, so that the same rows give the same
    map (Jolliffe, Principal Component Analysis, 2002, section 2.1).
    """
    import numpy as np

    centred_ND = vectors_ND - vectors_ND.mean(0)
    _, _, components_KD = np.linalg.svd(centred_ND, full_matrices=False)
    axes_2D = components_KD[:2]
    largest = np.abs(axes_2D).argmax(1)
    axes_2D = axes_2D * np.sign(axes_2D[np.arange(len(axes_2D)), largest])[:, None]
    places_N2 = centred_ND @ axes_2D.T
    if places_N2.shape[1] < 2:
        places_N2 = np.pad(places_N2, ((0, 0), (0, 2 - places_N2.shape[1])))
    low, span = places_N2.min(0), np.ptp(places_N2, axis=0)
    return np.round((places_N2 - low) / np.where(span > 0, span, 1), 4)
