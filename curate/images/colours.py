"""Pixels of any mode and profile → what a viewer shows: 8-bit sRGB on white. In strips, so that memory stays flat."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

RGB = npt.NDArray[np.uint8]
STRIP_PIXELS = 1 << 18
# A profile is a few kB to a few hundred; one of megabytes is a mistake or a trap.
LARGEST_PROFILE = 4 << 20
_SRGB = ImageCms.createProfile("sRGB")
_GREY_16 = ("I;16", "I;16L", "I;16B", "I")


def to_rgb(image: Image.Image) -> tuple[RGB, bool]:
    """The pixels of an image's present frame, and whether a plain conversion to RGB would give the same.

    Returns:
        uint8 (H, W, 3), not rotated, and whether every reader sees these.
    """
    image.load()
    profile = foreign_profile(image.info.get("icc_profile"))
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    plain = image.mode not in _GREY_16 and profile is None and image.mode not in ("CMYK", "YCbCr", "LAB", "F")
    width, height = image.size
    rgb = np.empty((height, width, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // width)
    convert = _converter(image, profile)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows)))
        if "transparency" in image.info:
            strip.info["transparency"] = image.info["transparency"]
        part, opaque = _on_white(strip, convert) if has_alpha else (convert(strip), True)
        plain = plain and opaque
        rgb[top : top + rows] = part
    return rgb, plain


def from_bgr(pixels: npt.NDArray[np.uint8], profile: bytes | None) -> tuple[RGB, bool]:
    """As `to_rgb`, of OpenCV's pixels: (H, W, 3) or, with alpha, (H, W, 4)."""
    has_alpha = pixels.shape[2] == 4
    rgb = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB if has_alpha else cv2.COLOR_BGR2RGB), dtype=np.uint8)
    if profile is not None:
        rgb = apply_profile(rgb, profile)
    if not has_alpha or pixels[..., 3].min() == 255:
        return rgb, profile is None
    rows = max(1, STRIP_PIXELS // rgb.shape[1])
    for top in range(0, len(rgb), rows):
        rgb[top : top + rows] = _mixed(rgb[top : top + rows], pixels[top : top + rows, :, 3])
    return rgb, False


def apply_profile(rgb: RGB, profile: bytes) -> RGB:
    """RGB pixels under a profile of their own → sRGB; unchanged where the profile is not one for RGB."""
    try:
        transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), _SRGB, "RGB", "RGB")
    except (ImageCms.PyCMSError, OSError):
        return rgb
    rows = max(1, STRIP_PIXELS // rgb.shape[1])
    for top in range(0, len(rgb), rows):
        strip = Image.fromarray(rgb[top : top + rows])
        rgb[top : top + rows] = np.asarray(transform.apply(strip))
    return rgb


def foreign_profile(profile: Any) -> bytes | None:
    """The profile, if it can be read and says anything but sRGB."""
    if not isinstance(profile, bytes) or not 128 <= len(profile) <= LARGEST_PROFILE or _is_srgb(profile):
        return None
    return profile


def _is_srgb(profile: bytes) -> bool:
    """Whether it is sRGB, by its name; also if it cannot be read, for then nothing better is known."""
    try:
        described = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except (ImageCms.PyCMSError, OSError):
        return True
    return "srgb" in described.lower()


def _converter(image: Image.Image, profile: bytes | None) -> Any:
    """A function from a strip without alpha to its sRGB pixels."""
    if image.mode in _GREY_16:
        return _grey_16
    if profile is not None and image.mode in ("RGB", "L", "CMYK", "RGBA", "RGBX"):
        mode = "RGB" if image.mode in ("RGBA", "RGBX") else image.mode
        try:
            transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), _SRGB, mode, "RGB")
        except (ImageCms.PyCMSError, OSError):
            return _plainly  # a profile for another kind of pixel
        return lambda strip: np.asarray(transform.apply(strip if strip.mode == mode else strip.convert(mode)))
    return _plainly


def _plainly(strip: Image.Image) -> RGB:
    return np.asarray(strip.convert("RGB"))


def _grey_16(strip: Image.Image) -> RGB:
    """16-bit grey, which convert("RGB") would clip to white."""
    grey = np.asarray(strip).astype(np.uint32)
    return np.repeat((((grey & 0xFFFF) + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)


def _on_white(strip: Image.Image, convert: Any) -> tuple[RGB, bool]:
    if strip.mode in _GREY_16:  # Pillow has no way from it to RGBA
        alpha = np.where(np.asarray(strip) == strip.info["transparency"], 0, 255).astype(np.uint8)
        colours = convert(strip)
    else:
        rgba = strip.convert("RGBA")
        alpha, colours = np.asarray(rgba.getchannel("A")), convert(rgba.convert("RGB"))
    return (colours, True) if alpha.min() == 255 else (_mixed(colours, alpha), False)


def _mixed(colours: RGB, alpha: npt.NDArray[np.uint8]) -> RGB:
    share = alpha[..., None].astype(np.uint16)
    mixed = colours.astype(np.uint16) * share + np.uint16(255) * (np.uint16(255) - share)
    return ((mixed + 127) // 255).astype(np.uint8)
