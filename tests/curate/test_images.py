"""Bytes → pixels, against Pillow, NumPy and scikit-learn's photographs."""

import io
import json
import struct
import subprocess
import sys
import zlib
from contextlib import suppress

import cv2
import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from sklearn.datasets import load_sample_images

from curate.images import Rejected, Resize, decode, probe, upright
from curate.ledger import Reason

MANY = 50_000_000
pillow_heif.register_heif_opener(thumbnails=False)
CHINA, FLOWER = (np.asarray(image) for image in load_sample_images().images)


def encoded(image, kind="JPEG", **options):
    sink = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(sink, kind, **options)
    return sink.getvalue()


def reason_of(content, **limits):
    with pytest.raises(Rejected) as rejected:
        decode(content, **{"max_pixels": MANY, **limits})
    return rejected.value.reason


def mean_difference(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


# --- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("JPEG", {}, "jpeg"),
        ("JPEG", {"progressive": True}, "jpeg"),
        ("JPEG", {"exif": Image.Exif().tobytes(), "icc_profile": b"x" * 70_000}, "jpeg"),
        ("PNG", {}, "png"),
        ("GIF", {}, "gif"),
        ("WEBP", {"lossless": True}, "webp"),
        ("WEBP", {"quality": 80}, "webp"),
        ("WEBP", {"quality": 80, "exif": Image.Exif().tobytes() + b"x"}, "webp"),
        ("BMP", {}, "bmp"),
        ("TIFF", {}, "tiff"),
        ("TIFF", {"compression": "tiff_lzw"}, "tiff"),
        ("AVIF", {}, "avif"),
        ("HEIF", {}, "heic"),
    ],
)
def test_the_header_alone_gives_format_and_size(kind, options, name):
    header = probe(encoded(CHINA[:77, :123], kind, **options))
    assert (header.format, header.width, header.height) == (name, 123, 77)


@pytest.mark.parametrize("kind", ["PPM", "PDF", "TGA"])
def test_other_formats_are_not_images_here(kind):
    assert reason_of(encoded(CHINA[:32, :32], kind)) is Reason.NOT_AN_IMAGE


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg"),
        (b"\xef\xbb\xbf <svg/>", "svg"),
        (b"8BPS\0\1" + bytes(99), "psd"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "eps"),
        (b"\xff\x0a" + bytes(99), "jxl"),
        (b"\0\0\1\0\1\0" + bytes(99), "ico"),
    ],
)
def test_images_that_nothing_here_decodes_are_told_by_their_kind(content, kind):
    with pytest.raises(Rejected) as rejected:
        decode(content, max_pixels=MANY)
    assert (rejected.value.reason, rejected.value.value) == (Reason.UNSUPPORTED_IMAGE, kind)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"<html><body>404</body></html>", b"BM, said", b"\xff\xd8", bytes(1000)]
)
def test_what_is_no_image_is_told_so(content):
    assert reason_of(content) is Reason.NOT_AN_IMAGE


def png_of(width, height):
    def block(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = block(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + block(b"IDAT", zlib.compress(bytes(1000))) + block(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header_before_any_pixel_is_decoded():
    with pytest.raises(Rejected) as rejected:
        decode(png_of(60_000, 60_000), max_pixels=MANY)
    assert (rejected.value.reason, rejected.value.value) == (Reason.TOO_MANY_PIXELS, "60000x60000")


def test_a_gif_frame_larger_than_its_screen_is_counted_too():
    small_screen = bytearray(encoded(CHINA[:100, :100], "GIF"))
    small_screen[6:10] = struct.pack("<HH", 2, 2)
    assert reason_of(bytes(small_screen), max_pixels=5000) is Reason.TOO_MANY_PIXELS


def test_a_jpeg_of_a_thousand_scans_is_refused():
    content = encoded(CHINA, progressive=True)
    scan = content.rindex(b"\xff\xda")
    bomb = content[:scan] + content[scan:-2] * 300 + b"\xff\xd9"
    assert reason_of(bomb) is Reason.CORRUPT_IMAGE


def test_a_baseline_jpeg_of_a_thousand_scans_is_refused():
    content = encoded(Image.fromarray(CHINA[:16, :16, 0]))
    frame = content.index(b"\xff\xc0")
    # Three components are announced, and each of the scans brings the first of them.
    header = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 16, 16, 3) + b"".join(bytes([n, 0x11, 0]) for n in (1, 2, 3))
    scan = content[content.index(b"\xff\xda") : -2]
    tables = content[2:frame] + header + content[frame + 13 : content.index(b"\xff\xda")]
    assert reason_of(b"\xff\xd8" + tables + scan * 1000 + b"\xff\xd9") is Reason.CORRUPT_IMAGE


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1)])
def test_tracking_pixels_are_too_small(size):
    assert reason_of(encoded(Image.new("RGB", size), "PNG"), min_side=2) is Reason.TOO_SMALL


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": Image.Exif().tobytes() + b"x"}),
    ],
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_an_image_cut_anywhere_is_truncated(kind, options, share):
    content = encoded(CHINA, kind, **options)
    assert reason_of(content[: int(len(content) * share)]) is Reason.TRUNCATED_IMAGE


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF"])
@pytest.mark.parametrize("reach", [200, 1 << 20], ids=["head", "all"])
def test_damaged_bytes_cost_a_reason_and_nothing_else(kind, reach):
    content = encoded(CHINA[:120, :160], kind)
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(3, min(reach, len(content)), size=rng.integers(1, 12)):
            damaged[place] = rng.integers(256)
        with suppress(Rejected):
            decode(bytes(damaged), max_pixels=MANY)


@settings(max_examples=300, deadline=2000, derandomize=True)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF"]),
    cut=st.floats(0, 1),
    patches=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8)), max_size=6),
)
def test_no_bytes_do_more_than_be_rejected(kind, cut, patches):
    content = bytearray(encoded(CHINA[:60, :80], kind))
    for place, patch in patches:
        at = int(place * len(content))
        content[at : at + len(patch)] = patch
    with suppress(Rejected):
        decode(bytes(content[: round(len(content) * (1 - cut**4))]), max_pixels=MANY, resize=Resize("keep_ratio", 32))


def test_rubbish_after_the_image_is_borne():
    assert decode(encoded(CHINA) + b"\r\nmore" * 99, max_pixels=MANY).rgb.shape == CHINA.shape


# --- pixels as a viewer shows them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_as_pillow_does(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"WEBP": {"lossless": True}, "AVIF": {"quality": 90}}.get(kind, {})
    content = encoded(CHINA[:200, :300], kind, exif=exif, **more)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    decoded = decode(content, max_pixels=MANY)
    assert (decoded.height, decoded.width) == expected.shape[:2] == decoded.rgb.shape[:2]
    assert mean_difference(decoded.rgb, expected) < 1
    assert decoded.plain == (orientation == 1 and kind not in ("TIFF", "AVIF"))
    assert upright(content, probe(content)) == (decoded.width, decoded.height, decoded.exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF"])
def test_the_upright_size_and_the_exif_need_no_pixel(kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = 6, "Box Brownie"
    content = bytearray(encoded(CHINA[:200, :300], kind, exif=exif.tobytes()))
    assert upright(bytes(content), probe(content))[2] == decode(bytes(content), max_pixels=MANY).exif
    decoded = decode(bytes(content), max_pixels=MANY)
    if kind == "PNG":  # with the notes behind the pixels, and these broken
        start = content.index(b"eXIf") - 4
        notes = content[start : start + 12 + int.from_bytes(content[start : start + 4], "big")]
        content = content.replace(notes, b"").replace(b"\0\0\0\0IEND", notes + b"\0\0\0\0IEND")
        assert decode(bytes(content), max_pixels=MANY).exif == decoded.exif
        pixels = content.index(b"IDAT")
        content[pixels + 10 : pixels + 40] = b"\xff" * 30
    assert upright(bytes(content), probe(bytes(content))) == (decoded.width, decoded.height, decoded.exif)
    assert (decoded.width, decoded.height) == (200, 300)
    assert json.loads(decoded.exif) == {"Model": "Box Brownie", "Orientation": 6 if kind != "HEIF" else 1}


def test_notes_that_cannot_be_read_leave_the_size_as_it_is():
    content = encoded(CHINA[:20, :30], exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 200)
    assert upright(content, probe(content)) == (30, 20, None)


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 256 * 64).reshape(64, 256).astype(np.uint16)
    decoded = decode(encoded(Image.fromarray(ramp), "PNG"), max_pixels=MANY)
    assert np.abs(decoded.rgb[..., 0].astype(float) - ramp / 257).max() <= 0.5
    assert not decoded.plain


def test_the_transparent_shade_of_sixteen_bit_grey_stands_on_white_and_no_other():
    ramp = np.arange(2_000, 2_000 + 64 * 64, dtype=np.uint16).reshape(64, 64)
    content = encoded(Image.fromarray(ramp), "PNG", transparency=2_100)
    assert b"tRNS" in content
    decoded = decode(content, max_pixels=MANY)
    expected = np.where(ramp == 2_100, 255, np.round(ramp / 257))
    assert np.array_equal(decoded.rgb, np.repeat(expected[..., None], 3, axis=2))
    assert not decoded.plain


def test_transparency_stands_on_white():
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[:, :20] = (255, 0, 0, 255)
    rgba[:, 30:] = (0, 0, 255, 128)
    decoded = decode(encoded(rgba, "PNG"), max_pixels=MANY)
    assert decoded.rgb[0, 0].tolist() == [255, 0, 0]
    assert decoded.rgb[0, 25].tolist() == [255, 255, 255]
    assert np.abs(decoded.rgb[0, 35].astype(int) - [127, 127, 255]).max() <= 1
    assert not decoded.plain


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB"])
def test_png_modes_look_as_pillow_shows_them(mode):
    image = Image.fromarray(FLOWER[:90, :70]).convert(mode)
    decoded = decode(encoded(image, "PNG"), max_pixels=MANY)
    assert np.array_equal(decoded.rgb, np.asarray(image.convert("RGB")))


def test_a_palette_with_a_transparent_colour_stands_on_white():
    image = Image.fromarray(np.repeat(np.arange(4, dtype=np.uint8), 100).reshape(20, 20), "L").convert("P")
    image.info["transparency"] = 0
    decoded = decode(encoded(image, "GIF", transparency=0), max_pixels=MANY)
    assert decoded.rgb[0, 0].tolist() == [255, 255, 255]


def test_cmyk_is_converted_as_pillow_does():
    content = encoded(Image.fromarray(FLOWER).convert("CMYK"))
    decoded = decode(content, max_pixels=MANY)
    assert mean_difference(decoded.rgb, FLOWER) < 6
    assert not decoded.plain


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]
    sink = io.BytesIO()
    frames[0].save(
        sink,
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=50,
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    decoded = decode(sink.getvalue(), max_pixels=MANY)
    assert decoded.rgb.shape == (20, 30, 3)
    assert decoded.rgb[10, 15].tolist() == [255, 0, 0]
    assert not decoded.plain


@pytest.mark.parametrize("size", [(4000, 3000), (3001, 4003), (513, 700), (1200, 90)])
def test_a_large_jpeg_is_decoded_small_but_never_below_the_side_asked_for(size):
    content = encoded(Image.fromarray(CHINA).resize(size))
    decoded = decode(content, max_pixels=MANY, resize=Resize("keep_ratio", 256))
    assert (decoded.width, decoded.height) == size
    assert min(256, *size) <= min(decoded.rgb.shape[:2]) < max(600, min(size) // 2 + 2)


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("AVIF", {"quality": 90}, 4),
        ("HEIF", {"quality": 90}, 4),
    ],
)
def test_rarer_formats_are_decoded(kind, options, most):
    decoded = decode(encoded(CHINA[:99, :155], kind, **options), max_pixels=MANY)
    assert decoded.rgb.shape == (99, 155, 3)
    assert mean_difference(decoded.rgb, CHINA[:99, :155]) <= most
    assert not decoded.plain


def test_sixteen_bit_colour_is_scaled_and_not_clipped():
    deep = (CHINA[:40, :50].astype(np.uint16) * 257)[..., ::-1]
    content = cv2.imencode(".png", np.ascontiguousarray(deep))[1].tobytes()
    assert np.abs(decode(content, max_pixels=MANY).rgb.astype(int) - CHINA[:40, :50]).max() <= 1


def swapped_profile():
    """A profile whose red and green primaries are exchanged: with it, red pixels look green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack_from(">I", profile, 128)[0]):
        entry = 132 + 12 * number
        name = bytes(profile[entry : entry + 4])
        swapped = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
        profile[entry : entry + 4] = swapped
        if name == b"desc":
            offset, size = struct.unpack_from(">II", profile, entry + 4)
            profile[offset + 12 : offset + size] = (
                bytes(profile[offset + 12 : offset + size])
                .replace(b"sRGB", b"swap")
                .replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
            )
    return bytes(profile)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_colours_under_a_profile_become_srgb(kind):
    red = Image.new("RGB", (40, 30), (200, 40, 40))
    decoded = decode(encoded(red, kind, icc_profile=swapped_profile()), max_pixels=MANY)
    seen = decoded.rgb[15, 20].astype(int)
    assert seen[1] > 150 > seen[0]
    assert not decoded.plain
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = decode(encoded(red, kind, icc_profile=srgb), max_pixels=MANY)
    assert np.abs(same.rgb[15, 20].astype(int) - [200, 40, 40]).max() <= 3
    assert same.plain == (kind not in ("TIFF", "AVIF"))


@pytest.mark.parametrize(
    "profile", [b"rubbish", bytes(5_000_000), swapped_profile()[:300]], ids=["short", "huge", "cut"]
)
def test_a_broken_profile_is_ignored(profile):
    red = Image.new("RGB", (40, 30), (200, 40, 40))
    decoded = decode(encoded(red, "PNG", icc_profile=profile), max_pixels=MANY)
    assert decoded.rgb[15, 20].tolist() == [200, 40, 40]


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("profile", [True, False])
def test_webp_pixels_are_those_that_pillow_decodes(lossless, alpha, profile):
    image = Image.fromarray(FLOWER[:301, :203])
    if alpha:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    content = encoded(image, "WEBP", lossless=lossless, **({"icc_profile": swapped_profile()} if profile else {}))
    with Image.open(io.BytesIO(content)) as opened:
        expected = opened.convert("RGBA")
    if profile:
        read, srgb = ImageCms.ImageCmsProfile(io.BytesIO(swapped_profile())), ImageCms.createProfile("sRGB")
        colours = ImageCms.profileToProfile(expected.convert("RGB"), read, srgb)
        colours.putalpha(expected.getchannel("A"))
        expected = colours
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(expected)
    decoded = decode(content, max_pixels=MANY)
    assert np.abs(decoded.rgb.astype(int) - np.asarray(white.convert("RGB"))).max() <= 1
    assert decoded.plain == (not alpha and not profile)


def test_facts_of_the_camera_are_kept_and_those_of_the_place_are_not():
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0112] = "Maker\x1b[31m", "Model 1", 6
    exif.get_ifd(0x8769).update({0x829D: 2.8, 0x8827: 200, 0x9003: "2024:01:02 03:04:05", 0xA431: "serial 4711"})
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 29.0)})
    facts = json.loads(decode(encoded(CHINA[:50, :50], exif=exif), max_pixels=MANY).exif)
    assert facts == {
        "Make": "Maker[31m",
        "Model": "Model 1",
        "Orientation": 6,
        "FNumber": 2.8,
        "ISOSpeedRatings": 200,
        "DateTimeOriginal": "2024:01:02 03:04:05",
    }
    assert decode(encoded(CHINA[:50, :50]), max_pixels=MANY).exif is None


# --- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from curate.config import FetchConfig
from curate.fetch.rows import picture

def peak_kb():  # ru_maxrss would begin with that of the process which started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

picture(Path(sys.argv[1]).read_bytes(), 200, FetchConfig(max_pixels=10**9))
before = peak_kb()
result = picture(Path(sys.argv[2]).read_bytes(), 200, FetchConfig(max_pixels=10**9))
print(result.facts["status"], result.facts["value"] if "value" in result.facts else "")
print((peak_kb() - before) * 1024 / 1e6)
"""


@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [
        ("JPEG", (8000, 6200), {}),
        ("JPEG", (8000, 6200), {"progressive": True, "subsampling": 2}),
        ("PNG", (5300, 4000), {"mode": "RGBA"}),
        ("PNG", (5300, 4000), {"mode": "P"}),
        ("WEBP", (5300, 4000), {"method": 0}),
        ("WEBP", (4032, 3024), {"method": 0, "mode": "RGBA"}),
        ("AVIF", (4032, 3024), {"speed": 10}),
        ("AVIF", (3400, 3000), {"speed": 10, "mode": "RGBA"}),
        ("HEIF", (4032, 3024), {"quality": 20}),
        ("TIFF", (4400, 3000), {"compression": "tiff_lzw"}),
        ("TIFF", (4400, 3000), {"mode": "CMYK"}),
        ("BMP", (5300, 4000), {"mode": "1"}),
        ("GIF", (5000, 3700), {"mode": "P"}),
    ],
)
def test_the_largest_that_is_decoded_takes_bounded_memory(tmp_path, kind, size, options):
    options = dict(options)
    mode = options.pop("mode", "RGB")
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(encoded(CHINA[:40, :40], kind))
    image = Image.linear_gradient("L").resize(size).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(size))
    large.write_bytes(encoded(image, kind, **options))
    ran = subprocess.run([sys.executable, "-c", PEAK, small, large], capture_output=True, text=True, check=True)
    told, grown_mb = ran.stdout.splitlines()
    assert told == "success "
    assert float(grown_mb) < 190, f"{kind}: {grown_mb} MB"


@pytest.mark.parametrize(("kind", "size"), [("PNG", (8000, 6000)), ("WEBP", (8000, 6000))])
def test_what_would_take_more_is_refused_and_says_so(kind, size):
    content = encoded(Image.new("RGB", size), kind, **({"method": 0} if kind == "WEBP" else {}))
    with pytest.raises(Rejected) as rejected:
        decode(content, max_pixels=MANY)
    assert rejected.value.reason is Reason.TOO_MANY_PIXELS
    assert "MB to decode" in rejected.value.value
