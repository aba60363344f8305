import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate.errors import InputError
from curate.files import (
    ROW_GROUP,
    atomic,
    digest,
    file_sha256,
    fingerprint,
    made_from,
    sweep,
    write_batches,
    write_parquet,
)
from curate.index import MemberReader, iter_images, read_index, tar_images
from curate.shards import ShardWriter, shard_name, shards_of

SCHEMA = pa.schema([("key", pa.string()), ("caption", pa.string()), ("width", pa.int64())])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200) | st.just("🦊\n\0" * 3000)


def write(folder, samples, *, name="00000", made="m", schema=SCHEMA):
    with ShardWriter(folder / name, schema, made_from=made) as shard:
        for number, (caption, image) in enumerate(samples):
            row = {"key": f"{number:020x}", "caption": caption, "width": number}
            shard.add(row, image, "jpg") if image is not None else shard.add(row)
    return folder / name


# --- writing and reading ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, st.binary(max_size=2000)), max_size=8))
def test_what_is_written_is_read_back_for_any_caption_and_any_bytes(tmp_path, samples):
    write(tmp_path, samples)
    found = list(iter_images(read_index(tmp_path)))
    assert found == [(f"{number:020x}", caption, image) for number, (caption, image) in enumerate(samples)]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, st.binary(min_size=1, max_size=500)), min_size=1, max_size=5))
def test_the_offsets_are_those_of_tarfile_and_members_are_adjacent(tmp_path, samples):
    stem = write(tmp_path, samples)
    rows = pq.read_table(stem.with_suffix(".parquet")).to_pylist()
    with tarfile.open(stem.with_suffix(".tar"), "r:") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [
            f"{row['key']}.{form}" for row in rows for form in ("jpg", "txt", "json")
        ]
        for row, (caption, _) in zip(rows, samples, strict=True):
            text, facts = (tar.extractfile(f"{row['key']}.{form}").read() for form in ("txt", "json"))
            assert text.decode() == caption
            assert json.loads(facts) == {"key": row["key"], "caption": caption, "width": row["width"]}
    for what, form in (("image", "jpg"), ("caption", "txt"), ("json", "json")):
        expected = {m.name: (m.offset_data, m.size) for m in members}
        assert [(row[f"{what}_offset"], row[f"{what}_size"]) for row in rows] == [
            expected[f"{row['key']}.{form}"] for row in rows
        ]


@pytest.mark.parametrize("key", ["0" * 20, "ключ-é", "k" * 95, "folder/" * 20 + "key"])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 70_001])
def test_the_bytes_are_those_that_tarfile_would_write(tmp_path, key, size):
    with ShardWriter(tmp_path / "s", SCHEMA, made_from="m") as shard:
        shard.add({"key": key, "caption": "a", "width": 1}, bytes(size), "png")
    reference = io.BytesIO()
    with tarfile.open(fileobj=reference, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        facts = json.dumps({"key": key, "caption": "a", "width": 1}, ensure_ascii=False, sort_keys=True).encode()
        for form, content in (("png", bytes(size)), ("txt", b"a"), ("json", facts)):
            member = tarfile.TarInfo(f"{key}.{form}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert (tmp_path / "s.tar").read_bytes() == reference.getvalue()


def test_the_tar_has_nothing_of_this_machine_in_it_and_gnu_tar_lists_it(tmp_path):
    stem = write(tmp_path, [("a", b"1"), ("b", b"2" * 5000)])
    with tarfile.open(stem.with_suffix(".tar")) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644
            assert not member.pax_headers
    listed = subprocess.run(["tar", "-tf", stem.with_suffix(".tar")], capture_output=True, text=True, check=True)
    assert listed.stdout.split()[:3] == [f"{0:020x}.{form}" for form in ("jpg", "txt", "json")]
    assert len(listed.stdout.split()) == 6


def test_numbers_that_json_does_not_have_are_null_in_it_and_stay_in_the_parquet(tmp_path):
    schema = pa.schema(
        {"key": pa.string(), "caption": pa.string(), "score": pa.float64(), "all": pa.list_(pa.float64())}
    )
    row = {"key": "0", "caption": "x", "score": float("nan"), "all": [1.5, float("-inf")]}
    with ShardWriter(tmp_path / "00000", schema, made_from="m") as shard:
        shard.add(row, b"image")
    with tarfile.open(tmp_path / "00000.tar") as tar:
        facts = json.loads(tar.extractfile("0.json").read(), parse_constant=pytest.fail)
    assert facts == {"key": "0", "caption": "x", "score": None, "all": [1.5, None]}
    (kept,) = pq.read_table(tmp_path / "00000.parquet").to_pylist()
    assert (repr(kept["score"]), kept["all"]) == ("nan", row["all"])


def test_equal_samples_give_equal_bytes(tmp_path):
    samples = [("a", b"1"), ("é", b"2" * 700), (None, None)]
    one, two = write(tmp_path / "one", samples), write(tmp_path / "two", samples)
    for suffix in (".tar", ".parquet"):
        assert one.with_suffix(suffix).read_bytes() == two.with_suffix(suffix).read_bytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file to the gc
def test_webdataset_reads_a_shard(tmp_path):
    samples = [("zwei Wörter", b"1" * 600), ("", b"2")]
    stem = write(tmp_path, samples)
    found = list(webdataset.WebDataset(str(stem.with_suffix(".tar")), shardshuffle=False, empty_check=False))
    assert [(s["__key__"], s["jpg"], s["txt"].decode()) for s in found] == [
        (f"{number:020x}", image, caption) for number, (caption, image) in enumerate(samples)
    ]
    assert json.loads(found[0]["json"])["width"] == 0


def test_pandas_reads_the_parquet(tmp_path):
    import pandas as pd

    frame = pd.read_parquet(write(tmp_path, [("a", b"1"), ("b", None)]).with_suffix(".parquet"))
    assert frame["caption"].tolist() == ["a", "b"]
    assert frame["image_offset"].notna().tolist() == [True, False]


def test_a_row_without_an_image_is_in_the_parquet_alone(tmp_path):
    stem = write(tmp_path, [("a", None), ("b", b"2"), (None, None)])
    assert pq.read_table(stem.with_suffix(".parquet"))["caption"].to_pylist() == ["a", "b", None]
    assert [caption for _, caption, _ in iter_images(read_index(tmp_path))] == ["b"]


def test_an_index_carries_columns_and_goes_through_splits_in_order(tmp_path):
    for split, size in (("train", 3), ("val", 2)):
        for index in range(2):
            write(tmp_path / "shards", [("x", b"1")] * size, name=shard_name(index, split))
    index = read_index(tmp_path, "train", columns=["width"])
    assert (len(index), index.table["width"].to_pylist()) == (6, [0, 1, 2] * 2)
    assert index.table["tar"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert [path.name for path in index.tars] == ["train-00000.tar", "train-00001.tar"]
    assert len(read_index(tmp_path / "shards", "val")) == 4
    assert len(read_index(tmp_path)) == 10
    with pytest.raises(InputError, match="no retain shard"):
        read_index(tmp_path, "retain")
    with pytest.raises(InputError, match=r"no column 'witdh'\. Did you mean 'width'"):
        read_index(tmp_path, "train", columns=["witdh"])


def test_a_shard_of_img2dataset_is_indexed_by_its_tar(tmp_path):
    """Its Parquet has no offsets and its keys may be numbers; a row may have no member."""
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for key, size in (("000000000", 10), ("000000002", 700)):
            for form, content in (("jpg", key[-1:].encode() * size), ("txt", b"t"), ("json", b"{}")):
                member = tarfile.TarInfo(f"{key}.{form}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    keys = ["000000000", "000000001", "000000002"]
    pq.write_table(pa.table({"key": keys, "caption": ["a", "b", "c"], "url": ["u"] * 3}), tmp_path / "00000.parquet")
    assert list(iter_images(read_index(tmp_path, "train"))) == [
        ("000000000", "a", b"0" * 10),
        ("000000002", "c", b"2" * 700),
    ]
    assert read_index(tmp_path, columns=["url"]).table["url"].to_pylist() == ["u", "u"]


def test_members_that_are_no_images_or_no_files_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.REGTYPE), ("b.jpg", tarfile.SYMTYPE), ("c.exe", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(member)
    assert [key for key, _ in tar_images(tmp_path / "a.tar")] == ["a"]


def test_the_dots_of_folders_end_no_key(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("./1.jpg", "./v1.0/2.JPG", "3.jpg", "v1.0/4.png", "./5.thumb.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    assert [key for key, _ in tar_images(tmp_path / "a.tar")] == ["1", "v1.0/2", "3", "v1.0/4"]


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A tar with two images, and an img2dataset Parquet that does not say where they lie; the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stem = write(tmp_path / "shards", [("a", b"1" * 3000), ("b", b"2" * 500)])
    pq.write_table(
        pq.read_table(stem.with_suffix(".parquet"), columns=["key", "caption"]), stem.with_suffix(".parquet")
    )
    return stem.with_suffix(".tar")


def read_tars(monkeypatch) -> list[str]:
    """Names of the tars whose headers are read from now on."""
    opened, whole = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path, *mode: opened.append(path.name) or whole(path, *mode))
    return opened


def test_a_foreign_tars_headers_are_read_once(foreign, monkeypatch):
    opened = read_tars(monkeypatch)
    first, second = (list(iter_images(read_index(foreign.parent))) for _ in range(2))
    assert first == second
    assert [content for _, _, content in first] == [b"1" * 3000, b"2" * 500]
    assert opened == ["00000.tar"]
    assert {path.name for path in foreign.parent.iterdir()} == {"00000.tar", "00000.parquet", "00000.tar.index"}


@pytest.mark.parametrize("change", ["another time", "another size", "a broken index"])
def test_a_tar_that_changed_is_read_again(foreign, monkeypatch, change):
    expected = list(iter_images(read_index(foreign.parent)))
    opened = read_tars(monkeypatch)
    if change == "another time":
        os.utime(foreign, ns=(0, 0))
    elif change == "another size":
        with foreign.open("ab") as tar:
            tar.write(bytes(10_240))
    else:
        index = foreign.with_name("00000.tar.index")
        index.write_bytes(index.read_bytes()[:-300])
    assert list(iter_images(read_index(foreign.parent))) == expected
    assert opened == ["00000.tar"]


def test_where_nothing_can_be_written_beside_a_tar_the_index_is_in_the_cache(foreign, monkeypatch, tmp_path):
    foreign.with_name("00000.tar.index").mkdir()  # no file can take this name; for root no folder is read-only
    opened = read_tars(monkeypatch)
    assert list(iter_images(read_index(foreign.parent))) == list(iter_images(read_index(foreign.parent)))
    assert opened == ["00000.tar"]
    assert len(list((tmp_path / "cache" / "cliptailor").glob("*.index"))) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(read_index(foreign.parent)) == 2


# --- what is broken is told ------------------------------------------------------------------------------------------


def test_a_tar_that_is_cut_short_is_told(tmp_path):
    stem = write(tmp_path, [("a", b"1" * 3000), ("b", b"2" * 3000)])
    index = read_index(tmp_path)
    os.truncate(stem.with_suffix(".tar"), 4000)
    with pytest.raises(InputError, match=r"00000.tar: 4,000 bytes, but its samples reach to"):
        read_index(tmp_path)
    with pytest.raises(InputError, match="ends at"):
        list(iter_images(index))


def test_a_flipped_bit_in_the_parquet_is_noticed(tmp_path):
    stem = write(tmp_path, [(f"caption number {n}", b"1") for n in range(300)])
    content = bytearray(stem.with_suffix(".parquet").read_bytes())
    content[600] ^= 1
    stem.with_suffix(".parquet").write_bytes(content)
    with pytest.raises((InputError, OSError)):
        read_index(tmp_path)


def test_a_compressed_tar_or_an_empty_folder_is_told(tmp_path):
    with pytest.raises(InputError, match="no shard"):
        read_index(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(InputError, match="not an uncompressed tar"):
        list(tar_images(tmp_path / "a.tar"))


# --- atomic ----------------------------------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_what_was_there(tmp_path):
    stem = write(tmp_path, [("a", b"1")])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyError, match="caption"), ShardWriter(stem, SCHEMA, made_from="new") as shard:
        shard.add({"key": "b"}, b"2")
    with pytest.raises(UnicodeEncodeError), atomic(tmp_path / "x") as temporary:
        temporary.write_text("half \ud800", encoding="utf-8")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


KILLED = """
import os, signal, sys
from pathlib import Path
import pyarrow as pa
from curate.shards import ShardWriter
seen = []
def dying(call):
    def counted(*args, **kwargs):
        seen.append(call)
        if len(seen) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return counted
os.fsync, Path.replace = dying(os.fsync), dying(Path.replace)
schema = pa.schema([("key", pa.string()), ("caption", pa.string()), ("width", pa.int64())])
with ShardWriter(Path(sys.argv[1]) / "00000", schema, made_from="new") as shard:
    for number in range(3):
        shard.add({"key": str(number), "caption": "new", "width": number}, b"2" * 1000)
print(len(seen))
"""


def killed(folder, kill_at):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, str(folder), str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_kill_at_any_moment_leaves_whole_files_and_the_parquet_last(tmp_path):
    alive = killed(tmp_path / "whole", 0)
    moments = int(alive.stdout)
    assert (
        moments == 7
    )  # sync the tar before an older Parquet goes; of each of two: sync it, rename it, sync the folder
    for kill_at in range(1, moments + 1):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        assert killed(folder, kill_at).returncode == -signal.SIGKILL
        assert (folder / "00000.tar").exists() == (kill_at > 3)
        assert (folder / "00000.parquet").exists() == (kill_at > 6)
        assert len(shards_of(folder)) == (kill_at > 6)
        for path in folder.glob("00000.*"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
        sweep(folder)
        assert not list(folder.glob(".*"))
        assert killed(folder, 0).returncode == 0
        assert len(read_index(folder)) == 3


@pytest.mark.parametrize("kill_at", range(1, 8))
def test_a_kill_never_leaves_an_older_parquet_beside_a_newer_tar(tmp_path, kill_at):
    with ShardWriter(tmp_path / "00000", SCHEMA, made_from="old") as shard:
        shard.add({"key": "b", "caption": "old", "width": 1}, b"1" * 5000)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert killed(tmp_path, kill_at).returncode == -signal.SIGKILL
    if (tmp_path / "00000.parquet").exists():
        left = {path.name: path.read_bytes() for path in tmp_path.glob("00000.*")}
        assert (left == old) == (kill_at == 1)
        assert kill_at in (1, 7)


# --- fingerprints and digests ----------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_content_not_of_the_order_of_keys():
    assert fingerprint("a", {"x": 1, "y": [2, None]}) == fingerprint("a", {"y": [2, None], "x": 1})
    assert len({fingerprint(*parts) for parts in (("a",), ("b",), ("a", None), (["a"],), ("a", 1), ("a", "1"))}) == 6


def test_a_parquet_knows_what_it_was_made_from_and_what_is_in_it(tmp_path):
    table = pa.table({"x": [1, 2]})
    write_parquet(table, tmp_path / "a.parquet", made_from="one")
    write_parquet(table, tmp_path / "b.parquet", made_from="two")
    write_parquet(pa.table({"x": [1, 3]}), tmp_path / "c.parquet", made_from="one")
    assert [made_from(tmp_path / f"{name}.parquet") for name in "abc"] == ["one", "two", "one"]
    digests = [digest(tmp_path / f"{name}.parquet") for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    pq.write_table(table, tmp_path / "foreign.parquet")
    assert made_from(tmp_path / "foreign.parquet") is None
    assert digest(tmp_path / "foreign.parquet") == file_sha256(tmp_path / "foreign.parquet")
    assert (
        file_sha256(tmp_path / "foreign.parquet")
        == hashlib.sha256((tmp_path / "foreign.parquet").read_bytes()).hexdigest()
    )
    assert made_from(tmp_path / "nothing.parquet") is None
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert made_from(tmp_path / "broken.parquet") is None


@pytest.mark.parametrize("cut", [1_000, ROW_GROUP, ROW_GROUP + 1, 10**9])
def test_how_rows_come_in_batches_changes_neither_bytes_nor_digest(tmp_path, cut):
    num_rows = ROW_GROUP + 4_000
    table = pa.table(
        {
            "key": [str(n) for n in range(num_rows)],
            "value": [n if n % 3 else None for n in range(num_rows)],
            "text": [None if n % 5 else "x" * (n % 7) for n in range(num_rows)],
            "list": [[n, None] if n % 4 else None for n in range(num_rows)],
        }
    )
    write_parquet(table, tmp_path / "whole.parquet", made_from="m")
    padded = pa.concat_tables([table.slice(0, 5), table]).slice(5)  # the same rows at other places of larger buffers
    write_batches(padded.to_batches(cut), table.schema, tmp_path / "cut.parquet", made_from="m")
    assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert pq.read_table(tmp_path / "cut.parquet").equals(table)


def test_no_rows_are_a_file_too(tmp_path):
    write_batches([], SCHEMA, tmp_path / "a.parquet", made_from="m")
    assert pq.read_table(tmp_path / "a.parquet").schema.names == SCHEMA.names
    assert made_from(tmp_path / "a.parquet") == "m"


# --- reading by offset -----------------------------------------------------------------------------------------------


def open_tars(folder):
    links = [os.path.realpath(handle) for handle in Path("/proc/self/fd").iterdir()]
    return len([link for link in links if link.startswith(str(folder.resolve())) and link.endswith(".tar")])


def test_a_reader_opens_no_more_tars_than_it_may_and_none_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("curate.index.MAX_OPEN_TARS", 4)
    for number in range(12):
        write(tmp_path, [(str(number), bytes([number]) * 20)], name=shard_name(number))
    index = read_index(tmp_path)
    reader = MemberReader(index.tars)
    places = list(zip(index.table["tar"].to_pylist(), index.table["image_offset"].to_pylist(), strict=True))
    for _ in range(2):
        for tar, offset in places:
            assert reader.read(tar, offset, 20) == bytes([tar]) * 20
            assert reader.read(tar, offset, 20) == bytes([tar]) * 20
            assert open_tars(tmp_path) <= 4
    reader.close()
    assert open_tars(tmp_path) == 0


def test_a_forgotten_reader_leaves_no_tar_open(tmp_path):
    write(tmp_path, [("a", b"1" * 20)])
    index = read_index(tmp_path)
    reader = MemberReader(index.tars)
    reader.read(0, index.table["image_offset"][0].as_py(), 20)
    assert open_tars(tmp_path) == 1
    del reader
    assert open_tars(tmp_path) == 0


def test_a_reader_can_be_sent_to_another_process(tmp_path):
    write(tmp_path, [("a", b"1" * 20)])
    index = read_index(tmp_path)
    reader = MemberReader(index.tars)
    offset = index.table["image_offset"][0].as_py()
    assert reader.read(0, offset, 20) == b"1" * 20
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(0, offset, 20) == b"1" * 20
    reader.close()
    assert copy.read(0, offset, 20) == b"1" * 20
    copy.close()
