import gzip
import hashlib
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate import plan
from curate.config import ColumnsConfig, PlanConfig
from curate.errors import ConfigError, InputError
from curate.filters import parse_steps

ROWS = [
    {"url": "http://a.test/1.jpg", "caption": 'commas, "quotes"\nand a second line', "score": 0.5},
    {"url": " https://b.test/2.jpg\t", "caption": "zwei Wörter 🦊", "score": 1.5},
    {"url": "http://c.test/3.jpg", "caption": "", "score": None},
]


def run(urls, out, filters=(), **config):
    columns = ColumnsConfig(url=config.pop("url_column", None), caption=config.pop("caption_column", None))
    return plan.run(str(urls), out, PlanConfig(columns=columns, **config), parse_steps(filters))


def candidates(out):
    tables = [pq.read_table(path) for path in sorted((out / "plan").glob("[0-9]*.parquet"))]
    return sorted((row for table in tables for row in table.to_pylist()), key=lambda row: row["row"])


def drops(out):
    return pq.read_table(out / "plan" / "dropped.parquet").to_pylist()


def csv_text(rows):
    def field(value):
        return "" if value is None else '"' + str(value).replace('"', '""') + '"'

    return "url,caption,score\n" + "".join(
        ",".join(map(field, (r["url"], r["caption"], r["score"]))) + "\n" for r in rows
    )


def write(path: Path, rows=ROWS) -> Path:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return path
    text = {
        ".csv": csv_text,
        ".jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
        ".json": json.dumps,
    }[Path(name).suffix](rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def hashed(url, caption):
    return hashlib.sha256(f"{url}\n{caption}".encode()).hexdigest()[:20]


@pytest.mark.parametrize("name", ["l.csv", "l.csv.gz", "l.parquet", "l.json", "l.jsonl", "l.jsonl.gz", "odd[1]*.csv"])
def test_every_form_of_list_gives_the_same_candidates(tmp_path, name):
    result = run(write(tmp_path / name), tmp_path / "out")
    assert (result.rows, result.candidates, result.dropped, result.made) == (3, 3, {}, True)
    found = candidates(tmp_path / "out")
    assert [row["url"] for row in found] == [row["url"].strip() for row in ROWS]
    assert [row["caption"] for row in found] == [row["caption"] for row in ROWS]
    assert [row["key"] for row in found] == [hashed(r["url"].strip(), r["caption"]) for r in ROWS]
    assert [(row["caption_chars"], row["caption_words"]) for row in found] == [(34, 6), (13, 3), (0, 0)]
    assert [row["url_host"] for row in found] == ["a.test", "b.test", "c.test"]
    assert [row["score"] and float(row["score"]) for row in found] == [0.5, 1.5, None]


def test_tsv_and_txt_are_read_line_by_line(tmp_path):
    (tmp_path / "l.tsv").write_text('caption\turl\na, b "c"\thttp://a.test/1\n')
    run(tmp_path / "l.tsv", tmp_path / "tsv")
    assert [(r["url"], r["caption"]) for r in candidates(tmp_path / "tsv")] == [("http://a.test/1", 'a, b "c"')]
    (tmp_path / "l.txt").write_bytes(b'http://a.test/"1",2\r\n\r\n#http\r\nhttp://a.test/\xc3\xa9 x\r\n')
    result = run(tmp_path / "l.txt", tmp_path / "txt")
    assert [(r["row"], r["url"]) for r in candidates(tmp_path / "txt")] == [
        (0, 'http://a.test/"1",2'),
        (3, "http://a.test/é x"),
    ]
    assert result.dropped == {"bad_url": 1, "empty_url": 1}


def test_rows_are_numbered_over_the_files_of_a_folder_in_sorted_order(tmp_path):
    folder = tmp_path / "lists"
    folder.mkdir()
    rows = [{"url": f"http://a.test/{n}", "caption": str(n)} for n in range(25_000)]
    pq.write_table(pa.Table.from_pylist(rows[:20_000]), folder / "a.parquet", row_group_size=3_000)
    pq.write_table(pa.Table.from_pylist(rows[20_000:]), folder / "b.parquet")
    (folder / "notes.md").write_text("not a list")
    run(folder, tmp_path / "out", shard_size=25_000)
    table = pq.read_table(tmp_path / "out" / "plan" / "00000.parquet").sort_by("row")
    assert table["caption"].to_pylist() == [row["caption"] for row in rows]
    run(f"{folder}/*.parquet", tmp_path / "again", shard_size=25_000)
    again = pq.read_table(tmp_path / "again" / "plan" / "00000.parquet").sort_by("row")
    assert again.equals(table)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["http://a.test/1", "https://b.test/ä", "", "  ", "ftp://x/y", "nonsense"])
            | st.text(max_size=12),
            st.text(max_size=30),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_list_every_row_is_a_candidate_or_dropped_once_under_a_key_of_its_own(tmp_path, pairs):
    pairs = [(u.encode("utf-8", "ignore").decode(), c.encode("utf-8", "ignore").decode()) for u, c in pairs]
    urls = tmp_path / "l.parquet"
    pq.write_table(pa.table({"url": [u for u, _ in pairs], "caption": [c for _, c in pairs]}), urls)
    result = run(urls, tmp_path / "out", shard_size=3)
    rows = candidates(tmp_path / "out") + drops(tmp_path / "out")
    assert sorted(row["row"] for row in rows) == list(range(len(pairs)))
    assert len({row["key"] for row in rows}) == len(pairs)
    assert result.rows == len(pairs) == result.candidates + sum(result.dropped.values())
    assert [row["caption"] for row in sorted(rows, key=lambda row: row["row"])] == [c for _, c in pairs]


def test_bad_urls_are_dropped_each_for_its_reason(tmp_path):
    expected = {
        "": ("empty_url", None),
        " \u00a0\t": ("empty_url", None),
        "a.test/1.jpg": ("bad_url", "a.test/1.jpg"),
        "a.test:80/1.jpg": ("bad_url", "a.test:80/1.jpg"),
        "http:///1.jpg": ("bad_url", "http:///1.jpg"),
        "http://": ("bad_url", "http://"),
        "http://a.test/\x01": ("bad_url", "http://a.test/\x01"),
        "ftp://a.test/1.jpg": ("blocked_scheme", "ftp"),
        "FILE:///etc/passwd": ("blocked_scheme", "file"),
        "data:image/png;base64,iVBO": ("blocked_scheme", "data"),
        "JavaScript:alert(1)": ("blocked_scheme", "javascript"),
    }
    pq.write_table(pa.table({"url": list(expected), "caption": ["x"] * len(expected)}), tmp_path / "l.parquet")
    run(tmp_path / "l.parquet", tmp_path / "out")
    assert {row["url"]: (row["reason"], row["value"]) for row in drops(tmp_path / "out") if row["url"]} == {
        url: fate for url, fate in expected.items() if url.strip()
    }
    assert [row["reason"] for row in drops(tmp_path / "out")][:2] == ["empty_url", "empty_url"]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("HTTP://A.Test:80/x", "a.test"),
        ("https://user:pass@b.test/x", "b.test"),
        ("http://[::1]:8080/x", "[::1]"),
        ("http://c.test?q", "c.test"),
        ("http://bücher.test/a b", "bücher.test"),
    ],
)
def test_the_host_is_what_would_be_asked(tmp_path, url, host):
    (tmp_path / "l.txt").write_text(url)
    run(tmp_path / "l.txt", tmp_path / "out")
    assert [row["url_host"] for row in candidates(tmp_path / "out")] == [host]


def test_a_repeated_pair_is_dropped_with_the_first_as_twin_and_another_caption_is_not(tmp_path):
    rows = [("http://a.test/1", "x"), ("http://a.test/1 ", "x"), ("http://a.test/1", "y"), ("http://a.test/1", "x")]
    pq.write_table(pa.table({"url": [u for u, _ in rows], "caption": [c for _, c in rows]}), tmp_path / "l.parquet")
    run(tmp_path / "l.parquet", tmp_path / "out")
    first = hashed("http://a.test/1", "x")
    assert [row["key"] for row in candidates(tmp_path / "out")] == [first, hashed("http://a.test/1", "y")]
    assert [(r["key"], r["row"], r["reason"], r["twin"]) for r in drops(tmp_path / "out")] == [
        (f"{first}-2", 1, "duplicate_row", first),
        (f"{first}-3", 3, "duplicate_row", first),
    ]


def test_a_url_with_a_line_break_does_not_take_the_key_of_another_pair(tmp_path):
    rows = [("http://a.test/1\nb", "c"), ("http://a.test/1", "b\nc")]
    pq.write_table(pa.table({"url": [u for u, _ in rows], "caption": [c for _, c in rows]}), tmp_path / "l.parquet")
    run(tmp_path / "l.parquet", tmp_path / "out")
    assert [(row["row"], row["key"]) for row in candidates(tmp_path / "out")] == [(1, hashed(*rows[1]))]
    assert [row["reason"] for row in drops(tmp_path / "out")] == ["bad_url"]


def test_where_steps_over_the_lists_columns_are_applied_before_the_download(tmp_path):
    filters = [
        {"name": "words", "where": "caption_words >= 1"},
        {"name": "pixels", "where": "width >= 200"},
        {"name": "score", "where": "TRY_CAST(score AS DOUBLE) < 1 -- of the list"},
        {"name": "exact", "dedup": {"by": "sha256"}},
        {"name": "late", "where": "caption_chars > 1000"},
    ]
    result = run(write(tmp_path / "l.csv"), tmp_path / "out", filters)
    assert [(row["row"], row["step"], row["reason"], row["value"]) for row in drops(tmp_path / "out")] == [
        (1, "score", "where", "score=1.5"),
        (2, "words", "where", "caption_words=0"),
    ]
    assert (result.candidates, result.dropped) == (1, {"where": 2})


def test_a_predicate_that_is_null_drops_the_row_and_shows_null(tmp_path):
    run(write(tmp_path / "l.parquet"), tmp_path / "out", [{"name": "score", "where": "score > 0 AND caption <> 'x'"}])
    assert [row["value"] for row in drops(tmp_path / "out")] == ["score=NULL, caption="]


def test_columns_of_the_list_are_carried_and_renamed_where_ours_have_the_name(tmp_path):
    row = {
        "URL": "http://a.test/1",
        "TEXT": "x",
        "Width": 5,
        "similarity": 0.25,
        "tags": ["a", None],
        "meta": {"lang": "de"},
        "taken": "2020-1-5",
        "list_Width": 6,
        "kept": True,
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "l.parquet")
    run(tmp_path / "l.parquet", tmp_path / "out")
    (found,) = candidates(tmp_path / "out")
    carried = {name: value for name, value in found.items() if name not in plan.PLAN_COLUMNS}
    assert carried == {
        "list_list_Width": 5,
        "similarity": 0.25,
        "tags": '["a",null]',
        "meta": '{"lang":"de"}',
        "taken": "2020-1-5",
        "list_Width": 6,
        "list_kept": True,
    }


def test_json_text_that_looks_like_a_date_stays_as_it_is_written(tmp_path):
    (tmp_path / "l.jsonl").write_text('{"url": "http://a.test/1", "caption": "2020-1-5", "day": "2020-1-5"}\n')
    run(tmp_path / "l.jsonl", tmp_path / "out")
    assert [(row["caption"], row["day"]) for row in candidates(tmp_path / "out")] == [("2020-1-5", "2020-1-5")]


def test_a_json_value_that_is_no_text_leaves_the_texts_beside_it_as_they_are_written(tmp_path):
    captions = ["a dog", 'the "big" cat\n', 1999, {"t": "x"}, None]
    rows = [{"url": f"http://a.test/{n}", "caption": caption, "shop": caption} for n, caption in enumerate(captions)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path / "l.jsonl", tmp_path / "out", [{"name": "shop", "where": "shop IS NULL OR shop <> 'a dog'"}])
    found = [(row["caption"], row["shop"]) for row in candidates(tmp_path / "out")]
    texts = ['the "big" cat\n', "1999", '{"t":"x"}']
    assert found == [*zip(texts, texts, strict=True), ("", None)]


def test_named_columns_win_over_usual_names(tmp_path):
    (tmp_path / "l.csv").write_text("url,text,thumb,label\nhttp://a.test/big,t,http://a.test/small,l\n")
    run(tmp_path / "l.csv", tmp_path / "out", url_column="thumb", caption_column="Label")
    assert [(r["url"], r["caption"]) for r in candidates(tmp_path / "out")] == [("http://a.test/small", "l")]


def test_candidates_are_spread_over_files_by_url_and_sorted_by_key(tmp_path):
    rows = [{"url": f"http://a.test/{n % 90}", "caption": str(n)} for n in range(100)]
    result = run(write(tmp_path / "l.parquet", rows), tmp_path / "out", shard_size=30)
    files = sorted((tmp_path / "out" / "plan").glob("[0-9]*.parquet"))
    assert len(files) == math.ceil(result.candidates / 30) == 4
    where = {}
    for path in files:
        table = pq.read_table(path)
        assert table["key"].to_pylist() == sorted(table["key"].to_pylist())
        for url in table["url"].to_pylist():
            assert where.setdefault(url, path) == path
    assert len(set(where.values())) == 4


def test_an_unchanged_plan_is_left_alone_and_a_changed_one_is_made_again(tmp_path):
    rows = [{"url": f"http://a.test/{n}", "caption": f"{n} x"} for n in range(20)]
    urls, out = write(tmp_path / "l.parquet", rows), tmp_path / "out"
    first = run(urls, out, shard_size=5)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "plan").iterdir()}
    again = run(urls.rename(tmp_path / "moved.parquet"), out, shard_size=5)
    assert (again.made, again.rows, again.candidates) == (False, first.rows, first.candidates)
    assert {path: path.stat().st_mtime_ns for path in (out / "plan").iterdir()} == stamps
    (out / "plan" / "00001.parquet").unlink()
    assert run(tmp_path / "moved.parquet", out, shard_size=5).made
    fewer = run(tmp_path / "moved.parquet", out, [{"name": "few", "where": "row < 8"}], shard_size=5)
    # What is planned stays, for `select` to drop: it may be fetched already. A new folder has the eight alone.
    assert (fewer.candidates, fewer.new, fewer.gone) == (20, 0, 0)
    fresh = run(tmp_path / "moved.parquet", tmp_path / "new", [{"name": "few", "where": "row < 8"}], shard_size=5)
    assert (fresh.candidates, len(list((tmp_path / "new" / "plan").glob("[0-9]*.parquet")))) == (8, 2)


def test_the_same_list_gives_the_same_bytes(tmp_path):
    rows = [{"url": f"http://a.test/{n}", "caption": f"{n} x"} for n in range(300)]
    urls = write(tmp_path / "l.parquet", rows)
    for name in ("one", "two"):
        run(urls, tmp_path / name, shard_size=100)
    one, two = (sorted((tmp_path / name / "plan").iterdir()) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_a_filter_that_cannot_work_is_told_before_any_request(tmp_path):
    urls = write(tmp_path / "l.csv")
    with pytest.raises(ConfigError, match=r"filters 'late': no column 'widht'\. Did you mean 'width'\?"):
        run(urls, tmp_path / "out", [{"name": "late", "where": "widht > 3"}])
    with pytest.raises(ConfigError, match=r"filters 'odd': .*VARCHAR, INTERVAL"):
        run(urls, tmp_path / "out", [{"name": "odd", "where": "sha256 + interval 1 day > width"}])
    with pytest.raises(ConfigError, match=r"filters 'near': no column 'phsh'\. Did you mean 'phash'\?"):
        run(urls, tmp_path / "out", [{"name": "near", "dedup": {"by": "phsh"}}])
    with pytest.raises(ConfigError, match=r"filters 'cast'.*TRY_CAST"):
        run(urls, tmp_path / "out", [{"name": "cast", "where": "CAST(caption AS INTEGER) > 3"}])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("l.parquet", b"PAR1 this is none", "cannot be read as parquet"),
        ("l.csv", b"a,b\n1,2\n", r"none of its columns \(a, b\) is named url"),
        ("l.csv", b"url,x\nhttp://a.test,2\n", r"named caption.*plan.columns.caption"),
        ("l.csv", b"url,caption\nhttp://a.test/\xff\xfe,x\n", "l.csv: line 2 is not UTF-8"),
        ("l.csv", b"url,c\xe9\nhttp://a.test/,x\n", "l.csv: line 1 is not UTF-8"),
        ("l.csv", b"", "l.csv: is empty; expected a header"),
        ("l.csv.gz", gzip.compress(b"url,caption\nhttp://a.test/,x\n" * 9, mtime=0)[:-9], "l.csv.gz: cannot be read"),
        ("l.jsonl", b'{"url": "http://a.test"\n', "cannot be read as json"),
        ("l.jsonl.gz", gzip.compress(b'{"url": "http://a.test/"}\n' * 9, mtime=0)[:-9], "cannot be read as json"),
        ("l.txt.gz", gzip.compress(b"http://a.test/\xe9\n" * 9000, mtime=0)[:-9], "l.txt.gz: .*"),
        ("l.json", b"[1, 2]", "expected JSON objects"),
        (
            "l.jsonl",
            b'{"url": "a", "text": ["b"]}',
            r"column 'text' holds VARCHAR\[\], no text; .*plan.columns.caption",
        ),
        ("l.jsonl", b'{"url": "a", "text": {"b": 1}}', r"column 'text' holds STRUCT.*, no text; write a row for each"),
        ("l.jsonl", b'{"url": {"b": 1}, "text": "c"}', r"column 'url' holds STRUCT.*plan.columns.url"),
        ("l.csv", b"url,caption\n", "has no rows"),
        ("l.docx", b"x", "unknown files; expected files of one form"),
    ],
)
def test_a_list_that_cannot_be_read_is_told_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        run(tmp_path / name, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("before", [30, 25_000])  # DuckDB looks at 20,480 rows first, and streams the others
@pytest.mark.parametrize(
    ("rows", "line", "says"),
    [
        ("url,caption,n\nhttp://a.test/b,x,1\nhttp://a.test/c,x,2\n", 2, "has 3 fields, the header .* 2; lists of"),
        ("http://a.test/b,one, two\n", 2, r'has 3 fields, the header \(line 1\) 2; put "quotes" around .* a comma'),
        ('"http://a.test/b","two\nlines"\nhttp://a.test/c\n', 4, "has 1 field, the header .* 2; an empty field"),
        ('http://a.test/b,"open\nhttp://a.test/c,x\n', 2, 'a " that opens a text is not closed'),
    ],
)  # fmt: skip
def test_a_row_of_a_csv_that_does_not_fit_is_told_with_its_line(tmp_path, before, rows, line, says):
    rows = "url,caption\n" + "".join(f"http://a.test/{n},photo {n}\n" for n in range(before)) + rows
    (tmp_path / "l.csv").write_bytes(rows.encode("latin-1"))
    with pytest.raises(InputError, match=f"l.csv: line {before + line}:? {says}") as error:
        run(tmp_path / "l.csv", tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "ends", [["\n"], ["\r\n"], ["\r"], ["\r", "\n"], ["\r\n", "\n"], ["\n", "\r\n"], ["\r\n", "\r\n", "\n"]]
)
def test_lines_of_a_csv_may_end_in_any_way_and_differently(tmp_path, ends):
    lines = ["url,caption", *(f'http://a.test/{n},"{n}, and\r\na ""second\n line"""' for n in range(20))]
    with (tmp_path / "l.csv").open("w", newline="") as file:
        file.writelines(line + ends[number % len(ends)] for number, line in enumerate(["", *lines]))
    assert run(tmp_path / "l.csv", tmp_path / "out").candidates == 20
    assert [row["caption"] for row in candidates(tmp_path / "out")] == [
        f'{n}, and\r\na "second\n line"' for n in range(20)
    ]


@pytest.mark.parametrize("content", ["\n{}\r\n{}\r\n", "\r\n\r\n{}\n{}\n", "{}\r\n\n{}\r\n"])
def test_blank_lines_of_a_csv_may_end_in_another_way_than_rows(tmp_path, content):
    (tmp_path / "l.csv").write_bytes(content.format("url,caption", "http://a.test/1,x").encode())
    assert run(tmp_path / "l.csv", tmp_path / "out").candidates == 1


def test_blank_lines_of_many_ends_above_the_header_are_told(tmp_path):
    (tmp_path / "l.csv").write_bytes(b"\n\r\nurl,caption\nhttp://a.test/1,x\n")
    with pytest.raises(InputError, match=r"l\.csv: the blank lines above line 3 do not all end alike; remove them"):
        run(tmp_path / "l.csv", tmp_path / "out")


def test_mixed_line_ends_make_no_list_loose(tmp_path):
    (tmp_path / "l.csv").write_bytes(b'url,caption\r\nhttp://a.test/1,x\nhttp://a.test/2,"x" y\nhttp://a.test/3,x\n')
    with pytest.raises(InputError, match=r'l\.csv: line 3: a " that opens'):
        run(tmp_path / "l.csv", tmp_path / "out")
    (tmp_path / "l.txt").write_bytes(b"http://a.test/1\r\nhttp://a.test/2\nhttp://a.test/3\r\n")
    assert run(tmp_path / "l.txt", tmp_path / "txt").candidates == 3


def test_a_row_of_a_mended_csv_is_told_with_the_users_file(tmp_path):
    rows = [b"url,caption\r\n", b"http://a.test/1,caf\xe9\n", b"http://a.test/2,x\r\n", b"http://a.test/3,x,y\n"]
    (tmp_path / "l.csv").write_bytes(b"".join(rows))
    with pytest.raises(InputError) as error:
        run(tmp_path / "l.csv", tmp_path / "out")
    assert str(error.value).startswith(f"{tmp_path / 'l.csv'}: line 4 has 3 fields")


def test_a_csv_with_tabs_is_read_as_what_it_is(tmp_path):
    """open_clip_train's own form."""
    (tmp_path / "l.csv").write_text("url\tcaption\nhttp://a.test/1\tred, green\nhttp://a.test/2\tblue\n")
    run(tmp_path / "l.csv", tmp_path / "out")
    assert [row["caption"] for row in candidates(tmp_path / "out")] == ["red, green", "blue"]
    (tmp_path / "l.csv").write_text("url\tcaption\nhttp://a.test/1\tred\tgreen\n")
    with pytest.raises(InputError, match=r"line 2 has 3 fields, the header .* 2; .* a tab"):
        run(tmp_path / "l.csv", tmp_path / "other")


def test_csv_files_with_other_columns_are_united_in_their_order(tmp_path):
    (tmp_path / "lists").mkdir()
    for name, header, row in (("a", "url,caption", "{},x"), ("b", "score,caption,URL", "1,x,{}"), ("c", "", "")):
        rows = "".join(row.format(f"http://a.test/{name}{n}") + "\n" for n in range(3) if row)
        (tmp_path / "lists" / f"{name}.csv").write_text(f"{header}\n{rows}")
    run(tmp_path / "lists", tmp_path / "out")
    found = [(row["url"][-2:], row["score"]) for row in candidates(tmp_path / "out")]
    assert found == [(f"a{n}", None) for n in range(3)] + [(f"b{n}", "1") for n in range(3)]


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("url, caption ,url,,URL,a_b,url_1", ["url_1", "column3", "URL_2", "a_b", "url_1_1"]),
        ('\n\n"url","cap""tion",caption', ['cap"tion']),
    ],
)
def test_the_columns_of_a_csv_are_named_as_its_first_line_says(tmp_path, header, names):
    row = ",".join(["http://a.test/1"] + ["x"] * header.count(","))
    (tmp_path / "l.csv").write_text(f"\ufeff{header}\n{row}\n")
    assert run(tmp_path / "l.csv", tmp_path / "out").rows == 1
    assert [name for name in candidates(tmp_path / "out")[0] if name in names] == names


BROKEN = (
    b'{"url": ' + b"[" * 100_000 + b"\n",
    b'{"url": "http://a.te\n',
    b"[1, 2]\n",
    b'{"url": "http://a.test/half", "caption": "a \\ud83e fox"}\n',
    b'{"url": "http://a.test/latin", "caption": "caf\xe9"}\n',
)


@pytest.mark.parametrize("name", ["l.jsonl", "l.jsonl.gz", "L.JSONL.GZ"])
def test_a_few_broken_json_lines_cost_no_other_row(tmp_path, caplog, name):
    lines = [json.dumps({"url": f"http://a.test/{n}", "caption": f"photo {n}"}).encode() + b"\n" for n in range(25_000)]
    lines[24_000:24_000] = BROKEN
    content = b"".join(lines)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert run(tmp_path / name, tmp_path / "out").dropped == {"empty_url": 3}
    assert {row["row"]: row["reason"] for row in drops(tmp_path / "out")} == dict.fromkeys(
        range(24_000, 24_003), "empty_url"
    )
    read = candidates(tmp_path / "out")
    assert len(read) == 25_002
    assert [read[24_000 + n]["caption"] for n in range(3)] == ["a \ufffd fox", "caf\ufffd", "photo 24000"]
    assert f"{name}: broken JSON: 5 of 25,005 lines, the first is line 24001" in caplog.text
    assert not run(tmp_path / name, tmp_path / "out").made


def test_a_mark_of_the_byte_order_is_no_broken_json(tmp_path, caplog):
    rows = [b'{"url": "http://a.test/%d", "caption": "x"}\n' % n for n in range(9)]
    (tmp_path / "l.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(rows) + b"{\n")
    assert run(tmp_path / "l.jsonl", tmp_path / "out").candidates == 9
    assert "broken JSON: 1 of 10 lines, the first is line 10" in caplog.text


def test_many_broken_json_lines_are_another_form(tmp_path):
    rows = [b'{"url": "http://a.test/%d", "caption": "x"}\n' % n for n in range(400)]
    (tmp_path / "l.jsonl").write_bytes(b"".join(rows) + b"{\n" * 11)
    with pytest.raises(InputError, match=r"l\.jsonl: cannot be read as json: .*line 40[12]") as error:
        run(tmp_path / "l.jsonl", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out" / ".list").iterdir())


@pytest.mark.parametrize("name", ["l.csv", "l.csv.gz", "l.tsv", "l.txt"])
def test_a_few_bytes_that_are_not_utf8_cost_no_row(tmp_path, caplog, name):
    mark = "\t" if name == "l.tsv" else ","
    ends = "" if name == "l.txt" else f"{mark}café"
    rows = [f"http://a.test/{n}{ends}".encode("latin-1" if n in (700, 800) else "utf-8") for n in range(1000)]
    rows[900] = b"http://a.test/caf\xe9" + ends.encode()
    content = b"\n".join([*([] if name == "l.txt" else [f"url{mark}caption".encode()]), *rows])
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert run(tmp_path / name, tmp_path / "out").candidates == 1000
    read = candidates(tmp_path / "out")
    if ends:
        assert [read[row]["caption"] for row in (699, 700, 701)] == ["café", "caf\ufffd", "café"]
        assert f"{name}: not UTF-8: 3 of 1,001 lines, the first is line 702" in caplog.text
    assert read[900]["url"] == "http://a.test/caf\ufffd"
    assert not run(tmp_path / name, tmp_path / "out").made


def test_many_bytes_that_are_not_utf8_are_another_encoding(tmp_path):
    rows = "url,caption\n" + "".join(f"http://a.test/{n},café\n" for n in range(50))
    (tmp_path / "l.csv").write_bytes(rows.encode("latin-1"))
    with pytest.raises(InputError, match=r"l\.csv: line 2 is not UTF-8 \(50 of 51 lines are not\); convert the file"):
        run(tmp_path / "l.csv", tmp_path / "out")


def test_a_list_that_is_not_there_or_mixed_is_told(tmp_path):
    with pytest.raises(InputError, match="no list there"):
        run(tmp_path / "nothing.csv", tmp_path / "out")
    write(tmp_path / "l.csv")
    write(tmp_path / "l.parquet")
    with pytest.raises(InputError, match="csv, parquet files; expected files of one form"):
        run(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"plan.columns.url: .* no column 'urll'\. Did you mean 'url'\?"):
        run(tmp_path / "l.csv", tmp_path / "out", url_column="urll")


def test_a_users_name_and_password_are_in_no_file(tmp_path):
    secret = "hunter2"
    urls = [
        f"http://me:{secret}@a.test/1.jpg",
        f"https://me:p@{secret}@b.test/2.jpg?at=x@y",
        f" ftp://me:{secret}@c.test/",
    ]
    rows = [{"url": url, "caption": f"{n} x"} for n, url in enumerate(urls)]
    run(write(tmp_path / "l.parquet", rows), tmp_path / "out")
    (planned,) = (tmp_path / "out" / "plan").glob("[0-9]*.parquet")
    assert sorted(row["url"] for row in pq.read_table(planned).to_pylist()) == [
        "http://a.test/1.jpg",
        "https://b.test/2.jpg?at=x@y",
    ]
    for path in (tmp_path / "out" / "plan").glob("*.parquet"):
        assert secret not in repr(pq.read_table(path).to_pylist())


BYTES = bytes([0xFF, 0xD8, 0x00, 0x80])


@pytest.mark.parametrize(
    ("column", "carried"),
    [
        (pa.array([BYTES] * 2), BYTES),
        (pa.array([{"bytes": BYTES, "path": "a.jpg"}] * 2), r'{"bytes":"\\xFF\\xD8\\x00\\x80","path":"a.jpg"}'),
    ],
)
def test_bytes_in_a_parquet_list_are_carried(tmp_path, column, carried):
    texts = {"url": ["http://a.test/1", "http://a.test/2"], "caption": ["one", "two"]}
    pq.write_table(pa.table({**texts, "thumb": column}), tmp_path / "l.parquet")
    run(tmp_path / "l.parquet", tmp_path / "out")
    assert [row["thumb"] for row in candidates(tmp_path / "out")] == [carried] * 2


def test_a_day_that_python_does_not_have_is_none(tmp_path):
    days = [0, 2_932_896, 2_932_897, 3_000_000, -719_162, -719_163, None]
    table = pa.table(
        {
            "url": [f"http://a.test/{n}" for n in range(len(days))],
            "caption": ["x"] * len(days),
            "day": pa.array(days, pa.date32()),
            "time": pa.array([None if n is None else n * 86_400_000_000 for n in days], pa.timestamp("us")),
        }
    )
    pq.write_table(table, tmp_path / "l.parquet")
    run(tmp_path / "l.parquet", tmp_path / "out")
    rows = candidates(tmp_path / "out")
    assert [row["day"] and row["day"].year for row in rows] == [1970, 9999, None, None, 1, None, None]
    assert [row["time"] and row["time"].year for row in rows] == [1970, 9999, None, None, 1, None, None]


@pytest.mark.parametrize("others", [{}, {"md5": [BYTES]}, {"score": [1]}])
def test_texts_that_a_parquet_list_calls_bytes_are_texts(tmp_path, others):
    marked = {"license": ["none"]} if "md5" in others else {}
    table = pa.table({"url": [b"http://a.test/1"], "caption": ["größe".encode()], **others, **marked})
    pq.write_table(table, tmp_path / "l.parquet", store_schema=False)
    run(tmp_path / "l.parquet", tmp_path / "out")
    (row,) = candidates(tmp_path / "out")
    assert (row["url"], row["caption"]) == ("http://a.test/1", "größe")
