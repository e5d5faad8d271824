"""Pictures: what is in them, pixel by pixel."""

import json

import numpy as np
import torch
from PIL import Image

from dia_diffusion.plots import image_grid, read_metrics, save_curves


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


def test_curves_are_drawn_for_what_there_is(tmp_path):
    metrics = [{"step": step, "loss": 1 / step, "learning_rate": 1e-3} for step in range(1, 50)]
    save_curves(metrics, tmp_path / "a.png")
    save_curves([*metrics, {"step": 49, "held_out_loss": 0.5}], tmp_path / "b.png")
    save_curves([], tmp_path / "c.png")
    pictures = {name: np.asarray(Image.open(tmp_path / f"{name}.png")).tobytes() for name in "abc"}
    assert len(set(pictures.values())) == 3


def test_an_unfinished_line_of_metrics_is_left_out(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]
