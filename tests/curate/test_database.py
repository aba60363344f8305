import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.database import arrow_batches, connect, files, literal, quoted, scalar
from curate.errors import ConfigError
from curate.expressions import check_steps, drop_where, order_expression, scalar_expression, watch_drops
from curate.filters import Where

COLUMNS = ("key", "row", "width", "height", "caption", "tags", "Odd name")


@pytest.fixture
def allowed(tmp_path):
    folder = tmp_path / "allowed"
    folder.mkdir()
    pq.write_table(pa.table({"x": [1, 2, 3]}), folder / "a.parquet")
    return folder


@pytest.fixture
def db(tmp_path, allowed):
    (tmp_path / "secret.txt").write_text("secret")
    (allowed / "link.txt").symlink_to(tmp_path / "secret.txt")
    with connect("200MB", 1, tmp_path / "spill", [allowed]) as db:
        yield db


def test_what_is_allowed_can_be_read(db, allowed):
    assert scalar(db, f"SELECT sum(x) FROM read_parquet({files([allowed / 'a.parquet'])})") == 6


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_text('{here}/secret.txt')",
        "SELECT * FROM read_text('{here}/allowed/../secret.txt')",
        "SELECT * FROM read_text('{here}/allowed/link.txt')",
        "SELECT * FROM read_blob('/etc/passwd')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM sniff_csv('/etc/passwd')",
        "SELECT * FROM '{here}/secret.txt'",
        "SELECT * FROM glob('{here}/*')",
        "SELECT * FROM read_csv('http://127.0.0.1:9/x.csv')",
        "ATTACH '{here}/other.db'",
        "COPY (SELECT 1) TO '{here}/out.csv'",
        "EXPORT DATABASE '{here}/dump'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET memory_limit = '100GB'",
        "SET allowed_directories = ['/']",
        "SET lock_configuration = false",
        "CREATE PERSISTENT SECRET s (TYPE http, EXTRA_HTTP_HEADERS MAP {{'a': 'b'}})",
    ],
)
def test_a_locked_connection_refuses(db, tmp_path, query):
    with pytest.raises(duckdb.Error):
        db.execute(query.format(here=tmp_path)).fetchall()
    assert not (tmp_path / "out.csv").exists()
    assert not (tmp_path / "other.db").exists()


def test_python_variables_cannot_be_read(db):
    hidden = pa.table({"x": [1]})
    with pytest.raises(duckdb.CatalogException):
        db.execute("SELECT * FROM hidden").fetchall()
    assert hidden.num_rows == 1


def test_data_beyond_the_memory_limit_spills_and_the_spill_is_gone_afterwards(tmp_path):
    spill = tmp_path / "spill"
    spill.mkdir()
    (spill / "duckdb_temp_of_a_killed_run").write_text("x")
    with connect("100MB", 1, spill, []) as db:
        assert not (spill / "duckdb_temp_of_a_killed_run").exists()
        db.execute("CREATE TABLE t AS SELECT range AS i, md5(range::VARCHAR) AS m FROM range(4000000)")
        assert any(spill.iterdir())
        assert scalar(db, "SELECT count(DISTINCT i) FROM t") == 4_000_000
    assert not spill.exists()


def test_a_wrong_memory_limit_is_told():
    with pytest.raises(ConfigError, match=r"select.memory_limit 'lots'"):
        connect("lots", 1, None, [])


def test_a_streamed_query_gives_every_row_in_order(db):
    batches = arrow_batches(db, "SELECT range AS i FROM range(300000) ORDER BY i")
    assert [i for batch in batches for i in batch["i"].to_pylist()] == list(range(300_000))


@pytest.mark.parametrize("text", ["it's", 'a"b', "a'; DROP TABLE t; --", "é\n"])
def test_any_text_is_a_literal_and_a_name(db, text):
    assert scalar(db, f"SELECT {quoted(text)} FROM (SELECT {literal(text)} AS {quoted(text)})") == text


# --- expressions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("width * HEIGHT > 3", ("width", "height")),
        ("caption BETWEEN 'a' AND 'b' OR caption IN ('x', 'y') -- why not", ("caption",)),
        ("CASE WHEN width > 3 THEN caption LIKE 'a%' ELSE regexp_matches(caption, 'x') END", ("width", "caption")),
        ("TRY_CAST(caption AS DOUBLE) < 0.5", ("caption",)),
        ("len(list_filter(tags, lambda tag: tag > 'x')) > 1", ("tags",)),
        ("tags->>'$.lang' = 'de' AND NOT width IS NULL", ("tags", "width")),
        ('"odd NAME" > 1', ("Odd name",)),
        ("greatest(width, 1) / least(height, 2)::DOUBLE <= 3", ("width", "height")),
        ("true", ()),
    ],
)
def test_an_expression_over_columns_passes_and_names_them(db, text, columns):
    assert set(scalar_expression(db, "here", text, COLUMNS).columns) == set(columns)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("(SELECT count(*) FROM read_text('/etc/passwd')) > 0", "a sub-query is not allowed"),
        ("width IN (SELECT 1)", "a sub-query is not allowed"),
        ("EXISTS (FROM glob('/*'))", "a sub-query is not allowed"),
        ("row_number() OVER () < 3", "a window function is not allowed"),
        ("width > avg(width)", r"avg\(\) is not allowed"),
        ("random() < 0.5", r"random\(\) is not allowed.*the same answer"),
        ("now() > '2020-01-01'", r"\(\) is not allowed"),
        ("current_setting('temp_directory') = 'x'", r"current_setting\(\) is not allowed"),
        ("columns('w.*') > 3", r"a \* is not allowed"),
        ("width > $1", "a parameter"),
        ("1) FROM read_text('/etc/passwd') WHERE (1", "expected one expression"),
        ("width > 3); DROP TABLE rows; SELECT (1", "expected one expression"),
        ("width >", "syntax error"),
        (" ", "got nothing"),
        ("widht > 3", r"here: no column 'widht'\. Did you mean 'width'\?"),
        ("rows.width > 3", "no column 'rows'"),
    ],
)
def test_anything_but_an_expression_over_one_row_is_refused(db, text, says):
    with pytest.raises(ConfigError, match=says):
        scalar_expression(db, "here", text, COLUMNS)


@pytest.mark.parametrize(
    "text", ["width LIMIT 3", "width; SELECT 1", "(SELECT 1)", "wdth DESC", "width DESC LIMIT 1 --"]
)
def test_anything_but_an_order_is_refused(db, text):
    with pytest.raises(ConfigError):
        order_expression(db, "here", text, COLUMNS)


def test_an_order_names_its_columns(db):
    assert order_expression(db, "here", "width * height DESC, caption", COLUMNS).columns == (
        "width",
        "height",
        "caption",
    )


def test_types_that_do_not_go_together_are_found_without_data(db):
    types = {"width": "BIGINT", "caption": "VARCHAR"}
    check_steps(db, [Where(name="ok", expression="width > 3")], types)
    with pytest.raises(ConfigError, match="filters 'odd'"):
        check_steps(db, [Where(name="odd", expression="width + caption IS NULL OR sqrt(caption, 1)")], types)


def test_a_where_notes_the_values_that_decided(db):
    db.execute(
        "CREATE TABLE rows AS SELECT * FROM (VALUES (0, 5, 'a'), (1, 1, 'b'), (2, NULL, 'c')) t(row, width, caption)"
    )
    watch_drops(db)
    step = Where(name="wide", expression="width > 3 OR caption = 'x'")
    drop_where(db, step, stage="select", columns=["row", "width", "caption"])
    assert db.execute("SELECT row, stage, step, reason, value FROM drops ORDER BY row").fetchall() == [
        (1, "select", "wide", "where", "width=1, caption=b"),
        (2, "select", "wide", "where", "width=NULL, caption=c"),
    ]
    assert db.execute("SELECT row FROM alive").fetchall() == [(0,)]


def test_a_value_that_cannot_be_computed_is_told_with_the_way_out(db):
    db.execute("CREATE TABLE rows AS SELECT 0 AS row, 'a' AS caption")
    watch_drops(db)
    with pytest.raises(ConfigError, match=r"filters 'n': Conversion Error.*TRY_CAST"):
        drop_where(db, Where(name="n", expression="CAST(caption AS INTEGER) > 1"), stage="plan", columns=["caption"])


def test_a_long_query_draws_nothing_on_standard_output(tmp_path, capfd):
    with connect("500MB", 1, tmp_path / "spill", []) as db:
        assert scalar(db, "SELECT current_setting('enable_progress_bar')") is False
        db.execute("SELECT count(*) FROM range(400000000) t(i) WHERE hash(i) % 7 = 3").fetchall()
    assert capfd.readouterr().out == ""
