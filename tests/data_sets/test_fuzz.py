"""Files of many formats, broken in many ways: decoded as Pillow decodes them, or named."""

import io
import warnings

import datasets
import numpy as np
import pytest
from PIL import Image

from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.errors import UsageError

FORMATS = "AVIF BMP DDS GIF ICNS ICO IM JPEG JPEG2000 MPO MSP PCX PNG PPM QOI SGI SPIDER TGA TIFF WEBP XBM".split()
GREY = {"MSP": "1", "XBM": "1", "SPIDER": "F"}


def encode(name):
    size = (16, 16)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(GREY.get(name, "P" if name == "GIF" else "RGB"))
    file = io.BytesIO()
    image.save(file, format=name, **({"sizes": [size]} if name == "ICO" else {}))
    return file.getvalue()


def broken(data, rng, count):
    """The file, truncated, with bytes flipped, with bytes removed."""
    yield data
    for _ in range(count):
        at = int(rng.integers(1, len(data)))
        yield data[:at]
        flipped = bytearray(data)
        # Most of what can go wrong is in the header.
        for place in rng.integers(0, len(data) if rng.random() < 0.5 else min(64, len(data)), rng.integers(1, 9)):
            flipped[place] = int(rng.integers(0, 256))
        yield bytes(flipped)
        yield data[:at] + data[at + int(rng.integers(1, 9)) :]


def as_pillow(data):
    """What Pillow makes of it, and `None` where it raises anything, or where the pixels have no known range."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        if image.mode in ("F", "I") or image.has_transparency_data or image.getexif().get(274, 1) != 1:
            return "special"
        return np.asarray(image.convert("RGB"))
    except Exception:
        return None


def prepare(data, **options):
    cells = {"image": [{"bytes": data, "path": "some.file"}]}
    rows = datasets.Dataset.from_dict(cells, datasets.Features(image=datasets.Image()))
    return prepare_pixels(rows, 16, 3, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_broken_files_are_decoded_as_pillow_decodes_them_or_named(name, monkeypatch, capfd):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/none")
    rng = np.random.default_rng(FORMATS.index(name))
    compared = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in broken(encode(name), rng, 4):
            expected = as_pillow(data)
            if expected is None:
                with pytest.raises(UsageError, match=r"'some.file' \(number 0 of the data set\) cannot be read: "):
                    prepare(data)
                continue
            try:
                pixels = prepare(data)
            except UsageError:
                assert isinstance(expected, str)
                continue
            if not isinstance(expected, str) and expected.shape == (16, 16, 3):
                assert np.array_equal(pixels.fetch([0])["images"][0].numpy().transpose(1, 2, 0), expected)
                compared += 1
    datasets.enable_progress_bars()
    assert compared or name in ("SPIDER", "DDS", "ICO", "ICNS")
