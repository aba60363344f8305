"""Lists far away, from a real S3 server on loopback, and images that are here already."""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import fetch, plan
from curate.config import ColumnsConfig, PlanConfig
from curate.errors import ConfigError, InputError
from curate.files import fingerprint
from curate.index import read_index
from curate.sources import find
from tests.buckets import s3_server
from tests.curate.fetching import encoded, images, jpeg, patient, photo


def planned(out):
    paths = sorted((out / "plan").glob("[0-9]*.parquet"))
    return sorted((row for path in paths for row in pq.read_table(path).to_pylist()), key=lambda row: row["row"])


def run(urls, out, **config):
    return plan.run(str(urls), out, PlanConfig(**config), [])


# --- far away --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket():
    """A bucket `crawl` with lists."""
    with s3_server("crawl") as server:
        system = server.system
        table = pa.table(
            {"URL": [f"http://a.test/{n}.jpg" for n in range(5)], "TEXT": [f"picture {n}" for n in range(5)]}
        )
        for number in range(2):
            with system.open(f"crawl/lists/{number}.parquet", "wb") as file:
                pq.write_table(table.slice(number * 3, 3), file)
        with system.open("crawl/one.csv", "wb") as file:
            file.write(b'url,caption\nhttp://a.test/1,"a, b"\n')
        yield system


@pytest.mark.parametrize("urls", ["s3://crawl/lists", "s3://crawl/lists/*.parquet"])
def test_lists_are_read_from_s3_and_copied_once(bucket, tmp_path, urls):
    assert run(urls, tmp_path).candidates == 5
    assert [row["caption"] for row in planned(tmp_path)] == [f"picture {n}" for n in range(5)]
    copies = {path: path.stat().st_mtime_ns for path in (tmp_path / ".list").iterdir()}
    assert len(copies) == 2
    assert not run(urls, tmp_path).made
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / ".list").iterdir()} == copies


def test_a_remote_list_that_changed_is_copied_again(bucket, tmp_path):
    with bucket.open("crawl/grows.csv", "wb") as file:
        file.write(b"url,caption\nhttp://a.test/1,one\n")
    assert run("s3://crawl/grows.csv", tmp_path).candidates == 1
    with bucket.open("crawl/grows.csv", "wb") as file:
        file.write(b"url,caption\nhttp://a.test/1,one\nhttp://a.test/2,two\n")
    result = run("s3://crawl/grows.csv", tmp_path)
    assert (result.candidates, result.new) == (2, 1)


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        ("s3://crawl/nothing.parquet", "s3://crawl/nothing.parquet: cannot be read"),
        ("s3://no-such-bucket/list.csv", "s3://no-such-bucket/list.csv: cannot be read"),
        ("nonsense://list.csv", "nonsense://list.csv: cannot be read: Protocol not known"),
        ("s3://crawl/nothing/*.csv", "no list there"),
    ],
)
def test_a_remote_list_that_is_not_there_is_told_in_one_line(bucket, tmp_path, urls, said):
    with pytest.raises(InputError) as error:
        run(urls, tmp_path)
    assert str(error.value).startswith(urls)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as lists need: one dataset, `me/lists`, its tree and its files."""

    protocol_version = "HTTP/1.1"
    files: ClassVar = {f"crawl/{n}.csv": f"url,caption\nhttp://a.test/{n},picture {n}\n".encode() for n in range(2)}
    folder: ClassVar = {"type": "directory", "path": "crawl", "oid": "2"}
    api = "/api/datasets/me/lists"

    def do_GET(self):
        path = urlsplit(self.path).path.rstrip("/")
        if path == self.api:
            self.answer({"_id": "1", "id": "me/lists", "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
        elif path.startswith(f"{self.api}/tree/main"):
            below = unquote(path.removeprefix(f"{self.api}/tree/main")).strip("/")
            inside = [self.entry(name) for name in self.files if below in ("", "crawl")]
            self.answer(inside if below or "recursive=true" in self.path.lower() else [self.folder])
        elif content := self.files.get(path.removeprefix("/datasets/me/lists/resolve/main/")):
            first, last = (self.headers.get("Range", "bytes=0-99999")).removeprefix("bytes=").split("-")
            self.answer(content[int(first) : int(last) + 1], 206)
        else:
            self.answer({"error": "Entry not found"}, 404)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        found = [self.entry(name) for name in self.files if name in asked]
        self.answer(found + [self.folder] * ("crawl" in asked))

    do_HEAD = do_GET  # noqa: N815 - as http.server calls it

    def entry(self, name):
        return {"type": "file", "path": name, "oid": sha1(self.files[name]).hexdigest(), "size": len(self.files[name])}

    def answer(self, what, status=200):
        content = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


FIND = """
import sys
from pathlib import Path
from curate.errors import InputError
from curate.sources import find
for urls in sys.argv[2:]:
    try:
        print([path.read_text() for path in find(urls, Path(sys.argv[1])).paths])
    except InputError as error:
        print(error)
"""


def test_lists_are_read_from_the_hugging_face_hub(tmp_path):
    # In a process of its own: the library reads HF_ENDPOINT when it is imported.
    at = "hf://datasets/me/lists"
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            "HF_HOME": str(tmp_path),
        }
        lists = (f"{at}/crawl/1.csv", f"{at}/crawl", f"{at}/crawl/*.csv", f"{at}/nothing.csv")
        command = [sys.executable, "-c", FIND, str(tmp_path / "cache"), *lists]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        hub.shutdown()
    one, *all_of_it, nothing = said.stdout.splitlines()
    texts = [content.decode() for content in Hub.files.values()]
    assert one == str(texts[1:])
    assert all_of_it == [str(texts)] * 2
    assert nothing.startswith(f"{at}/nothing.csv: cannot be read: ")


def test_a_driver_that_is_missing_is_named_with_the_command_that_installs_it(tmp_path):
    with pytest.raises(ConfigError, match=r"gs:// needs gcsfs: pip install 'cliptailor\[gcs\]'"):
        run("gs://crawl/list.parquet", tmp_path)


def test_a_list_in_memory_is_read(tmp_path):
    with fsspec.filesystem("memory").open("/lists/a.jsonl", "wb") as file:
        file.write(b'{"url": "http://a.test/1", "caption": "one"}\n')
    assert run("memory://lists/a.jsonl", tmp_path).candidates == 1


def test_of_a_folder_far_away_only_the_lists_are_copied(tmp_path):
    system = fsspec.filesystem("memory")
    names = ("a.csv", "more/b.csv", "_SUCCESS", "README.md", "_temporary/c.csv", ".hidden.csv", "_old.csv")
    for name in names:
        system.pipe(f"/crawl/folder/{name}", f"url,caption\nhttp://a.test/{name},x\n".encode())
    assert run("memory://crawl/folder", tmp_path).candidates == 2
    assert sorted(path.name.partition("-")[2] for path in (tmp_path / ".list").iterdir()) == ["a.csv", "b.csv"]


@pytest.mark.parametrize("urls", ["memory://mixed/folder", "memory://mixed/folder/*", "memory://mixed/folder/c.md"])
def test_of_a_folder_far_away_that_is_no_list_nothing_is_copied(tmp_path, urls):
    for name in ("a.csv", "b.jsonl", "c.md"):
        fsspec.filesystem("memory").pipe(f"/mixed/folder/{name}", b"x")
    with pytest.raises(InputError, match="files; expected files of one form, with the ending"):
        run(urls, tmp_path)
    assert not (tmp_path / ".list").exists()


# --- images that are here --------------------------------------------------------------------------------------------


def kept(out, **config):
    """(caption, bytes) of every image that arrived, after plan and fetch."""
    fetch.run(out, patient(**config))
    captions = {row["key"]: (row["caption"], row["url"]) for row in planned(out)}
    return sorted((*captions[key], content) for key, content in images(out).items())


def test_class_folders_and_sidecars_give_the_captions(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "red_shoes").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "red_shoes" / "1.jpg").write_bytes(jpeg(1))
    (folder / "red_shoes" / "2.JPG").write_bytes(jpeg(2))
    (folder / "red_shoes" / "2.txt").write_text("the very best shoe\n")
    (folder / "3.png").write_bytes(encoded(photo(3), "PNG"))
    (folder / ".hidden" / "4.jpg").write_bytes(jpeg(4))
    (folder / "broken.jpg").write_bytes(jpeg(5)[:300])
    (folder / "outside.jpg").symlink_to(tmp_path / "outside.jpg")
    (tmp_path / "outside.jpg").write_bytes(jpeg(6))
    out = tmp_path / "out"
    assert run(folder, out).candidates == 4
    assert kept(out) == [
        ("", "3.png", encoded(photo(3), "PNG")),
        ("red shoes", "red_shoes/1.jpg", jpeg(1)),
        ("the very best shoe", "red_shoes/2.JPG", jpeg(2)),
    ]
    (row,) = [row for row in pq.read_table(out / "raw" / "00000.parquet").to_pylist() if row["url"] == "broken.jpg"]
    assert row["reason"] in ("truncated_image", "corrupt_image")
    assert not run(folder, out).made


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_metadata_file_describes_the_images(tmp_path, kind):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = [{"file_name": f"{n}.jpg", "text": f"number {n}, of three", "rating": n} for n in range(3)]
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    if kind == "csv":
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    out = tmp_path / "out"
    run(folder, out)
    assert kept(out) == [("number 0, of three", "0.jpg", jpeg(0)), ("number 1, of three", "1.jpg", jpeg(1))]
    ends = {
        row["url"]: (row["reason"], row["rating"]) for row in pq.read_table(out / "raw" / "00000.parquet").to_pylist()
    }
    assert ends == {"0.jpg": (None, 0), "1.jpg": (None, 1), "2.jpg": ("unreadable", 2)}


def test_a_metadata_file_cannot_lead_out_of_its_folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.jpg").write_bytes(jpeg())
    (tmp_path / "pictures" / "metadata.csv").write_text("file_name,text\n../secret.jpg,mine\n")
    with pytest.raises(InputError, match=r"file_name '../secret.jpg' leads out of"):
        run(tmp_path / "pictures", tmp_path / "out")


def test_a_users_list_cannot_name_files_here(tmp_path):
    """Its columns of these names are carried under others; the rows are asked for as URLs."""
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    table = pa.table({"url": ["http://a.test/1"], "caption": ["x"], "source_file": [str(tmp_path / "secret.jpg")]})
    pq.write_table(table, tmp_path / "l.parquet")
    run(tmp_path / "l.parquet", tmp_path / "out")
    (row,) = planned(tmp_path / "out")
    assert "source_file" not in row
    assert row["list_source_file"] == str(tmp_path / "secret.jpg")


def test_a_metadata_files_column_cannot_name_the_file_that_is_read(tmp_path):
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "secret.jpg").write_bytes(jpeg(2))
    (folder / "metadata.csv").write_text("file_name,text,Source_File,source_size\n1.jpg,x,../secret.jpg,7\n")
    run(folder, out)
    assert kept(out) == [("x", "1.jpg", jpeg(1))]
    (row,) = planned(out)
    assert (row["list_Source_File"], row["list_source_size"]) == ("../secret.jpg", 7)


def test_a_dataset_made_of_one_that_was_made_of_images_has_its_own_bytes(tmp_path):
    """The first says where its images lay, the second where they lay in the first; neither is where they are now."""
    folder, expected = tmp_path / "0", [("", f"{n}.jpg", jpeg(n)) for n in range(3)]
    folder.mkdir()
    for _, name, content in expected:
        (folder / name).write_bytes(content)
    for out in (tmp_path / "1", tmp_path / "2", tmp_path / "3"):
        run(folder, out)
        assert kept(out) == expected
        folder = out / "raw"
    (row, *_) = planned(tmp_path / "3")
    assert [row[f"{'list_' * times}source_file"] for times in range(3)] == ["00000.tar", "0.jpg", "00000.tar"]


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_webdataset_tars_are_read_in_place(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(3):
                add(tar, f"{shard}{number}.jpg", jpeg(shard * 3 + number))
                if number == 0:
                    add(tar, f"{shard}{number}.txt", f"text {shard}".encode())
                elif number == 1:
                    facts = {"caption": f"json {shard}", "url": f"http://a.test/{shard}"}
                    add(tar, f"{shard}{number}.json", json.dumps(facts).encode())
    out = tmp_path / "out"
    assert run(folder, out).candidates == 6
    assert kept(out) == sorted(
        (caption, url, jpeg(shard * 3 + number))
        for shard in range(2)
        for number, (caption, url) in enumerate(
            [
                (f"text {shard}", f"{shard}.tar/{shard}0.jpg"),
                (f"json {shard}", f"http://a.test/{shard}"),
                ("", f"{shard}.tar/{shard}2.jpg"),
            ]
        )
    )


def test_webdataset_tars_are_read_once_also_by_a_run_that_keeps_no_list(tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            add(tar, "a.jpg", jpeg(shard))
            add(tar, "a.txt", f"text {shard}".encode())
    opened, whole = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path, *mode: opened.append(path.name) or whole(path, *mode))
    lists = [pq.read_table(find(str(folder), tmp_path / name).paths[0]).to_pylist() for name in ("one", "two")]
    assert opened == ["0.tar", "1.tar"]
    assert lists[0] == lists[1]
    assert [(row["caption"], row["url"], row["source_file"]) for row in lists[0]] == [
        ("text 0", "0.tar/a.jpg", "0.tar"),
        ("text 1", "1.tar/a.jpg", "1.tar"),
    ]


def test_a_compressed_tar_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar.gz").write_bytes(b"x")
    with pytest.raises(InputError, match=r"0.tar.gz: a compressed tar .* unpack it"):
        find(str(tmp_path / "shards"), tmp_path / "cache")


def test_a_folder_that_img2dataset_made_is_curated_without_a_request(tmp_path):
    """Its layout: STEM.tar beside STEM.parquet, with successes and failures in it."""
    folder = tmp_path / "made"
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for key in ("000000000", "000000002"):
            add(tar, f"{key}.jpg", jpeg(int(key)))
            add(tar, f"{key}.txt", b"x")
    rows = [
        {"url": f"http://a.test/{n}", "caption": f"caption {n}", "key": f"{n:09d}", "status": status, "width": 64}
        for n, status in enumerate(["success", "failed_to_download", "success"])
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    out = tmp_path / "out"
    assert run(folder, out, columns=ColumnsConfig()).candidates == 3
    assert kept(out) == [
        ("caption 0", "http://a.test/0", jpeg(0)),
        ("caption 2", "http://a.test/2", jpeg(2)),
    ]
    (failed,) = [row for row in pq.read_table(out / "raw" / "00000.parquet").to_pylist() if row["reason"]]
    assert (failed["reason"], failed["list_status"], failed["list_key"]) == (
        "unreadable",
        "failed_to_download",
        "000000001",
    )
    assert len(read_index(out / "raw")) == 2


def test_a_source_that_moved_is_not_read_again(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(jpeg(1))
    run(folder, tmp_path / "out")
    fetch.run(tmp_path / "out", patient())
    folder.rename(tmp_path / "b")
    run(tmp_path / "b", tmp_path / "out")
    assert fetch.run(tmp_path / "out", patient()).made == 0


def described(folder, rows, images):
    """A folder of images with a metadata.csv, `rows` below its header."""
    folder.mkdir(exist_ok=True)
    for name, content in images.items():
        (folder / name).write_bytes(content)
    (folder / "metadata.csv").write_text("file_name,url,text\n" + "".join(f"{row}\n" for row in rows))
    return folder


def test_files_of_one_url_keep_their_own_images_when_a_caption_is_edited(tmp_path):
    page = "http://a.test/page"
    rows = [f"1.jpg,{page},one", f"2.jpg,{page},two", "3.jpg,http://a.test/other,three"]
    folder, out = described(tmp_path / "here", rows, {f"{n}.jpg": jpeg(n) for n in (1, 2, 3)}), tmp_path / "out"
    run(folder, out)
    assert [content for *_, content in kept(out)] == [jpeg(1), jpeg(3), jpeg(2)]
    described(folder, [rows[0].replace("one", "edited"), *rows[1:]], {})
    run(folder, out)
    assert kept(out) == [
        ("edited", page, jpeg(1)),
        ("three", "http://a.test/other", jpeg(3)),
        ("two", page, jpeg(2)),
    ]
    for row in pq.read_table(out / "raw" / "00000.parquet").to_pylist():
        assert row["sha256"] == sha256((folder / row["source_file"]).read_bytes()).hexdigest()


def test_a_shard_that_is_made_again_has_the_bytes_that_lie_there_now(tmp_path):
    rows = ["1.jpg,a,one", "2.jpg,b,two"]
    folder, out = described(tmp_path / "here", rows, {"1.jpg": jpeg(1), "2.jpg": jpeg(2)}), tmp_path / "out"
    run(folder, out)
    kept(out)
    described(folder, ["1.jpg,a,edited", rows[1]], {"2.jpg": jpeg(7)})
    run(folder, out)
    assert kept(out) == [("edited", "a", jpeg(1)), ("two", "b", jpeg(7))]


def test_what_a_url_came_to_here_is_not_taken_for_its_download(tmp_path):
    folder, out = (
        described(tmp_path / "here", ["1.jpg,http://127.0.0.1:9/page,x"], {"1.jpg": jpeg(1)}),
        tmp_path / "out",
    )
    run(folder, out)
    assert len(kept(out)) == 1
    (tmp_path / "list.csv").write_text("url,caption\nhttp://127.0.0.1:9/page,x\n")
    run(tmp_path / "list.csv", out)
    assert kept(out) == []


def test_a_dataset_below_its_source_is_no_part_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    out = Path("dataset")
    run(".", out)
    kept(out)
    (out / "shards").mkdir()
    (out / "raw" / "00000.tar").rename(out / "shards" / "train-00000.tar")
    (tmp_path / "2.jpg").write_bytes(jpeg(2))
    result = run(".", out)
    assert (result.rows, result.new, result.dropped) == (2, 1, {})
    assert [row["source_file"] for row in planned(out)] == ["1.jpg", "2.jpg"]


@pytest.mark.parametrize("urls", ["lists", "lists/**/*.parquet"])
def test_a_dataset_below_its_lists_is_no_part_of_them(tmp_path, monkeypatch, urls):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists" / "more").mkdir(parents=True)
    for number, name in enumerate(["1.parquet", "more/2.parquet"]):
        table = pa.table({"url": [f"http://a.test/{number}"], "caption": ["x"]})
        pq.write_table(table, tmp_path / "lists" / name)
        assert run(urls, Path("lists/dataset")).rows == number + 1


def test_lists_within_the_datasets_folder_are_read(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "1.csv").write_text("url,caption\nhttp://a.test/1,x\n")
    for urls in ("lists", "lists/*.csv", "*/1.csv"):
        assert run(tmp_path / urls, tmp_path).rows == 1


def test_a_dataset_in_its_sources_place_is_refused(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    with pytest.raises(ConfigError, match=r"--out .*: is the folder that --urls names; choose another"):
        run(tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["1.jpg"]


@pytest.mark.parametrize("first", [False, True])
def test_a_comma_that_is_not_quoted_is_told_with_its_line(tmp_path, first):
    lines = ["1.jpg,a,a shoe", '2.jpg,b,"two\nlines"', "3.jpg,c,red, and new"]
    folder = described(tmp_path / "here", lines[::-1] if first else lines, {"1.jpg": jpeg(1)})
    line = 2 if first else 5
    with pytest.raises(InputError, match=rf"metadata.csv: line {line} has 4 fields, the header 3; put .quotes. around"):
        run(folder, tmp_path / "out")


def test_a_metadata_file_may_begin_with_a_blank_line(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "metadata.csv").write_text("\nfile_name,text\n1.jpg,a shoe\n")
    run(tmp_path, tmp_path / "out")
    assert [row["caption"] for row in planned(tmp_path / "out")] == ["a shoe"]


def test_urls_of_a_metadata_file_that_are_no_texts_are_told(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.jpg", "text": "x", "url": ["http://a.test/1"]}\n')
    with pytest.raises(InputError, match=r"column 'url' holds VARCHAR\[\], no text"):
        run(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("column", ["text", "said"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_of_a_metadata_file_are_texts(tmp_path, kind, column):
    captions = ["007", "2020", "2020-01-05", "1.50"]
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    for number in range(3):  # a column of numbers alone, of dates alone, and of both
        rows = [{"file_name": f"{n}.jpg", column: captions[n]} for n in (range(4), range(2), (2, 2, 2))[number]]
        if kind == "csv":
            text = f"file_name,{column}\n" + "".join(f"{row['file_name']},{row[column]}\n" for row in rows)
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"metadata.{kind}").write_text(text)
        out = tmp_path / f"out{number}"
        run(tmp_path, out, columns=ColumnsConfig(caption=column))
        assert {row["caption"] for row in planned(out)} == {row[column] for row in rows}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_row_of_a_metadata_file_without_a_url_has_its_files_name(tmp_path, kind):
    urls = ["http://a.test/1", None, "  "]
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    if kind == "csv":
        text = "file_name,url,text\n" + "".join(f"{n}.jpg,{url or ''},x\n" for n, url in enumerate(urls))
    else:
        rows = [{"file_name": f"{n}.jpg", "url": url, "text": "x"} for n, url in enumerate(urls)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"metadata.{kind}").write_text(text)
    assert run(tmp_path, tmp_path / "out").candidates == 3
    assert [row["url"] for row in planned(tmp_path / "out")] == ["http://a.test/1", "1.jpg", "2.jpg"]


def test_files_whose_names_are_not_utf8_are_left_out_and_told(tmp_path, caplog):
    odd = [os.fsdecode(name) for name in (b"caf\xe9.png", b"\xe9/1.jpg", "caf\u00e9.jpg".encode())]
    (tmp_path / os.fsdecode(b"\xe9")).mkdir()
    for name in odd:
        (tmp_path / name).write_bytes(jpeg(1))
    assert run(tmp_path, tmp_path / "out").candidates == 1
    assert [row["url"] for row in planned(tmp_path / "out")] == ["caf\u00e9.jpg"]
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "2 files left out, whose names are not UTF-8; the first: " in said
    assert r"\udce9" in said


def test_facts_in_a_tar_that_are_nested_too_deep_are_none(tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        add(tar, "a.jpg", jpeg(1))
        add(tar, "a.json", b"[" * 100_000)
    run(tmp_path / "tars", tmp_path / "out")
    assert [(row["url"], row["caption"]) for row in planned(tmp_path / "out")] == [("0.tar/a.jpg", "")]


def test_names_and_texts_in_tars_that_are_not_utf8_are_read(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, name in enumerate([b"caf\xe9", b"caf\xe8"]):
            add(tar, os.fsdecode(name + b".jpg"), jpeg(number))
            add(tar, os.fsdecode(name + b".json"), rb'{"caption": "half \ud83d", "url": ""}')
        add(tar, "whole.jpg", jpeg(2))
        add(tar, "whole.json", rb'{"caption": "x", "url": "http://a.test/\ud83d"}')
    out = tmp_path / "out"
    assert run(folder, out).candidates == 3
    assert [(caption, content) for caption, _, content in kept(out)] == [
        ("half ?", jpeg(1)),
        ("half ?", jpeg(0)),
        ("x", jpeg(2)),
    ]


def test_anything_has_a_fingerprint():
    assert fingerprint("half \ud83d") != fingerprint("half ?")


@pytest.mark.parametrize("name", ["{00000..00002}.tar", "*.tar", "0.tar"])
def test_of_tars_by_webdatasets_notation_the_folder_is_asked_for(tmp_path, name):
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(InputError, match=f"tar: tars are read as a whole folder; give {tmp_path}/"):
        run(str(tmp_path / name), tmp_path / "out")
