"""Single images: every mode comes out as Pillow converts it."""

import numpy as np
import pytest
import torch
from PIL import Image

from dia_diffusion.data import to_unit_range
from dia_diffusion.data.decoding import image_to_pixels, to_pixels


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
