"""Images that are here already: read in place, by the same engine, without a request."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa

from curate.fetch import run
from curate.fetch.task import ShardTask
from curate.files import write_parquet
from tests.curate.fetching import encoded, images, jpeg, make_here, patient, photo, read_rows, read_stats

PLACES = pa.schema({"source_file": pa.string(), "source_offset": pa.int64(), "source_size": pa.int64()})


def plan_of(out, places, shard=0):
    """`out/plan/NNNNN.parquet` with a row for each (file, offset, size)."""
    rows = [
        {
            "key": f"{shard:02d}{number:08d}",
            "row": number,
            "url": f"{file}#{number}",
            "caption": f"picture {number}",
            "source_file": str(file),
            "source_offset": offset,
            "source_size": size,
        }
        for number, (file, offset, size) in enumerate(places)
    ]
    schema = pa.schema({"key": pa.string(), "row": pa.int64(), "url": pa.string(), "caption": pa.string()})
    path = out / "plan" / f"{shard:05d}.parquet"
    write_parquet(pa.Table.from_pylist(rows, pa.unify_schemas([schema, PLACES])), path, made_from="test")
    return path


def task_of(out, root, places, shard=0, **changes):
    plan = plan_of(out, places, shard)
    return ShardTask(plan, out / "raw" / plan.stem, "test", patient(**changes), root=root)


def read_here(out, root, places, **changes):
    """Read one shard in this process; its rows, in the order of the places."""
    make_here(out, [task_of(out, root, places, **changes)], patient(**changes))
    return read_rows(out)


def test_whole_files_and_places_in_files_give_what_a_download_would(tmp_path):
    (tmp_path / "one.jpg").write_bytes(jpeg(1))
    packed = b"before" + jpeg(2) + encoded(photo(3), "PNG")
    (tmp_path / "packed").write_bytes(packed)
    split = 6 + len(jpeg(2))
    places = [("one.jpg", None, None), ("packed", 6, len(jpeg(2))), ("packed", split, len(packed) - split)]
    rows = read_here(tmp_path, tmp_path, places)
    assert [row["status"] for row in rows] == ["success"] * 3
    assert [row["format"] for row in rows] == ["jpeg", "jpeg", "png"]
    assert [row["http_status"] for row in rows] == [None] * 3
    assert list(images(tmp_path).values()) == [jpeg(1), jpeg(2), encoded(photo(3), "PNG")]
    assert read_stats(tmp_path)["successes"] == 3


def test_each_way_a_file_can_fail_has_its_reason(tmp_path):
    (tmp_path / "text.jpg").write_bytes(b"not an image at all, whatever its name")
    (tmp_path / "short").write_bytes(jpeg(1)[:200])
    (tmp_path / "big.jpg").write_bytes(jpeg(1) + bytes(5_000))
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "good.jpg").write_bytes(jpeg(2))
    places = [
        ("text.jpg", None, None),
        ("gone.jpg", None, None),
        ("short", 100, 400),
        ("big.jpg", None, None),
        ("empty.jpg", None, None),
        ("folder.jpg", None, None),
        ("good.jpg", None, None),
    ]
    rows = read_here(tmp_path, tmp_path, places, max_bytes=4_000)
    assert [row["reason"] for row in rows] == [
        "not_an_image",
        "unreadable",
        "unreadable",
        "too_large",
        "empty_body",
        "unreadable",
        None,
    ]
    assert rows[1]["value"] == "gone.jpg: No such file or directory"
    assert rows[2]["value"] == "short: ends at 200, not at 500"


def test_what_was_unreadable_is_read_when_failed_rows_are_asked_for_again(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    plan_of(tmp_path, [("a.jpg", None, None), ("b.jpg", None, None)])
    (tmp_path / "plan" / "plan.json").write_text(f'{{"root": "{tmp_path}"}}')
    assert run(tmp_path, patient()).counts == {"success": 1, "unreadable": 1}
    (tmp_path / "b.jpg").write_bytes(jpeg(2))
    assert run(tmp_path, patient()).made == 0
    again = run(tmp_path, patient(), retry_failed=True)
    assert (again.made, again.counts) == (1, {"success": 2})


TWO_SHARDS = """
import resource, sys
from pathlib import Path
from tests.curate.fetching import patient, make_here
from tests.curate.test_fetch_local import task_of

out = Path(sys.argv[1])
config = patient(image_size=16)
tasks = [task_of(out, out, [("photo.jpg", None, None)] * int(sys.argv[2]), shard, image_size=16) for shard in (0, 1)]
make_here(out, tasks, config)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10))
"""


def test_large_files_are_held_within_bounds(tmp_path):
    """Two shards of photographs of 19 MB each: at 16 at once they alone would be 300 MB."""
    (tmp_path / "photo.jpg").write_bytes(jpeg(1) + bytes(19_000_000))
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}

    def peak_mb(count):
        command = [sys.executable, "-c", TWO_SHARDS, str(tmp_path), str(count)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=100)
        return int(done.stdout)

    assert peak_mb(12) - peak_mb(1) < 100
    assert {row["status"] for shard in (0, 1) for row in read_rows(tmp_path, shard)} == {"success"}
