"""Image files for a network of RGB pictures, and the picture that compares results (needs Pillow)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from numbasparse.files import write_whole

MAX_PIXELS = 1 << 24
"""Of a picture to enlarge: it is held in memory as float32, and its result, 16 times as large, as integers."""

COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
GREY16 = ("I;16", "I;16L", "I;16B", "I;16N")

RGB = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """What an image file holds.

    Attributes
    ----------
    rgb
        float32 (H, W, 3) in [0, 1]; all three alike for a grey one.
    grey
        Whether it has no colour.
    dtype
        Of its values in the file: ``numpy.uint8``, or ``numpy.uint16`` for a grey one of 16 bits.
    alpha
        uint8 (H, W), 255 where it is opaque; None without transparency.
    profile
        ICC colour profile; None without.
    """

    rgb: RGB
    grey: bool
    dtype: type[np.uint8] | type[np.uint16]
    alpha: npt.NDArray[np.uint8] | None = None
    profile: bytes | None = None

    @property
    def channels(self) -> int:
        """1 for a grey picture, else 3; without alpha."""
        return 1 if self.grey else 3

    def quantize(self, rgb: RGB) -> npt.NDArray[Any]:
        """Turn results (H, W, 3) into values of this picture's kind, (H, W, channels)."""
        values = rgb.mean(axis=2, keepdims=True) if self.grey else rgb
        top = np.iinfo(self.dtype).max
        return np.rint(values.clip(0.0, 1.0) * np.float32(top)).astype(self.dtype)


def read_picture(path: Path) -> Picture:
    """Read an image file of any format that Pillow knows, turned as its EXIF data say.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no picture, is damaged, moves, has more than ``MAX_PIXELS``, or has values that would be lost: colour
        of 16 bits, 32 bits, or other colours than RGB and grey.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have a bound of our own
            with Image.open(path) as image:
                _check(image, path)
                image.load()
                return _picture(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no image file that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}") from error
    except (OSError, SyntaxError) as error:  # what Pillow raises for a damaged file
        raise ValueError(f"{path} cannot be read: {error}") from error


def _check(image: Image.Image, path: Path) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{path} has {width} x {height} pixels, at most {MAX_PIXELS} can be enlarged: cut or reduce it first"
        )
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photograph and its preview
        raise ValueError(f"{path} has several frames: give one picture")
    # Pillow reads colour of 16 bits as 8 without a word; only its decoder's mode tells.
    stored = [str(part.args) for part in getattr(image, "tile", ())]
    if image.mode not in COLOURS + GREY16 or (image.mode not in GREY16 and any(";16" in mode for mode in stored)):
        mode = stored[0] if stored and ";16" in stored[0] else image.mode
        raise ValueError(
            f"{path} has values of mode {mode}: expected 8 bits grey or RGB, with or without alpha, a palette, or 16 "
            "bits grey; convert it first"
        )


def _picture(image: Image.Image) -> Picture:
    profile = image.info.get("icc_profile")
    if image.mode in GREY16:
        values = np.asarray(image).astype(np.float32) / np.float32(65535)
        return Picture(np.repeat(values[..., None], 3, axis=2), True, np.uint16, None, profile)
    grey = image.mode in ("1", "L", "LA")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
    rgb = np.asarray(image.convert("RGB")).astype(np.float32) / np.float32(255)
    return Picture(rgb, grey, np.uint8, alpha, profile)


def write_picture(path: Path, values: npt.NDArray[Any], picture: Picture) -> None:
    """Write what ``picture.quantize`` gave of its enlargement as PNG, whole or not at all, alpha enlarged bicubically.

    Parameters
    ----------
    values : ndarray
        (H, W, channels) of the picture's dtype.
    """
    image = Image.fromarray(values[..., 0] if picture.grey else values)
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha).resize(image.size, Image.Resampling.BICUBIC))
    write_whole(path, _png(image, icc_profile=picture.profile))


def bicubic(rgb: RGB, scale: int) -> RGB:
    """Enlarge a picture float32 (H, W, 3) in [0, 1] bicubically, as most programs do."""
    size = (rgb.shape[1] * scale, rgb.shape[0] * scale)
    channels = [Image.fromarray(rgb[..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(rgb.shape[2])]
    return np.stack([np.asarray(channel) for channel in channels], axis=2).clip(0.0, 1.0)


def write_side_by_side(path: Path, pictures: Mapping[str, RGB]) -> None:
    """Write pictures (H, W, 3) of one size in a row as PNG, each under its caption (the key, may have lines)."""
    panels = [Image.fromarray(np.rint(rgb.clip(0.0, 1.0) * 255).astype(np.uint8)) for rgb in pictures.values()]
    font = ImageFont.load_default(18)
    boxes = [_text_size(caption, font) for caption in pictures]
    gap, width, height = 8, max(p.width for p in panels), panels[0].height
    column = max(width, *(box[0] for box in boxes))
    head = max(box[1] for box in boxes) + 2 * gap
    sheet = Image.new("RGB", (len(panels) * (column + gap) - gap, head + height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (caption, panel) in enumerate(zip(pictures, panels, strict=True)):
        left = index * (column + gap)
        draw.multiline_text((left + gap, gap), caption, fill="black", font=font)
        sheet.paste(panel, (left + (column - panel.width) // 2, head))
    write_whole(path, _png(sheet))


def _text_size(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    _, _, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return round(right) + 16, round(bottom)


def _png(image: Image.Image, **options: Any) -> bytes:
    blob = io.BytesIO()
    image.save(blob, "PNG", **options)
    return blob.getvalue()
