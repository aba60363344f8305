import json
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from curate.ask.arguments import DiffOptions
from curate.ask.diff import diff
from tests.curate.built import FILTERS, asked, build, example_list
from tests.curate.fetched import noise, row

STRICTER = [
    {"name": "words", "where": "caption_words > 1"},
    {"name": "wide", "where": "width >= 60 AND row < 50"},
    {"name": "exact", "dedup": {"by": "sha256", "keep": "row DESC"}},
    {"name": "few", "sample": {"count": 30}},
]


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("diff") / "a")


@pytest.fixture(scope="module")
def b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows gone, three new ones, stricter filters, another seed."""
    rows = [*example_list()[2:], *(row(n, noise(n), shop="new") for n in range(60, 63))]
    return build(tmp_path_factory.mktemp("diff") / "b", rows, STRICTER, seed=1)


def by_hand(a: Path, b: Path) -> Counter[tuple[str, str]]:
    """What pandas finds of two ledgers: kind and deciding step of every row that differs."""
    both = pd.read_parquet(a / "ledger.parquet").merge(
        pd.read_parquet(b / "ledger.parquet"), on="key", how="outer", suffixes=("_a", "_b"), indicator="side"
    )
    found: Counter[tuple[str, str]] = Counter()
    for line in both.itertuples():
        in_a, in_b = (line.kept_a is True, line.kept_b is True)
        step_a, step_b = (
            stage if stage == step else f"{stage} {step}"
            for stage, step in ((line.stage_a, line.step_a), (line.stage_b, line.step_b))
        )
        if line.side != "both":
            side, kept = ("only_in_a", in_a) if line.side == "left_only" else ("only_in_b", in_b)
            found[side, "kept" if kept else "dropped"] += 1
        elif in_a != in_b:
            found["lost" if in_a else "gained", step_b if in_a else step_a] += 1
        elif in_a and line.split_a != line.split_b:
            found["moved", f"{line.split_a} → {line.split_b}"] += 1
        elif not in_a and step_a != step_b:
            found["otherwise", f"{step_a} → {step_b}"] += 1
    return found


def test_every_row_that_differs_is_counted_by_what_decided_it(a: Path, b: Path) -> None:
    found = diff(a, b, DiffOptions())
    assert {(flip.kind, flip.decided): flip.rows for flip in found.flips} == by_hand(a, b)
    assert {"only_in_a", "only_in_b", "lost", "gained", "moved"} <= {flip.kind for flip in found.flips}
    assert (found.rows, found.notes) == ((60, 61), [])


def test_examples_are_rows_of_their_kind_with_the_value_that_dropped_them(a: Path, b: Path) -> None:
    ledgers = [pd.read_parquet(folder / "ledger.parquet").set_index("key") for folder in (a, b)]
    found = diff(a, b, DiffOptions(examples=2))
    assert all(len(flip.examples) == min(2, flip.rows) for flip in found.flips)
    lost = [(flip, row) for flip in found.flips if flip.kind == "lost" for row in flip.examples]
    assert lost
    for flip, told in lost:
        line = ledgers[1].loc[told["key"]]
        assert flip.decided in (line.stage, f"{line.stage} {line.step}")
        assert (told["value"], told["url"], told["caption"]) == (line.value, line.url, line.caption)
        assert ledgers[0].loc[told["key"]].kept


def test_the_funnels_stand_side_by_side(a: Path, b: Path) -> None:
    found = diff(a, b, DiffOptions())
    assert [(stage, step) for stage, step, *_ in found.funnel] == [
        ("plan", "plan"), ("plan", "words"), ("fetch", "fetch"), ("select", "wide"), ("select", "exact"),
        ("select", "few"),
    ]  # fmt: skip
    for number, folder in enumerate((a, b)):
        dropped = Counter(step for step in pd.read_parquet(folder / "ledger.parquet").step if step)
        assert {step: own[number].dropped for _, step, *own in found.funnel if own[number].dropped} == dropped


def test_options_that_differ_are_told_a_filter_under_its_name(a: Path, b: Path) -> None:
    told = {key: values for key, *values in diff(a, b, DiffOptions()).options}
    assert told["seed"] == ["0", "1"]
    assert told["filters 'wide'"] == ["{'where': 'width >= 60'}", "{'where': 'width >= 60 AND row < 50'}"]
    assert told.keys() == {"seed", "filters 'wide'", "filters 'exact'", "filters 'few'"}


def test_out_writes_every_row_that_differs_with_both_decisions(a: Path, b: Path, tmp_path: Path) -> None:
    path = tmp_path / "flips.parquet"
    said = asked("diff", a, b, "--out", path)
    written = pd.read_parquet(path)
    assert Counter(written.kind) == Counter(
        {kind: sum(n for (k, _), n in by_hand(a, b).items() if k == kind) for kind, _ in by_hand(a, b)}
    )
    ledger = pd.read_parquet(b / "ledger.parquet").set_index("key")
    lost = written[written.kind == "lost"].set_index("key")
    assert lost.kept_a.all()
    assert lost.step_b.to_dict() == ledger.step[lost.index].to_dict()
    assert written.row_a.dropna().is_monotonic_increasing
    assert "rows only in A's list" in said
    again = tmp_path / "again.parquet"
    asked("diff", a, b, "--out", again)
    assert again.read_bytes() == path.read_bytes()


def test_a_build_is_as_itself(a: Path) -> None:
    found = diff(a, a, DiffOptions())
    assert (found.options, found.flips) == ([], [])
    said = asked("diff", a, a)
    assert "no option differs" in said
    assert "every row was decided the same" in said


def test_without_a_manifest_or_with_an_old_one_the_rows_are_compared_all_the_same(a: Path, tmp_path: Path) -> None:
    bare, old = (Path(shutil.copytree(a, tmp_path / name)) for name in ("bare", "old"))
    (bare / "manifest.json").unlink()
    manifest = json.loads((old / "manifest.json").read_text()) | {"made_from": "before"}
    (old / "manifest.json").write_text(json.dumps(manifest))
    found = diff(bare, old, DiffOptions())
    assert (found.options, found.flips) == ([], [])
    assert found.notes[0].startswith("A has no manifest.json")
    assert found.notes[1].startswith("B's manifest.json is of an earlier ledger")
    assert [step.step for _, _, step, _ in found.funnel if step][-1] == FILTERS[-1]["name"]


def test_mistakes_are_one_line(a: Path, tmp_path: Path) -> None:
    assert asked("diff", a, status=2) == "diff: B is needed; see curate diff --help"
    assert "not a dataset folder" in asked("diff", a, tmp_path, status=2)
    assert "expected the name of a Parquet file" in asked("diff", a, a, "--out", tmp_path / "x.csv", status=2)
    (tmp_path / "manifest.json").write_text("{")
    shutil.copy(a / "ledger.parquet", tmp_path)
    assert "manifest.json: not readable" in asked("diff", a, tmp_path, status=2)
