"""Encoded image bytes to an RGB picture."""

import io
import os
import struct
import zlib
from typing import TYPE_CHECKING

from dymoe.errors import DymoeError
from dymoe.files import not_itself

if TYPE_CHECKING:
    from PIL.Image import Image


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(data: bytes) -> "Image":
    """Decode PNG, JPEG, WebP .. bytes to RGB, upright by its EXIF tag; transparency is laid on white.

    Raises:
        DymoeError: the bytes are no complete picture; the message says what the decoder met.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
        if picture.has_transparency_data:
            cut_out = picture.convert("RGBA")
            white = Image.new("RGBA", cut_out.size, "white")
            return Image.alpha_composite(white, cut_out).convert("RGB")
        return picture.convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        reason = "not an image format that Pillow reads" if "cannot identify" in str(error) else str(error)
        if instead := not_itself(data):
            reason = f"it {instead}"
        raise DymoeError(f"broken image of {len(data)} bytes ({reason})") from error
