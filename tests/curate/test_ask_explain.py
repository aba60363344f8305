import hashlib
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curate.ask.arguments import ExplainOptions
from curate.ask.explain import explain
from curate.errors import InputError
from curate.files import write_parquet
from tests.curate.built import COPIES, GONE, NARROW, ONE_WORD, REPEATED, asked, build, score
from tests.curate.fetched import encoded, ledger, noise


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("explain") / "out")


def line_of(out: Path, row: int) -> dict:
    return next(line for line in ledger(out) if line["row"] == row)


def life(out: Path, row: int):
    (found,) = explain(line_of(out, row)["key"], ExplainOptions(out=out))
    return found


def kept_row(out: Path) -> int:
    return next(line["row"] for line in ledger(out) if line["kept"] and line["row"] < 40)


def test_a_kept_row_is_told_from_the_list_to_its_bytes_in_the_tar(out: Path) -> None:
    line = line_of(out, kept_row(out))
    found = life(out, line["row"])
    assert found.title == f"row {line['row']}: kept in {line['split']}"
    told = {name: dict(pairs) for name, pairs in found.sections.items()}
    assert told["list"]["shop"] == f"shop {line['row'] % 4}"
    assert told["list"]["caption"] == line["caption"]
    assert told["request"]["status"] == "success"
    assert told["request"]["sha256"] == hashlib.sha256(encoded(noise(line["row"]))).hexdigest()
    assert (told["pixels"]["width"], told["pixels"]["height"]) == (64, 64)
    assert told["signals"]["clip_score"] == pytest.approx(score(line["key"]))
    assert told["select"]["kept in"] == line["split"]
    size, offset = (int(word.replace(",", "")) for word in told["packed"]["image"].split() if word[0].isdigit())
    with Path(told["packed"]["shard"]).open("rb") as tar:
        tar.seek(offset)
        assert tar.read(size) == encoded(noise(line["row"]))


def test_a_duplicate_names_its_kept_twin_and_what_became_of_that(out: Path) -> None:
    row = next(row for row in COPIES if line_of(out, row)["step"] == "exact")
    line = line_of(out, row)
    found = life(out, row)
    assert found.title == f"row {row}: dropped at select by exact"
    twin = dict(found.sections["twins"])["kept twin"]
    assert twin.startswith(f"{line['twin']} (row {row - 40}: ")
    assert dict(found.sections["select"])["value"] == line["value"]
    assert "dedup: A duplicate of a pair that is kept" in dict(found.sections["select"])["reason"]


def test_each_stage_that_drops_a_row_is_where_its_life_ends(out: Path) -> None:
    assert life(out, GONE[0]).title == f"row {GONE[0]}: dropped at fetch"
    assert dict(life(out, GONE[0]).sections["request"])["value"] == "404"
    narrow = life(out, NARROW[0])
    assert narrow.title.endswith("dropped at select by wide")
    assert dict(narrow.sections["select"])["value"] == "width=40"
    alone = life(out, ONE_WORD[0])
    assert alone.title.endswith("dropped at plan by words")
    assert {"request", "pixels", "signals"}.isdisjoint(alone.sections)
    assert dict(alone.sections["plan"])["value"] == "caption_words=1"


def test_all_rows_of_a_url_are_told(out: Path) -> None:
    found = explain(line_of(out, REPEATED)["url"], ExplainOptions(out=out))
    assert [life.title.partition(":")[0] for life in found] == ["row 54", f"row {REPEATED}"]
    assert "dropped at plan" in found[1].title


@pytest.mark.parametrize(
    ("change", "near"),
    [
        (lambda line: line["key"][:7], "key"),
        (lambda line: line["url"].replace("test", "tset"), "url"),
        (lambda line: line["url"].replace("http", "https"), "url"),
        (lambda line: line["url"].removeprefix("http://"), "url"),
    ],
)
def test_what_is_not_there_names_the_nearest_that_is(out: Path, change, near: str) -> None:
    line = line_of(out, 17)
    with pytest.raises(InputError) as error:
        explain(change(line), ExplainOptions(out=out))
    assert str(error.value).endswith(f"no row has the URL or key '{change(line)}'. Did you mean '{line[near]}'?")


def test_what_is_like_nothing_there_is_told_so(out: Path) -> None:
    with pytest.raises(InputError, match="it has 60 rows, none much like it"):
        explain("zzzz", ExplainOptions(out=out))


def test_a_copy_with_ledger_and_shards_alone_still_tells_the_row(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out / "shards", copy / "shards")
    shutil.copy(out / "ledger.parquet", copy)
    told = {name: dict(pairs) for name, pairs in life(copy, kept_row(out)).sections.items()}
    assert told["request"]["status"] == "success"
    assert told["other facts"]["shop"].startswith("shop ")
    assert "offset" in told["packed"]["image"]
    gone = {name: dict(pairs) for name, pairs in life(copy, GONE[0]).sections.items()}
    assert "raw/ is not in this folder" in gone["request"][""]


def test_signals_in_groups_are_all_told(out: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    for path in list((copy / "signals" / "clip").glob("*.parquet")):
        table = pq.read_table(path)
        write_parquet(table.select(["key"]).append_column("letters", table["clip_score"]), copy / "signals" / "text"
                      / path.name, made_from="x")  # fmt: skip
    line = line_of(copy, kept_row(copy))
    signals = dict(life(copy, line["row"]).sections["signals"])
    assert signals == {"clip_score": pytest.approx(score(line["key"])), "letters": pytest.approx(score(line["key"]))}


def test_the_command_prints_plain_lines_in_a_pipe_and_hides_what_moves_the_cursor(out: Path, tmp_path: Path) -> None:
    said = asked("explain", line_of(out, 3)["key"], "--out", out)
    assert said.startswith("row 3: ")
    assert "\x1b" not in said
    assert all(line == line.rstrip() for line in said.splitlines())
    assert "caption 3" in said
    copy = tmp_path / "copy"
    shutil.copytree(out / "shards", copy / "shards")
    table = pq.read_table(out / "ledger.parquet")
    captions = ["\x1b[2Jgone\u202e" for _ in range(table.num_rows)]
    place = table.schema.get_field_index("caption")
    write_parquet(table.set_column(place, "caption", [captions]), copy / "ledger.parquet", made_from="x")
    assert "\ufffd[2Jgone\ufffd" in asked("explain", line_of(out, 3)["key"], "--out", copy)


def test_without_a_row_or_a_folder_there_is_one_line(out: Path, tmp_path: Path) -> None:
    assert asked("explain", status=2) == "explain: ROW is needed; see curate explain --help"
    assert "no such folder" in asked("explain", "x", "--out", tmp_path / "none", status=2)
    assert "not a dataset folder" in asked("explain", "x", "--out", tmp_path, status=2)
    (tmp_path / "plan").mkdir()
    assert "nothing was selected yet" in asked("explain", "x", "--out", tmp_path, status=2)
    assert "Did you mean 'memory_limit'" in asked("explain", "x", "--memory_limt", "1GB", status=2)
