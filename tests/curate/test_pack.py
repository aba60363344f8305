import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate import pack
from curate.ask.arguments import VerifyOptions
from curate.ask.verify import verify
from curate.config import PackConfig, SelectConfig
from curate.errors import ConfigError, InputError
from curate.files import made_from, write_parquet
from curate.index import read_index
from curate.shards import SPLITS, ShardWriter
from tests.curate.fetched import encoded, fetched, ledger, noise, pack_rows, row, select_rows


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    """40 rows, of which 36 came as images; selected into splits."""
    rows = [row(n, None if n % 10 == 9 else noise(n)) for n in range(40)]
    out = fetched(tmp_path_factory.mktemp("crawl") / "out", rows, shard_size=15)
    select_rows(out, [], val=0.2, test=0.2)
    return out


@pytest.fixture
def out(crawl, tmp_path):
    return Path(shutil.copytree(crawl, tmp_path / "out"))


def content(out):
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


def rows_of(out, split):
    return [
        line for stem in read_index(out, split).tars for line in pq.read_table(stem.with_suffix(".parquet")).to_pylist()
    ]


def test_the_shards_hold_what_the_ledger_keeps_each_image_byte_for_byte(out):
    result = pack_rows(out, shard_size=10)
    lines = [line for line in ledger(out) if line["kept"]]
    assert result.samples == {split: Counter(line["split"] for line in lines)[split] for split in SPLITS}
    for split in ("train", "val", "test"):
        found = {line["key"]: line for line in rows_of(out, split)}
        assert found.keys() == {line["key"] for line in lines if line["split"] == split}
        for line in found.values():
            assert line["sha256"] == hashlib.sha256(encoded(noise(line["row"]))).hexdigest()
    index = read_index(out, "train", columns=["sha256"])
    from curate.index import iter_images

    for (key, caption, image), sha256 in zip(iter_images(index), index.table["sha256"].to_pylist(), strict=True):
        assert hashlib.sha256(image).hexdigest() == sha256
        assert caption == next(line["caption"] for line in lines if line["key"] == key)


def test_a_shard_has_all_columns_of_raw_and_the_group(out):
    pack_rows(out)
    raw = pq.read_schema(next((out / "raw").glob("*.parquet"))).names
    packed = pq.read_schema(out / "shards" / "train-00000.parquet").names
    offsets = raw.index("image_ext")
    assert packed == [*raw[:offsets], "duplicate_group", *raw[offsets:]]
    groups = {line["key"]: line["duplicate_group"] for line in ledger(out)}
    assert all(line["duplicate_group"] == groups[line["key"]] for line in rows_of(out, "train"))


def test_the_clip_score_comes_along_where_it_was_measured(out):
    for path in (out / "raw").glob("*.parquet"):
        keys = [line["key"] for line in pq.read_table(path).to_pylist() if line["status"] == "success"]
        scores = pa.array([int(key[:4], 16) / 65536 for key in keys], pa.float32())
        write_parquet(
            pa.table({"key": keys, "clip_score": scores}), out / "signals" / "clip" / path.name, made_from="x"
        )
    pack_rows(out)
    for line in rows_of(out, "train"):
        assert line["clip_score"] == pytest.approx(int(line["key"][:4], 16) / 65536)


def test_shards_are_of_near_equal_size_and_none_is_a_dwarf():
    for total in range(60):
        sizes = [shard.end - shard.start for shard in pack._cut("train", total, 7)]
        assert sum(sizes) == total
        assert len(sizes) == -(-total // 7)
        assert not sizes or (max(sizes) <= 7 and max(sizes) - min(sizes) <= 1)


@pytest.mark.parametrize("most", [100_000, 250_000, 5_000_000])
def test_shards_by_bytes_are_full_but_never_over_and_none_is_a_dwarf(tmp_path, most):
    rng = np.random.default_rng(0)
    padding = [rng.bytes(int(size)) for size in rng.integers(0, 40_000, 60)]
    rows = [
        row(n, noise(n, 8), content=encoded(noise(n, 8)) + padding[n], caption='„ä\x01"quoted" ' * (n % 40))
        for n in range(60)
    ]
    out = fetched(tmp_path / "out", rows, shard_size=25)
    for path in (out / "raw").glob("*.parquet"):
        keys = [line["key"] for line in pq.read_table(path).to_pylist() if line["status"] == "success"]
        scores = pa.array([1 / 3 * 10**-number for number in range(len(keys))], pa.float32())
        write_parquet(pa.table({"key": keys, "clip_score": scores}), out / "signals" / path.name, made_from="x")
    select_rows(out, [], val=0.2)
    result = pack_rows(out, shard_bytes=most, shard_size=1)
    assert sum(result.samples.values()) == 60
    for split in ("train", "val"):
        tars = read_index(out, split).tars
        sizes = [tar.stat().st_size for tar in tars]
        assert max(sizes) <= most
        assert len(sizes) == 1 or min(sizes) > max(sizes) / 2 - 45_000
        total = sum(sizes)
        assert len(sizes) <= 1 + 2 * total / most
    assert not verify(out, VerifyOptions()).faults[1:]  # there is no manifest yet
    before = content(out)
    assert pack_rows(out, shard_bytes=most, shard_size=1).made == 0
    again = tmp_path / "again"
    shutil.copytree(out, again, ignore=shutil.ignore_patterns("shards"))
    pack_rows(again, shard_bytes=most, shard_size=1)
    assert content(again) == before


@given(st.lists(st.integers(1, 1_000), max_size=80), st.integers(1, 3_000))
def test_runs_of_near_equal_sums_hold_everything_once_and_none_is_over_but_alone(sizes, most):
    bounds = pack.cut_evenly(np.array(sizes, np.int64), most)
    assert bounds[0] == 0
    assert bounds[-1] == len(sizes)
    runs = [sizes[start:end] for start, end in pairwise(bounds)]
    assert all(runs)
    assert all(sum(run) <= most or len(run) == 1 for run in runs)
    assert len(runs) <= 2 * sum(sizes) / most + 2
    # Each run's end is within half an item of its even share of the whole.
    if len(set(sizes)) == 1 and runs:
        assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_a_limit_below_the_least_item_gives_each_a_run_of_its_own_at_once():
    for most in (1_000 - 10_240, 0, 50_000):
        assert pack.cut_evenly(np.full(200_000, 50_000), most) == list(range(200_001))


def test_a_limit_that_no_sample_fits_is_told():
    for most in (0, 1_000, 99_999):
        with pytest.raises(ConfigError, match=rf"pack.shard_bytes: {most} bytes .*at least 100000, such as 1000000000"):
            PackConfig(shard_bytes=most)


def test_a_single_sample_over_the_limit_has_a_shard_of_its_own(tmp_path):
    rows = [row(n, noise(n, 8), content=encoded(noise(n, 8)) + os.urandom(200_000 * (n == 4))) for n in range(10)]
    out = fetched(tmp_path / "out", rows)
    select_rows(out, [])
    pack_rows(out, shard_bytes=100_000)
    sizes = {tar: tar.stat().st_size for tar in read_index(out, "train").tars}
    large = [tar for tar, size in sizes.items() if size > 100_000]
    assert [pq.read_metadata(tar.with_suffix(".parquet")).num_rows for tar in large] == [1]


def test_the_database_keeps_to_the_limits_that_are_set(out):
    with pytest.raises(ConfigError, match=r"select\.memory_limit 'much'"):
        pack.run(out, PackConfig(), 0, SelectConfig(memory_limit="much"))
    with pytest.raises(ConfigError, match=r"select\.memory_limit 1MB: not enough"):
        pack.run(out, PackConfig(), 0, SelectConfig(memory_limit="1MB", threads=1))
    assert pack.run(out, PackConfig(), 0, SelectConfig(memory_limit="100MB", threads=1)).shards == 3


def test_no_duplicate_group_lies_in_two_splits(tmp_path):
    """Pictures in fives, each near its neighbour: whichever is kept and wherever, a group stays together."""
    rows = [row(n, noise(n // 5), caption=f"picture {n}") for n in range(150)]
    out = fetched(tmp_path / "out", rows, shard_size=40)
    select_rows(out, [{"name": "some", "sample": {"count": 90}}], val=0.3, test=0.3)
    pack_rows(out, shard_size=20)
    splits = {}
    for split in ("train", "val", "test"):
        for line in rows_of(out, split):
            assert splits.setdefault(line["sha256"], split) == split
    assert set(splits.values()) == {"train", "val", "test"}
    assert len(splits) > 20


def test_the_order_is_shuffled_over_all_raw_shards_and_hangs_on_the_seed(out):
    pack_rows(out, shard_size=1_000)
    order = [line["row"] for line in rows_of(out, "train")]
    assert order != sorted(order)
    raw = {
        line["key"]: path.name for path in (out / "raw").glob("*.parquet") for line in pq.read_table(path).to_pylist()
    }
    origins = [raw[line["key"]] for line in rows_of(out, "train")]
    assert origins != sorted(origins)
    pack_rows(out, seed=1, shard_size=1_000)
    assert [line["row"] for line in rows_of(out, "train")] != order


def test_equal_inputs_give_equal_bytes(out, crawl, tmp_path):
    pack_rows(out, shard_size=7)
    again = Path(shutil.copytree(crawl, tmp_path / "again"))
    pack_rows(again, shard_size=7)
    assert content(out) == content(again)


def test_what_is_there_and_right_is_left_alone(out):
    first = pack_rows(out, shard_size=7)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    assert pack_rows(out, shard_size=7).made == 0
    victim = out / "shards" / "train-00001.tar"
    victim.unlink()
    assert pack_rows(out, shard_size=7).made == 1
    changed = {path.stem for path in (out / "shards").iterdir() if path.stat().st_mtime_ns != stamps[path]}
    assert changed == {"train-00001"}
    assert first.made == first.shards == len(stamps) / 2


def test_a_changed_ledger_packs_anew_and_stale_shards_and_leftovers_go(out):
    pack_rows(out, shard_size=5)
    (out / "shards" / ".train-00000.tar.1.tmp").write_text("of a killed run")
    (out / "shards" / "notes.txt").write_text("not ours")
    select_rows(out, [{"name": "few", "where": "row < 6"}])
    result = pack_rows(out, shard_size=5)
    assert result.samples["train"] == 6
    assert {path.name for path in (out / "shards").iterdir()} == {
        "notes.txt",
        *(f"train-0000{n}.{form}" for n in (0, 1) for form in ("tar", "parquet")),
    }


def test_new_image_bytes_under_the_same_ledger_are_packed(out):
    """The decisions may stay the same though the images were fetched anew and stored in another quality."""
    pack_rows(out)
    old = made_from(out / "shards" / "train-00000.parquet")
    for path in (out / "raw").glob("*.parquet"):
        write_parquet(pq.read_table(path), path, made_from="fetched anew")
    assert pack_rows(out).made == 3
    assert made_from(out / "shards" / "train-00000.parquet") != old


def test_what_is_missing_is_told(out, tmp_path):
    with pytest.raises(InputError, match="run `curate select` first"):
        pack_rows(tmp_path / "nothing")
    for path in (out / "raw").glob("*.parquet"):
        path.unlink()
        break
    with pytest.raises(InputError, match="lacks the images of"):
        pack_rows(out)


def test_more_raw_shards_than_a_process_may_open(tmp_path, monkeypatch):
    """1,024 is the usual limit, and a large crawl has more shards; here all the numbers are smaller."""
    import resource

    rows = [row(n, noise(n, 8)) for n in range(120)]
    out = fetched(tmp_path / "out", rows, shard_size=1)
    assert len(list((out / "raw").glob("*.tar"))) > 60  # more than may be open below
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr("curate.index.MAX_OPEN_TARS", 8)
    monkeypatch.setattr("curate.database.FILES_AT_ONCE", 20)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 50, hard))
    try:
        select_rows(out, [])
        assert pack_rows(out).samples["train"] == 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_memory_is_that_of_one_shard_not_of_the_dataset(tmp_path):
    """Nothing of a shard outlives its writing: what is held is bounded by the largest shard."""
    import tracemalloc

    blob = os.urandom(300_000)
    rows = [row(n, noise(n, 8), content=encoded(noise(n, 8)) + blob) for n in range(60)]
    out = fetched(tmp_path / "out", rows, shard_size=60)
    select_rows(out, [])
    tracemalloc.start()
    pack_rows(out, shard_size=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6, f"{peak / 1e6:.1f} MB of {60 * 0.3:.0f} MB"


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def stages(folder, kill_at, shard_size=6):
    script = Path(__file__).with_name("killing.py")
    return subprocess.run(
        [sys.executable, str(script), str(folder), str(kill_at), str(shard_size)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"},
        check=False,
    )


def every_file(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for stage in ("plan", "shards", "ledger.parquet")
        for path in sorted([folder / stage, *(folder / stage).rglob("*")])
        if path.is_file()
    }


def test_killed_at_any_moment_and_run_again_the_bytes_are_those_of_an_unbroken_run(tmp_path):
    rows = [row(n, noise(n // 2)) | {"caption": f"caption {n}" if n % 5 else "x"} for n in range(30)]
    whole = fetched(tmp_path / "whole", rows, [{"name": "words", "where": "caption_words > 1"}], shard_size=8)
    shutil.copy(tmp_path / "whole.csv", tmp_path / "list.csv")
    broken = Path(shutil.copytree(whole, tmp_path / "broken"))
    shutil.rmtree(broken / "plan")
    shutil.rmtree(whole / "plan")
    lived = stages(whole, 0)
    assert lived.returncode == 0, lived.stderr
    expected, moments = every_file(whole), int(lived.stdout)
    assert moments > 40
    # One folder, killed again and again, each time a few steps further: the work of every killed run is built upon.
    kills = 0
    for kill_at in (1, 5, 9, 13, 3, 8, 4, 11, 2):
        result = stages(broken, kill_at)
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
        kills += 1
        finals = [path for path in every_file(broken) if not Path(path).name.startswith(".")]
        for name in finals:
            if name.endswith(".parquet"):
                pq.read_table(broken / name)  # whole, whatever happened
    assert kills >= 5
    final = stages(broken, 0)
    assert final.returncode == 0, final.stderr
    assert every_file(broken) == expected


def test_a_repack_that_is_killed_never_leaves_an_old_parquet_beside_a_new_tar(tmp_path):
    rows = [row(n, noise(n), caption="two words") for n in range(16)]
    out = fetched(tmp_path / "out", rows, [{"name": "words", "where": "caption_words > 1"}], shard_size=8)
    shutil.copy(tmp_path / "out.csv", tmp_path / "list.csv")
    shutil.rmtree(out / "plan")
    assert stages(out, 0, shard_size=16).returncode == 0
    for kill_at in (3, 4, 5, 6, 7):
        folder = Path(shutil.copytree(out, tmp_path / str(kill_at)))
        assert stages(folder, kill_at, shard_size=5).returncode == -signal.SIGKILL
        for tar in folder.glob("shards/*.tar"):
            if tar.with_suffix(".parquet").exists():
                for line in pq.read_table(tar.with_suffix(".parquet")).to_pylist():
                    with tar.open("rb") as file:
                        file.seek(line["image_offset"])
                        assert hashlib.sha256(file.read(line["image_size"])).hexdigest() == line["sha256"]


def test_a_kill_between_tar_and_parquet_leaves_no_shard_that_counts(tmp_path):
    stem = tmp_path / "train-00000"
    schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
    with ShardWriter(stem, schema, made_from="old") as shard:
        shard.add({"key": "a", "caption": "x"}, b"1" * 10)
    before = stem.with_suffix(".parquet").read_bytes()
    assert pack._finished(stem, "old")
    stem.with_suffix(".parquet").unlink()
    assert not pack._finished(stem, "old")
    stem.with_suffix(".parquet").write_bytes(before)
    stem.with_suffix(".tar").unlink()
    assert not pack._finished(stem, "old")
    assert io.BytesIO(before).getbuffer().nbytes > 100
