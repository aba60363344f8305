"""Rows whose image is nearest the domain stay: nearest its prompts, its example images, or both.

To prompts, score = greatest cosine to any of them − mean cosine to the contrast texts: subtracting what an image has in
common with any text at all is what makes one threshold fit unlike images. To examples, score = cosine to the nearest
one: a domain has many looks, which a mean of the examples would blur. Cosines between two images are larger than those
between image and text and need no contrast, so the two are scored apart; with both, the score is their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from curate.concepts import read_concepts
from curate.database import literal
from curate.errors import InputError
from curate.expressions import label
from curate.filters import Relevance
from curate.select.known import blocks, embedded_texts, known_images, vectors
from curate.select.pictures import find
from curate.select.ranked import how_many
from curate.select.selection import Selection, same_width

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def apply(selection: Selection, step: Relevance) -> None:
    """Keep a share of the rows, or those from a score on; the ledger's value is the score.

    Raises:
        ConfigError: no CLIP measures embeddings, or the examples are not there.
        InputError: none of the examples can be decoded.
    """
    if step.threshold is not None:
        passed = f"score >= {step.threshold!r}"
    else:
        passed = f"rank <= {how_many(selection, step.keep, None)}"
    selection.insert(
        _scores(selection, step),
        # found.score: the list may have a column of that name.
        f"""SELECT row, 'select', {literal(step.name)}, 'relevance', coalesce(printf('%.4f', score), 'NULL'), NULL
        FROM (SELECT row, found.score, row_number() OVER (ORDER BY found.score DESC NULLS LAST, key) AS rank
            FROM alive LEFT JOIN found USING (key))
        WHERE score IS NULL OR NOT {passed}""",
    )


def score(image_ND: np.ndarray, prompt_PD: np.ndarray, against_AD: np.ndarray, example_ED: np.ndarray) -> np.ndarray:
    """The score (N) of each image, float64, rounded to six places: what is beyond them hangs on the order of additions.

    Args:
        image_ND: embeddings of images.
        prompt_PD: of the prompts.
        against_AD: of the contrast texts; with none their mean is 0.
        example_ED: of the example images; P + E ≥ 1.
    """
    import numpy as np

    parts = []
    if len(prompt_PD):
        common_N = _cosines(image_ND, against_AD).mean(axis=1) if len(against_AD) else 0.0
        parts.append(_cosines(image_ND, prompt_PD).max(axis=1) - common_N)
    if len(example_ED):
        parts.append(_cosines(image_ND, example_ED).max(axis=1))
    return np.round(np.stack(parts).mean(axis=0), 6)


def _cosines(image_ND: np.ndarray, other_MD: np.ndarray) -> np.ndarray:
    return (image_ND @ other_MD.T).astype("float64")


def fill(prompts: Sequence[str], concepts: Sequence[str]) -> list[str]:
    """Prompt templates as texts about each concept: `a photo of a {}` → `a photo of a cat`.

    Without concepts a template is about anything: `a satellite photo of {}` → `a satellite photo of something`.
    """
    filled = [p.replace("{}", concept) for p in prompts for concept in (concepts if "{}" in p else [""])]
    return filled if concepts else [prompt.replace("{}", "something") for prompt in prompts]


def _scores(selection: Selection, step: Relevance) -> pa.Table:
    """`key` and `score` of every image with an embedding."""
    import numpy as np
    import pyarrow as pa

    concepts = read_concepts(label(step), step.concepts) if step.concepts is not None else []
    prompts = fill(step.prompts, concepts)
    prompt_PD = embedded_texts(selection, prompts)
    against_AD = embedded_texts(selection, step.against) if prompts else prompt_PD
    example_ED = _examples(selection, step) if step.images else np.zeros((0, 0), np.float32)
    positive_PD = prompt_PD if len(prompt_PD) else example_ED
    tables = [pa.table({"key": pa.array([], pa.string()), "score": pa.array([], pa.float64())})]
    for keys, image_ND in selection.embeddings():
        if len(image_ND):
            same_width(image_ND, positive_PD, label(step))
            tables.append(pa.table({"key": keys, "score": score(image_ND, prompt_PD, against_AD, example_ED)}))
    return pa.concat_tables(tables, promote_options="permissive")


def _examples(selection: Selection, step: Relevance) -> np.ndarray:
    """The examples' embeddings, float32 (E, D)."""
    import numpy as np

    file = known_images(selection, find(label(step), step.images or ""), embed=True)
    found = [vectors(block) for block in blocks(file, ["embedding"])]
    if not any(map(len, found)):
        raise InputError(f"{label(step)}: none of the images in {step.images} can be decoded")
    return np.concatenate([example_ED for example_ED in found if len(example_ED)])
