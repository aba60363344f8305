"""Every behaviour of the hostile server, alone: each row ends in the reason that it must."""

import re
import time

import pytest

from tests.hostile.behaviours import SECRET, addresses, cases
from tests.hostile.running import fetched, hurried, urls_of
from tests.hostile.server import hostile_server

CASES = [case for case in cases() if not case.heavy]


class Alone:
    """One run over every case; the tests look at its rows."""

    def __init__(self, out, patch):
        with hostile_server(addresses(cases())) as server:
            self.urls = urls_of(CASES, server.ports, 7)
            started = time.monotonic()
            rows = fetched(out, self.urls, hurried(server.ports, processes=1), patch)
            self.took_s = time.monotonic() - started
            self.forbidden = server.forbidden_connections()
            self.log = server.log()
        self.out = out
        self.rows = {case.name: row for case, row in zip(CASES, rows, strict=True)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield Alone(tmp_path_factory.mktemp("alone"), patch)


def test_there_are_enough_of_them():
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_behaviour_ends_as_it_must(alone, case):
    row = alone.rows[case.name]
    expected = {reason.value for reason in case.reasons} or {None}
    assert row["reason"] in expected, (row["reason"], row["value"])
    assert (row["value"] or "").startswith(case.value)
    if case.asked is not None:
        asked = [request for request in alone.log if request.path == f"/{case.name}/7.jpg"]
        assert len(asked) == case.asked


def test_the_run_takes_as_long_as_the_deadlines_say(alone):
    # Each try within its total, three of them, a Retry-After and robots.txt before it; all rows side by side.
    assert alone.took_s < 3 * (2.5 + 3.0) + 2.5 + 10


def test_nobody_connects_to_an_address_that_is_not_allowed(alone):
    assert alone.forbidden == 0


def test_no_password_is_written_anywhere_but_where_the_list_had_it(alone):
    own = [*(alone.out / "raw").rglob("*.json"), *(alone.out / ".fetch").rglob("*")]
    assert own
    for path in own:
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    for name, row in alone.rows.items():
        said = {column: text for column, text in row.items() if column != "url"}
        assert SECRET not in repr(said), name


def test_nothing_that_a_server_wrote_can_move_a_cursor(alone):
    for name, row in alone.rows.items():
        for column in ("value", "error_message", "exif"):
            assert not re.search("[\x00-\x1f\x7f]", row.get(column) or ""), (name, column)
