"""Concepts: the words and terms by which a web crawl is balanced. A list of them is read, or mined from the captions.

`matching` finds which captions hold which concepts, `mining` makes a list from the captions themselves;
`curate.select.balance` is what uses both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from curate.concepts.mining import mine
from curate.config import ConceptsConfig
from curate.database import SPILL, connect, create_in_parts, enough_memory, files, parts
from curate.errors import ConfigError, InputError, UnwantedResult
from curate.files import digest, fingerprint, write_parquet, write_text

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
TEXT, TABLE = "concepts.txt", "concepts.parquet"
MINED = "mined"


def run(config: ConceptsConfig) -> pa.Table:
    """Mine a list from the planned captions of a dataset's folder; write `concepts.txt` and `concepts.parquet` there.

    Returns:
        What `mine` does: the most frequent concept first.

    Raises:
        InputError: the folder was not planned.
        UnwantedResult: nothing is as frequent as asked.
    """
    plan = sorted((config.out / "plan").glob("[0-9]*.parquet"))
    if not plan:
        raise InputError(f"{config.out / 'plan'}: no candidates there; run `curate plan` first")
    with (
        enough_memory(config.memory_limit),
        connect(config.memory_limit, config.threads, config.out / SPILL, [config.out / "plan"]) as db,
    ):
        create_in_parts(db, "captions", (f"SELECT caption FROM read_parquet({files(part)})" for part in parts(plan)))
        found = mine(db, "captions", min_count=config.min_count, min_pmi=config.min_pmi, count=config.count)
    if not found.num_rows:
        raise UnwantedResult(f"concepts: no word stands in {config.min_count:,} captions or more; lower --min_count")
    made = fingerprint(
        "concepts", FORMAT, [digest(path) for path in plan], config.min_count, config.min_pmi, config.count
    )
    write_parquet(found, config.out / TABLE, made_from=made)
    write_text(config.out / TEXT, "".join(f"{concept}\n" for concept in found["concept"].to_pylist()))
    return found


def read_concepts(where: str, given: str | Sequence[str]) -> list[str]:
    """A list of concepts in its order, each once: as given, or of a file.

    Args:
        where: what to call the place in an error.
        given: the list; or a text file with one concept a line; or a Parquet file with a column `concept`.

    Raises:
        ConfigError: the file is not there, is none of these, or holds nothing.
    """
    found = _of_file(where, Path(given)) if isinstance(given, str) else list(given)
    found = list(dict.fromkeys(concept.strip() for concept in found if concept.strip()))
    if not found:
        raise ConfigError(f"{where}: no concepts in {given}")
    return found


def _of_file(where: str, path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(
            f"{where}: concepts: {path}: no such file; expected one with a concept a line, a list, or '{MINED}'"
        )
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        if "concept" not in pq.read_schema(path).names:
            raise ConfigError(f"{where}: concepts: {path}: no column 'concept'")
        return [concept or "" for concept in pq.read_table(path, columns=["concept"])["concept"].to_pylist()]
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: concepts: {path}: not UTF-8 text (byte {error.start:,})") from error
