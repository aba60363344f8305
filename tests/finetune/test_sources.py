"""Sources of every form, mixed, filtered, with several captions: which samples, what is said of them, and when."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.clip import Clip, load_clip
from curate.errors import ConfigError, InputError
from finetune.config import DataConfig, SourceConfig
from finetune.data import CLIPDataModule, data_fingerprint
from finetune.schedule import Draw, Passes, Schedule
from finetune.sources import _content, caption_lengths, drawn_caption, read_source, training_set
from tests.finetune import tiny

COLOURS = tiny.COLOURS[:4]


@pytest.fixture(scope="module")
def clip(architectures) -> Clip:
    return load_clip(architectures["tiny-vit"], device="cpu")


@pytest.fixture
def images(tmp_path) -> Path:
    """Four images, each by its colour's name, without any caption."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, colour in enumerate(COLOURS):
        (folder / f"{colour}.png").write_bytes(tiny.picture(colour, "circle", number))
    return folder


def csv(path: Path, header: str, *lines: str) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def read(path: Path, **fields):
    return read_source(SourceConfig(path=path, **fields), "data.sources[0]")


def pairs_of(index) -> list[tuple[bytes, list[str]]]:
    """The bytes that the index's places lead to, and the captions."""
    rows = index.table.select(["tar", "image_offset", "image_size", "captions"]).to_pylist()
    content = [index.tars[r["tar"]].read_bytes()[r["image_offset"] : r["image_offset"] + r["image_size"]] for r in rows]
    return list(zip(content, [row["captions"] for row in rows], strict=True))


def expected(*captions: list[str]) -> list[tuple[bytes, list[str]]]:
    return [
        (tiny.picture(colour, "circle", number), of_one)
        for number, (colour, of_one) in enumerate(zip(COLOURS, captions, strict=False))
    ]


class WithClip(CLIPDataModule):
    """The data module without a trainer; the CLIP is given."""

    def __init__(self, clip: Clip, config: DataConfig, world: tuple[int, int] = (1, 0)) -> None:
        super().__init__(config, seed=3)
        self._clip = lambda: clip
        self._world = lambda: world
        self.setup()


def mixed(dataset: Path, table: Path, **fields) -> DataConfig:
    sources = [
        SourceConfig(path=dataset, weight=0.5),
        SourceConfig(path=table, weight=3.0, templates=["a photo of a {}.", "art of a {}."]),
    ]
    return DataConfig(**({"sources": sources, "batch_size": 6, "num_workers": 0, "crop_scale": (0.4, 1.0)} | fields))


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "mark"), [("csv", ","), ("tsv", "\t")])
def test_a_table_of_paths_and_captions(images, ending, mark):
    table = csv(images / f"pairs.{ending}", f"filepath{mark}title", *(f"{c}.png{mark}a {c} disc" for c in COLOURS))
    assert pairs_of(read(table)) == expected(*([f"a {c} disc"] for c in COLOURS))


def test_parquet_with_a_list_of_captions_and_named_columns(images):
    columns = {"photo": [f"{c}.png" for c in COLOURS], "said": [[c, f"{c}!"] for c in COLOURS], "text": list("abcd")}
    pq.write_table(pa.table(columns), images / "pairs.parquet")
    index = read(images / "pairs.parquet", image="photo", caption="said")
    assert pairs_of(index) == expected(*([c, f"{c}!"] for c in COLOURS))


def test_captions_of_which_one_is_no_text_are_texts(images):
    for captions in (["a", 7], [["a", 7], ["b"]]):
        lines = [json.dumps({"image": f"{c}.png", "caption": said}) for c, said in zip(COLOURS, captions, strict=False)]
        (images / "pairs.jsonl").write_text("\n".join(lines))
        said = [["a"], ["7"]] if captions[1] == 7 else [["a", "7"], ["b"]]
        assert pairs_of(read(images / "pairs.jsonl")) == expected(*said)


@pytest.mark.parametrize("caption", [{"t": "a"}, [{"t": "a"}], [["a"]]])
def test_captions_that_are_no_texts_are_refused(images, caption):
    (images / "pairs.jsonl").write_text(json.dumps({"image": "red.png", "caption": caption}))
    with pytest.raises(InputError, match=r"column 'caption' holds .*, neither text nor a list of texts"):
        read(images / "pairs.jsonl")


def test_rows_of_one_image_are_one_sample_in_the_order_of_the_rows(images):
    table = csv(images / "pairs.csv", "image,caption", "red.png,one", "green.png,other", "red.png,two", "red.png,")
    assert pairs_of(read(table)) == expected(["one", "two"], ["other"])


def test_a_folder_with_metadata_as_transformers_has_it(images):
    lines = [json.dumps({"file_name": f"{c}.png", "text": f"a {c}", "score": n}) for n, c in enumerate(COLOURS)]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    assert pairs_of(read(images, where="score < 2")) == expected(["a red"], ["a green"])


def test_class_folders_with_templates_are_labels_and_equal_labels_one_group(tmp_path):
    for number, name in enumerate(["palm_cockatoo", "kea", "palm_cockatoo"]):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{number}.png").write_bytes(tiny.picture("red", "circle", number))
    index = read(tmp_path, templates=["a photo of a {}."])
    groups = dict(Counter(index.table["duplicate_group"].to_pylist()))
    assert groups == {"label:kea": 1, "label:palm cockatoo": 2}


def test_plain_tars_with_captions_beside_the_images(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, colour in enumerate(COLOURS):
            said = ("txt", f"a {colour}") if number % 2 else ("json", json.dumps({"caption": f"a {colour}"}))
            for ending, content in (("png", tiny.picture(colour, "circle", number)), (said[0], said[1].encode())):
                member = tarfile.TarInfo(f"{number:05d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert pairs_of(read(tmp_path)) == expected(*([f"a {c}"] for c in COLOURS))


def test_where_chooses_rows_of_a_dataset_and_keeps_their_order(dataset):
    everything, some = read(dataset), read(dataset, where="caption LIKE '%red%' AND duplicate_group > 0")
    said = zip(everything.table["key"].to_pylist(), everything.table["captions"].to_pylist(), strict=True)
    keys = [key for key, (caption,) in said if "red" in caption][1:]  # the very first is of group 0
    assert some.table["key"].to_pylist() == keys


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "fields", "error", "says"),
    [
        ("lost.png,x,1", {}, InputError, r"pairs\.csv: row 2: .*lost\.png: no such image"),
        ("http://a/b.png,x,1", {}, InputError, r"row 2: http://a/b\.png is a URL; .*`curate build`"),
        (",x,1", {}, InputError, r"row 2: no image"),
        ("red.png,x,1", {"caption": "captoin"}, ConfigError, r"data\.sources\[0\]\.caption: .*Did you mean"),
        ("red.png,x,1", {"image": "photo"}, ConfigError, r"data\.sources\[0\]\.image: .*no column 'photo'"),
        ("red.png,x,1", {"where": "hieght > 1"}, ConfigError, r"data\.sources\[0\]\.where: no column 'hieght'"),
        (
            "red.png,x,1",
            {"where": "CAST(height AS INT) > 9"},
            InputError,
            r"no row for which CAST.* > 9; nothing to train on",
        ),
        ("red.png,x,1", {"where": "(SELECT true)"}, ConfigError, r"a sub-query is not allowed"),
        ("red.png,,1", {"templates": ["a {}."]}, InputError, r"sample row 2 has no label for the templates"),
    ],
)
def test_mistakes_are_one_line_with_the_key_or_the_row(images, line, fields, error, says):
    table = csv(images / "pairs.csv", "image,caption,height", "green.png,fine,1", line)
    with pytest.raises(error, match=says) as caught:
        read(table, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", [None, "height > '0'"])
def test_rows_above_a_longer_one_are_not_lost(images, where):
    rows = ["red.png,fine,1"] * 30 + ["image,caption,height,more"] + ["green.png,fine,1,2"] * 30
    with pytest.raises(InputError, match=r"pairs\.csv: line 32 has 4 fields, the header \(line 1\) 3"):
        read(csv(images / "pairs.csv", "image,caption,height", *rows), where=where)


@pytest.mark.parametrize(
    ("source", "told"),
    [({"weight": 0}, r"weight: expected above 0, got 0"), ({"templates": ["a photo"]}, r"templates: 'a photo' needs")],
)
def test_a_weight_and_a_template_are_checked_when_they_are_made(source, told):
    good = SourceConfig(path=Path("x"))
    with pytest.raises(ConfigError, match=rf"data\.sources\[1\]\.{told}"):
        DataConfig(sources=[good, SourceConfig(path=Path("x"), **source)])


def test_an_image_that_goes_away_after_the_start_is_named(clip, images):
    table = csv(images / "pairs.csv", "image,caption", *(f"{c}.png,{c}" for c in COLOURS))
    loader = WithClip(clip, DataConfig(dataset=table, batch_size=4, num_workers=0)).train_dataloader()
    (images / "blue.png").unlink()
    with pytest.raises(InputError, match=r"blue\.png: sample row 3"):
        list(loader)


# --- weights ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(2, 30), st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0])), min_size=1, max_size=4))
def test_each_source_is_drawn_its_exact_share_of_every_epoch_and_evenly_over_epochs(parts):
    sources = tuple(Passes(size, weight) for size, weight in parts)
    schedule = Schedule(sum(size for size, _ in parts), 0, 5, 0.0, 7, sources=sources)
    seen: Counter[int] = Counter()
    for epoch in range(4):
        draws = [draw for number in range(len(schedule)) for draw in schedule.batch(epoch, number)]
        assert len(set(draws)) == len(draws) == sum(source.draws for source in sources)
        seen.update(draw.row for draw in draws)
        first = 0
        for source in sources:
            inside = sum(first <= draw.row < first + source.num_samples for draw in draws)
            assert inside == max(1, round(source.num_samples * source.weight))
            first += source.num_samples
    first = 0
    for source in sources:
        counts = [seen[row] for row in range(first, first + source.num_samples)]
        assert max(counts) - min(counts) <= 1
        first += source.num_samples


def test_sources_of_one_size_and_other_seeds_have_orders_of_their_own():
    def halves(seed: int) -> list[list[int]]:
        plan = Schedule(60, 0, 30, 0.0, seed, sources=(Passes(30, 0.5), Passes(30, 0.5)))
        drawn = sorted(draw.row for draw in plan.batch(0, 0))
        assert drawn == sorted(plan.rows(0).tolist())
        return [[row for row in drawn if row < 30], [row - 30 for row in drawn if row >= 30]]

    assert len({tuple(half) for half in (*halves(7), *halves(8))}) == 4


def test_sources_of_weight_one_are_one_dataset():
    one, two = Schedule(30, 0, 8, 0.0, 7), Schedule(30, 0, 8, 0.0, 7, sources=(Passes(10), Passes(20)))
    assert [one.batch(2, n) for n in range(len(one))] == [two.batch(2, n) for n in range(len(two))]


@pytest.fixture
def table(images) -> Path:
    return csv(images / "pairs.csv", "image,caption", *(f"{c}.png,{c}" for c in COLOURS))


def assert_same(first, second) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_mix_is_the_same_with_workers_and_after_a_kill_at_any_batch(clip, dataset, table):
    whole = WithClip(clip, mixed(dataset, table)).train_dataloader()
    states, batches = [whole.state_dict()], []
    for _ in range(2):
        for batch in whole:
            batches.append(batch)
            states.append(pickle.loads(pickle.dumps(whole.state_dict())))
    helped = WithClip(clip, mixed(dataset, table, num_workers=2)).train_dataloader()
    assert_same([batch for _ in range(2) for batch in helped], batches)
    for killed in range(len(batches)):
        resumed = WithClip(clip, mixed(dataset, table)).train_dataloader()
        resumed.load_state_dict(states[killed])
        rest = list(resumed)
        assert_same(rest, batches[killed : killed + len(rest)])


def test_two_ranks_read_the_batches_of_one_twice_as_large(clip, dataset, table):
    large = list(WithClip(clip, mixed(dataset, table, batch_size=8)).train_dataloader())
    ranks = [list(WithClip(clip, mixed(dataset, table, batch_size=4), (2, r)).train_dataloader()) for r in (0, 1)]
    for batch, *halves in zip(large, *ranks, strict=True):
        assert all(torch.equal(batch[name], torch.cat([half[name] for half in halves])) for name in batch)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_fewer_samples_than_a_batch_are_one_batch_and_one_sample_is_refused(clip, images, samples):
    rows = [f"{c}.png,{c}" for c in COLOURS[:samples]]
    data = WithClip(clip, DataConfig(dataset=csv(images / "p.csv", "image,caption", *rows), num_workers=0))
    assert [len(batch["row"]) for batch in data.train_dataloader()] == [samples]
    one = csv(images / "p.csv", "image,caption", rows[0])
    with pytest.raises(InputError, match="1 training pairs; needs at least 2"):
        WithClip(clip, DataConfig(dataset=one))


def test_weights_that_leave_one_draw_an_epoch_are_refused(clip, table):
    with pytest.raises(InputError, match=r"1 training pairs an epoch \(.*weights\); needs at least 2"):
        WithClip(clip, DataConfig(sources=[SourceConfig(path=table, weight=0.1)], num_workers=0))


def test_the_fingerprint_follows_pairs_weights_and_templates(dataset, table):
    before = data_fingerprint(mixed(dataset, table))
    assert data_fingerprint(mixed(dataset, table, num_workers=2)) == before
    only = SourceConfig(path=table)
    changes = ({"weight": 2.0}, {"templates": ["a {}."]}, {"where": "caption != 'red'"})
    others = [SourceConfig(path=table, **change) for change in changes]
    prints = {data_fingerprint(DataConfig(sources=[source])) for source in (only, *others)}
    assert len(prints) == 4
    csv(table, "image,caption", *(f"{c}.png,the {c}" for c in COLOURS))
    assert data_fingerprint(mixed(dataset, table)) != before
    rows = training_set(DataConfig(sources=[only])).index.table
    place = rows.schema.get_field_index("duplicate_group")  # other positives
    groups = [rows.set_column(place, "duplicate_group", pa.array([*of])) for of in ("aabb", "abab")]
    assert len({_content(each) for each in groups}) == 2


# --- captions ---------------------------------------------------------------------------------------------------------


def test_one_caption_and_template_is_drawn_each_time_evenly_and_by_the_seed_alone():
    def drawn(row: int, turn: int) -> str:
        return drawn_caption(["cat", "kit_ten"], ["a {}.", "the {}."], (5, turn, row))

    said = Counter(drawn(row, turn) for row in range(40) for turn in range(50))
    assert set(said) == {"a cat.", "the cat.", "a kit ten.", "the kit ten."}
    assert all(400 < count < 600 for count in said.values())  # 500 ± 5 standard deviations
    assert len({drawn(0, turn) for turn in range(20)}) == 4
    assert drawn(3, 4) == drawn(3, 4)
    assert drawn_caption(["kit_ten"], [], (5, 0, 0)) == "kit_ten"
    assert drawn_caption([], [], (5, 0, 0)) == ""


def test_a_batch_says_what_was_drawn(clip, dataset, table):
    data = WithClip(clip, mixed(dataset, table))
    batch = data.train_dataloader().dataset.__getitems__([Draw(41, 9)]).batch
    said = drawn_caption(["green"], ["a photo of a {}.", "art of a {}."], (3, 9, 41))
    assert torch.equal(batch["tokens"], clip.tokenizer([said])[:, :8])  # of eight tokens; cut behind them


def test_of_several_captions_each_sample_draws_its_own_and_by_the_seed(clip, tmp_path):
    (tmp_path / "red").mkdir()
    for number in range(30):
        (tmp_path / "red" / f"{number}.png").write_bytes(tiny.picture("red", "circle", number))
    source = SourceConfig(path=tmp_path, templates=["a {}.", "a photo of a {}."])
    said = []
    for seed in (3, 4):
        data = WithClip(clip, DataConfig(sources=[source], num_workers=0))
        data.seed = seed
        batch = data.train_dataloader().dataset.__getitems__([Draw(row, 0) for row in range(30)]).batch
        said.append((batch["tokens"] > 0).sum(1).tolist())
        assert len(set(said[-1])) == 2
    assert said[0] != said[1]


def test_of_several_captions_each_epoch_draws_anew(clip, images):
    both = [f"{colour}.png,{said}" for colour in COLOURS for said in ("short", "a longer one")]
    data = WithClip(clip, DataConfig(dataset=csv(images / "pairs.csv", "image,caption", *both), num_workers=0))
    loader = data.train_dataloader()
    said = {
        (row, len(tokens[tokens > 0]))
        for _ in range(12)
        for batch in loader
        for row, tokens in zip(batch["row"].tolist(), batch["tokens"], strict=True)
    }
    assert said == {(row, length) for row in range(4) for length in (3, 5)}  # words, with the start and the end


def test_captions_over_the_context_are_counted(clip, images):
    fits = " ".join(["dog"] * 14)  # with the start and the end 16 tokens, which is all there is
    rows = (f"red.png,{fits}", "green.png,short", f"blue.png,{fits} cat", f"yellow.png,{fits} {fits}")
    table = csv(images / "pairs.csv", "image,caption", *rows)
    lengths = caption_lengths(training_set(DataConfig(dataset=table)), clip.tokenizer, 0)
    assert (lengths.counted, lengths.too_long, lengths.context_length) == (4, 2, 16)
    assert str(lengths) == "2 of 4 captions (50.0%) are over 16 tokens"


def test_a_dataset_of_shards_is_read_without_a_database(dataset):
    told = """if True:
        import sys
        from pathlib import Path
        from curate.pairs import Wanted, read_pairs
        index = read_pairs(Path(sys.argv[1]), Wanted("data.dataset"))
        print(len(index) > 0, {"duckdb", "torch"} & sys.modules.keys())
    """
    done = subprocess.run([sys.executable, "-c", told, str(dataset)], capture_output=True, text=True, check=True)
    assert done.stdout == "True set()\n"
