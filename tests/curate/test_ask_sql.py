import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from curate.ask.arguments import SqlOptions
from curate.ask.sql import answer
from curate.errors import ConfigError
from tests.curate.built import asked, build


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sql") / "out")


def told(out: Path, query: str, **options) -> list[dict]:
    with answer(query, SqlOptions(out=out, **options)) as found:
        return [row for batch in found.batches for row in batch.to_pylist()]


def count_rows(out: Path, query: str, **options) -> int:
    with answer(query, SqlOptions(out=out, **options)) as found:
        return sum(batch.num_rows for batch in found.batches)


def test_every_table_is_there_with_its_rows(out: Path) -> None:
    ledger = pd.read_parquet(out / "ledger.parquet")
    raw = pd.concat(pd.read_parquet(path) for path in (out / "raw").glob("*.parquet"))
    counts = {
        name: told(out, f"SELECT count(*) AS n, count(DISTINCT key) AS keys FROM {name}")[0]
        for name in ("ledger", "planned", "raw", "signals", "samples")
    }
    expected = {
        "ledger": 60, "planned": 60, "raw": len(raw), "signals": (raw.status == "success").sum(),
        "samples": ledger.kept.sum(),
    }  # fmt: skip
    assert counts == {name: {"n": n, "keys": n} for name, n in expected.items()}
    places = told(out, "SELECT key, split, shard FROM samples JOIN ledger USING (key, split)")
    assert len(places) == expected["samples"]
    for place in places:
        assert place["key"] in set(pd.read_parquet(out / "shards" / f"{place['shard']}.parquet").key)


def test_the_tables_join_on_the_key(out: Path) -> None:
    query = """SELECT count(*) AS n FROM ledger JOIN planned USING (key) JOIN raw USING (key) JOIN signals USING (key)
        WHERE ledger.kept AND clip_score >= 0 AND planned.shop LIKE 'shop%'"""
    assert told(out, query) == told(out, "SELECT count(*) AS n FROM ledger WHERE kept")


def test_a_column_of_the_list_called_shard_keeps_its_values_under_another_name(tmp_path: Path) -> None:
    from tests.curate.fetched import noise, row

    rows = [row(n, noise(n), shard=f"theirs {n}") for n in range(8)]
    out = build(tmp_path / "out", rows, [])
    found = told(out, "SELECT shard, list_shard FROM samples")
    assert {line["shard"] for line in found} <= {path.stem for path in (out / "shards").iterdir()}
    assert {line["list_shard"] for line in found} == {f"theirs {n}" for n in range(8)}


def test_forms_of_the_answer_agree(out: Path) -> None:
    query = "SELECT key, row, caption, kept, value FROM ledger ORDER BY row"
    rows = told(out, query)
    assert json.loads(asked("sql", query, "--out", out, "--format", "json")) == rows
    lines = list(csv.DictReader(io.StringIO(asked("sql", query, "--out", out, "--format", "csv"))))
    assert [(line["key"], int(line["row"]), line["value"]) for line in lines] == [
        (row["key"], row["row"], row["value"] or "") for row in rows
    ]
    words = [sys.executable, "-m", "curate.cli", "sql", query, "--out", str(out), "--format", "parquet"]
    ran = subprocess.run(words, capture_output=True, check=True, timeout=60)
    written = pd.read_parquet(io.BytesIO(ran.stdout))
    assert written.key.tolist() == [row["key"] for row in rows]
    table = asked("sql", query, "--out", out).splitlines()
    assert table[0].split() == ["key", "row", "caption", "kept", "value"]
    assert [line.split()[0] for line in table[1:]] == [row["key"] for row in rows]


def test_values_without_a_form_in_json_and_names_that_repeat(out: Path) -> None:
    query = "SELECT 'NaN'::DOUBLE AS x, 1 AS x, [1, 'inf'::FLOAT] AS y, DATE '2026-01-02' AS z, '\\x01'::BLOB AS b"
    assert json.loads(asked("sql", query, "--out", out, "--format", "json")) == [
        {"x": None, "x_1": 1, "y": [1.0, None], "z": "2026-01-02", "b": "01"}
    ]
    assert json.loads(asked("sql", "SELECT 1 WHERE false", "--out", out, "--format", "json")) == []


def test_limit_cuts_every_form_and_a_table_says_that_there_is_more(out: Path) -> None:
    query = "SELECT key FROM ledger ORDER BY row"
    assert len(json.loads(asked("sql", query, "--out", out, "--format", "json", "--limit", "7"))) == 7
    assert len(asked("sql", query, "--out", out, "--format", "csv", "--limit", "7").splitlines()) == 8
    assert len(asked("sql", query, "--out", out, "--limit", "7").splitlines()) == 8
    words = [sys.executable, "-m", "curate.cli", "sql", "FROM range(1000)", "--out", str(out)]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert len(ran.stdout.splitlines()) == 101
    assert "the first 100 rows; --limit shows more" in ran.stderr


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT captoin FROM ledger", "no column 'captoin'. Did you mean 'caption'?"),
        ("SELECT l.kee FROM ledger l", "no column 'kee'. Did you mean 'key'?"),
        ("FROM ledgr", "no table 'ledgr'. Did you mean 'ledger'?"),
        ("SELECT foo(1)", 'Scalar Function with name foo does not exist! Did you mean "floor"?'),
        ("SELEC 1", "syntax error"),
        ("SELECT 1; SELECT 2", "expected one SELECT, got 2 statements"),
        ("", "expected one SELECT, got nothing"),
        ("SELECT CAST(caption AS INT) FROM ledger", "Could not convert string"),
    ],
)
def test_mistakes_are_one_line_with_the_nearest_name(out: Path, query: str, says: str) -> None:
    assert says in asked("sql", query, "--out", out, status=2)


@pytest.mark.parametrize(
    "query",
    [
        "COPY ledger TO '{tmp}/stolen.csv'",
        "FROM read_text('{tmp}/secret')",
        "FROM '{tmp}/secret'",
        "FROM read_csv('{out}/raw/../../secret')",
        "FROM glob('{tmp}/*')",
        "FROM sniff_csv('{tmp}/secret')",
        "FROM read_parquet('http://127.0.0.1:1/x.parquet')",
        "ATTACH '{tmp}/x.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET memory_limit = '100GB'",
        "SET enable_external_access = true",
        "CREATE TABLE x AS FROM ledger",
        "DROP VIEW ledger",
        "EXPORT DATABASE '{tmp}/x'",
        "FROM query('COPY ledger TO ''{tmp}/stolen.csv''')",
        "SELECT getenv('HOME')",
        "CALL pragma_version()",
    ],
)
def test_a_query_reads_the_tables_and_nothing_else(out: Path, tmp_path: Path, query: str) -> None:
    (tmp_path / "secret").write_text("secret\n1")
    before = sorted(path.name for path in tmp_path.iterdir())
    said = asked("sql", query.format(tmp=tmp_path, out=out), "--out", out, status=2)
    assert said.startswith("sql: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_link_in_the_folder_leads_nowhere(out: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    (tmp_path / "secret.csv").write_text("a\n1\n")
    (copy / "raw" / "link.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(ConfigError, match="Permission Error"):
        told(copy, f"FROM read_csv('{copy / 'raw' / 'link.csv'}')")


@pytest.mark.parametrize(
    "query",
    ["SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b", "FROM range(9000000000000)"],
)
def test_a_query_that_does_not_end_is_ended(out: Path, query: str) -> None:
    with pytest.raises(ConfigError, match=r"no answer within 0.5 s; ask for less, or raise --time_limit_s"):
        count_rows(out, query, time_limit_s=0.5)


def test_a_query_that_needs_too_much_memory_is_told_so_and_spills_into_no_running_build(out: Path) -> None:
    spill = out / ".spill" / "of a build"
    spill.mkdir(parents=True, exist_ok=True)
    with pytest.raises(ConfigError, match="raise --memory_limit"):
        told(out, "SELECT list(range) FROM range(100000000)", memory_limit="60MB")
    assert spill.is_dir()
    assert [path.name for path in out.glob(".spill*")] == [".spill"]
    shutil.rmtree(out / ".spill")


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(out: Path) -> None:
    words = [sys.executable, "-m", "curate.cli", "sql", "FROM range(100000000)", "--out", str(out), "--format", "csv"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as asking:
        assert asking.stdout.readline() == b"range\n"
        asking.stdout.close()
        assert asking.stderr.read() == b""
        assert asking.wait(timeout=60) == 141


def test_what_the_folder_lacks_is_named(out: Path, tmp_path: Path) -> None:
    shutil.copy(out / "ledger.parquet", tmp_path)
    said = asked("sql", "FROM samples", "--out", tmp_path, status=2)
    assert said == "sql: no table 'samples'. Known: ledger. (not in this folder: planned, raw, signals, samples)"
    assert told(tmp_path, "SELECT count(*) AS n FROM ledger") == [{"n": 60}]
    assert "no such folder" in asked("sql", "SELECT 1", "--out", tmp_path / "none", status=2)


def test_a_folder_of_thousands_of_shards_is_one_table(tmp_path: Path) -> None:
    """More files than a process may have open by default."""
    import pyarrow as pa

    from curate.files import write_parquet

    out = tmp_path / "out"
    write_parquet(pa.table({"key": ["a"], "kept": [False]}), out / "ledger.parquet", made_from="x")
    for number in range(1_100):
        write_parquet(pa.table({"key": [str(number)]}), out / "raw" / f"{number:05d}.parquet", made_from="x")
    program = (
        "import resource, runpy, sys; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1];"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)); sys.argv = sys.argv[1:];"
        "runpy.run_module('curate.cli', run_name='__main__')"
    )
    words = [sys.executable, "-c", program, "curate", "sql", "SELECT count(DISTINCT key) AS n FROM raw"]
    ran = subprocess.run([*words, "--out", str(out)], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (0, "   n\n1100\n"), ran.stderr
