"""`curate select` on 10 million rows, and what finds its duplicates, with growth, and beside pandas and faiss.

    python benchmarks/select.py             0.1, 1 and 10 million rows; embeddings of 0.05, 0.2 and 1 million images
    python benchmarks/select.py --quick     0.1 and 1 million rows; 0.05 million embeddings

    metadata    the default recipe, but `near` and what text signals decide: lengths, sides, flatness, equal bytes; and
                the ledger written
    phash       all near duplicates at distance 4, of hashes of which a tenth are near copies and 20,000 are one crowd
    semantic    embeddings of 512 numbers with a cosine of at least 0.95, of which a tenth have one

pandas does metadata's work as far as it can hold it (1 million rows), and writes no ledger. faiss compares all with
all, as far as that is sensible: 50,000 embeddings, which tell the share of pairs that is found; and 100,000 hashes.
Each part is a process of its own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import duckdb

A_FILE = 10_000
WORDS = "['red','shoe','photo','of','a','the','vintage','car','house','with','garden','old','new','satellite','view']"
MEASURED = """
import json, resource, time
def measured(work):
    wall, cpu = time.monotonic(), time.process_time()
    found = work()
    spent = {"seconds": time.monotonic() - wall, "cpu_s": time.process_time() - cpu}
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**spent, "peak_gb": peak_gb, "found": found}))
"""
METADATA = """
import yaml
from importlib import resources
from pathlib import Path
from curate import select
from curate.config import MeasureConfig, PackConfig, SelectConfig
from curate.filters import parse_steps
recipe = yaml.safe_load((resources.files("curate") / "recipes" / "default.yaml").read_text())
steps = parse_steps([step for step in recipe["filters"] if step["name"] not in ("near", "a_caption")])
def work():
    nothing = MeasureConfig(text=False)
    result = select.run(Path(sys.argv[1]), steps, SelectConfig(memory_limit="2GB"), PackConfig(), nothing, 0)
    return sum(result.kept.values())
measured(work)
"""
PANDAS = """
from pathlib import Path
import pandas as pd
def work():
    files = sorted(Path(sys.argv[1]).glob("raw/*.parquet"))
    columns = ["key", "status", "caption_words", "caption_chars", "original_width", "original_height", "aspect",
        "luma_std", "sha256"]
    rows = pd.concat([pd.read_parquet(file, columns=columns) for file in files])
    rows = rows[rows.status == "success"]
    rows = rows[rows.caption_words.between(2, 100) & (rows.caption_chars >= 5)]
    rows = rows[(rows[["original_width", "original_height"]].min(axis=1) >= 200) & (rows.aspect <= 3)]
    rows = rows[rows.luma_std >= 4]
    rows["area"] = rows.original_width * rows.original_height
    return len(rows.sort_values(["area", "key"], ascending=[False, True]).drop_duplicates("sha256"))
measured(work)
"""
HASHES = """
import numpy as np
def hashes(count):
    random = np.random.default_rng(0)
    found = random.integers(0, 2**64, count, dtype=np.uint64)
    near = random.choice(count, count // 10, replace=False)
    found[near] = found[random.integers(0, count, len(near))]
    for _ in range(3):
        found[near] ^= np.uint64(1) << random.integers(0, 64, len(near), dtype=np.uint64)
    crowd = random.choice(count, min(20_000, count // 50), replace=False)
    found[crowd] = random.integers(0, 2**16, len(crowd), dtype=np.uint64) << np.uint64(24)
    return np.unique(found)
"""
PHASH = (
    HASHES
    + """
from curate.select.near import near_groups
of = hashes(int(sys.argv[2]))
measured(lambda: len(np.unique(near_groups(of, 4))))
"""
)
PHASH_FAISS = (
    HASHES
    + """
import faiss
of = hashes(int(sys.argv[2]))
def work():
    index = faiss.IndexBinaryFlat(64)
    index.add(of.view(np.uint8).reshape(-1, 8))
    limits, _, _ = index.range_search(of.view(np.uint8).reshape(-1, 8), 5)
    return int(limits[-1])
measured(work)
"""
)
VECTORS = """
import numpy as np
from pathlib import Path
from curate.select import semantic
def batches(count, width=512):
    random = np.random.default_rng(0)
    topics = random.normal(size=(2_000, width)).astype(np.float32)
    for start in range(0, count, 50_000):
        size = min(50_000, count - start)
        of = 0.9 * topics[random.integers(0, len(topics), size)] + random.normal(size=(size, width)).astype(np.float32)
        of /= np.linalg.norm(of, axis=1, keepdims=True)
        copies = size // 10
        away = random.normal(size=(copies, width)).astype(np.float32)
        away *= np.sqrt(random.uniform(0.95, 1, (copies, 1)) ** -2 - 1) / np.linalg.norm(away, axis=1, keepdims=True)
        near = of[random.integers(0, size, copies)] + away
        of[size - copies :] = near / np.linalg.norm(near, axis=1, keepdims=True)
        yield np.arange(start, start + size), of
of = semantic.write_vectors(Path(sys.argv[1]), batches(int(sys.argv[2])))
"""
SEMANTIC = (
    VECTORS
    + """
measured(lambda: len(np.unique(semantic.near_groups(of, 0.95, 0))))
"""
)
SEMANTIC_ALL = (
    VECTORS
    + """
def pairs_of(blocks):
    return {(min(a, b), max(a, b)) for i, j in blocks for a, b in zip(i.tolist(), j.tolist()) if a != b}
def all_with_all():
    vectors = of.read(slice(None))
    for start in range(0, len(vectors), 2_048):
        i, j = np.nonzero(np.round(vectors[start : start + 2_048] @ vectors.T, 6) >= 0.95)
        yield i + start, j
def work():
    everything = pairs_of(all_with_all())
    return len(pairs_of(semantic.near_pairs(of, 0.95, 0)) & everything) / len(everything)
measured(work)
"""
)


def write_folder(folder: Path, rows: int, also: str = "") -> None:
    """plan/ and raw/ as they are after a fetch of so many rows: 85 % arrived, one in thirty is the same file again.

    `also`: SQL of further columns of raw/, each after a comma.
    """
    for stage in ("plan", "raw"):
        (folder / stage).mkdir(parents=True)
    db = duckdb.connect()
    words = f"list_transform(range(2 + (hash(n) % 12)::INT), lambda k: ({WORDS})[1 + (hash(n * 31 + k) % 15)::INT])"
    db.execute(f"""CREATE MACRO planned(a, b) AS TABLE
        SELECT *, length(caption) AS caption_chars, len(string_split(caption, ' ')) AS caption_words FROM (
        SELECT left(sha256(n::VARCHAR), 20) AS key, n AS row,
            'https://img' || (hash(n) % 50000) || '.example.org/photos/' || md5(n::VARCHAR) || '.jpg' AS url,
            array_to_string({words}, ' ') AS caption, 'img' || (hash(n) % 50000) || '.example.org' AS url_host
        FROM range(a, b) t(n))""")
    db.execute(f"""CREATE MACRO fetched(a, b) AS TABLE
        SELECT *, CASE WHEN came THEN 'success' ELSE 'failed_to_download' END AS status,
            CASE WHEN came THEN NULL ELSE 'http_status' END AS reason, CASE WHEN came THEN NULL ELSE '404' END AS value,
            CASE WHEN came THEN 100 + (hash(file + 1) % 1500)::INT END AS original_width,
            CASE WHEN came THEN 100 + (hash(file + 2) % 1500)::INT END AS original_height,
            least(original_width, 512) AS width, least(original_height, 512) AS height,
            CASE WHEN came THEN round(greatest(original_width, original_height) / least(original_width,
                original_height), 4) END AS aspect,
            CASE WHEN came THEN sha256(file::VARCHAR) END AS sha256,
            CASE WHEN came THEN hash(file + 3)::HUGEINT - 9223372036854775808 END::BIGINT AS phash,
            CASE WHEN came THEN (hash(file + 4) % 9000) / 100.0 END AS luma_std {also}
        FROM (SELECT *, hash(row + 5) % 100 < 85 AS came, CASE WHEN row % 30 = 29 THEN row - 7 ELSE row END AS file
            FROM planned(a, b))""")
    for number, start in enumerate(range(0, rows, A_FILE)):
        for stage, view in (("plan", "planned"), ("raw", "fetched")):
            part = f"{view}({start}, {min(rows, start + A_FILE)})"
            path = folder / stage / f"{number:05d}.parquet"
            db.execute(f"COPY (FROM {part}) TO '{path}' (FORMAT parquet, COMPRESSION zstd)")
    nulls = ", ".join(f"NULL::VARCHAR AS {column}" for column in ("step", "reason", "value", "twin"))
    dropped = folder / "plan" / "dropped.parquet"
    db.execute(f"COPY (SELECT *, {nulls} FROM planned(0, 0)) TO '{dropped}' (FORMAT parquet)")


def run(program: str, *arguments: object) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory of a program, and what it found."""
    command = [sys.executable, "-c", f"import sys\n{MEASURED}{program}", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr[-3000:])
    spent: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return spent


def name(count: int) -> str:
    """50k, 1m."""
    return f"{count // 1_000_000}m" if count >= 1_000_000 else f"{count // 1_000}k"


def show(part: str, count: int, spent: dict[str, float], said: str) -> None:
    """Print a line of the table."""
    cells = f"{spent['seconds']:.1f} | {spent['cpu_s']:.1f} | {spent['peak_gb']:.2f} | {said}"
    print(f"| {part} | {count:,} | {cells} |", flush=True)


def compare(sizes: list[int], embedded: list[int]) -> dict[str, float]:
    """Run all parts, print the table, and give the figures of the last line."""
    figures: dict[str, float] = {}
    print("| | rows | seconds | CPU s | peak GB | |\n|---|---|---|---|---|---|")
    for count in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_folder(folder, count)
            spent = run(METADATA, folder)
            show("metadata", count, spent, f"{spent['found']:,} kept")
            figures |= {f"seconds_{name(count)}": spent["seconds"], f"peak_gb_{name(count)}": spent["peak_gb"]}
            if count == 1_000_000:
                pandas = run(PANDAS, folder)
                show("metadata, pandas, no ledger", count, pandas, f"{pandas['found']:,} kept")
                assert pandas["found"] == spent["found"], "pandas keeps other rows"
                figures["pandas_seconds_1m"] = pandas["seconds"]
    for count in sizes:
        spent = run(PHASH, "-", count)
        show("phash", count, spent, f"{spent['found']:,} groups")
        figures |= {f"seconds_dedup_{name(count)}": spent["seconds"], f"peak_gb_dedup_{name(count)}": spent["peak_gb"]}
    spent = run(PHASH_FAISS, "-", 100_000)
    show("phash, faiss, all with all", 100_000, spent, f"{spent['found']:,} pairs, both ways and with themselves")
    figures["faiss_seconds_dedup_100k"] = spent["seconds"]
    with tempfile.TemporaryDirectory() as temporary:
        for count in embedded:
            spent = run(SEMANTIC, temporary, count)
            show("semantic", count, spent, f"{spent['found']:,} groups")
            figures |= {f"seconds_semantic_{name(count)}": spent["seconds"]}
            figures |= {f"peak_gb_semantic_{name(count)}": spent["peak_gb"]}
        spent = run(SEMANTIC_ALL, temporary, 50_000)
        show("semantic, all with all and ours", 50_000, spent, f"{spent['found']:.1%} of the pairs found")
        figures |= {"semantic_pairs_found": spent["found"], "all_pairs_seconds_50k": spent["seconds"]}
    return figures


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 1 million rows and 50,000 embeddings")
    asked = parser.parse_args()
    sizes, embedded = [100_000, 1_000_000, 10_000_000], [50_000, 200_000, 1_000_000]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", end=", ")
    print(", ".join(f"{package} {version(package)}" for package in ("duckdb", "faiss-cpu", "pandas")) + "\n")
    figures = compare(sizes[:2] if asked.quick else sizes, embedded[:1] if asked.quick else embedded)
    print(f"\n{json.dumps({key: round(value, 3) for key, value in figures.items()})}")


if __name__ == "__main__":
    main()
