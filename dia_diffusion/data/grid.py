"""Join many images to one picture."""

import math

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

_SMALLEST_TILE = 56
_GAP = 2
_MOST_COLUMNS = 20


def image_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Join uint8 images `(B, C, H, W)` side by side; small ones are enlarged without smoothing.

    Args:
        images (`Tensor`): The images.
        columns (`int`, *optional*): Images in a row, at most 20; by default about the square root of B.
    """
    if columns is None or columns > _MOST_COLUMNS:
        columns = math.ceil(math.sqrt(len(images)))
    factor = max(1, -(-_SMALLEST_TILE // images.shape[-1]))
    tiles = []
    for image in images.numpy():
        pixels = np.kron(image.transpose(1, 2, 0), np.ones((factor, factor, 1), dtype=np.uint8))
        framed = np.pad(pixels, ((_GAP, _GAP), (_GAP, _GAP), (0, 0)), constant_values=255)
        tiles.append(Image.fromarray(framed.squeeze(-1) if framed.shape[-1] == 1 else framed).convert("RGB"))
    rows = math.ceil(len(tiles) / columns)
    tiles += [Image.new("RGB", tiles[0].size, "white")] * (rows * columns - len(tiles))
    return make_image_grid(tiles, rows=rows, cols=columns)
