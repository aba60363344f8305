"""`curate plan` on a list of 10 million rows: time and memory, beside pandas on the same work where it fits.

    python benchmarks/plan.py             10 million rows; pandas on the first million of them
    python benchmarks/plan.py --quick     1 million rows

The same work: white space off the URLs, (URL, caption) repeats out, host and number of words of each row, Parquet files
of 10,000 rows. pandas computes no stable ids. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import duckdb

WORDS = "['red','shoe','photo','of','a','the','vintage','car','house','with','garden','old','new','satellite','view']"
OURS = """
import sys
from pathlib import Path
from curate import plan
from curate.config import PlanConfig
from curate.filters import parse_steps
steps = parse_steps([{"name": "words", "where": "caption_words BETWEEN 4 AND 60"}])
result = plan.run(sys.argv[1], Path(sys.argv[2]), PlanConfig(), steps)
print(result.rows, result.candidates)
"""
PANDAS = """
import sys
from pathlib import Path
import pandas as pd
rows = pd.read_parquet(sys.argv[1])
rows["url"] = rows["url"].str.strip()
total = len(rows)
rows = rows.drop_duplicates(["url", "caption"])
rows["url_host"] = rows["url"].str.extract(r"^https?://([^/:]+)", expand=False).str.lower()
rows["caption_words"] = rows["caption"].str.split().str.len()
rows = rows[rows["caption_words"].between(4, 60)]
out = Path(sys.argv[2])
out.mkdir()
for number, start in enumerate(range(0, len(rows), 10_000)):
    rows.iloc[start:start + 10_000].to_parquet(out / f"{number:05d}.parquet", compression="zstd", index=False)
print(total, len(rows))
"""


def write_list(path: Path, rows: int) -> None:
    """URLs of 50,000 hosts, captions of 2 to 13 words, two columns more; one row in a hundred stands twice."""
    words = f"list_transform(range(2 + (hash(n + 1) % 12)::INT), lambda k: ({WORDS})[1 + (hash(n * 31 + k) % 15)::INT])"
    duckdb.connect().execute(f"""COPY (
        SELECT 'https://img' || (hash(n) % 50000) || '.example.org/photos/' || md5(n::VARCHAR) || '.jpg' AS url,
            array_to_string({words}, ' ') AS caption, hash(n) % 1000 AS score, 300 + hash(n + 5) % 1500 AS width
        FROM (SELECT CASE WHEN i % 100 = 99 THEN i - 1 ELSE i END AS n FROM range({rows}) t(i))
    ) TO '{path}' (FORMAT parquet)""")


def measured(program: str, listed: Path, out: Path) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of a program, and what it printed."""
    code = f"{program}\nimport resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), os.times().elapsed
    ran = subprocess.run(
        [sys.executable, "-c", code, str(listed), str(out)], check=True, capture_output=True, text=True
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), os.times().elapsed - wall
    rows, kept, peak_mb = ran.stdout.split()[-3:]
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"rows": int(rows), "kept": int(kept), "seconds": wall, "cpu_s": cpu_s, "peak_mb": float(peak_mb)}


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 million rows; else 10 million")
    rows = 1_000_000 if parser.parse_args().quick else 10_000_000
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_list(folder / "list.parquet", rows)
        write_list(folder / "million.parquet", 1_000_000)
        ours = measured(OURS, folder / "list.parquet", folder / "ours")
        same = ours if rows == 1_000_000 else measured(OURS, folder / "million.parquet", folder / "same")
        pandas = measured(PANDAS, folder / "million.parquet", folder / "pandas")
    assert same["kept"] == pandas["kept"], "not the same work"
    cores, python = os.cpu_count(), platform.python_version()
    print(f"{platform.machine()}, {cores} cores, Python {python}, DuckDB {duckdb.__version__}\n")
    print("| | rows | seconds | CPU s | peak MB |\n|---|---|---|---|---|")
    table = {"curate plan": ours, f"pandas {version('pandas')}": pandas}
    if same is not ours:
        table = {"curate plan": ours, "curate plan, the first million": same, f"pandas {version('pandas')}": pandas}
    for name, found in table.items():
        print(
            f"| {name} | {found['rows']:,} | {found['seconds']:.1f} | {found['cpu_s']:.1f} | {found['peak_mb']:.0f} |"
        )
    figures = {name: round(ours[name], 1) for name in ("rows", "seconds", "cpu_s", "peak_mb")}
    ratios = {
        "cpu_ratio_to_pandas": round(pandas["cpu_s"] / same["cpu_s"], 2),
        "memory_ratio_to_pandas": round(pandas["peak_mb"] / same["peak_mb"], 2),
    }
    print("\n" + json.dumps({**figures, **ratios}))


if __name__ == "__main__":
    main()
