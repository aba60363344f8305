"""`curate report` of a ledger of 10 million rows: time, memory, and the size of the page.

    python benchmarks/report.py             0.1, 1 and 10 million rows
    python benchmarks/report.py --quick     0.1 and 1 million rows
    python benchmarks/report.py --rows 10000000

The folder has what a build leaves: plan/ and raw/ with the default recipe's columns, signals of captions and of a CLIP
with embeddings, a tar beside each raw shard to make thumbnails from, and the ledger that `curate select` writes. Then
`curate report` runs in a process of its own; and a second time, when its thumbnails are there. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.selection import A_FILE, METADATA, name, run, write_folder

MAX_MB = 8
PICTURES = 40  # in each tar
WIDTH = 16  # of the embeddings
REPORT = """
import yaml
from importlib import resources
from pathlib import Path
from curate import report
from curate.config import ReportConfig, SelectConfig
recipe = yaml.safe_load((resources.files("curate") / "recipes" / "default.yaml").read_text())
steps = [step for step in recipe["filters"] if step["name"] not in ("near", "a_caption")]
def work():
    return report.run(Path(sys.argv[1]), ReportConfig(), {"filters": steps}, 0, SelectConfig(memory_limit="2GB")).size
measured(work)
"""


def pictures() -> list[bytes]:
    """JPEGs of 256 pixels with detail at every scale."""
    found = []
    for number in range(PICTURES):
        rng = np.random.default_rng(number)
        total = np.zeros((256, 256, 3))
        for side in (4, 16, 64, 256):
            noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
            total += np.asarray(noise.resize((256, 256), Image.Resampling.BICUBIC)) / 4
        buffer = io.BytesIO()
        Image.fromarray(total.astype(np.uint8)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def write_tar(path: Path) -> list[tuple[int, int]]:
    """A tar of the pictures; the offset and size of each."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, content in enumerate(pictures()):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as tar:
        return [(member.offset_data, member.size) for member in tar]


def write_signals(folder: Path) -> None:
    """signals/text and signals/clip of the images that came."""
    rng, db = np.random.default_rng(0), duckdb.connect()
    for group in ("text", "clip"):
        (folder / "signals" / group).mkdir(parents=True)
    for raw in sorted((folder / "raw").glob("*.parquet")):
        path = folder / "signals" / "text" / raw.name
        db.execute(f"""COPY (SELECT key, ['en', 'en', 'en', 'de', 'und'][1 + (hash(row) % 5)::INT] AS language,
            (hash(row + 6) % 100) / 100::FLOAT AS language_score, (hash(row + 7) % 100) / 100::FLOAT AS letter_share
            FROM read_parquet('{raw}') WHERE status = 'success') TO '{path}' (FORMAT parquet, COMPRESSION zstd)""")
        keys = pq.read_table(path, columns=["key"])["key"]
        vectors_ND = rng.normal(size=(len(keys), WIDTH)).astype(np.float16)
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), WIDTH)
        scores = pa.array(rng.normal(0.25, 0.05, len(keys)).astype(np.float32))
        clip = pa.table({"key": keys, "clip_score": scores, "image_embedding": flat})
        pq.write_table(clip, folder / "signals" / "clip" / raw.name)


def make_folder(folder: Path, rows: int) -> None:
    """All that the report reads."""
    places = write_tar(folder / "pictures.tar")
    offsets, sizes = ([place[which] for place in places] for which in (0, 1))
    place = f"1 + (hash(row) % {PICTURES})::INT"
    write_folder(
        folder,
        rows,
        f""", CASE WHEN came THEN NULL ELSE 404 END AS http_status,
        CASE WHEN came THEN (hash(file + 5) % 800) / 100.0 END AS entropy,
        CASE WHEN came THEN (hash(file + 6) % 90000) / 10.0 END AS blur,
        CASE WHEN came THEN {offsets}[{place}] END AS image_offset,
        CASE WHEN came THEN {sizes}[{place}] END AS image_size
        """,
    )
    for number in range(-(-rows // A_FILE)):
        os.link(folder / "pictures.tar", folder / "raw" / f"{number:05d}.tar")
    write_signals(folder)
    run(METADATA, folder)


def main() -> None:
    """Make the folders, report on them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 1 million rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    given = parser.parse_args()
    sizes = given.rows[:2] if given.quick else given.rows
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", end=", ")
    print(", ".join(f"{package} {version(package)}" for package in ("duckdb", "pillow")) + "\n")
    print("| rows | seconds | CPU s | peak GB | again, seconds | report.html, MB |\n|---|---|---|---|---|---|")
    figures: dict[str, float] = {}
    for rows in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_folder(folder, rows)
            spent, again = run(REPORT, folder), run(REPORT, folder)
        html_mb = spent["found"] / 1e6
        told = f"{spent['seconds']:.1f} | {spent['cpu_s']:.1f} | {spent['peak_gb']:.2f} | {again['seconds']:.1f}"
        print(f"| {rows:,} | {told} | {html_mb:.2f} |", flush=True)
        figures |= {f"seconds_{name(rows)}": spent["seconds"], f"cpu_s_{name(rows)}": spent["cpu_s"]}
        figures |= {f"peak_gb_{name(rows)}": spent["peak_gb"], "html_mb": html_mb}
        assert html_mb <= MAX_MB, f"report.html: {html_mb:.1f} MB"
    print(f"\n{json.dumps({key: round(value, 3) for key, value in figures.items()})}")


if __name__ == "__main__":
    main()
