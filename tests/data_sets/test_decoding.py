"""Single images: every mode comes out as Pillow converts it."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dia_diffusion.data.decoding import image_to_pixels, on_white, open_image, to_pixels, to_unit_range


def picture(size=(12, 12), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_comes_out_as_pillow_converts_it(mode, channels):
    image = Image.fromarray(picture()).convert(mode)
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    pixels = image_to_pixels(image, 12, channels)
    assert np.array_equal(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0), expected)


def test_pixel_range_round_trips():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_unit_range(levels)), levels)
    assert to_unit_range(levels)[[0, 255]].tolist() == [-1, 1]
    assert to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def png(colour_type, bits, width, rows, transparency=b""):
    """A PNG file written by hand, of one row: Pillow cannot write colour keys of 2, 4 and 16 bits."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0))
    key = chunk(b"tRNS", transparency) if transparency else b""
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress(b"\0" + rows)) + chunk(b"IEND", b"")


def saved(image, name, **options):
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def read(data, channels=3, bits=8):
    """The single row of pixels of a file, as lists: `(H=1, W)` of each channel."""
    image = open_image({"bytes": data, "path": None})
    return image_to_pixels(image, image.size[1], channels, bits)[:, 0].tolist()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(0, 1, 2, b"\x40", struct.pack(">H", 0)), [255, 255]),
        (png(0, 2, 2, b"\x60", struct.pack(">H", 1)), [255, 170]),
        (png(0, 4, 2, b"\x1e", struct.pack(">H", 1)), [255, 238]),
        (png(0, 8, 2, b"\x05\x09", struct.pack(">H", 5)), [255, 9]),
        (png(0, 16, 2, struct.pack(">HH", 257, 514), struct.pack(">H", 257)), [255, 2]),
        (png(4, 8, 3, b"\x00\x00\x00\x80\x00\xff"), [255, 127, 0]),
        (png(2, 8, 2, b"\x05\x05\x05\x07\x07\x07", struct.pack(">HHH", 5, 5, 5)), [255, 7]),
        (png(2, 16, 2, struct.pack(">6H", *[1285] * 3, *[1799] * 3), struct.pack(">HHH", *[1285] * 3)), [255, 7]),
        (png(6, 8, 3, b"\x00\x00\x00\x00\x00\x00\x00\x80\x00\x00\x00\xff"), [255, 127, 0]),
    ],
)
def test_what_is_transparent_lies_on_white(data, expected):
    """A black icon on a transparent ground is one in white, whatever colour the ground hides."""
    assert read(data) == [expected] * 3
    assert read(data, channels=1) == [expected]
    assert read(data, bits=16) == [[257 * value for value in expected]] * 3


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_every_mode_with_alpha_lies_on_white(mode):
    grey = Image.new("LA", (4, 4), (60, 0))
    grey.putpixel((0, 0), (60, 255))
    image = {"La": lambda: grey.convert("La"), "LA": lambda: grey}.get(
        mode, lambda: grey.convert("RGBA").convert(mode)
    )()
    flat, transparent = on_white(image)
    assert transparent
    assert [flat.convert("L").getpixel(place) for place in ((0, 0), (1, 1))] == [60, 255]
    assert on_white(Image.new("RGBA", (4, 4), (1, 2, 3, 255)))[1] is False


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint32, np.float32])
def test_pixels_of_unknown_range_are_refused(kind):
    data = saved(Image.fromarray(np.full((2, 2), 7, kind)), "TIFF")
    with pytest.raises(ValueError, match="no known range"):
        read(data)


def test_deep_grey_has_its_range():
    pgm = b"P5\n2 1\n1000\n" + struct.pack(">HH", 500, 1000)
    assert read(pgm, bits=16) == [[32768, 65535]] * 3
    for name in ("PNG", "TIFF"):
        assert read(saved(Image.fromarray(np.array([[0, 65535]], np.uint16)), name), 1) == [[0, 255]]


def test_lab_is_colour_as_pillow_knows_it():
    image = Image.new("LAB", (2, 1), (255, 128, 128))
    assert read(saved(image, "TIFF"), 1) == [[255, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_the_tag_even_beside_broken_ones(orientation):
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(saved(image, "PNG", exif=exif)))))
    turned = open_image({"bytes": saved(image, "PNG", exif=exif), "path": None})
    assert np.array_equal(np.asarray(turned), expected)


@pytest.mark.parametrize(
    "exif",
    [
        # An orientation that is text, one that is a fraction, and tags that end too early.
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x01\0\0\0\x1a\0\0\0\0\0\0\0\0\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12",
        b"Exif\0\0nonsense",
    ],
)
def test_broken_metadata_does_not_stop_an_image_that_decodes(exif):
    image = Image.fromarray(picture((16, 8)))
    data = saved(image, "JPEG", exif=exif)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(open_image({"bytes": data, "path": None})), expected)


def test_shapes_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="too long for its width"):
        image_to_pixels(Image.new("L", (100_000, 1)), 512, 3)
