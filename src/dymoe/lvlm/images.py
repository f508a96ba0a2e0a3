"""Encoded image bytes to an RGB picture."""

import os
import struct
import zlib
from typing import TYPE_CHECKING

from dymoe.errors import DymoeError
from dymoe.files import not_itself
from dymoe.pictures import opened

if TYPE_CHECKING:
    from PIL.Image import Image


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(data: bytes) -> "Image":
    """Decode PNG, JPEG, WebP .. bytes to RGB, upright by its EXIF tag; transparency is laid on white.

    Raises:
        DymoeError: the bytes are no complete picture, or a larger one than is read; the message says what the decoder
            met.
    """
    from PIL import Image, ImageOps

    try:
        with opened(data) as found:
            found.load()
            picture = ImageOps.exif_transpose(found)
        if picture.has_transparency_data:
            cut_out = picture.convert("RGBA")
            white = Image.new("RGBA", cut_out.size, "white")
            return Image.alpha_composite(white, cut_out).convert("RGB")
        return picture.convert("RGB")
    except DymoeError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        reason = "not an image format that Pillow reads" if "cannot identify" in str(error) else str(error)
        if instead := not_itself(data):
            reason = f"it {instead}"
        raise DymoeError(f"broken image of {len(data)} bytes ({reason})") from error
