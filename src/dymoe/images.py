"""The one decoder of pictures: whoever shows, checks or learns from one uses it. Imports Pillow alone.

What it reads: raster formats that Pillow decodes by itself (`FORMATS`), so that no bytes reach another program,
whatever a file is called; of several frames or pages the first. Size is bounded before anything is decoded.
"""

import base64
import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dymoe.errors import DymoeError
from dymoe.files import not_itself

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # Pillow's names
#: What browsers show: the kind -> how its bytes begin.
MAGIC = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff", "image/webp": b"RIFF"}
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 89_478_485  # where Pillow begins to warn: a quarter of a GiB in RGB
_BAND = 256  # rows that are scaled together
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # colours multiplied by their alpha -> as they are
# EXIF's orientation -> Pillow's name of what turns the picture upright.
_TURNS: Mapping[Any, str] = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# Tags of TIFF.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _LOWEST, _HIGHEST = 258, 262, 339, 340, 341
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_size(size: int) -> None:
    """Refuse an encoded picture of more than `MAX_BYTES` bytes.

    Raises:
        DymoeError: it has more.
    """
    if size > MAX_BYTES:
        raise DymoeError(f"a picture of {size} bytes; at most {MAX_BYTES} ({MAX_BYTES >> 20} MiB) are read")


@contextmanager
def opened(data: bytes) -> Iterator["Image"]:
    """Open PNG, JPEG, WebP .. bytes (one of `FORMATS`); the block decodes what it needs.

    Raises:
        DymoeError: more than `MAX_BYTES` bytes or `MAX_PIXELS` pixels (told from the header, before decoding), another
            format, or whatever Pillow meets in the block; one line.
    """
    from PIL import Image, UnidentifiedImageError

    check_size(len(data))
    most = f"at most {MAX_PIXELS // 10**6} million are read"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        with picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DymoeError(f"a picture of {picture.width} x {picture.height} pixels; {most}")
            yield picture
    except DymoeError:
        raise
    except Image.DecompressionBombError:
        raise DymoeError(f"a picture of more than {2 * MAX_PIXELS // 10**6} million pixels; {most}") from None
    except UnidentifiedImageError:
        instead = not_itself(data)
        reason = f"it {instead}" if instead else f"not a format that is read: {', '.join(FORMATS)}"
        raise DymoeError(f"broken image of {len(data)} bytes ({reason})") from None
    except Exception as error:  # a decoder on broken bytes raises anything, a MemoryError or a struct.error too
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DymoeError(f"broken image of {len(data)} bytes ({reason})") from error


def decode(data: bytes) -> "Image":
    """Decode PNG, JPEG, WebP .. bytes to RGB, upright by its EXIF tag; transparency is laid on white.

    Grey values of more than 8 bits are scaled by their range: 0 to 65535 for 16 bits, or what a TIFF file states as its
    lowest and highest value.

    Raises:
        DymoeError: the bytes are no complete picture, or a larger one than is read, or values whose range nobody knows;
            the message says what the decoder met.
    """
    with opened(data) as picture:
        picture.load()
        return _upright(_rgb(picture, data), picture)


def for_browser(data: bytes, most: int | None = None, side: int | None = None) -> tuple[bytes, str]:
    """An encoded picture as a page shows it, and its kind (a key of `MAGIC`).

    Args:
        data: the encoded picture; it stays as it is where browsers know its kind and it is small enough.
        most: bytes from which on it is made smaller, a JPEG; None for never.
        side: the longer side of a smaller picture, in pixels.

    Raises:
        DymoeError: as `decode`, for a picture that does not stay as it is.
    """
    kind = next((kind for kind, magic in MAGIC.items() if data.startswith(magic)), None)
    if kind is not None and (most is None or len(data) <= most):
        return data, kind
    picture = decode(data)
    buffer = io.BytesIO()
    if most is None:
        picture.save(buffer, "PNG")
        return buffer.getvalue(), "image/png"
    if side is not None:
        picture.thumbnail((side, side))
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), "image/jpeg"


def data_uri(data: bytes) -> str:
    """A picture's bytes as an address that holds them, for pages without a network.

    Raises:
        DymoeError: they are no PNG, JPEG or WebP picture.
    """
    kind = next((kind for kind, magic in MAGIC.items() if data.startswith(magic)), None)
    if kind is None:
        raise DymoeError(f"no picture that browsers show; expected one of {', '.join(MAGIC)}")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _rgb(picture: "Image", data: bytes) -> "Image":
    """The decoded picture as 8-bit RGB; `data` is its file."""
    from PIL import Image

    tags: Mapping[int, Any] = getattr(picture, "tag_v2", {})
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _scaled(picture, tags)
    if _number(tags.get(_SAMPLE_FORMAT)) == _SIGNED:
        raise DymoeError("a picture of signed values, whose black and white nobody knows; save it with unsigned ones")
    key = picture.info.get("transparency")
    if picture.format == "PNG" and picture.mode in ("L", "RGB") and key is not None:
        # Pillow brings pixels of other depths to 8 bits, but not the colour that stands for transparent.
        depth = data[24]
        if isinstance(key, int):
            picture.info["transparency"] = key * 255 // (2**depth - 1)
        elif depth == 16:
            picture.info["transparency"] = tuple(part >> 8 for part in key)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    cut_out = picture.convert(_STRAIGHT.get(picture.mode, picture.mode)).convert("RGBA")
    white = Image.new("RGBA", cut_out.size, "white")
    return Image.alpha_composite(white, cut_out).convert("RGB")


def _scaled(picture: "Image", tags: Mapping[int, Any]) -> "Image":
    """A grey picture of 16- or 32-bit values as RGB, its lowest possible value black and its highest white."""
    import numpy as np
    from PIL import Image

    low, high = _range(picture, tags)
    values = np.asarray(picture)
    if values.dtype == np.int32 and tags and _number(tags.get(_SAMPLE_FORMAT, _UNSIGNED)) == _UNSIGNED:
        values = values.view(np.uint32)
    key = picture.info.get("transparency")
    grey = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _BAND):  # the whole picture in float64 would take eight bytes a pixel
        band = values[start : start + _BAND].astype(np.float64)
        if not (low <= band.min() and band.max() <= high):  # as well where a value is no number
            raise DymoeError(f"a picture whose values leave its range of {low:g} to {high:g}")
        shade = np.rint((band - low) * (255 / (high - low)))
        if _number(tags.get(_PHOTOMETRIC)) == _WHITE_IS_ZERO:
            shade = 255 - shade
        grey[start : start + _BAND] = shade if key is None else np.where(band == key, 255, shade)
    return Image.fromarray(grey).convert("RGB")


def _range(picture: "Image", tags: Mapping[int, Any]) -> tuple[float, float]:
    """The lowest and the highest value that a pixel of a grey picture can have.

    Raises:
        DymoeError: nobody knows.
    """
    low, high = _number(tags.get(_LOWEST)), _number(tags.get(_HIGHEST))
    if low is not None and high is not None and math.isfinite(high - low) and low < high:
        return low, high
    if picture.mode.startswith("I;16"):
        return 0, 2 ** int(_number(tags.get(_BITS)) or 16) - 1
    if picture.mode == "I" and picture.format in ("PNG", "PPM"):  # Pillow brings PPM's values to 16 bits
        return 0, 65535
    kind = "float" if picture.mode == "F" else "whole"
    raise DymoeError(
        f"a picture of 16- or 32-bit {kind} values with a sign or without a range, whose black and white nobody knows; "
        "save it with 8 or 16 unsigned bits"
    )


def _number(value: Any) -> float | None:
    """A tag's value, the first of several."""
    value = value[0] if isinstance(value, tuple) and value else value
    try:
        return float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None


def _upright(picture: "Image", source: "Image") -> "Image":
    """The picture turned as the EXIF data of its source say; as it is where these cannot be read."""
    from PIL import ExifTags
    from PIL.Image import Transpose

    try:
        turn = _TURNS.get(source.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # EXIF data are the work of many hands; the picture beside broken ones is whole
        return picture
    return picture if turn is None else picture.transpose(Transpose[turn])
