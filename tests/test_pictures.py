"""A picture's bytes and pixels are bounded before it is decoded, wherever one is opened."""

import io
import struct
import zlib

import pytest
from PIL import Image

from dymoe import pictures
from dymoe.errors import DymoeError
from dymoe.lvlm.images import decode
from dymoe.tasks.records import check_image


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds nothing: whoever refuses it did not decode it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("read", [decode, check_image])
@pytest.mark.parametrize(
    ("size", "told"), [((9460, 9460), "9460 x 9460 pixels"), ((60_000, 60_000), "more than 178 million pixels")]
)
@pytest.mark.filterwarnings("error")
def test_too_many_pixels_are_refused_by_the_header(read, size, told):
    with pytest.raises(DymoeError, match=f"a picture of {told}; at most 89 million are read"):
        read(png_header(*size))


@pytest.mark.parametrize("read", [decode, check_image])
def test_as_many_pixels_as_are_allowed_are_decoded(read):
    with pytest.raises(DymoeError, match=r"truncated|broken|cut|decode"):
        read(png_header(9459, 9459))


@pytest.mark.parametrize("read", [decode, check_image])
def test_too_many_bytes_are_refused(read, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "PNG")
    monkeypatch.setattr(pictures, "MAX_BYTES", len(buffer.getvalue()))
    read(buffer.getvalue())
    with pytest.raises(DymoeError, match=r"a picture of \d+ bytes; at most"):
        read(buffer.getvalue() + b" ")
