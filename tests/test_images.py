"""The one decoder: bounded, raster formats alone, the right values in every mode, errors of one line."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

from dymoe import images
from dymoe.errors import DymoeError
from dymoe.images import decode, for_browser
from dymoe.tasks.records import check_image


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"", **chunks: bytes) -> bytes:
    """A PNG of the given header and (filtered) rows; `chunks` stand before the rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    before = b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    parts = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds nothing: whoever refuses it did not decode it."""
    return png(width, height)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(values: np.ndarray, compression: str = "raw", **tags: object) -> bytes:
    """A TIFF of one channel; `tags` by their names."""
    known = {"white_is_zero": (262, 3), "sample_format": (339, 3), "low": (340, 12), "high": (341, 12)}
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        number, kind = known[name]
        info.tagtype[number] = kind
        info[number] = value
    return encoded(Image.fromarray(values), "TIFF", tiffinfo=info, compression=compression)


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
    data = encoded(Image.new("RGB", (40, 40)), "PNG")
    monkeypatch.setattr(images, "MAX_BYTES", len(data))
    read(data)
    with pytest.raises(DymoeError, match=r"a picture of \d+ bytes; at most"):
        read(data + b" ")


# --- values ------------------------------------------------------------------------------------------------

RAMP = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (48, 1))
GREY = Image.fromarray(RAMP)
WIDE = RAMP.astype(np.uint16) * 257


def rgb_rows(values: np.ndarray) -> bytes:
    """The rows of a PNG with 16 bits, unfiltered."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)


FORMS = {
    "png": encoded(GREY, "PNG"),
    "png 16 bits": encoded(Image.fromarray(WIDE), "PNG"),
    "png 16 bits rgb": png(64, 48, 16, 2, rgb_rows(np.repeat(WIDE[..., None], 3, 2).reshape(48, -1))),
    "png 16 bits grey and alpha": png(
        64, 48, 16, 4, rgb_rows(np.stack([WIDE, np.full_like(WIDE, 65535)], 2).reshape(48, -1))
    ),
    "png palette": encoded(GREY.convert("RGB").quantize(64), "PNG"),
    "png grey and alpha": encoded(GREY.convert("LA"), "PNG"),
    "apng": encoded(GREY, "PNG", save_all=True, append_images=[Image.new("L", GREY.size)]),
    "tiff": encoded(GREY, "TIFF"),
    "tiff 16 bits": tiff(WIDE),
    "tiff 16 bits, packed": tiff(WIDE, "tiff_lzw"),
    "tiff 16 bits, white is zero": tiff(65535 - WIDE, white_is_zero=0),
    "tiff 16 bits, range stated": tiff((RAMP // 51).astype(np.uint16) * 60 + 100, low=100.0, high=400.0),
    "tiff int32, range stated": tiff(RAMP.astype(np.int32) * 7 - 300, low=-300.0, high=255 * 7 - 300.0),
    "tiff uint32, range stated": tiff(RAMP.astype(np.int32), sample_format=1, low=0.0, high=255.0),
    "tiff float, range stated": tiff(RAMP.astype(np.float32) / 255, low=0.0, high=1.0),
    "tiff ycbcr": encoded(GREY.convert("RGB").convert("YCbCr"), "TIFF"),
    "tiff two pages": encoded(GREY, "TIFF", save_all=True, append_images=[Image.new("L", (9, 9))]),
    "pgm 16 bits": b"P5 64 48 65535\n" + WIDE.astype(">u2").tobytes(),
    "pgm of another range": b"P5 64 48 510\n" + (RAMP.astype(np.uint16) * 2).astype(">u2").tobytes(),
    "jpeg 2000, 16 bits": encoded(Image.fromarray(WIDE), "JPEG2000"),
    "gif, two frames": encoded(GREY, "GIF", save_all=True, append_images=[Image.new("L", GREY.size)]),
    "webp, two frames": encoded(
        GREY.convert("RGB"), "WEBP", save_all=True, append_images=[Image.new("RGB", GREY.size)], lossless=True
    ),
    "mpo": encoded(GREY, "MPO", save_all=True, append_images=[Image.new("L", GREY.size)]),
    "jpeg": encoded(GREY, "JPEG", quality=95),
    "jpeg cmyk": encoded(GREY.convert("RGB").convert("CMYK"), "JPEG", quality=95),
    "bmp": encoded(GREY, "BMP"),
}
#: How far a value may be from the ramp's: colour conversions and lossy formats round.
SLACK = {"jpeg": 3, "mpo": 3, "jpeg cmyk": 4, "tiff ycbcr": 2}


@pytest.mark.parametrize("form", FORMS)
def test_a_grey_ramp_keeps_its_values_in_every_form(form):
    right = RAMP // 51 * 51 if form == "tiff 16 bits, range stated" else RAMP
    seen = np.asarray(decode(FORMS[form])).astype(int)
    assert seen.shape == (48, 64, 3)
    assert abs(seen - right[..., None]).max() <= SLACK.get(form, 0)


def changed_tag(data: bytes, tag: int, old: int, new: int) -> bytes:
    """A little-endian TIFF with another value of a short tag."""
    before, after = (struct.pack("<HHIH", tag, 3, 1, value) for value in (old, new))
    assert before in data
    return data.replace(before, after)


def test_twelve_bits_have_a_range_of_their_own():
    sixteen = tiff(np.array([[0, 0xFF0F]], np.uint16))  # its last three bytes hold 0x000, 0xfff packed
    twelve = changed_tag(sixteen, 258, 16, 12)[:-4] + b"\x00\x0f\xff\x00"
    assert np.asarray(decode(twelve))[0, :, 0].tolist() == [0, 255]


def test_colours_of_other_spaces():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    lab = Image.new("LAB", (4, 4), (136, 208, 195))  # L 53, a 80, b 67
    assert np.allclose(decode(encoded(lab, "TIFF")).getpixel((0, 0)), [255, 0, 0], atol=14)
    assert decode(encoded(red.convert("CMYK"), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    assert decode(encoded(Image.new("1", (8, 1), 1), "PNG")).getpixel((3, 0)) == (255, 255, 255)


def test_transparency_is_laid_on_white():
    white, grey = (255, 255, 255), (127, 127, 127)
    half = encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG")
    assert decode(half).getpixel((0, 0)) == grey
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    assert decode(encoded(palette, "PNG", transparency=0)).getpixel((0, 0)) == white
    assert decode(encoded(palette, "PNG", transparency=b"\x00\xff")).getpixel((1, 0)) == (0, 0, 255)
    assert decode(encoded(palette, "GIF", transparency=1)).getpixel((1, 0)) == white
    straight = encoded(Image.new("LA", (2, 2), (64, 128)), "TIFF")
    assert decode(straight).getpixel((0, 0)) == (159, 159, 159)
    multiplied = changed_tag(straight, 338, 2, 1)
    assert Image.open(io.BytesIO(multiplied)).mode == "La"
    assert decode(multiplied).getpixel((0, 0)) == (191, 191, 191)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key"),
    [
        (1, 0, b"\x40", (1,)),
        (2, 0, b"\x30", (3,)),
        (4, 0, b"\x0f", (15,)),
        (8, 0, b"\x00\xff", (255,)),
        (16, 0, b"\x00\x00\x80\x01", (0x8001,)),
        (8, 2, b"\x00\x00\x00\x10\x20\x30", (16, 32, 48)),
        (16, 2, b"\x00\x00\x00\x00\x00\x00\x10\x01\x20\x02\x30\x03", (0x1001, 0x2002, 0x3003)),
    ],
)
def test_the_transparent_colour_of_any_depth_is_white_and_the_others_stay(depth, colour, row, key):
    chunk = struct.pack(f">{len(key)}H", *key)
    seen = np.asarray(decode(png(2, 1, depth, colour, b"\0" + row, tRNS=chunk)))
    assert seen[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(RAMP.astype(np.int32) * 257), "whole values with a sign or without a range"),
        (tiff(RAMP.astype(np.float32) / 255), "float values with a sign or without a range"),
        (tiff(np.array([[0, np.nan]], np.float32), low=0.0, high=1.0), "leave its range of 0 to 1"),
        (tiff(np.array([[0, 2]], np.int32), low=0.0, high=1.0), "leave its range of 0 to 1"),
        (tiff(WIDE, sample_format=2), "with a sign"),
        (tiff(RAMP, sample_format=2), "signed values"),
        (b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0, 1), "float values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_whose_black_and_white_nobody_knows_are_refused(data, reason):
    with pytest.raises(DymoeError, match=reason) as caught:
        decode(data)
    assert "save it with" in str(caught.value) or "leave its range" in str(caught.value)


def test_orientation_is_read_of_whole_exif_data_and_left_of_broken_ones():
    corner = Image.new("RGB", (8, 4))
    corner.putpixel((0, 0), (255, 255, 255))
    places = {1: (0, 0), 2: (7, 0), 3: (7, 3), 4: (0, 3), 5: (0, 0), 6: (3, 0), 7: (3, 7), 8: (0, 7)}
    for orientation, place in places.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        seen = decode(encoded(corner, "PNG", exif=exif))
        assert seen.size == ((8, 4) if orientation < 5 else (4, 8))
        assert seen.getpixel(place) == (255, 255, 255)
    for broken in (
        b"Exif\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0" + b"\xff" * 40,
        b"Exif\0\0II*\0\x99\0\0\0",
    ):
        assert decode(encoded(corner, "JPEG", exif=broken)).size == (8, 4)


# --- what is not read --------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "data",
    [
        EPS,
        b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIII", 32, len(EPS), 0, 0, 0, 0) + b"\xff\xff\0\0" + EPS,
        b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
        b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 9, 9, 72) + bytes(20) + b"\x01\0\t\0",
        struct.pack("<I", 1) + bytes(36) + b" EMF" + bytes(80),
        b"SIMPLE  =                    T" + b" " * 2850,
        b"\x89HDF\r\n\x1a\n" + bytes(64),
        b"GRIB" + bytes([0, 0, 0, 1]) + bytes(64),
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    ],
    ids=["eps", "dos eps", "pdf", "wmf", "emf", "fits", "hdf5", "grib", "svg"],
)
def test_formats_that_other_programs_would_read_are_refused(data, tmp_path, monkeypatch):
    called = tmp_path / "called"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho called >> {called}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DymoeError, match="not a format that is read: PNG, JPEG"):
        decode(data)
    assert not called.exists()


BROKEN = [data for data in FORMS.values() if len(data) < 20_000]


@pytest.mark.filterwarnings("ignore")  # of Pillow, about broken tags
def test_broken_bytes_are_one_line_whatever_the_decoder_meets():
    random = np.random.default_rng(0)
    refused: list[str] = []
    for data in BROKEN:
        for _ in range(12):
            changed = bytearray(data[: random.integers(1, len(data))] if random.random() < 0.3 else data)
            for place in random.integers(0, min(len(changed), 400), random.integers(1, 6)):
                changed[place] = random.integers(0, 256)
            try:
                assert decode(bytes(changed)).mode == "RGB"
            except DymoeError as error:
                refused.append(str(error))
    assert len(refused) > 50
    assert not [told for told in refused if "\n" in told or len(told) > 400]


def test_a_decoder_out_of_memory_is_one_line(monkeypatch):
    def full(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", full)
    with pytest.raises(DymoeError, match=r"broken image of \d+ bytes \(MemoryError\)"):
        decode(FORMS["png"])


def test_importing_the_decoder_loads_no_pillow():
    code = "import sys, dymoe.images; assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what a page shows -------------------------------------------------------------------------------------


def test_a_page_gets_kinds_that_browsers_know():
    small = encoded(GREY, "JPEG")
    assert for_browser(small, 40_000, 320) == (small, "image/jpeg")
    for kind in ("TIFF", "BMP", "GIF"):
        shown, mime = for_browser(encoded(GREY, kind), 40_000, 320)
        assert (mime, Image.open(io.BytesIO(shown)).format) == ("image/jpeg", "JPEG")
        shown, mime = for_browser(encoded(GREY, kind))
        assert mime == "image/png"
        assert np.array_equal(np.asarray(decode(shown))[..., 0], RAMP)
    shown, mime = for_browser(encoded(GREY.resize((900, 450)), "PNG"), 500, 320)
    assert (mime, Image.open(io.BytesIO(shown)).size) == ("image/jpeg", (320, 160))
