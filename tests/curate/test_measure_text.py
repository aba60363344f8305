"""What captions tell by themselves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.measure.text import text_signals


def of(caption):
    return {name: values[0] for name, values in text_signals([caption]).items()}


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("Sunset over the bay with two boats", "en"),
        ("ein Foto einer schlafenden Katze", "de"),
        ("un chat noir sur le toit de la maison", "fr"),
        ("屋根の上の黒い猫の写真", "ja"),
        ("чёрная кошка сидит на крыше", "ru"),
        ("cat", "und"),
        ("", "und"),
        ("12345 67890", "und"),
    ],
)
def test_the_language_is_named_where_there_is_enough_to_tell_it(caption, language):
    signals = of(caption)
    assert signals["language"] == language
    assert 0 <= signals["language_score"] <= 1
    assert (signals["language_score"] >= 0.5) is (language != "und")


@pytest.mark.parametrize(
    ("caption", "letters", "digits"), [("abc 123", 0.5, 0.5), ("", 0, 0), ("été!", 0.75, 0), ("٣ apples", 6 / 7, 1 / 7)]
)
def test_shares_are_of_what_is_not_white_space(caption, letters, digits):
    signals = of(caption)
    assert signals["letter_share"] == pytest.approx(letters, abs=1e-4)
    assert signals["digit_share"] == pytest.approx(digits, abs=1e-4)


@pytest.mark.parametrize(
    "caption",
    [
        *("IMG_1234.jpg", "img-2041", "DSC00017", "https://example.org/a b.png".replace(" ", ""), "www.example.org"),
        *(
            "Screenshot 2024-01-02 at 10.22.31.png",
            "my holiday (3).jpeg",
            "0123456789abcdef01",
            "640x480",
            "2021-05-06",
        ),
    ],
)
def test_file_names_urls_and_numbers_are_no_captions(caption):
    assert of(caption)["is_filename"]


@pytest.mark.parametrize(
    "caption",
    ["a photo of img", "Boeing 747 at the gate", "see www.example.org for the cat", "p is for parrot", "scan of a map"],
)
def test_a_caption_that_merely_names_one_is_a_caption(caption):
    assert not of(caption)["is_filename"]


@pytest.mark.parametrize(
    "caption",
    [
        *(
            "Image",
            "untitled",
            "Click to enlarge",
            "click here",
            "Stock Photo",
            "royalty-free images",
            "Image may contain: dog",
        ),
        *(
            "Product image",
            "No image",
            "image not available",
            "Loading...",
            "N/A",
            "Alamy Stock Photo",
            "  thumbnail  ",
        ),
    ],
)
def test_boilerplate_is_told_whatever_its_case_and_space(caption):
    assert of(caption)["is_boilerplate"]


@pytest.mark.parametrize(
    "caption", ["image of a red fox", "a stock photo of two cats", "test pilot", "photo finish at the derby"]
)
def test_a_caption_with_such_a_word_in_it_is_none(caption):
    assert not of(caption)["is_boilerplate"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=300), max_size=5))
def test_any_captions_give_a_value_each_in_their_order(captions):
    together = text_signals([*captions, "\ud800", "a\0b"])
    assert {len(values) for values in together.values()} == {len(captions) + 2}
    for place, caption in enumerate(captions):
        assert {name: values[place] for name, values in together.items()} == of(caption)
