"""The steps that look at the user's own images, and those that compare embeddings, with a real (random) CLIP."""

import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate import measure, report
from curate.clip import load_clip
from curate.config import MeasureConfig, ReportConfig
from curate.errors import ConfigError, InputError
from curate.files import write_batches
from curate.filters import Decontaminate
from curate.select import decontaminate, known
from curate.select.relevance import fill, score
from tests.curate.fetched import dropped, encoded, fetched, kept, ledger, noise, pack_rows, row, select_rows, tiny_clip


def step(name, **operator):
    return {"name": name, **operator}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def crawl(tmp_path_factory, clip):
    """24 pictures, measured; 6 and 7 are one file, 8 a near copy of 9."""
    rows = [row(number, noise(number), entropy=float(number)) for number in range(24)]
    rows[7]["rgb"] = noise(6)
    near = noise(9).copy()
    near[:8, :8] //= 2
    rows[8]["rgb"] = near
    out = fetched(tmp_path_factory.mktemp("crawl") / "out", [*rows, row(24)])
    measure.run(out, MeasureConfig(text=False, clip=clip))
    return out


@pytest.fixture
def out(crawl, tmp_path):
    """A copy of the crawl, by links: only the ledger and what comes after it differ."""
    folder = tmp_path / "out"
    folder.mkdir()
    for stage in ("plan", "raw", "signals"):
        (folder / stage).symlink_to(crawl / stage)
    return folder


def embeddings(out):
    """Row → image embedding, float64, as stored but of length 1 again."""
    tables = [pq.read_table(path) for path in sorted((out / "signals" / "clip").glob("*.parquet"))]
    by_key = {
        key: np.array(vector, np.float64) / np.linalg.norm(np.array(vector, np.float64))
        for table in tables
        for key, vector in zip(table["key"].to_pylist(), table["image_embedding"].to_pylist(), strict=True)
    }
    return {line["row"]: by_key[line["key"]] for line in ledger(out) if line["key"] in by_key}


def texts(clip, captions):
    return load_clip(clip.name, clip.pretrained, device="cpu").embed_captions(captions).numpy().astype(np.float64)


# --- relevance -------------------------------------------------------------------------------------------------------


def test_score_is_by_the_nearest_prompt_less_the_mean_contrast_and_by_the_nearest_example():
    random = np.random.default_rng(0)
    image, prompt, against, example = (random.normal(size=(n, 6)).astype(np.float32) for n in (5, 3, 2, 4))
    nothing = np.zeros((0, 0), np.float32)
    to_prompts = [
        max(float(np.dot(i, p)) for p in prompt) - sum(float(np.dot(i, a)) for a in against) / 2 for i in image
    ]
    to_examples = [max(float(np.dot(i, e)) for e in example) for i in image]
    np.testing.assert_allclose(score(image, prompt, against, nothing), to_prompts, atol=2e-6)
    np.testing.assert_allclose(score(image, prompt[:1], nothing, nothing), image @ prompt[0], atol=2e-6)
    np.testing.assert_allclose(score(image, nothing, against, example), to_examples, atol=2e-6)
    both = np.mean([to_prompts, to_examples], axis=0)
    np.testing.assert_allclose(score(image, prompt, against, example), both, atol=2e-6)


def test_relevance_keeps_the_share_nearest_prompts_and_examples(out, clip, tmp_path):
    examples = tmp_path / "examples"
    examples.mkdir()
    for number in (3, 4):
        Image.fromarray(noise(number)).save(examples / f"{number}.png")
    relevance = {"prompts": ["a red {}", "blue"], "images": str(examples), "keep": 0.25}
    select_rows(out, [step("on_topic", relevance=relevance)], clip=clip, retain=0)

    stored = embeddings(out)
    prompts = texts(clip, ["a red something", "blue"])
    contrast = texts(clip, ["a photo.", "a picture of something.", "text."])
    examples_ED = np.stack([stored[3], stored[4]])
    expected = {
        n: ((prompts @ image).max() - (contrast @ image).mean() + (examples_ED @ image).max()) / 2
        for n, image in stored.items()
    }
    assert kept(out) == sorted(sorted(expected, key=lambda n: -expected[n])[:6])
    for number, value in dropped(out, "on_topic").items():
        assert float(value) == pytest.approx(expected[number], abs=2e-3)
        assert len(value.split(".")[1]) == 4


def test_relevance_keeps_what_reaches_the_threshold(out, clip):
    relevance = {"prompts": ["red"], "against": [], "threshold": -2.0}
    select_rows(out, [step("t", relevance=relevance)], clip=clip)
    assert len(kept(out)) == 24
    red = texts(clip, ["red"])[0]
    cosines = {number: image @ red for number, image in embeddings(out).items()}
    cut = float(np.median(list(cosines.values())))
    select_rows(out, [step("t", relevance={**relevance, "threshold": cut})], clip=clip, retain=0)
    assert kept(out) == sorted(number for number, cosine in cosines.items() if cosine >= cut)


def test_a_list_may_have_columns_of_any_name_a_step_uses_inside(tmp_path, clip, held_out):
    names = ("score", "rank", "cosine", "name", "number", "least", "same", "distance", "label", "kept_", "_file")
    names += ("pairs", "concept", "part", "lot", "given", "turn", "place", "rarest_", "num_rows", "captions", "taken")
    out = fetched(tmp_path / "out", [row(n, noise(n)) | dict.fromkeys(names, str(n)) for n in range(12)])
    measure.run(out, MeasureConfig(text=False, clip=clip))
    every = " AND ".join(f"{name} <> ''" for name in names if name != "kept_") + " AND list_kept_ <> ''"
    filters = [
        step("all", where=every),
        step("exact", dedup={"by": "same", "keep": "score"}),
        step("near", dedup={"by": "phash", "distance": 2, "keep": "distance"}),
        step("leak", decontaminate={"against": str(held_out), "similarity": 0.99}),
        step("on_topic", relevance={"prompts": ["red"], "keep": 0.9}),
        step("best", top={"by": "TRY_CAST(number AS DOUBLE)", "fraction": 0.9}),
        step("any", sample={"fraction": 0.9, "per": "lot"}),
        step("each", top={"by": "TRY_CAST(part AS DOUBLE)", "fraction": 0.9, "per": "given"}),
        step("wit", balance={"concepts": ["caption"], "cap": 9}),
        step("meta", balance={"concepts": ["caption"], "cap": 8, "method": "metaclip"}),
    ]
    assert select_rows(out, filters, clip=clip).kept["train"] > 0
    pack_rows(out)
    report.run(out, ReportConfig(), {"filters": filters}, 0)


def test_a_prompt_template_is_filled():
    assert fill(["a satellite photo of {}.", "a map."], []) == ["a satellite photo of something.", "a map."]
    assert fill(["a {}.", "a map.", "{} and {}"], ["cat", "dog"]) == [
        *("a cat.", "a dog.", "a map.", "cat and cat", "dog and dog"),
    ]


def test_prompts_over_a_list_of_concepts_are_prompts_like_others(out, clip, tmp_path):
    (tmp_path / "colours.txt").write_text("red\ngreen\n")
    keep = {"against": ["text."], "keep": 0.5}
    select_rows(out, [step("t", relevance={"prompts": ["a red thing", "a green thing"], **keep})], clip=clip)
    expected = dropped(out, "t")
    for concepts in (["red", "green"], str(tmp_path / "colours.txt")):
        select_rows(out, [step("t", relevance={"prompts": "a {} thing", "concepts": concepts, **keep})], clip=clip)
        assert dropped(out, "t") == expected
    (tmp_path / "colours.txt").write_text("blue\n")
    select_rows(out, [step("t", relevance={"prompts": "a {} thing", "concepts": concepts, **keep})], clip=clip)
    assert dropped(out, "t") != expected


def test_relevance_without_a_measuring_clip_or_examples_is_told(out, clip, tmp_path):
    with pytest.raises(ConfigError, match=r"set measure.clip.name"):
        select_rows(out, [step("r", relevance={"prompts": ["x"], "keep": 0.5})])
    with pytest.raises(ConfigError, match=r"filters 'r': .*nowhere: no such file"):
        select_rows(out, [step("r", relevance={"images": str(tmp_path / "nowhere"), "keep": 0.5})], clip=clip)
    (tmp_path / "broken.png").write_bytes(encoded(noise(0))[:200])
    with pytest.raises(InputError, match=r"none of the images in .* can be decoded"):
        select_rows(out, [step("r", relevance={"images": str(tmp_path / "broken.png"), "keep": 0.5})], clip=clip)


def test_signals_must_have_been_measured(out, clip, tmp_path):
    (out / "signals").unlink()
    with pytest.raises(InputError, match="run `curate measure` first"):
        select_rows(out, [], clip=clip)


def test_clip_score_is_a_column_like_any_other(out, clip):
    select_rows(out, [step("aligned", top={"by": "clip_score", "fraction": 0.5})], clip=clip)
    scores = {}
    for path in (out / "signals" / "clip").glob("*.parquet"):
        table = pq.read_table(path)
        scores |= dict(zip(table["key"].to_pylist(), table["clip_score"].to_pylist(), strict=True))
    lines = ledger(out)
    best = sorted(scores, key=lambda key: (-scores[key], key))[:12]
    assert sorted(line["key"] for line in lines if line["kept"]) == sorted(best)


# --- decontaminate ---------------------------------------------------------------------------------------------------


@pytest.fixture
def held_out(tmp_path):
    """Of the crawl: 2 as the very file, 9 re-encoded, 12 with a corner painted over; and a broken file."""
    folder = tmp_path / "held out"
    (folder / "deep").mkdir(parents=True)
    (folder / "two.png").write_bytes(encoded(noise(2)))
    (folder / "nine.jpg").write_bytes(encoded(noise(9), "JPEG", quality=70))
    changed = noise(12).copy()
    changed[:24, :24] = 128
    (folder / "deep" / "twelve.png").write_bytes(encoded(changed))
    (folder / "broken.png").write_bytes(encoded(noise(5))[:300])
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_images_of_a_test_set_are_found_by_bytes_by_hash_and_by_embedding(out, clip, held_out, caplog):
    against = {"against": str(held_out), "distance": 2}
    with caplog.at_level(logging.WARNING, "cliptailor"):
        select_rows(out, [step("leak", decontaminate=against)])
    assert "broken.png: truncated_image" in caplog.text
    assert {2, 9} <= set(dropped(out, "leak")) <= {2, 8, 9}
    lines = ledger(out)
    assert (lines[2]["value"], lines[2]["twin"]) == ("sha256", f"{held_out}/two.png")
    assert lines[9]["value"].startswith("distance=")
    assert lines[9]["twin"] == f"{held_out}/nine.jpg"

    stored = embeddings(out)
    twelve = Image.open(held_out / "deep" / "twelve.png")
    wanted = load_clip(clip.name, clip.pretrained, device="cpu").embed_images([twelve])[0].numpy()
    similarity = float(stored[12] @ wanted) - 1e-3
    select_rows(out, [step("leak", decontaminate={**against, "similarity": similarity})], clip=clip)
    assert ledger(out)[12]["twin"] == f"{held_out}/deep/twelve.png"
    assert ledger(out)[12]["value"] == f"cosine={float(stored[12] @ wanted):.4f}"
    assert ledger(out)[2]["value"] == "sha256"


def test_a_dataset_is_a_test_set_too(out, tmp_path):
    held = fetched(tmp_path / "held", [row(n, noise(n), sha256="f" * 64 if n == 40 else None) for n in (3, 40)])
    select_rows(held, [])
    pack_rows(held)
    select_rows(out, [step("leak", decontaminate={"against": str(held), "distance": 0})])
    assert dropped(out, "leak") == {3: "sha256"}
    assert ledger(out)[3]["twin"] == f"{held}/{ledger(held)[0]['key']}"


def test_a_dataset_is_known_by_the_bytes_of_its_originals(tmp_path):
    original = encoded(noise(1, 640))
    import hashlib

    sha256 = hashlib.sha256(original).hexdigest()
    held = fetched(tmp_path / "held", [row(0, noise(50), sha256=sha256)])
    select_rows(held, [])
    pack_rows(held)
    out = fetched(tmp_path / "out", [row(0, noise(1), sha256=sha256), row(1, noise(2))])
    select_rows(out, [step("leak", decontaminate={"against": str(held), "distance": 0})])
    assert dropped(out, "leak") == {0: "sha256"}


def test_a_test_set_that_is_not_there_or_empty_is_told(out, tmp_path, clip, held_out):
    with pytest.raises(ConfigError, match=r"filters 'leak': .*/none: no such file"):
        select_rows(out, [step("leak", decontaminate={"against": str(tmp_path / "none")})])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no image there"):
        select_rows(out, [step("leak", decontaminate={"against": str(tmp_path / "empty")})])
    with pytest.raises(ConfigError, match=r"set measure.clip.name"):
        select_rows(out, [step("leak", decontaminate={"against": str(held_out), "similarity": 0.9})])


def test_a_new_image_in_the_test_set_is_seen(out, held_out):
    filters = [step("leak", decontaminate={"against": str(held_out), "distance": 0})]
    assert select_rows(out, filters).made
    assert not select_rows(out, filters).made
    (held_out / "four.png").write_bytes(encoded(noise(4)))
    assert select_rows(out, filters).made
    assert 4 in dropped(out, "leak")


def test_the_same_picture_in_other_bytes_has_a_cosine_of_one(out, clip, tmp_path, monkeypatch):
    (tmp_path / "test").mkdir()
    for number in (3, 5, 11):
        (tmp_path / "test" / f"{number}.bmp").write_bytes(encoded(noise(number), "BMP"))
    monkeypatch.setattr(decontaminate, "_drop_near", lambda *_: None)  # else the hash finds them first
    leak = step("leak", decontaminate={"against": str(tmp_path / "test"), "similarity": 1.0})
    select_rows(out, [leak], clip=clip)
    assert dropped(out, "leak") == dict.fromkeys((3, 5, 11), "cosine=1.0000")


def test_of_a_test_set_in_many_blocks_the_most_similar_image_is_named(out, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(known, "BLOCK", 8)
    monkeypatch.setattr(decontaminate, "AT_ONCE", 4)
    random = np.random.default_rng(0)
    test = {}
    for number in range(45):
        rgb = noise(int(random.integers(24))).copy()
        size = int(random.integers(4, 40))
        rgb[:size, :size] = random.integers(256, size=3)
        test[f"{tmp_path}/{'ab'[number % 2]}/{number:02d}.png"] = rgb
    test[f"{tmp_path}/b/99.png"] = test[f"{tmp_path}/a/40.png"]  # equally near: the first one's name stands
    for name, rgb in test.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(encoded(rgb))
    names = sorted(test)
    select_rows(out, [])
    model = load_clip(clip.name, clip.pretrained, device="cpu")
    test_TD = model.embed_images([Image.fromarray(test[name]) for name in names]).numpy().astype(np.float64)
    cosines = {number: test_TD @ image for number, image in embeddings(out).items()}
    similarity = float(np.median([found.max() for found in cosines.values()]))
    filters = {"against": [f"{tmp_path}/a", f"{tmp_path}/b"], "distance": 0, "similarity": similarity}
    select_rows(out, [step("leak", decontaminate=filters)], clip=clip)
    lines = ledger(out)
    assert {n for n, found in cosines.items() if found.max() >= similarity + 1e-5} <= set(dropped(out, "leak"))
    by_cosine = {n: float(value[7:]) for n, value in dropped(out, "leak").items() if value.startswith("cosine=")}
    assert len(by_cosine) >= 4
    for number, value in by_cosine.items():
        assert value == pytest.approx(cosines[number].max(), abs=1e-4)
        assert cosines[number][names.index(lines[number]["twin"])] == pytest.approx(cosines[number].max(), abs=1e-6)
        assert lines[number]["twin"] != f"{tmp_path}/b/99.png"


def test_a_large_test_set_is_compared_in_bounded_memory(tmp_path):
    random = np.random.default_rng(0)
    test_TD = random.normal(size=(60_000, 96)).astype(np.float32)
    test_TD /= np.linalg.norm(test_TD, axis=1, keepdims=True)
    names = [f"test/{number}.png" for number in range(len(test_TD))]
    table = pa.table({"name": names, "sha256": names, "phash": range(len(names)), "embedding": list(test_TD)})
    rows = table.cast(known.schema())
    file = tmp_path / "test.parquet"
    write_batches(rows.to_batches(), rows.schema, file, made_from="x", row_group=known.BLOCK)
    image_ND = np.concatenate([test_TD[[7, 59_999, 30_000]], random.normal(size=(2_000, 96)).astype(np.float32) / 20])
    wanted = Decontaminate(name="leak", against=["x"], similarity=0.99)
    # What Arrow holds, which tracemalloc does not see, and what NumPy does.
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        best = decontaminate.most_similar(image_ND, [file], wanted)
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert [best.name[n] for n in range(3)] == [names[7], names[59_999], names[30_000]]
    assert not any(best.name[3:])
    whole = len(test_TD) * len(image_ND) * 4
    assert peak < 50e6 < whole / 8, f"{peak / 1e6:.0f} MB"


def test_another_threshold_needs_no_clip(out, clip, held_out, tmp_path, monkeypatch):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "3.png").write_bytes(encoded(noise(3)))

    def filters(number):
        relevance = {"images": str(tmp_path / "examples"), "prompts": ["red"], "threshold": number}
        return [
            step("leak", decontaminate={"against": str(held_out), "similarity": number}),
            step("on_topic", relevance=relevance),
        ]

    def no_clip(*_, **__):
        raise AssertionError("a CLIP is loaded")

    select_rows(out, filters(0.6), clip=clip)
    again = {path.name for path in (out / ".select").iterdir()}
    assert len(again) == 4  # test images, examples, prompts, contrast
    with monkeypatch.context() as patched:
        patched.setattr("curate.clip.load_clip", no_clip)
        assert select_rows(out, filters(0.7), clip=clip).made
        strict = ledger(out)
        (tmp_path / "examples" / "4.png").write_bytes(encoded(noise(4)))
        with pytest.raises(AssertionError, match="a CLIP is loaded"):
            select_rows(out, filters(0.7), clip=clip)
    select_rows(out, filters(0.7), clip=clip)
    assert {path.name for path in (out / ".select").iterdir()} != again  # that of one example is gone
    assert len(list((out / ".select").iterdir())) == 4
    (tmp_path / "examples" / "4.png").unlink()
    for path in (out / ".select").iterdir():
        path.unlink()
    select_rows(out, filters(0.7), clip=clip)
    assert ledger(out) == strict


# --- retain ----------------------------------------------------------------------------------------------------------


def test_retain_has_what_only_relevance_dropped(out, clip, held_out):
    relevance = step("on_topic", relevance={"prompts": ["red"], "keep": 0.25})
    before = [step("some", where="row <> 20"), relevance]
    select_rows(out, before, clip=clip, retain=0)
    domain, general = kept(out), sorted(dropped(out, "on_topic"))
    assert (len(domain), len(general)) == (6, 17)
    late = [
        step("where", where="row <> 21"),
        step("leak", decontaminate={"against": str(held_out), "distance": 0}),
        step("exact", dedup={"by": "sha256", "keep": "entropy DESC"}),
        step("near", dedup={"by": "phash", "distance": 8, "keep": "entropy DESC"}),
        step("best", top={"by": "entropy", "count": 3}),
        step("again", relevance={"prompts": ["blue"], "keep": 0.9}),
        step("one", sample={"count": 1}),
    ]
    result = select_rows(out, [*before, *late], clip=clip, retain=100, val=0.4)
    lines = ledger(out)
    retained = {line["row"] for line in lines if line["split"] == "retain"}
    # By hand: 21 fails `where`, 2 is a test image, 6 and 7 are one file, 8 and 9 near copies.
    expected = set(general) - {21, 2}
    for first, second in ((6, 7), (8, 9)):  # the kept one of a pair stays, else the one of higher entropy
        if first in expected and second in domain:
            expected -= {first}
        elif second in expected and first in domain:
            expected -= {second}
        else:
            expected -= {first} if second in expected else set()
    assert retained == expected
    assert result.kept["retain"] == len(expected)
    assert sum(result.kept.values()) == len(expected) + 1
    for number in retained:
        line = lines[number]
        assert (line["kept"], line["stage"], line["reason"]) == (True, None, None)
        assert (line["step"], bool(line["value"])) == ("on_topic" if number in general else "again", True)
    assert set(dropped(out, "on_topic")) == set(general) - retained
    assert len({line["row"] for line in lines}) == 25


def test_retain_is_a_seeded_draw_of_at_most_so_many(out, clip):
    filters = [step("on_topic", relevance={"prompts": ["red"], "keep": 0.2})]
    drawn = []
    for seed in (0, 0, 1):
        result = select_rows(out, filters, clip=clip, seed=seed, retain=5)
        assert result.kept["retain"] == 5
        drawn.append([line["row"] for line in ledger(out) if line["split"] == "retain"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_row_in_the_group_of_a_kept_row_is_never_retained(tmp_path, clip):
    rows = [row(number, noise(number)) for number in range(12)]
    for number in range(12):
        rows[number]["url"] = f"http://a.test/{number // 2}"  # two captions and pictures for each URL
    out = fetched(tmp_path / "out", rows)
    measure.run(out, MeasureConfig(text=False, clip=clip))
    select_rows(out, [step("on_topic", relevance={"prompts": ["red"], "keep": 0.3})], clip=clip, retain=100)
    groups = {}
    for line in ledger(out):
        groups.setdefault(line["duplicate_group"], set()).add(line["split"])
    assert {"train", "retain"} <= {split for splits in groups.values() for split in splits}
    assert not any({"train", "retain"} <= splits for splits in groups.values())


def test_without_a_relevance_step_nothing_is_retained(out):
    assert select_rows(out, [step("some", where="row < 5")], retain=100).kept["retain"] == 0


# --- duplicates by their embeddings ----------------------------------------------------------------------------------


def test_near_embeddings_are_duplicates_and_the_kept_one_is_named_with_the_cosine(out, clip):
    select_rows(out, [])
    by_row = embeddings(out)
    rows = sorted(by_row)
    cosine = {(a, b): float(by_row[a] @ by_row[b]) for a in rows for b in rows if a < b}
    similarity = sorted(cosine.values())[-6] - 1e-4
    near = {pair for pair, value in cosine.items() if value >= similarity}
    group = {row: row for row in rows}
    for a, b in sorted(near):
        low, high = sorted((group[a], group[b]))
        group = {row: low if name == high else name for row, name in group.items()}
    filters = [step("same", dedup={"by": "embedding", "similarity": similarity, "keep": "entropy DESC"})]
    select_rows(out, filters, clip=clip)
    best = {name: max(row for row in rows if group[row] == name) for name in group.values()}
    assert set(dropped(out, "same")) == {row for row in rows if best[group[row]] != row}
    lines = {line["row"]: line for line in ledger(out)}
    for place, value in dropped(out, "same").items():
        kept_row = best[group[place]]
        assert lines[place]["twin"] == lines[kept_row]["key"]
        assert lines[place]["duplicate_group"] == lines[kept_row]["duplicate_group"] == lines[kept_row]["key"]
        pair = (min(place, kept_row), max(place, kept_row))
        assert float(value.removeprefix("cosine=")) == pytest.approx(cosine[pair], abs=2e-3)
