"""Every fault that `curate verify` looks for, made by hand in a copy of a sound folder."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.ask.arguments import VerifyOptions
from curate.ask.verify import Verified, verify
from curate.files import file_sha256, write_parquet
from tests.curate.built import asked, build
from tests.curate.report_folder import example_rows, write_folder

TAR, PARQUET = "shards/train-00001.tar", "shards/train-00001.parquet"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("verify") / "out")


@pytest.fixture
def out(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "out"))


def checked(out: Path, **options: Any) -> Verified:
    return verify(out, VerifyOptions(**options))


def faults(out: Path) -> set[tuple[str, str, int | None]]:
    """(kind, file, row) of what is wrong."""
    return {(fault.kind, fault.file, fault.row) for fault in checked(out).faults}


def rows(out: Path, name: str = PARQUET) -> list[dict[str, Any]]:
    return pq.read_table(out / name).to_pylist()


def rewrite(out: Path, name: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the rows of a Parquet, and own up to it in the manifest, so that only what is in it is wrong."""
    table = pq.read_table(out / name)
    lines = table.to_pylist()
    change(lines)
    write_parquet(pa.Table.from_pylist(lines, table.schema), out / name, made_from=made(out, name))
    owned_up(out, name)


def made(out: Path, name: str) -> str:
    from curate.files import made_from

    return str(made_from(out / name))


def owned_up(out: Path, name: str) -> None:
    from curate.files import digest, fingerprint

    manifest = json.loads((out / "manifest.json").read_text())
    path = out / name
    manifest["files"][name] |= {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    shards = sorted((out / "shards").glob("*.parquet"))
    manifest["fingerprint"] = fingerprint(digest(out / "ledger.parquet"), [digest(shard) for shard in shards])
    (out / "manifest.json").write_text(json.dumps(manifest))


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(content)


def test_a_folder_as_it_was_made_is_sound_without_raw_and_read_only(out: Path) -> None:
    for name in ("raw", "plan", "signals"):
        shutil.rmtree(out / name)
    ledger = pq.read_table(out / "ledger.parquet").to_pylist()
    found = checked(out)
    assert (found.faults, found.more) == ([], {})
    assert found.samples == sum(line["kept"] for line in ledger)
    assert found.rows == len(ledger) == 60
    manifest = json.loads((out / "manifest.json").read_text())
    assert found.files == len(manifest["files"])
    assert found.bytes == sum(entry["bytes"] for entry in manifest["files"].values())
    assert "checked" in asked("verify", out)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            ".report",
            "README.md",
            "croissant.json",
            "ledger.parquet",
            "manifest.json",
            "report.html",
            "report.json",
            "shards",
        ]
    )


def test_any_byte_of_an_image_that_changed_is_found_by_the_sha256(out: Path) -> None:
    overwrite(out / TAR, rows(out)[2]["image_offset"] + 40, b"\0\1")
    assert faults(out) == {("sha256", TAR, None)}
    said = asked("verify", out, status=3)
    assert said == f"{out}: 1 fault"


def test_a_tar_that_is_cut_short_names_the_rows_that_are_lost(out: Path) -> None:
    lines = rows(out)
    with (out / TAR).open("rb+") as file:
        file.truncate(lines[3]["image_offset"] + 10)
    found = faults(out)
    assert {("sha256", TAR, None), ("members", TAR, 3), ("members", TAR, len(lines) - 1)} <= found
    assert ("members", TAR, 2) not in found


def test_what_a_row_says_of_its_members_must_be_so(out: Path) -> None:
    def shift(lines: list[dict[str, Any]]) -> None:
        lines[0]["image_offset"] += 512
        lines[1]["caption_size"] -= 1
        lines[2]["image_ext"] = "gif"
        lines[3]["json_offset"] = None

    rewrite(out, PARQUET, shift)
    found = checked(out).faults
    told = {fault.row: fault.what for fault in found if fault.kind == "members" and fault.row is not None}
    lines = rows(out)
    assert told.keys() == {0, 1, 2, 3}
    assert "no tar header" in told[0]
    assert told[1].startswith(f"{lines[1]['key']}.txt: expected {lines[1]['caption_size']} bytes at ")
    assert told[2].startswith(f"{lines[2]['key']}.gif: expected")
    assert "found " + lines[2]["key"] + ".png" in told[2]
    assert told[3] == f"{lines[3]['key']}: the Parquet has no place for its json"


def test_captions_and_facts_in_the_tar_are_those_of_the_row(out: Path) -> None:
    lines = rows(out)
    overwrite(out / TAR, lines[0]["caption_offset"], b"C")
    overwrite(out / TAR, lines[1]["json_offset"], b"[")
    owned_up(out, TAR)
    assert faults(out) == {("captions", TAR, 0), ("captions", TAR, 1)}
    rewrite(out, PARQUET, lambda lines: lines[4].update(caption="another"))
    assert faults(out) == {("captions", TAR, 0), ("captions", TAR, 1), ("captions", TAR, 4), ("books", PARQUET, 4)}


def test_a_member_that_no_row_names_is_found(out: Path) -> None:
    with tarfile.open(out / TAR, "a") as tar:
        tar.addfile(tarfile.TarInfo("stowaway.txt"))
    owned_up(out, TAR)
    assert faults(out) == {("members", TAR, None)}
    lost = rows(out)[-1]["key"]
    rewrite(out, PARQUET, lambda lines: lines.pop())
    found = checked(out).faults
    assert any(fault.what == f"{lost}: kept in train, but in no shard" for fault in found)


def test_a_page_whose_bytes_changed_is_found_by_its_checksum(out: Path) -> None:
    path = out / PARQUET
    column = pq.read_metadata(path).row_group(0).column(pq.read_schema(path).names.index("url"))
    overwrite(path, column.data_page_offset + column.total_compressed_size // 2, b"\xff\xfe")
    owned_up(out, PARQUET)
    found = checked(out).faults
    assert [(fault.kind, fault.file) for fault in found] == [("pages", PARQUET)]
    assert "CRC" in found[0].what


@pytest.mark.parametrize("name", [TAR, PARQUET, "ledger.parquet"])
def test_a_file_that_is_broken_or_gone_ends_no_check(out: Path, name: str) -> None:
    overwrite(out / name, 200, b"\xff" * 300)
    assert ("sha256", name, None) in faults(out)
    (out / name).unlink()
    if name != "ledger.parquet":
        assert ("files", name, None) in faults(out)


def test_a_file_that_is_not_of_the_dataset_is_named(out: Path) -> None:
    shutil.copy(out / TAR, out / "shards" / "train-00099.tar")
    assert faults(out) == {("files", "shards/train-00099.tar", None)}


def test_a_key_in_two_shards_is_named_at_its_second_place(out: Path) -> None:
    twice = rows(out, "shards/train-00000.parquet")[1]["key"]
    rewrite(out, PARQUET, lambda lines: lines[2].update(key=twice))
    found = [fault for fault in checked(out).faults if fault.kind == "keys"]
    assert [(fault.file, fault.row) for fault in found] == [(PARQUET, 2)]
    assert found[0].what == f"key {twice} is there already, in shards/train-00000.parquet row 1"


def test_a_duplicate_group_in_two_splits_is_named(out: Path) -> None:
    group = rows(out, "shards/val-00000.parquet")[0]["duplicate_group"]
    rewrite(out, PARQUET, lambda lines: lines[3].update(duplicate_group=group))
    found = [fault for fault in checked(out).faults if fault.kind == "groups"]
    assert [(fault.file, fault.row) for fault in found] == [(PARQUET, 3)]
    assert found[0].what == f"duplicate group {group} lies in several splits: train, val"


def test_the_ledgers_books_must_balance(out: Path) -> None:
    lines = rows(out, "ledger.parquet")
    kept = [number for number, line in enumerate(lines) if line["kept"]]
    dropped = [number for number, line in enumerate(lines) if not line["kept"]]

    def cook(lines: list[dict[str, Any]]) -> None:
        lines[kept[0]]["split"] = "test" if lines[kept[0]]["split"] != "test" else "train"
        lines[kept[1]] |= {"kept": False, "split": None, "stage": "select", "step": "wide", "reason": "where"}
        lines[dropped[0]]["reason"] = None
        lines[dropped[1]]["key"] = lines[dropped[2]]["key"]
        lines[dropped[3]]["row"] = 1_000

    rewrite(out, "ledger.parquet", cook)
    found = {fault.what.partition(": ")[2] or fault.what: fault for fault in checked(out, most=100).faults}
    assert found["neither kept in a split nor dropped at a stage by a step for a reason"].row == dropped[0]
    assert found[f"key {lines[dropped[2]]['key']} is in the ledger twice"].row in (dropped[1], dropped[2])
    assert found["dropped in ledger.parquet, by wide"].file.startswith("shards/")
    assert any("in split" in what and "in ledger.parquet" in what for what in found)
    assert any("60 places in the list, 0 to 1000; expected 0 to 59" in what for what in found)
    assert any(fault.file == "shards" and " samples in " in fault.what for fault in found.values())


def test_a_ledger_of_another_plan_is_told(out: Path) -> None:
    path = next((out / "plan").glob("0*.parquet"))
    write_parquet(pq.read_table(path).slice(1), path, made_from="x")
    assert [fault.what for fault in checked(out).faults] == ["60 rows, but plan/ has 59"]


def test_without_a_manifest_or_with_an_old_one_the_rest_is_checked(out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"made_from": "before"}))
    assert "of another ledger" in checked(out).faults[0].what
    (out / "manifest.json").unlink()
    assert faults(out) == {("manifest", "manifest.json", None)}
    assert checked(out).samples > 20


def test_a_folder_of_ledger_and_manifest_alone_lacks_its_shards(out: Path) -> None:
    shutil.rmtree(out / "shards")
    found = faults(out)
    assert ("books", "shards", None) in found
    assert ("files", TAR, None) in found


def test_of_many_faults_of_a_kind_some_are_named_and_all_counted(out: Path) -> None:
    rewrite(out, PARQUET, lambda lines: [line.update(image_offset=1) for line in lines])
    found = checked(out, most=2)
    number = len(rows(out))
    named = [fault for fault in found.faults if fault.kind == "members" and fault.row is not None]
    assert len(named) == 2
    assert found.more["members", TAR] >= number - 2


def test_a_folder_without_manifest_and_groups_and_one_that_is_not_ours(tmp_path: Path) -> None:
    out = write_folder(tmp_path / "out", example_rows())
    assert [fault.kind for fault in checked(out).faults] == ["manifest"]
    assert "no such folder" in asked("verify", tmp_path / "none", status=2)
    assert "not a dataset folder" in asked("verify", tmp_path, status=2)
