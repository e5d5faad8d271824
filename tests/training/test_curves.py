"""The curves of a run, and the lines that they are drawn from."""

import json

import numpy as np
from PIL import Image

from dia_diffusion.training.log import read_metrics
from dia_diffusion.training.results import save_curves


def test_curves_are_drawn_for_what_there_is(tmp_path):
    metrics = [{"step": step, "loss": 1 / step, "learning_rate": 1e-3} for step in range(1, 50)]
    save_curves(metrics, tmp_path / "a.png")
    save_curves([*metrics, {"step": 49, "held_out_loss": 0.5}], tmp_path / "b.png")
    save_curves([], tmp_path / "c.png")
    pictures = {name: np.asarray(Image.open(tmp_path / f"{name}.png")).tobytes() for name in "abc"}
    assert len(set(pictures.values())) == 3


def test_unfinished_and_damaged_lines_of_metrics_are_left_out(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in range(3)]
    lines[1:1] = ['{"step": 9, "lo\n', "[1]\n", "{}\n", "\udcff\n"]
    content = "".join(lines) + '{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]
