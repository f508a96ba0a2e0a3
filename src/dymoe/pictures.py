"""The one way to open an encoded picture: its size is bounded before anything is decoded. Imports Pillow alone."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dymoe.errors import DymoeError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 89_478_485  # where Pillow begins to warn: a quarter of a GiB in RGB


def check_size(size: int) -> None:
    """Refuse an encoded picture of more than `MAX_BYTES` bytes.

    Raises:
        DymoeError: it has more.
    """
    if size > MAX_BYTES:
        raise DymoeError(f"a picture of {size} bytes; at most {MAX_BYTES} ({MAX_BYTES >> 20} MiB) are read")


@contextmanager
def opened(data: bytes, formats: tuple[str, ...] | None = None) -> Iterator["Image"]:
    """Open PNG, JPEG, WebP .. bytes; the block decodes what it needs.

    Args:
        data: the encoded picture.
        formats: names of Pillow's formats that are tried; all that it reads when None.

    Raises:
        DymoeError: more than `MAX_BYTES` bytes or `MAX_PIXELS` pixels; told from the header, before decoding.
    """
    from PIL import Image

    check_size(len(data))
    most = f"at most {MAX_PIXELS // 10**6} million are read"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
            picture = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise DymoeError(f"a picture of more than {2 * MAX_PIXELS // 10**6} million pixels; {most}") from None
    with picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise DymoeError(f"a picture of {picture.width} x {picture.height} pixels; {most}")
        yield picture
