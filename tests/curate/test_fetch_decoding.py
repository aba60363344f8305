"""Where bodies are decoded: small JPEGs on the event loop, all others in threads; and what is noted meanwhile."""

import asyncio
import io
import threading

import pytest
from PIL import Image

import curate.fetch.decoding
from curate.config import FetchConfig
from curate.fetch.decoding import AT_ONCE_BYTES, SLOT_BYTES, THREADS, Decoder, journal_of
from curate.fetch.rows import picture
from curate.fetch.transfer import Body

KEY = "0123456789abcdef0123"


def encoded(size, **how):
    content = io.BytesIO()
    Image.effect_noise(size, 20).convert("RGB").resize(size).save(content, quality=30, **how)
    return content.getvalue()


def picture_of(tmp_path, monkeypatch, content, config):
    """What becomes of a body, whether it was decoded on the loop's thread, and the journal while it was."""
    seen = {}
    real = curate.fetch.decoding.picture

    def watched(*arguments):
        seen["on_loop"] = threading.current_thread() is threading.main_thread()
        seen["journal"] = journal_of(tmp_path / "00000").read_text()
        return real(*arguments)

    monkeypatch.setattr(curate.fetch.decoding, "picture", watched)

    async def decode():
        with Decoder(config) as decoder, decoder.journal(tmp_path / "00000") as journal:
            return await decoder.picture(Body(content, 200), KEY, journal)

    return asyncio.run(decode()), seen


@pytest.mark.parametrize(
    ("size", "how", "on_loop"),
    [
        ((640, 480), {"format": "JPEG"}, True),
        ((640, 480), {"format": "JPEG", "progressive": True}, False),
        ((2300, 1800), {"format": "JPEG"}, False),
        ((64, 48), {"format": "PNG"}, False),
    ],
)
def test_only_a_small_jpeg_of_one_scan_is_decoded_on_the_loop(tmp_path, monkeypatch, size, how, on_loop):
    result, seen = picture_of(tmp_path, monkeypatch, encoded(size, **how), FetchConfig())
    assert result.facts["status"] == "success"
    assert seen["on_loop"] is on_loop
    assert seen["journal"].split() == [KEY]
    assert len(seen["journal"]) == SLOT_BYTES * (THREADS + 1)
    assert not journal_of(tmp_path / "00000").exists()


@pytest.mark.parametrize(("padding", "on_loop"), [(0, True), (AT_ONCE_BYTES, False)])
def test_where_nothing_is_decoded_the_size_of_the_body_decides(tmp_path, monkeypatch, padding, on_loop):
    content = encoded((64, 48), format="PNG")
    config = FetchConfig(decode=False, resize_mode="no")
    body = content[:33] + bytes(padding) + content[33:]
    _, seen = picture_of(tmp_path, monkeypatch, body, config)
    assert seen["on_loop"] is on_loop


def test_where_nothing_is_decoded_sizes_are_upright_all_the_same():
    turned = Image.Exif()
    turned[0x0112] = 6
    content = encoded((64, 48), format="JPEG", exif=turned)
    plain = picture(content, 200, FetchConfig(decode=False, resize_mode="no"))
    decoded = picture(content, 200, FetchConfig(resize_mode="no"))
    names = ("width", "height", "original_width", "original_height", "exif", "aspect")
    assert [plain.facts[name] for name in names] == [decoded.facts[name] for name in names]
    assert (plain.facts["width"], plain.facts["height"], plain.content) == (48, 64, content)
