"""A picture of many images, pixel by pixel."""

import numpy as np
import torch

from dia_diffusion.data.grid import image_grid


def test_a_grid_shows_each_image_enlarged_without_smoothing():
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    grid = np.asarray(image_grid(images, columns=4))
    # 8 pixels become 56, framed by 2 white ones on each side.
    assert grid.shape == (2 * 60, 4 * 60, 3)
    for number, image in enumerate(images):
        row, column = divmod(number, 4)
        tile = grid[row * 60 + 2 : row * 60 + 58, column * 60 + 2 : column * 60 + 58]
        assert np.array_equal(tile[::7, ::7], image.permute(1, 2, 0).numpy())
        assert np.array_equal(tile[3::7, 6::7], tile[::7, ::7])
    assert (grid[60:, 180:] == 255).all()


def test_grey_images_and_large_ones():
    grey = torch.randint(0, 256, (4, 1, 64, 64), dtype=torch.uint8)
    grid = np.asarray(image_grid(grey))
    assert grid.shape == (2 * 68, 2 * 68, 3)
    assert np.array_equal(grid[2:66, 2:66, 1], grey[0, 0].numpy())
